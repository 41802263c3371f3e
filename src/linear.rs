//! The loss from hidden states, for logits too large for the memory.
//!
//! The logits are computed a tile at a time: some rows of the hidden states times some classes of the weight. Forward
//! merges each tile into the softmax state of its rows. Backward computes each tile again, replaces it by its
//! gradient, and multiplies that into the gradients of the hidden states and the weight.

use crate::autograd::{self, Saved, check_storage};
use crate::error::{Error, Result};
use crate::formula::{LossParams, METRIC_FIELDS, is_logits_dtype, result_dtype};
use crate::layout::{check_memory, row_shape};
use crate::loss::{LabelSmoothingLoss, LogitsInfo, ask_for_metrics, no_metrics};
use crate::metrics::Metrics;
use candle_core::{D, DType, Device, Tensor};

impl LabelSmoothingLoss {
    /// The loss of `logits = hidden · weightᵀ + bias`, without the memory for all logits.
    ///
    /// `hidden` has shape (.., H), `weight` (K, H) and `bias` (K), as [`candle_nn::Linear`] keeps them. They have one
    /// dtype, f16, bf16, f32 or f64, and one device. `targets` are those of logits of shape (.., K). The class dimension
    /// is the last one. All options and the result are as in [`forward`](Self::forward), except that logits of a half
    /// type are rounded at other places, and that the hidden states of an ignored row must be finite: the multiplication for
    /// the weight's gradient would turn them into 0·NaN = NaN. Each of `hidden`, `weight` and `bias` that is tracked gets its
    /// gradient. None of them may change before `backward`, which computes the logits again.
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
    /// Use it if the logits do not fit: many tokens, and a vocabulary that is large against the hidden size. This
    /// function never holds all logits in memory, nor their gradient, nor candle's copies of that gradient. It holds the
    /// gradients of `hidden`, `weight` and `bias`, a tile of the logits, a second one while it adds the bias or computes the
    /// tile's gradient, a piece of the weight and a piece of the hidden states of at most that size, and about a hundred
    /// bytes a row, or two hundred with metrics or [`Smoothing::over_unmasked`](crate::Smoothing::over_unmasked). The cost is
    /// time: `backward` computes the logits again. This is a fourth matrix multiplication, where a linear layer has three.
    ///
    /// [`forward`](Self::forward) is the better choice for logits that fit easily, for few classes, for a hidden size so
    /// large that the multiplications take nearly all of the time, and if the logits are needed anyway.
    ///
    /// # How it computes
    /// A tile has at most 4096 rows on the CPU and 16384 on a GPU. Its number of classes is such that neither the tile nor
    /// its pieces of the hidden states and of the weight have more than 2²² elements on the CPU and 2²⁸ on a GPU (but
    /// at least 64 rows and classes). That is 16 MB of f32, or 512 MB of bf16. On the CPU f16 and bf16 are computed in f32,
    /// since candle's multiplication of half types there converts whole tensors at every call. On a GPU a tile has the
    /// dtype of candle's multiplication, and its gradient is rounded to that dtype, as in `forward`. Gradients are summed
    /// over tiles in f32 (f64 for f64) and rounded once. So a half type needs an f32 copy of the hidden states' gradient.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward); shapes, dtypes or devices of the three that do not fit together; and a class
    /// dimension other than the last.
    ///
    /// [`candle_nn::Linear`]: https://docs.rs/candle-nn/latest/candle_nn/struct.Linear.html
    pub fn forward_linear(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        targets: &Tensor,
    ) -> Result<Tensor> {
        Ok(forward_linear(self, hidden, weight, bias, targets, None, false)?.0)
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
        let (loss, metrics) = forward_linear(self, hidden, weight, bias, targets, None, true)?;
        Ok((loss, metrics.ok_or_else(no_metrics)?))
    }
}

/// The size of a tile of the logits.
#[derive(Clone, Copy, Debug)]
pub struct TileSize {
    /// Rows of the hidden states, at most.
    pub rows: usize,
    /// Rows of the weight, at most.
    pub classes: usize,
}

impl TileSize {
    /// The default. The hidden states' gradient is summed over tiles of classes, and the weight's over tiles of rows. Larger
    /// tiles make these sums cheaper. On the CPU a tile has at most 16 MB in f32: glibc's allocator returns blocks from
    /// 32 MB on to the system at once.
    fn new(num_rows: usize, hidden_size: usize, device: &Device) -> Self {
        let (rows, elements): (usize, usize) = match device {
            Device::Cpu => (1 << 12, 1 << 22),
            _ => (1 << 14, 1 << 28),
        };
        let max_len = |len: usize| (elements / len.max(1)).max(64);
        let rows = rows.min(max_len(hidden_size)).min(num_rows).max(1);
        Self { rows, classes: max_len(rows.max(hidden_size)) }
    }
}

/// [`LabelSmoothingLoss::forward_linear`], with tiles of any size, and the metrics if they are asked for.
pub(crate) fn forward_linear(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    tile: Option<TileSize>,
    wants_metrics: bool,
) -> Result<(Tensor, Option<Metrics>)> {
    let dims = logits_shape(loss, hidden, weight, bias)?;
    let is_tracked = [Some(hidden), Some(weight), bias].iter().flatten().any(|t| t.track_op());
    let (dtype, device) = (hidden.dtype(), hidden.device());
    let logits = LogitsInfo { dims: &dims, dtype, device, is_tracked };
    let (mut params, targets) = loss.validate(&logits, targets)?;
    if wants_metrics {
        ask_for_metrics(&mut params, &targets)?;
    }
    let rows = row_shape(&dims, params.class_dim);

    let num_rows: usize = rows.iter().product();
    let hidden_size = weight.dims()[1];
    let tile = tile.unwrap_or_else(|| TileSize::new(num_rows, hidden_size, device));
    let tile = TileSize { rows: tile.rows.max(1), classes: tile.classes.max(1) };
    // What is kept of a row: what was saved, its loss and weight, its metrics, and its state twice while the row tiles are
    // concatenated.
    let num_metrics = if wants_metrics { METRIC_FIELDS + 1 } else { 0 };
    let per_row = 2 * params.num_state_fields() + params.num_saved_fields() + 2 + num_metrics;
    check_memory("what is kept of rows", &rows, num_rows.saturating_mul(per_row))?;
    // A GPU reports itself that its memory is too small.
    if device.is_cpu() {
        let len = num_rows.min(tile.rows).saturating_mul(hidden_size);
        check_memory("a tile of the hidden states", hidden.dims(), len)?;
        let len = params.num_classes.min(tile.classes).saturating_mul(hidden_size);
        check_memory("a tile of the weight", weight.dims(), len)?;
    }
    let row_tiles = RowTile::all(&rows, tile.rows);
    let tiled = TiledLoss { params, targets, row_tiles, classes_per_tile: tile.classes };
    let (h, w, b) = (hidden.detach(), weight.detach(), bias.map(Tensor::detach));
    let states = tiled.forward_states(&h, &w, b.as_ref())?;
    let dtype = matmul_dtype(hidden);
    let computed = autograd::finish(&tiled.params, dtype, &states, rows, &tiled.targets)?;
    let metrics = computed.metrics()?;
    let has_bias = bias.is_some();
    // Without a bias, a constant takes its place.
    let constant = tiled.targets.clone();
    let inputs = [hidden, weight, bias.unwrap_or(&constant)];
    let loss =
        computed.attach_backward(inputs, move |[hidden, weight, bias], grad_output, saved| {
            tiled.backward(hidden, weight, has_bias.then_some(bias), grad_output, saved)
        })?;
    Ok((loss, metrics))
}

/// The shape of the logits that hidden states, weight and bias make. Checks their shapes, dtypes, storages and devices, and the
/// class dimension.
fn logits_shape(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Vec<usize>> {
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
    let same_dtype = [Some(weight), bias].iter().flatten().all(|t| dtype(t) == hidden.dtype());
    if !same_dtype || !is_logits_dtype(dtype(hidden)) {
        let (hidden, weight, bias) = (dtype(hidden), dtype(weight), bias.map(dtype));
        return Err(Error::LinearDTypes { hidden, weight, bias });
    }
    [Some(hidden), Some(weight), bias].into_iter().flatten().try_for_each(check_storage)?;
    let device = |tensor: &Tensor| tensor.device().location();
    if [Some(weight), bias].iter().flatten().any(|tensor| device(tensor) != device(hidden)) {
        let (hidden, weight, bias) = (device(hidden), device(weight), bias.map(device));
        return Err(Error::LinearDevices { hidden, weight, bias });
    }
    let (last, logits) = (rows.len(), [rows, &[classes]].concat());
    match loss.class_dim(&logits)? {
        class_dim if class_dim != last => Err(Error::LinearClassDim { class_dim, last }),
        _ => Ok(logits),
    }
}

/// A tile of the rows.
struct RowTile {
    first_row: usize,
    /// The start and the length in each dimension of the rows.
    ranges: Vec<(usize, usize)>,
}

impl RowTile {
    /// All rows of these dimensions in their order, at most `max_rows` a tile.
    fn all(dims: &[usize], max_rows: usize) -> Vec<Self> {
        if dims.contains(&0) {
            return Vec::new();
        }
        // The last dimensions stay whole while they fit, the one before them is cut, and the others have length 1.
        let mut tiles = vec![Self { first_row: 0, ranges: Vec::new() }];
        for (dim, &len) in dims.iter().enumerate() {
            let inner: usize = dims[dim + 1..].iter().product();
            let step = (max_rows / inner).clamp(1, len);
            let cut = |tile: Self| {
                (0..len).step_by(step).map(move |start| Self {
                    first_row: tile.first_row + start * inner,
                    ranges: [&tile.ranges[..], &[(start, step.min(len - start))]].concat(),
                })
            };
            tiles = tiles.into_iter().flat_map(cut).collect();
        }
        tiles
    }

    fn narrow(&self, tensor: &Tensor) -> candle_core::Result<Tensor> {
        let mut tile = tensor.clone();
        for (dim, &(start, len)) in self.ranges.iter().enumerate() {
            tile = tile.narrow(dim, start, len)?;
        }
        Ok(tile)
    }

    /// The tile's hidden states in the dtype of the multiplication, (rows, H).
    fn hidden(&self, hidden: &Tensor) -> Result<Tensor> {
        let rows = self.narrow(hidden)?.to_dtype(matmul_dtype(hidden))?;
        Ok(rows.reshape((self.num_rows(), rows.dim(D::Minus1)?))?.contiguous()?)
    }

    fn dims(&self) -> Vec<usize> {
        self.ranges.iter().map(|(_, len)| *len).collect()
    }

    fn num_rows(&self) -> usize {
        self.dims().iter().product()
    }
}

/// The rows of the weight and bias that make a range of the classes, in the dtype of the multiplication.
struct WeightTile {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl WeightTile {
    /// The logits of these hidden states, in the shape of their tile.
    fn logits(&self, hidden: &Tensor, tile: &RowTile) -> Result<Tensor> {
        let mut logits = hidden.matmul(&self.weight.t()?)?;
        if let Some(bias) = &self.bias {
            logits = logits.broadcast_add(bias)?;
        }
        let mut dims = tile.dims();
        dims.push(self.weight.dim(0)?);
        Ok(logits.reshape(dims)?)
    }
}

/// The loss of logits that are computed in tiles.
struct TiledLoss {
    params: LossParams,
    targets: Tensor,
    row_tiles: Vec<RowTile>,
    classes_per_tile: usize,
}

impl TiledLoss {
    /// The softmax states of the rows over all classes.
    fn forward_states(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (dtype, device) = (matmul_dtype(hidden), hidden.device());
        self.check_rows(dtype)?;
        let mut states = Vec::with_capacity(self.row_tiles.len());
        for tile in &self.row_tiles {
            let (hidden, targets) = (tile.hidden(hidden)?, tile.narrow(&self.targets)?);
            let mut params = self.params_of(tile)?;
            let tile_states = autograd::new_states(&params, tile.num_rows(), dtype, device)?;
            for first_class in self.class_starts() {
                let weight_tile = self.weight_tile(weight, bias, first_class)?;
                let logits = weight_tile.logits(&hidden, tile)?;
                params.first_class = first_class;
                autograd::merge_tile(&params, &tile_states, &logits, &targets)?;
            }
            states.push(tile_states);
        }
        match &states[..] {
            [] => autograd::new_states(&self.params, 0, dtype, device),
            _ => Ok(Tensor::cat(&states, 1)?),
        }
    }

    /// The gradients of the hidden states, the weight and the bias, each if it is tracked. `grad_output` is the
    /// gradient of the result, for each row.
    fn backward(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        grad_output: &Tensor,
        saved: &Saved,
    ) -> Result<[Option<Tensor>; 3]> {
        self.check_rows(matmul_dtype(hidden))?;
        let (wants_hidden, wants_weight) = (hidden.track_op(), weight.track_op());
        let wants_bias = bias.is_some_and(Tensor::track_op);
        let (hidden, weight, bias) = (hidden.detach(), weight.detach(), bias.map(Tensor::detach));
        let narrow = |tile: &RowTile| {
            let saved = saved.rows(tile.first_row, tile.num_rows())?;
            let params = self.params_of(tile)?;
            Ok((params, tile.narrow(&self.targets)?, tile.narrow(grad_output)?, saved))
        };
        let mut row_inputs = self.row_tiles.iter().map(narrow).collect::<Result<Vec<_>>>()?;

        let mut grad_hidden = vec![None; self.row_tiles.len()];
        let grad_weight = wants_weight.then(|| weight.zeros_like()).transpose()?;
        let grad_bias = bias.as_ref().filter(|_| wants_bias).map(Tensor::zeros_like).transpose()?;
        for first_class in self.class_starts() {
            let weight_tile = self.weight_tile(&weight, bias.as_ref(), first_class)?;
            let (mut grad_weight_tile, mut grad_bias_tile) = (None, None);
            let row_tiles = self.row_tiles.iter().zip(&mut row_inputs).zip(&mut grad_hidden);
            for ((tile, (params, targets, grad_output, saved)), grad_hidden) in row_tiles {
                let hidden = tile.hidden(&hidden)?;
                let logits = weight_tile.logits(&hidden, tile)?;
                params.first_class = first_class;
                autograd::backward_in_place(params, &logits, targets, grad_output, saved)?;
                let grad_logits = logits.reshape((tile.num_rows(), ()))?;
                if wants_hidden {
                    add_to(grad_hidden, grad_logits.matmul(&weight_tile.weight)?)?;
                }
                if wants_weight {
                    add_to(&mut grad_weight_tile, grad_logits.t()?.matmul(&hidden)?)?;
                }
                if wants_bias {
                    // candle's sum over rows adds number by number. A multiplication is faster.
                    let (dtype, device) = (grad_logits.dtype(), grad_logits.device());
                    let ones = Tensor::ones((1, tile.num_rows()), dtype, device)?;
                    add_to(&mut grad_bias_tile, ones.matmul(&grad_logits)?.squeeze(0)?)?;
                }
            }
            for (gradient, tile) in [(&grad_weight, grad_weight_tile), (&grad_bias, grad_bias_tile)]
            {
                if let (Some(gradient), Some(tile)) = (gradient, tile) {
                    gradient.slice_set(&tile.to_dtype(gradient.dtype())?, 0, first_class)?;
                }
            }
        }
        let grad_hidden = wants_hidden.then(|| concat_rows(grad_hidden, &hidden)).transpose()?;
        Ok([grad_hidden, grad_weight, grad_bias])
    }

    /// Checks class targets and row weights on the CPU. The kernels check each tile again, but their error would count rows from
    /// the start of the tile. Backward calls this function too, because the tensors may have changed since forward.
    fn check_rows(&self, dtype: DType) -> Result<()> {
        match autograd::runs_on_cpu(self.targets.device()) {
            true => autograd::check_rows(&self.params, dtype, &self.targets),
            false => Ok(()),
        }
    }

    /// The params of a tile of the rows.
    fn params_of(&self, tile: &RowTile) -> Result<LossParams> {
        let row_weights = self.params.row_weights.as_ref();
        let row_weights = row_weights.map(|weights| tile.narrow(weights)).transpose()?;
        Ok(LossParams { row_weights, ..self.params.clone() })
    }

    /// The first class of each tile.
    fn class_starts(&self) -> impl Iterator<Item = usize> {
        (0..self.params.num_classes).step_by(self.classes_per_tile)
    }

    fn weight_tile(
        &self,
        weight: &Tensor,
        bias: Option<&Tensor>,
        first_class: usize,
    ) -> Result<WeightTile> {
        let len = self.classes_per_tile.min(self.params.num_classes - first_class);
        let dtype = matmul_dtype(weight);
        let tile = |t: &Tensor| t.narrow(0, first_class, len)?.to_dtype(dtype)?.contiguous();
        Ok(WeightTile { weight: tile(weight)?, bias: bias.map(tile).transpose()? })
    }
}

/// The dtype of the multiplications. On the CPU candle converts half types at every call, and for bf16 the whole storage.
fn matmul_dtype(tensor: &Tensor) -> DType {
    match (tensor.device(), tensor.dtype()) {
        (Device::Cpu, DType::F16 | DType::BF16) => DType::F32,
        (_, dtype) => dtype,
    }
}

/// The gradient of the hidden states from those of all row tiles. Each of these is freed once it is copied.
fn concat_rows(tiles: Vec<Option<Tensor>>, hidden: &Tensor) -> candle_core::Result<Tensor> {
    let dtype = hidden.dtype();
    if let [Some(only)] = &tiles[..] {
        return only.to_dtype(dtype)?.reshape(hidden.shape());
    }
    let gradient = hidden.zeros_like()?;
    let mut first_row = 0;
    let num_rows: usize = tiles.iter().flatten().map(|tile| tile.dims()[0]).sum();
    let rows = gradient.reshape((num_rows, hidden.dim(D::Minus1)?))?;
    for tile in tiles.into_iter().flatten() {
        rows.slice_set(&tile.to_dtype(dtype)?, 0, first_row)?;
        first_row += tile.dim(0)?;
    }
    Ok(gradient)
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
