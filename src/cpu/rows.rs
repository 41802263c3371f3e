//! The loops over rows: forward reads logits into softmax states, backward writes gradients.

use super::dtype::{Element, Real, UNROLL};
use super::input::{BlockPos, FEW_CLASSES, InnerAxis, StridedRows};
use super::parallel::{BLOCK, SEGMENT, SliceWriter, default_vec, par_split};
use super::simd::dispatch;
use super::softmax::{
    GradCoeffs, ROWS_AT_ONCE, block_max, state_of_slice, state_of_uniform, vector_len, write_grad,
};
use super::targets::{TargetBlock, Targets};
use crate::error::Result;
use crate::formula::SoftmaxState;
use pulp::{Simd, WithSimd};
use std::iter;
use std::ops::Range;

/// A buffer whose vectors do not cross cache lines.
#[repr(align(64))]
struct Aligned<T>(T);

// ---- Forward

/// Reads the logits of all rows once, and calls `write_row(row, i, state, out)` for each row. There `out` has the outputs of
/// some of the rows, and `i` is the row's index in each of its slices.
pub(super) fn for_each_row<A: Real, O: Send, const N: usize>(
    logits: &StridedRows,
    targets: &Targets<A>,
    axis: InnerAxis,
    out: [&mut [O]; N],
    write_row: &(impl Fn(usize, usize, SoftmaxState<f64>, &mut [&mut [O]; N]) + Sync),
) -> Result<()> {
    let StridedRows { num_rows, first_class, tile_classes, .. } = *logits;
    let all_classes = first_class..first_class + tile_classes;
    let rows_at_once = match axis {
        InnerAxis::Class => 1,
        InnerAxis::Row => num_rows.clamp(1, ROWS_AT_ONCE),
    };
    let segment = match axis {
        InnerAxis::Class => SEGMENT,
        // The states of the segments take at most a 32nd of the logits' memory.
        InnerAxis::Row => (SEGMENT / rows_at_once).max(4 * BLOCK),
    };
    if tile_classes <= segment {
        par_split(out, rows_at_once, tile_classes, &|first, mut out| {
            let rows = first..first + out[0].len();
            let emit = |row, state| write_row(row, row - first, state, &mut out);
            let classes = all_classes.clone();
            dispatch(ForwardRows { logits, targets, axis, rows, classes, emit });
        });
        return Ok(());
    }
    // Several threads share a long row. The states of the segments of the same rows are adjacent.
    let segments = tile_classes.div_ceil(segment);
    let mut states = default_vec(num_rows.div_ceil(rows_at_once) * segments * rows_at_once)?;
    par_split([&mut states], rows_at_once, segment, &|first, [states]| {
        for (i, states) in states.chunks_mut(rows_at_once).enumerate() {
            let i = first / rows_at_once + i;
            let row = i / segments * rows_at_once;
            let class = first_class + i % segments * segment;
            let rows = row..num_rows.min(row + rows_at_once);
            let classes = class..all_classes.end.min(class + segment);
            let emit = |at: usize, state| states[at - row] = state;
            dispatch(ForwardRows { logits, targets, axis, rows, classes, emit });
        }
    });
    par_split(out, 1, segments, &|first, mut out| {
        for i in 0..out[0].len() {
            let row = first + i;
            let of_group = &states[row / rows_at_once * segments * rows_at_once..];
            let of_row = of_group.iter().skip(row % rows_at_once).step_by(rows_at_once);
            let state = of_row.take(segments).fold(SoftmaxState::default(), |a, &b| a.merge(b));
            write_row(row, i, state, &mut out);
        }
    });
    Ok(())
}

/// Reads a range of the classes of some rows once, and emits the state of each row.
struct ForwardRows<'a, A, F> {
    logits: &'a StridedRows<'a>,
    targets: &'a Targets<'a, A>,
    axis: InnerAxis,
    rows: Range<usize>,
    classes: Range<usize>,
    emit: F,
}

impl<A: Real, F: FnMut(usize, SoftmaxState<f64>)> WithSimd for ForwardRows<'_, A, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match self.axis {
            InnerAxis::Class => self.row_by_row(simd),
            InnerAxis::Row => self.side_by_side(simd),
        }
    }
}

impl<A: Real, F: FnMut(usize, SoftmaxState<f64>)> ForwardRows<'_, A, F> {
    #[inline(always)]
    fn row_by_row<S: Simd>(&mut self, simd: S) {
        let mut buffers = Aligned([[A::ZERO; BLOCK]; 2]);
        let [x_buffer, r_buffer] = &mut buffers.0;
        for row in self.rows.clone() {
            let mut state = SoftmaxState::default();
            let mut class = self.classes.start;
            while class < self.classes.end && !self.targets.is_ignored(row) {
                let (len, padded) = block_len::<A, S>(self.classes.end - class);
                let pos = BlockPos { row, class, axis: InnerAxis::Class };
                let x = self.logits.block(pos, len, &mut x_buffer[..padded]);
                let max = A::from_f64(state.max.max(block_max(simd, x).to_f64()));
                let block = match self.targets.block(row, class, len, &mut r_buffer[..padded]) {
                    TargetBlock::Uniform(r, label) => {
                        let state = state_of_uniform(simd, max, x, r);
                        label.map_or(state, |(i, on_value)| {
                            let label_delta = on_value.to_f64() - r.to_f64();
                            state.add_to_target(label_delta, x[i].to_f64())
                        })
                    }
                    TargetBlock::Slice(r) => state_of_slice(simd, max, x, r),
                };
                state = state.merge(block);
                class += len;
            }
            (self.emit)(row, state);
        }
    }

    /// Reads ignored rows too, without effect.
    #[inline(always)]
    fn side_by_side<S: Simd>(&mut self, simd: S) {
        let mut buffers = Aligned([[[A::ZERO; ROWS_AT_ONCE]; FEW_CLASSES]; 2]);
        let [x, r] = &mut buffers.0;
        for row in self.rows.clone().step_by(ROWS_AT_ONCE) {
            let len = ROWS_AT_ONCE.min(self.rows.end - row);
            let mut states = SoftmaxState::<[A; ROWS_AT_ONCE]>::EMPTY_ROWS;
            for first in self.classes.clone().step_by(FEW_CLASSES) {
                let classes = first..self.classes.end.min(first + FEW_CLASSES);
                let count = classes.len();
                for (class, (x, r)) in classes.zip(x.iter_mut().zip(&mut *r)) {
                    let pos = BlockPos { row, class, axis: InnerAxis::Row };
                    self.logits.load(pos, &mut x[..len]);
                    self.targets.load(pos, &mut r[..len]);
                }
                states.add_classes(simd, len, &x[..count], &r[..count]);
            }
            for i in 0..len {
                (self.emit)(row + i, states.row(i));
            }
        }
    }
}

/// The length of the next block of the remaining classes, and the length that it is padded to. It is a full block, else all
/// whole chunks, else the rest, padded to one chunk.
#[inline(always)]
fn block_len<A: Real, S: Simd>(remaining: usize) -> (usize, usize) {
    let chunk = UNROLL * vector_len::<A, S>();
    match remaining {
        BLOCK.. => (BLOCK, BLOCK),
        _ if remaining >= chunk => (remaining / chunk * chunk, remaining / chunk * chunk),
        _ => (remaining, chunk),
    }
}

// ---- Backward

/// The inputs of the gradient.
pub(super) struct GradInputs<'a, A> {
    pub logits: &'a StridedRows<'a>,
    pub targets: &'a Targets<'a, A>,
    /// The number of elements between one class and the next of the contiguous gradient.
    pub inner_size: usize,
    /// The coefficients of each row, followed by [`ROWS_AT_ONCE`] others, so that vectors may begin at any row.
    pub coeffs: GradCoeffs<Vec<A>>,
}

impl<A: Real> GradInputs<'_, A> {
    /// A piece of the gradient must begin at a multiple of this.
    pub(super) fn unit(&self) -> usize {
        let unit = match (self.inner_size, self.logits.tile_classes) {
            (1, tile_classes @ ..=FEW_CLASSES) => ROWS_AT_ONCE * tile_classes,
            (1, tile_classes) => tile_classes,
            (inner_size, _) => inner_size,
        };
        unit.min(SEGMENT)
    }

    /// Writes a piece of the gradient, from its element `start` on.
    pub(super) fn write<T: Element<Real = A>>(&self, start: usize, out: &mut SliceWriter<T>) {
        dispatch(WriteGrad { grad: self, start, out });
    }
}

struct WriteGrad<'a, 'b, T: Element> {
    grad: &'a GradInputs<'a, T::Real>,
    start: usize,
    out: &'a mut SliceWriter<'b, T>,
}

impl<T: Element> WithSimd for WriteGrad<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.grad.inner_size, self.grad.logits.tile_classes) {
            (1, ..=FEW_CLASSES) => self.side_by_side(simd),
            (1, _) => self.row_by_row(simd),
            _ => self.class_by_class(simd),
        }
    }
}

impl<T: Element> WriteGrad<'_, '_, T> {
    /// For classes that are adjacent in memory.
    #[inline(always)]
    fn row_by_row<S: Simd>(self, simd: S) {
        let Self { grad, start, out } = self;
        let GradInputs { logits, targets, .. } = *grad;
        let StridedRows { first_class, tile_classes, .. } = *logits;
        let end = first_class + tile_classes;
        let mut buffers = Aligned([[T::Real::ZERO; BLOCK]; 3]);
        let [x_buffer, r_buffer, gradient] = &mut buffers.0;
        let mut rounded = [T::default(); BLOCK];
        let (mut row, mut class) = (start / tile_classes, first_class + start % tile_classes);
        while out.remaining() > 0 {
            let remaining = (end - class).min(out.remaining());
            let (len, padded) = block_len::<T::Real, S>(remaining);
            if targets.is_ignored(row) {
                gradient[..len].fill(T::Real::ZERO);
            } else {
                let pos = BlockPos { row, class, axis: InnerAxis::Class };
                let x = logits.block(pos, len, &mut x_buffer[..padded]);
                let coeffs = iter::repeat(grad.coeffs.splat(simd, row));
                match targets.block(row, class, len, &mut r_buffer[..padded]) {
                    TargetBlock::Uniform(r, label) => {
                        let r = iter::repeat(T::Real::splat(simd, r));
                        write_grad(simd, coeffs.clone(), x, r, gradient);
                        if let Some((i, on_value)) = label {
                            let x = [x[i]; BLOCK];
                            let r = iter::once(T::Real::splat(simd, on_value));
                            write_grad(simd, coeffs, &x, r, r_buffer);
                            gradient[i] = r_buffer[0];
                        }
                    }
                    TargetBlock::Slice(r) => {
                        let r = T::Real::as_vectors::<S>(r).iter().copied();
                        write_grad(simd, coeffs, x, r, gradient);
                    }
                }
            }
            out.write(T::round(&gradient[..len], &mut rounded));
            class += len;
            if class == end {
                (row, class) = (row + 1, first_class);
            }
        }
    }

    /// For so few adjacent classes that vectors hold the rows instead.
    #[inline(always)]
    fn side_by_side<S: Simd>(self, simd: S) {
        let StridedRows { first_class, tile_classes, .. } = *self.grad.logits;
        let mut scratch = Scratch::new();
        let mut tile = [T::default(); ROWS_AT_ONCE * FEW_CLASSES];
        let mut row = self.start / tile_classes;
        while self.out.remaining() > 0 {
            let len = ROWS_AT_ONCE.min(self.out.remaining() / tile_classes);
            for i in 0..tile_classes {
                let pos = BlockPos { row, class: first_class + i, axis: InnerAxis::Row };
                let gradient = scratch.grad(simd, self.grad, pos, len);
                let column = tile.iter_mut().skip(i).step_by(tile_classes);
                column.zip(gradient).for_each(|(out, &value)| *out = value);
            }
            self.out.write(&tile[..len * tile_classes]);
            row += len;
        }
    }

    /// For rows that are adjacent in memory.
    #[inline(always)]
    fn class_by_class<S: Simd>(self, simd: S) {
        let StridedRows { first_class, tile_classes, .. } = *self.grad.logits;
        let inner_size = self.grad.inner_size;
        let mut scratch = Scratch::new();
        let (line, mut inner) = (self.start / inner_size, self.start % inner_size);
        let (mut outer, mut class) = (line / tile_classes, first_class + line % tile_classes);
        while self.out.remaining() > 0 {
            let len = ROWS_AT_ONCE.min(inner_size - inner).min(self.out.remaining());
            let pos = BlockPos { row: outer * inner_size + inner, class, axis: InnerAxis::Row };
            self.out.write(scratch.grad(simd, self.grad, pos, len));
            inner += len;
            if inner == inner_size {
                (inner, class) = (0, class + 1);
            }
            if class == first_class + tile_classes {
                (class, outer) = (first_class, outer + 1);
            }
        }
    }
}

/// Buffers for one class of several rows.
#[repr(align(64))]
struct Scratch<T: Element> {
    x: [T::Real; ROWS_AT_ONCE],
    r: [T::Real; ROWS_AT_ONCE],
    gradient: [T::Real; ROWS_AT_ONCE],
    rounded: [T; ROWS_AT_ONCE],
}

impl<T: Element> Scratch<T> {
    #[inline(always)]
    fn new() -> Self {
        let zeros = [T::Real::ZERO; ROWS_AT_ONCE];
        Self { x: zeros, r: zeros, gradient: zeros, rounded: [T::default(); ROWS_AT_ONCE] }
    }

    /// The gradient of one class in `len` rows.
    #[inline(always)]
    fn grad<S: Simd>(
        &mut self,
        simd: S,
        grad: &GradInputs<T::Real>,
        pos: BlockPos,
        len: usize,
    ) -> &[T] {
        grad.logits.load(pos, &mut self.x[..len]);
        grad.targets.load(pos, &mut self.r[..len]);
        let vectors = len.div_ceil(vector_len::<T::Real, S>());
        let r = T::Real::as_vectors::<S>(&self.r).iter().copied().take(vectors);
        write_grad(simd, grad.coeffs.vectors(pos.row), &self.x, r, &mut self.gradient);
        let gradient = &mut self.gradient[..len];
        grad.targets.zero_ignored(pos.row, gradient);
        T::round(gradient, &mut self.rounded)
    }
}
