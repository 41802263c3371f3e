//! The two kernels without the graph and the reduction, for the benchmarks. Outside semantic versioning.

use crate::backend::Problem;
use crate::error::Result;
use crate::loss::LabelSmoothingLoss;
use crate::op;
use candle_core::Tensor;

/// What the forward kernel leaves to the backward kernel.
#[derive(Debug)]
pub struct Saved {
    problem: Problem,
    targets: Tensor,
    statistics: Tensor,
}

/// The forward kernel: the rows' losses, and what backward needs.
pub fn forward(
    loss: &LabelSmoothingLoss,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<(Tensor, Option<Saved>)> {
    let (problem, targets) = loss.problem(logits, targets)?;
    let rows = op::row_losses(&problem, logits, &targets, false, true)?;
    let saved = rows.statistics.map(|statistics| Saved { problem, targets, statistics });
    Ok((rows.losses, saved))
}

/// The backward kernel: the logits' gradient, given that of each row's loss.
pub fn backward(saved: &Saved, logits: &Tensor, upstream: &Tensor) -> Result<Tensor> {
    let Saved { problem, targets, statistics } = saved;
    Ok(op::gradient_of(problem, statistics, logits, targets, upstream)?)
}
