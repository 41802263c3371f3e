//! The parameters of the kernels, with the choice of outputs and the division of the rows between threads.
//!
//! The `repr(C)` structs mirror those of `kernels.inc`. The order and the types of
//! their fields are those of the kernel source and must change with it.

use super::kernel::{Buffer, GpuStorage, Grid, Limits, MAX_PARTIALS};
use crate::error::{Error, Result};
use crate::formula::{ClassParams, LossParams, RowMetrics};
use crate::layout::{Operand, RowOffsets, check_layout};
use candle_core::{DType, WithDType};
use std::mem::offset_of;

/// The largest number of dimensions that do not merge: `DIMS` in the kernel source.
const MAX_DIMS: usize = 16;

/// `RowStrides`: where the rows of a tensor lie, and the classes of a row. Offsets and strides count elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowStrides {
    start: u64,
    pub class_stride: u64,
    strides: [u64; MAX_DIMS],
    lengths: [u32; MAX_DIMS],
    rank: u32,
}

/// Where to save what backward needs: `SAVES_NOTHING` and the others in the kernel source.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum Saves {
    #[default]
    Nothing,
    /// In a buffer of its own.
    Apart,
    /// In the buffer of the losses, after them.
    WithLoss,
}

/// The type of the row weights: `RowWeightsType` in the kernel source. It has 64 bits so that the number of 32-bit fields stays
/// even.
#[repr(u64)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) enum RowWeightsType {
    #[default]
    U8,
    F8,
    F16,
    BF16,
    F32,
    F64,
}

impl RowWeightsType {
    pub fn new(dtype: DType) -> Result<Self> {
        Ok(match dtype {
            DType::U8 => Self::U8,
            DType::F8E4M3 => Self::F8,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::F32 => Self::F32,
            DType::F64 => Self::F64,
            dtype => return Err(Error::RowWeightsDType { dtype }),
        })
    }
}

/// The fields of `Params` that are integers, in their order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IntParams {
    pub logits: RowStrides,
    pub targets: RowStrides,
    pub grad_output: RowStrides,
    pub row_weights: RowStrides,
    pub ignore_index: i64,
    /// The first element of the saved states.
    pub saved_start: u64,
    pub row_weights_type: RowWeightsType,
    pub num_rows: u32,
    /// K, the number of all classes.
    pub num_classes: u32,
    /// The first class of the logits.
    pub first_class: u32,
    /// The number of classes that the logits hold.
    pub tile_classes: u32,
    /// The number of elements between one class and the next of the gradient.
    pub inner_size: u32,
    /// A task is a group of rows and a split of their classes. A row's classes are divided into `num_splits` splits of
    /// `classes_per_split`.
    pub num_tasks: u32,
    pub num_splits: u32,
    pub classes_per_split: u32,
    /// Log₂ of the number of threads that share a row.
    pub row_shift: u32,
    /// The number of softmax states of a row that `finish` merges, and log₂ of the number of threads that merge them.
    pub num_states: u32,
    pub state_row_shift: u32,
    /// The element for the sum of weights by which a mean divides.
    pub divisor_start: u32,
    /// Whether neighbouring threads read neighbouring rows, instead of neighbouring classes of a row.
    pub threads_along_rows: u32,
    pub has_ignore_index: u32,
    /// Whether the last block of `forward` merges the states of the splits.
    pub joins_splits: u32,
    /// Whether to write softmax states, instead of losses.
    pub wants_states: u32,
    /// Whether to merge the states into those of earlier class tiles, which the buffer holds.
    pub accumulates: u32,
    pub saves: Saves,
    /// Whether to sum the losses, and whether the divisor is the sum of the rows' weights.
    pub reduces: u32,
    pub weighted: u32,
    /// Whether the gradient overwrites the logits.
    pub in_place: u32,
    /// The number of blocks that have summed losses, for `reduce`.
    pub num_partials: u32,
}

/// `Params`: the parameters of every kernel. `A` is the type of the arithmetic.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct KernelParams<A> {
    ints: IntParams,
    prob_scale: A,
    off_value: A,
    on_value: A,
    weight: A,
    z_loss: A,
    unmasked_epsilon: A,
    unmasked_scale: A,
    logit_scale: A,
    softcap: A,
    inverse_softcap: A,
    divisor: A,
    scale: A,
    unscale: A,
    no_weight: A,
}

// The fields of `Params` are not nested. Nesting the integers must not add padding after the last of them.
const _: () = assert!(
    offset_of!(IntParams, num_partials) + size_of::<u32>() == size_of::<IntParams>()
        && size_of::<IntParams>().is_multiple_of(size_of::<f64>())
);

impl<A: WithDType> KernelParams<A> {
    pub fn new(
        ints: IntParams,
        class_params: ClassParams<f64>,
        params: &LossParams,
        divisor: Option<f64>,
    ) -> Self {
        let ClassParams { prob_scale, off_value, on_value, weight } = class_params.map(A::from_f64);
        let divisor = divisor.unwrap_or(1.);
        // The losses of a mean are scaled down before they are summed, so that the sum overflows only if the mean does.
        // The scale is a power of two, so that multiplying by it does not round.
        let scale = match ints.weighted > 0 || divisor != 1. {
            true => 1. / (ints.num_rows.max(1).next_power_of_two() as f64),
            false => 1.,
        };
        let logit_scale = params.logit_map.map_or(1., |map| map.scale);
        let softcap = params.logit_map.and_then(|map| map.cap).unwrap_or(1.);
        Self {
            ints,
            prob_scale,
            off_value,
            on_value,
            weight,
            z_loss: A::from_f64(params.z_loss),
            unmasked_epsilon: A::from_f64(params.unmasked_epsilon),
            unmasked_scale: A::from_f64(params.unmasked_scale()),
            logit_scale: A::from_f64(logit_scale),
            softcap: A::from_f64(softcap),
            inverse_softcap: A::from_f64(1. / softcap),
            divisor: A::from_f64(divisor),
            scale: A::from_f64(scale),
            unscale: A::from_f64(1. / scale),
            no_weight: A::from_f64(if params.zero_if_no_weight { 0. } else { f64::NAN }),
        }
    }
}

impl RowStrides {
    /// The rows of a tensor, after a check that they are inside its storage. Without a class dimension every
    /// element is a row.
    pub fn new<S: GpuStorage>(
        (storage, layout): Operand<S>,
        class_dim: Option<usize>,
    ) -> Result<Self> {
        check_layout(layout, storage.len())?;
        let class_stride = class_dim.and_then(|dim| layout.stride().get(dim));
        let mut rows = Self {
            start: layout.start_offset() as u64,
            class_stride: class_stride.map_or(0, |&stride| stride as u64),
            ..Self::default()
        };
        let mut slots = rows.lengths.iter_mut().zip(&mut rows.strides);
        for dim in RowOffsets::new(layout, class_dim).dims() {
            let Some((length, stride)) = slots.next() else {
                return Err(Error::TooManyStrides {
                    shape: layout.dims().to_vec(),
                    stride: layout.stride().to_vec(),
                    most: MAX_DIMS,
                });
            };
            (*length, *stride) = (dim.len as u32, dim.stride as u64);
            rows.rank += 1;
        }
        Ok(rows)
    }

    /// Whether neighbouring rows are adjacent in memory, and neighbouring classes are not.
    pub fn rows_are_adjacent(&self) -> bool {
        let inner_stride = self.strides.get(self.rank.saturating_sub(1) as usize);
        self.class_stride != 1 && inner_stride == Some(&1)
    }
}

/// The buffers that `forward` and `finish` write.
pub(crate) struct Outputs<'a, S> {
    /// The losses of the rows, their reduction, or the softmax states.
    pub out: &'a mut S,
    /// The saved states, if they are not in `out`.
    pub saved: Option<&'a mut S>,
    pub metrics: Option<&'a mut RowMetrics<S>>,
}

impl<'a, S> Outputs<'a, S> {
    pub fn new(out: &'a mut S) -> Self {
        Self { out, saved: None, metrics: None }
    }

    pub fn buffers(&mut self) -> [Buffer<'_, S>; 4] {
        let saved = Buffer::optional_output(self.saved.as_deref_mut());
        let [values, predictions] = match self.metrics.as_deref_mut() {
            None => [Buffer::Unused, Buffer::Unused],
            Some(metrics) => [&mut metrics.values, &mut metrics.predictions].map(Buffer::Output),
        };
        [Buffer::Output(self.out), saved, values, predictions]
    }
}

/// The largest number of threads in a block: `THREADS` in the kernel source.
const MAX_THREADS_PER_BLOCK: usize = 256;
/// The size of a pack, the widest access, and the number of packs that a thread loads at once: `PACKS` in the kernel source.
const PACK_BYTES: usize = 16;
const PACKS: usize = 4;
/// The number of packs of a row that a thread has at least, if there are many rows: with more packs, merging the states of the
/// row's threads is less of the work.
const MIN_PACKS: usize = 128;
/// The number of threads that share a row even if they have fewer packs, but at least `PACKS` each. Together they read 64
/// adjacent bytes.
const MIN_THREADS: usize = 4;

/// How threads read the classes of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// The classes are adjacent in memory. Neighbouring threads read neighbouring packs.
    Packs,
    /// Neighbouring threads read neighbouring classes, one at a time.
    Classes,
    /// Neighbouring threads read neighbouring rows, one class at a time.
    Rows,
}

impl Limits {
    /// The largest number of threads in a block that is a power of two, and so a multiple of the warp size.
    pub fn block_size(self) -> usize {
        1 << self.max_threads.clamp(self.warp_size, MAX_THREADS_PER_BLOCK).ilog2()
    }

    /// A grid for so many tasks: at most as many blocks as keep the device busy, with equal numbers of tasks.
    pub fn grid(self, tasks: usize) -> Grid {
        let max_blocks = self.target_blocks.clamp(1, self.max_blocks.min(MAX_PARTIALS));
        let tasks_per_block = tasks.div_ceil(max_blocks).max(1);
        Grid {
            blocks: tasks.div_ceil(tasks_per_block).max(1),
            threads_per_block: self.block_size(),
        }
    }
}

impl IntParams {
    /// Sets how many threads share a row and into how many splits its classes are divided, and returns the grid.
    pub fn plan_launch(&mut self, limits: Limits, logits_dtype: DType, access: Access) -> Grid {
        let block_size = limits.block_size();
        let (num_rows, num_classes) = (self.num_rows as usize, self.tile_classes as usize);
        // The number of classes in one load, and of a thread at least if a row is split.
        let (per_load, min_of_split) = match access {
            Access::Packs => (PACK_BYTES / logits_dtype.size_in_bytes(), 2 * PACKS),
            Access::Classes | Access::Rows => (1, 32),
        };
        let loads = num_classes.div_ceil(per_load);
        let threads_per_row = match access {
            Access::Packs => threads_for_packs(loads, num_rows, limits),
            Access::Classes => loads.div_ceil(8).min(block_size),
            // No two threads of a warp share a row, so that a warp reads adjacent rows of one class.
            Access::Rows => loads.div_ceil(8).min(block_size / limits.warp_size),
        };
        let threads_per_row = threads_per_row.max(1).next_power_of_two();
        let row_blocks = num_rows.div_ceil(block_size / threads_per_row);

        // A thread of `Rows` sums at most 512 classes, which bounds the rounding error.
        let min_splits = match access {
            Access::Rows => loads.div_ceil(512 * threads_per_row),
            Access::Packs | Access::Classes => 1,
        };
        let max_splits = loads.div_ceil(min_of_split * threads_per_row);
        let num_splits =
            (limits.target_blocks / row_blocks.max(1)).min(max_splits).max(min_splits).max(1);
        let classes_per_split =
            num_classes.div_ceil(num_splits).next_multiple_of(per_load * threads_per_row).max(1);
        let num_splits = num_classes.div_ceil(classes_per_split).max(1);

        self.threads_along_rows = (access == Access::Rows).into();
        self.row_shift = threads_per_row.ilog2();
        self.classes_per_split = classes_per_split as u32;
        self.num_splits = num_splits as u32;
        let tasks = row_blocks.saturating_mul(num_splits);
        self.num_tasks = tasks as u32;
        limits.grid(tasks)
    }

    /// Sets how many threads merge the states of a row, and returns the grid.
    pub fn plan_finish(&mut self, limits: Limits, num_states: usize) -> Grid {
        let threads = num_states.min(limits.warp_size).next_power_of_two();
        self.num_states = num_states as u32;
        self.state_row_shift = threads.ilog2();
        limits.grid((self.num_rows as usize).div_ceil(limits.block_size() / threads))
    }
}

/// The number of threads that share a row of so many packs. With few rows more threads share a row, so that all blocks that fit
/// the device have two tasks or more.
fn threads_for_packs(packs: usize, num_rows: usize, limits: Limits) -> usize {
    let block_size = limits.block_size();
    let threads = (packs / MIN_PACKS).max((packs / PACKS).min(MIN_THREADS)).clamp(1, block_size);
    let mut threads = 1 << threads.ilog2();
    let enough = 2 * limits.target_blocks * block_size;
    while threads < block_size
        && num_rows.saturating_mul(threads) < enough
        && packs > PACKS * threads
    {
        threads *= 2;
    }
    threads
}
