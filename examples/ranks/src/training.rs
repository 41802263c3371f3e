//! A step of each way of training: the loss of the whole batch, and its gradients on this process.

use crate::model::{Batch, IGNORED, Model};
use crate::processes::Processes;
use anyhow::{Context, Result};
use candle_core::{DType, Tensor, Var, backprop::GradStore};
use candle_label_smoothing::{LabelSmoothingLoss, Reduction, Shard};

/// One process computes everything.
pub fn alone(
    model: &Model,
    batch: &Batch,
    criterion: &LabelSmoothingLoss,
) -> Result<(Tensor, GradStore)> {
    let hidden = model.hidden_states(&batch.characters)?;
    let loss =
        criterion.forward_linear(&hidden, &model.weight, Some(&model.bias), &batch.targets)?;
    let gradients = loss.backward()?;
    Ok((loss, gradients))
}

/// Every process has the whole model and a part of the passages.
///
/// Parts differ in their number of targets, so the mean of their means would be wrong. The processes add up their sums,
/// and divide by the number of all targets.
pub fn data_parallel(
    model: &Model,
    batch: &Batch,
    criterion: &LabelSmoothingLoss,
    processes: &Processes,
) -> Result<(Tensor, GradStore)> {
    let part = batch.passages(processes.part(batch.targets.dim(0)?, 1))?;
    let sum = criterion.clone().with_reduction(Reduction::Sum);
    let (loss, mut gradients) = alone(model, &part, &sum)?;

    // The gradients, the loss and the number of targets are added in one exchange.
    let count = part.targets.ne(IGNORED)?.to_dtype(DType::F64)?.sum_all()?;
    let variables = model.variables();
    let mut sums = Vec::new();
    for variable in &variables {
        // A process without passages lacks gradients.
        let sum = gradients.remove(variable).map_or_else(|| variable.zeros_like(), Ok)?;
        sums.push(sum.flatten_all()?);
    }
    sums.extend([loss.reshape(1)?, count.reshape(1)?]);
    let sums = processes.sum(&Tensor::cat(&sums, 0)?)?;
    let last = sums.dim(0)? - 1;
    let means = sums.broadcast_div(&sums.narrow(0, last, 1)?)?;

    let mut start = 0;
    for variable in &variables {
        let len = variable.elem_count();
        gradients.insert(variable, means.narrow(0, start, len)?.reshape(variable.shape())?);
        start += len;
    }
    Ok((means.get(start)?, gradients))
}

/// Every process has all passages, the body of the model, and the head's rows of the classes in `shard`.
///
/// The graph is cut at the hidden states. Above the cut, a process knows only its classes' share of the hidden states' gradient.
/// The sum of the shares continues below the cut. So the gradients of the body are the same on all processes.
pub fn vocabulary_parallel(
    model: &Model,
    batch: &Batch,
    criterion: &LabelSmoothingLoss,
    shard: Shard,
    processes: &Processes,
) -> Result<(Tensor, GradStore)> {
    let hidden = model.hidden_states(&batch.characters)?;
    let cut = Var::from_tensor(&hidden.detach())?;
    let (weight, bias) = (&model.weight, Some(model.bias.as_tensor()));
    let loss = criterion
        .forward_linear_shard(&cut, weight, bias, &batch.targets, shard, |t| processes.gather(t))?;
    let mut gradients = loss.backward()?;

    let share = gradients.remove(&cut).context("the hidden states have no gradient")?;
    let below = (hidden * processes.sum(&share)?)?.sum_all()?.backward()?;
    gradients.extend(below)?;
    Ok((loss, gradients))
}
