//! Numbers of classes and of rows around everything that the kernels divide them into: vectors, packs of
//! them, blocks, tiles of rows, segments. Against stock ops in f64, on the same rounded logits.

mod common;

use candle_core::{DType, Result, Tensor};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{Case, random, random_labels, random_probabilities, values};

/// The relative error that each dtype allows the gradient: a rounding to half an ulp, besides that of
/// the arithmetic.
const DTYPES: [(DType, f64); 4] =
    [(DType::F64, 0.), (DType::F32, 0.), (DType::F16, 1. / 2048.), (DType::BF16, 1. / 256.)];

fn check(name: &str, loss: &LabelSmoothingLoss, logits: &Tensor, targets: &Tensor) -> Result<()> {
    for (dtype, half_ulp) in DTYPES {
        // As the kernels see them.
        let logits = logits.to_dtype(dtype)?.to_dtype(DType::F64)?;
        let case = |loss: &LabelSmoothingLoss| Case {
            name: name.into(),
            loss: loss.clone(),
            logits: logits.clone(),
            targets: targets.clone(),
        };
        let case = case(loss);
        let (losses, gradient) = case.run(dtype)?;
        let (expected_losses, expected_gradient) = case.run_reference(DType::F64)?;
        let roundings = if dtype == DType::F64 { 1e-13 } else { 4e-6 };
        for (ours, theirs) in values(&losses)?.iter().zip(values(&expected_losses)?) {
            let error = (ours - theirs).abs();
            assert!(
                error <= roundings * theirs.abs().max(1.),
                "{name} {dtype:?}: {ours}, {theirs}"
            );
        }
        for (i, (ours, theirs)) in
            values(&gradient)?.iter().zip(values(&expected_gradient)?).enumerate()
        {
            // Below the normal numbers of f16 its ulp is 2⁻²⁴.
            let allowed = roundings + half_ulp * theirs.abs() + 2f64.powi(-25);
            let error = (ours - theirs).abs();
            assert!(error <= allowed, "{name} {dtype:?} at {i}: {ours}, {theirs}");
        }
    }
    Ok(())
}

fn rows(smoothing: Smoothing) -> LabelSmoothingLoss {
    LabelSmoothingLoss::new(smoothing).with_reduction(Reduction::None)
}

/// Every kind of coefficients: equal but for a label that weighs more or less than the others, a table,
/// probabilities.
fn check_shape(dims: &[usize], class_dim: usize, seed: u64) -> Result<()> {
    let num_classes = dims[class_dim];
    let mut row_dims = dims.to_vec();
    row_dims.remove(class_dim);
    let logits = random(dims, 6., seed)?;
    let labels = random_labels(&row_dims, num_classes, seed + 1)?;
    let probabilities = random_probabilities(dims, class_dim, seed + 2)?;
    let weights = random(&[num_classes], 1., seed + 3)?.abs()?;

    let more = rows(Smoothing::over_all(0.1)?).with_class_dim(class_dim).with_ignore_index(0);
    let less = rows(Smoothing::over_others(1.)?).with_class_dim(class_dim);
    let table = more.clone().with_class_weights(&weights)?.with_z_loss(1e-3)?;
    let soft = rows(Smoothing::over_all(0.2)?).with_class_dim(class_dim);
    check(&format!("{dims:?} over all"), &more, &logits, &labels)?;
    check(&format!("{dims:?} weights"), &table, &logits, &labels)?;
    check(&format!("{dims:?} probabilities"), &soft, &logits, &probabilities)?;
    if num_classes > 1 {
        check(&format!("{dims:?} over others"), &less, &logits, &labels)?;
    }
    Ok(())
}

#[test]
fn classes_next_to_each_other() -> Result<()> {
    for classes in (1..=70).chain([127, 128, 129, 255, 256, 257, 287, 288, 289, 300, 511, 513]) {
        check_shape(&[3, classes], 1, classes as u64)?;
    }
    // More than a segment.
    for classes in [16_383, 16_384, 16_385, 33_000] {
        check_shape(&[2, classes], 1, classes as u64)?;
    }
    Ok(())
}

#[test]
fn rows_next_to_each_other() -> Result<()> {
    for positions in (1..=34).chain([63, 64, 65, 127, 128, 129, 130, 257]) {
        check_shape(&[2, 5, positions], 1, positions as u64)?;
    }
    for classes in [31, 32, 33, 64, 65, 127, 128, 129, 600] {
        check_shape(&[2, classes, 7], 1, classes as u64)?;
    }
    // Lines longer than a segment.
    check_shape(&[1, 2, 20_000], 1, 5)
}

#[test]
fn few_classes_and_many_rows() -> Result<()> {
    for rows in [1, 2, 127, 128, 129, 255, 257, 6000] {
        check_shape(&[rows, 3], 1, rows as u64)?;
    }
    check_shape(&[700, 32], 1, 3)?;
    check_shape(&[700, 33], 1, 4)
}

/// Every position of the label in its block, and every start of the logits in memory.
#[test]
fn labels_and_starts() -> Result<()> {
    let classes = 300;
    let wide = random(&[classes, classes + 9], 6., 1)?;
    let labels = Tensor::arange(0, classes as i64, &common::CPU)?;
    for start in 0..9 {
        let logits = wide.narrow(1, start, classes)?;
        let name = format!("start {start}");
        check(&name, &rows(Smoothing::over_all(0.1)?), &logits, &labels)?;
        check(&name, &rows(Smoothing::over_others(1.)?), &logits, &labels)?;
    }
    Ok(())
}
