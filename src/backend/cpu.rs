//! The kernels on the CPU.
//!
//! Work comes in blocks of [`BLOCK`] elements along one dimension. A block's logits and coefficients
//! r are brought to the stack in the dtype of the arithmetic, whatever their own dtype and strides,
//! so that one loop serves every input. What a block of classes says of its row is a [`Partial`],
//! and two of them merge; that is also how several threads share one long row. Blocks and segments
//! have a fixed size and merge in a fixed order, so the result has the same bits for every number of
//! threads.

use super::{Coefficients, Problem, Rows};
use crate::error::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Storage, StorageRef, Tensor, WithDType};
use half::{bf16, f16};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Elements that are worked on at a time, few enough for the stack and the first-level cache.
const BLOCK: usize = 256;

/// Elements of one line that stay on one thread.
const SEGMENT: usize = 64 * BLOCK;

/// Elements below which waking a second thread costs more than it saves.
const GRAIN: usize = 64 * BLOCK;

/// Marks an ignored row among the labels; no class has this index.
const IGNORED: usize = usize::MAX;

/// A tensor's numbers and where they lie.
type Operand<'a> = (&'a CpuStorage, &'a Layout);

/// What the forward kernel gives; `op::RowLosses` says what each is.
pub(crate) struct Forward {
    pub losses: CpuStorage,
    pub weights: Option<CpuStorage>,
    pub statistics: Option<CpuStorage>,
}

/// The forward kernel: every row's loss.
pub(crate) fn forward(
    problem: &Problem,
    logits: Operand,
    targets: Operand,
    weights: bool,
    statistics: bool,
) -> Result<Forward> {
    match logits.0.dtype() {
        DType::F64 => forward_in::<f64>(problem, logits, targets, weights, statistics),
        _ => forward_in::<f32>(problem, logits, targets, weights, statistics),
    }
}

fn forward_in<A: Real>(
    problem: &Problem,
    logits: Operand,
    targets: Operand,
    weights: bool,
    statistics: bool,
) -> Result<Forward> {
    let logits = View::new(logits, problem.class_dim)?;
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<A>::new(problem, table.columns()?, targets)?;

    let (num_rows, num_classes) = (logits.num_rows, problem.num_classes);
    let segments = num_classes.div_ceil(SEGMENT);
    let partials = map(num_rows * segments, num_classes.min(SEGMENT), |i| {
        let (row, first) = (i / segments, i % segments * SEGMENT);
        match targets.is_ignored(row) {
            true => Partial::EMPTY,
            false => segment(
                &logits,
                &targets,
                row,
                first..num_classes.min(first + SEGMENT),
            ),
        }
    })?;
    let rows = map(num_rows, segments, |row| {
        let partials = &partials[row * segments..(row + 1) * segments];
        let Partial {
            max,
            sum,
            total,
            shortfall,
        } = partials.iter().fold(Partial::EMPTY, Partial::merge);
        let log_sum = sum.ln();
        let lse = max + log_sum;
        let loss = match targets.is_ignored(row) {
            true => 0.,
            false => total * log_sum - shortfall + problem.z_loss * lse * lse,
        };
        Row {
            loss,
            max,
            sum,
            total,
        }
    })?;

    let columns = |fields: &[fn(&Row) -> f64]| -> Result<CpuStorage> {
        let mut values = reserve::<A>(fields.len() * num_rows)?;
        for field in fields {
            values.extend(rows.iter().map(|row| A::from_f64(field(row))));
        }
        Ok(A::to_cpu_storage_owned(values))
    };
    Ok(Forward {
        losses: columns(&[|row| row.loss])?,
        weights: match weights {
            true => Some(A::to_cpu_storage_owned(map(num_rows, 1, |row| {
                targets.weight(row)
            })?)),
            false => None,
        },
        statistics: match statistics {
            true => Some(columns(&[|row| row.max, |row| row.sum, |row| row.total])?),
            false => None,
        },
    })
}

/// What the forward kernel finds out about a row.
struct Row {
    loss: f64,
    max: f64,
    sum: f64,
    total: f64,
}

/// What a range of classes says of its row.
#[derive(Clone, Copy)]
struct Partial {
    /// The largest logit x; −inf if there is none.
    max: f64,
    /// Σ exp(x − max).
    sum: f64,
    /// S = Σ r.
    total: f64,
    /// T = Σ r·(x − max). All of its terms have one sign, and a common offset of the logits does
    /// not enter it, so no digits are lost to either.
    shortfall: f64,
}

impl Partial {
    const EMPTY: Self = Self {
        max: f64::NEG_INFINITY,
        sum: 0.,
        total: 0.,
        shortfall: 0.,
    };

    fn of_block<A: Real>(logits: &[A], coefficients: &[A]) -> Self {
        // `maximum` passes over NaN, which comes back through the sum of exponentials.
        let max = logits
            .iter()
            .fold(A::NEG_INFINITY, |max, &x| max.maximum(x));
        // −inf − −inf is NaN; relative to 0 instead, the exponentials are 0 and T is −inf.
        let base = if max == A::NEG_INFINITY { A::ZERO } else { max };
        let (mut sum, mut total, mut shortfall) = (0., 0., 0.);
        for (&x, &r) in logits.iter().zip(coefficients) {
            let x = x - base;
            sum += x.exp().to_f64();
            total += r.to_f64();
            // 0·∞ is 0 here: what has no weight has no say.
            if r != A::ZERO {
                shortfall += (r * x).to_f64();
            }
        }
        Self {
            max: max.to_f64(),
            sum,
            total,
            shortfall,
        }
    }

    /// Two ranges of one row as one: sums move to the common maximum.
    fn merge(self, other: &Self) -> Self {
        let max = self.max.max(other.max);
        let moved = |part: &Self| {
            if part.max == max || part.max == f64::NEG_INFINITY {
                (part.sum, part.shortfall)
            } else {
                let by = part.max - max;
                let moved = if part.total == 0. {
                    0.
                } else {
                    part.total * by
                };
                (part.sum * by.exp(), part.shortfall + moved)
            }
        };
        let (ours, theirs) = (moved(&self), moved(other));
        Self {
            max,
            sum: ours.0 + theirs.0,
            total: self.total + other.total,
            shortfall: ours.1 + theirs.1,
        }
    }
}

/// Reads a range of one row's classes once.
fn segment<A: Real>(
    logits: &View,
    targets: &Targets<A>,
    row: usize,
    classes: Range<usize>,
) -> Partial {
    let mut x = [A::ZERO; BLOCK];
    let mut r = [A::ZERO; BLOCK];
    let mut whole = Partial::EMPTY;
    for class in classes.clone().step_by(BLOCK) {
        let len = BLOCK.min(classes.end - class);
        let (x, r) = (&mut x[..len], &mut r[..len]);
        let line = Line {
            row,
            class,
            along: Along::Classes,
        };
        logits.load(line, x);
        targets.coefficients(line, r);
        whole = whole.merge(&Partial::of_block(x, r));
    }
    whole
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
        DType::BF16 => backward_to::<bf16, _>(problem, logits, targets, upstream, statistics),
        DType::F16 => backward_to::<f16, _>(problem, logits, targets, upstream, statistics),
        DType::F32 => backward_to::<f32, _>(problem, logits, targets, upstream, statistics),
        DType::F64 => backward_to::<f64, _>(problem, logits, targets, upstream, statistics),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn backward_to<T: Element<Real = A>, A: Real>(
    problem: &Problem,
    logits: Operand,
    targets: Operand,
    upstream: Operand,
    statistics: &Tensor,
) -> Result<CpuStorage> {
    // The line of the gradient's memory: the classes of a row, or the rows of a class if the class
    // dimension is followed by others.
    let dims = logits.1.dims();
    let positions: usize = dims[problem.class_dim + 1..].iter().product();
    let (along, line_len) = match positions {
        1 => (Along::Classes, problem.num_classes),
        _ => (Along::Rows, positions),
    };

    let logits = View::new(logits, problem.class_dim)?;
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<A>::new(problem, table.columns()?, targets)?;
    let rows = row_gradients(problem, &targets, logits.num_rows, upstream, statistics)?;

    let gradient = build(
        logits.num_rows * problem.num_classes,
        line_len,
        |line, start, out| {
            let line = match along {
                Along::Classes => Line {
                    row: line,
                    class: start,
                    along,
                },
                Along::Rows => Line {
                    row: line / problem.num_classes * positions + start,
                    class: line % problem.num_classes,
                    along,
                },
            };
            let mut x = [A::ZERO; BLOCK];
            let mut r = [A::ZERO; BLOCK];
            let (x, r) = (&mut x[..out.len()], &mut r[..out.len()]);
            logits.load(line, x);
            targets.coefficients(line, r);
            for (i, out) in out.iter_mut().enumerate() {
                *out = match &rows[line.row(i)] {
                    Some(row) => {
                        T::from_real((x[i] - row.max).exp() * row.scale - r[i] * row.upstream)
                    }
                    None => T::ZERO,
                };
            }
        },
    )?;
    Ok(T::to_cpu_storage_owned(gradient))
}

/// What the gradient of a row's logits needs: exp(x − max)·scale − r·upstream.
struct RowGradient<A> {
    max: A,
    /// upstream·(S + 2·z·lse) / Σ exp(x − max).
    scale: A,
    upstream: A,
}

/// Every row's [`RowGradient`]; `None` where the row is ignored, since even 0·NaN would spoil it.
fn row_gradients<A: Real>(
    problem: &Problem,
    targets: &Targets<A>,
    num_rows: usize,
    upstream: Operand,
    statistics: &Tensor,
) -> Result<Vec<Option<RowGradient<A>>>> {
    let upstream = View::new(upstream, upstream.1.shape().rank())?;
    let statistics = statistics.storage_and_layout().0;
    let statistics = A::cpu_storage_as_slice(host(&statistics)?)?;
    let (max, rest) = statistics.split_at(num_rows);
    let (sum, total) = rest.split_at(num_rows);
    map(num_rows, 1, |row| {
        if targets.is_ignored(row) {
            return None;
        }
        let mut gradient = [A::ZERO];
        upstream.load(
            Line {
                row,
                class: 0,
                along: Along::Rows,
            },
            &mut gradient,
        );
        let [upstream] = gradient;
        let (max, sum) = (max[row], sum[row].to_f64());
        let lse = max.to_f64() + sum.ln();
        let pull = total[row].to_f64() + 2. * problem.z_loss * lse;
        Some(RowGradient {
            max,
            scale: A::from_f64(upstream.to_f64() * pull / sum),
            upstream,
        })
    })
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
    let soft = build(num_rows * num_classes, num_classes, |row, class, out| {
        targets.coefficients(
            Line {
                row,
                class,
                along: Along::Classes,
            },
            out,
        );
    })?;
    Ok(f32::to_cpu_storage_owned(soft))
}

/// Checks class targets.
pub(crate) fn check_labels(
    targets: Operand,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<()> {
    labels(targets, num_classes, ignore_index).map(|_| ())
}

/// Class targets as indices, each checked; [`IGNORED`] where they equal `ignore_index`.
fn labels(
    (targets, layout): Operand,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<Vec<usize>> {
    match targets {
        CpuStorage::U8(values) => labels_of(values, layout, num_classes, ignore_index),
        CpuStorage::U32(values) => labels_of(values, layout, num_classes, ignore_index),
        CpuStorage::I64(values) => labels_of(values, layout, num_classes, ignore_index),
        _ => Err(Error::TargetsDType {
            dtype: targets.dtype(),
            expected: "U8, U32 or I64",
        }),
    }
}

fn labels_of<T: Copy + Into<Index>>(
    values: &[T],
    layout: &Layout,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<Vec<usize>> {
    check_layout(layout, values.len())?;
    let rows = Rows::new(layout, None);
    let num_rows = layout.shape().elem_count();
    let mut labels = reserve(num_rows)?;
    while labels.len() < num_rows {
        let run = rows.run(labels.len());
        for i in 0..run.len {
            let Index(target) = values[run.offset + i * run.stride].into();
            labels.push(match usize::try_from(target) {
                _ if Some(target) == ignore_index => IGNORED,
                Ok(class) if class < num_classes => class,
                _ => {
                    return Err(Error::TargetOutOfRange {
                        row: labels.len(),
                        target,
                        num_classes,
                    });
                }
            });
        }
    }
    Ok(labels)
}

/// A class index of any of the dtypes.
struct Index(i64);

impl From<u8> for Index {
    fn from(index: u8) -> Self {
        Self(index.into())
    }
}

impl From<u32> for Index {
    fn from(index: u32) -> Self {
        Self(index.into())
    }
}

impl From<i64> for Index {
    fn from(index: i64) -> Self {
        Self(index)
    }
}

/// A stretch of elements along one dimension, from the given row and class on.
#[derive(Clone, Copy)]
struct Line {
    row: usize,
    class: usize,
    along: Along,
}

#[derive(Clone, Copy)]
enum Along {
    Classes,
    Rows,
}

impl Line {
    fn row(self, i: usize) -> usize {
        match self.along {
            Along::Classes => self.row,
            Along::Rows => self.row + i,
        }
    }

    fn class(self, i: usize) -> usize {
        match self.along {
            Along::Classes => self.class + i,
            Along::Rows => self.class,
        }
    }
}

/// The numbers of a tensor by row and class.
struct View<'a> {
    values: Values<'a>,
    rows: Rows,
    num_rows: usize,
    class_stride: usize,
}

enum Values<'a> {
    BF16(&'a [bf16]),
    F16(&'a [f16]),
    F32(&'a [f32]),
    F64(&'a [f64]),
}

impl<'a> View<'a> {
    /// With `class_dim` beyond the dimensions, each element is a row of its own.
    fn new((storage, layout): Operand<'a>, class_dim: usize) -> Result<Self> {
        let (values, len) = match storage {
            CpuStorage::BF16(values) => (Values::BF16(values), values.len()),
            CpuStorage::F16(values) => (Values::F16(values), values.len()),
            CpuStorage::F32(values) => (Values::F32(values), values.len()),
            CpuStorage::F64(values) => (Values::F64(values), values.len()),
            _ => {
                return Err(Error::TargetsDType {
                    dtype: storage.dtype(),
                    expected: "F16, BF16, F32 or F64",
                });
            }
        };
        check_layout(layout, len)?;
        let others = layout.dims().iter().enumerate();
        Ok(Self {
            values,
            rows: Rows::new(layout, Some(class_dim)),
            num_rows: others
                .filter(|(dim, _)| *dim != class_dim)
                .map(|(_, len)| len)
                .product(),
            class_stride: layout.stride().get(class_dim).copied().unwrap_or(0),
        })
    }

    /// Fills `out` from the line's start on.
    fn load<A: Real>(&self, line: Line, out: &mut [A]) {
        let mut filled = 0;
        while filled < out.len() {
            let run = self.rows.run(line.row(filled));
            let (stride, len) = match line.along {
                Along::Classes => (self.class_stride, out.len()),
                Along::Rows => (run.stride, run.len.min(out.len() - filled)),
            };
            let start = run.offset + line.class * self.class_stride;
            let out = &mut out[filled..filled + len];
            match self.values {
                Values::BF16(values) => {
                    copy(values, start, stride, out, |v| A::from_f32(v.to_f32()))
                }
                Values::F16(values) => {
                    copy(values, start, stride, out, |v| A::from_f32(v.to_f32()))
                }
                Values::F32(values) => copy(values, start, stride, out, A::from_f32),
                Values::F64(values) => copy(values, start, stride, out, A::from_f64),
            }
            filled += len;
        }
    }
}

fn copy<T: Copy, A>(values: &[T], start: usize, stride: usize, out: &mut [A], f: impl Fn(T) -> A) {
    if stride == 1 {
        for (out, &value) in out.iter_mut().zip(&values[start..]) {
            *out = f(value);
        }
    } else {
        for (i, out) in out.iter_mut().enumerate() {
            *out = f(values[start + i * stride]);
        }
    }
}

/// Checks that a layout stays inside its storage: the kernels index by it.
fn check_layout(layout: &Layout, len: usize) -> Result<()> {
    let dims = || layout.dims().iter().zip(layout.stride());
    let last = dims().try_fold(layout.start_offset(), |last, (&len, &stride)| {
        last.checked_add(len.saturating_sub(1).checked_mul(stride)?)
    });
    if dims().all(|(&len, _)| len > 0) && last.is_none_or(|last| last >= len) {
        return Err(Error::Layout {
            shape: layout.dims().to_vec(),
            stride: layout.stride().to_vec(),
            offset: layout.start_offset(),
            len,
        });
    }
    Ok(())
}

/// The targets and their coefficients r.
struct Targets<'a, A> {
    columns: Columns<'a, A>,
    given: Given<'a>,
}

enum Given<'a> {
    Classes(Vec<usize>),
    Probabilities(View<'a>),
}

impl<'a, A: Real> Targets<'a, A> {
    fn new(problem: &Problem, columns: Columns<'a, A>, targets: Operand<'a>) -> Result<Self> {
        let given = match targets.0.dtype().is_int() {
            true => Given::Classes(labels(targets, problem.num_classes, problem.ignore_index)?),
            false => Given::Probabilities(View::new(targets, problem.class_dim)?),
        };
        Ok(Self { columns, given })
    }

    fn is_ignored(&self, row: usize) -> bool {
        matches!(&self.given, Given::Classes(labels) if labels[row] == IGNORED)
    }

    /// What the row adds to the denominator of a mean.
    fn weight(&self, row: usize) -> A {
        match &self.given {
            Given::Classes(labels) if labels[row] == IGNORED => A::ZERO,
            Given::Classes(labels) => self.columns.weight.at(labels[row]),
            Given::Probabilities(_) => A::one(),
        }
    }

    /// Fills `out` with r: the formula at the head of the `backend` module.
    fn coefficients(&self, line: Line, out: &mut [A]) {
        let columns = &self.columns;
        match &self.given {
            Given::Classes(labels) => {
                for (i, r) in out.iter_mut().enumerate() {
                    let class = line.class(i);
                    *r = match labels[line.row(i)] == class {
                        true => columns.own.at(class),
                        false => columns.spread.at(class),
                    };
                }
            }
            Given::Probabilities(view) => {
                view.load(line, out);
                for (i, r) in out.iter_mut().enumerate() {
                    let class = line.class(i);
                    *r = columns.scale.at(class) * *r + columns.spread.at(class);
                }
            }
        }
    }
}

/// The coefficients, lent by their tensor.
enum Table<'a> {
    Uniform(super::Coefficient),
    PerClass(StorageRef<'a>),
}

struct Columns<'a, A> {
    scale: Column<'a, A>,
    spread: Column<'a, A>,
    own: Column<'a, A>,
    weight: Column<'a, A>,
}

enum Column<'a, A> {
    Uniform(A),
    PerClass(&'a [A]),
}

impl<'a> Table<'a> {
    fn new(coefficients: &'a Coefficients) -> Self {
        match coefficients {
            Coefficients::Uniform(coefficient) => Self::Uniform(*coefficient),
            Coefficients::PerClass(table) => Self::PerClass(table.storage_and_layout().0),
        }
    }

    fn columns<A: Real>(&self) -> Result<Columns<'_, A>> {
        Ok(match self {
            Self::Uniform(coefficient) => {
                let column = |value| Column::Uniform(A::from_f64(value));
                Columns {
                    scale: column(coefficient.scale),
                    spread: column(coefficient.spread),
                    own: column(coefficient.own),
                    weight: column(coefficient.weight),
                }
            }
            Self::PerClass(storage) => {
                let table = A::cpu_storage_as_slice(host(storage)?)?;
                let num_classes = table.len() / 4;
                let column = |i| Column::PerClass(&table[i * num_classes..(i + 1) * num_classes]);
                Columns {
                    scale: column(0),
                    spread: column(1),
                    own: column(2),
                    weight: column(3),
                }
            }
        })
    }
}

impl<A: Real> Column<'_, A> {
    fn at(&self, class: usize) -> A {
        match self {
            Self::Uniform(value) => *value,
            Self::PerClass(values) => values[class],
        }
    }
}

fn host(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        other => Err(Error::DeviceMismatch {
            logits: candle_core::DeviceLocation::Cpu,
            targets: other.device().location(),
        }),
    }
}

/// A dtype of logits.
trait Element: WithDType {
    const ZERO: Self;
    /// The dtype of the arithmetic.
    type Real: Real;
    fn from_real(value: Self::Real) -> Self;
}

macro_rules! element {
    ($element:ident, $real:ident, $zero:expr, $from_real:expr) => {
        impl Element for $element {
            const ZERO: Self = $zero;
            type Real = $real;

            fn from_real(value: $real) -> Self {
                $from_real(value)
            }
        }
    };
}

element!(bf16, f32, bf16::ZERO, bf16::from_f32);
element!(f16, f32, f16::ZERO, f16::from_f32);
element!(f32, f32, 0., std::convert::identity);
element!(f64, f64, 0., std::convert::identity);

/// A dtype of the arithmetic.
trait Real: Element<Real = Self> {
    const NEG_INFINITY: Self;
    fn from_f32(value: f32) -> Self;
    fn exp(self) -> Self;
    /// The larger of the two, or the one that is not NaN.
    fn maximum(self, other: Self) -> Self;
}

macro_rules! real {
    ($real:ident) => {
        impl Real for $real {
            const NEG_INFINITY: Self = $real::NEG_INFINITY;

            fn from_f32(value: f32) -> Self {
                value.into()
            }

            fn exp(self) -> Self {
                $real::exp(self)
            }

            fn maximum(self, other: Self) -> Self {
                $real::max(self, other)
            }
        }
    };
}

real!(f32);
real!(f64);

/// An empty vector with room for `len` elements.
fn reserve<T>(len: usize) -> Result<Vec<T>> {
    let mut vec = Vec::new();
    match vec.try_reserve_exact(len) {
        Ok(()) => Ok(vec),
        Err(_) => Err(Error::TooLarge {
            what: "a result",
            shape: vec![len],
        }),
    }
}

/// `f` of 0..len, each call of which touches `cost` elements.
fn map<T: Send>(len: usize, cost: usize, f: impl Fn(usize) -> T + Sync + Send) -> Result<Vec<T>> {
    let mut out = reserve(len)?;
    if len.saturating_mul(cost) <= GRAIN {
        out.extend((0..len).map(f));
    } else {
        (0..len)
            .into_par_iter()
            .with_min_len(GRAIN.div_ceil(cost))
            .map(f)
            .collect_into_vec(&mut out);
    }
    Ok(out)
}

/// `len` elements in lines of `line_len`, made in blocks: `f` gets the line's index, the block's
/// start in the line, and the block to fill.
fn build<T: Element>(
    len: usize,
    line_len: usize,
    f: impl Fn(usize, usize, &mut [T]) + Sync,
) -> Result<Vec<T>> {
    let mut out = reserve(len)?;
    let room: &mut [MaybeUninit<T>] = &mut out.spare_capacity_mut()[..len];
    split(room, line_len, |line, room| {
        split(room, SEGMENT, |segment, room| {
            let mut block = [T::ZERO; BLOCK];
            for (i, room) in room.chunks_mut(BLOCK).enumerate() {
                let block = &mut block[..room.len()];
                f(line, segment * SEGMENT + i * BLOCK, block);
                for (room, &value) in room.iter_mut().zip(&*block) {
                    room.write(value);
                }
            }
        });
    });
    // SAFETY: the vector has room for `len` elements, and `split` hands out each of them, which the
    // loop above then writes, whatever `f` does. Zeroing them first instead would write the largest
    // allocation of a training step twice.
    unsafe { out.set_len(len) };
    Ok(out)
}

/// `f` of every chunk of `len` elements and its index.
fn split<T: Send>(slice: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let len = len.max(1);
    if slice.len() <= GRAIN {
        for (i, chunk) in slice.chunks_mut(len).enumerate() {
            f(i, chunk);
        }
    } else {
        slice
            .par_chunks_mut(len)
            .enumerate()
            .with_min_len(GRAIN.div_ceil(len))
            .for_each(|(i, chunk)| f(i, chunk));
    }
}
