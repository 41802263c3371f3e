//! The loss composed from stock candle ops: the oracle of the tests and the baseline of the
//! benchmarks. Outside semantic versioning.
//!
//! It follows the formula line by line and makes a tensor of the logits' size at almost every step. It does not handle
//! −inf and NaN logits, except in ignored rows.

use crate::error::Result;
use crate::formula::{ClassParams, ClassTable, result_dtype};
use crate::layout::row_shape;
use crate::loss::{LabelSmoothingLoss, LogitsInfo, Reduction};
use candle_core::{DType, Tensor};

/// The same as `loss.forward(logits, targets)`, by stock ops.
pub fn forward(loss: &LabelSmoothingLoss, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (params, targets) = loss.validate(&LogitsInfo::of(logits), targets)?;
    let dtype = result_dtype(logits.dtype());

    let by_row = |t: &Tensor| classes_last(t, params.class_dim)?.to_dtype(dtype);
    let mut x = by_row(logits)?;

    let (labels, counted) = labels_and_mask(&targets, params.ignore_index)?;
    if let Some(mask) = &counted {
        x = mask.broadcast_as(x.shape())?.where_cond(&x, &x.zeros_like()?)?;
    }

    let max = x.max_keepdim(1)?.detach();
    let x = x.broadcast_sub(&max)?;
    let log_sum = x.exp()?.sum_keepdim(1)?.log()?;
    let log_softmax = x.broadcast_sub(&log_sum)?;
    let lse = (log_sum + max)?;

    // Σ r·log softmax, and the rows' weights, (N, 1) both.
    let gather_label = |values: Tensor| {
        values.flatten_all()?.index_select(&labels.flatten_all()?, 0)?.unsqueeze(1)
    };
    let is_class = targets.dtype().is_int();
    let (weighted, mut weights) = match &params.class_table {
        ClassTable::Uniform(c) if is_class => {
            let label = (log_softmax.gather(&labels, 1)? * (c.on_value - c.off_value))?;
            ((label + (log_softmax.sum_keepdim(1)? * c.off_value)?)?, lse.ones_like()?)
        }
        ClassTable::Uniform(c) => {
            let r = by_row(&targets)?.affine(c.prob_scale, c.off_value)?;
            ((log_softmax * r)?.sum_keepdim(1)?, lse.ones_like()?)
        }
        ClassTable::PerClass(table) => {
            let c = ClassParams::from_fields(std::array::from_fn(|i| table.narrow(0, i, 1)));
            let off_value = c.off_value?;
            if is_class {
                let delta = gather_label((c.on_value? - &off_value)?)?;
                let label = (log_softmax.gather(&labels, 1)? * delta)?;
                let others = log_softmax.broadcast_mul(&off_value)?.sum_keepdim(1)?;
                ((label + others)?, gather_label(c.weight?)?)
            } else {
                let r =
                    by_row(&targets)?.broadcast_mul(&c.prob_scale?)?.broadcast_add(&off_value)?;
                ((log_softmax * r)?.sum_keepdim(1)?, lse.ones_like()?)
            }
        }
    };

    let mut losses = ((lse.sqr()? * params.z_loss)? - weighted)?;
    if let Some(mask) = counted {
        let mask = mask.to_dtype(dtype)?;
        losses = (losses * &mask)?;
        weights = (weights * mask)?;
    }
    Ok(match loss.reduction() {
        Reduction::None => losses.reshape(row_shape(logits.dims(), params.class_dim))?,
        Reduction::Sum => losses.sum_all()?,
        Reduction::Mean => losses.sum_all()?.div(&weights.sum_all()?)?,
    })
}

/// The tensor with the class dimension last and the others merged, (N, K).
fn classes_last(tensor: &Tensor, class_dim: usize) -> candle_core::Result<Tensor> {
    let mut dims: Vec<usize> = (0..tensor.rank()).filter(|dim| *dim != class_dim).collect();
    dims.push(class_dim);
    tensor.permute(dims)?.contiguous()?.reshape(((), tensor.dim(class_dim)?))
}

/// The targets (N, 1), and which rows count if some may be ignored. Ignored rows get label 0.
fn labels_and_mask(
    targets: &Tensor,
    ignore_index: Option<i64>,
) -> candle_core::Result<(Tensor, Option<Tensor>)> {
    let mut labels = targets.flatten_all()?.unsqueeze(1)?;
    if matches!(labels.dtype(), DType::I16 | DType::I32) || ignore_index.is_some() {
        labels = labels.to_dtype(DType::I64)?;
    }
    let Some(index) = ignore_index else {
        return Ok((labels, None));
    };
    let mask = labels.ne(&Tensor::full(index, labels.shape(), labels.device())?)?;
    let labels = mask.where_cond(&labels, &labels.zeros_like()?)?;
    Ok((labels, Some(mask)))
}
