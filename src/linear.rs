//! The loss straight from the hidden states, for logits too large to hold.
//!
//! The logits are made a tile at a time: some rows of the hidden states by some classes of the weight. Forward
//! keeps of each tile what the kernels say of its range of the classes, and merges that over the ranges. Backward
//! makes each tile again, turns it into its gradient where it is, and multiplies it into the gradients of the
//! hidden states and of the weight.

use crate::backend::{
    Problem, check_memory, check_storage, host, is_of_logits, result_dtype, row_shape,
};
use crate::error::{Error, Result};
use crate::loss::{LabelSmoothingLoss, Logits};
use crate::op::{self, Losses, Parts};
use candle_core::{D, DType, Device, Storage, Tensor};

impl LabelSmoothingLoss {
    /// The loss of `logits = hidden · weightᵀ + bias`, without ever holding all the logits.
    ///
    /// `hidden` has shape (.., H), `weight` (K, H) and `bias` (K), as [`candle_nn::Linear`] keeps them; they have
    /// one dtype, f16, bf16, f32 or f64, and one device. `targets` are those of logits of shape (.., K):
    /// everything else is as in [`forward`](Self::forward), every option included, and so is the result, but for the
    /// rounding of logits to a half type. The class dimension is the last one. Gradients go to those of the three
    /// that have any; none of them may be changed before `backward`, which makes the logits from them again.
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
    /// When the logits are what does not fit: many tokens, and a vocabulary that is large against the hidden size.
    /// Neither the logits nor their gradient nor the copies that candle's autograd makes of it are ever there; what
    /// is there beside the gradients of the three is a tile of the logits, pieces of the weight and of the hidden
    /// states as large, and about a hundred bytes a row. The price is that `backward` makes the logits once more:
    /// a fourth matrix multiplication beside the three of a linear layer.
    ///
    /// [`forward`](Self::forward) is the better choice for logits that fit easily, for few classes, where the hidden
    /// size is so large that the multiplications take nearly all of the time, and where the logits are needed anyway.
    ///
    /// # How it computes
    /// A tile has at most 4096 rows on the CPU and 16384 on a GPU, and so many classes that neither it nor the parts
    /// of the hidden states and of the weight that make it have more than 2²² elements on the CPU and 2²⁸ on a GPU
    /// (at least 64 rows and classes), 16 MB of f32 or 512 MB of bf16. On the CPU f16 and bf16 are computed in f32,
    /// since candle's multiplications there would convert whole tensors at every call; elsewhere a tile has the
    /// dtype that candle's multiplication gives, and its gradient is rounded to it as that of `forward` is. What
    /// several tiles add to a gradient is summed in f32 (f64 for f64) and rounded once, so for a half type there is
    /// an f32 copy of the hidden states' gradient too.
    ///
    /// # Errors
    /// Those of [`forward`](Self::forward); shapes, dtypes or devices of the three that do not fit together; and
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
        forward(self, hidden, weight, bias, targets, None)
    }
}

/// How much of the logits is there at a time.
#[derive(Clone, Copy, Debug)]
pub struct TileSize {
    /// Rows of the hidden states, at most.
    pub rows: usize,
    /// Rows of the weight, at most.
    pub classes: usize,
}

impl TileSize {
    /// For so many rows of hidden states of the size.
    ///
    /// A gradient of the hidden states is summed up over the ranges of classes, and one of the weight over the
    /// slices of rows. Next to the multiplications this takes the less time the larger these are. On the CPU a
    /// tile stays below the 32 MB above which glibc's allocator gives every block back to the system.
    fn new(num_rows: usize, hidden_size: usize, device: &Device) -> Self {
        let (rows, elements): (usize, usize) = match device {
            Device::Cpu => (1 << 12, 1 << 22),
            _ => (1 << 14, 1 << 28),
        };
        let at_most = |len: usize| (elements / len.max(1)).max(64);
        let rows = rows.min(at_most(hidden_size)).min(num_rows).max(1);
        Self { rows, classes: at_most(rows.max(hidden_size)) }
    }
}

/// Numbers that there are for a row, at most: its parts twice, while they are joined; its loss, its weight, and what
/// backward needs of it.
const KEPT: usize = 13;

/// `forward_linear`, with tiles of a size of one's own.
pub(crate) fn forward(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    targets: &Tensor,
    tile: Option<TileSize>,
) -> Result<Tensor> {
    let dims = check(loss, hidden, weight, bias)?;
    let logits = Logits { dims: &dims, dtype: hidden.dtype(), device: hidden.device() };
    let (problem, targets) = loss.problem(&logits, targets)?;
    let reduce = loss.reduce(&dims, problem.class_dim, &targets);
    let rows = row_shape(&dims, problem.class_dim);

    let num_rows: usize = rows.iter().product();
    let hidden_size = weight.dims()[1];
    let tile = tile.unwrap_or_else(|| TileSize::new(num_rows, hidden_size, hidden.device()));
    let classes = tile.classes.max(1);
    check_memory("what is kept of rows", &rows, num_rows.saturating_mul(KEPT))?;
    // A GPU says itself what it has no memory for.
    if hidden.device().is_cpu() {
        let of_rows = num_rows.min(tile.rows.max(1)).saturating_mul(hidden_size);
        check_memory("a tile of the hidden states", hidden.dims(), of_rows)?;
        let of_classes = problem.num_classes.min(classes).saturating_mul(hidden_size);
        check_memory("a tile of the weight", weight.dims(), of_classes)?;
    }
    let slices = Slice::all(&rows, tile.rows);
    let head = Head { problem, targets, slices, classes };
    let [h, w] = [hidden, weight].map(Tensor::detach);
    let b = bias.map(Tensor::detach);
    let parts = head.parts(&h, &w, b.as_ref())?;
    let is_tracked = [Some(hidden), Some(weight), bias].iter().flatten().any(|t| t.track_op());
    let Losses { result, reduced, statistics } =
        parts.finish(&head.problem, rows, &head.targets, reduce, is_tracked)?;
    let Some(statistics) = statistics else {
        return Ok(result);
    };
    let has_bias = bias.is_some();
    // Without a bias, a constant stands in its place.
    let on = [hidden, weight, bias.unwrap_or(&result)];
    op::graft(&result, on, move |[hidden, weight, bias], gradient| {
        let upstream = reduced.upstream(gradient, row_shape(&dims, head.problem.class_dim))?;
        let bias = has_bias.then_some(bias);
        Ok(head.gradients(hidden, weight, bias, &statistics, &upstream)?)
    })
}

/// Checks that the three make logits, and gives their shape.
fn check(
    loss: &LabelSmoothingLoss,
    hidden: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
) -> Result<Vec<usize>> {
    let logits = match (hidden.dims(), weight.dims(), bias.map(Tensor::dims)) {
        ([rows @ .., size], [classes, columns], None) if size == columns => Some((rows, classes)),
        ([rows @ .., size], [classes, columns], Some([len]))
            if size == columns && len == classes =>
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
    let is_one = [Some(weight), bias].iter().flatten().all(|t| dtype(t) == hidden.dtype());
    if !is_one || !is_of_logits(dtype(hidden)) {
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

/// A part of the rows: of each of their dimensions, where it begins and how long it is.
struct Slice(Vec<(usize, usize)>);

impl Slice {
    /// All rows of these dimensions in their order, at most so many at a time.
    fn all(dims: &[usize], most: usize) -> Vec<Self> {
        if dims.contains(&0) {
            return Vec::new();
        }
        // As many of the last dimensions as fit stay whole, the one before is cut, the others go one by one.
        let mut slices = vec![Vec::new()];
        for (dim, &len) in dims.iter().enumerate() {
            let inner = dims[dim + 1..].iter().product::<usize>();
            let step = (most / inner).clamp(1, len);
            let pieces = (0..len).step_by(step).map(|start| (start, step.min(len - start)));
            slices = slices
                .into_iter()
                .flat_map(|slice: Vec<_>| {
                    pieces.clone().map(move |piece| [&slice[..], &[piece]].concat())
                })
                .collect();
        }
        slices.into_iter().map(Self).collect()
    }

    fn of(&self, tensor: &Tensor) -> candle_core::Result<Tensor> {
        let mut part = tensor.clone();
        for (dim, &(start, len)) in self.0.iter().enumerate() {
            part = part.narrow(dim, start, len)?;
        }
        Ok(part)
    }

    fn dims(&self) -> Vec<usize> {
        self.0.iter().map(|(_, len)| *len).collect()
    }

    fn num_rows(&self) -> usize {
        self.dims().iter().product()
    }
}

/// A classifier's last layer, and the loss of its logits.
struct Head {
    problem: Problem,
    targets: Tensor,
    slices: Vec<Slice>,
    /// How many classes are worked on at a time, at most.
    classes: usize,
}

/// The part of the weight that makes a range of the classes.
struct Range {
    problem: Problem,
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Head {
    /// What the forward kernel says of all classes of each row.
    fn parts(&self, hidden: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Parts> {
        self.check_targets()?;
        let (device, dtype) = (hidden.device(), computed_in(hidden));
        let mut all = Vec::with_capacity(self.slices.len());
        for slice in &self.slices {
            let (rows, targets) = (self.rows(hidden, slice)?, slice.of(&self.targets)?);
            let parts = Parts::new(rows.dim(0)?, dtype, device)?;
            for first in self.firsts() {
                let range = self.range(weight, bias, first)?;
                let logits = range.logits(&rows, slice)?;
                parts.add_range(&range.problem, &logits, &targets)?;
            }
            all.push(parts);
        }
        Parts::join(&all, dtype, device)
    }

    /// The gradients of those of the three that are tracked. `upstream` is that of each row's loss.
    fn gradients(
        &self,
        hidden: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        statistics: &Tensor,
        upstream: &Tensor,
    ) -> Result<[Option<Tensor>; 3]> {
        self.check_targets()?;
        let wanted = |tensor: &Tensor| tensor.track_op();
        let (wants_hidden, wants_weight) = (wanted(hidden), wanted(weight));
        let wants_bias = bias.is_some_and(wanted);
        let [hidden, weight] = [hidden, weight].map(Tensor::detach);
        let bias = bias.map(Tensor::detach);

        let mut first_row = 0;
        let mut slices = Vec::with_capacity(self.slices.len());
        for slice in &self.slices {
            let statistics = statistics.narrow(1, first_row, slice.num_rows())?.contiguous()?;
            slices.push((slice, statistics, slice.of(&self.targets)?, slice.of(upstream)?));
            first_row += slice.num_rows();
        }

        let mut of_hidden: Vec<_> = self.slices.iter().map(|_| Sum::default()).collect();
        let of_weight = wants_weight.then(|| weight.zeros_like()).transpose()?;
        let of_bias = bias.as_ref().filter(|_| wants_bias).map(Tensor::zeros_like).transpose()?;
        for first in self.firsts() {
            let range = self.range(&weight, bias.as_ref(), first)?;
            let (mut of_range, mut of_biases) = (Sum::default(), Sum::default());
            for ((slice, statistics, targets, upstream), of_rows) in
                slices.iter().zip(&mut of_hidden)
            {
                let rows = self.rows(&hidden, slice)?;
                let tile = range.logits(&rows, slice)?;
                op::replace_by_gradient(&range.problem, statistics, &tile, targets, upstream)?;
                let tile = tile.reshape((rows.dim(0)?, ()))?;
                if wants_hidden {
                    of_rows.add(tile.matmul(&range.weight)?)?;
                }
                if wants_weight {
                    of_range.add(tile.t()?.matmul(&rows)?)?;
                }
                if wants_bias {
                    // A multiplication: candle's own sum over rows goes number by number.
                    let ones = Tensor::ones((1, rows.dim(0)?), tile.dtype(), tile.device())?;
                    of_biases.add(ones.matmul(&tile)?)?;
                }
            }
            for (gradient, sum) in [(&of_weight, of_range), (&of_bias, of_biases)] {
                if let (Some(gradient), Some(sum)) = (gradient, sum.0) {
                    let dims = [&[range.len()?], &gradient.dims()[1..]].concat();
                    gradient.slice_set(
                        &sum.to_dtype(gradient.dtype())?.reshape(dims)?,
                        0,
                        first,
                    )?;
                }
            }
        }
        let of_rows = of_hidden.into_iter().filter_map(|sum| sum.0).collect();
        let of_hidden = wants_hidden.then(|| joined(of_rows, &hidden)).transpose()?;
        Ok([of_hidden, of_weight, of_bias])
    }

    /// Finds a class target that is out of range, on the CPU. The kernels check again what they are given, but
    /// count its rows from the first of the slice. The targets may have changed before `backward`.
    fn check_targets(&self) -> Result<()> {
        let Problem { num_classes, ignore_index, .. } = self.problem;
        let (storage, layout) = self.targets.storage_and_layout();
        match &*storage {
            Storage::Cpu(targets) if self.targets.dtype().is_int() => {
                host::check_labels((targets, layout), num_classes, ignore_index)
            }
            _ => Ok(()),
        }
    }

    /// The first classes of the ranges.
    fn firsts(&self) -> impl Iterator<Item = usize> {
        (0..self.problem.num_classes).step_by(self.classes)
    }

    /// The classes from this one on.
    fn range(&self, weight: &Tensor, bias: Option<&Tensor>, first: usize) -> Result<Range> {
        let len = self.classes.min(self.problem.num_classes - first);
        let dtype = computed_in(weight);
        let part = |t: &Tensor| t.narrow(0, first, len)?.to_dtype(dtype)?.contiguous();
        Ok(Range {
            problem: Problem { first_class: first, ..self.problem.clone() },
            weight: part(weight)?,
            bias: bias.map(part).transpose()?,
        })
    }

    /// The hidden states of a slice, (rows, H).
    fn rows(&self, hidden: &Tensor, slice: &Slice) -> Result<Tensor> {
        let rows = slice.of(hidden)?.to_dtype(computed_in(hidden))?;
        Ok(rows.reshape((slice.num_rows(), rows.dim(D::Minus1)?))?.contiguous()?)
    }
}

impl Range {
    fn len(&self) -> Result<usize> {
        Ok(self.weight.dim(0)?)
    }

    /// The logits of some rows, in the shape of their slice.
    fn logits(&self, rows: &Tensor, slice: &Slice) -> Result<Tensor> {
        let mut logits = rows.matmul(&self.weight.t()?)?;
        if let Some(bias) = &self.bias {
            logits = logits.broadcast_add(bias)?;
        }
        let mut dims = slice.dims();
        dims.push(self.len()?);
        Ok(logits.reshape(dims)?)
    }
}

/// The dtype of the multiplications. The CPU's convert half types at every call, bf16 with all of its storage.
fn computed_in(tensor: &Tensor) -> DType {
    match (tensor.device(), tensor.dtype()) {
        (Device::Cpu, DType::F16 | DType::BF16) => DType::F32,
        (_, dtype) => dtype,
    }
}

/// The gradient of the hidden states from those of all slices, each of which is gone once it is in.
fn joined(slices: Vec<Tensor>, hidden: &Tensor) -> candle_core::Result<Tensor> {
    let dtype = hidden.dtype();
    let slices = match <[Tensor; 1]>::try_from(slices) {
        Ok([whole]) => return whole.to_dtype(dtype)?.reshape(hidden.shape()),
        Err(slices) => slices,
    };
    let gradient = hidden.zeros_like()?;
    let rows = match gradient.elem_count() {
        // As many as there are cannot be inferred.
        0 => return Ok(gradient),
        _ => gradient.reshape(((), gradient.dim(D::Minus1)?))?,
    };
    let mut first = 0;
    for slice in slices {
        rows.slice_set(&slice.to_dtype(dtype)?, 0, first)?;
        first += slice.dim(0)?;
    }
    Ok(gradient)
}

/// A sum of tensors.
#[derive(Default)]
struct Sum(Option<Tensor>);

impl Sum {
    fn add(&mut self, term: Tensor) -> Result<()> {
        self.0 = Some(match self.0.take() {
            None => term,
            Some(sum) => {
                let dtype = result_dtype(term.dtype());
                (sum.to_dtype(dtype)? + term.to_dtype(dtype)?)?
            }
        });
        Ok(())
    }
}
