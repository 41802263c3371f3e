//! The rounding errors of f32 do not grow with the number of classes.

mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, testing};
use common::{CPU, random, random_labels, random_probabilities, values};

/// The largest relative error: 4 units of 2⁻²⁴, which is half an ulp of 1.
const MOST: f64 = 4. / (1 << 24) as f64;

/// A loss for each kind of coefficients, with its targets.
fn losses(dims: &[usize], class_dim: usize) -> Result<Vec<(LabelSmoothingLoss, Tensor)>> {
    let num_classes = dims[class_dim];
    let mut rows = dims.to_vec();
    rows.remove(class_dim);
    let labels = random_labels(&rows, num_classes, 1)?;
    let probabilities = random_probabilities(dims, class_dim, 2)?.to_dtype(DType::F32)?;
    // The roundings of a sum of equal numbers go to one side.
    let equal = Tensor::full(1. / 3., num_classes, &CPU)?;
    let uniform = Tensor::full(1. / num_classes as f64, num_classes, &CPU)?;
    let random_weights = (random(&[num_classes], 0.5, 3)? + 1.)?;
    let random_prior = random_probabilities(&[num_classes], 0, 5)?;
    let loss = |smoothing| {
        LabelSmoothingLoss::new(smoothing).with_class_dim(class_dim).with_reduction(Reduction::None)
    };
    let over_all = loss(Smoothing::over_all(0.9)?);
    Ok(vec![
        (over_all.clone(), labels.clone()),
        (over_all.clone().with_class_weights(&equal)?, labels.clone()),
        (over_all.clone().with_class_weights(&random_weights)?, labels.clone()),
        (loss(Smoothing::over_others(0.9)?), labels.clone()),
        (loss(Smoothing::toward(0.7, &uniform)?), labels.clone()),
        (loss(Smoothing::toward(0.9, &random_prior)?), labels.clone()),
        (loss(Smoothing::over_unmasked(0.9)?), labels.clone()),
        (loss(Smoothing::over_unmasked(0.9)?).with_class_weights(&random_weights)?, labels),
        (over_all, probabilities),
    ])
}

fn check(dims: &[usize], class_dim: usize) -> Result<()> {
    let (num_classes, inner_size) =
        (dims[class_dim], dims[class_dim + 1..].iter().product::<usize>());
    let logits = random(dims, 3., 4)?.to_dtype(DType::F32)?;
    for (i, (loss, targets)) in losses(dims, class_dim)?.into_iter().enumerate() {
        let variable = Var::from_tensor(&logits)?;
        let actual = loss.forward(&variable, &targets)?;
        let gradient = actual.sum_all()?.backward()?.get(&variable).expect("a gradient").clone();
        let expected = loss.forward(&logits.to_dtype(DType::F64)?, &targets)?;
        for (row, (actual, expected)) in values(&actual)?.iter().zip(values(&expected)?).enumerate()
        {
            let error = (actual - expected) / expected;
            assert!(error.abs() <= MOST, "{dims:?} {i}, row {row}: {:.1} units", error / MOST * 4.);
        }
        // The gradient of a row is softmax·Σ r − r, which sums to 0.
        let mut sums = vec![(0., 0.); actual.elem_count()];
        for (i, x) in values(&gradient)?.into_iter().enumerate() {
            let (sum, size) =
                &mut sums[i / (num_classes * inner_size) * inner_size + i % inner_size];
            *sum += x;
            *size += x.abs();
        }
        for (row, (sum, size)) in sums.into_iter().enumerate() {
            let error = sum / size.min(1.);
            assert!(
                error.abs() <= MOST,
                "{dims:?} {i}, row {row}: the gradient sums to {:.1} units",
                error / MOST * 4.
            );
        }
    }
    Ok(())
}

#[test]
fn errors_of_f32_do_not_grow_with_the_number_of_classes() -> Result<()> {
    // The emulated kernels are the same for each instruction set.
    let at_most = if cfg!(emulator) { 1 } else { usize::MAX };
    for instruction_set in testing::instruction_sets().into_iter().take(at_most) {
        if !testing::choose_instruction_set(instruction_set) {
            continue;
        }
        for num_classes in [31, 1000, 20_000] {
            check(&[2, num_classes], 1)?;
            check(&[num_classes, 3], 0)?;
        }
    }
    // The best one that this processor has.
    testing::instruction_sets().into_iter().find(|set| testing::choose_instruction_set(set));
    check(&[1, 500_000], 1)?;
    check(&[500_000, 2], 0)
}

/// The last logit is so large that nothing of the sum over the other classes is left, nor of its rounding errors.
#[test]
fn a_large_last_logit_outweighs_the_others() -> Result<()> {
    let num_classes = 20_000;
    let labels = Tensor::full(num_classes as u32 - 1, 3, &CPU)?;
    let others = random(&[3, num_classes - 1], 3., 1)?;
    let logits = Tensor::cat(&[&others, &Tensor::full(40., (3, 1), &CPU)?], 1)?;
    let plain = LabelSmoothingLoss::new(Smoothing::none()).with_reduction(Reduction::None);
    let weights = Tensor::ones(num_classes, DType::F64, &CPU)?;
    for loss in [plain.clone().with_class_weights(&weights)?, plain] {
        for (class_dim, logits) in [(1, logits.clone()), (0, logits.t()?.contiguous()?)] {
            let loss = loss.clone().with_class_dim(class_dim);
            let losses = values(&loss.forward(&logits.to_dtype(DType::F32)?, &labels)?)?;
            assert!(losses.iter().all(|loss| loss.abs() < 1e-7), "{class_dim}: {losses:?}");
        }
    }
    Ok(())
}

/// With many rows, a GPU leaves each thread many classes of a row. Only the first row counts, and the others take no time. Equal terms are
/// summed, and with these numbers most additions in f32 round to the same side.
#[test]
fn errors_of_f32_do_not_grow_with_the_number_of_rows() -> Result<()> {
    let (num_rows, num_classes) = (257, 1 << 17);
    let mut labels = vec![1u32; num_rows];
    labels[0] = 2;
    let labels = Tensor::new(labels, &CPU)?;
    // In turn, the sum of the weights, of the products with the logits, and of the exponentials.
    for (weight, x) in [(1. + 7. / f64::from(1 << 23), 0f32), (1., -64.000404), (1., -1.088035)] {
        let logits = Tensor::new(&[[0., x, x, x]], &CPU)?.repeat((1, num_classes / 4))?;
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(1.)?)
            .with_class_weights(&Tensor::full(weight, num_classes, &CPU)?)?
            .with_ignore_index(1)
            .with_reduction(Reduction::None);
        let logits = logits.expand((num_rows, num_classes))?;
        let (losses, metrics) = loss.forward_with_metrics(&logits, &labels)?;
        let x = f64::from(x);
        let sum_exp = (num_classes / 4) as f64 * (1. + 3. * x.exp());
        let loss_error = values(&losses)?[0] / (weight * (sum_exp.ln() - 0.75 * x)) - 1.;
        let sum_error = values(&metrics.confidence)?[0] * sum_exp - 1.;
        for error in [loss_error, sum_error] {
            assert!(error.abs() <= MOST, "{x}: {:.1} units", error / MOST * 4.);
        }
    }
    Ok(())
}
