//! The loss composed from stock candle ops: the oracle of the tests and the baseline of the
//! benchmarks. Outside semantic versioning.
//!
//! It follows the formula line by line and makes a tensor of the logits' size at every step. −inf
//! and NaN logits, which the fused loss handles, are beyond it, except in ignored rows.

use crate::backend::Coefficients;
use crate::error::Result;
use crate::loss::{LabelSmoothingLoss, Reduction, result_dtype};
use candle_core::{D, DType, Tensor};

/// What `loss.forward(logits, targets)` computes, by stock ops.
pub fn forward(loss: &LabelSmoothingLoss, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (problem, targets) = loss.problem(logits, targets)?;
    let dtype = result_dtype(logits.dtype());
    let is_class = targets.dtype().is_int();

    // The classes last, every other dimension a row: (N, K).
    let classes_last = |t: &Tensor| -> candle_core::Result<Tensor> {
        let mut dims: Vec<usize> = (0..t.rank()).filter(|d| *d != problem.class_dim).collect();
        dims.push(problem.class_dim);
        t.permute(dims)?
            .contiguous()?
            .reshape(((), problem.num_classes))?
            .to_dtype(dtype)
    };
    let x = classes_last(logits)?;
    let mut row_shape = logits.dims().to_vec();
    row_shape.remove(problem.class_dim);

    // Which rows count, (N, 1), and p, (N, K).
    let (counts, p) = if is_class {
        let labels = targets.flatten_all()?.to_dtype(DType::I64)?.unsqueeze(1)?;
        let ignored = match problem.ignore_index {
            Some(index) => labels.eq(&Tensor::full(index, labels.shape(), labels.device())?)?,
            None => labels.zeros_like()?.to_dtype(DType::U8)?,
        };
        let classes = Tensor::arange(0i64, problem.num_classes as i64, labels.device())?;
        (
            ignored.eq(0u8)?,
            labels
                .broadcast_eq(&classes.unsqueeze(0)?)?
                .to_dtype(dtype)?,
        )
    } else {
        let p = classes_last(&targets)?;
        (p.narrow(1, 0, 1)?.ones_like()?.to_dtype(DType::U8)?, p)
    };
    let x = counts
        .broadcast_as(x.shape())?
        .where_cond(&x, &x.zeros_like()?)?;

    // r = (1−e)·w·p + e·w·π, S = Σ r, and what a mean divides by.
    let (r, w) = match &problem.coefficients {
        Coefficients::Uniform(c) => (p.affine(c.scale, c.spread)?, None),
        Coefficients::PerClass(table) => {
            let row = |i| table.narrow(0, i, 1);
            (
                p.broadcast_mul(&row(0)?)?.broadcast_add(&row(1)?)?,
                Some(row(3)?),
            )
        }
    };
    let counts = counts.to_dtype(dtype)?;
    let weight = match w {
        Some(w) if is_class => p.broadcast_mul(&w)?.sum_keepdim(D::Minus1)?,
        _ => counts.ones_like()?,
    };
    let weight = (weight * &counts)?;

    // loss = Σ r·(lse − x) + z·lse², relative to the row's maximum.
    let max = x.max_keepdim(D::Minus1)?.detach();
    let x = x.broadcast_sub(&max)?;
    let log_sum = x.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let lse = (&log_sum + max)?;
    let losses = (x.broadcast_sub(&log_sum)?.neg()? * r)?.sum_keepdim(D::Minus1)?;
    let losses = ((losses + (lse.sqr()? * problem.z_loss)?)? * counts)?;

    Ok(match loss.reduction() {
        Reduction::None => losses.reshape(row_shape)?,
        Reduction::Sum => losses.sum_all()?,
        Reduction::Mean => losses.sum_all()?.div(&weight.sum_all()?)?,
    })
}
