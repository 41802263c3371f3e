//! Losses and gradients at sizes around the kernels' internal block sizes.
//!
//! The kernels divide classes and rows into vectors, groups of vectors, blocks, tiles of rows and
//! segments. Each test compares with the reference in f64 on the same rounded logits.

mod common;

use candle_core::{Result, Tensor};
use candle_label_smoothing::Smoothing;
use common::{check_case, check_shape, random, unreduced};

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
    // The emulator is slow. Rows begin at 309 elements from each other, so each start has rows of every alignment.
    for start in (0..9).step_by(if cfg!(emulator) { 4 } else { 1 }) {
        let logits = wide.narrow(1, start, classes)?;
        let name = format!("start {start}");
        check_case(&name, &unreduced(Smoothing::over_all(0.1)?), &logits, &labels)?;
        check_case(&name, &unreduced(Smoothing::over_others(1.)?), &logits, &labels)?;
    }
    Ok(())
}
