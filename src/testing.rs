//! The two kernels without the graph and the reduction, for the benchmarks. For the tests, `forward_linear` with tiles of any
//! size, and the choice of an instruction set. Outside semantic versioning.

pub use crate::linear::TileSize;

use crate::autograd;
use crate::cpu::simd;
use crate::error::Result;
use crate::exchange::Shard;
use crate::formula::LossParams;
use crate::layout::row_shape;
use crate::linear::{self, Head, Tiling};
use crate::loss::{LabelSmoothingLoss, LogitsInfo, no_metrics};
use crate::metrics::Metrics;
use crate::shard::forward_linear_shard;
use candle_core::{Shape, Tensor};

/// What [`backward_rows`] needs of [`forward_rows`].
#[derive(Debug)]
pub struct Saved {
    params: LossParams,
    shape: Shape,
    targets: Tensor,
    saved: autograd::Saved,
}

/// Runs the forward kernel: the loss of each row, and what backward needs.
pub fn forward_rows(
    loss: &LabelSmoothingLoss,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<(Tensor, Option<Saved>)> {
    let (mut params, targets) = loss.validate(&LogitsInfo::of(logits), targets)?;
    (params.divisor, params.saves_state) = (None, true);
    let (losses, saved) = autograd::forward(&params, logits, &targets)?.detached();
    let shape = logits.shape().clone();
    Ok((losses, saved.map(|saved| Saved { params, shape, targets, saved })))
}

/// Runs the backward kernel: the gradient of the logits, from that of each row's loss.
pub fn backward_rows(saved: &Saved, logits: &Tensor, grad_output: &Tensor) -> Result<Tensor> {
    let Saved { params, shape, targets, saved } = saved;
    let rows = row_shape(shape.dims(), params.class_dim).into();
    for (expected, given) in [(shape, logits.shape()), (&rows, grad_output.shape())] {
        if expected != given {
            let (lhs, rhs) = (expected.clone(), given.clone());
            let op = "label-smoothing-loss-backward";
            return Err(candle_core::Error::ShapeMismatchBinaryOp { lhs, rhs, op }.bt().into());
        }
    }
    autograd::backward(params, logits, targets, grad_output, saved)
}

/// [`LabelSmoothingLoss::forward_linear`] with tiles of this size, none of which is kept.
pub fn forward_linear_tiled(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    tile: TileSize,
) -> Result<Tensor> {
    forward_linear_tiled_within_budget(loss, hidden, weight, bias, targets, tile, 0)
}

/// [`LabelSmoothingLoss::forward_linear`] with tiles of this size, and this budget of bytes to keep of the logits.
pub fn forward_linear_tiled_within_budget(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    tile: TileSize,
    budget: usize,
) -> Result<Tensor> {
    let tiling = Tiling { tile: Some(tile), budget };
    let head = Head { hidden, weight, bias };
    Ok(linear::forward_linear(loss, head, targets, tiling, false)?.0)
}

/// [`LabelSmoothingLoss::forward_linear_with_metrics`] with tiles of this size, none of which is kept.
pub fn forward_linear_tiled_with_metrics(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    tile: TileSize,
) -> Result<(Tensor, Metrics)> {
    let tiling = Tiling { tile: Some(tile), budget: 0 };
    let head = Head { hidden, weight, bias };
    let (loss, metrics) = linear::forward_linear(loss, head, targets, tiling, true)?;
    Ok((loss, metrics.ok_or_else(no_metrics)?))
}

/// [`LabelSmoothingLoss::forward_linear_shard`] with tiles of this size, none of which is kept.
pub fn forward_linear_shard_tiled(
    loss: &LabelSmoothingLoss,
    [hidden, weight]: [&Tensor; 2],
    bias: Option<&Tensor>,
    targets: &Tensor,
    shard: Shard,
    tile: TileSize,
    gather: impl FnOnce(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let tiling = Tiling { tile: Some(tile), budget: 0 };
    let head = Head { hidden, weight, bias };
    forward_linear_shard(loss, head, targets, shard, tiling, gather)
}

/// The numbers of this thread's launches and allocations on the emulated GPU so far.
#[cfg(emulator)]
pub fn gpu_operations() -> (usize, usize) {
    crate::gpu::emulated::operations()
}

/// The names of the CPU's instruction sets for which this build has kernels.
pub fn instruction_sets() -> Vec<&'static str> {
    simd::instruction_sets().into_iter().map(|set| set.0).collect()
}

/// Makes the CPU kernels of all threads use this instruction set. Returns false and changes nothing if the processor
/// lacks it.
pub fn choose_instruction_set(name: &str) -> bool {
    simd::choose(name)
}
