//! Losses and gradients at sizes around the kernels' internal block sizes.
//!
//! The kernels divide classes and rows into vectors, groups of vectors, blocks, tiles of rows and
//! segments. Each test compares with the reference in f64 on the same rounded logits.

mod common;

use candle_core::{DType, Result, Tensor};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing};
use common::{Case, random, random_labels, random_probabilities, values};

/// Relative error allowed in the gradient for the final rounding to each dtype. The error of the
/// arithmetic is added in `check`.
const DTYPES: [(DType, f64); 4] =
    [(DType::F64, 0.), (DType::F32, 0.), (DType::F16, 1. / 2048.), (DType::BF16, 1. / 256.)];

fn check(name: &str, loss: &LabelSmoothingLoss, logits: &Tensor, targets: &Tensor) -> Result<()> {
    for (dtype, half_ulp) in DTYPES {
        // The reference gets the rounded logits that the kernels get.
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
        for (actual, expected) in values(&losses)?.iter().zip(values(&expected_losses)?) {
            let error = (actual - expected).abs();
            assert!(
                error <= roundings * expected.abs().max(1.),
                "{name} {dtype:?}: {actual}, expected {expected}"
            );
        }
        for (i, (actual, expected)) in
            values(&gradient)?.iter().zip(values(&expected_gradient)?).enumerate()
        {
            // The ulp of subnormal f16 numbers is 2⁻²⁴.
            let allowed = roundings + half_ulp * expected.abs() + 2f64.powi(-25);
            let error = (actual - expected).abs();
            assert!(error <= allowed, "{name} {dtype:?} at {i}: {actual}, expected {expected}");
        }
    }
    Ok(())
}

fn unreduced(smoothing: Smoothing) -> LabelSmoothingLoss {
    LabelSmoothingLoss::new(smoothing).with_reduction(Reduction::None)
}

/// Checks every variant of the coefficients: a label above the other classes, a label below them,
/// one coefficient per class, and probabilities.
fn check_shape(dims: &[usize], class_dim: usize, seed: u64) -> Result<()> {
    let num_classes = dims[class_dim];
    let mut row_dims = dims.to_vec();
    row_dims.remove(class_dim);
    let logits = random(dims, 6., seed)?;
    let labels = random_labels(&row_dims, num_classes, seed + 1)?;
    let probabilities = random_probabilities(dims, class_dim, seed + 2)?;
    let weights = random(&[num_classes], 1., seed + 3)?.abs()?;

    let over_all =
        unreduced(Smoothing::over_all(0.1)?).with_class_dim(class_dim).with_ignore_index(0);
    let over_others = unreduced(Smoothing::over_others(1.)?).with_class_dim(class_dim);
    let weighted = over_all.clone().with_class_weights(&weights)?.with_z_loss(1e-3)?;
    let with_probabilities = unreduced(Smoothing::over_all(0.2)?).with_class_dim(class_dim);
    check(&format!("{dims:?} over all"), &over_all, &logits, &labels)?;
    check(&format!("{dims:?} weights"), &weighted, &logits, &labels)?;
    check(&format!("{dims:?} probabilities"), &with_probabilities, &logits, &probabilities)?;
    if num_classes > 1 {
        check(&format!("{dims:?} over others"), &over_others, &logits, &labels)?;
    }
    Ok(())
}

#[test]
fn class_counts_around_block_sizes_with_classes_last() -> Result<()> {
    for classes in (1..=70).chain([127, 128, 129, 255, 256, 257, 287, 288, 289, 300, 511, 513]) {
        check_shape(&[3, classes], 1, classes as u64)?;
    }
    // More classes than a segment holds.
    for classes in [16_383, 16_384, 16_385, 33_000] {
        check_shape(&[2, classes], 1, classes as u64)?;
    }
    Ok(())
}

#[test]
fn row_and_class_counts_around_block_sizes_with_rows_last() -> Result<()> {
    for inner_size in (1..=34).chain([63, 64, 65, 127, 128, 129, 130, 257]) {
        check_shape(&[2, 5, inner_size], 1, inner_size as u64)?;
    }
    for classes in [31, 32, 33, 64, 65, 127, 128, 129, 600] {
        check_shape(&[2, classes, 7], 1, classes as u64)?;
    }
    // Rows that are longer than a segment.
    check_shape(&[1, 2, 20_000], 1, 5)
}

#[test]
fn row_counts_around_block_sizes_with_few_classes() -> Result<()> {
    for rows in [1, 2, 127, 128, 129, 255, 257, 6000] {
        check_shape(&[rows, 3], 1, rows as u64)?;
    }
    check_shape(&[700, 32], 1, 3)?;
    check_shape(&[700, 33], 1, 4)
}

/// Each row has its label at another position, and each start gives the logits another alignment in
/// memory.
#[test]
fn every_label_position_and_memory_offset() -> Result<()> {
    let classes = 300;
    let wide = random(&[classes, classes + 9], 6., 1)?;
    let labels = Tensor::arange(0, classes as i64, &common::CPU)?;
    for start in 0..9 {
        let logits = wide.narrow(1, start, classes)?;
        let name = format!("start {start}");
        check(&name, &unreduced(Smoothing::over_all(0.1)?), &logits, &labels)?;
        check(&name, &unreduced(Smoothing::over_others(1.)?), &logits, &labels)?;
    }
    Ok(())
}
