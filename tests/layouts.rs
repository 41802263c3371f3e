//! Views: any layout gives the numbers of its contiguous copy, and gradients flow back through it.

mod common;

use approx::assert_abs_diff_eq;
use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{
    CPU, OnDevice, assert_same, dtypes, random, random_labels, random_probabilities,
    smooth_on_device, values, weighted,
};

type View = fn(&Tensor) -> Result<Tensor>;

/// Ways to see a tensor of another shape as one of shape (3, 4, 5).
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
    let gradients = weighted(loss)?.backward()?;
    values(gradients.get(base).expect("no gradient reached the base"))
}

#[test]
fn views_of_logits_give_the_numbers_of_their_copies() -> Result<()> {
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
                    let ours = loss.on_device(&logits, targets)?;
                    let theirs = loss.on_device(&logits.contiguous()?, targets)?;
                    assert_same(&name, ours.dtype(), &values(&ours)?, &values(&theirs)?);
                    let (ours, theirs) = (gradient(&ours, &base)?, gradient(&theirs, &base)?);
                    assert_same(&name, dtype, &ours, &theirs);
                    assert!(ours.iter().any(|g| *g != 0.), "{name}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn views_of_targets_give_the_numbers_of_their_copies() -> Result<()> {
    let logits = random(&[3, 4, 5], 3., 1)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_others(0.1)?);
    for (name, dims, view) in VIEWS {
        let probabilities = view(&random_probabilities(dims, dims.len() - 1, 3)?)?;
        let ours = loss.on_device(&logits, &probabilities)?;
        let theirs = loss.on_device(&logits, &probabilities.contiguous()?)?;
        assert_eq!(values(&ours)?, values(&theirs)?, "{name}");
        let soft = |p: &Tensor| smooth_on_device(p, 5, &Smoothing::over_others(0.1)?);
        assert_eq!(
            values(&soft(&probabilities)?)?,
            values(&soft(&probabilities.contiguous()?)?)?,
            "{name}"
        );

        // Labels of shape (3, 4, 5), for logits with the classes in front.
        let logits = random(&[6, 3, 4, 5], 3., 1)?;
        let loss = loss.clone().with_class_dim(0);
        let labels = view(&random_labels(dims, 6, 2)?)?;
        let ours = loss.on_device(&logits, &labels)?;
        let theirs = loss.on_device(&logits, &labels.contiguous()?)?;
        assert_eq!(values(&ours)?, values(&theirs)?, "{name}");
    }
    Ok(())
}

/// `with_class_dim` moves nothing but the meaning of the dimensions.
#[test]
fn class_dim_is_the_last_dimension_of_a_permuted_view() -> Result<()> {
    let logits = Var::from_tensor(&random(&[2, 5, 3, 4], 3., 1)?)?;
    let labels = random_labels(&[2, 3, 4], 5, 2)?;
    let last = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::None);
    let ours = last.clone().with_class_dim(1).on_device(&logits, &labels)?;
    let theirs = last.on_device(&logits.permute((0, 2, 3, 1))?, &labels)?;
    // Sums in another order, a rounding or two apart.
    for (ours, theirs) in values(&ours)?.iter().zip(values(&theirs)?) {
        assert_abs_diff_eq!(*ours, theirs, epsilon = 1e-14);
    }
    for (ours, theirs) in gradient(&ours, &logits)?.iter().zip(gradient(&theirs, &logits)?) {
        assert_abs_diff_eq!(*ours, theirs, epsilon = 1e-15);
    }
    Ok(())
}

/// Upstream gradients come in any layout too.
#[test]
fn upstream_gradients_may_be_views() -> Result<()> {
    let labels = random_labels(&[3, 4], 5, 2)?;
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?).with_reduction(Reduction::None);
    let logits = Var::from_tensor(&random(&[3, 4, 5], 3., 1)?)?;
    let upstream = random(&[4, 3], 1., 4)?;
    let result = loss.on_device(&logits, &labels)?;
    let gradient = |total: Tensor| -> Result<Vec<f64>> {
        values(total.backward()?.get(&logits).expect("no gradient"))
    };
    let transposed = gradient((result.t()? * &upstream)?.sum_all()?)?;
    let straight = gradient((&result * upstream.t()?)?.sum_all()?)?;
    assert_eq!(transposed, straight);

    // Backward straight from a result with many elements: each counts once.
    let ones = gradient(result.clone())?;
    let sum = gradient(result.sum_all()?)?;
    assert_eq!(ones, sum);
    Ok(())
}

/// The logits as their own targets share one storage: the entropy of a softmax output, say.
#[test]
fn logits_and_targets_may_share_a_storage() -> Result<()> {
    let both = random_probabilities(&[3, 4], 1, 1)?;
    let loss = LabelSmoothingLoss::new(Smoothing::none());
    let ours = loss.on_device(&both, &both)?.to_scalar::<f64>()?;
    let copied = loss.on_device(&both, &both.copy()?)?.to_scalar::<f64>()?;
    assert_eq!(ours, copied);
    Ok(())
}

/// Large enough for every way of sharing the work, with the same bits for any number of threads.
#[test]
fn the_number_of_threads_changes_no_bit() -> Result<()> {
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
        // And they are the right numbers: f32's rounding of a mean of N losses below ten.
        let logits = Var::from_tensor(&base.to_dtype(DType::F64)?)?;
        let expected = candle_label_smoothing::reference::forward(&loss, &logits, &labels)?;
        let (ours, theirs) = (one.0[0], values(&expected)?[0]);
        assert!((ours - theirs).abs() < 1e-6 * theirs, "{dims:?}: {ours} and {theirs}");
        let gradients = expected.backward()?;
        let expected = values(gradients.get(&logits).expect("no gradient"))?;
        let largest = expected.iter().fold(0f64, |max, g| max.max(g.abs()));
        for (ours, theirs) in one.1.iter().zip(&expected) {
            // Some roundings of its own size; where it is a label's, five of the two terms that nearly
            // cancel, which are as large as the largest gradient.
            let epsilon = 2e-6 * theirs.abs() + 5. * 2f64.powi(-24) * largest;
            assert!((ours - theirs).abs() < epsilon, "{dims:?}: {ours} and {theirs}");
        }
    }
    Ok(())
}

/// A scalar result may be used like any other tensor of the graph.
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
