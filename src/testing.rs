//! The two kernels without the graph and the reduction, for the benchmarks, and `forward_linear` by tiles of any
//! size, for the tests. Outside semantic versioning.

use crate::backend::{Problem, Reduce, row_shape};
use crate::error::Result;
use crate::linear;
use crate::loss::{LabelSmoothingLoss, Logits};
use crate::op;
use candle_core::{Shape, Tensor};

/// What the forward kernel leaves to the backward kernel.
#[derive(Debug)]
pub struct Saved {
    problem: Problem,
    shape: Shape,
    targets: Tensor,
    statistics: Tensor,
}

/// The forward kernel: the rows' losses, and what backward needs.
pub fn forward_rows(
    loss: &LabelSmoothingLoss,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<(Tensor, Option<Saved>)> {
    let (problem, targets) = loss.problem(&Logits::of(logits), targets)?;
    let losses = op::forward(&problem, logits, &targets, Reduce::No, true)?;
    let shape = logits.shape().clone();
    let saved = losses.statistics.map(|statistics| Saved { problem, shape, targets, statistics });
    Ok((losses.result, saved))
}

/// The backward kernel: the logits' gradient, given that of each row's loss.
pub fn backward_rows(saved: &Saved, logits: &Tensor, upstream: &Tensor) -> Result<Tensor> {
    let Saved { problem, shape, targets, statistics } = saved;
    let rows = row_shape(shape.dims(), problem.class_dim).into();
    for (expected, given) in [(shape, logits.shape()), (&rows, upstream.shape())] {
        if expected != given {
            let (lhs, rhs) = (expected.clone(), given.clone());
            let op = "label-smoothing-loss-backward";
            return Err(candle_core::Error::ShapeMismatchBinaryOp { lhs, rhs, op }.bt().into());
        }
    }
    Ok(op::gradient_of(problem, statistics, logits, targets, upstream)?)
}

pub use crate::linear::TileSize;

/// [`LabelSmoothingLoss::forward_linear`] by tiles of this size.
pub fn forward_linear_tiled(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    tile: TileSize,
) -> Result<Tensor> {
    linear::forward(loss, hidden, weight, bias, targets, Some(tile))
}
