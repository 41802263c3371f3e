//! The metrics of the rows, from the pass that computes the loss.

use crate::error::Result;
use crate::formula::{METRIC_FIELDS, RowMetrics};
use candle_core::{DType, Tensor};

/// What one logs beside the loss, from the same read of the logits.
///
/// [`LabelSmoothingLoss::forward_with_metrics`](crate::LabelSmoothingLoss::forward_with_metrics) returns it. Each field has a
/// number for each row, in the shape of the rows: the logits' shape without the class dimension. A row counts unless it is
/// ignored or its weight by [`weigh_rows`](crate::LabelSmoothingLoss::weigh_rows) is 0. A row that does not count is 0 in every
/// field. A row whose logits hold NaN, or are all −∞, has NaN in `nll`, `lse`, `entropy` and `confidence`, and its prediction is
/// 0 and not correct. A logit of +∞ makes `nll`, `entropy` and `confidence` NaN and `lse` not finite, but
/// it is predicted. On a GPU a label out of range makes only `nll` NaN, and a row weight that is negative or not finite changes
/// no metric.
///
/// The tensors are constants: no gradient flows through them. They are on the logits' device, and nothing waits for the device.
/// Their dtype is that of the loss, f64 for f64 logits and f32 otherwise, except for `prediction`. The logits x are those of the
/// formula: with [`with_logit_scale`](crate::LabelSmoothingLoss::with_logit_scale) and
/// [`with_softcap`](crate::LabelSmoothingLoss::with_softcap), their scaled and capped values. [The guide](crate::guide::metrics)
/// shows how to log them over several batches, and how to measure calibration.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Metrics {
    /// The negative log-likelihood −log softmax(x)_y of the label y: the cross-entropy without smoothing, class weights, row
    /// weights and z-loss. It is infinite if the label's logit is −∞.
    pub nll: Tensor,
    /// The class of the row's largest logit, the first of equals; u32.
    pub prediction: Tensor,
    /// 1 if the prediction is the label, else 0.
    pub correct: Tensor,
    /// The largest probability of the row, exp(max x − lse).
    pub confidence: Tensor,
    /// The entropy of the softmax, −Σ p_k·log p_k in nats, with 0·log 0 = 0.
    pub entropy: Tensor,
    /// log Σ_k exp(x_k).
    pub lse: Tensor,
    /// 1 if the row counts, else 0. A label of class weight 0 counts.
    pub counted: Tensor,
}

impl Metrics {
    pub(crate) fn new(rows: &RowMetrics<Tensor>, row_shape: &[usize]) -> Result<Self> {
        let field = |i| rows.values.narrow(0, i, 1)?.reshape(row_shape);
        let [nll, correct, confidence, entropy, lse, counted]: [_; METRIC_FIELDS] =
            std::array::from_fn(field);
        Ok(Self {
            nll: nll?,
            prediction: rows.predictions.clone(),
            correct: correct?,
            confidence: confidence?,
            entropy: entropy?,
            lse: lse?,
            counted: counted?,
        })
    }

    /// The number of rows that count: a scalar on the device, f64 for f64 logits and f32 otherwise.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn count(&self) -> Result<Tensor> {
        sum(&self.counted, self.counted.dtype())
    }

    /// The mean of [`nll`](Self::nll) over the rows that count, 0 if none does: a scalar on the device, f64 for f64 logits and f32
    /// otherwise. Its exponential is the perplexity.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn mean_nll(&self) -> Result<Tensor> {
        self.mean(&self.nll)
    }

    /// The share of the rows that count whose prediction is the label, 0 if none counts: a scalar on the device, f64 for f64 logits
    /// and f32 otherwise.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn accuracy(&self) -> Result<Tensor> {
        self.mean(&self.correct)
    }

    /// The mean of [`confidence`](Self::confidence) over the rows that count, 0 if none does: a scalar on the device, f64 for f64
    /// logits and f32 otherwise.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn mean_confidence(&self) -> Result<Tensor> {
        self.mean(&self.confidence)
    }

    /// The mean of [`entropy`](Self::entropy) over the rows that count, 0 if none does: a scalar on the device, f64 for f64
    /// logits and f32 otherwise.
    ///
    /// # Errors
    /// Those of candle's operations.
    pub fn mean_entropy(&self) -> Result<Tensor> {
        self.mean(&self.entropy)
    }

    /// The mean over the rows that count. The others are 0 in `values`.
    fn mean(&self, values: &Tensor) -> Result<Tensor> {
        let dtype = sum_dtype(values);
        let count = sum(&self.counted, dtype)?;
        // max(count, 1). candle's maximum would copy the 1 to the device, which a capture of a CUDA graph does not allow.
        let divisor = ((count - 1.)?.relu()? + 1.)?;
        let mean = (sum(values, dtype)? / divisor)?;
        Ok(mean.to_dtype(values.dtype())?)
    }
}

/// The dtype of a sum over many rows. candle adds them one by one, which in f32 would lose half of the digits of a million. Metal
/// has no f64.
fn sum_dtype(values: &Tensor) -> DType {
    match values.device().is_metal() {
        true => values.dtype(),
        false => DType::F64,
    }
}

fn sum(values: &Tensor, dtype: DType) -> Result<Tensor> {
    let sum = values.to_dtype(sum_dtype(values))?.sum_all()?;
    Ok(sum.to_dtype(dtype)?)
}
