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

use super::{Forward, Problem, Reduce, num_rows};
use crate::error::{Error, Result};
use block::{
    Partial, ROWS, RowGradient, RowSums, gradient_of_class, gradient_of_equals, gradient_of_row,
    lanes, largest, sums_of_equals, sums_of_row,
};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Tensor, WithDType};
use element::Element;
use half::{bf16, f16};
use operands::{Along, Line, OfRow, Operand, Table, Targets, View, host};
use parallel::{BLOCK, SEGMENT, Sink, build, filled, rewrite, split};
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
    let along = Along::forward(problem, logits.1.dims(), num_classes);
    let logits = View::new(logits, problem.class_dim)?;
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<T::Real>::new(problem, table.columns()?, targets)?;
    let mut rows = RowResults::new(logits.num_rows)?;
    let finish = |row, i, whole, out: &mut [&mut [T::Real]; 4]| {
        put(out, i, results(problem, &targets, row, whole).map(T::Real::from_f64));
    };
    read_rows::<T, _>(&logits, &targets, along, 0..num_classes, rows.columns(), &finish)?;
    Ok(rows.reduced(&targets, reduce, statistics))
}

/// The dtype of what is kept of each row while one range of the classes follows the other: the fields of a
/// [`Partial`], in their order, each for all rows. f64 whatever the logits; a GPU has no more than their arithmetic.
pub(crate) fn parts_dtype(_logits: DType) -> DType {
    DType::F64
}

/// The forward kernel on a range of the classes, whose logits are given: what it says of each row is merged
/// into what the ranges before it have said, if this is not the first. Only for the dtypes of the arithmetic, in
/// which logits are made on the CPU.
pub(crate) fn add_range(
    problem: &Problem,
    parts: (&mut CpuStorage, &Layout),
    logits: Operand,
    targets: Operand,
) -> Result<()> {
    match logits.0.dtype() {
        DType::F32 => add_range_of::<f32>(problem, parts, logits, targets),
        DType::F64 => add_range_of::<f64>(problem, parts, logits, targets),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn add_range_of<T: Element>(
    problem: &Problem,
    (parts, layout): (&mut CpuStorage, &Layout),
    logits: Operand,
    targets: Operand,
) -> Result<()> {
    let first = problem.first_class;
    let classes = first..first + logits.1.dims()[problem.class_dim];
    let along = Along::forward(problem, logits.1.dims(), classes.len());
    let logits = View::new(logits, problem.class_dim)?.with_first_class(first);
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<T::Real>::new(problem, table.columns()?, targets)?;
    let merge = |_, i: usize, part, out: &mut [&mut [f64]; 4]| {
        let whole = match first {
            0 => part,
            _ => Partial::from(out.each_ref().map(|out| out[i])).merge(part),
        };
        put(out, i, whole.into());
    };
    let parts = whole_mut::<f64>(parts, layout)?;
    let out = columns(parts, logits.num_rows);
    read_rows::<T, _>(&logits, &targets, along, classes, out, &merge)
}

/// Every row's loss, or their sum, from what was kept of the ranges, whose logits had this dtype.
pub(crate) fn finish(
    problem: &Problem,
    logits: DType,
    parts: Operand,
    targets: Operand,
    reduce: Reduce,
    statistics: bool,
) -> Result<Forward<CpuStorage>> {
    match logits {
        DType::F64 => finish_in::<f64>(problem, parts, targets, reduce, statistics),
        _ => finish_in::<f32>(problem, parts, targets, reduce, statistics),
    }
}

fn finish_in<A: Real>(
    problem: &Problem,
    (parts, layout): Operand,
    targets: Operand,
    reduce: Reduce,
    statistics: bool,
) -> Result<Forward<CpuStorage>> {
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<A>::new(problem, table.columns()?, targets)?;
    let num_rows = layout.dims()[1];
    let parts = View::new((parts, layout), 0)?;
    let mut rows = RowResults::<A>::new(num_rows)?;
    split(rows.columns(), 1, 1, &|first, mut out| {
        for i in 0..out[0].len() {
            let row = first + i;
            let mut part = [0.; 4];
            parts.load(Line { row, class: 0, along: Along::Classes }, &mut part);
            put(&mut out, i, results(problem, &targets, row, part.into()).map(A::from_f64));
        }
    });
    Ok(rows.reduced(&targets, reduce, statistics))
}

/// A row's loss and what backward needs of it.
fn results<A: Real>(
    problem: &Problem,
    targets: &Targets<A>,
    row: usize,
    whole: Partial,
) -> [f64; 4] {
    let log_sum = whole.sum.ln();
    let lse = whole.max + log_sum;
    let loss = match targets.is_ignored(row) {
        true => 0.,
        // From the left: without z-loss an overflowing square must not become 0·∞.
        false => whole.total * log_sum - whole.shortfall + problem.z_loss * lse * lse,
    };
    [loss, whole.max, whole.sum, whole.total]
}

/// What there is for each row, each of it for all rows.
struct RowResults<A> {
    losses: Vec<A>,
    /// The maximum, Σ exp, and S.
    statistics: Vec<A>,
}

impl<A: Real> RowResults<A> {
    fn new(num_rows: usize) -> Result<Self> {
        Ok(Self { losses: filled(num_rows)?, statistics: filled(3 * num_rows)? })
    }

    fn columns(&mut self) -> [&mut [A]; 4] {
        let [max, sum, total] = columns(&mut self.statistics, self.losses.len());
        [&mut self.losses, max, sum, total]
    }

    fn reduced(
        self,
        targets: &Targets<A>,
        reduce: Reduce,
        statistics: bool,
    ) -> Forward<CpuStorage> {
        let mut losses = self.losses;
        let num_rows = losses.len();
        let divisor = match reduce {
            Reduce::No => None,
            Reduce::DividedBy(divisor) => Some(divisor),
            Reduce::DividedByWeights => {
                Some(added_up(num_rows, |row| targets.weight(row).to_f64()))
            }
        };
        if let Some(divisor) = divisor {
            let result = added_up(num_rows, |row| losses[row].to_f64()) / divisor;
            losses = vec![A::from_f64(result)];
        }
        let weighted = matches!(reduce, Reduce::DividedByWeights);
        Forward {
            result: A::to_cpu_storage_owned(losses),
            divisor: divisor.filter(|_| weighted).map(|sum| CpuStorage::F64(vec![sum])),
            statistics: statistics.then(|| A::to_cpu_storage_owned(self.statistics)),
        }
    }
}

/// N columns of equal length that lie one after the other.
fn columns<T, const N: usize>(mut values: &mut [T], len: usize) -> [&mut [T]; N] {
    [(); N].map(|()| {
        let (column, rest) = std::mem::take(&mut values).split_at_mut(len);
        values = rest;
        column
    })
}

/// Writes element `i` of each column.
fn put<T: Copy>(columns: &mut [&mut [T]; 4], i: usize, values: [T; 4]) {
    for (column, value) in columns.iter_mut().zip(values) {
        column[i] = value;
    }
}

/// The numbers of a tensor that is changed in place: one that the loss made itself.
fn whole_mut<'a, T: Element>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [T]> {
    let values = layout
        .contiguous_offsets()
        .and_then(|(start, end)| T::values_mut(storage)?.get_mut(start..end));
    values.ok_or_else(|| candle_core::Error::RequiresContiguous { op: "in place" }.bt().into())
}

/// Reads a range of the classes of every row once. `finish` gets each row, its index in the slices of `out`,
/// what the range says of it, and those slices, which hold an element for each of some rows.
fn read_rows<T: Element, O: Send>(
    logits: &View,
    targets: &Targets<T::Real>,
    along: Along,
    classes: Range<usize>,
    out: [&mut [O]; 4],
    finish: &(impl Fn(usize, usize, Partial, &mut [&mut [O]; 4]) + Sync),
) -> Result<()> {
    let (num_rows, num_classes) = (logits.num_rows, classes.len());
    let arch = Arch::new();
    let at_once = match along {
        Along::Classes => 1,
        Along::Rows => num_rows.clamp(1, ROWS),
    };
    let segment = match along {
        Along::Classes => SEGMENT,
        // What each segment says of its rows takes memory too: at most one part in 64 of the logits'.
        Along::Rows => (SEGMENT / at_once).max(4 * BLOCK),
    };
    if num_classes <= segment {
        split(out, at_once, num_classes, &|first, mut out| {
            let rows = first..first + out[0].len();
            let emit = |row, whole| finish(row, row - first, whole, &mut out);
            let classes = classes.clone();
            dispatch(arch, Sums::<T, _> { logits, targets, along, rows, classes, emit });
        });
        return Ok(());
    }
    // A long row occupies several threads. The segments of the same rows lie one after the other.
    let segments = num_classes.div_ceil(segment);
    let mut parts: Vec<Partial> = filled(num_rows.div_ceil(at_once) * segments * at_once)?;
    split([&mut parts], at_once, segment, &|first, [parts]| {
        for (i, parts) in parts.chunks_mut(at_once).enumerate() {
            let i = first / at_once + i;
            let (row, class) = (i / segments * at_once, classes.start + i % segments * segment);
            let rows = row..num_rows.min(row + at_once);
            let classes = class..classes.end.min(class + segment);
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
    Ok(())
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
    let dims = logits.1.dims();
    let logits = View::new(logits, problem.class_dim)?.with_first_class(problem.first_class);
    let len = dims.iter().product();
    let gradient = with_gradients::<T, _>(problem, dims, targets, upstream, statistics, |of| {
        build(len, of.line(), |start, sink| of.write(&logits, start, sink))
    })?;
    Ok(T::to_cpu_storage_owned(gradient))
}

/// The backward kernel with the gradient in the logits' place. Only for the dtypes of the arithmetic, in which
/// logits are made on the CPU.
pub(crate) fn backward_in_place(
    problem: &Problem,
    logits: (&mut CpuStorage, &Layout),
    targets: Operand,
    upstream: Operand,
    statistics: &Tensor,
) -> Result<()> {
    match logits.0.dtype() {
        DType::F32 => replace::<f32>(problem, logits, targets, upstream, statistics),
        DType::F64 => replace::<f64>(problem, logits, targets, upstream, statistics),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn replace<A: Real>(
    problem: &Problem,
    (logits, layout): (&mut CpuStorage, &Layout),
    targets: Operand,
    upstream: Operand,
    statistics: &Tensor,
) -> Result<()> {
    let (dims, logits) = (layout.dims(), whole_mut::<A>(logits, layout)?);
    with_gradients::<A, _>(problem, dims, targets, upstream, statistics, |of| {
        rewrite(logits, of.line(), |start, logits, sink| {
            let logits = View::of_piece(logits, start, dims, problem.class_dim);
            of.write(&logits.with_first_class(problem.first_class), start, sink);
        });
        Ok(())
    })
}

/// Makes what the gradient of the logits of these dimensions is made of, beside the logits.
fn with_gradients<T: Element, R>(
    problem: &Problem,
    dims: &[usize],
    targets: Operand,
    upstream: Operand,
    statistics: &Tensor,
    make: impl FnOnce(&Gradients<T>) -> Result<R>,
) -> Result<R> {
    let num_classes = dims[problem.class_dim];
    let positions = dims[problem.class_dim + 1..].iter().product::<usize>().max(1);
    let order = match Along::of(problem, dims) {
        Along::Classes if num_classes <= FEW_CLASSES => Order::SideBySide,
        Along::Classes => Order::RowByRow,
        Along::Rows => Order::ClassByClass,
    };
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<T::Real>::new(problem, table.columns()?, targets)?;
    let num_rows = num_rows(dims, problem.class_dim);

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
                    pull += problem.z_loss * (2. * (max.to_f64() + sum.ln()));
                }
                *scale = T::Real::from_f64(upstream * pull / sum);
                *against = T::Real::from_f64(-upstream);
            }
        }
    });
    make(&Gradients {
        targets: &targets,
        order,
        first_class: problem.first_class,
        num_classes,
        positions,
        max,
        scale: &scale,
        against: &against,
    })
}

/// What the gradient is made of, beside the logits.
struct Gradients<'a, T: Element> {
    targets: &'a Targets<'a, T::Real>,
    order: Order,
    /// The first of the classes whose gradient it is, and how many they are.
    first_class: usize,
    num_classes: usize,
    /// How many elements lie between one class and the next of the contiguous gradient.
    positions: usize,
    max: &'a [T::Real],
    scale: &'a [T::Real],
    against: &'a [T::Real],
}

impl<T: Element> Gradients<'_, T> {
    /// Where one line of the gradient ends and the next one begins: pieces that are written apart begin at
    /// such places.
    fn line(&self) -> usize {
        let line = match self.order {
            Order::RowByRow => self.num_classes,
            Order::SideBySide => ROWS * self.num_classes,
            Order::ClassByClass => self.positions,
        };
        line.min(SEGMENT)
    }

    /// Writes a piece of the gradient, from its element `start` on.
    fn write(&self, logits: &View, start: usize, sink: &mut Sink<T>) {
        dispatch(Arch::new(), Piece { gradients: self, logits, start, sink });
    }
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
    logits: &'a View<'a>,
    start: usize,
    sink: &'a mut Sink<'b, T>,
}

impl<T: Element> Kernel for Piece<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        match self.gradients.order {
            Order::RowByRow => self.row_by_row(simd),
            Order::SideBySide => self.side_by_side(simd),
            Order::ClassByClass => self.class_by_class(simd),
        }
    }
}

impl<T: Element> Piece<'_, '_, T> {
    #[inline(always)]
    fn row_by_row<S: Simd>(self, simd: S) {
        let Gradients { targets, first_class, num_classes, max, scale, against, .. } =
            *self.gradients;
        let (logits, end) = (self.logits, first_class + num_classes);
        let mut x = [T::Real::ZERO; BLOCK];
        let mut r = [T::Real::ZERO; BLOCK];
        let (mut block, mut rounded) = ([T::ZERO; BLOCK], [T::ZERO; BLOCK]);
        let mut row = self.start / num_classes;
        let mut class = first_class + self.start % num_classes;
        while self.sink.len() > 0 {
            let left = (end - class).min(self.sink.len());
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
            if class == end {
                (row, class) = (row + 1, first_class);
            }
        }
    }

    #[inline(always)]
    fn side_by_side<S: Simd>(self, simd: S) {
        let Gradients { first_class, num_classes, .. } = *self.gradients;
        let mut lines = Lines::new();
        let mut tile = [T::ZERO; ROWS * FEW_CLASSES];
        let mut row = self.start / num_classes;
        while self.sink.len() > 0 {
            let len = ROWS.min(self.sink.len() / num_classes);
            for i in 0..num_classes {
                let line = Line { row, class: first_class + i, along: Along::Rows };
                let gradient = lines.gradient(simd, self.gradients, self.logits, line, len);
                let column = tile.iter_mut().skip(i).step_by(num_classes);
                column.zip(gradient).for_each(|(out, &value)| *out = value);
            }
            self.sink.push(&tile[..len * num_classes]);
            row += len;
        }
    }

    #[inline(always)]
    fn class_by_class<S: Simd>(self, simd: S) {
        let Gradients { first_class, num_classes, positions, .. } = *self.gradients;
        let mut lines = Lines::new();
        let (line, mut position) = (self.start / positions, self.start % positions);
        let (mut outer, mut class) = (line / num_classes, first_class + line % num_classes);
        while self.sink.len() > 0 {
            let len = ROWS.min(positions - position).min(self.sink.len());
            let line = Line { row: outer * positions + position, class, along: Along::Rows };
            self.sink.push(lines.gradient(simd, self.gradients, self.logits, line, len));
            position += len;
            if position == positions {
                (position, class) = (0, class + 1);
            }
            if class == first_class + num_classes {
                (class, outer) = (first_class, outer + 1);
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
        logits: &View,
        line: Line,
        len: usize,
    ) -> &[T] {
        let Gradients { targets, max, scale, against, .. } = *gradients;
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
        false => num_rows(labels.1.dims(), problem.class_dim),
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
