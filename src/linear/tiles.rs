//! The loss of logits that are computed a tile at a time, in forward and, unless they were kept, again in backward.

use super::rows::{ComputedRows, converted, counted_rows, narrow};
use crate::autograd::{self, ComputedLoss, Saved};
use crate::error::Result;
use crate::formula::{LossParams, result_dtype};
use crate::layout::check_memory;
use candle_core::{D, DType, Device, Tensor};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The size of a tile of the logits.
#[derive(Clone, Copy, Debug)]
pub struct TileSize {
    /// Rows of the hidden states, at most.
    pub rows: usize,
    /// Rows of the weight, at most.
    pub classes: usize,
}

/// How the logits are divided.
#[derive(Clone, Copy)]
pub(crate) struct Tiling {
    /// The size of the tiles, or `None` for the default.
    pub tile: Option<TileSize>,
    /// The bytes of logits to keep until backward.
    pub budget: usize,
}

/// The rows of the weight and bias that make a range of the classes, in the dtype of the multiplication.
struct WeightTile {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl WeightTile {
    /// The logits of these hidden states, (rows, classes).
    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        if self.weight.dims()[0] == 0 {
            // Not every device multiplies by an empty matrix.
            return Ok(hidden.narrow(1, 0, 0)?);
        }
        let logits = hidden.matmul(&self.weight.t()?)?;
        match &self.bias {
            None => Ok(logits),
            Some(bias) => autograd::add_bias(logits, bias),
        }
    }
}

/// The dtype of the multiplications. On the CPU candle converts half types at every call, and for bf16 the whole storage.
pub(super) fn matmul_dtype(logits: DType, device: &Device) -> DType {
    match (device, logits) {
        (Device::Cpu, DType::F16 | DType::BF16) => DType::F32,
        (_, dtype) => dtype,
    }
}

/// The loss of logits that are computed in tiles.
pub(crate) struct TiledLoss {
    /// Of all rows.
    params: LossParams,
    pub targets: Tensor,
    rows: ComputedRows,
    matmul_dtype: DType,
    /// The number of classes of the weight, which may be those of a shard.
    num_classes: usize,
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
    pub(super) fn new(
        params: LossParams,
        targets: Tensor,
        rows: ComputedRows,
        matmul_dtype: DType,
        [hidden, weight]: [&Tensor; 2],
        Tiling { tile, budget }: Tiling,
    ) -> Self {
        let (num_classes, hidden_size) = (weight.dims()[0], weight.dims()[1]);
        let row_bytes = num_classes.saturating_mul(matmul_dtype.size_in_bytes());
        let num_kept = match budget.checked_div(row_bytes).unwrap_or(rows.len).min(rows.len) {
            num_rows if num_rows < MIN_LEN.min(rows.len) => 0,
            num_rows => num_rows,
        };
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
            classes: tile.classes.clamp(1, num_classes.max(1)),
        };
        let kept = Mutex::default();
        Self { params, targets, rows, matmul_dtype, num_classes, tile, num_kept, kept }
    }

    /// The loss from the softmax states of all rows over ranges that make up all classes, (ranges, fields, N).
    pub fn finish(&self, states: &Tensor) -> Result<ComputedLoss> {
        let shape = self.rows.shape.clone();
        autograd::finish(&self.params, self.matmul_dtype, states, shape, &self.targets)
    }

    /// The softmax states of all rows over the classes of the weight, (fields, N). Keeps the logits within the budget.
    pub fn forward_states(
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
                params.first_class = self.params.first_class + classes.start;
                autograd::merge_tile(params, classes.start == 0, states, &logits, &targets)?;
                let is_kept = self.params.saves_state && rows.end <= self.num_kept;
                kept.push(is_kept.then_some(logits));
            }
        }
        self.kept = Mutex::new(kept);
        self.rows.expand(states, 1, new_states)
    }

    /// The gradients of the hidden states, the weight and the bias, each if it is tracked, from the gradient of the result.
    pub fn backward(
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
        for (i, classes) in
            self.class_tiles().enumerate().filter(|(_, classes)| !classes.is_empty())
        {
            let weight_tile = self.weight_tile(&weight, bias.as_ref(), &classes)?;
            let (mut grad_weight_tile, mut grad_bias_tile) = (None, None);
            let of_rows = row_tiles.iter_mut().zip(&mut grad_hidden).enumerate();
            for (j, ((rows, params), grad_hidden)) in of_rows {
                let hidden = self.hidden_tile(&readable_hidden, rows)?;
                let grad_logits = match self.take_kept(i * num_row_tiles + j) {
                    Some(logits) => logits,
                    None => weight_tile.logits(&hidden)?,
                };
                params.first_class = self.params.first_class + classes.start;
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
                    add_to(&mut grad_bias_tile, sum_rows(&grad_logits)?)?;
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
        let grad_hidden = wants_hidden.then(|| self.expand_grad_hidden(grad_hidden, &hidden));
        Ok([grad_hidden.transpose()?, grad_weight, grad_bias])
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

    /// The range of each tile of the classes of the weight. Without classes there is one tile, which is empty.
    fn class_tiles(&self) -> impl Iterator<Item = Range<usize>> {
        let empty = (self.num_classes == 0).then_some(0..0);
        ranges(0..self.num_classes, self.tile.classes).chain(empty)
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
        Ok(converted(&tile, self.matmul_dtype)?)
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
        let tile = |t: &Tensor| converted(&narrow(t, classes)?, self.matmul_dtype)?.contiguous();
        Ok(WeightTile { weight: tile(weight)?, bias: bias.map(tile).transpose()? })
    }

    /// Checks the memory for the logits within the budget and for a copy of a tile of the weight. A GPU reports itself that its
    /// memory is too small.
    pub fn check_memory(&self, weight: &Tensor) -> Result<()> {
        if !weight.device().is_cpu() {
            return Ok(());
        }
        if weight.dtype() != self.matmul_dtype || !weight.is_contiguous() {
            let len = self.tile.classes.saturating_mul(weight.dims()[1]);
            check_memory("a tile of the weight", weight.dims(), len)?;
        }
        let kept = [self.num_kept, self.num_classes];
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

/// The sum over rows. candle's sum adds number by number. A multiplication is faster.
fn sum_rows(tensor: &Tensor) -> candle_core::Result<Tensor> {
    let ones = Tensor::ones((1, tensor.dims()[0]), tensor.dtype(), tensor.device())?;
    ones.matmul(tensor)?.squeeze(0)
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
