//! The loops over rows: forward reads logits into softmax states, backward writes gradients.

use super::dtype::{Element, Real};
use super::input::{BlockPos, FEW_CLASSES, InnerAxis, StridedRows};
use super::parallel::{BLOCK, SEGMENT, SliceWriter, default_vec, par_split};
use super::simd::dispatch;
use super::softmax::{
    GradCoeffs, ROWS_AT_ONCE, block_max, chunk_len, grad_of_constant, grad_of_rows, grad_of_slice,
    state_of_constant, state_of_slice,
};
use super::targets::{TargetBlock, Targets};
use crate::error::Result;
use crate::formula::SoftmaxState;
use candle_core::WithDType;
use pulp::{Simd, WithSimd};
use std::ops::Range;

// ---- Forward

/// Reads the logits of all rows once, and calls `write_row(row, i, state, out)` with the state of each. `write_row` writes its
/// results to index `i` of each slice of `out`, which hold an element for each of some rows.
pub(super) fn for_each_row<T: Element, O: Send, const N: usize>(
    logits: &StridedRows,
    targets: &Targets<T::Real>,
    axis: InnerAxis,
    classes: Range<usize>,
    out: [&mut [O]; N],
    write_row: &(impl Fn(usize, usize, SoftmaxState<f64>, &mut [&mut [O]; N]) + Sync),
) -> Result<()> {
    let (num_rows, num_classes) = (logits.num_rows, classes.len());
    let rows_at_once = match axis {
        InnerAxis::Class => 1,
        InnerAxis::Row => num_rows.clamp(1, ROWS_AT_ONCE),
    };
    let segment = match axis {
        InnerAxis::Class => SEGMENT,
        // The states of the segments take about a 64th of the logits' memory.
        InnerAxis::Row => (SEGMENT / rows_at_once).max(4 * BLOCK),
    };
    if num_classes <= segment {
        par_split(out, rows_at_once, num_classes, &|first, mut out| {
            let rows = first..first + out[0].len();
            let emit = |row, state| write_row(row, row - first, state, &mut out);
            let classes = classes.clone();
            dispatch(ForwardRows::<T, _> { logits, targets, axis, rows, classes, emit });
        });
        return Ok(());
    }
    // Several threads share a long row. The states of the segments of the same rows are adjacent.
    let segments = num_classes.div_ceil(segment);
    let mut states = default_vec(num_rows.div_ceil(rows_at_once) * segments * rows_at_once)?;
    par_split([&mut states], rows_at_once, segment, &|first, [states]| {
        for (i, states) in states.chunks_mut(rows_at_once).enumerate() {
            let i = first / rows_at_once + i;
            let row = i / segments * rows_at_once;
            let class = classes.start + i % segments * segment;
            let rows = row..num_rows.min(row + rows_at_once);
            let classes = class..classes.end.min(class + segment);
            let emit = |at: usize, state| states[at - row] = state;
            dispatch(ForwardRows::<T, _> { logits, targets, axis, rows, classes, emit });
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
struct ForwardRows<'a, T: Element, F> {
    logits: &'a StridedRows<'a>,
    targets: &'a Targets<'a, T::Real>,
    axis: InnerAxis,
    rows: Range<usize>,
    classes: Range<usize>,
    emit: F,
}

impl<T: Element, F: FnMut(usize, SoftmaxState<f64>)> WithSimd for ForwardRows<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        match self.axis {
            InnerAxis::Class => self.row_by_row(simd),
            InnerAxis::Row => self.side_by_side(simd),
        }
    }
}

impl<T: Element, F: FnMut(usize, SoftmaxState<f64>)> ForwardRows<'_, T, F> {
    #[inline(always)]
    fn row_by_row<S: Simd>(&mut self, simd: S) {
        let mut x_buffer = [T::Real::ZERO; BLOCK];
        let mut r_buffer = [T::Real::ZERO; BLOCK];
        let mut copy = [T::default(); BLOCK];
        for row in self.rows.clone() {
            let mut state = SoftmaxState::default();
            if self.targets.is_ignored(row) {
                (self.emit)(row, state);
                continue;
            }
            let mut class = self.classes.start;
            while class < self.classes.end {
                let (len, padded) = block_len::<T::Real, S>(self.classes.end - class);
                let pos = BlockPos { row, class, axis: InnerAxis::Class };
                let max_with = |block: T::Real| T::Real::from_f64(state.max.max(block.to_f64()));
                let block = match self.targets.block(row, class, len, &mut r_buffer[..padded]) {
                    TargetBlock::Constant(r, label) => {
                        let block = if T::SLOW_TO_VECTORS {
                            let x = &mut x_buffer[..len];
                            self.logits.load(pos, x);
                            state_of_constant(simd, max_with(block_max(simd, x)), x, r)
                        } else {
                            let x = self.logits.classes::<T>(pos, len, &mut copy);
                            state_of_constant(simd, max_with(block_max(simd, x)), x, r)
                        };
                        match label {
                            Some((i, label_delta)) => {
                                let mut logit = [T::Real::ZERO];
                                self.logits.load(pos.at_class(class + i), &mut logit);
                                block.add_to_target(label_delta, logit[0].to_f64())
                            }
                            None => block,
                        }
                    }
                    TargetBlock::Slice(r) => {
                        let x = match self.logits.as_contiguous(pos, len) {
                            Some(x) if len == padded => x,
                            _ => {
                                self.logits.load(pos, &mut x_buffer[..len]);
                                x_buffer[len..padded].fill(T::Real::NEG_INFINITY);
                                &x_buffer[..padded]
                            }
                        };
                        state_of_slice(simd, max_with(block_max(simd, x)), x, r)
                    }
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
        let mut x = [[T::Real::ZERO; ROWS_AT_ONCE]; FEW_CLASSES];
        let mut r = [[T::Real::ZERO; ROWS_AT_ONCE]; FEW_CLASSES];
        for row in self.rows.clone().step_by(ROWS_AT_ONCE) {
            let len = ROWS_AT_ONCE.min(self.rows.end - row);
            let mut states = SoftmaxState::<[T::Real; ROWS_AT_ONCE]>::EMPTY_ROWS;
            for first in self.classes.clone().step_by(FEW_CLASSES) {
                let classes = first..self.classes.end.min(first + FEW_CLASSES);
                let count = classes.len();
                for (class, (x, r)) in classes.zip(x.iter_mut().zip(&mut r)) {
                    let pos = BlockPos { row, class, axis: InnerAxis::Row };
                    self.logits.load(pos, &mut x[..len]);
                    self.targets.write(pos, &mut r[..len]);
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
    let chunk = chunk_len::<A, S>();
    match remaining {
        BLOCK.. => (BLOCK, BLOCK),
        _ if remaining >= chunk => (remaining / chunk * chunk, remaining / chunk * chunk),
        _ => (remaining, chunk),
    }
}

// ---- Backward

/// The order in which the gradient is written: that of its memory.
#[derive(Clone, Copy)]
pub(super) enum GradOrder {
    /// The classes of a row are adjacent.
    RowByRow,
    /// The same, but with so few classes that several rows are worked on side by side.
    SideBySide,
    /// The rows of a class are adjacent.
    ClassByClass,
}

/// The inputs of the gradient, apart from the logits.
pub(super) struct GradInputs<'a, T: Element> {
    pub targets: &'a Targets<'a, T::Real>,
    pub order: GradOrder,
    pub first_class: usize,
    /// The number of classes of these logits.
    pub num_classes: usize,
    /// The number of elements between one class and the next of the contiguous gradient.
    pub inner_size: usize,
    pub coeffs: GradCoeffs<&'a [T::Real]>,
}

impl<T: Element> GradInputs<'_, T> {
    /// A piece of the gradient must begin at a multiple of this.
    pub(super) fn piece_multiple(&self) -> usize {
        let multiple = match self.order {
            GradOrder::RowByRow => self.num_classes,
            GradOrder::SideBySide => ROWS_AT_ONCE * self.num_classes,
            GradOrder::ClassByClass => self.inner_size,
        };
        multiple.min(SEGMENT)
    }

    /// Writes a piece of the gradient, from its element `start` on.
    pub(super) fn write(&self, logits: &StridedRows, start: usize, out: &mut SliceWriter<T>) {
        dispatch(WriteGrad { grad: self, logits, start, out });
    }

    #[inline(always)]
    fn row_coeffs(&self, row: usize) -> GradCoeffs<T::Real> {
        self.coeffs.map(|values| values[row])
    }
}

struct WriteGrad<'a, 'b, T: Element> {
    grad: &'a GradInputs<'a, T>,
    logits: &'a StridedRows<'a>,
    start: usize,
    out: &'a mut SliceWriter<'b, T>,
}

impl<T: Element> WithSimd for WriteGrad<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.grad.order {
            GradOrder::RowByRow => self.row_by_row(simd),
            GradOrder::SideBySide => self.side_by_side(simd),
            GradOrder::ClassByClass => self.class_by_class(simd),
        }
    }
}

impl<T: Element> WriteGrad<'_, '_, T> {
    #[inline(always)]
    fn row_by_row<S: Simd>(self, simd: S) {
        let Self { grad, logits, start, out } = self;
        let GradInputs { targets, first_class, num_classes, .. } = *grad;
        let end = first_class + num_classes;
        let mut x_buffer = [T::Real::ZERO; BLOCK];
        let mut r_buffer = [T::Real::ZERO; BLOCK];
        let mut rounded = [T::default(); BLOCK];
        let (mut row, mut class) = (start / num_classes, first_class + start % num_classes);
        while out.remaining() > 0 {
            let remaining = (end - class).min(out.remaining());
            let (len, padded) = block_len::<T::Real, S>(remaining);
            let pos = BlockPos { row, class, axis: InnerAxis::Class };
            if targets.is_ignored(row) {
                out.write(&[T::default(); BLOCK][..len]);
            } else {
                let coeffs = grad.row_coeffs(row);
                match targets.block(row, class, len, &mut r_buffer[..padded]) {
                    TargetBlock::Constant(r, label) => {
                        let x = logits.classes::<T>(pos, len, &mut rounded);
                        grad_of_constant(simd, coeffs, x, r, |chunk| out.write(chunk));
                        if let Some((i, _)) = label {
                            let pos = pos.at_class(class + i);
                            let mut r = [T::Real::ZERO];
                            targets.write(pos, &mut r);
                            logits.load(pos, &mut x_buffer[..1]);
                            let x = &mut x_buffer[..chunk_len::<T::Real, S>()];
                            grad_of_slice(simd, coeffs, x, &[r[0]; BLOCK]);
                            T::round(&x[..1], &mut rounded[..1]);
                            out.overwrite(len - i, rounded[0]);
                        }
                    }
                    TargetBlock::Slice(r) => {
                        let x = &mut x_buffer[..padded];
                        logits.load(pos, &mut x[..len]);
                        grad_of_slice(simd, coeffs, x, r);
                        T::round(x, &mut rounded[..padded]);
                        out.write(&rounded[..len]);
                    }
                }
            }
            class += len;
            if class == end {
                (row, class) = (row + 1, first_class);
            }
        }
    }

    #[inline(always)]
    fn side_by_side<S: Simd>(self, simd: S) {
        let GradInputs { first_class, num_classes, .. } = *self.grad;
        let mut scratch = Scratch::new();
        let mut tile = [T::default(); ROWS_AT_ONCE * FEW_CLASSES];
        let mut row = self.start / num_classes;
        while self.out.remaining() > 0 {
            let len = ROWS_AT_ONCE.min(self.out.remaining() / num_classes);
            for i in 0..num_classes {
                let pos = BlockPos { row, class: first_class + i, axis: InnerAxis::Row };
                let gradient = scratch.grad(simd, self.grad, self.logits, pos, len);
                let column = tile.iter_mut().skip(i).step_by(num_classes);
                column.zip(gradient).for_each(|(out, &value)| *out = value);
            }
            self.out.write(&tile[..len * num_classes]);
            row += len;
        }
    }

    #[inline(always)]
    fn class_by_class<S: Simd>(self, simd: S) {
        let GradInputs { first_class, num_classes, inner_size, .. } = *self.grad;
        let mut scratch = Scratch::new();
        let (line, mut inner) = (self.start / inner_size, self.start % inner_size);
        let (mut outer, mut class) = (line / num_classes, first_class + line % num_classes);
        while self.out.remaining() > 0 {
            let len = ROWS_AT_ONCE.min(inner_size - inner).min(self.out.remaining());
            let pos = BlockPos { row: outer * inner_size + inner, class, axis: InnerAxis::Row };
            self.out.write(scratch.grad(simd, self.grad, self.logits, pos, len));
            inner += len;
            if inner == inner_size {
                (inner, class) = (0, class + 1);
            }
            if class == first_class + num_classes {
                (class, outer) = (first_class, outer + 1);
            }
        }
    }
}

/// Buffers for one class of several rows.
struct Scratch<T: Element> {
    x: [T::Real; ROWS_AT_ONCE],
    r: [T::Real; ROWS_AT_ONCE],
    /// Copies of the rows' numbers, padded to whole vectors.
    rows: GradCoeffs<[T::Real; ROWS_AT_ONCE]>,
    rounded: [T; ROWS_AT_ONCE],
}

impl<T: Element> Scratch<T> {
    #[inline(always)]
    fn new() -> Self {
        let zeros = [T::Real::ZERO; ROWS_AT_ONCE];
        let rows = GradCoeffs { max: zeros, exp_scale: zeros, neg_grad_output: zeros };
        Self { x: zeros, r: zeros, rows, rounded: [T::default(); ROWS_AT_ONCE] }
    }

    /// The gradient of one class in `len` rows.
    #[inline(always)]
    fn grad<S: Simd>(
        &mut self,
        simd: S,
        grad: &GradInputs<T>,
        logits: &StridedRows,
        pos: BlockPos,
        len: usize,
    ) -> &[T] {
        logits.load(pos, &mut self.x[..len]);
        grad.targets.write(pos, &mut self.r[..len]);
        let rows = grad.coeffs.map(|values| &values[pos.row..pos.row + len]);
        let padded = len.next_multiple_of(chunk_len::<T::Real, S>());
        let (x, r) = (&mut self.x[..padded], &self.r[..padded]);
        if len == padded {
            grad_of_rows(simd, rows, x, r);
        } else {
            self.rows.max[..len].copy_from_slice(rows.max);
            self.rows.exp_scale[..len].copy_from_slice(rows.exp_scale);
            self.rows.neg_grad_output[..len].copy_from_slice(rows.neg_grad_output);
            let GradCoeffs { max, exp_scale, neg_grad_output } = &self.rows;
            let rows = GradCoeffs { max: &max[..], exp_scale, neg_grad_output };
            grad_of_rows(simd, rows.map(|values| &values[..padded]), x, r);
        }
        let rounded = &mut self.rounded[..padded];
        T::round(x, rounded);
        grad.targets.zero_ignored(pos.row, &mut rounded[..len]);
        &self.rounded[..len]
    }
}
