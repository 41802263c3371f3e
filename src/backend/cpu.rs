//! The kernels on the CPU.
//!
//! Work comes in blocks of [`BLOCK`] elements along one dimension. Contiguous logits are read where they
//! are; others, and coefficients that have to be made, come to the stack first, in the dtype of the
//! arithmetic (`operands`). The same few loops serve them all (`block`, `exp`), written once for every
//! instruction set and dtype (`vector`, `element`). What a range of classes says of its row is a
//! [`Partial`], and two of them merge; that is also how several threads share one long row. Blocks and
//! segments have a fixed size and merge in a fixed order, so the result has the same bits for every
//! number of threads (`parallel`).

mod block;
mod element;
mod exp;
mod operands;
mod parallel;
mod vector;

pub(crate) use operands::check_labels;

use super::{Forward, Problem, Reduce};
use crate::error::{Error, Result};
use block::{
    Partial, ROWS, RowGradient, RowSums, gradient_of_class, gradient_of_equals, gradient_of_row,
    lanes, largest, sums_of_equals, sums_of_row,
};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Tensor, WithDType};
use element::Element;
use half::{bf16, f16};
use operands::{Along, Line, OfRow, Operand, Table, Targets, View, host};
use parallel::{BLOCK, SEGMENT, Sink, build, filled, split};
use pulp::{Arch, Simd};
use std::ops::Range;
use vector::{Kernel, Real, dispatch};

/// Up to so many classes, several rows are worked on side by side.
const FEW_CLASSES: usize = 32;

/// The forward kernel: every row's loss, or their sum.
pub(crate) fn forward(
    problem: &Problem,
    logits: Operand,
    targets: Operand,
    reduce: Reduce,
    statistics: bool,
) -> Result<Forward<CpuStorage>> {
    match logits.0.dtype() {
        DType::BF16 => forward_of::<bf16>(problem, logits, targets, reduce, statistics),
        DType::F16 => forward_of::<f16>(problem, logits, targets, reduce, statistics),
        DType::F32 => forward_of::<f32>(problem, logits, targets, reduce, statistics),
        DType::F64 => forward_of::<f64>(problem, logits, targets, reduce, statistics),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn forward_of<T: Element>(
    problem: &Problem,
    logits: Operand,
    targets: Operand,
    reduce: Reduce,
    statistics: bool,
) -> Result<Forward<CpuStorage>> {
    let num_classes = problem.num_classes;
    // With few classes a row is too short to work on alone.
    let along = match num_classes {
        ..=FEW_CLASSES => Along::Rows,
        _ => Along::of(problem, logits.1.dims()),
    };
    let logits = View::new(logits, problem.class_dim)?;
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<T::Real>::new(problem, table.columns()?, targets)?;
    let num_rows = logits.num_rows;

    let mut losses = filled(num_rows)?;
    let mut of_rows = filled(3 * num_rows)?;
    let (max, rest) = of_rows.split_at_mut(num_rows);
    let (sum, total) = rest.split_at_mut(num_rows);
    let finish = |row: usize, i: usize, whole: Partial, out: &mut [&mut [T::Real]; 4]| {
        let log_sum = whole.sum.ln();
        let lse = whole.max + log_sum;
        let loss = match targets.is_ignored(row) {
            true => 0.,
            // From the left: without z-loss an overflowing square must not become 0·∞.
            false => whole.total * log_sum - whole.shortfall + problem.z_loss * lse * lse,
        };
        let numbers = [loss, whole.max, whole.sum, whole.total];
        for (out, number) in out.iter_mut().zip(numbers) {
            if let Some(out) = out.get_mut(i) {
                *out = T::Real::from_f64(number);
            }
        }
    };

    let arch = Arch::new();
    let (logits, targets) = (&logits, &targets);
    let at_once = match along {
        Along::Classes => 1,
        Along::Rows => num_rows.clamp(1, ROWS),
    };
    let segment = match along {
        Along::Classes => SEGMENT,
        // What each segment says of its rows takes memory too: at most one part in 64 of the logits'.
        Along::Rows => (SEGMENT / at_once).max(4 * BLOCK),
    };
    let out = [&mut losses[..], max, sum, total];
    if num_classes <= segment {
        split(out, at_once, num_classes, &|first, mut out| {
            let rows = first..first + out[0].len();
            let emit = |row, whole| finish(row, row - first, whole, &mut out);
            dispatch(
                arch,
                Sums::<T, _> { logits, targets, along, rows, classes: 0..num_classes, emit },
            );
        });
    } else {
        // A long row occupies several threads. The segments of the same rows lie one after the other.
        let segments = num_classes.div_ceil(segment);
        let mut parts: Vec<Partial> = filled(num_rows.div_ceil(at_once) * segments * at_once)?;
        split([&mut parts], at_once, segment, &|first, [parts]| {
            for (i, parts) in parts.chunks_mut(at_once).enumerate() {
                let i = first / at_once + i;
                let (row, class) = (i / segments * at_once, i % segments * segment);
                let rows = row..num_rows.min(row + at_once);
                let classes = class..num_classes.min(class + segment);
                let emit = |at: usize, part| parts[at - row] = part;
                dispatch(arch, Sums::<T, _> { logits, targets, along, rows, classes, emit });
            }
        });
        split(out, 1, segments, &|first, mut out| {
            for i in 0..out[0].len() {
                let row = first + i;
                let parts = parts[row / at_once * segments * at_once..].iter().skip(row % at_once);
                let parts = parts.step_by(at_once).take(segments);
                let whole = parts.fold(Partial::default(), |whole, &part| whole.merge(part));
                finish(row, i, whole, &mut out);
            }
        });
    }

    let divisor = match reduce {
        Reduce::No => None,
        Reduce::DividedBy(divisor) => Some(divisor),
        Reduce::DividedByWeights => Some(added_up(num_rows, |row| targets.weight(row).to_f64())),
    };
    if let Some(divisor) = divisor {
        let result = added_up(num_rows, |row| losses[row].to_f64()) / divisor;
        losses = vec![T::Real::from_f64(result)];
    }
    let weighted = matches!(reduce, Reduce::DividedByWeights);
    Ok(Forward {
        result: T::Real::to_cpu_storage_owned(losses),
        divisor: divisor.filter(|_| weighted).map(|sum| CpuStorage::F64(vec![sum])),
        statistics: statistics.then(|| T::Real::to_cpu_storage_owned(of_rows)),
    })
}

/// The sum of a number a row, in f64: a million losses added up in f32 would lose half their digits. In
/// several sums side by side, which need not wait for each other.
fn added_up(num_rows: usize, of_row: impl Fn(usize) -> f64) -> f64 {
    let mut sums = [0.; 8];
    for first in (0..num_rows).step_by(sums.len()) {
        for (row, sum) in (first..num_rows).zip(&mut sums) {
            *sum += of_row(row);
        }
    }
    sums.iter().sum()
}

/// Reads a range of the classes of some rows once, and emits what it says of each row.
struct Sums<'a, T: Element, F> {
    logits: &'a View<'a>,
    targets: &'a Targets<'a, T::Real>,
    along: Along,
    rows: Range<usize>,
    classes: Range<usize>,
    emit: F,
}

impl<T: Element, F: FnMut(usize, Partial)> Kernel for Sums<'_, T, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        match self.along {
            Along::Classes => self.row_by_row(simd),
            Along::Rows => self.side_by_side(simd),
        }
    }
}

impl<T: Element, F: FnMut(usize, Partial)> Sums<'_, T, F> {
    #[inline(always)]
    fn row_by_row<S: Simd>(&mut self, simd: S) {
        let mut x = [T::Real::ZERO; BLOCK];
        let mut r = [T::Real::ZERO; BLOCK];
        let mut block = [T::ZERO; BLOCK];
        for row in self.rows.clone() {
            let mut whole = Partial::default();
            if self.targets.is_ignored(row) {
                (self.emit)(row, whole);
                continue;
            }
            let mut class = self.classes.start;
            while class < self.classes.end {
                let (len, padded) = block_len::<T::Real, S>(self.classes.end - class);
                let line = Line { row, class, along: Along::Classes };
                let max_with = |block: T::Real| T::Real::from_f64(whole.max.max(block.to_f64()));
                let part = match self.targets.of_row(row, class, len, &mut r[..padded]) {
                    OfRow::Equal(r, label) => {
                        let lent = self.logits.lend(line, len).and_then(T::as_packed);
                        let x = lent.unwrap_or_else(|| {
                            self.logits.load(line, &mut x[..len]);
                            T::to_packed(&x[..len], &mut block)
                        });
                        let part = sums_of_equals(simd, max_with(largest(simd, x)), x, r);
                        match label {
                            Some((i, surplus)) => {
                                let mut logit = [T::Real::ZERO];
                                self.logits.load(line.at(class + i), &mut logit);
                                part.with_surplus(surplus, logit[0].to_f64())
                            }
                            None => part,
                        }
                    }
                    OfRow::Each(r) => {
                        let x = match self.logits.lend(line, len) {
                            Some(x) if len == padded => x,
                            _ => {
                                self.logits.load(line, &mut x[..len]);
                                x[len..padded].fill(T::Real::NEG_INFINITY);
                                &x[..padded]
                            }
                        };
                        let max = max_with(largest(simd, x));
                        sums_of_row::<T::Packed, S>(simd, max, x, r)
                    }
                };
                whole = whole.merge(part);
                class += len;
            }
            (self.emit)(row, whole);
        }
    }

    /// Ignored rows are read too, for nothing.
    #[inline(always)]
    fn side_by_side<S: Simd>(&mut self, simd: S) {
        let mut x = [[T::Real::ZERO; ROWS]; FEW_CLASSES];
        let mut r = [[T::Real::ZERO; ROWS]; FEW_CLASSES];
        for row in self.rows.clone().step_by(ROWS) {
            let len = ROWS.min(self.rows.end - row);
            let mut sums = RowSums::EMPTY;
            for first in self.classes.clone().step_by(FEW_CLASSES) {
                let classes = first..self.classes.end.min(first + FEW_CLASSES);
                let count = classes.len();
                for (class, (x, r)) in classes.zip(x.iter_mut().zip(&mut r)) {
                    let line = Line { row, class, along: Along::Rows };
                    self.logits.load(line, &mut x[..len]);
                    self.targets.fill(line, &mut r[..len]);
                }
                sums.add(simd, len, &x[..count], &r[..count]);
            }
            for i in 0..len {
                (self.emit)(row + i, sums.row(i));
            }
        }
    }
}

/// How many of the classes that are left make the next block, and up to what it is padded: whole vectors
/// as long as there are, then the rest.
#[inline(always)]
fn block_len<A: Real, S: Simd>(left: usize) -> (usize, usize) {
    let lanes = lanes::<A, S>();
    match left {
        BLOCK.. => (BLOCK, BLOCK),
        _ if left >= lanes => (left / lanes * lanes, left / lanes * lanes),
        _ => (left, lanes),
    }
}

/// The backward kernel: the gradient of the logits, in their dtype and shape, contiguous.
pub(crate) fn backward(
    problem: &Problem,
    logits: Operand,
    targets: Operand,
    upstream: Operand,
    statistics: &Tensor,
) -> Result<CpuStorage> {
    match logits.0.dtype() {
        DType::BF16 => backward_to::<bf16>(problem, logits, targets, upstream, statistics),
        DType::F16 => backward_to::<f16>(problem, logits, targets, upstream, statistics),
        DType::F32 => backward_to::<f32>(problem, logits, targets, upstream, statistics),
        DType::F64 => backward_to::<f64>(problem, logits, targets, upstream, statistics),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn backward_to<T: Element>(
    problem: &Problem,
    logits: Operand,
    targets: Operand,
    upstream: Operand,
    statistics: &Tensor,
) -> Result<CpuStorage> {
    let num_classes = problem.num_classes;
    let dims = logits.1.dims();
    let positions = dims[problem.class_dim + 1..].iter().product::<usize>().max(1);
    let order = match Along::of(problem, dims) {
        Along::Classes if num_classes <= FEW_CLASSES => Order::SideBySide,
        Along::Classes => Order::RowByRow,
        Along::Rows => Order::ClassByClass,
    };
    let logits = View::new(logits, problem.class_dim)?;
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<T::Real>::new(problem, table.columns()?, targets)?;
    let num_rows = logits.num_rows;

    let statistics = statistics.storage_and_layout().0;
    let statistics = T::Real::cpu_storage_as_slice(host(&statistics)?)?;
    let (max, rest) = statistics.split_at(num_rows);
    let (sum, total) = rest.split_at(num_rows);
    let mut scale: Vec<T::Real> = filled(num_rows)?;
    let mut against: Vec<T::Real> = filled(num_rows)?;
    let upstream = View::new(upstream, upstream.1.shape().rank())?;
    split([&mut scale, &mut against], BLOCK, 1, &|first, [scale, against]| {
        let blocks = scale.chunks_mut(BLOCK).zip(against.chunks_mut(BLOCK));
        for (i, (scale, against)) in blocks.enumerate() {
            let row = first + i * BLOCK;
            upstream.load(Line { row, class: 0, along: Along::Rows }, against);
            let of_rows = max[row..].iter().zip(&sum[row..]).zip(&total[row..]);
            for ((scale, against), ((max, sum), total)) in
                scale.iter_mut().zip(against).zip(of_rows)
            {
                let upstream = against.to_f64();
                let (sum, mut pull) = (sum.to_f64(), total.to_f64());
                if problem.z_loss != 0. {
                    pull += 2. * problem.z_loss * (max.to_f64() + sum.ln());
                }
                *scale = T::Real::from_f64(upstream * pull / sum);
                *against = T::Real::from_f64(-upstream);
            }
        }
    });

    let gradients = Gradients::<T> {
        logits: &logits,
        targets: &targets,
        num_classes,
        positions,
        max,
        scale: &scale,
        against: &against,
    };
    let arch = Arch::new();
    // Where one line of the gradient ends and the next one begins.
    let line = match order {
        Order::RowByRow => num_classes,
        Order::SideBySide => ROWS * num_classes,
        Order::ClassByClass => positions,
    };
    let gradient = build(num_rows * num_classes, line.min(SEGMENT), |start, sink| {
        dispatch(arch, Piece { gradients: &gradients, order, start, sink });
    })?;
    Ok(T::to_cpu_storage_owned(gradient))
}

/// What the gradient is made of.
struct Gradients<'a, T: Element> {
    logits: &'a View<'a>,
    targets: &'a Targets<'a, T::Real>,
    num_classes: usize,
    /// How many elements lie between one class and the next of the contiguous gradient.
    positions: usize,
    max: &'a [T::Real],
    scale: &'a [T::Real],
    against: &'a [T::Real],
}

/// How the gradient lies in memory.
#[derive(Clone, Copy)]
enum Order {
    /// The classes of a row next to each other.
    RowByRow,
    /// The same, but so few of them that several rows are worked on side by side.
    SideBySide,
    /// The rows of a class next to each other.
    ClassByClass,
}

/// A piece of the gradient, from its element `start` on.
struct Piece<'a, 'b, T: Element> {
    gradients: &'a Gradients<'a, T>,
    order: Order,
    start: usize,
    sink: &'a mut Sink<'b, T>,
}

impl<T: Element> Kernel for Piece<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.order {
            Order::RowByRow => self.row_by_row(simd),
            Order::SideBySide => self.side_by_side(simd),
            Order::ClassByClass => self.class_by_class(simd),
        }
    }
}

impl<T: Element> Piece<'_, '_, T> {
    #[inline(always)]
    fn row_by_row<S: Simd>(self, simd: S) {
        let Gradients { logits, targets, num_classes, max, scale, against, .. } = *self.gradients;
        let mut x = [T::Real::ZERO; BLOCK];
        let mut r = [T::Real::ZERO; BLOCK];
        let (mut block, mut rounded) = ([T::ZERO; BLOCK], [T::ZERO; BLOCK]);
        let (mut row, mut class) = (self.start / num_classes, self.start % num_classes);
        while self.sink.len() > 0 {
            let left = (num_classes - class).min(self.sink.len());
            let (len, padded) = block_len::<T::Real, S>(left);
            let line = Line { row, class, along: Along::Classes };
            if targets.is_ignored(row) {
                self.sink.push(&[T::ZERO; BLOCK][..len]);
            } else {
                let of_row =
                    RowGradient { max: max[row], scale: scale[row], against: against[row] };
                match targets.of_row(row, class, len, &mut r[..padded]) {
                    OfRow::Equal(r, label) => {
                        let lent = logits.lend(line, len).and_then(T::as_packed);
                        let packed = lent.unwrap_or_else(|| {
                            logits.load(line, &mut x[..len]);
                            T::to_packed(&x[..len], &mut block)
                        });
                        gradient_of_equals(simd, of_row, packed, r, |gradient| {
                            self.sink.push(T::from_packed(gradient, &mut rounded));
                        });
                        if let Some((i, _)) = label {
                            let (line, mut own) = (line.at(class + i), [T::Real::ZERO]);
                            logits.load(line, &mut x[..1]);
                            targets.fill(line, &mut own);
                            let x = &mut x[..lanes::<T::Real, S>()];
                            gradient_of_row(simd, of_row, x, &[own[0]; BLOCK]);
                            T::round(&x[..1], &mut rounded[..1]);
                            self.sink.replace(len - i, rounded[0]);
                        }
                    }
                    OfRow::Each(r) => {
                        let x = &mut x[..padded];
                        logits.load(line, &mut x[..len]);
                        gradient_of_row(simd, of_row, x, r);
                        T::round(x, &mut block[..padded]);
                        self.sink.push(&block[..len]);
                    }
                }
            }
            class += len;
            if class == num_classes {
                (row, class) = (row + 1, 0);
            }
        }
    }

    #[inline(always)]
    fn side_by_side<S: Simd>(self, simd: S) {
        let num_classes = self.gradients.num_classes;
        let mut lines = Lines::new();
        let mut tile = [T::ZERO; ROWS * FEW_CLASSES];
        let mut row = self.start / num_classes;
        while self.sink.len() > 0 {
            let len = ROWS.min(self.sink.len() / num_classes);
            for class in 0..num_classes {
                let line = Line { row, class, along: Along::Rows };
                let gradient = lines.gradient(simd, self.gradients, line, len);
                let column = tile.iter_mut().skip(class).step_by(num_classes);
                column.zip(gradient).for_each(|(out, &value)| *out = value);
            }
            self.sink.push(&tile[..len * num_classes]);
            row += len;
        }
    }

    #[inline(always)]
    fn class_by_class<S: Simd>(self, simd: S) {
        let Gradients { num_classes, positions, .. } = *self.gradients;
        let mut lines = Lines::new();
        let (line, mut position) = (self.start / positions, self.start % positions);
        let (mut outer, mut class) = (line / num_classes, line % num_classes);
        while self.sink.len() > 0 {
            let len = ROWS.min(positions - position).min(self.sink.len());
            let line = Line { row: outer * positions + position, class, along: Along::Rows };
            self.sink.push(lines.gradient(simd, self.gradients, line, len));
            position += len;
            if position == positions {
                (position, class) = (0, class + 1);
            }
            if class == num_classes {
                (class, outer) = (0, outer + 1);
            }
        }
    }
}

/// Room for one class of several rows.
struct Lines<T: Element> {
    x: [T::Real; ROWS],
    r: [T::Real; ROWS],
    /// The numbers of the rows, if they are too few for whole vectors.
    rows: [[T::Real; ROWS]; 3],
    out: [T; ROWS],
}

impl<T: Element> Lines<T> {
    #[inline(always)]
    fn new() -> Self {
        let zeros = [T::Real::ZERO; ROWS];
        Self { x: zeros, r: zeros, rows: [zeros; 3], out: [T::ZERO; ROWS] }
    }

    /// The gradient of one class of `len` rows.
    #[inline(always)]
    fn gradient<S: Simd>(
        &mut self,
        simd: S,
        gradients: &Gradients<T>,
        line: Line,
        len: usize,
    ) -> &[T] {
        let Gradients { logits, targets, max, scale, against, .. } = *gradients;
        logits.load(line, &mut self.x[..len]);
        targets.fill(line, &mut self.r[..len]);
        let rows = [max, scale, against].map(|of_rows| &of_rows[line.row..line.row + len]);
        let padded = len.next_multiple_of(lanes::<T::Real, S>());
        let (x, r) = (&mut self.x[..padded], &self.r[..padded]);
        if len == padded {
            gradient_of_class(simd, rows, x, r);
        } else {
            for (copy, of_rows) in self.rows.iter_mut().zip(rows) {
                copy[..len].copy_from_slice(of_rows);
            }
            gradient_of_class(simd, self.rows.each_ref().map(|rows| &rows[..padded]), x, r);
        }
        let out = &mut self.out[..padded];
        T::round(x, out);
        targets.clear_ignored(line.row, &mut out[..len]);
        &self.out[..len]
    }
}

/// Smoothed targets: the coefficients themselves, in f32.
pub(crate) fn smooth(problem: &Problem, labels: Operand) -> Result<CpuStorage> {
    let table = Table::new(&problem.coefficients);
    let num_rows = match labels.0.dtype().is_int() {
        true => labels.1.shape().elem_count(),
        false => View::new(labels, problem.class_dim)?.num_rows,
    };
    let targets = Targets::<f32>::new(problem, table.columns()?, labels)?;
    let num_classes = problem.num_classes;
    let soft = build(num_rows * num_classes, num_classes, |start, sink| {
        let mut block = [0.; BLOCK];
        let (mut row, mut class) = (start / num_classes, start % num_classes);
        while sink.len() > 0 {
            let len = BLOCK.min(num_classes - class).min(sink.len());
            targets.fill(Line { row, class, along: Along::Classes }, &mut block[..len]);
            sink.push(&block[..len]);
            class += len;
            if class == num_classes {
                (row, class) = (row + 1, 0);
            }
        }
    })?;
    Ok(f32::to_cpu_storage_owned(soft))
}
