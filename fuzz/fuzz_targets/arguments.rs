//! The tensors of a call, and the calls with them.

use crate::compare::contiguous_copy;
use candle_core::{Result, Tensor, Var};
use candle_label_smoothing::testing::{self, TileSize};
use candle_label_smoothing::{LabelSmoothingLoss, Metrics, Shard};
use std::ops::Range;

/// The tensors of a call.
pub struct Arguments {
    /// The logits; or the hidden states, the weight and maybe the bias. A tensor whose gradient is known is a variable.
    pub inputs: Vec<Tensor>,
    pub targets: Tensor,
    pub row_weights: Option<Tensor>,
    pub tile: Option<TileSize>,
}

impl Arguments {
    fn weigh(
        &self,
        loss: &LabelSmoothingLoss,
    ) -> candle_label_smoothing::Result<LabelSmoothingLoss> {
        match &self.row_weights {
            Some(weights) => loss.weigh_rows(weights),
            None => Ok(loss.clone()),
        }
    }

    pub fn call(&self, loss: &LabelSmoothingLoss) -> candle_label_smoothing::Result<Tensor> {
        let (loss, targets) = (self.weigh(loss)?, &self.targets);
        match (&self.inputs[..], self.tile) {
            ([hidden, weight, bias @ ..], Some(tile)) => {
                testing::forward_linear_tiled(&loss, hidden, weight, bias.first(), targets, tile)
            }
            ([hidden, weight, bias @ ..], None) => {
                loss.forward_linear(hidden, weight, bias.first(), targets)
            }
            _ => loss.forward(&self.inputs[0], targets),
        }
    }

    pub fn call_with_metrics(
        &self,
        loss: &LabelSmoothingLoss,
    ) -> candle_label_smoothing::Result<(Tensor, Metrics)> {
        let (loss, targets) = (self.weigh(loss)?, &self.targets);
        match (&self.inputs[..], self.tile) {
            ([hidden, weight, bias @ ..], Some(tile)) => {
                testing::forward_linear_tiled_with_metrics(
                    &loss,
                    hidden,
                    weight,
                    bias.first(),
                    targets,
                    tile,
                )
            }
            ([hidden, weight, bias @ ..], None) => {
                loss.forward_linear_with_metrics(hidden, weight, bias.first(), targets)
            }
            _ => loss.forward_with_metrics(&self.inputs[0], targets),
        }
    }

    pub fn call_shard(
        &self,
        loss: &LabelSmoothingLoss,
        shard: Shard,
        gather: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> candle_label_smoothing::Result<Tensor> {
        let (loss, targets) = (self.weigh(loss)?, &self.targets);
        match (&self.inputs[..], self.tile) {
            ([hidden, weight, bias @ ..], Some(tile)) => testing::forward_linear_shard_tiled(
                &loss,
                [hidden, weight],
                bias.first(),
                targets,
                shard,
                tile,
                gather,
            ),
            ([hidden, weight, bias @ ..], None) => {
                loss.forward_linear_shard(hidden, weight, bias.first(), targets, shard, gather)
            }
            _ => loss.forward_shard(&self.inputs[0], targets, shard, gather),
        }
    }

    pub fn is_tracked(&self) -> bool {
        self.inputs.iter().any(Tensor::track_op)
    }

    /// Contiguous copies. Those of tracked inputs are variables.
    pub fn copies(&self) -> Result<Self> {
        let copy = |input: &Tensor| match input.track_op() {
            true => Ok(Var::from_tensor(&contiguous_copy(input)?)?.into_inner()),
            false => contiguous_copy(input),
        };
        Ok(Self {
            inputs: self.inputs.iter().map(copy).collect::<Result<_>>()?,
            targets: contiguous_copy(&self.targets)?,
            row_weights: self.row_weights.as_ref().map(contiguous_copy).transpose()?,
            tile: self.tile,
        })
    }

    /// The arguments of a process that has some of the classes. All inputs are variables.
    pub fn of_classes(&self, class_dim: usize, classes: &Range<usize>) -> Result<Self> {
        let part = |tensor: &Tensor, dim| tensor.detach().narrow(dim, classes.start, classes.len());
        let part_of_input = |(i, input): (usize, &Tensor)| {
            let tensor = match (self.inputs.len(), i) {
                (1, _) => part(input, class_dim)?,
                (_, 0) => input.detach(),
                _ => part(input, 0)?,
            };
            Ok(Var::from_tensor(&tensor)?.into_inner())
        };
        Ok(Self {
            inputs: self.inputs.iter().enumerate().map(part_of_input).collect::<Result<_>>()?,
            targets: match self.targets.dtype().is_float() {
                true => part(&self.targets, class_dim)?,
                false => self.targets.clone(),
            },
            row_weights: self.row_weights.clone(),
            tile: self.tile,
        })
    }
}
