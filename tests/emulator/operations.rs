//! The number of operations on the device.

#[path = "../common/mod.rs"]
mod common;

use candle_core::{DType, Result, Tensor, Var};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Smoothing, testing};
use common::{CPU, random, random_labels};

/// A step allocates and launches once in forward and once in backward. candle adds three operations of its own: the ones that
/// backward begins with, the zeros to which it adds the gradient, and that addition.
#[test]
fn a_step_has_two_launches_and_two_allocations() -> Result<()> {
    let weights = Tensor::new(&[1f32, 2., 0.5], &CPU)?;
    let plain = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    let weighted = plain.clone().with_class_weights(&weights)?.with_ignore_index(1);
    for loss in [plain.clone(), plain.with_reduction(Reduction::None), weighted] {
        let logits = Var::from_tensor(&random(&[32, 3], 2., 1)?.to_dtype(DType::F32)?)?;
        let labels = random_labels(&[32], 3, 2)?;
        // The first step uploads the class weights.
        for _ in 0..2 {
            let before = testing::gpu_operations();
            loss.forward(&logits, &labels)?.backward()?;
            let after = testing::gpu_operations();
            assert_eq!((after.0 - before.0, after.1 - before.1), (2, 2));
        }
    }
    Ok(())
}

/// With more rows, the loss does not share its storage with what backward needs.
#[test]
fn the_storage_of_a_mean_over_many_rows_is_small() -> Result<()> {
    let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    for (num_rows, shares) in [(4096, true), (4097, false)] {
        let logits = Var::from_tensor(&random(&[num_rows, 3], 2., 1)?.to_dtype(DType::F32)?)?;
        let loss = loss.forward(&logits, &random_labels(&[num_rows], 3, 2)?)?;
        let (storage, _) = loss.storage_and_layout();
        let candle_core::Storage::Cpu(candle_core::CpuStorage::F32(storage)) = &*storage else {
            candle_core::bail!("another storage")
        };
        assert_eq!(storage.len() > 1, shares, "{num_rows} rows: {} numbers", storage.len());
    }
    Ok(())
}
