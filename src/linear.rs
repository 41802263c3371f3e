//! The loss from hidden states, without all the logits at once.
//!
//! The logits are computed a tile at a time: some rows of the hidden states times some classes of the weight. Forward
//! merges each tile into the softmax state of its rows. Backward replaces each tile by its gradient, and multiplies that into the
//! gradients of the hidden states and the weight. Forward keeps the logits of the first rows, as many as the budget allows.
//! Backward computes the others again. On the CPU, rows that do not count are left out of all this.

use crate::autograd::{self, Saved, check_storage};
use crate::error::{Error, Result};
use crate::formula::{LossParams, METRIC_FIELDS, is_logits_dtype, result_dtype};
use crate::layout::{check_memory, row_shape};
use crate::loss::{LabelSmoothingLoss, LogitsInfo, ask_for_metrics, no_metrics};
use crate::metrics::Metrics;
use candle_core::{D, DType, Device, Tensor};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

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
    /// let loss = loss.forward_linear(&hidden, head.weight(), head.bias(), &next_tokens)?;
    /// let gradients = loss.backward()?;
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
        Ok(forward_linear(self, hidden, weight, bias, targets, tiling, false)?.0)
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
        let (loss, metrics) = forward_linear(self, hidden, weight, bias, targets, tiling, true)?;
        Ok((loss, metrics.ok_or_else(no_metrics)?))
    }
}

/// The bytes of logits that are kept until backward, unless [`LabelSmoothingLoss::with_logits_budget`] says otherwise. All logits
/// of 4096 rows by 32768 classes fit in f32.
pub(crate) const DEFAULT_LOGITS_BUDGET: usize = 512 << 20;

/// The size of a tile of the logits.
#[derive(Clone, Copy, Debug)]
pub struct TileSize {
    /// Rows of the hidden states, at most.
    pub rows: usize,
    /// Rows of the weight, at most.
    pub classes: usize,
}

/// How [`forward_linear`] divides the logits.
#[derive(Clone, Copy)]
pub(crate) struct Tiling {
    /// The size of the tiles, or `None` for the default.
    pub tile: Option<TileSize>,
    /// The bytes of logits to keep until backward.
    pub budget: usize,
}

/// [`LabelSmoothingLoss::forward_linear`], and the metrics if they are asked for.
pub(crate) fn forward_linear(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    tiling: Tiling,
    wants_metrics: bool,
) -> Result<(Tensor, Option<Metrics>)> {
    let (dims, dtype) = logits_of(loss, hidden, weight, bias)?;
    let is_tracked = [Some(hidden), Some(weight), bias].iter().flatten().any(|t| t.track_op());
    let logits = LogitsInfo { dims: &dims, dtype, device: hidden.device(), is_tracked };
    let (mut params, targets) = loss.validate(&logits, targets)?;
    if wants_metrics {
        ask_for_metrics(&mut params, &targets)?;
    }
    let row_shape = row_shape(&dims, params.class_dim);
    check_rows_memory(&params, &row_shape)?;
    let matmul_dtype = matmul_dtype(dtype, hidden.device());
    let rows = ComputedRows::new(&params, matmul_dtype, &targets, row_shape.clone())?;

    let mut tiled = TiledLoss::new(params, targets, rows, matmul_dtype, [hidden, weight], tiling);
    tiled.check_memory(weight)?;
    let (h, w, b) = (hidden.detach(), weight.detach(), bias.map(Tensor::detach));
    let states = tiled.forward_states(&h, &w, b.as_ref())?;
    let computed =
        autograd::finish(&tiled.params, matmul_dtype, &states, row_shape, &tiled.targets)?;
    let metrics = computed.metrics()?;
    let has_bias = bias.is_some();
    // Without a bias, a constant takes its place.
    let constant = tiled.targets.clone();
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
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
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

/// The rows whose logits are computed: on the CPU those that count, on a GPU all.
struct ComputedRows {
    /// The shape of all rows.
    shape: Vec<usize>,
    /// The number of computed rows.
    len: usize,
    /// The index among all rows of each computed row, or `None` if all are computed.
    indices: Option<Vec<i64>>,
}

impl ComputedRows {
    /// Checks class targets and row weights on the CPU, and finds the rows that count.
    fn new(params: &LossParams, dtype: DType, targets: &Tensor, shape: Vec<usize>) -> Result<Self> {
        let indices = counted_rows(params, dtype, targets)?;
        let len = indices.as_ref().map_or_else(|| shape.iter().product(), Vec::len);
        Ok(Self { shape, len, indices })
    }

    fn num_rows(&self) -> usize {
        self.shape.iter().product()
    }

    /// The numbers of the computed rows, of a tensor with a number for each row.
    fn select(&self, tensor: &Tensor) -> Result<Tensor> {
        let numbers = tensor.reshape(self.num_rows())?;
        match &self.indices {
            None => Ok(numbers),
            Some(indices) => Ok(numbers.index_select(&index_tensor(indices)?, 0)?),
        }
    }

    /// The gradient of the result for each computed row. A scalar is not copied.
    fn grad_output(&self, grad_result: &Tensor) -> Result<Tensor> {
        match grad_result.rank() {
            0 => Ok(grad_result.broadcast_as(self.len)?),
            _ => self.select(grad_result),
        }
    }

    /// Some of the computed rows, and some columns, of a tensor (.., columns) with all rows: (rows, columns). They are not copied
    /// if the tensor is contiguous and all rows are computed. A copy has the dtype `copy_dtype` on the CPU.
    fn tile(
        &self,
        tensor: &Tensor,
        rows: &Range<usize>,
        columns: &Range<usize>,
        copy_dtype: DType,
    ) -> Result<Tensor> {
        let (is_contiguous, last) = (tensor.is_contiguous(), self.shape.len());
        if autograd::runs_on_cpu(tensor.device()) && (self.indices.is_some() || !is_contiguous) {
            let indices = self.indices.as_deref().map(|indices| &indices[rows.clone()]);
            return autograd::gather(tensor, indices, rows, columns, copy_dtype);
        }
        let (num_rows, num_columns) = (self.num_rows(), tensor.dims()[last]);
        let columns_of = |tensor: &Tensor, dim| tensor.narrow(dim, columns.start, columns.len());
        let tensor = match is_contiguous {
            true => columns_of(&tensor.reshape((num_rows, num_columns))?, 1)?,
            false => columns_of(tensor, last)?.reshape((num_rows, columns.len()))?,
        };
        Ok(narrow(&tensor, rows)?)
    }

    /// All rows along `dim`, from tiles of the computed ones. The others are 0. `zeros(n)` is a tensor of n such rows.
    fn expand(
        &self,
        mut tiles: Vec<Tensor>,
        dim: usize,
        zeros: impl Fn(usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let Some(indices) = &self.indices else {
            return if tiles.is_empty() { zeros(0) } else { Ok(Tensor::cat(&tiles, dim)?) };
        };
        // The row after the computed ones is 0.
        let mut positions = vec![self.len as i64; self.num_rows()];
        for (position, &row) in (0..).zip(indices) {
            if let Some(slot) = positions.get_mut(row as usize) {
                *slot = position;
            }
        }
        tiles.push(zeros(1)?);
        Ok(Tensor::cat(&tiles, dim)?.index_select(&index_tensor(&positions)?, dim)?)
    }

    /// What forward saved of the computed rows.
    fn select_saved(&self, saved: &Saved) -> Result<Saved> {
        match &self.indices {
            None => Ok(saved.clone()),
            Some(indices) => saved.select(&index_tensor(indices)?),
        }
    }
}

/// Indices of rows, on the CPU.
fn index_tensor(indices: &[i64]) -> candle_core::Result<Tensor> {
    Tensor::new(indices, &Device::Cpu)
}

/// The indices of the rows that count, or `None` if all count or the tensors are on a GPU, which would have to wait. Checks class
/// targets and row weights. The kernels check each tile again, but their error would count rows from the start of the tile.
fn counted_rows(params: &LossParams, dtype: DType, targets: &Tensor) -> Result<Option<Vec<i64>>> {
    match autograd::runs_on_cpu(targets.device()) {
        true => autograd::counted_rows(params, dtype, targets),
        false => Ok(None),
    }
}

/// The rows of the weight and bias that make a range of the classes, in the dtype of the multiplication.
struct WeightTile {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl WeightTile {
    /// The logits of these hidden states, (rows, classes).
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = hidden.matmul(&self.weight.t()?)?;
        match &self.bias {
            None => Ok(logits),
            Some(bias) => autograd::add_bias(logits, bias),
        }
    }
}

/// The dtype of the multiplications. On the CPU candle converts half types at every call, and for bf16 the whole storage.
fn matmul_dtype(logits: DType, device: &Device) -> DType {
    match (device, logits) {
        (Device::Cpu, DType::F16 | DType::BF16) => DType::F32,
        (_, dtype) => dtype,
    }
}

/// The loss of logits that are computed in tiles.
struct TiledLoss {
    /// Of all rows.
    params: LossParams,
    targets: Tensor,
    rows: ComputedRows,
    matmul_dtype: DType,
    tile: TileSize,
    /// The number of rows whose logits fit into the budget. They are the first ones.
    num_kept: usize,
    /// The kept logits, until a backward takes them: for each tile of classes those of each tile of rows.
    kept: Mutex<Vec<Option<Tensor>>>,
}

/// Fewer rows or classes are neither kept nor a tile, unless there are no more. Their multiplication would take nearly as long as
/// that of more, because it reads a whole matrix.
const MIN_LEN: usize = 64;

impl TiledLoss {
    /// Chooses the tiles. The hidden states' gradient is summed over tiles of classes, and the weight's over tiles of rows. Larger
    /// tiles make these sums cheaper. On the CPU a tile has at most 16 MB in f32: glibc's allocator returns blocks from
    /// 32 MB on to the system at once. But if all logits fit into the budget, one tile has them, unless converted copies of the hidden
    /// states or the weight would be larger than the logits.
    fn new(
        params: LossParams,
        targets: Tensor,
        rows: ComputedRows,
        matmul_dtype: DType,
        [hidden, weight]: [&Tensor; 2],
        Tiling { tile, budget }: Tiling,
    ) -> Self {
        let num_classes = params.num_classes;
        let row_bytes = num_classes.saturating_mul(matmul_dtype.size_in_bytes());
        let num_kept = match (budget / row_bytes).min(rows.len) {
            num_rows if num_rows < MIN_LEN.min(rows.len) => 0,
            num_rows => num_rows,
        };
        let hidden_size = weight.dims()[1];
        let is_converted = [hidden, weight].iter().any(|t| t.dtype() != matmul_dtype);
        let are_copies_small = !is_converted || hidden_size <= rows.len.min(num_classes);
        let tile = match tile {
            Some(tile) => tile,
            None if num_kept == rows.len && are_copies_small => {
                TileSize { rows: rows.len, classes: num_classes }
            }
            None => {
                let (max_rows, max_elements): (usize, usize) = match weight.device() {
                    Device::Cpu => (1 << 12, 1 << 22),
                    _ => (1 << 14, 1 << 28),
                };
                let max_len = |other: usize| (max_elements / other.max(1)).max(MIN_LEN);
                let rows = max_rows.min(max_len(hidden_size)).min(rows.len);
                TileSize { rows, classes: max_len(rows.max(hidden_size)) }
            }
        };
        let tile = TileSize {
            rows: tile.rows.clamp(1, rows.len.max(1)),
            classes: tile.classes.clamp(1, num_classes),
        };
        Self { params, targets, rows, matmul_dtype, tile, num_kept, kept: Mutex::default() }
    }

    /// The softmax states of all rows over all classes.
    fn forward_states(
        &mut self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let mut kept = Vec::new();
        let hidden = self.readable(hidden)?;
        let (labels, mut row_tiles) = (self.labels()?, self.row_tiles()?);
        let new_states =
            |len| autograd::new_states(&self.params, len, self.matmul_dtype, hidden.device());
        let states =
            row_tiles.iter().map(|(rows, _)| new_states(rows.len())).collect::<Result<Vec<_>>>()?;
        for classes in self.class_tiles() {
            let weight_tile = self.weight_tile(weight, bias, &classes)?;
            for ((rows, params), states) in row_tiles.iter_mut().zip(&states) {
                let logits = weight_tile.logits(&self.hidden_tile(&hidden, rows)?)?;
                let targets = self.targets_tile(&labels, rows, &classes)?;
                params.first_class = classes.start;
                autograd::merge_tile(params, states, &logits, &targets)?;
                let is_kept = self.params.saves_state && rows.end <= self.num_kept;
                kept.push(is_kept.then_some(logits));
            }
        }
        self.kept = Mutex::new(kept);
        self.rows.expand(states, 1, new_states)
    }

    /// The gradients of the hidden states, the weight and the bias, each if it is tracked, from the gradient of the result.
    fn backward(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad_result: &Tensor,
        saved: &Saved,
    ) -> Result<[Option<Tensor>; 3]> {
        // The targets and row weights may have changed since forward.
        counted_rows(&self.params, self.matmul_dtype, &self.targets)?;
        let (wants_hidden, wants_weight) = (hidden.track_op(), weight.track_op());
        let wants_bias = bias.is_some_and(Tensor::track_op);
        let (hidden, weight, bias) = (hidden.detach(), weight.detach(), bias.map(Tensor::detach));
        let grad_output = self.rows.grad_output(grad_result)?;
        let saved = self.rows.select_saved(saved)?;
        let readable_hidden = self.readable(&hidden)?;

        let (labels, mut row_tiles) = (self.labels()?, self.row_tiles()?);
        let num_row_tiles = row_tiles.len();
        let mut grad_hidden = vec![None; row_tiles.len()];
        let mut grad_weight = wants_weight.then(|| ClassGradient::new(&weight));
        let mut grad_bias = bias.as_ref().filter(|_| wants_bias).map(ClassGradient::new);
        for (i, classes) in self.class_tiles().enumerate() {
            let weight_tile = self.weight_tile(&weight, bias.as_ref(), &classes)?;
            let (mut grad_weight_tile, mut grad_bias_tile) = (None, None);
            let of_rows = row_tiles.iter_mut().zip(&mut grad_hidden).enumerate();
            for (j, ((rows, params), grad_hidden)) in of_rows {
                let hidden = self.hidden_tile(&readable_hidden, rows)?;
                let grad_logits = match self.take_kept(i * num_row_tiles + j) {
                    Some(logits) => logits,
                    None => weight_tile.logits(&hidden)?,
                };
                params.first_class = classes.start;
                let targets = self.targets_tile(&labels, rows, &classes)?;
                let grad_output = narrow(&grad_output, rows)?;
                let saved = saved.rows(rows.start, rows.len())?;
                autograd::backward_in_place(params, &grad_logits, &targets, &grad_output, &saved)?;
                if wants_hidden {
                    add_to(grad_hidden, grad_logits.matmul(&weight_tile.weight)?)?;
                }
                if wants_weight {
                    add_to(&mut grad_weight_tile, grad_logits.t()?.matmul(&hidden)?)?;
                }
                if wants_bias {
                    // candle's sum over rows adds number by number. A multiplication is faster.
                    let (dtype, device) = (grad_logits.dtype(), grad_logits.device());
                    let ones = Tensor::ones((1, rows.len()), dtype, device)?;
                    add_to(&mut grad_bias_tile, ones.matmul(&grad_logits)?.squeeze(0)?)?;
                }
            }
            if let Some((gradient, tile)) = grad_weight.as_mut().zip(grad_weight_tile) {
                gradient.set(&classes, tile)?;
            }
            if let Some((gradient, tile)) = grad_bias.as_mut().zip(grad_bias_tile) {
                gradient.set(&classes, tile)?;
            }
        }
        let grad_weight = grad_weight.map(ClassGradient::finish).transpose()?;
        let grad_bias = grad_bias.map(ClassGradient::finish).transpose()?;
        let grad_hidden = match wants_hidden {
            true => Some(self.expand_grad_hidden(grad_hidden, &hidden)?),
            false => None,
        };
        Ok([grad_hidden, grad_weight, grad_bias])
    }

    /// The gradient of all hidden states from the sums of the row tiles.
    fn expand_grad_hidden(&self, tiles: Vec<Option<Tensor>>, hidden: &Tensor) -> Result<Tensor> {
        let (size, dtype) = (hidden.dim(D::Minus1)?, hidden.dtype());
        // Each sum is freed once it is rounded.
        let tiles = tiles.into_iter().flatten().map(|tile| tile.to_dtype(dtype));
        let zeros = |len| Ok(Tensor::zeros((len, size), dtype, hidden.device())?);
        let gradient = self.rows.expand(tiles.collect::<candle_core::Result<_>>()?, 0, zeros)?;
        Ok(gradient.reshape(hidden.shape())?)
    }

    /// The logits that forward kept of a tile, once.
    fn take_kept(&self, tile: usize) -> Option<Tensor> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).get_mut(tile)?.take()
    }

    /// The range and the params of each tile of the computed rows.
    fn row_tiles(&self) -> Result<Vec<(Range<usize>, LossParams)>> {
        let row_weights = self.params.row_weights.as_ref();
        let row_weights = row_weights.map(|weights| self.rows.select(weights)).transpose()?;
        let kept = ranges(0..self.num_kept, self.tile.rows);
        let others = ranges(self.num_kept..self.rows.len, self.tile.rows);
        let with_params = |rows: Range<usize>| {
            let row_weights = row_weights.as_ref().map(|w| narrow(w, &rows)).transpose()?;
            Ok((rows, LossParams { row_weights, class_dim: 1, ..self.params.clone() }))
        };
        kept.chain(others).map(with_params).collect()
    }

    /// The range of each tile of the classes.
    fn class_tiles(&self) -> impl Iterator<Item = Range<usize>> {
        ranges(0..self.params.num_classes, self.tile.classes)
    }

    /// The hidden states in a layout of which tiles are read. A GPU would copy all for each tile if they were not contiguous.
    fn readable(&self, hidden: &Tensor) -> Result<Tensor> {
        match autograd::runs_on_cpu(hidden.device()) {
            true => Ok(hidden.clone()),
            false => Ok(hidden.contiguous()?),
        }
    }

    /// The hidden states of some computed rows in the dtype of the multiplication, (rows, H).
    fn hidden_tile(&self, hidden: &Tensor, rows: &Range<usize>) -> Result<Tensor> {
        let columns = 0..hidden.dim(D::Minus1)?;
        let tile = self.rows.tile(hidden, rows, &columns, self.matmul_dtype)?;
        Ok(tile.to_dtype(self.matmul_dtype)?)
    }

    /// The class targets of the computed rows, or `None` for probabilities.
    fn labels(&self) -> Result<Option<Tensor>> {
        let labels = Some(&self.targets).filter(|targets| targets.dtype().is_int());
        labels.map(|labels| self.rows.select(labels)).transpose()
    }

    /// The class targets of some computed rows, or their probabilities of some classes, (rows, classes).
    fn targets_tile(
        &self,
        labels: &Option<Tensor>,
        rows: &Range<usize>,
        classes: &Range<usize>,
    ) -> Result<Tensor> {
        match labels {
            Some(labels) => Ok(narrow(labels, rows)?),
            None => self.rows.tile(&self.targets, rows, classes, result_dtype(self.matmul_dtype)),
        }
    }

    fn weight_tile(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        classes: &Range<usize>,
    ) -> Result<WeightTile> {
        let tile = |t: &Tensor| narrow(t, classes)?.to_dtype(self.matmul_dtype)?.contiguous();
        Ok(WeightTile { weight: tile(weight)?, bias: bias.map(tile).transpose()? })
    }

    /// Checks the memory for the logits within the budget and for a copy of a tile of the weight. A GPU reports itself that its
    /// memory is too small.
    fn check_memory(&self, weight: &Tensor) -> Result<()> {
        if !weight.device().is_cpu() {
            return Ok(());
        }
        if weight.dtype() != self.matmul_dtype || !weight.is_contiguous() {
            let len = self.tile.classes.saturating_mul(weight.dims()[1]);
            check_memory("a tile of the weight", weight.dims(), len)?;
        }
        let kept = [self.num_kept, self.params.num_classes];
        let bytes =
            kept[0].saturating_mul(kept[1]).saturating_mul(self.matmul_dtype.size_in_bytes());
        check_memory("the kept logits", &kept, bytes.div_ceil(size_of::<f64>()))
    }
}

/// The gradient of the weight or bias, which is computed for some classes at a time.
struct ClassGradient<'a> {
    tensor: &'a Tensor,
    gradient: Option<Tensor>,
}

impl<'a> ClassGradient<'a> {
    fn new(tensor: &'a Tensor) -> Self {
        Self { tensor, gradient: None }
    }

    /// Sets the gradient of these classes. That of all classes is not copied.
    fn set(&mut self, classes: &Range<usize>, tile: Tensor) -> Result<()> {
        let tile = tile.to_dtype(self.tensor.dtype())?;
        if classes.len() == self.tensor.dims()[0] {
            self.gradient = Some(tile);
            return Ok(());
        }
        let gradient = match self.gradient.take() {
            Some(gradient) => gradient,
            None => autograd::zeros_like(self.tensor)?,
        };
        gradient.slice_set(&tile, 0, classes.start)?;
        self.gradient = Some(gradient);
        Ok(())
    }

    /// The gradient of all classes, 0 without rows.
    fn finish(self) -> Result<Tensor> {
        match self.gradient {
            Some(gradient) => Ok(gradient),
            None => Ok(self.tensor.zeros_like()?),
        }
    }
}

/// The ranges of at most `step` that make a range.
fn ranges(all: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    all.clone().step_by(step).map(move |start| start..all.end.min(start + step))
}

/// A range of the first dimension.
fn narrow(tensor: &Tensor, range: &Range<usize>) -> candle_core::Result<Tensor> {
    tensor.narrow(0, range.start, range.len())
}

/// Adds a term to a sum of gradients, in the dtype of the arithmetic.
fn add_to(sum: &mut Option<Tensor>, term: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        None => term,
        Some(sum) => {
            let dtype = result_dtype(term.dtype());
            (sum.to_dtype(dtype)? + term.to_dtype(dtype)?)?
        }
    });
    Ok(())
}
