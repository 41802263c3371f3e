//! The choice of the backend for some tensors, and the node of candle's autograd graph.
//!
//! Each function here calls the backend that its tensors' storages belong to. The forward kernels run before a node
//! exists. Then [`FinishedLoss::attach_backward`] makes the computed loss a node of the graph. The backward of that
//! node calls the backend again.

#[cfg(not(emulator))]
use crate::cpu as host;
// The emulated GPU computes with tensors in the host's memory.
#[cfg(emulator)]
use crate::gpu as host;

use crate::cpu;
use crate::error::{Error, Result};
use crate::formula::{Divisor, ForwardOut, LossParams, SavedState, SoftmaxState, result_dtype};
#[cfg(any(feature = "cuda", feature = "metal"))]
use crate::gpu;
use crate::layout::{Operand, check_layout, row_shape};
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, DType, Device, InplaceOp1, Layout, MetalStorage, Shape,
    Storage, StorageRef, Tensor,
};
use std::sync::{Mutex, PoisonError};

// ---- Forward

/// The loss, and what backward needs.
pub(crate) struct ForwardResult {
    pub loss: FinishedLoss,
    pub reduction: LossReduction,
    /// The rows' [`SavedState`], if it was asked for.
    pub saved: Option<Tensor>,
}

/// How the losses of the rows became the result.
#[derive(Debug)]
pub(crate) enum LossReduction {
    None,
    DividedBy {
        number: f64,
        row_shape: Vec<usize>,
    },
    /// The sum is a scalar on the device.
    DividedByWeights {
        sum: Tensor,
        row_shape: Vec<usize>,
    },
}

impl LossReduction {
    /// The gradient of each row's loss, from that of the result.
    pub fn backward(&self, grad_output: &Tensor) -> candle_core::Result<Tensor> {
        match self {
            Self::None => Ok(grad_output.clone()),
            Self::DividedBy { number, row_shape } => {
                (grad_output / *number)?.broadcast_as(&row_shape[..])
            }
            Self::DividedByWeights { sum, row_shape } => {
                let quotient = grad_output.to_dtype(sum.dtype())?.div(sum)?;
                quotient.to_dtype(grad_output.dtype())?.broadcast_as(&row_shape[..])
            }
        }
    }
}

impl ForwardResult {
    fn new(
        out: ForwardOut<Storage>,
        row_shape: Vec<usize>,
        divisor: Option<Divisor>,
    ) -> Result<Self> {
        let num_rows: usize = row_shape.iter().product();
        let shape = match divisor {
            None => row_shape.clone().into(),
            Some(_) => ().into(),
        };
        let saved = out.saved.map(|saved| constant(saved, (SavedState::<()>::FIELDS, num_rows)));
        let reduction = match (divisor, out.weight_sum) {
            (_, Some(sum)) => LossReduction::DividedByWeights { sum: constant(sum, ()), row_shape },
            (Some(Divisor::Number(number)), None) => LossReduction::DividedBy { number, row_shape },
            (None, None) => LossReduction::None,
            (Some(Divisor::WeightSum), None) => {
                let message = "a backend has returned no sum of weights".to_string();
                return Err(candle_core::Error::Msg(message).into());
            }
        };
        Ok(Self { loss: FinishedLoss { storage: out.loss, shape }, reduction, saved })
    }
}

/// A tensor outside the graph.
fn constant(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// Runs the forward kernel. `save` says whether backward will need the rows' state.
pub(crate) fn forward(
    params: &LossParams,
    logits: &Tensor,
    targets: &Tensor,
    divisor: Option<Divisor>,
    save: bool,
) -> Result<ForwardResult> {
    let locked = [logits, targets].map(Tensor::storage_and_layout);
    let out = match Operands::new(&locked)? {
        Operands::Cpu([x, t]) => host::forward(params, x, t, divisor, save)?.map(Storage::Cpu),
        #[cfg(feature = "cuda")]
        Operands::Cuda([x, t]) => gpu::forward(params, x, t, divisor, save)?.map(Storage::Cuda),
        #[cfg(feature = "metal")]
        Operands::Metal([x, t]) => gpu::forward(params, x, t, divisor, save)?.map(Storage::Metal),
    };
    ForwardResult::new(out, row_shape(logits.dims(), params.class_dim), divisor)
}

/// The [`SoftmaxState`] of `num_rows` rows, to be written by [`merge_tile`]. On the CPU it is f64 for any logits.
pub(crate) fn new_state(num_rows: usize, logits_dtype: DType, device: &Device) -> Result<Tensor> {
    let dtype = match device.is_cpu() && !cfg!(emulator) {
        true => DType::F64,
        false => result_dtype(logits_dtype),
    };
    Ok(Tensor::zeros((SoftmaxState::<()>::FIELDS, num_rows), dtype, device)?)
}

/// Runs the forward kernel on the logits of a range of the classes, and merges the result into the state of the
/// ranges before it. The range that begins at class 0 overwrites the state.
pub(crate) fn merge_tile(
    params: &LossParams,
    state: &Tensor,
    logits: &Tensor,
    targets: &Tensor,
) -> Result<()> {
    let locked = [logits, targets].map(Tensor::storage_and_layout);
    in_place(state, |state, layout| match (state, Operands::new(&locked)?) {
        (StorageMut::Cpu(state), Operands::Cpu([x, t])) => {
            host::merge_tile(params, (state, layout), x, t)
        }
        #[cfg(feature = "cuda")]
        (StorageMut::Cuda(state), Operands::Cuda([x, t])) => {
            gpu::merge_tile(params, (state, layout), x, t)
        }
        #[cfg(feature = "metal")]
        (StorageMut::Metal(state), Operands::Metal([x, t])) => {
            gpu::merge_tile(params, (state, layout), x, t)
        }
        _ => Err(no_backend()),
    })
}

/// The losses from the state over all classes.
pub(crate) fn finish(
    params: &LossParams,
    logits_dtype: DType,
    state: &Tensor,
    row_shape: Vec<usize>,
    targets: &Tensor,
    divisor: Option<Divisor>,
    save: bool,
) -> Result<ForwardResult> {
    let locked = [state, targets].map(Tensor::storage_and_layout);
    let out = match Operands::new(&locked)? {
        Operands::Cpu([s, t]) => {
            host::finish(params, logits_dtype, s, t, divisor, save)?.map(Storage::Cpu)
        }
        #[cfg(feature = "cuda")]
        Operands::Cuda([s, t]) => {
            gpu::finish(params, logits_dtype, s, t, divisor, save)?.map(Storage::Cuda)
        }
        #[cfg(feature = "metal")]
        Operands::Metal([s, t]) => {
            gpu::finish(params, logits_dtype, s, t, divisor, save)?.map(Storage::Metal)
        }
    };
    ForwardResult::new(out, row_shape, divisor)
}

// ---- Backward

/// Runs the backward kernel: the logits' gradient, from the gradient of each row's loss.
pub(crate) fn backward(
    params: &LossParams,
    logits: &Tensor,
    targets: &Tensor,
    grad_output: &Tensor,
    saved: &Tensor,
) -> Result<Tensor> {
    let locked = [logits, targets, grad_output, saved].map(Tensor::storage_and_layout);
    let gradient = match Operands::new(&locked)? {
        Operands::Cpu([x, t, g, s]) => Storage::Cpu(host::backward(params, x, t, g, s)?),
        #[cfg(feature = "cuda")]
        Operands::Cuda([x, t, g, s]) => Storage::Cuda(gpu::backward(params, x, t, g, s)?),
        #[cfg(feature = "metal")]
        Operands::Metal([x, t, g, s]) => Storage::Metal(gpu::backward(params, x, t, g, s)?),
    };
    Ok(constant(gradient, logits.shape()))
}

/// Overwrites the logits with their gradient. The logits must be contiguous, and no other tensor may share their
/// storage. On the CPU their dtype must be f32 or f64.
pub(crate) fn backward_in_place(
    params: &LossParams,
    logits: &Tensor,
    targets: &Tensor,
    grad_output: &Tensor,
    saved: &Tensor,
) -> Result<()> {
    let locked = [targets, grad_output, saved].map(Tensor::storage_and_layout);
    in_place(logits, |logits, layout| match (logits, Operands::new(&locked)?) {
        (StorageMut::Cpu(x), Operands::Cpu([t, g, s])) => {
            host::backward_in_place(params, (x, layout), t, g, s)
        }
        #[cfg(feature = "cuda")]
        (StorageMut::Cuda(x), Operands::Cuda([t, g, s])) => {
            gpu::backward_in_place(params, (x, layout), t, g, s)
        }
        #[cfg(feature = "metal")]
        (StorageMut::Metal(x), Operands::Metal([t, g, s])) => {
            gpu::backward_in_place(params, (x, layout), t, g, s)
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
    Ok(constant(smoothed, shape))
}

/// Checks class targets on the CPU. On a GPU this would wait for the device.
pub(crate) fn check_class_targets(
    targets: &Tensor,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<()> {
    match &*targets.storage_and_layout().0 {
        Storage::Cpu(storage) => {
            cpu::check_class_targets((storage, targets.layout()), num_classes, ignore_index)
        }
        _ => Ok(()),
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
        let first = locked.first().map(|(storage, _)| &**storage);
        let operands = match first {
            Some(Storage::Cpu(_)) => {
                collect(locked, |s| if let Storage::Cpu(s) = s { Some(s) } else { None })
                    .map(Self::Cpu)
            }
            #[cfg(feature = "cuda")]
            Some(Storage::Cuda(_)) => {
                collect(locked, gpu::GpuStorage::from_storage).map(Self::Cuda)
            }
            #[cfg(feature = "metal")]
            Some(Storage::Metal(_)) => {
                collect(locked, gpu::GpuStorage::from_storage).map(Self::Metal)
            }
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
    let (first, layout) = locked.first()?;
    let mut operands = [(of_backend(first)?, *layout); N];
    for (operand, (storage, layout)) in operands.iter_mut().zip(locked) {
        *operand = (of_backend(storage)?, layout);
    }
    Some(operands)
}

/// The error for tensors that no backend takes together.
fn no_backend() -> Error {
    let message =
        "the tensors are on several devices, or on one that this build has no backend for";
    candle_core::Error::Msg(message.to_string()).into()
}

/// Checks that a floating-point tensor stays inside its storage. candle's own operations rely on it.
pub(crate) fn check_storage(tensor: &Tensor) -> Result<()> {
    let (storage, layout) = tensor.storage_and_layout();
    let len = match &*storage {
        Storage::Cpu(storage) => cpu::float_len(storage),
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => Some(gpu::GpuStorage::len(storage)),
        #[cfg(feature = "metal")]
        Storage::Metal(storage) => Some(gpu::GpuStorage::len(storage)),
        #[cfg(not(all(feature = "cuda", feature = "metal")))]
        _ => None,
    };
    len.map_or(Ok(()), |len| check_layout(layout, len))
}

// ---- candle's ops

/// A storage that a kernel changes.
enum StorageMut<'a> {
    Cpu(&'a mut CpuStorage),
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "no backend takes it"))]
    Cuda(&'a mut CudaStorage),
    #[cfg_attr(not(feature = "metal"), expect(dead_code, reason = "no backend takes it"))]
    Metal(&'a mut MetalStorage),
}

/// Calls `f` with the tensor's storage. candle gives mutable access to a storage only to an in-place op.
fn in_place(tensor: &Tensor, f: impl Fn(StorageMut, &Layout) -> Result<()>) -> Result<()> {
    Ok(tensor.inplace_op1(&InPlace(f))?)
}

struct InPlace<F>(F);

impl<F: Fn(StorageMut, &Layout) -> Result<()>> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "label-smoothing-loss-in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        Ok(self.0(StorageMut::Cpu(storage), layout)?)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        Ok(self.0(StorageMut::Cuda(storage), layout)?)
    }

    fn metal_fwd(&self, storage: &mut MetalStorage, layout: &Layout) -> candle_core::Result<()> {
        Ok(self.0(StorageMut::Metal(storage), layout)?)
    }
}

/// The computed loss, not yet a tensor.
pub(crate) struct FinishedLoss {
    storage: Storage,
    shape: Shape,
}

impl FinishedLoss {
    /// The loss as a tensor outside the graph.
    pub fn detached(self) -> Tensor {
        constant(self.storage, self.shape)
    }

    /// The loss as a node of the graph that depends on three tensors, the most that candle's custom ops take. `backward`
    /// gets these and the loss's gradient, and returns a gradient for each of them that is tracked.
    pub fn attach_backward(
        self,
        [a, b, c]: [&Tensor; 3],
        backward: impl Fn([&Tensor; 3], &Tensor) -> Result<[Option<Tensor>; 3]> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let (loss, shape) = (Mutex::new(Some(self.storage)), self.shape);
        Ok(a.apply_op3(b, c, LossNode { loss, shape, backward })?)
    }
}

/// The node. Its forward moves the computed loss into the graph.
struct LossNode<F> {
    loss: Mutex<Option<Storage>>,
    shape: Shape,
    backward: F,
}

impl<F> LossNode<F> {
    fn take_loss(&self) -> Option<Storage> {
        self.loss.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<F> CustomOp3 for LossNode<F>
where
    F: Fn([&Tensor; 3], &Tensor) -> Result<[Option<Tensor>; 3]>,
{
    fn name(&self) -> &'static str {
        "label-smoothing-loss"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        match self.take_loss() {
            Some(Storage::Cpu(loss)) => Ok((loss, self.shape.clone())),
            _ => Err(no_backend().into()),
        }
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        match self.take_loss() {
            Some(Storage::Cuda(loss)) => Ok((loss, self.shape.clone())),
            _ => Err(no_backend().into()),
        }
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        match self.take_loss() {
            Some(Storage::Metal(loss)) => Ok((loss, self.shape.clone())),
            _ => Err(no_backend().into()),
        }
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        grad_output: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = (self.backward)([a, b, c], grad_output)?;
        Ok((a, b, c))
    }
}
