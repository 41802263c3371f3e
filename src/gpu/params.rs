//! The parameters of the kernels, with the choice of outputs and the division of the rows between threads.
//!
//! The `repr(C)` structs mirror `View`, `Params` and `Reduction` of the kernel source. The order and the types of
//! their fields are those of the kernel source and must change with it.

use super::kernel::{Buffer, GpuStorage, Grid, Limits};
use crate::error::{Error, Result};
use crate::formula::ClassParams;
use crate::layout::{Operand, RowOffsets, check_layout};
use candle_core::{DType, WithDType};

/// The largest number of dimensions that do not merge: `DIMS` in the kernel source.
const MAX_DIMS: usize = 16;

/// `View`: where the rows of a tensor lie, and the classes of a row. Offsets and strides count elements.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RowStrides {
    start: u64,
    class_stride: u64,
    rank: u64,
    lengths: [u64; MAX_DIMS],
    strides: [u64; MAX_DIMS],
}

/// The fields of `Params` that are integers.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IntParams {
    pub logits: RowStrides,
    pub targets: RowStrides,
    pub grad_output: RowStrides,
    pub num_rows: u64,
    /// K, the number of all classes.
    pub num_classes: u64,
    /// The first class of the logits.
    pub first_class: u64,
    /// The number of classes that the logits hold.
    pub tile_classes: u64,
    /// The number of elements between one class and the next of the gradient.
    pub inner_size: u64,
    /// A row's classes are divided into `num_splits` splits of `classes_per_split`, each
    /// read by one block.
    pub classes_per_split: u64,
    pub num_splits: u64,
    /// The number of softmax states that `finish` merges for a row.
    pub num_states: u64,
    pub ignore_index: i64,
    pub has_ignore_index: u32,
    /// Whether neighbouring threads read neighbouring rows, instead of neighbouring classes of a row.
    pub threads_along_rows: u32,
    pub threads_per_row: u32,
    /// Whether to write softmax states, instead of losses.
    pub wants_states: u32,
    pub wants_weights: u32,
    pub wants_saved: u32,
    /// Whether to merge the states into those of earlier class tiles, which the buffer holds.
    pub accumulates: u32,
    /// Whether the gradient overwrites the logits.
    pub in_place: u32,
}

/// `Params`: the parameters of every kernel but `reduce`. `A` is the type of the arithmetic.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct KernelParams<A> {
    ints: IntParams,
    prob_scale: A,
    off_value: A,
    on_value: A,
    weight: A,
    z_loss: A,
}

// The fields of `Params` are not nested. Nesting the integers adds no padding after them.
const _: () = assert!(size_of::<IntParams>().is_multiple_of(size_of::<f64>()));

/// `Reduction`: the parameters of `reduce`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReduceParams<A> {
    /// The number of losses.
    pub len: u64,
    pub rows_per_block: u64,
    /// Whether there are weights, which are summed too.
    pub weighted: u32,
    /// Whether to divide the sum of losses: by the sum of weights if there are weights, else by `divisor`.
    pub divides: u32,
    pub divisor: A,
    /// The losses are multiplied by `scale` before they are summed, and the quotient by `unscale`.
    pub scale: A,
    pub unscale: A,
}

impl<A: WithDType> KernelParams<A> {
    pub fn new(ints: IntParams, class_params: ClassParams<f64>, z_loss: f64) -> Self {
        let ClassParams { prob_scale, off_value, on_value, weight } = class_params.map(A::from_f64);
        Self { ints, prob_scale, off_value, on_value, weight, z_loss: A::from_f64(z_loss) }
    }
}

impl ReduceParams<f64> {
    pub fn to_f32(self) -> ReduceParams<f32> {
        let Self { len, rows_per_block, weighted, divides, divisor, scale, unscale } = self;
        let [divisor, scale, unscale] = [divisor, scale, unscale].map(|number| number as f32);
        ReduceParams { len, rows_per_block, weighted, divides, divisor, scale, unscale }
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
            (*length, *stride) = (dim.len as u64, dim.stride as u64);
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

/// The outputs of `forward` and `finish`.
pub(crate) enum Outputs<'a, S> {
    /// The softmax states of the rows.
    States(&'a mut S),
    Rows {
        losses: &'a mut S,
        /// The class weight of each row's label, 0 for ignored rows.
        weights: Option<&'a mut S>,
        /// ([`SAVED_FIELDS`](crate::formula::SAVED_FIELDS), N).
        saved: Option<&'a mut S>,
    },
}

impl<'a, S> Outputs<'a, S> {
    /// The buffers of the states, the losses, the weights and the saved states. Sets the flags in `ints` that tell
    /// the kernel which of them to write.
    pub fn into_buffers(self, ints: &mut IntParams) -> [Buffer<'a, S>; 4] {
        ints.wants_states = matches!(self, Self::States(_)).into();
        match self {
            Self::States(states) => {
                [Buffer::Output(states), Buffer::Unused, Buffer::Unused, Buffer::Unused]
            }
            Self::Rows { losses, weights, saved } => {
                ints.wants_weights = weights.is_some().into();
                ints.wants_saved = saved.is_some().into();
                let weights = Buffer::optional_output(weights);
                let saved = Buffer::optional_output(saved);
                [Buffer::Unused, Buffer::Output(losses), weights, saved]
            }
        }
    }
}

/// The largest number of threads in a block: `THREADS` in the kernel source.
const MAX_THREADS_PER_BLOCK: usize = 256;
/// The size of the widest load.
const VECTOR_BYTES: usize = 16;

/// The work of one thread, in classes of a row.
struct ThreadWork {
    /// The number of classes in one load.
    per_load: usize,
    /// More threads share a row only if each of them has this many classes.
    min: usize,
    /// A row is split further only if each thread has this many classes of a split.
    min_of_split: usize,
    /// A thread sums at most this many classes, which bounds the rounding error.
    max: usize,
}

impl Limits {
    /// The largest number of threads in a block that is a power of two, and so a multiple of the warp size.
    pub fn block_size(self) -> usize {
        1 << self.max_threads.clamp(self.warp_size, MAX_THREADS_PER_BLOCK).ilog2()
    }
}

impl IntParams {
    /// Sets how many threads share a row and into how many splits its classes are divided, and returns the grid.
    /// The grid has at least `min_blocks` blocks, unless the splits or the number of blocks would pass a limit.
    pub fn plan_launch(
        &mut self,
        limits: Limits,
        logits_dtype: DType,
        threads_along_rows: bool,
        min_blocks: usize,
    ) -> Grid {
        let block_size = limits.block_size();
        let (num_rows, num_classes) = (self.num_rows as usize, self.tile_classes as usize);
        let (work, max_threads_per_row) = match threads_along_rows {
            false => {
                let per_load = VECTOR_BYTES / logits_dtype.size_in_bytes();
                let (min, min_of_split) = (2 * per_load, 4 * per_load);
                (ThreadWork { per_load, min, min_of_split, max: usize::MAX }, block_size)
            }
            // No two threads of a warp share a row, so that a warp reads adjacent rows of one class.
            true => (
                ThreadWork { per_load: 1, min: 8, min_of_split: 32, max: 512 },
                block_size / limits.warp_size,
            ),
        };
        let threads_per_row =
            num_classes.div_ceil(work.min).min(max_threads_per_row).next_power_of_two();
        let threads_per_block = match num_rows.checked_next_power_of_two() {
            Some(rows) if rows < block_size => {
                (rows * threads_per_row).clamp(limits.warp_size, block_size)
            }
            _ => block_size,
        };
        let row_blocks = num_rows.div_ceil(threads_per_block / threads_per_row);

        let max_splits = num_classes.div_ceil(work.min_of_split * threads_per_row);
        let min_splits = num_classes.div_ceil(work.max.saturating_mul(threads_per_row)).max(1);
        let num_splits = min_blocks.div_ceil(row_blocks.max(1)).min(max_splits).max(min_splits);
        let classes_per_split = num_classes
            .div_ceil(num_splits)
            .next_multiple_of(work.per_load * threads_per_row)
            .max(1);
        let num_splits = num_classes.div_ceil(classes_per_split).max(1);

        self.threads_along_rows = threads_along_rows.into();
        self.threads_per_row = threads_per_row as u32;
        self.classes_per_split = classes_per_split as u64;
        self.num_splits = num_splits as u64;
        let blocks = row_blocks.saturating_mul(num_splits).min(limits.max_blocks);
        Grid { blocks, threads_per_block }
    }
}
