//! Tensors that the loops read by row and class, of any floating-point dtype and layout.

use super::dtype::Real;
use super::logit_map::LogitMap;
use super::parallel::BLOCK;
use crate::error::{Error, Result};
use crate::formula::LossParams;
use crate::layout::{Operand, RowOffsets, check_layout, inner_size, num_rows};
use candle_core::CpuStorage;
use candle_core::backend::BackendStorage;
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::Simd;
use std::ops::Range;

/// Up to so many classes, a loop works on several rows side by side.
pub(super) const FEW_CLASSES: usize = 32;

/// The axis along which a block's elements follow each other.
#[derive(Clone, Copy)]
pub(super) enum InnerAxis {
    /// The classes of a row.
    Class,
    /// The rows of a class.
    Row,
}

impl InnerAxis {
    /// The axis along which forward reads: that of contiguous logits of this shape in memory, so that a view gives the bits of
    /// its contiguous copy. With few classes a row is too short for a block.
    pub(super) fn of_forward(params: &LossParams, dims: &[usize]) -> Self {
        match (dims[params.class_dim], inner_size(dims, params.class_dim)) {
            (..=FEW_CLASSES, _) => Self::Row,
            (_, 1) => Self::Class,
            _ => Self::Row,
        }
    }
}

/// The position of a block: its first row and class, and the axis of its elements.
#[derive(Clone, Copy)]
pub(super) struct BlockPos {
    pub row: usize,
    pub class: usize,
    pub axis: InnerAxis,
}

impl BlockPos {
    /// The row of the block's element `i`.
    fn row_of(self, i: usize) -> usize {
        match self.axis {
            InnerAxis::Class => self.row,
            InnerAxis::Row => self.row + i,
        }
    }

    /// The class of the block's element `i`.
    pub(super) fn class_of(self, i: usize) -> usize {
        match self.axis {
            InnerAxis::Class => self.class + i,
            InnerAxis::Row => self.class,
        }
    }
}

/// The numbers of a tensor by row and class.
pub(super) struct StridedRows<'a> {
    storage: &'a CpuStorage,
    offsets: RowOffsets,
    pub num_rows: usize,
    pub first_class: usize,
    pub tile_classes: usize,
    class_stride: usize,
    /// The index in the tensor's storage of the first element of `storage`.
    storage_start: usize,
}

impl<'a> StridedRows<'a> {
    /// The tensor's first class is `first_class`. If `class_dim` is beyond the rank, each element is a row of one class.
    pub(super) fn new(
        tensor: Operand<'a, CpuStorage>,
        class_dim: usize,
        first_class: usize,
    ) -> Result<Self> {
        let (storage, layout) = tensor;
        let Some(len) = readable_len(storage) else {
            return Err(Error::TargetsDType {
                dtype: storage.dtype(),
                expected: "F8E4M3, F16, BF16, F32 or F64",
            });
        };
        check_layout(layout, len)?;
        Ok(Self::of_piece(tensor, class_dim, first_class, 0))
    }

    /// The numbers of a tensor of which only a piece of the storage is given, from its element `storage_start` on.
    fn of_piece(
        (storage, layout): Operand<'a, CpuStorage>,
        class_dim: usize,
        first_class: usize,
        storage_start: usize,
    ) -> Self {
        Self {
            storage,
            storage_start,
            offsets: RowOffsets::new(layout, Some(class_dim)),
            num_rows: num_rows(layout.dims(), class_dim),
            first_class,
            tile_classes: layout.dims().get(class_dim).copied().unwrap_or(1),
            class_stride: layout.stride().get(class_dim).copied().unwrap_or(0),
        }
    }

    /// The index in the storage of a class of the row at `row_offset`.
    #[inline(always)]
    fn index(&self, row_offset: usize, class: usize) -> usize {
        row_offset + (class - self.first_class) * self.class_stride - self.storage_start
    }

    /// The range of a block in the storage, if it is contiguous.
    #[inline(always)]
    fn contiguous_range(&self, pos: BlockPos, len: usize) -> Option<Range<usize>> {
        let run = self.offsets.run(pos.row);
        let is_contiguous = match pos.axis {
            InnerAxis::Class => self.class_stride == 1,
            InnerAxis::Row => run.stride == 1 && run.len >= len,
        };
        let start = self.index(run.offset, pos.class);
        is_contiguous.then(|| start..start + len)
    }

    /// The `len` elements of a block, if they are contiguous in the dtype of the arithmetic.
    #[inline(always)]
    fn contiguous<A: Real>(&self, pos: BlockPos, len: usize) -> Option<&[A]> {
        Some(&A::as_slice(self.storage)?[self.contiguous_range(pos, len)?])
    }

    /// Fills `out`, at most [`BLOCK`] long, with the block in the dtype of the arithmetic.
    #[inline(always)]
    pub(super) fn load<A: Real>(&self, pos: BlockPos, out: &mut [A]) {
        if let Some(range) = self.contiguous_range(pos, out.len()) {
            if let Some(values) = A::as_slice(self.storage) {
                return out.copy_from_slice(&values[range]);
            }
            if let CpuStorage::BF16(values) = self.storage {
                let values = &values[range];
                return out.iter_mut().zip(values).for_each(|(out, v)| *out = A::from_bf16(*v));
            }
        }
        self.load_strided(pos, out);
    }

    /// Like [`load`](Self::load), for any dtype and layout. Compiled once and not for each instruction set: that would be
    /// most of the crate's code.
    #[inline(never)]
    fn load_strided<A: Real>(&self, pos: BlockPos, out: &mut [A]) {
        let mut done = 0;
        while done < out.len() {
            let run = self.offsets.run(pos.row_of(done));
            let (stride, len) = match pos.axis {
                InnerAxis::Class => (self.class_stride, out.len()),
                InnerAxis::Row => (run.stride, run.len.min(out.len() - done)),
            };
            let start = self.index(run.offset, pos.class);
            let out = &mut out[done..done + len];
            match self.storage {
                CpuStorage::F8E4M3(values) => {
                    copy_strided(values, start, stride, out, |v| A::from_f32(v.to_f32()))
                }
                CpuStorage::BF16(values) => copy_strided(values, start, stride, out, A::from_bf16),
                CpuStorage::F16(values) => copy_f16(values, start, stride, out),
                CpuStorage::F32(values) => copy_strided(values, start, stride, out, A::from_f32),
                CpuStorage::F64(values) => copy_strided(values, start, stride, out, A::from_f64),
                CpuStorage::U8(values) => {
                    copy_strided(values, start, stride, out, |v| A::from_f32(v.into()))
                }
                // `new` lets no other dtype pass.
                _ => out.fill(A::ZERO),
            }
            done += len;
        }
    }
}

/// The logits of the formula by row and class: those of a tensor, or their [`LogitMap`]. Every logit is read here.
pub(super) struct Logits<'a, A> {
    rows: StridedRows<'a>,
    map: Option<LogitMap<A>>,
}

impl<'a, A: Real> Logits<'a, A> {
    pub(super) fn new(params: &LossParams, logits: Operand<'a, CpuStorage>) -> Result<Self> {
        Ok(Self {
            rows: StridedRows::new(logits, params.class_dim, params.first_class)?,
            map: params.logit_map.map(LogitMap::new),
        })
    }

    /// The logits of a tensor of which only a piece of the storage is given, from its element `storage_start` on.
    pub(super) fn of_piece(
        params: &LossParams,
        piece: Operand<'a, CpuStorage>,
        storage_start: usize,
    ) -> Self {
        let (class_dim, first_class) = (params.class_dim, params.first_class);
        Self {
            rows: StridedRows::of_piece(piece, class_dim, first_class, storage_start),
            map: params.logit_map.map(LogitMap::new),
        }
    }

    pub(super) fn num_rows(&self) -> usize {
        self.rows.num_rows
    }

    /// The classes that the tensor holds.
    pub(super) fn classes(&self) -> Range<usize> {
        self.rows.first_class..self.rows.first_class + self.rows.tile_classes
    }

    /// The first `len` classes of a block, padded with −∞ to the length of `buffer`, a multiple of a vector's. They are copied to
    /// `buffer`, unless they are contiguous, in the dtype of the arithmetic, and need neither padding nor the map. If there is a
    /// map, its slope at each logit is written to `slopes`.
    #[inline(always)]
    pub(super) fn block<'b, S: Simd>(
        &'b self,
        simd: S,
        pos: BlockPos,
        len: usize,
        buffer: &'b mut [A],
        slopes: Option<&mut [A]>,
    ) -> &'b [A] {
        if len == buffer.len()
            && self.map.is_none()
            && let Some(values) = self.rows.contiguous(pos, len)
        {
            return values;
        }
        let (out, padding) = buffer.split_at_mut(len);
        self.rows.load(pos, out);
        padding.fill(A::NEG_INFINITY);
        self.map(simd, buffer, slopes);
        buffer
    }

    /// Fills the first `len` elements of `out` with the block, and writes the slopes as [`block`](Self::block) does. `out` has
    /// whole vectors.
    #[inline(always)]
    pub(super) fn load<S: Simd>(
        &self,
        simd: S,
        pos: BlockPos,
        len: usize,
        out: &mut [A],
        slopes: Option<&mut [A]>,
    ) {
        self.rows.load(pos, &mut out[..len]);
        self.map(simd, out, slopes);
    }

    #[inline(always)]
    fn map<S: Simd>(&self, simd: S, logits: &mut [A], slopes: Option<&mut [A]>) {
        match (self.map, slopes) {
            (None, _) => {}
            (Some(map), None) => map.map(simd, logits),
            (Some(map), Some(slopes)) => map.map_with_slopes(simd, logits, slopes),
        }
    }

    /// Multiplies a gradient by the slopes, if there is a map.
    #[inline(always)]
    pub(super) fn apply_slopes(&self, gradient: &mut [A], slopes: &[A]) {
        if self.map.is_some() {
            gradient.iter_mut().zip(slopes).for_each(|(gradient, &slope)| *gradient *= slope);
        }
    }
}

#[inline(always)]
fn copy_strided<T: Copy, U>(
    values: &[T],
    start: usize,
    stride: usize,
    out: &mut [U],
    convert: impl Fn(T) -> U,
) {
    if stride == 1 {
        let values = &values[start..start + out.len()];
        out.iter_mut().zip(values).for_each(|(out, &value)| *out = convert(value));
    } else {
        for (i, out) in out.iter_mut().enumerate() {
            *out = convert(values[start + i * stride]);
        }
    }
}

/// Copies at most [`BLOCK`] f16, converted eight at a time where the processor can.
fn copy_f16<A: Real>(values: &[f16], start: usize, stride: usize, out: &mut [A]) {
    let mut halves = [f16::ZERO; BLOCK];
    let halves = &mut halves[..out.len()];
    copy_strided(values, start, stride, halves, |value| value);
    let mut floats = [0f32; BLOCK];
    let floats = &mut floats[..out.len()];
    halves.convert_to_f32_slice(floats);
    out.iter_mut().zip(floats).for_each(|(out, &mut value)| *out = A::from_f32(value));
}

/// The fields of a tensor (N, len), a slice for each.
pub(super) fn field_slices<T, const N: usize>(mut values: &[T], len: usize) -> [&[T]; N] {
    [(); N].map(|()| values.split_off(..len).unwrap_or_default())
}

/// The number of elements of a storage whose dtype the loops read: any floating-point dtype, and U8 for row weights.
pub(crate) fn readable_len(storage: &CpuStorage) -> Option<usize> {
    match storage {
        CpuStorage::U8(values) => Some(values.len()),
        CpuStorage::F8E4M3(values) => Some(values.len()),
        CpuStorage::BF16(values) => Some(values.len()),
        CpuStorage::F16(values) => Some(values.len()),
        CpuStorage::F32(values) => Some(values.len()),
        CpuStorage::F64(values) => Some(values.len()),
        _ => None,
    }
}
