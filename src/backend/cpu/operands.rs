//! What the kernels read: logits, targets and coefficients, of any dtype and layout.

use super::FEW_CLASSES;
use super::element::Element;
use super::parallel::{BLOCK, filled, split};
use super::vector::Real;
use crate::backend::{self, Coefficient, Coefficients, Problem, Rows, check_layout, num_rows};
use crate::error::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Layout, Storage, StorageRef};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A tensor's numbers and where they lie.
pub(super) type Operand<'a> = backend::Operand<'a, CpuStorage>;

/// A stretch of elements along one dimension, from the given row and class on.
#[derive(Clone, Copy)]
pub(super) struct Line {
    pub row: usize,
    pub class: usize,
    pub along: Along,
}

#[derive(Clone, Copy)]
pub(super) enum Along {
    Classes,
    Rows,
}

impl Along {
    /// The direction in which contiguous logits and their gradient lie in memory: the classes of a
    /// row, or the rows of a class if other dimensions follow the class dimension. A matter of the shape
    /// alone, so that a view gives the bits of its contiguous copy.
    pub(super) fn of(problem: &Problem, dims: &[usize]) -> Self {
        match dims[problem.class_dim + 1..].iter().product() {
            1 => Self::Classes,
            _ => Self::Rows,
        }
    }

    /// The direction in which forward reads. With few classes a row is too short to work on alone.
    pub(super) fn forward(problem: &Problem, dims: &[usize], num_classes: usize) -> Self {
        match num_classes {
            ..=FEW_CLASSES => Self::Rows,
            _ => Self::of(problem, dims),
        }
    }
}

impl Line {
    pub(super) fn at(self, class: usize) -> Self {
        Self { class, ..self }
    }

    pub(super) fn row(self, i: usize) -> usize {
        match self.along {
            Along::Classes => self.row,
            Along::Rows => self.row + i,
        }
    }

    pub(super) fn class(self, i: usize) -> usize {
        match self.along {
            Along::Classes => self.class + i,
            Along::Rows => self.class,
        }
    }
}

/// The numbers of a tensor by row and class.
pub(super) struct View<'a> {
    values: Values<'a>,
    /// Where the first of the values would be, were they all of the tensor's.
    origin: usize,
    rows: Rows,
    pub num_rows: usize,
    /// The first of the classes that there are.
    first_class: usize,
    class_stride: usize,
}

pub(super) enum Values<'a> {
    /// By position, since candle does not name the type.
    F8(Box<dyn Fn(usize) -> f32 + Sync + 'a>),
    BF16(&'a [bf16]),
    F16(&'a [f16]),
    F32(&'a [f32]),
    F64(&'a [f64]),
}

impl<'a> View<'a> {
    /// With `class_dim` beyond the dimensions, each element is a row of its own.
    pub(super) fn new((storage, layout): Operand<'a>, class_dim: usize) -> Result<Self> {
        let (values, len) = match storage {
            CpuStorage::F8E4M3(values) => {
                (Values::F8(Box::new(|i| values[i].to_f32())), values.len())
            }
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
        Ok(Self::with(values, 0, layout, class_dim))
    }

    /// Of a contiguous tensor of these dimensions, the values from `origin` on.
    pub(super) fn of_piece<A: Real>(
        values: &'a [A],
        origin: usize,
        dims: &[usize],
        class_dim: usize,
    ) -> Self {
        Self::with(A::to_values(values), origin, &Layout::contiguous(dims), class_dim)
    }

    fn with(values: Values<'a>, origin: usize, layout: &Layout, class_dim: usize) -> Self {
        Self {
            values,
            origin,
            rows: Rows::new(layout, Some(class_dim)),
            num_rows: num_rows(layout.dims(), class_dim),
            first_class: 0,
            class_stride: layout.stride().get(class_dim).copied().unwrap_or(0),
        }
    }

    /// The classes are counted from this one on.
    pub(super) fn with_first_class(mut self, first_class: usize) -> Self {
        self.first_class = first_class;
        self
    }

    /// Where a class is among the values, given where its row is.
    #[inline(always)]
    fn position(&self, row: usize, class: usize) -> usize {
        row + (class - self.first_class) * self.class_stride - self.origin
    }

    /// The line's numbers where they are, if they lie next to each other in this dtype.
    #[inline(always)]
    pub(super) fn lend<T: Element>(&self, line: Line, len: usize) -> Option<&[T]> {
        let values = T::values(&self.values)?;
        let run = self.rows.run(line.row);
        let is_contiguous = match line.along {
            Along::Classes => self.class_stride == 1,
            Along::Rows => run.stride == 1 && run.len >= len,
        };
        let start = self.position(run.offset, line.class);
        if is_contiguous { values.get(start..start + len) } else { None }
    }

    /// Fills `out`, at most a block, from the line's start on.
    #[inline(always)]
    pub(super) fn load<A: Real>(&self, line: Line, out: &mut [A]) {
        match self.lend(line, out.len()) {
            Some(values) => out.copy_from_slice(values),
            None => self.convert(line, out),
        }
    }

    /// The same of whatever dtype and layout. Compiled once, not for each instruction set: that would be
    /// most of the crate's code.
    #[inline(never)]
    fn convert<A: Real>(&self, line: Line, out: &mut [A]) {
        let mut filled = 0;
        while filled < out.len() {
            let run = self.rows.run(line.row(filled));
            let (stride, len) = match line.along {
                Along::Classes => (self.class_stride, out.len()),
                Along::Rows => (run.stride, run.len.min(out.len() - filled)),
            };
            let start = self.position(run.offset, line.class);
            let out = &mut out[filled..filled + len];
            match &self.values {
                Values::F8(value) => {
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = A::from_f32(value(start + i * stride));
                    }
                }
                Values::BF16(values) => {
                    copy(values, start, stride, out, |v| A::from_f32(v.to_f32()))
                }
                Values::F16(values) => copy_f16(values, start, stride, out),
                Values::F32(values) => copy(values, start, stride, out, A::from_f32),
                Values::F64(values) => copy(values, start, stride, out, A::from_f64),
            }
            filled += len;
        }
    }
}

/// Values at a stride, in the dtype of the arithmetic.
#[inline(always)]
fn copy<T: Copy, A>(
    values: &[T],
    start: usize,
    stride: usize,
    out: &mut [A],
    convert: impl Fn(T) -> A,
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

/// The same for at most a block of f16, which processors convert eight at a time; half knows which do.
fn copy_f16<A: Real>(values: &[f16], start: usize, stride: usize, out: &mut [A]) {
    let mut block = [f16::ZERO; BLOCK];
    let block = &mut block[..out.len()];
    copy(values, start, stride, block, |value| value);
    let mut floats = [0f32; BLOCK];
    let floats = &mut floats[..out.len()];
    block.convert_to_f32_slice(floats);
    out.iter_mut().zip(floats).for_each(|(out, &mut value)| *out = A::from_f32(value));
}

/// The targets and their coefficients r.
pub(super) struct Targets<'a, A> {
    columns: Columns<'a, A>,
    given: Given<'a>,
    ignores: bool,
}

enum Given<'a> {
    Classes(Vec<u32>),
    Probabilities(View<'a>),
}

impl<'a, A: Real> Targets<'a, A> {
    pub(super) fn new(
        problem: &Problem,
        columns: Columns<'a, A>,
        targets: Operand<'a>,
    ) -> Result<Self> {
        let given = match targets.0.dtype().is_int() {
            true => {
                if problem.num_classes > IGNORED as usize {
                    let what = "logits of class indices beyond 32 bits,";
                    return Err(Error::TooLarge { what, shape: vec![problem.num_classes] });
                }
                Given::Classes(labels(targets, problem.num_classes, problem.ignore_index)?)
            }
            false => Given::Probabilities(View::new(targets, problem.class_dim)?),
        };
        Ok(Self { columns, given, ignores: problem.ignore_index.is_some() })
    }

    pub(super) fn is_ignored(&self, row: usize) -> bool {
        matches!(&self.given, Given::Classes(labels) if labels[row] == IGNORED)
    }

    /// Sets to 0 what belongs to ignored rows, one value a row: even 0·NaN would spoil them.
    #[inline(always)]
    pub(super) fn clear_ignored<T: Element>(&self, first_row: usize, out: &mut [T]) {
        if let Given::Classes(labels) = &self.given
            && self.ignores
        {
            for (out, &label) in out.iter_mut().zip(&labels[first_row..]) {
                *out = if label == IGNORED { T::ZERO } else { *out };
            }
        }
    }

    /// What the row adds to the denominator of a mean.
    pub(super) fn weight(&self, row: usize) -> A {
        match &self.given {
            Given::Classes(labels) if labels[row] == IGNORED => A::ZERO,
            Given::Classes(labels) => self.columns.weight.at(labels[row] as usize),
            Given::Probabilities(_) => A::one(),
        }
    }

    /// The coefficients r of `len` classes of a row, followed by zeros up to the buffer's length. They
    /// are brought to the buffer only if they differ from class to class and lie nowhere yet.
    #[inline(always)]
    pub(super) fn of_row<'b>(
        &'b self,
        row: usize,
        class: usize,
        len: usize,
        buffer: &'b mut [A],
    ) -> OfRow<'b, A> {
        if let Given::Classes(labels) = &self.given
            && len == buffer.len()
        {
            let label = labels[row] as usize;
            let here = label.checked_sub(class).filter(|i| *i < len);
            match (&self.columns.spread, here) {
                (Column::Uniform(r), None) => return OfRow::Equal(*r, None),
                (Column::PerClass(r), None) => return OfRow::Each(&r[class..class + len]),
                (Column::Uniform(r), Some(i)) => {
                    // Where the label weighs less than the others, the difference of two sums would
                    // lose digits.
                    let surplus = self.columns.own.at(label).to_f64() - r.to_f64();
                    if surplus >= 0. {
                        return OfRow::Equal(*r, Some((i, surplus)));
                    }
                }
                (Column::PerClass(_), Some(_)) => {}
            }
        }
        let (out, padding) = buffer.split_at_mut(len);
        self.fill(Line { row, class, along: Along::Classes }, out);
        padding.fill(A::ZERO);
        OfRow::Each(buffer)
    }

    /// Fills `out` with r: the formula at the head of the `backend` module.
    #[inline(always)]
    pub(super) fn fill(&self, line: Line, out: &mut [A]) {
        match (&self.given, line.along) {
            (Given::Classes(labels), Along::Rows) => {
                let columns = &self.columns;
                let (own, spread) = (columns.own.at(line.class), columns.spread.at(line.class));
                let class = line.class as u32;
                for (r, &label) in out.iter_mut().zip(&labels[line.row..]) {
                    *r = if label == class { own } else { spread };
                }
            }
            _ => self.fill_others(line, out),
        }
    }

    /// The same of the classes of one row, and of probabilities. Compiled once, as [`View::convert`] is.
    #[inline(never)]
    fn fill_others(&self, line: Line, out: &mut [A]) {
        let columns = &self.columns;
        match &self.given {
            Given::Classes(labels) => {
                columns.spread.copy(line.class, out);
                let label = labels[line.row] as usize;
                let here = label.checked_sub(line.class);
                if let Some(r) = here.and_then(|i| out.get_mut(i)) {
                    *r = columns.own.at(label);
                }
            }
            Given::Probabilities(view) => {
                view.load(line, out);
                match (&columns.scale, &columns.spread) {
                    (Column::Uniform(scale), Column::Uniform(spread)) => {
                        out.iter_mut().for_each(|r| *r = *scale * *r + *spread);
                    }
                    (scale, spread) => {
                        for (i, r) in out.iter_mut().enumerate() {
                            let class = line.class(i);
                            *r = scale.at(class) * *r + spread.at(class);
                        }
                    }
                }
            }
        }
    }
}

/// The coefficients of some classes of a row.
#[derive(Clone, Copy)]
pub(super) enum OfRow<'a, A> {
    /// The same for all, but for the label's, if it is among them: its position, and what it has more.
    Equal(A, Option<(usize, f64)>),
    Each(&'a [A]),
}

/// The coefficients, lent by their tensor.
pub(super) enum Table<'a> {
    Uniform(Coefficient),
    PerClass(StorageRef<'a>),
}

pub(super) struct Columns<'a, A> {
    scale: Column<'a, A>,
    spread: Column<'a, A>,
    own: Column<'a, A>,
    weight: Column<'a, A>,
}

pub(super) enum Column<'a, A> {
    Uniform(A),
    PerClass(&'a [A]),
}

impl<'a> Table<'a> {
    pub(super) fn new(coefficients: &'a Coefficients) -> Self {
        match coefficients {
            Coefficients::Uniform(coefficient) => Self::Uniform(*coefficient),
            Coefficients::PerClass(table) => Self::PerClass(table.storage_and_layout().0),
        }
    }

    pub(super) fn columns<A: Real>(&self) -> Result<Columns<'_, A>> {
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
                Columns { scale: column(0), spread: column(1), own: column(2), weight: column(3) }
            }
        })
    }
}

impl<A: Real> Column<'_, A> {
    /// The values from `class` on.
    fn copy(&self, class: usize, out: &mut [A]) {
        match self {
            Self::Uniform(value) => out.fill(*value),
            Self::PerClass(values) => out.copy_from_slice(&values[class..class + out.len()]),
        }
    }

    fn at(&self, class: usize) -> A {
        match self {
            Self::Uniform(value) => *value,
            Self::PerClass(values) => values[class],
        }
    }
}

/// Marks an ignored row among the labels; no class has this index.
const IGNORED: u32 = u32::MAX;

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
) -> Result<Vec<u32>> {
    match targets {
        CpuStorage::U8(values) => labels_of(values, layout, num_classes, ignore_index),
        CpuStorage::U32(values) => labels_of(values, layout, num_classes, ignore_index),
        CpuStorage::I16(values) => labels_of(values, layout, num_classes, ignore_index),
        CpuStorage::I32(values) => labels_of(values, layout, num_classes, ignore_index),
        CpuStorage::I64(values) => labels_of(values, layout, num_classes, ignore_index),
        _ => Err(Error::TargetsDType { dtype: targets.dtype(), expected: "an integer dtype" }),
    }
}

fn labels_of<T: Copy + Into<i64> + Sync>(
    values: &[T],
    layout: &Layout,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<Vec<u32>> {
    check_layout(layout, values.len())?;
    let rows = Rows::new(layout, None);
    let num_rows = layout.shape().elem_count();
    let label = |target: i64| match usize::try_from(target) {
        _ if Some(target) == ignore_index => Some(IGNORED),
        Ok(class) if class < num_classes => Some(class as u32),
        _ => None,
    };
    let mut labels = filled(num_rows)?;
    let first_bad = AtomicUsize::new(usize::MAX);
    split([&mut labels], BLOCK, 1, &|first, [labels]| {
        let mut done = 0;
        while done < labels.len() {
            let run = rows.run(first + done);
            for (i, out) in labels[done..].iter_mut().take(run.len).enumerate() {
                *out = label(values[run.offset + i * run.stride].into()).unwrap_or_else(|| {
                    first_bad.fetch_min(first + done + i, Ordering::Relaxed);
                    IGNORED
                });
            }
            done += run.len;
        }
    });
    match first_bad.into_inner() {
        usize::MAX => Ok(labels),
        row => {
            let target = values[rows.run(row).offset].into();
            Err(Error::TargetOutOfRange { row, target, num_classes })
        }
    }
}

/// The numbers of a tensor that the loss itself made, which is where the logits are.
pub(super) fn host(storage: &Storage) -> Result<&CpuStorage> {
    match storage {
        Storage::Cpu(storage) => Ok(storage),
        other => {
            let device = other.device().location();
            let message = format!("coefficients or statistics are on {device:?}, not on the CPU");
            Err(Error::Candle(candle_core::Error::Msg(message)))
        }
    }
}
