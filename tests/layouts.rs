//! Strided views: any layout gives the results of its contiguous copy, and gradients flow back
//! through the view.

mod common;

use approx::assert_abs_diff_eq;
use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{
    CPU, OnDevice, assert_same, dtypes, random, random_labels, random_probabilities,
    smooth_on_device, sum_with_grad_output, values,
};

type View = fn(&Tensor) -> Result<Tensor>;

/// Views of shape (3, 4, 5) and the shapes of the tensors behind them.
const VIEWS: [(&str, &[usize], View); 9] = [
    ("contiguous", &[3, 4, 5], |t| Ok(t.clone())),
    ("offset", &[5, 4, 5], |t| t.narrow(0, 2, 3)),
    ("narrowed in the middle", &[3, 7, 5], |t| t.narrow(1, 2, 4)),
    ("narrowed at the end", &[3, 4, 9], |t| t.narrow(2, 3, 5)),
    ("transposed at the end", &[3, 5, 4], |t| t.transpose(1, 2)),
    ("transposed at the ends", &[5, 4, 3], |t| t.transpose(0, 2)),
    ("permuted and narrowed", &[5, 6, 4], |t| t.permute((1, 2, 0))?.narrow(0, 1, 3)),
    ("broadcast rows", &[4, 5], |t| t.broadcast_as((3, 4, 5))),
    ("broadcast classes", &[3, 1, 5], |t| t.broadcast_as((3, 4, 5))),
];

fn gradient(loss: &Tensor, base: &Var) -> Result<Vec<f64>> {
    let gradients = sum_with_grad_output(loss)?.backward()?;
    values(gradients.get(base).expect("no gradient reached the base"))
}

#[test]
fn views_of_logits_match_their_contiguous_copies() -> Result<()> {
    let weights = random(&[4], 1., 5)?.abs()?;
    for (name, dims, view) in VIEWS {
        for class_dim in 0..3 {
            let mut rows = vec![3, 4, 5];
            let num_classes = rows.remove(class_dim);
            let labels = random_labels(&rows, num_classes, 2)?;
            let probabilities = random_probabilities(&[3, 4, 5], class_dim, 3)?;
            for dtype in dtypes() {
                let base = Var::from_tensor(&random(dims, 3., 1)?.to_dtype(dtype)?)?;
                for targets in [&labels, &probabilities] {
                    let mut loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?)
                        .with_reduction(Reduction::None)
                        .with_class_dim(class_dim)
                        .with_z_loss(0.01)?;
                    if num_classes == 4 {
                        loss = loss.with_class_weights(&weights)?;
                    }
                    let name = format!("{name}, class dim {class_dim}, {dtype:?}");
                    let logits = view(&base)?;
                    let actual = loss.on_device(&logits, targets)?;
                    let expected = loss.on_device(&logits.contiguous()?, targets)?;
                    assert_same(&name, actual.dtype(), &values(&actual)?, &values(&expected)?);
                    let (actual, expected) =
                        (gradient(&actual, &base)?, gradient(&expected, &base)?);
                    assert_same(&name, dtype, &actual, &expected);
                    assert!(actual.iter().any(|g| *g != 0.), "{name}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn views_of_targets_match_their_contiguous_copies() -> Result<()> {
    let logits = random(&[3, 4, 5], 3., 1)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?);
    for (name, dims, view) in VIEWS {
        let probabilities = view(&random_probabilities(dims, dims.len() - 1, 3)?)?;
        let actual = loss.on_device(&logits, &probabilities)?;
        let expected = loss.on_device(&logits, &probabilities.contiguous()?)?;
        assert_eq!(values(&actual)?, values(&expected)?, "{name}");
        let soft = |p: &Tensor| smooth_on_device(p, 5, &Smoothing::over_others(0.1)?);
        assert_eq!(
            values(&soft(&probabilities)?)?,
            values(&soft(&probabilities.contiguous()?)?)?,
            "{name}"
        );

        // Labels of shape (3, 4, 5), for logits with the classes first.
        let logits = random(&[6, 3, 4, 5], 3., 1)?;
        let loss = loss.clone().with_class_dim(0);
        let labels = view(&random_labels(dims, 6, 2)?)?;
        let actual = loss.on_device(&logits, &labels)?;
        let expected = loss.on_device(&logits, &labels.contiguous()?)?;
        assert_eq!(values(&actual)?, values(&expected)?, "{name}");
    }
    Ok(())
}

/// `with_class_dim(1)` equals a permutation that moves the classes last.
#[test]
fn class_dim_matches_a_permuted_view_with_the_classes_last() -> Result<()> {
    let logits = Var::from_tensor(&random(&[2, 5, 3, 4], 3., 1)?)?;
    let labels = random_labels(&[2, 3, 4], 5, 2)?;
    let last = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::None);
    let actual = last.clone().with_class_dim(1).on_device(&logits, &labels)?;
    let expected = last.on_device(&logits.permute((0, 2, 3, 1))?, &labels)?;
    // The order of the additions differs, so the results differ by a rounding or two.
    for (actual, expected) in values(&actual)?.iter().zip(values(&expected)?) {
        assert_abs_diff_eq!(*actual, expected, epsilon = 1e-14);
    }
    for (actual, expected) in gradient(&actual, &logits)?.iter().zip(gradient(&expected, &logits)?)
    {
        assert_abs_diff_eq!(*actual, expected, epsilon = 1e-15);
    }
    Ok(())
}

/// `grad_output` may have any layout.
#[test]
fn grad_output_may_be_a_view() -> Result<()> {
    let labels = random_labels(&[3, 4], 5, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::None);
    let logits = Var::from_tensor(&random(&[3, 4, 5], 3., 1)?)?;
    let grad_output = random(&[4, 3], 1., 4)?;
    let result = loss.on_device(&logits, &labels)?;
    let gradient = |total: Tensor| -> Result<Vec<f64>> {
        values(total.backward()?.get(&logits).expect("no gradient"))
    };
    let transposed = gradient((result.t()? * &grad_output)?.sum_all()?)?;
    let straight = gradient((&result * grad_output.t()?)?.sum_all()?)?;
    assert_eq!(transposed, straight);

    // Backward from a loss of several elements uses a `grad_output` of ones.
    let ones = gradient(result.clone())?;
    let sum = gradient(result.sum_all()?)?;
    assert_eq!(ones, sum);
    Ok(())
}

/// Logits and targets in one storage.
#[test]
fn logits_and_targets_may_share_a_storage() -> Result<()> {
    let both = random_probabilities(&[3, 4], 1, 1)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    let actual = loss.on_device(&both, &both)?.to_scalar::<f64>()?;
    let copied = loss.on_device(&both, &both.copy()?)?.to_scalar::<f64>()?;
    assert_eq!(actual, copied);
    Ok(())
}

/// The shapes are large enough for every way of dividing the work between threads.
#[test]
fn number_of_threads_changes_no_bit() -> Result<()> {
    if cfg!(target_family = "wasm") {
        return Ok(());
    }
    for (dims, class_dim) in
        [(&[3, 70_001][..], 1), (&[5_000, 33], 1), (&[70_001, 3], 0), (&[2, 5, 90, 101], 1)]
    {
        let mut rows = dims.to_vec();
        let num_classes = rows.remove(class_dim);
        let base = random(dims, 3., 1)?.to_dtype(DType::F32)?;
        let labels = random_labels(&rows, num_classes, 2)?;
        let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_class_dim(class_dim);
        let run = |threads: usize| -> Result<(Vec<f64>, Vec<f64>)> {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(threads)
                .build()
                .expect("a thread pool");
            pool.install(|| {
                let logits = Var::from_tensor(&base)?;
                let loss = loss.on_device(&logits, &labels)?;
                let gradients = loss.backward()?;
                let gradient = gradients.get(&logits).expect("no gradient");
                Ok((values(&loss)?, values(gradient)?))
            })
        };
        let one = run(1)?;
        for threads in [2, 3, 7] {
            assert!(run(threads)? == one, "{dims:?}, {threads} threads");
        }
        // The results also match the reference: the tolerance is f32's rounding of a mean of losses
        // below ten.
        let logits = Var::from_tensor(&base.to_dtype(DType::F64)?)?;
        let reference = candle_label_smoothing::reference::forward(&loss, &logits, &labels)?;
        let (actual, expected) = (one.0[0], values(&reference)?[0]);
        assert!(
            (actual - expected).abs() < 1e-6 * expected,
            "{dims:?}: {actual}, expected {expected}"
        );
        let gradients = reference.backward()?;
        let expected = values(gradients.get(&logits).expect("no gradient"))?;
        let largest = expected.iter().fold(0f64, |max, g| max.max(g.abs()));
        for (actual, expected) in one.1.iter().zip(&expected) {
            // The tolerance has a relative part and five roundings of the largest gradient. The
            // gradient of the label is a difference of two terms of that size.
            let epsilon = 2e-6 * expected.abs() + 5. * 2f64.powi(-24) * largest;
            assert!((actual - expected).abs() < epsilon, "{dims:?}: {actual}, expected {expected}");
        }
    }
    Ok(())
}

/// The loss of a single row is a scalar that the graph can use.
#[test]
fn rank_one_logits_are_a_single_row() -> Result<()> {
    let logits = Var::from_tensor(&random(&[4], 3., 1)?)?;
    let label = Tensor::new(2u32, &CPU)?;
    for reduction in [Reduction::None, Reduction::Sum, Reduction::Mean] {
        let loss = LabelSmoothingLoss::new(Smoothing::none()).with_reduction(reduction);
        let result = loss.on_device(&logits, &label)?;
        assert_eq!(result.rank(), 0);
        assert_eq!(gradient(&result, &logits)?.len(), 4);
    }
    Ok(())
}
