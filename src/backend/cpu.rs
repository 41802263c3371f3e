//! The kernels on the CPU.
//!
//! Work comes in blocks of [`BLOCK`] elements along one dimension. A block's logits and coefficients
//! r are brought to the stack in the dtype of the arithmetic, whatever their own dtype and strides
//! (`operands`), so that one vectorised loop serves every input (`block`, `exp`). What a block of
//! classes says of its row is a [`Partial`], and two of them merge; that is also how several threads
//! share one long row. Blocks and segments have a fixed size and merge in a fixed order, so the result
//! has the same bits for every number of threads (`parallel`).

mod block;
mod element;
mod exp;
mod operands;
mod parallel;

pub(crate) use operands::check_labels;

use super::Problem;
use crate::error::{Error, Result};
use block::{LANES, ROWS, RowGradient, Sums};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Tensor, WithDType};
use element::{Element, Real};
use half::{bf16, f16};
use operands::{Along, Line, Operand, Table, Targets, View, host};
use parallel::{BLOCK, SEGMENT, build, filled, map, split};
use pulp::Arch;
use std::ops::Range;

/// Up to so many classes, several rows are worked on side by side.
const FEW_CLASSES: usize = 32;

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
    let dims = logits.1.dims();
    let logits = View::new(logits, problem.class_dim)?;
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<A>::new(problem, table.columns()?, targets)?;

    let arch = Arch::new();
    let num_rows = logits.num_rows;
    let finish = |row, whole: Partial| {
        let Partial { max, sum, total, shortfall } = whole;
        let log_sum = sum.ln();
        let lse = max + log_sum;
        let loss = match targets.is_ignored(row) {
            true => 0.,
            // From the left: without z-loss an overflowing square must not become 0·∞.
            false => total * log_sum - shortfall + problem.z_loss * lse * lse,
        };
        [loss, max, sum, total].map(A::from_f64)
    };
    // With few classes a row is too short to work on alone.
    let along = match problem.num_classes {
        ..=FEW_CLASSES => Along::Rows,
        _ => Along::of(problem, dims),
    };
    let num_classes = problem.num_classes;
    // Loss, maximum, Σ exp(x − maximum) and S of each row.
    let rows = match along {
        Along::Classes => reduce(num_rows, num_classes, finish, |row, classes| {
            [row_segment(arch, &logits, &targets, row, classes)]
        }),
        Along::Rows => reduce(num_rows, num_classes, finish, |row, classes| {
            rows_segment(arch, &logits, &targets, row, classes)
        }),
    }?;

    let columns = |columns: Range<usize>| -> Result<CpuStorage> {
        let value = |i: usize| rows[i % num_rows][columns.start + i / num_rows];
        Ok(A::to_cpu_storage_owned(map(columns.len() * num_rows, 1, value)?))
    };
    Ok(Forward {
        losses: columns(0..1)?,
        weights: match weights {
            true => Some(A::to_cpu_storage_owned(map(num_rows, 1, |row| targets.weight(row))?)),
            false => None,
        },
        statistics: match statistics {
            true => Some(columns(1..4)?),
            false => None,
        },
    })
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
    const EMPTY: Self = Self { max: f64::NEG_INFINITY, sum: 0., total: 0., shortfall: 0. };

    /// Two ranges of one row as one: sums move to the common maximum.
    fn merge(self, other: &Self) -> Self {
        let max = self.max.max(other.max);
        let moved = |part: &Self| {
            if part.max == max || part.max == f64::NEG_INFINITY {
                (part.sum, part.shortfall)
            } else {
                let by = part.max - max;
                let moved = if part.total == 0. { 0. } else { part.total * by };
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

    /// One lane of a block's sums.
    fn of_block<A: Real, const N: usize>(sums: &Sums<A, N>, lane: usize) -> Self {
        Self {
            max: sums.max[lane].to_f64(),
            sum: sums.sum[lane].to_f64(),
            total: sums.total[lane].to_f64(),
            shortfall: sums.shortfall[lane].to_f64(),
        }
    }
}

/// Every row, from what `segment` finds out of `N` rows from the given one on and a range of their
/// classes, and `finish` makes of it. The ranges are as many as it takes to occupy several threads with
/// one row.
fn reduce<const N: usize, R: Copy + Default + Send + Sync>(
    num_rows: usize,
    num_classes: usize,
    finish: impl Fn(usize, Partial) -> R + Sync + Send,
    segment: impl Fn(usize, Range<usize>) -> [Partial; N] + Sync + Send,
) -> Result<Vec<R>> {
    let len = SEGMENT / N;
    let segments = num_classes.div_ceil(len);
    let whole = |row, parts: &[[Partial; N]], lane: usize| {
        finish(row, parts.iter().fold(Partial::EMPTY, |whole, part| whole.merge(&part[lane])))
    };
    if segments == 1 {
        let mut rows = filled(num_rows)?;
        split(&mut rows, N, num_classes, |tile, rows| {
            let parts = [segment(tile * N, 0..num_classes)];
            for (lane, out) in rows.iter_mut().enumerate() {
                *out = whole(tile * N + lane, &parts, lane);
            }
        });
        return Ok(rows);
    }
    let parts = map(num_rows.div_ceil(N) * segments, N * len, |i| {
        let first = i % segments * len;
        segment(i / segments * N, first..num_classes.min(first + len))
    })?;
    map(num_rows, segments, |row| whole(row, &parts[row / N * segments..][..segments], row % N))
}

/// Reads a range of one row's classes once.
fn row_segment<A: Real>(
    arch: Arch,
    logits: &View,
    targets: &Targets<A>,
    row: usize,
    classes: Range<usize>,
) -> Partial {
    let mut whole = Partial::EMPTY;
    if targets.is_ignored(row) {
        return whole;
    }
    let mut x = [A::NEG_INFINITY; BLOCK];
    let mut r = [A::ZERO; BLOCK];
    for class in classes.clone().step_by(BLOCK) {
        let len = BLOCK.min(classes.end - class);
        let padded = len.next_multiple_of(LANES);
        let line = Line { row, class, along: Along::Classes };
        logits.load(line, &mut x[..len]);
        targets.coefficients(line, &mut r[..len]);
        x[len..padded].fill(A::NEG_INFINITY);
        r[len..padded].fill(A::ZERO);
        let sums = block::sums_of_row(arch, &x[..padded], &r[..padded]);
        whole = whole.merge(&Partial::of_block(&sums, 0));
    }
    whole
}

/// Reads a range of the classes of many rows once. Ignored rows are read too, for nothing.
fn rows_segment<A: Real>(
    arch: Arch,
    logits: &View,
    targets: &Targets<A>,
    row: usize,
    classes: Range<usize>,
) -> [Partial; ROWS] {
    const CLASSES: usize = FEW_CLASSES;
    let len = ROWS.min(logits.num_rows - row);
    let mut whole = [Partial::EMPTY; ROWS];
    let mut x = [[A::NEG_INFINITY; ROWS]; CLASSES];
    let mut r = [[A::ZERO; ROWS]; CLASSES];
    for first in classes.clone().step_by(CLASSES) {
        let classes = first..classes.end.min(first + CLASSES);
        let count = classes.len();
        for (class, (x, r)) in classes.zip(x.iter_mut().zip(&mut r)) {
            let line = Line { row, class, along: Along::Rows };
            logits.load(line, &mut x[..len]);
            targets.coefficients(line, &mut r[..len]);
        }
        let sums = block::sums_of_rows(arch, &x[..count], &r[..count]);
        for (lane, whole) in whole.iter_mut().enumerate().take(len) {
            *whole = whole.merge(&Partial::of_block(&sums, lane));
        }
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
    let dims = logits.1.dims();
    let positions: usize = dims[problem.class_dim + 1..].iter().product();
    let along = Along::of(problem, dims);
    let line_len = match along {
        Along::Classes => problem.num_classes,
        Along::Rows => positions,
    };

    let logits = View::new(logits, problem.class_dim)?;
    let table = Table::new(&problem.coefficients);
    let targets = Targets::<A>::new(problem, table.columns()?, targets)?;
    let rows = row_gradients(problem, logits.num_rows, upstream, statistics)?;
    let arch = Arch::new();

    let gradient = build(logits.num_rows * problem.num_classes, line_len, |line, start, out| {
        let line = match along {
            Along::Classes => Line { row: line, class: start, along },
            Along::Rows => Line {
                row: line / problem.num_classes * positions + start,
                class: line % problem.num_classes,
                along,
            },
        };
        if matches!(along, Along::Classes) && targets.is_ignored(line.row) {
            out.fill(T::ZERO);
            return;
        }
        let mut x = [A::ZERO; BLOCK];
        let mut r = [A::ZERO; BLOCK];
        let (x, r) = (&mut x[..out.len()], &mut r[..out.len()]);
        logits.load(line, x);
        targets.coefficients(line, r);
        let last = line.row(out.len() - 1);
        block::gradient(arch, x, r, &rows[line.row..=last]);
        T::from_reals(x, out);
        // Even 0·NaN would spoil an ignored row.
        for (i, out) in out.iter_mut().enumerate() {
            if matches!(along, Along::Rows) && targets.is_ignored(line.row + i) {
                *out = T::ZERO;
            }
        }
    })?;
    Ok(T::to_cpu_storage_owned(gradient))
}

/// What the gradient of each row needs, with scale = upstream·(S + 2·z·lse) / Σ exp(x − max).
fn row_gradients<A: Real>(
    problem: &Problem,
    num_rows: usize,
    upstream: Operand,
    statistics: &Tensor,
) -> Result<Vec<RowGradient<A>>> {
    let upstream = View::new(upstream, upstream.1.shape().rank())?;
    let statistics = statistics.storage_and_layout().0;
    let statistics = A::cpu_storage_as_slice(host(&statistics)?)?;
    let (max, rest) = statistics.split_at(num_rows);
    let (sum, total) = rest.split_at(num_rows);
    map(num_rows, 1, |row| {
        let mut gradient = [A::ZERO];
        upstream.load(Line { row, class: 0, along: Along::Rows }, &mut gradient);
        let [upstream] = gradient;
        let (max, sum) = (max[row], sum[row].to_f64());
        let lse = max.to_f64() + sum.ln();
        let pull = total[row].to_f64() + 2. * problem.z_loss * lse;
        RowGradient { max, scale: A::from_f64(upstream.to_f64() * pull / sum), upstream }
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
        targets.coefficients(Line { row, class, along: Along::Classes }, out);
    })?;
    Ok(f32::to_cpu_storage_owned(soft))
}
