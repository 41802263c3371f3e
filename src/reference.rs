//! The loss composed from stock candle ops: the oracle of the tests and the baseline of the
//! benchmarks. Outside semantic versioning.
//!
//! It follows the formula line by line and makes a tensor of the logits' size at almost every step. It does not handle
//! NaN logits, except in rows that do not count, nor −inf logits, except with `over_unmasked`.

use crate::error::Result;
use crate::formula::{ClassParams, ClassTable, LogitMap, LossParams, result_dtype};
use crate::layout::row_shape;
use crate::loss::{LabelSmoothingLoss, LogitsInfo, Reduction};
use candle_core::{DType, Tensor};

/// The same as `loss.forward(logits, targets)`, by stock ops.
pub fn forward(loss: &LabelSmoothingLoss, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (params, targets) = loss.validate(&LogitsInfo::of(logits), targets)?;
    let dtype = result_dtype(logits.dtype());

    let by_row = |t: &Tensor| classes_last(t, params.class_dim)?.to_dtype(dtype);
    let (labels, row_weights) = labels_and_row_weights(&params, &targets, dtype)?;
    let counted = row_weights.as_ref().map(|weights| weights.ne(0.)).transpose()?;
    // The numbers of a row that does not count may be NaN.
    let of_counted = |t: Tensor| match &counted {
        Some(counted) => counted.broadcast_as(t.shape())?.where_cond(&t, &t.zeros_like()?),
        None => Ok(t),
    };

    let given = of_counted(by_row(logits)?)?;
    let x = params.logit_map.map_or(Ok(given.clone()), |map| mapped(&given, map))?;
    let max = x.max_keepdim(1)?.detach();
    let x = x.broadcast_sub(&max)?;
    let log_sum = x.exp()?.sum_keepdim(1)?.log()?;
    let log_softmax = x.broadcast_sub(&log_sum)?;
    let lse = (log_sum + max)?;

    let is_class = targets.dtype().is_int();
    let probabilities = || match is_class {
        true => given.zeros_like()?.detach().scatter_add(&labels, &lse.ones_like()?.detach(), 1),
        false => of_counted(by_row(&targets)?),
    };
    let labels = is_class.then_some(&labels);
    let (weighted, mut weights) =
        sum_over_classes(&params, &given, &log_softmax, labels, probabilities)?;

    let mut losses = ((lse.sqr()? * params.z_loss)? - weighted)?;
    if let Some(row_weights) = row_weights {
        losses = (losses * &row_weights)?;
        weights = (weights * row_weights)?;
    }
    let divisor = weights.detach().sum_all()?;
    Ok(match loss.reduction() {
        Reduction::None => losses.reshape(row_shape(logits.dims(), params.class_dim))?,
        Reduction::Sum => losses.sum_all()?,
        Reduction::MeanOrZero if divisor.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0. => {
            // A sum over the logits in which each is replaced by 0.
            let zeros = given.zeros_like()?.detach();
            zeros.to_dtype(DType::U8)?.where_cond(&given, &zeros)?.sum_all()?
        }
        Reduction::Mean | Reduction::MeanOrZero => losses.sum_all()?.div(&divisor)?,
    })
}

/// Σ r·log softmax, and the divisor's terms, (N, 1) both. Class targets have labels.
fn sum_over_classes(
    params: &LossParams,
    given: &Tensor,
    log_softmax: &Tensor,
    labels: Option<&Tensor>,
    probabilities: impl Fn() -> candle_core::Result<Tensor>,
) -> candle_core::Result<(Tensor, Tensor)> {
    let ones = || log_softmax.narrow(1, 0, 1)?.ones_like();
    let of_labels = |values: Tensor, labels: &Tensor| {
        values.flatten_all()?.index_select(&labels.flatten_all()?, 0)?.unsqueeze(1)
    };
    Ok(match (&params.class_table, labels) {
        _ if params.unmasked_epsilon != 0. => {
            let c = class_rows(params, given)?;
            let unmasked = given.ne(f64::NEG_INFINITY)?.to_dtype(given.dtype())?;
            let share = unmasked.broadcast_div(&unmasked.sum_keepdim(1)?)?;
            let share = share.broadcast_mul(&(&c.weight * params.unmasked_epsilon)?)?;
            let r = (probabilities()?.broadcast_mul(&c.prob_scale)? + share)?;
            // 0·∞ is 0 here.
            let terms = r.ne(0.)?.where_cond(&(log_softmax * &r)?, &r.zeros_like()?)?;
            let weights = labels.map_or_else(ones, |labels| of_labels(c.weight, labels))?;
            (terms.sum_keepdim(1)?, weights)
        }
        (ClassTable::Uniform(c), Some(labels)) => {
            let label = (log_softmax.gather(labels, 1)? * (c.on_value - c.off_value))?;
            ((label + (log_softmax.sum_keepdim(1)? * c.off_value)?)?, ones()?)
        }
        (ClassTable::Uniform(c), None) => {
            let r = probabilities()?.affine(c.prob_scale, c.off_value)?;
            ((log_softmax * r)?.sum_keepdim(1)?, ones()?)
        }
        (ClassTable::PerClass(_), Some(labels)) => {
            let c = class_rows(params, given)?;
            let delta = of_labels((c.on_value - &c.off_value)?, labels)?;
            let label = (log_softmax.gather(labels, 1)? * delta)?;
            let others = log_softmax.broadcast_mul(&c.off_value)?.sum_keepdim(1)?;
            ((label + others)?, of_labels(c.weight, labels)?)
        }
        (ClassTable::PerClass(_), None) => {
            let c = class_rows(params, given)?;
            let r = probabilities()?.broadcast_mul(&c.prob_scale)?;
            let r = r.broadcast_add(&c.off_value)?;
            ((log_softmax * r)?.sum_keepdim(1)?, ones()?)
        }
    })
}

/// cap·tanh(scale·x/cap), or scale·x. −inf stays −inf.
fn mapped(x: &Tensor, map: LogitMap<f64>) -> candle_core::Result<Tensor> {
    let scaled = (x * map.scale)?;
    let Some(cap) = map.cap else {
        return Ok(scaled);
    };
    let capped = ((scaled / cap)?.tanh()? * cap)?;
    x.ne(f64::NEG_INFINITY)?.where_cond(&capped, x)
}

/// The tensor with the class dimension last and the others merged, (N, K).
fn classes_last(tensor: &Tensor, class_dim: usize) -> candle_core::Result<Tensor> {
    let mut dims: Vec<usize> = (0..tensor.rank()).filter(|dim| *dim != class_dim).collect();
    dims.push(class_dim);
    tensor.permute(dims)?.contiguous()?.reshape(((), tensor.dim(class_dim)?))
}

/// The params of the classes, (1, K) each. `like` has the dtype and the device.
fn class_rows(params: &LossParams, like: &Tensor) -> candle_core::Result<ClassParams<Tensor>> {
    let c = match &params.class_table {
        ClassTable::PerClass(table) => {
            ClassParams::from_fields(std::array::from_fn(|i| table.narrow(0, i, 1)))
        }
        ClassTable::Uniform(c) => c.map(|value| {
            Tensor::full(value, (1, params.num_classes), like.device())?.to_dtype(like.dtype())
        }),
    };
    Ok(ClassParams {
        prob_scale: c.prob_scale?,
        off_value: c.off_value?,
        on_value: c.on_value?,
        weight: c.weight?,
    })
}

/// The targets and the rows' weights, (N, 1) both. Ignored rows have weight 0, and rows of weight 0 have label 0. Without a
/// weight and an ignored index, there is no tensor of weights.
fn labels_and_row_weights(
    params: &LossParams,
    targets: &Tensor,
    dtype: DType,
) -> candle_core::Result<(Tensor, Option<Tensor>)> {
    let column = |t: &Tensor| t.flatten_all()?.unsqueeze(1);
    let mut row_weights = params.row_weights.as_ref().map(column).transpose()?;
    if let Some(weights) = &mut row_weights {
        // candle 0.11.1's conversion from f8 to f64 overflows the stack.
        let exact = if weights.dtype() == DType::F8E4M3 { DType::F32 } else { dtype };
        *weights = weights.to_dtype(exact)?.to_dtype(dtype)?;
    }
    let mut labels = column(targets)?;
    if !targets.dtype().is_int() {
        return Ok((labels, row_weights));
    }
    if matches!(labels.dtype(), DType::I16 | DType::I32) || params.ignore_index.is_some() {
        labels = labels.to_dtype(DType::I64)?;
    }
    if let Some(index) = params.ignore_index {
        let ignored = Tensor::full(index, labels.shape(), labels.device())?;
        let mask = labels.ne(&ignored)?.to_dtype(dtype)?;
        row_weights = Some(row_weights.map_or(Ok(mask.clone()), |weights| weights * &mask)?);
    }
    if let Some(weights) = &row_weights {
        labels = weights.ne(0.)?.where_cond(&labels, &labels.zeros_like()?)?;
    }
    Ok((labels, row_weights))
}
