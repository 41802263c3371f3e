//! The choice of the backend for some tensors, and the node of candle's autograd graph.
//!
//! Each function here calls the backend that its tensors' storages belong to. The forward kernels run before a node
//! exists. Then [`ComputedLoss::attach_backward`] makes the computed loss a node of the graph. The backward of that
//! node calls the backend again.

mod ops;

#[cfg(not(emulator))]
use crate::cpu as host;
// The emulated GPU computes with tensors in the host's memory.
#[cfg(emulator)]
use crate::gpu as host;

use crate::cpu;
use crate::error::{Error, Result};
use crate::formula::{
    Divisor, ForwardOut, LossParams, METRIC_FIELDS, RowMetrics, SavedIn, result_dtype,
};
#[cfg(any(feature = "cuda", feature = "metal"))]
use crate::gpu;
use crate::layout::{Operand, check_layout, check_size, row_shape};
use crate::metrics::Metrics;
#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(feature = "metal")]
use candle_core::MetalStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Layout, Shape, Storage, StorageRef, Tensor};
use ops::{AnyOperandMut, LossNode, in_place, no_backend};
use std::ops::Range;

// ---- Forward

/// Runs the forward kernel.
pub(crate) fn forward(
    params: &LossParams,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<ComputedLoss> {
    let locked = [logits, targets].map(Tensor::storage_and_layout);
    let out = match Operands::new(&locked)? {
        Operands::Cpu(tensors) => host::forward(params, tensors)?.map(Storage::Cpu),
        #[cfg(feature = "cuda")]
        Operands::Cuda(tensors) => gpu::forward(params, tensors)?.map(Storage::Cuda),
        #[cfg(feature = "metal")]
        Operands::Metal(tensors) => gpu::forward(params, tensors)?.map(Storage::Metal),
    };
    Ok(ComputedLoss::new(params, out, row_shape(logits.dims(), params.class_dim)))
}

/// The states of `num_rows` rows, to be written by [`merge_tile`].
pub(crate) fn new_states(
    params: &LossParams,
    num_rows: usize,
    logits_dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    let dtype = state_dtype(logits_dtype, device);
    Ok(Tensor::zeros((params.num_state_fields(), num_rows), dtype, device)?)
}

/// The dtype of the rows' states: on the CPU f64 for any logits.
pub(crate) fn state_dtype(logits: DType, device: &Device) -> DType {
    match runs_on_cpu(device) {
        true => DType::F64,
        false => result_dtype(logits),
    }
}

/// Runs the forward kernel on the logits of a range of the classes, and merges the result into the states of the
/// ranges before it. The first range overwrites the states.
pub(crate) fn merge_tile(
    params: &LossParams,
    is_first: bool,
    states: &Tensor,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<()> {
    // candle's in-place ops refuse a tensor without elements.
    if states.elem_count() == 0 {
        return Ok(());
    }
    let locked = [logits, targets].map(Tensor::storage_and_layout);
    in_place(states, |states| match (states, Operands::new(&locked)?) {
        (AnyOperandMut::Cpu(states), Operands::Cpu(t)) => {
            host::merge_tile(params, is_first, states, t)
        }
        #[cfg(feature = "cuda")]
        (AnyOperandMut::Cuda(states), Operands::Cuda(t)) => {
            gpu::merge_tile(params, is_first, states, t)
        }
        #[cfg(feature = "metal")]
        (AnyOperandMut::Metal(states), Operands::Metal(t)) => {
            gpu::merge_tile(params, is_first, states, t)
        }
        _ => Err(no_backend()),
    })
}

/// The losses from the states of ranges that make up all classes, (ranges, fields, N), contiguous from the start of the storage on.
pub(crate) fn finish(
    params: &LossParams,
    logits_dtype: DType,
    states: &Tensor,
    row_shape: Vec<usize>,
    targets: &Tensor,
) -> Result<ComputedLoss> {
    let locked = [states, targets].map(Tensor::storage_and_layout);
    let out = match Operands::new(&locked)? {
        Operands::Cpu(tensors) => host::finish(params, logits_dtype, tensors)?.map(Storage::Cpu),
        #[cfg(feature = "cuda")]
        Operands::Cuda(tensors) => gpu::finish(params, logits_dtype, tensors)?.map(Storage::Cuda),
        #[cfg(feature = "metal")]
        Operands::Metal(tensors) => gpu::finish(params, logits_dtype, tensors)?.map(Storage::Metal),
    };
    Ok(ComputedLoss::new(params, out, row_shape))
}

/// The computed loss, not yet a tensor, and what backward needs.
pub(crate) struct ComputedLoss {
    loss: Storage,
    is_reduced: bool,
    row_shape: Vec<usize>,
    saved: Option<SavedIn<Tensor>>,
    metrics: Option<RowMetrics<Tensor>>,
}

/// What backward needs of forward, for all rows or some of them.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    /// A tensor whose storage holds the rows' [`SavedState`](crate::formula::SavedState).
    tensor: Tensor,
    /// Where they are, ([`num_saved_fields`](LossParams::num_saved_fields), rows).
    layout: Layout,
    /// What the sum of the losses was divided by: a number, or the index of an element of the storage.
    divisor: Option<Divisor<usize>>,
}

impl Saved {
    fn new(saved: &SavedIn<Tensor>, loss: &Tensor) -> Self {
        Self {
            tensor: saved.storage.as_ref().unwrap_or(loss).clone(),
            layout: saved.layout.clone(),
            divisor: saved.divisor,
        }
    }

    fn lock(&self) -> Locked<'_> {
        (self.tensor.storage_and_layout().0, &self.layout)
    }

    /// What was saved of `len` rows.
    pub fn rows(&self, first_row: usize, len: usize) -> Result<Self> {
        Ok(Self { layout: self.layout.narrow(1, first_row, len)?, ..self.clone() })
    }

    /// What was saved of the rows with these indices, on the CPU. There the saved state is a contiguous tensor of its own, and
    /// the divisor is a number.
    pub fn select(&self, rows: &Tensor) -> Result<Self> {
        let tensor = self.tensor.index_select(rows, 1)?;
        Ok(Self { layout: tensor.layout().clone(), tensor, divisor: self.divisor })
    }
}

impl ComputedLoss {
    fn new(params: &LossParams, out: ForwardOut<Storage>, row_shape: Vec<usize>) -> Self {
        let saved = out.saved.map(|saved| {
            let shape = saved.layout.shape().clone();
            saved.map(|storage| untracked(storage, shape))
        });
        let num_rows: usize = row_shape.iter().product();
        let metrics = out.metrics.map(|metrics| RowMetrics {
            values: untracked(metrics.values, (METRIC_FIELDS, num_rows)),
            predictions: untracked(metrics.predictions, row_shape.as_slice()),
        });
        Self { loss: out.loss, is_reduced: params.divisor.is_some(), row_shape, saved, metrics }
    }

    /// The metrics of the rows, if they were asked for.
    pub fn metrics(&self) -> Result<Option<Metrics>> {
        let metrics = self.metrics.as_ref();
        metrics.map(|metrics| Metrics::new(metrics, &self.row_shape)).transpose()
    }

    fn shape(&self) -> Shape {
        match self.is_reduced {
            true => ().into(),
            false => self.row_shape.as_slice().into(),
        }
    }

    /// The loss as a tensor outside the graph, and what backward needs if it was saved.
    pub fn detached(self) -> (Tensor, Option<Saved>) {
        let shape = self.shape();
        let loss = untracked(self.loss, shape);
        let saved = self.saved.map(|saved| Saved::new(&saved, &loss));
        (loss, saved)
    }

    /// The loss as a node of the graph that depends on three tensors, the most that candle's custom ops take; or outside
    /// the graph, if no state was saved. `backward` gets these tensors, the gradient of the result and what was saved. It returns a
    /// gradient for each of the tensors that is tracked.
    pub fn attach_backward(
        self,
        [a, b, c]: [&Tensor; 3],
        backward: impl Fn([&Tensor; 3], &Tensor, &Saved) -> Result<[Option<Tensor>; 3]>
        + Send
        + Sync
        + 'static,
    ) -> Result<Tensor> {
        let shape = self.shape();
        let Self { loss, saved: Some(saved), .. } = self else {
            return Ok(self.detached().0);
        };
        let backward = move |inputs: [&Tensor; 3], result: &Tensor, grad_result: &Tensor| {
            backward(inputs, grad_result, &Saved::new(&saved, result))
        };
        Ok(a.apply_op3(b, c, LossNode::new(loss, shape, backward))?)
    }
}

/// A tensor outside the graph.
fn untracked(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

// ---- Backward

/// Runs the backward kernel: the logits' gradient. `grad_output` is the gradient of the result, for each row.
pub(crate) fn backward(
    params: &LossParams,
    logits: &Tensor,
    targets: &Tensor,
    grad_output: &Tensor,
    saved: &Saved,
) -> Result<Tensor> {
    let [logits_lock, targets, grad_output] =
        [logits, targets, grad_output].map(Tensor::storage_and_layout);
    let locked = [logits_lock, targets, grad_output, saved.lock()];
    let gradient = match Operands::new(&locked)? {
        Operands::Cpu(t) => Storage::Cpu(host::backward(params, t, saved.divisor)?),
        #[cfg(feature = "cuda")]
        Operands::Cuda(t) => Storage::Cuda(gpu::backward(params, t, saved.divisor)?),
        #[cfg(feature = "metal")]
        Operands::Metal(t) => Storage::Metal(gpu::backward(params, t, saved.divisor)?),
    };
    Ok(untracked(gradient, logits.shape()))
}

/// Replaces the logits by their gradient. The logits must be contiguous, and no other tensor may share their storage.
pub(crate) fn backward_in_place(
    params: &LossParams,
    logits: &Tensor,
    targets: &Tensor,
    grad_output: &Tensor,
    saved: &Saved,
) -> Result<()> {
    let [targets, grad_output] = [targets, grad_output].map(Tensor::storage_and_layout);
    let (locked, divisor) = ([targets, grad_output, saved.lock()], saved.divisor);
    in_place(logits, |logits| match (logits, Operands::new(&locked)?) {
        (AnyOperandMut::Cpu(logits), Operands::Cpu(t)) => {
            host::backward_in_place(params, logits, t, divisor)
        }
        #[cfg(feature = "cuda")]
        (AnyOperandMut::Cuda(logits), Operands::Cuda(t)) => {
            gpu::backward_in_place(params, logits, t, divisor)
        }
        #[cfg(feature = "metal")]
        (AnyOperandMut::Metal(logits), Operands::Metal(t)) => {
            gpu::backward_in_place(params, logits, t, divisor)
        }
        _ => Err(no_backend()),
    })
}

// ---- Targets

/// Runs the kernel of [`smooth_targets`](crate::smooth_targets). The result is f32, of the shape given.
pub(crate) fn smooth_targets(
    params: &LossParams,
    labels: &Tensor,
    shape: Vec<usize>,
) -> Result<Tensor> {
    let locked = [labels.storage_and_layout()];
    let smoothed = match Operands::new(&locked)? {
        Operands::Cpu([labels]) => Storage::Cpu(host::smooth_targets(params, labels)?),
        #[cfg(feature = "cuda")]
        Operands::Cuda([labels]) => Storage::Cuda(gpu::smooth_targets(params, labels)?),
        #[cfg(feature = "metal")]
        Operands::Metal([labels]) => Storage::Metal(gpu::smooth_targets(params, labels)?),
    };
    Ok(untracked(smoothed, shape))
}

/// Class targets in the host's memory. On a GPU this waits for the device.
fn labels_on_host(targets: &Tensor) -> Result<Tensor> {
    if !targets.dtype().is_int() {
        return Err(Error::TargetsDType {
            dtype: targets.dtype(),
            expected: "an integer dtype: class indices",
        });
    }
    check_size("targets", targets.dims())?;
    Ok(targets.to_device(&Device::Cpu)?)
}

/// Checks class targets. On a GPU this waits for the device.
pub(crate) fn check_class_targets(
    targets: &Tensor,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<()> {
    let targets = labels_on_host(targets)?;
    match &*targets.storage_and_layout().0 {
        Storage::Cpu(storage) => {
            cpu::check_labels((storage, targets.layout()), num_classes, ignore_index)
        }
        _ => Err(no_backend()),
    }
}

/// Class targets of any integer dtype, in row-major order. On a GPU this waits for the device.
pub(crate) fn label_values(targets: &Tensor) -> Result<Vec<i64>> {
    let targets = labels_on_host(targets)?;
    match &*targets.storage_and_layout().0 {
        Storage::Cpu(storage) => cpu::label_values((storage, targets.layout())),
        _ => Err(no_backend()),
    }
}

/// The indices of the rows that count, or `None` if all count. Checks the row weights and the class targets of these rows. The
/// tensors are on the CPU, and the logits would have `dtype`.
pub(crate) fn counted_rows(
    params: &LossParams,
    dtype: DType,
    targets: &Tensor,
) -> Result<Option<Vec<i64>>> {
    match &*targets.storage_and_layout().0 {
        Storage::Cpu(storage) => {
            cpu::counted_rows(params, result_dtype(dtype), (storage, targets.layout()))
        }
        _ => Err(no_backend()),
    }
}

/// Whether the CPU kernels run on tensors of this device.
pub(crate) fn runs_on_cpu(device: &Device) -> bool {
    device.is_cpu() && !cfg!(emulator)
}

/// Zeros that will be written as a whole. Linux is asked for huge pages under them.
pub(crate) fn zeros_like(tensor: &Tensor) -> Result<Tensor> {
    let zeros = tensor.zeros_like()?;
    // candle's in-place ops refuse a tensor without elements.
    if zeros.device().is_cpu() && zeros.elem_count() > 0 {
        in_place(&zeros, |zeros| {
            if let AnyOperandMut::Cpu((storage, _)) = zeros {
                cpu::advise_huge_pages(storage);
            }
            Ok(())
        })?;
    }
    Ok(zeros)
}

/// Adds a bias of each class to logits (rows, classes). On the CPU this is done in place, so no other tensor may share their storage.
pub(crate) fn add_bias(logits: Tensor, bias: &Tensor) -> Result<Tensor> {
    if !logits.device().is_cpu() {
        return Ok(logits.broadcast_add(bias)?);
    }
    let (locked, layout) = bias.storage_and_layout();
    in_place(&logits, |logits| match (logits, &*locked) {
        (AnyOperandMut::Cpu(logits), Storage::Cpu(bias)) => cpu::add_bias(logits, (bias, layout)),
        _ => Err(no_backend()),
    })?;
    Ok(logits)
}

/// Copies some rows and columns of a tensor (.., columns) on the CPU: (rows, columns), in a dtype of the arithmetic. The rows are those
/// with these indices, or a range.
pub(crate) fn gather(
    tensor: &Tensor,
    indices: Option<&[i64]>,
    rows: &Range<usize>,
    columns: &Range<usize>,
    dtype: DType,
) -> Result<Tensor> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => {
            let gathered = cpu::gather((storage, layout), indices, rows, columns, dtype)?;
            Ok(untracked(Storage::Cpu(gathered), (rows.len(), columns.len())))
        }
        _ => Err(no_backend()),
    }
}

// ---- Storages

/// Tensors of one backend.
enum Operands<'a, const N: usize> {
    Cpu([Operand<'a, CpuStorage>; N]),
    #[cfg(feature = "cuda")]
    Cuda([Operand<'a, CudaStorage>; N]),
    #[cfg(feature = "metal")]
    Metal([Operand<'a, MetalStorage>; N]),
}

/// A tensor locked for reading.
type Locked<'a> = (StorageRef<'a>, &'a Layout);

impl<'a, const N: usize> Operands<'a, N> {
    fn new(locked: &'a [Locked<'a>; N]) -> Result<Self> {
        let operands = match &*locked[0].0 {
            Storage::Cpu(_) => {
                collect(locked, |s| if let Storage::Cpu(s) = s { Some(s) } else { None })
                    .map(Self::Cpu)
            }
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => collect(locked, gpu::GpuStorage::from_storage).map(Self::Cuda),
            #[cfg(feature = "metal")]
            Storage::Metal(_) => collect(locked, gpu::GpuStorage::from_storage).map(Self::Metal),
            #[cfg(not(all(feature = "cuda", feature = "metal")))]
            _ => None,
        };
        operands.ok_or_else(no_backend)
    }
}

/// The storages of one backend, or `None` if one is of another.
fn collect<'a, S, const N: usize>(
    locked: &'a [Locked<'a>; N],
    of_backend: impl Fn(&'a Storage) -> Option<&'a S>,
) -> Option<[Operand<'a, S>; N]> {
    let (first, layout) = &locked[0];
    let mut operands = [(of_backend(first)?, *layout); N];
    for (operand, (storage, layout)) in operands.iter_mut().zip(locked) {
        *operand = (of_backend(storage)?, layout);
    }
    Some(operands)
}

/// Checks that a floating-point tensor stays inside its storage. candle's own operations rely on it.
pub(crate) fn check_storage(tensor: &Tensor) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    let len = match &*storage {
        Storage::Cpu(storage) => cpu::readable_len(storage),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => Some(gpu::GpuStorage::len(storage)),
        #[cfg(feature = "metal")]
        Storage::Metal(storage) => Some(gpu::GpuStorage::len(storage)),
        #[cfg(not(all(feature = "cuda", feature = "metal")))]
        _ => None,
    };
    len.map_or(Ok(()), |len| check_layout(layout, len))
}
