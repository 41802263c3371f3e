//! The effect of each option: smoothing, class weights, ignore_index, z-loss, reduction and dtype.

mod common;

use approx::{assert_abs_diff_eq, assert_relative_eq};
use candle_core::{DType, Result, Tensor};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, check_targets};
use common::{
    CPU, OnDevice, grid, random, random_labels, random_probabilities, smooth_on_device, smoothings,
    values,
};

fn assert_close(name: &str, actual: &Tensor, expected: &Tensor, epsilon: f64) -> Result<()> {
    assert_eq!(actual.dims(), expected.dims(), "{name}");
    assert_eq!(actual.dtype(), expected.dtype(), "{name}");
    for (actual, expected) in values(actual)?.iter().zip(values(expected)?) {
        // The mean over no rows is NaN in both.
        assert!(
            (actual - expected).abs() <= epsilon || actual.is_nan() && expected.is_nan(),
            "{name}: {actual}, expected {expected} differ by more than {epsilon}"
        );
    }
    Ok(())
}

/// The loss and the reference compute one formula in two ways. In f64 and f32 they differ by some
/// roundings of numbers of order ten. Gradients of half types differ by one more rounding, half an
/// ulp on either side. Their size is at most 1, plus some 5 percent with z-loss.
#[test]
fn every_combination_of_options_matches_the_reference() -> Result<()> {
    for (dtype, loss_epsilon, gradient_epsilon) in [
        (DType::F64, 1e-13, 1e-14),
        (DType::F32, 4e-6, 4e-7),
        (DType::F16, 4e-6, 4e-7 + 0.5 / 1024.),
        (DType::BF16, 4e-6, 4e-7 + 0.5 / 128.),
    ] {
        for case in [grid(&[5, 7], 1)?, grid(&[2, 5, 2, 3], 1)?, grid(&[4], 0)?].concat() {
            let (loss, gradient) = case.run(dtype)?;
            let (expected, expected_gradient) = case.run_reference(dtype)?;
            let name = format!("{dtype:?} {}", case.name);
            assert_close(&name, &loss, &expected, loss_epsilon)?;
            assert_close(&name, &gradient, &expected_gradient, gradient_epsilon)?;
        }
    }
    Ok(())
}

#[test]
fn loss_is_f32_or_f64_and_gradient_has_the_dtype_of_the_logits() -> Result<()> {
    let case = &grid(&[3, 4], 1)?[0];
    for (logits, loss) in [
        (DType::F64, DType::F64),
        (DType::F32, DType::F32),
        (DType::F16, DType::F32),
        (DType::BF16, DType::F32),
    ] {
        let (result, gradient) = case.run(logits)?;
        assert_eq!(result.dtype(), loss);
        assert_eq!(gradient.dtype(), logits);
        assert_eq!(gradient.dims(), [3, 4]);
    }
    Ok(())
}

#[test]
fn loss_has_the_shape_of_the_rows_or_is_a_scalar() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    for (dims, class_dim, rows) in [
        (&[5][..], None, &[][..]),
        (&[4, 5], None, &[4]),
        (&[2, 3, 5], None, &[2, 3]),
        (&[2, 5, 3, 4], Some(1), &[2, 3, 4]),
        (&[5, 4], Some(0), &[4]),
        (&[1, 5, 1], Some(1), &[1, 1]),
        (&[2, 1, 2, 5, 3, 2], Some(3), &[2, 1, 2, 3, 2]),
    ] {
        let loss = class_dim.map_or(loss.clone(), |dim| loss.clone().with_class_dim(dim));
        let logits = random(dims, 1., 1)?;
        let labels = random_labels(rows, 5, 2)?;
        for (reduction, expected) in
            [(Reduction::None, rows), (Reduction::Sum, &[]), (Reduction::Mean, &[])]
        {
            let result = loss.clone().with_reduction(reduction).on_device(&logits, &labels)?;
            assert_eq!(result.dims(), expected, "{dims:?} {reduction:?}");
        }
    }
    Ok(())
}

#[test]
fn without_smoothing_matches_candle_nn_cross_entropy() -> Result<()> {
    let logits = random(&[20, 10], 5., 1)?;
    let labels = random_labels(&[20], 10, 2)?;
    let expected = candle_nn::loss::cross_entropy(&logits, &labels)?.to_scalar::<f64>()?;
    for smoothing in [Smoothing::none(), Smoothing::over_all(0.)?, Smoothing::over_others(0.)?] {
        let actual =
            LabelSmoothingLoss::new(smoothing).on_device(&logits, &labels)?.to_scalar::<f64>()?;
        assert_relative_eq!(actual, expected, epsilon = 1e-14);
    }
    Ok(())
}

#[test]
fn over_others_is_over_all_of_a_larger_epsilon() -> Result<()> {
    let logits = random(&[6, 4], 3., 1)?;
    let labels = random_labels(&[6], 4, 2)?;
    let probabilities = random_probabilities(&[6, 4], 1, 3)?;
    for targets in [&labels, &probabilities] {
        let loss = |smoothing| -> Result<f64> {
            LabelSmoothingLoss::new(smoothing).on_device(&logits, targets)?.to_scalar::<f64>()
        };
        let others = loss(Smoothing::over_others(0.3)?)?;
        let all = loss(Smoothing::over_all(0.3 * 4. / 3.)?)?;
        assert_relative_eq!(others, all, epsilon = 1e-14);
    }
    Ok(())
}

#[test]
fn uniform_prior_matches_over_all() -> Result<()> {
    let logits = random(&[6, 4], 3., 1)?;
    let labels = random_labels(&[6], 4, 2)?;
    let prior = Tensor::new(&[0.25f32; 4], &CPU)?;
    let [all, toward] = [Smoothing::over_all(0.3)?, Smoothing::toward(0.3, &prior)?];
    let all = LabelSmoothingLoss::new(all).on_device(&logits, &labels)?;
    let toward = LabelSmoothingLoss::new(toward).on_device(&logits, &labels)?;
    assert_relative_eq!(all.to_scalar::<f64>()?, toward.to_scalar::<f64>()?, epsilon = 1e-15);
    Ok(())
}

/// A prior whose sum is slightly off 1 is divided by its sum.
#[test]
fn prior_is_normalised() -> Result<()> {
    let prior = Tensor::new(&[0.2501f64, 0.5, 0.25], &CPU)?;
    let labels = Tensor::new(&[0u32], &CPU)?;
    let soft = smooth_on_device(&labels, 3, &Smoothing::toward(1., &prior)?)?;
    let sum = 0.2501 + 0.5 + 0.25;
    let expected = [0.2501 / sum, 0.5 / sum, 0.25 / sum];
    for (actual, expected) in values(&soft)?.iter().zip(expected) {
        assert_abs_diff_eq!(*actual, expected, epsilon = 1e-7);
    }
    Ok(())
}

#[test]
fn labels_of_every_integer_dtype_give_the_same_loss() -> Result<()> {
    let logits = random(&[6, 4], 3., 1)?;
    let labels = random_labels(&[6], 4, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?).with_ignore_index(2);
    let expected = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    for dtype in [DType::U8, DType::U32, DType::I16, DType::I32, DType::I64] {
        let labels = labels.to_dtype(dtype)?;
        let actual = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
        assert_eq!(actual, expected, "{dtype:?}");
        check_targets(&labels, 4, None)?;
        smooth_on_device(&labels, 4, &Smoothing::none())?;
    }
    Ok(())
}

/// One-hot probabilities of every dtype, with logits of every dtype.
#[test]
fn one_hot_probabilities_match_labels() -> Result<()> {
    let logits = random(&[6, 4], 3., 1)?;
    let labels = random_labels(&[6], 4, 2)?;
    let weights = Tensor::new(&[0.5f32, 2., 0., 1.], &CPU)?;
    for (name, smoothing) in smoothings(4)? {
        let one_hot = smooth_on_device(&labels, 4, &Smoothing::none())?;
        let loss = LabelSmoothingLoss::new(smoothing)
            .with_reduction(Reduction::None)
            .with_class_weights(&weights)?;
        for logits_dtype in [DType::F64, DType::F32, DType::F16, DType::BF16] {
            let logits = logits.to_dtype(logits_dtype)?;
            let expected = loss.on_device(&logits, &labels)?;
            for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3] {
                let actual = loss.on_device(&logits, &one_hot.to_dtype(dtype)?)?;
                // A label uses a precomputed coefficient, a probability a sum of two.
                let epsilon = if logits_dtype == DType::F64 { 1e-14 } else { 1e-5 };
                assert_close(&format!("{name} {dtype:?}"), &actual, &expected, epsilon)?;
            }
        }
    }
    Ok(())
}

/// The result of `smooth_targets` equals the smoothed targets of the loss.
#[test]
fn smooth_targets_as_probabilities_give_the_same_loss() -> Result<()> {
    let logits = random(&[2, 3, 4], 3., 1)?;
    let labels = random_labels(&[2, 3], 4, 2)?;
    let probabilities = random_probabilities(&[2, 3, 4], 2, 3)?;
    let plain = LabelSmoothingLoss::new(Smoothing::none());
    for (name, smoothing) in smoothings(4)? {
        let loss = LabelSmoothingLoss::new(smoothing.clone());
        for targets in [&labels, &probabilities] {
            let soft = smooth_on_device(targets, 4, &smoothing)?;
            assert_eq!(soft.dims(), [2, 3, 4]);
            assert_eq!(soft.dtype(), DType::F32);
            for sum in values(&soft.sum(2)?)? {
                assert_abs_diff_eq!(sum, 1., epsilon = 4e-7);
            }
            let actual = loss.on_device(&logits, targets)?.to_scalar::<f64>()?;
            let expected = plain.on_device(&logits, &soft)?.to_scalar::<f64>()?;
            assert!((actual - expected).abs() < 1e-6, "{name}: {actual}, expected {expected}");
        }
    }
    Ok(())
}

#[test]
fn smooth_targets_of_scalars_empty_batches_and_views() -> Result<()> {
    let others = Smoothing::over_others(0.1)?;
    let one = smooth_on_device(&Tensor::new(1u8, &CPU)?, 3, &others)?;
    assert_eq!(one.to_vec1::<f32>()?, [0.05, 0.9, 0.05]);

    let none = Tensor::zeros((2, 0), DType::I64, &CPU)?;
    assert_eq!(smooth_on_device(&none, 3, &others)?.dims(), [2, 0, 3]);

    // Probabilities in a transposed view, as from mixup.
    let mixed = Tensor::new(&[[0.7f32, 0.5], [0.3, 0.5]], &CPU)?.t()?;
    let soft = smooth_on_device(&mixed, 2, &Smoothing::over_all(0.2)?)?;
    for (actual, expected) in values(&soft)?.iter().zip([0.66, 0.34, 0.5, 0.5]) {
        assert_abs_diff_eq!(*actual, expected, epsilon = 1e-7);
    }
    Ok(())
}

/// Class weights and priors of every float dtype, and strided views of them.
#[test]
fn class_weights_and_priors_may_have_any_dtype_and_layout() -> Result<()> {
    let logits = random(&[4, 4], 2., 1)?;
    let labels = random_labels(&[4], 4, 2)?;
    // The first column is exact in every dtype. The second column makes the view strided.
    let table = Tensor::new(&[[0.5f32, -7.], [0.25, -7.], [0.125, -7.], [0.125, -7.]], &CPU)?;
    let run = |vector: &Tensor| -> Result<f64> {
        LabelSmoothingLoss::new(Smoothing::toward(0.3, vector)?)
            .with_class_weights(vector)?
            .on_device(&logits, &labels)?
            .to_scalar::<f64>()
    };
    let expected = run(&Tensor::new(&[0.5f32, 0.25, 0.125, 0.125], &CPU)?)?;
    for dtype in [DType::F64, DType::F32, DType::F16, DType::BF16, DType::F8E4M3] {
        let vector = table.to_dtype(dtype)?.narrow(1, 0, 1)?.squeeze(1)?;
        assert_eq!(run(&vector)?, expected, "{dtype:?}");
    }
    Ok(())
}

/// As in PyTorch, labels divide the sum by Σ w_y over the rows that are not ignored.
#[test]
fn mean_divides_by_the_weights_of_the_targets() -> Result<()> {
    let logits = random(&[4, 3], 2., 1)?;
    let labels = Tensor::new(&[0i64, 2, 1, 2], &CPU)?;
    let weights = Tensor::new(&[0.5f64, 3., 2.], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.2)?)
        .with_class_weights(&weights)?
        .with_ignore_index(1)
        .with_z_loss(0.1)?;
    let sum = loss.clone().with_reduction(Reduction::Sum);
    let sum = sum.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    let mean = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    assert_relative_eq!(mean, sum / (0.5 + 2. + 2.), epsilon = 1e-15);

    // Probabilities divide the sum by the number of rows, whatever the class weights.
    let probabilities = random_probabilities(&[4, 3], 1, 3)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none()).with_class_weights(&weights)?;
    let sum = loss.clone().with_reduction(Reduction::Sum);
    let sum = sum.on_device(&logits, &probabilities)?.to_scalar::<f64>()?;
    let mean = loss.on_device(&logits, &probabilities)?.to_scalar::<f64>()?;
    assert_relative_eq!(mean, sum / 4., epsilon = 1e-15);
    Ok(())
}

#[test]
fn ignoring_a_row_equals_removing_it() -> Result<()> {
    let logits = random(&[3, 4], 2., 1)?;
    let labels = Tensor::new(&[1i64, -100, 3], &CPU)?;
    let rest = Tensor::new(&[0u32, 2], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_z_loss(0.01)?;
    let ignoring = loss.clone().with_ignore_index(-100);
    for reduction in [Reduction::Sum, Reduction::Mean] {
        let actual = ignoring.clone().with_reduction(reduction).on_device(&logits, &labels)?;
        let expected = loss
            .clone()
            .with_reduction(reduction)
            .on_device(&logits.index_select(&rest, 0)?, &labels.index_select(&rest, 0)?)?;
        assert_relative_eq!(
            actual.to_scalar::<f64>()?,
            expected.to_scalar::<f64>()?,
            epsilon = 1e-15
        );
    }
    Ok(())
}

/// Cast to u8, 300 would be 44.
#[test]
fn ignore_index_is_compared_as_i64() -> Result<()> {
    let logits = random(&[1, 60], 2., 1)?;
    let labels = Tensor::new(&[44u8], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    let plain = loss.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    let ignoring = loss.with_ignore_index(300).on_device(&logits, &labels)?;
    assert_eq!(ignoring.to_scalar::<f64>()?, plain);

    // −1 does not match the u32 of the same bits.
    let labels = Tensor::new(&[u32::MAX], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    let signed = loss.clone().with_ignore_index(-1);
    let no_class = signed.on_device(&logits, &labels).and_then(|loss| Ok(loss.to_scalar::<f64>()?));
    // The CPU returns an error, a GPU NaN.
    assert!(no_class.map_or(true, f64::is_nan));
    let unsigned = loss.with_ignore_index(u32::MAX.into());
    let ignored = unsigned.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    assert!(ignored.is_nan());
    Ok(())
}

#[test]
fn z_loss_adds_the_square_of_logsumexp() -> Result<()> {
    let logits = random(&[4, 3], 2., 1)?;
    let labels = random_labels(&[4], 3, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::None);
    let plain = loss.on_device(&logits, &labels)?;
    let with_z = loss.with_z_loss(0.25)?.on_device(&logits, &labels)?;
    let expected = (plain + (logits.log_sum_exp(1)?.sqr()? * 0.25)?)?;
    assert_close("z-loss", &with_z, &expected, 1e-14)
}

/// An option set later replaces the earlier one. A loss keeps no state between calls with different
/// dtypes.
#[test]
fn later_options_replace_earlier_ones_and_losses_can_be_reused() -> Result<()> {
    let logits = random(&[4, 3], 2., 1)?;
    let labels = random_labels(&[4], 3, 2)?;
    let first = Tensor::new(&[1f32, 2., 3.], &CPU)?;
    let second = Tensor::new(&[3f32, 0., 1.], &CPU)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let weighted = loss.clone().with_class_weights(&first)?;
    let before = weighted.on_device(&logits, &labels)?.to_scalar::<f64>()?;
    let changed = weighted.clone().with_class_weights(&second)?;
    let fresh = loss.with_class_weights(&second)?;
    assert_eq!(
        changed.on_device(&logits, &labels)?.to_scalar::<f64>()?,
        fresh.on_device(&logits, &labels)?.to_scalar::<f64>()?
    );
    for dtype in [DType::F32, DType::F64, DType::BF16, DType::F64] {
        let again = weighted.on_device(&logits.to_dtype(dtype)?, &labels)?;
        let again = values(&again)?[0];
        let epsilon = if dtype == DType::F64 { 0. } else { 0.02 };
        assert_abs_diff_eq!(again, before, epsilon = epsilon);
    }
    Ok(())
}

#[test]
fn default_reduction_is_mean() {
    assert_eq!(Reduction::default(), Reduction::Mean);
}
