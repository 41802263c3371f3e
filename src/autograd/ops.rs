//! The ops that candle calls: one that changes a tensor in place, and the node of the graph.

use crate::error::{Error, Result};
use crate::layout::OperandMut;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp3, InplaceOp1, Layout, MetalStorage, Shape, Storage, Tensor,
};
use std::sync::{Mutex, PoisonError};

/// A tensor that a kernel changes, of any backend.
pub(super) enum AnyOperandMut<'a> {
    Cpu(OperandMut<'a, CpuStorage>),
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "no backend takes it"))]
    Cuda(OperandMut<'a, CudaStorage>),
    #[cfg_attr(not(feature = "metal"), expect(dead_code, reason = "no backend takes it"))]
    Metal(OperandMut<'a, MetalStorage>),
}

/// Calls `f` with the tensor's storage. candle gives mutable access to a storage only to an in-place op.
pub(super) fn in_place(tensor: &Tensor, f: impl Fn(AnyOperandMut) -> Result<()>) -> Result<()> {
    Ok(tensor.inplace_op1(&InPlace(f))?)
}

struct InPlace<F>(F);

impl<F: Fn(AnyOperandMut) -> Result<()>> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "label-smoothing-loss-in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        Ok(self.0(AnyOperandMut::Cpu((storage, layout)))?)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> candle_core::Result<()> {
        Ok(self.0(AnyOperandMut::Cuda((storage, layout)))?)
    }

    fn metal_fwd(&self, storage: &mut MetalStorage, layout: &Layout) -> candle_core::Result<()> {
        Ok(self.0(AnyOperandMut::Metal((storage, layout)))?)
    }
}

/// The node. Its forward moves the computed loss into the graph.
pub(super) struct LossNode<F> {
    loss: Mutex<Option<Storage>>,
    shape: Shape,
    backward: F,
}

impl<F> LossNode<F> {
    pub fn new(loss: Storage, shape: Shape, backward: F) -> Self {
        Self { loss: Mutex::new(Some(loss)), shape, backward }
    }

    fn take_loss(&self) -> Option<Storage> {
        self.loss.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl<F> CustomOp3 for LossNode<F>
where
    F: Fn([&Tensor; 3], &Tensor, &Tensor) -> Result<[Option<Tensor>; 3]>,
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
        result: &Tensor,
        grad_result: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [a, b, c] = (self.backward)([a, b, c], result, grad_result)?;
        Ok((a, b, c))
    }
}

/// The error for tensors that no backend takes together.
pub(super) fn no_backend() -> Error {
    let message =
        "the tensors are on several devices, or on one that this build has no backend for";
    candle_core::Error::Msg(message.to_string()).into()
}
