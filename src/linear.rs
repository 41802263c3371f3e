//! The loss from hidden states, without all the logits at once.
//!
//! The logits are computed a tile at a time: some rows of the hidden states times some classes of the weight. Forward
//! merges each tile into the softmax state of its rows. Backward replaces each tile by its gradient, and multiplies that into the
//! gradients of the hidden states and the weight. Forward keeps the logits of the first rows, as many as the budget allows.
//! Backward computes the others again (`tiles`). On the CPU, rows that do not count are left out of all this (`rows`).

mod rows;
mod tiles;

pub use tiles::TileSize;
pub(crate) use tiles::{TiledLoss, Tiling};

use crate::autograd::check_storage;
use crate::error::{Error, Result};
use crate::exchange::Shard;
use crate::formula::{LossParams, METRIC_FIELDS, is_logits_dtype};
use crate::layout::{check_memory, row_shape};
use crate::loss::{LabelSmoothingLoss, LogitsInfo, ask_for_metrics, no_metrics};
use crate::metrics::Metrics;
use candle_core::{DType, Tensor};
use rows::ComputedRows;
use tiles::matmul_dtype;

impl LabelSmoothingLoss {
    /// The loss of `logits = hidden · weightᵀ + bias`, without the memory for all logits and their gradients.
    ///
    /// `hidden` has shape (.., H), `weight` (K, H) and `bias` (K), as [`candle_nn::Linear`] keeps them. They are on one device.
    /// Each has dtype f16, bf16 or f32, or all have f64. `targets` are those of logits of shape (.., K). The class
    /// dimension is the last one. All options and the result are as in [`forward`](Self::forward), except that logits of a half
    /// type are rounded at other places. Each of `hidden`, `weight` and `bias` that is tracked gets its gradient, in its own dtype.
    /// None of them may change before `backward`, which reads them again.
    ///
    /// On the CPU ignored rows and rows of weight 0 are left out of the multiplications. A GPU multiplies them too. There their
    /// hidden states must be finite, because the weight's gradient would have 0·NaN = NaN.
    /// [The guide](crate::guide::large_vocabularies#rows-that-do-not-count) shows how to leave them out on a GPU.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use candle_label_smoothing::{LabelSmoothingLoss, Smoothing};
    /// use candle_nn::{VarBuilder, VarMap, linear};
    ///
    /// let variables = VarMap::new();
    /// let head = linear(64, 1000, VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    /// let hidden = Tensor::zeros((2, 16, 64), DType::F32, &Device::Cpu)?;
    /// let next_tokens = Tensor::ones((2, 16), DType::U32, &Device::Cpu)?;
    ///
    /// let loss = LabelSmoothingLoss::new(Smoothing::over_all(0.1)?);
    /// let mean = loss.forward_linear(&hidden, head.weight(), head.bias(), &next_tokens)?;
    /// let gradients = mean.backward()?;
    /// assert!(gradients.get(head.weight()).is_some());
    /// # Ok::<(), candle_label_smoothing::Error>(())
    /// ```
    ///
    /// # When to use it
    /// Use it where a linear layer makes the logits and nothing else needs them. If the caller makes the logits, candle's `backward`
    /// holds them, their gradient, and further tensors of that size. This function holds
    /// - the logits within the [budget](Self::with_logits_budget) of 512 MiB, which `backward` replaces by their gradient;
    /// - a tile of the logits beyond the budget;
    /// - copies of a tile of the hidden states, the weight and the probabilities, where their dtype or layout requires it or rows
    ///   are left out;
    /// - the gradients of `hidden`, `weight` and `bias`, and the products that are added to them;
    /// - about a hundred bytes a row, or two hundred with metrics or [`Smoothing::over_unmasked`](crate::Smoothing::over_unmasked).
    ///
    /// On a GPU, a bias needs the memory of one more tile while it is added, and hidden states or probabilities that are not contiguous
    /// are copied for all rows.
    ///
    /// If all logits fit into the budget, a step has the three matrix multiplications of a linear layer. The logits beyond the
    /// budget are computed twice. [The guide](crate::guide::large_vocabularies) has times and memory.
    ///
    /// # How it computes
    /// If all logits fit into the budget, they are one tile, unless a dtype must be converted and the copy would be larger than the
    /// logits. Otherwise a tile has at most 4096 rows on the CPU and 16384 on a GPU.
    /// It has so many classes that neither the tile nor its pieces of the hidden states and of the weight have more than
    /// 2²² elements on the CPU, or 2²⁸ on a GPU, but at least 64. That is 16 MB of f32, or 512 MB of bf16.
    ///
    /// On the CPU f16 and bf16 are computed in f32, a tile at a time, since candle's multiplication of half types there converts whole
    /// tensors at every call. On a GPU a tile has the dtype of candle's multiplication, and its gradient is rounded to that dtype, as in
    /// `forward`. If the dtypes of the three differ, all is computed in f32. Gradients are summed over tiles in f32 (f64 for f64) and
    /// rounded once. So a half type needs an f32 copy of the hidden states' gradient.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward); shapes or devices of the three that do not fit together; f64 beside another dtype; and
    /// a class dimension other than the last.
    ///
    /// [`candle_nn::Linear`]: https://docs.rs/candle-nn/latest/candle_nn/struct.Linear.html
    pub fn forward_linear(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: &Tensor,
    ) -> Result<Tensor> {
        let tiling = Tiling { tile: None, budget: self.logits_budget() };
        let head = Head { hidden, weight, bias };
        Ok(forward_linear(self, head, targets, tiling, false)?.0)
    }

    /// [`forward_linear`](Self::forward_linear) for class indices, with the [`Metrics`] of the rows from the same logits. The
    /// loss and its gradients have the bits of [`forward_linear`](Self::forward_linear).
    ///
    /// # Errors
    /// Those of [`forward_linear`](Self::forward_linear), and targets that are probabilities.
    pub fn forward_linear_with_metrics(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: &Tensor,
    ) -> Result<(Tensor, Metrics)> {
        let tiling = Tiling { tile: None, budget: self.logits_budget() };
        let head = Head { hidden, weight, bias };
        let (loss, metrics) = forward_linear(self, head, targets, tiling, true)?;
        Ok((loss, metrics.ok_or_else(no_metrics)?))
    }
}

/// The tensors that make logits, as [`candle_nn::Linear`] keeps them.
///
/// [`candle_nn::Linear`]: https://docs.rs/candle-nn/latest/candle_nn/struct.Linear.html
#[derive(Clone, Copy)]
pub(crate) struct Head<'a> {
    pub hidden: &'a Tensor,
    pub weight: &'a Tensor,
    pub bias: Option<&'a Tensor>,
}

/// [`LabelSmoothingLoss::forward_linear`], and the metrics if they are asked for.
pub(crate) fn forward_linear(
    loss: &LabelSmoothingLoss,
    head: Head,
    targets: &Tensor,
    tiling: Tiling,
    wants_metrics: bool,
) -> Result<(Tensor, Option<Metrics>)> {
    let (tiled, states) = head_states(loss, head, targets, None, tiling, wants_metrics)?;
    head_loss(tiled, head, &states.unsqueeze(0)?)
}

/// The softmax states of the rows over the classes of the weight.
pub(crate) fn head_states(
    loss: &LabelSmoothingLoss,
    head: Head,
    targets: &Tensor,
    shard: Option<Shard>,
    tiling: Tiling,
    wants_metrics: bool,
) -> Result<(TiledLoss, Tensor)> {
    let Head { hidden, weight, bias } = head;
    let (dims, dtype) = logits_of(loss, head)?;
    let is_tracked = [Some(hidden), Some(weight), bias].iter().flatten().any(|t| t.track_op());
    let logits = LogitsInfo { dims: &dims, dtype, device: hidden.device(), is_tracked, shard };
    let (mut params, targets) = loss.validate(&logits, targets)?;
    if wants_metrics {
        ask_for_metrics(&mut params, &targets)?;
    }
    let row_shape = row_shape(&dims, params.class_dim);
    check_rows_memory(&params, &row_shape)?;
    let matmul_dtype = matmul_dtype(dtype, hidden.device());
    let rows = ComputedRows::new(&params, matmul_dtype, &targets, row_shape)?;

    let mut tiled = TiledLoss::new(params, targets, rows, matmul_dtype, [hidden, weight], tiling);
    tiled.check_memory(weight)?;
    let (h, w, b) = (hidden.detach(), weight.detach(), bias.map(Tensor::detach));
    let states = tiled.forward_states(&h, &w, b.as_ref())?;
    Ok((tiled, states))
}

/// The loss as a node of the graph, from the states over ranges that make up all classes.
pub(crate) fn head_loss(
    tiled: TiledLoss,
    Head { hidden, weight, bias }: Head,
    states: &Tensor,
) -> Result<(Tensor, Option<Metrics>)> {
    let computed = tiled.finish(states)?;
    let metrics = computed.metrics()?;
    // Without a bias, a constant takes its place in the graph.
    let constant = tiled.targets.clone();
    let has_bias = bias.is_some();
    let inputs = [hidden, weight, bias.unwrap_or(&constant)];
    let loss =
        computed.attach_backward(inputs, move |[hidden, weight, bias], grad_result, saved| {
            tiled.backward(hidden, weight, has_bias.then_some(bias), grad_result, saved)
        })?;
    Ok((loss, metrics))
}

/// The shape and the dtype of the logits that hidden states, weight and bias make. Checks their shapes, dtypes, storages and
/// devices, and the class dimension.
fn logits_of(
    loss: &LabelSmoothingLoss,
    Head { hidden, weight, bias }: Head,
) -> Result<(Vec<usize>, DType)> {
    let logits = match (hidden.dims(), weight.dims()) {
        ([rows @ .., size], [classes, columns])
            if size == columns && bias.is_none_or(|bias| bias.dims() == [*classes]) =>
        {
            Some((rows, classes))
        }
        _ => None,
    };
    let dims = |tensor: &Tensor| tensor.dims().to_vec();
    let Some((rows, &classes)) = logits else {
        let (hidden, weight, bias) = (dims(hidden), dims(weight), bias.map(dims));
        return Err(Error::LinearShapes { hidden, weight, bias });
    };
    let dtype = |tensor: &Tensor| tensor.dtype();
    let all = || [Some(hidden), Some(weight), bias].into_iter().flatten();
    let logits_dtype = match dtype(hidden) {
        hidden if is_logits_dtype(hidden) && all().all(|t| dtype(t) == hidden) => hidden,
        _ if all().all(|t| matches!(dtype(t), DType::F16 | DType::BF16 | DType::F32)) => DType::F32,
        _ => {
            let (hidden, weight, bias) = (dtype(hidden), dtype(weight), bias.map(dtype));
            return Err(Error::LinearDTypes { hidden, weight, bias });
        }
    };
    all().try_for_each(check_storage)?;
    let device = |tensor: &Tensor| tensor.device().location();
    if all().any(|tensor| device(tensor) != device(hidden)) {
        let (hidden, weight, bias) = (device(hidden), device(weight), bias.map(device));
        return Err(Error::LinearDevices { hidden, weight, bias });
    }
    let (last, logits) = (rows.len(), [rows, &[classes]].concat());
    match loss.class_dim(&logits)? {
        class_dim if class_dim != last => Err(Error::LinearClassDim { class_dim, last }),
        _ => Ok((logits, logits_dtype)),
    }
}

/// Checks the memory for what is kept of a row: what was saved, its loss and weight, its metrics, its state twice while the row
/// tiles are concatenated, and its indices.
fn check_rows_memory(params: &LossParams, row_shape: &[usize]) -> Result<()> {
    let num_metrics = if params.wants_metrics { METRIC_FIELDS + 1 } else { 0 };
    let per_row = 2 * params.num_state_fields() + params.num_saved_fields() + 4 + num_metrics;
    let num_rows: usize = row_shape.iter().product();
    check_memory("what is kept of rows", row_shape, num_rows.saturating_mul(per_row))
}
