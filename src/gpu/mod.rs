//! The GPU backends: the operations of the CPU backend as launches of kernels.
//!
//! `kernels.inc` is the source of the kernels. `cuda.cu` and `metal.metal` include it, with the types, the intrinsics and the
//! entry points of their dialect:
//!
//! ```text
//! forward    reads the logits; writes the rows' losses, or their reduction, or the rows' softmax states
//! finish     merges softmax states of each row; writes the same
//! reduce     ends the reduction, on a device where the last block of a launch cannot
//! backward   writes the gradient of the logits
//! smooth     writes smoothed targets
//! ```
//!
//! `forward` and `backward` read logits whose classes are adjacent in memory, in packs of 16 bytes. `forward_strided` and
//! `backward_strided` read any logits, one by one.
//!
//! Every launch is queued. Nothing here waits for the device or reads its memory.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(emulator)]
#[path = "../../tests/emulator/backend.rs"]
pub(crate) mod emulated;
mod kernel;
mod launch;
#[cfg(feature = "metal")]
mod metal;
mod params;

pub(crate) use kernel::GpuStorage;

use crate::error::Result;
use crate::formula::{Divisor, ForwardOut, LossParams};
use crate::layout::{Operand, OperandMut, num_rows};
use candle_core::DType;
use kernel::Buffer;
use launch::{Launch, check_contiguous, internal_error};
use params::{Access, Outputs};

/// The losses of the rows, or their sum divided.
pub(crate) fn forward<S: GpuStorage>(
    params: &LossParams,
    [logits, targets]: [Operand<S>; 2],
) -> Result<ForwardOut<S>> {
    let launch = Launch::over_logits(params, logits, targets)?;
    launch.loss(|launch, outputs| launch.forward_rows(logits.0, outputs))
}

/// Merges the softmax states of the rows over a range of the classes, whose logits are given, into `states`. The first
/// range overwrites `states`.
pub(crate) fn merge_tile<S: GpuStorage>(
    params: &LossParams,
    is_first: bool,
    (states, layout): OperandMut<S>,
    [logits, targets]: [Operand<S>; 2],
) -> Result<()> {
    let mut launch = Launch::over_logits(params, logits, targets)?;
    launch.check_fields("softmax states", (states, layout), params.num_state_fields())?;
    launch.ints.wants_states = 1;
    launch.ints.accumulates = (!is_first).into();
    launch.forward_rows(logits.0, Outputs::new(states))
}

/// The result of [`forward`] from the softmax states of the rows over ranges that make up all classes, (ranges, fields, N).
pub(crate) fn finish<S: GpuStorage>(
    params: &LossParams,
    logits_dtype: DType,
    [states, targets]: [Operand<S>; 2],
) -> Result<ForwardOut<S>> {
    let (num_ranges, num_rows) = match states.1.dims() {
        &[num_ranges, _, num_rows] => (num_ranges, num_rows),
        dims => return Err(internal_error(format!("the softmax states have shape {dims:?}"))),
    };
    let launch = Launch::new(params, states.0.device(), logits_dtype, targets, num_rows)?;
    launch.check_fields("softmax states", states, num_ranges * params.num_state_fields())?;
    launch.loss(|launch, outputs| launch.merge_states(states.0, num_ranges, outputs))
}

/// The gradient of the logits, in their dtype and shape, contiguous.
pub(crate) fn backward<S: GpuStorage>(
    params: &LossParams,
    [logits, targets, grad_output, saved]: [Operand<S>; 4],
    divisor: Option<Divisor<usize>>,
) -> Result<S> {
    let inputs = [targets, grad_output, saved];
    let mut launch = Launch::for_backward(params, logits, inputs, divisor)?;
    let len = logits.1.shape().elem_count();
    let mut grad_logits = S::alloc(&launch.device, len, logits.0.dtype())?;
    launch.write_gradient(Some(logits.0), grad_output.0, saved.0, &mut grad_logits)?;
    Ok(grad_logits)
}

/// Overwrites contiguous logits with their gradient.
pub(crate) fn backward_in_place<S: GpuStorage>(
    params: &LossParams,
    (logits, layout): OperandMut<S>,
    inputs: [Operand<S>; 3],
    divisor: Option<Divisor<usize>>,
) -> Result<()> {
    check_contiguous("logits", (logits, layout))?;
    let mut launch = Launch::for_backward(params, (logits, layout), inputs, divisor)?;
    let [_, grad_output, saved] = inputs;
    launch.write_gradient(None, grad_output.0, saved.0, logits)
}

/// The smoothed targets in f32, contiguous. The classes are their last dimension.
pub(crate) fn smooth_targets<S: GpuStorage>(params: &LossParams, labels: Operand<S>) -> Result<S> {
    // For class indices the class dimension is beyond their rank, so each index is a row.
    let num_rows = num_rows(labels.1.dims(), params.class_dim);
    let mut launch = Launch::new(params, labels.0.device(), DType::F32, labels, num_rows)?;
    let mut smoothed = launch.alloc(num_rows * params.num_classes)?;
    if num_rows == 0 {
        return Ok(smoothed);
    }
    let limits = launch.limits("smooth")?;
    let grid = launch.ints.plan_launch(limits, DType::F32, Access::Classes);
    let [targets, class_params, row_weights] = launch.shared_buffers()?;
    let mut buffers = [targets, class_params, row_weights, Buffer::Output(&mut smoothed)];
    // SAFETY: these are the buffers of `smooth`. The inputs are in bounds as in `forward_rows`. The output has
    // an element for each row and class.
    unsafe { launch.run("smooth", grid, &mut buffers)? };
    Ok(smoothed)
}
