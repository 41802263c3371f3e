//! The loss composed from stock candle ops: the oracle of the tests and the baseline of the
//! benchmarks. Outside semantic versioning.
//!
//! It follows the formula line by line, as one would write it without this crate, and makes a tensor
//! of the logits' size at almost every step. −inf and NaN logits, which the fused loss handles, are
//! beyond it, except in ignored rows.

use crate::backend::{Coefficients, result_dtype, row_shape};
use crate::error::Result;
use crate::loss::{LabelSmoothingLoss, Logits, Reduction};
use candle_core::{DType, Tensor};

/// What `loss.forward(logits, targets)` computes, by stock ops.
pub fn forward(loss: &LabelSmoothingLoss, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (problem, targets) = loss.problem(&Logits::of(logits), targets)?;
    let dtype = result_dtype(logits.dtype());

    // The classes last, all other dimensions as rows: (N, K).
    let by_row = |t: &Tensor| -> candle_core::Result<Tensor> {
        let mut dims: Vec<usize> = (0..t.rank()).filter(|d| *d != problem.class_dim).collect();
        dims.push(problem.class_dim);
        t.permute(dims)?.contiguous()?.reshape(((), problem.num_classes))?.to_dtype(dtype)
    };
    let mut x = by_row(logits)?;

    // The labels (N, 1), and which rows count. The others get a label and logits that do no harm.
    let mut labels = targets.flatten_all()?.unsqueeze(1)?;
    if matches!(labels.dtype(), DType::I16 | DType::I32) {
        labels = labels.to_dtype(DType::I64)?;
    }
    let mut counts = None;
    if let Some(index) = problem.ignore_index {
        labels = labels.to_dtype(DType::I64)?;
        let index = Tensor::full(index, labels.shape(), labels.device())?;
        let mask = labels.ne(&index)?;
        labels = mask.where_cond(&labels, &labels.zeros_like()?)?;
        x = mask.broadcast_as(x.shape())?.where_cond(&x, &x.zeros_like()?)?;
        counts = Some(mask.to_dtype(dtype)?);
    }

    let max = x.max_keepdim(1)?.detach();
    let x = x.broadcast_sub(&max)?;
    let log_sum = x.exp()?.sum_keepdim(1)?.log()?;
    let log_softmax = x.broadcast_sub(&log_sum)?;
    let lse = (log_sum + max)?;

    // Σ r·log softmax, and the rows' weights, (N, 1) both.
    let of_label = |values: Tensor| {
        values.flatten_all()?.index_select(&labels.flatten_all()?, 0)?.unsqueeze(1)
    };
    let is_class = targets.dtype().is_int();
    let (weighted, weights) = match &problem.coefficients {
        Coefficients::Uniform(c) if is_class => {
            let own = (log_softmax.gather(&labels, 1)? * (c.own - c.spread))?;
            ((own + (log_softmax.sum_keepdim(1)? * c.spread)?)?, lse.ones_like()?)
        }
        Coefficients::Uniform(c) => {
            let r = by_row(&targets)?.affine(c.scale, c.spread)?;
            ((log_softmax * r)?.sum_keepdim(1)?, lse.ones_like()?)
        }
        Coefficients::PerClass(table) => {
            let [scale, spread, own, weight] = [0, 1, 2, 3].map(|i| table.narrow(0, i, 1));
            let spread = spread?;
            if is_class {
                let own = (log_softmax.gather(&labels, 1)? * of_label((own? - &spread)?)?)?;
                let spread = log_softmax.broadcast_mul(&spread)?.sum_keepdim(1)?;
                ((own + spread)?, of_label(weight?)?)
            } else {
                let r = by_row(&targets)?.broadcast_mul(&scale?)?.broadcast_add(&spread)?;
                ((log_softmax * r)?.sum_keepdim(1)?, lse.ones_like()?)
            }
        }
    };

    let mut losses = ((lse.sqr()? * problem.z_loss)? - weighted)?;
    let mut weights = weights;
    if let Some(counts) = counts {
        losses = (losses * &counts)?;
        weights = (weights * counts)?;
    }
    Ok(match loss.reduction() {
        Reduction::None => losses.reshape(row_shape(logits.dims(), problem.class_dim))?,
        Reduction::Sum => losses.sum_all()?,
        Reduction::Mean => losses.sum_all()?.div(&weights.sum_all()?)?,
    })
}
