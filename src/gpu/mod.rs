//! The GPU backends: the operations of the CPU backend as launches of kernels.
//!
//! CUDA (`label_smoothing.cu`) and Metal (`label_smoothing.metal`) have the same kernels:
//!
//! ```text
//! forward    reads the logits; writes each row's loss, or the softmax state of each split of a row
//! finish     merges the softmax states of each row; writes its loss, or the merged state
//! reduce     sums the rows' losses and divides the sum
//! backward   writes the gradient of the logits
//! smooth     writes smoothed targets
//! ```
//!
//! Every launch is queued. Nothing here waits for the device or reads its memory.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(emulator)]
#[path = "../../tests/emulator/backend.rs"]
mod emulated;
mod kernel;
#[cfg(feature = "metal")]
mod metal;
mod params;

pub(crate) use kernel::GpuStorage;

use crate::error::{Error, Result};
use crate::formula::{
    CLASS_FIELDS, ClassParams, ClassTable, Divisor, ForwardOut, LossParams, SAVED_FIELDS,
    STATE_FIELDS, result_dtype,
};
use crate::layout::{self, Operand, OperandMut, inner_size, num_rows};
use candle_core::{DType, StorageRef, WithDType};
use kernel::{Buffer, Grid, KernelKey, KernelVariant};
use params::{IntParams, KernelParams, Outputs, ReduceParams, RowStrides};

/// The numbers of blocks that keep a large GPU busy. `forward` aims at fewer, because a second kernel must merge the splits
/// of a row.
const MIN_BLOCKS_FORWARD: usize = 512;
const MIN_BLOCKS_BACKWARD: usize = 2048;
/// The number of rows that a block of `reduce` sums, unless that takes too many blocks.
const REDUCE_ROWS_PER_BLOCK: usize = 4096;

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
    (states, layout): OperandMut<S>,
    [logits, targets]: [Operand<S>; 2],
) -> Result<()> {
    let mut launch = Launch::over_logits(params, logits, targets)?;
    launch.check_fields("softmax states", (states, layout), STATE_FIELDS)?;
    launch.ints.accumulates = (params.first_class > 0).into();
    launch.forward_rows(logits.0, Outputs::States(states))
}

/// The result of [`forward`] from the softmax states of the rows over all classes.
pub(crate) fn finish<S: GpuStorage>(
    params: &LossParams,
    logits_dtype: DType,
    [states, targets]: [Operand<S>; 2],
) -> Result<ForwardOut<S>> {
    let num_rows = states.1.shape().elem_count() / STATE_FIELDS;
    let launch = Launch::new(params, states.0.device(), logits_dtype, targets, num_rows)?;
    launch.check_fields("softmax states", states, STATE_FIELDS)?;
    launch.loss(|launch, outputs| launch.merge_states(states.0, 1, outputs))
}

/// The gradient of the logits, in their dtype and shape, contiguous.
pub(crate) fn backward<S: GpuStorage>(params: &LossParams, tensors: [Operand<S>; 4]) -> Result<S> {
    let [logits, targets, grad_output, saved] = tensors;
    let mut launch = Launch::for_backward(params, logits, [targets, grad_output, saved])?;
    let len = logits.1.shape().elem_count();
    let mut grad_logits = S::alloc(&launch.device, len, logits.0.dtype())?;
    launch.write_gradient(Some(logits.0), grad_output.0, saved.0, &mut grad_logits)?;
    Ok(grad_logits)
}

/// Overwrites contiguous logits with their gradient.
pub(crate) fn backward_in_place<S: GpuStorage>(
    params: &LossParams,
    (logits, layout): OperandMut<S>,
    tensors: [Operand<S>; 3],
) -> Result<()> {
    check_contiguous("logits", (logits, layout))?;
    let mut launch = Launch::for_backward(params, (logits, layout), tensors)?;
    let [_, grad_output, saved] = tensors;
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
    let grid = launch.plan("smooth", false, MIN_BLOCKS_BACKWARD)?;
    let [targets, class_params] = launch.shared_buffers()?;
    let mut buffers = [targets, class_params, Buffer::Output(&mut smoothed)];
    // SAFETY: these are the buffers of `smooth`. The inputs are in bounds as in `launch_forward`. The output has
    // an element for each row and class.
    unsafe { launch.run("smooth", grid, &mut buffers)? };
    Ok(smoothed)
}

/// The inputs and parameters that the kernels of one operation share.
struct Launch<'a, S: GpuStorage> {
    params: &'a LossParams,
    device: S::Device,
    variant: KernelVariant,
    targets: &'a S,
    /// The class params, if they differ between classes.
    class_params: Option<StorageRef<'a>>,
    ints: IntParams,
}

impl<'a, S: GpuStorage> Launch<'a, S> {
    fn new(
        params: &'a LossParams,
        device: &S::Device,
        logits_dtype: DType,
        targets: Operand<'a, S>,
        num_rows: usize,
    ) -> Result<Self> {
        let targets_dtype = targets.0.dtype();
        let targets_class_dim = (!targets_dtype.is_int()).then_some(params.class_dim);
        let target_rows = match targets_class_dim {
            None => targets.1.shape().elem_count(),
            Some(class_dim) => layout::num_rows(targets.1.dims(), class_dim),
        };
        check_num_rows("targets", target_rows, num_rows)?;
        let ints = IntParams {
            targets: RowStrides::new(targets, targets_class_dim)?,
            num_rows: num_rows as u64,
            num_classes: params.num_classes as u64,
            first_class: params.first_class as u64,
            tile_classes: params.num_classes as u64,
            inner_size: 1,
            has_ignore_index: params.ignore_index.is_some().into(),
            ignore_index: params.ignore_index.unwrap_or(0),
            ..IntParams::default()
        };
        let class_params = match &params.class_table {
            ClassTable::Uniform(_) => None,
            ClassTable::PerClass(tensor) => Some(tensor.storage_and_layout().0),
        };
        let per_class = class_params.is_some();
        Ok(Self {
            params,
            device: device.clone(),
            variant: KernelVariant { logits: logits_dtype, targets: targets_dtype, per_class },
            targets: targets.0,
            class_params,
            ints,
        })
    }

    fn over_logits(
        params: &'a LossParams,
        logits: Operand<S>,
        targets: Operand<'a, S>,
    ) -> Result<Self> {
        let dims = logits.1.dims();
        let num_rows = num_rows(dims, params.class_dim);
        let mut launch = Self::new(params, logits.0.device(), logits.0.dtype(), targets, num_rows)?;
        launch.ints.logits = RowStrides::new(logits, Some(params.class_dim))?;
        launch.ints.tile_classes = dims.get(params.class_dim).map_or(0, |&len| len as u64);
        Ok(launch)
    }

    fn for_backward(
        params: &'a LossParams,
        logits: Operand<S>,
        [targets, grad_output, saved]: [Operand<'a, S>; 3],
    ) -> Result<Self> {
        let mut launch = Self::over_logits(params, logits, targets)?;
        check_num_rows("output gradients", grad_output.1.shape().elem_count(), launch.num_rows())?;
        // A broadcast gradient has one element for all rows.
        launch.check_numbers("output gradients", grad_output.0, launch.num_rows().min(1))?;
        launch.ints.grad_output = RowStrides::new(grad_output, None)?;
        launch.ints.inner_size = inner_size(logits.1.dims(), params.class_dim) as u64;
        launch.check_fields("saved states", saved, SAVED_FIELDS)?;
        Ok(launch)
    }

    fn num_rows(&self) -> usize {
        self.ints.num_rows as usize
    }

    /// The dtype of the arithmetic.
    fn dtype(&self) -> DType {
        result_dtype(self.variant.logits)
    }

    fn alloc(&self, len: usize) -> Result<S> {
        Ok(S::alloc(&self.device, len, self.dtype())?)
    }

    fn kernel(&self, name: &'static str) -> KernelKey {
        KernelKey { name, variant: self.variant }
    }

    /// The buffers of the targets and of the class params.
    fn shared_buffers(&self) -> Result<[Buffer<'_, S>; 2]> {
        let class_params = match &self.class_params {
            None => Buffer::Unused,
            Some(storage) => {
                let class_params = S::from_storage(storage).ok_or_else(|| {
                    let location = storage.device().location();
                    internal_error(format!(
                        "the class params are on {location:?}, not with the logits"
                    ))
                })?;
                let len = CLASS_FIELDS * self.ints.num_classes as usize;
                self.check_numbers("class params", class_params, len)?;
                Buffer::Input(class_params)
            }
        };
        Ok([Buffer::Input(self.targets), class_params])
    }

    /// Checks a buffer that kernels index without its layout: it is in the dtype of the arithmetic and has at least
    /// `len` elements.
    fn check_numbers(&self, what: &str, storage: &S, len: usize) -> Result<()> {
        let (dtype, found_dtype, found_len) = (self.dtype(), storage.dtype(), storage.len());
        if found_dtype == dtype && found_len >= len {
            return Ok(());
        }
        let expected = format!("expected {len} in {dtype:?}");
        Err(internal_error(format!("{found_len} {what} in {found_dtype:?} were given, {expected}")))
    }

    /// Checks a contiguous tensor (`num_fields`, N).
    fn check_fields(&self, what: &str, tensor: Operand<S>, num_fields: usize) -> Result<()> {
        check_contiguous(what, tensor)?;
        self.check_numbers(what, tensor.0, num_fields * self.num_rows())
    }

    /// The grid of a kernel that takes the classes of a row in splits. Sets the parameters to match.
    fn plan(
        &mut self,
        kernel: &'static str,
        threads_along_rows: bool,
        min_blocks: usize,
    ) -> Result<Grid> {
        let limits = S::limits(&self.device, self.kernel(kernel))?;
        let dtype = self.variant.logits;
        Ok(self.ints.plan_launch(limits, dtype, threads_along_rows, min_blocks))
    }

    /// Queues one of the kernels that take `Params`.
    ///
    /// # Safety
    /// As for [`GpuStorage::launch`].
    unsafe fn run(&self, name: &'static str, grid: Grid, buffers: &mut [Buffer<S>]) -> Result<()> {
        let kernel = self.kernel(name);
        // SAFETY: the caller vouches for the buffers. The parameters have the type of the arithmetic that
        // the kernel is compiled for.
        unsafe {
            match self.dtype() {
                DType::F64 => {
                    S::launch(&self.device, kernel, grid, buffers, &self.kernel_params::<f64>())?
                }
                _ => S::launch(&self.device, kernel, grid, buffers, &self.kernel_params::<f32>())?,
            }
        }
        Ok(())
    }

    fn kernel_params<A: WithDType>(&self) -> KernelParams<A> {
        let class_params = match self.params.class_table {
            ClassTable::Uniform(class_params) => class_params,
            // Unused: the kernel reads the table.
            ClassTable::PerClass(_) => ClassParams::from_fields([0.; CLASS_FIELDS]),
        };
        KernelParams::new(self.ints, class_params, self.params.z_loss)
    }

    /// Computes the outputs of all rows from the logits. If rows are split, their splits are merged.
    fn forward_rows(&mut self, logits: &S, outputs: Outputs<S>) -> Result<()> {
        if self.num_rows() == 0 {
            return Ok(());
        }
        let along_rows = self.ints.logits.rows_are_adjacent();
        let grid = self.plan("forward", along_rows, MIN_BLOCKS_FORWARD)?;
        if self.ints.num_splits == 1 {
            return self.launch_forward(grid, logits, outputs);
        }
        let num_splits = self.ints.num_splits as usize;
        let mut states = self.alloc(STATE_FIELDS * num_splits * self.num_rows())?;
        let accumulates = std::mem::replace(&mut self.ints.accumulates, 0);
        self.launch_forward(grid, logits, Outputs::States(&mut states))?;
        self.ints.accumulates = accumulates;
        self.merge_states(&states, num_splits, outputs)
    }

    fn launch_forward(&mut self, grid: Grid, logits: &S, outputs: Outputs<S>) -> Result<()> {
        let [states, losses, weights, saved] = outputs.into_buffers(&mut self.ints);
        let (logits, [targets, class_params]) = (Buffer::Input(logits), self.shared_buffers()?);
        let mut buffers = [logits, targets, class_params, states, losses, weights, saved];
        // SAFETY: these are the buffers of `forward`. The strides were checked against the storages of the
        // logits and the targets, and the length of the class params. Each output has room for every row (the
        // states, for every split of it), and the kernel writes those that the flags name. It compares a class
        // target with the number of classes before it indexes by it.
        unsafe { self.run("forward", grid, &mut buffers) }
    }

    /// Computes the outputs of all rows from `num_states` softmax states of each.
    fn merge_states(&mut self, states: &S, num_states: usize, outputs: Outputs<S>) -> Result<()> {
        if self.num_rows() == 0 {
            return Ok(());
        }
        let limits = S::limits(&self.device, self.kernel("finish"))?;
        let threads_per_block = limits.block_size();
        let threads_per_row = num_states.min(limits.warp_size).next_power_of_two();
        let row_blocks = self.num_rows().div_ceil(threads_per_block / threads_per_row);
        let grid = Grid { blocks: row_blocks.min(limits.max_blocks), threads_per_block };
        self.ints.num_states = num_states as u64;
        self.ints.threads_per_row = threads_per_row as u32;
        self.ints.threads_along_rows = 0;
        self.ints.num_splits = 1;
        let [merged, losses, weights, saved] = outputs.into_buffers(&mut self.ints);
        let ([targets, class_params], states) = (self.shared_buffers()?, Buffer::Input(states));
        let mut buffers = [targets, class_params, states, merged, losses, weights, saved];
        // SAFETY: these are the buffers of `finish`, in bounds as in `launch_forward`. The input has
        // `num_states` states for each row.
        unsafe { self.run("finish", grid, &mut buffers) }
    }

    /// Writes the gradient of the logits. Without `logits`, `grad_logits` holds them and they are overwritten.
    fn write_gradient(
        &mut self,
        logits: Option<&S>,
        grad_output: &S,
        saved: &S,
        grad_logits: &mut S,
    ) -> Result<()> {
        if self.num_rows() == 0 {
            return Ok(());
        }
        let along_rows = self.ints.inner_size > 1;
        let grid = self.plan("backward", along_rows, MIN_BLOCKS_BACKWARD)?;
        self.ints.in_place = logits.is_none().into();
        let [targets, class_params] = self.shared_buffers()?;
        let mut buffers = [
            Buffer::optional_input(logits),
            targets,
            class_params,
            Buffer::Input(grad_output),
            Buffer::Input(saved),
            Buffer::Output(grad_logits),
        ];
        // SAFETY: these are the buffers of `backward`. The logits, targets and class params are in bounds as
        // in `launch_forward`. The strides of the output gradient were checked against its storage, and the
        // length of the saved states. The gradient has an element for each logit.
        unsafe { self.run("backward", grid, &mut buffers) }
    }

    /// The losses that `compute` writes for the rows, or their sum divided.
    fn loss(
        mut self,
        compute: impl FnOnce(&mut Self, Outputs<S>) -> Result<()>,
    ) -> Result<ForwardOut<S>> {
        let num_rows = self.num_rows();
        let mut losses = self.alloc(num_rows)?;
        let mut divisor = match self.params.divisor {
            None => None,
            Some(Divisor::Number(number)) => Some(Divisor::Number(number)),
            Some(Divisor::WeightSum(())) => Some(Divisor::WeightSum(self.alloc(num_rows)?)),
        };
        let mut saved = match self.params.saves_state {
            true => Some(self.alloc(SAVED_FIELDS * num_rows)?),
            false => None,
        };
        let weights = match &mut divisor {
            Some(Divisor::WeightSum(weights)) => Some(weights),
            _ => None,
        };
        let outputs = Outputs::Rows { losses: &mut losses, weights, saved: saved.as_mut() };
        compute(&mut self, outputs)?;
        Ok(match divisor {
            None => ForwardOut { loss: losses, divisor: None, saved },
            Some(divisor) => {
                let (loss, divisor) = self.reduce(losses, divisor)?;
                ForwardOut { loss, divisor: Some(divisor), saved }
            }
        })
    }

    /// Sums the losses and divides the sum by a number, or by the sum of the weights of the rows. Returns the quotient and
    /// what it was divided by.
    fn reduce(&self, mut losses: S, divisor: Divisor<S>) -> Result<(S, Divisor<S>)> {
        // With weights, the kernel divides by their sum instead of the number.
        let (mut weights, number) = match divisor {
            Divisor::Number(number) => (None, number),
            Divisor::WeightSum(weights) => (Some(weights), 1.),
        };
        let kernel = self.kernel("reduce");
        let limits = S::limits(&self.device, kernel)?;
        let threads_per_block = limits.block_size();
        // A block of `reduce` sums one range of rows, so there must not be more ranges than blocks.
        let rows_per_block = REDUCE_ROWS_PER_BLOCK.max(self.num_rows().div_ceil(limits.max_blocks));
        let mut len = self.num_rows();
        // The losses of a mean are scaled down before they are summed, so that the sum overflows only if the mean
        // does. The scale is a power of two, so that multiplying by it does not round.
        let mut scale = match weights.is_some() || number != 1. {
            true => 1. / len.max(1).next_power_of_two() as f64,
            false => 1.,
        };
        let unscale = 1. / scale;
        loop {
            let blocks = len.div_ceil(rows_per_block).max(1);
            let params = ReduceParams {
                len: len as u64,
                rows_per_block: rows_per_block as u64,
                weighted: weights.is_some().into(),
                divides: (blocks == 1).into(),
                divisor: number,
                scale,
                unscale,
            };
            let mut loss_sums = self.alloc(blocks)?;
            let mut weight_sums = weights.as_ref().map(|_| self.alloc(blocks)).transpose()?;
            let mut buffers = [
                Buffer::Input(&losses),
                Buffer::optional_input(weights.as_ref()),
                Buffer::Output(&mut loss_sums),
                Buffer::optional_output(weight_sums.as_mut()),
            ];
            let grid = Grid { blocks, threads_per_block };
            // SAFETY: these are the buffers of `reduce`. There are `len` losses, as many weights if any, and
            // a sum for each block. The parameters have the type of the arithmetic.
            unsafe {
                match self.dtype() {
                    DType::F64 => S::launch(&self.device, kernel, grid, &mut buffers, &params)?,
                    _ => S::launch(&self.device, kernel, grid, &mut buffers, &params.to_f32())?,
                }
            }
            (losses, weights) = (loss_sums, weight_sums);
            if blocks == 1 {
                return Ok((losses, weights.map_or(Divisor::Number(number), Divisor::WeightSum)));
            }
            (len, scale) = (blocks, 1.);
        }
    }
}

/// Checks that a tensor has the rows of the logits: the kernels index it by them.
fn check_num_rows(what: &str, found: usize, num_rows: usize) -> Result<()> {
    match found == num_rows {
        true => Ok(()),
        false => Err(internal_error(format!("{found} {what} were given for {num_rows} rows"))),
    }
}

/// Checks that a tensor is contiguous and begins at the start of its storage.
fn check_contiguous<S: GpuStorage>(what: &str, (storage, layout): Operand<S>) -> Result<()> {
    match layout.contiguous_offsets() {
        Some((0, end)) if end <= storage.len() => Ok(()),
        _ => Err(internal_error(format!("the {what} are not contiguous"))),
    }
}

/// An error that only a mistake in this crate causes.
fn internal_error(text: String) -> Error {
    candle_core::Error::Msg(text).into()
}
