//! The loops over rows: forward reads logits into softmax states, backward writes gradients.

use super::dtype::{Element, Real, UNROLL};
use super::input::{BlockPos, FEW_CLASSES, InnerAxis, Logits};
use super::parallel::{BLOCK, SEGMENT, SliceWriter, default_vec, par_split};
use super::side_by_side::{ClassGroup, RowStates, Rows};
use super::simd::dispatch;
use super::softmax::{
    Aligned, GradCoeffs, ROWS_AT_ONCE, add_shares, block_max, position_of, state_of_slice,
    state_of_uniform, unmasked_of_slice, vector_len, write_grad,
};
use super::state::{Extras, RowState};
use super::targets::{TargetBlock, Targets};
use crate::error::Result;
use pulp::{Simd, WithSimd};
use std::ops::Range;
use std::{iter, mem};

// ---- Forward

/// Reads the logits of all rows once, and calls `write_row(row, i, state, out)` for each row. There `out` has the outputs of
/// some of the rows, and `i` is the row's index in each of its slices. The states have the extras E.
pub(super) fn for_each_row<E: Extras, A: Real, O: Send, const N: usize>(
    logits: &Logits<A>,
    targets: &Targets<A>,
    axis: InnerAxis,
    out: [&mut [O]; N],
    write_row: &(impl Fn(usize, usize, RowState<E>, &mut [&mut [O]; N]) + Sync),
) -> Result<()> {
    let (num_rows, all_classes) = (logits.num_rows(), logits.classes());
    let tile_classes = all_classes.len();
    let rows_at_once = match axis {
        InnerAxis::Class => 1,
        InnerAxis::Row => num_rows.clamp(1, ROWS_AT_ONCE),
    };
    let segment = match axis {
        InnerAxis::Class => SEGMENT,
        // The states of the segments take at most a 12th of the logits' memory.
        InnerAxis::Row => (SEGMENT / rows_at_once).max(4 * BLOCK),
    };
    if tile_classes <= segment {
        par_split(out, rows_at_once, tile_classes, &|first, mut out| {
            let len = out[0].len();
            let mut states = vec![RowState::default(); len.min(STATES_AT_ONCE)];
            for start in (0..len).step_by(STATES_AT_ONCE) {
                let states = &mut states[..STATES_AT_ONCE.min(len - start)];
                let (row, classes) = (first + start, all_classes.clone());
                dispatch(ForwardRows { logits, targets, axis, row, classes, states });
                for (i, state) in states.iter().enumerate() {
                    write_row(row + i, start + i, *state, &mut out);
                }
            }
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
            let class = all_classes.start + i % segments * segment;
            let classes = class..all_classes.end.min(class + segment);
            let states = &mut states[..rows_at_once.min(num_rows - row)];
            dispatch(ForwardRows { logits, targets, axis, row, classes, states });
        }
    });
    par_split(out, 1, segments, &|first, mut out| {
        for i in 0..out[0].len() {
            let row = first + i;
            let of_group = &states[row / rows_at_once * segments * rows_at_once..];
            let of_row = of_group.iter().skip(row % rows_at_once).step_by(rows_at_once);
            let merge = |a: RowState<E>, &b| a.merge(b);
            let state = of_row.take(segments).fold(RowState::default(), merge);
            write_row(row, i, state, &mut out);
        }
    });
    Ok(())
}

/// Rows whose states are computed before their results are written.
const STATES_AT_ONCE: usize = 8 * ROWS_AT_ONCE;

/// Reads a range of the classes of some rows once, and writes the states of the rows, from `row` on.
struct ForwardRows<'a, E, A> {
    logits: &'a Logits<'a, A>,
    targets: &'a Targets<'a, A>,
    axis: InnerAxis,
    row: usize,
    classes: Range<usize>,
    states: &'a mut [RowState<E>],
}

impl<E: Extras, A: Real> WithSimd for ForwardRows<'_, E, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.axis {
            InnerAxis::Class => self.row_by_row(simd),
            InnerAxis::Row => self.side_by_side(simd),
        }
    }
}

impl<E: Extras, A: Real> ForwardRows<'_, E, A> {
    #[inline(always)]
    fn row_by_row<S: Simd>(mut self, simd: S) {
        let mut buffers = Aligned([[A::ZERO; BLOCK]; 2]);
        let [x_buffer, r_buffer] = &mut buffers.0;
        let states = mem::take(&mut self.states);
        for (row, out) in (self.row..).zip(states) {
            let mut state = RowState::<E>::default();
            if let Some(extras) = state.extras.get() {
                extras.prediction = self.classes.start as f64;
            }
            let is_ignored = self.targets.is_ignored(row);
            let mut class = self.classes.start;
            while class < self.classes.end && !is_ignored {
                let block = self.block(simd, row, class, x_buffer);
                state = self.add_block(simd, state, row, class, block, r_buffer);
                class += block.1;
            }
            if let Some(extras) = state.extras.get()
                && !is_ignored
            {
                // The block of the largest logit is known, and is searched once.
                let (x, _) = self.block(simd, row, extras.prediction as usize, x_buffer);
                extras.prediction += position_of(simd, A::from_f64(state.softmax.max), x) as f64;
            }
            *out = state;
        }
    }

    /// The block of a row's logits that begins at a class, padded, and its number of classes.
    #[inline(always)]
    fn block<'b, S: Simd>(
        &'b self,
        simd: S,
        row: usize,
        class: usize,
        buffer: &'b mut [A; BLOCK],
    ) -> (&'b [A], usize) {
        let (len, padded) = block_len::<A, S>(self.classes.end - class);
        let pos = BlockPos { row, class, axis: InnerAxis::Class };
        (self.logits.block(simd, pos, len, &mut buffer[..padded], None), len)
    }

    /// Adds a block of classes to the state of a row, whose prediction is the first class of the block with the largest logit.
    /// The first `len` logits of the block count.
    #[inline(always)]
    fn add_block<S: Simd>(
        &self,
        simd: S,
        state: RowState<E>,
        row: usize,
        class: usize,
        (x, len): (&[A], usize),
        r_buffer: &mut [A; BLOCK],
    ) -> RowState<E> {
        let r_buffer = &mut r_buffer[..x.len()];
        let largest = block_max(simd, x);
        let max = A::from_f64(state.softmax.max.max(largest.to_f64()));
        let (softmax, exp_dot) = match self.targets.block(row, class, len, r_buffer) {
            TargetBlock::Uniform(r, label) => {
                let (softmax, exp_dot) = state_of_uniform::<E, A, S>(simd, max, x, r);
                let softmax = label.map_or(softmax, |(i, on_value)| {
                    let label_delta = on_value.to_f64() - r.to_f64();
                    softmax.add_to_target(label_delta, x[i].to_f64())
                });
                (softmax, exp_dot)
            }
            TargetBlock::Slice(r) => state_of_slice::<E, A, S>(simd, max, x, r),
        };
        let mut block = RowState { softmax, extras: E::default() };
        if let Some(extras) = block.extras.get() {
            extras.exp_dot = match largest.to_f64() == f64::INFINITY {
                // ∞ − ∞ is NaN.
                true => x.iter().filter(|x| x.to_f64().is_nan()).map(|x| x.to_f64()).sum(),
                false => exp_dot,
            };
            extras.prediction = class as f64;
            if let Some(i) = self.targets.label_in(row, class, len) {
                extras.label_logit = x[i].to_f64();
            }
            if self.targets.spreads_over_unmasked() {
                let (weights, padding) = r_buffer.split_at_mut(len);
                self.targets.scaled_class_weights(class, weights);
                padding.fill(A::ZERO);
                [extras.num_unmasked, extras.unmasked_sum, extras.unmasked_dot] =
                    unmasked_of_slice(simd, max, x, r_buffer);
            }
        }
        state.merge(block)
    }

    /// Reads ignored rows too, without effect.
    #[inline(always)]
    fn side_by_side<S: Simd>(mut self, simd: S) {
        // Zeros for all classes of a group would take longer than the rest with few classes.
        let group_len = self.classes.len().min(FEW_CLASSES);
        let mut buffer = vec![Aligned([A::ZERO; ROWS_AT_ONCE]); 2 * group_len];
        let (x, r) = buffer.split_at_mut(group_len);
        let mut group_states = RowStates::<A>::new::<E>();
        let states = mem::take(&mut self.states);
        for (i, out) in states.chunks_mut(ROWS_AT_ONCE).enumerate() {
            let rows = self.row + i * ROWS_AT_ONCE..self.row + i * ROWS_AT_ONCE + out.len();
            // With one group of classes, its states are those of the rows.
            let mut all_states = None;
            group_states.reset_max();
            for first_class in self.classes.clone().step_by(FEW_CLASSES) {
                let classes = first_class..self.classes.end.min(first_class + FEW_CLASSES);
                let is_only = classes == self.classes;
                self.set_to_group(simd, rows.clone(), classes, [&mut *x, r], &mut group_states);
                if !is_only {
                    let all_states = all_states.get_or_insert_with(RowStates::<f64>::new::<E>);
                    all_states.merge::<E, A, S>(simd, rows.len(), first_class, &group_states);
                }
            }
            for (i, out) in out.iter_mut().enumerate() {
                *out = match &all_states {
                    Some(states) => states.row(i, 0),
                    None => group_states.row(i, self.classes.start),
                };
            }
        }
    }

    /// Sets the states of the rows to those over a group of classes. The buffers get the logits and the weighted targets.
    #[inline(always)]
    fn set_to_group<S: Simd>(
        &self,
        simd: S,
        rows: Range<usize>,
        classes: Range<usize>,
        [x, r]: [&mut [Aligned<Rows<A>>]; 2],
        states: &mut RowStates<A>,
    ) {
        let (first_class, count, len) = (classes.start, classes.len(), rows.len());
        for (class, (x, r)) in classes.zip(x.iter_mut().zip(&mut *r)) {
            let pos = BlockPos { row: rows.start, class, axis: InnerAxis::Row };
            self.logits.load(simd, pos, len, &mut x.0, None);
            self.targets.load(pos, &mut r.0[..len]);
        }
        let mut weights = [A::ZERO; FEW_CLASSES];
        let weights = &mut weights[..count];
        let unmasked = E::ARE_WANTED && self.targets.spreads_over_unmasked();
        if unmasked {
            self.targets.scaled_class_weights(first_class, weights);
        }
        let group = ClassGroup {
            logits: &x[..count],
            targets: &r[..count],
            weights: unmasked.then_some(weights),
        };
        states.set_to_group::<E, S>(simd, len, &group);
        if E::ARE_WANTED {
            for (i, row) in rows.enumerate() {
                let label = self.targets.label_in(row, first_class, count);
                states.set_label_logit(i, label.map_or(A::NEG_INFINITY, |k| x[k].0[i]));
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

/// The inputs of the gradient, beside the logits.
pub(super) struct GradInputs<'a, A> {
    pub targets: &'a Targets<'a, A>,
    /// The number of elements between one class and the next of the contiguous gradient.
    pub inner_size: usize,
    /// The coefficients of each row, followed by [`ROWS_AT_ONCE`] others, so that vectors may begin at any row.
    pub coeffs: GradCoeffs<Vec<A>>,
    /// The last field that is saved of each row, and as many others; `None` if it is not saved.
    pub unmasked_shares: Option<Vec<A>>,
}

impl<A: Real> GradInputs<'_, A> {
    /// A piece of the gradient must begin at a multiple of this.
    pub(super) fn unit(&self, tile_classes: usize) -> usize {
        match (self.inner_size, tile_classes) {
            (1, ..=FEW_CLASSES) => ROWS_AT_ONCE * tile_classes,
            (1, _) => tile_classes.min(SEGMENT),
            (inner_size, _) => inner_size.min(SEGMENT),
        }
    }

    /// Writes the gradient of a block of a row's classes, before the slopes of the map. The first `len` logits count.
    #[inline(always)]
    fn write_block<S: Simd>(
        &self,
        simd: S,
        pos: BlockPos,
        len: usize,
        x: &[A],
        r_buffer: &mut [A],
        gradient: &mut [A; BLOCK],
    ) {
        let Self { targets, coeffs, unmasked_shares, .. } = self;
        let BlockPos { row, class, .. } = pos;
        let row_coeffs = iter::repeat(coeffs.splat(simd, row));
        if let Some(shares) = unmasked_shares {
            let mut weights = Aligned([A::ZERO; BLOCK]);
            targets.load(pos, &mut r_buffer[..len]);
            targets.scaled_class_weights(class, &mut weights.0[..len]);
            let share = iter::repeat(A::splat(simd, shares[row]));
            add_shares(simd, share, x, &weights.0[..x.len()], r_buffer);
            let r = A::as_vectors::<S>(r_buffer).iter().copied();
            return write_grad(simd, row_coeffs, x, r, gradient);
        }
        match targets.block(row, class, len, r_buffer) {
            TargetBlock::Uniform(r, label) => {
                let r = iter::repeat(A::splat(simd, r));
                write_grad(simd, row_coeffs.clone(), x, r, gradient);
                if let Some((i, on_value)) = label {
                    let x = [x[i]; BLOCK];
                    let r = iter::once(A::splat(simd, on_value));
                    write_grad(simd, row_coeffs, &x, r, r_buffer);
                    gradient[i] = r_buffer[0];
                }
            }
            TargetBlock::Slice(r) => {
                let r = A::as_vectors::<S>(r).iter().copied();
                write_grad(simd, row_coeffs, x, r, gradient);
            }
        }
    }

    /// Writes a piece of the gradient of these logits, from its element `start` on.
    pub(super) fn write<T: Element<Real = A>>(
        &self,
        logits: &Logits<A>,
        start: usize,
        out: &mut SliceWriter<T>,
    ) {
        dispatch(WriteGrad { grad: self, logits, start, out });
    }
}

struct WriteGrad<'a, 'b, T: Element> {
    grad: &'a GradInputs<'a, T::Real>,
    logits: &'a Logits<'a, T::Real>,
    start: usize,
    out: &'a mut SliceWriter<'b, T>,
}

impl<T: Element> WithSimd for WriteGrad<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match (self.grad.inner_size, self.logits.classes().len()) {
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
        let Self { grad, logits, start, out } = self;
        let targets = grad.targets;
        let classes = logits.classes();
        let mut buffers = Aligned([[T::Real::ZERO; BLOCK]; 4]);
        let [x_buffer, r_buffer, gradient, slopes] = &mut buffers.0;
        let mut rounded = [T::default(); BLOCK];
        let row = start / classes.len();
        let (mut row, mut class) = (row, classes.start + start % classes.len());
        while out.remaining() > 0 {
            let remaining = (classes.end - class).min(out.remaining());
            let (len, padded) = block_len::<T::Real, S>(remaining);
            if targets.is_ignored(row) {
                gradient[..len].fill(T::Real::ZERO);
            } else {
                let pos = BlockPos { row, class, axis: InnerAxis::Class };
                let x = logits.block(simd, pos, len, &mut x_buffer[..padded], Some(slopes));
                grad.write_block(simd, pos, len, x, &mut r_buffer[..padded], gradient);
                logits.apply_slopes(&mut gradient[..len], slopes);
            }
            out.write(T::round(&gradient[..len], &mut rounded));
            class += len;
            if class == classes.end {
                (row, class) = (row + 1, classes.start);
            }
        }
    }

    /// For so few adjacent classes that vectors hold the rows instead.
    #[inline(always)]
    fn side_by_side<S: Simd>(self, simd: S) {
        let classes = self.logits.classes();
        let (first_class, tile_classes) = (classes.start, classes.len());
        let mut scratch = Scratch::new();
        let mut tile = [T::default(); ROWS_AT_ONCE * FEW_CLASSES];
        let mut row = self.start / tile_classes;
        while self.out.remaining() > 0 {
            let len = ROWS_AT_ONCE.min(self.out.remaining() / tile_classes);
            for i in 0..tile_classes {
                let pos = BlockPos { row, class: first_class + i, axis: InnerAxis::Row };
                let gradient = scratch.grad(simd, self.grad, self.logits, pos, len);
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
        let classes = self.logits.classes();
        let (first_class, tile_classes) = (classes.start, classes.len());
        let inner_size = self.grad.inner_size;
        let mut scratch = Scratch::new();
        let (line, mut inner) = (self.start / inner_size, self.start % inner_size);
        let (mut outer, mut class) = (line / tile_classes, first_class + line % tile_classes);
        while self.out.remaining() > 0 {
            let len = ROWS_AT_ONCE.min(inner_size - inner).min(self.out.remaining());
            let pos = BlockPos { row: outer * inner_size + inner, class, axis: InnerAxis::Row };
            self.out.write(scratch.grad(simd, self.grad, self.logits, pos, len));
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
    slopes: [T::Real; ROWS_AT_ONCE],
    rounded: [T; ROWS_AT_ONCE],
}

impl<T: Element> Scratch<T> {
    #[inline(always)]
    fn new() -> Self {
        let zeros = [T::Real::ZERO; ROWS_AT_ONCE];
        let rounded = [T::default(); ROWS_AT_ONCE];
        Self { x: zeros, r: zeros, gradient: zeros, slopes: zeros, rounded }
    }

    /// The gradient of one class in `len` rows.
    #[inline(always)]
    fn grad<S: Simd>(
        &mut self,
        simd: S,
        grad: &GradInputs<T::Real>,
        logits: &Logits<T::Real>,
        pos: BlockPos,
        len: usize,
    ) -> &[T] {
        logits.load(simd, pos, len, &mut self.x, Some(&mut self.slopes));
        grad.targets.load(pos, &mut self.r[..len]);
        if let Some(shares) = &grad.unmasked_shares {
            let mut weight = [T::Real::ZERO];
            grad.targets.scaled_class_weights(pos.class, &mut weight);
            let shares = T::Real::as_vectors::<S>(&shares[pos.row..]).iter().copied();
            add_shares(simd, shares, &self.x, &[weight[0]; ROWS_AT_ONCE], &mut self.r);
        }
        let vectors = len.div_ceil(vector_len::<T::Real, S>());
        let r = T::Real::as_vectors::<S>(&self.r).iter().copied().take(vectors);
        write_grad(simd, grad.coeffs.vectors(pos.row), &self.x, r, &mut self.gradient);
        let gradient = &mut self.gradient[..len];
        logits.apply_slopes(gradient, &self.slopes);
        grad.targets.zero_ignored(pos.row, gradient);
        T::round(gradient, &mut self.rounded)
    }
}
