//! The targets, and the weighted targets r that follow from them.

use super::dtype::Real;
use super::input::{BlockPos, InnerAxis, StridedRows, field_slices};
use super::parallel::{BLOCK, default_vec, par_split};
use crate::error::{Error, Result, TargetsOf};
use crate::formula::{CLASS_FIELDS, ClassParams, ClassTable, LossParams};
use crate::layout::{Operand, RowOffsets, check_layout, num_rows};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Storage, StorageRef};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The targets of all rows, with the params of all classes.
pub(super) struct Targets<'a, A> {
    class_params: ClassParams<ClassValues<'a, A>>,
    data: TargetData<'a>,
    row_weights: Option<Vec<f64>>,
    may_ignore: bool,
    label_is_below: bool,
    spreads_over_unmasked: bool,
    unmasked_scale: A,
}

enum TargetData<'a> {
    /// A class index for each row, or [`IGNORED`]. A row of weight 0 is ignored too.
    Labels(Vec<u32>),
    /// Of the classes of the logits.
    Probabilities(StridedRows<'a>),
}

/// Marks an ignored row among the labels. No class has this index.
const IGNORED: u32 = u32::MAX;

/// The weighted targets r of a block of classes of one row.
#[derive(Clone, Copy)]
pub(super) enum TargetBlock<'a, A> {
    /// One value for all classes but the label. If the label is in this block, the second field has its index in the
    /// block and its value, which is not less than that of the others.
    Uniform(A, Option<(usize, A)>),
    Slice(&'a [A]),
}

impl<'a, A: Real> Targets<'a, A> {
    pub(super) fn new(
        params: &LossParams,
        class_table: &'a LockedClassTable,
        targets: Operand<'a, CpuStorage>,
    ) -> Result<Self> {
        let row_weights = read_row_weights::<A>(params)?;
        let data = match targets.0.dtype().is_int() {
            true => {
                if params.num_classes > IGNORED as usize {
                    let what = "logits of class indices beyond 32 bits,";
                    return Err(Error::TooLarge { what, shape: vec![params.num_classes] });
                }
                TargetData::Labels(read_labels(
                    targets,
                    params.num_classes,
                    params.ignore_index,
                    row_weights.as_deref(),
                )?)
            }
            false => {
                let first_class = params.first_class;
                TargetData::Probabilities(StridedRows::new(targets, params.class_dim, first_class)?)
            }
        };
        Ok(Self {
            class_params: class_table.class_params()?,
            data,
            may_ignore: params.ignore_index.is_some() || row_weights.is_some(),
            row_weights,
            label_is_below: params.label_is_below,
            spreads_over_unmasked: params.unmasked_epsilon != 0.,
            unmasked_scale: A::from_f64(params.unmasked_scale()),
        })
    }

    /// Whether the row does not count.
    #[inline(always)]
    pub(super) fn is_ignored(&self, row: usize) -> bool {
        match &self.data {
            TargetData::Labels(labels) => labels[row] == IGNORED,
            TargetData::Probabilities(_) => self.row_weight(row) == 0.,
        }
    }

    /// The factor of the row's loss.
    #[inline(always)]
    pub(super) fn row_weight(&self, row: usize) -> f64 {
        self.row_weights.as_ref().map_or(1., |weights| weights[row])
    }

    /// The index of the row's label in a range of the classes, if it is there and counts.
    #[inline(always)]
    pub(super) fn label_in(&self, row: usize, class: usize, len: usize) -> Option<usize> {
        match &self.data {
            TargetData::Labels(labels) => {
                (labels[row] as usize).checked_sub(class).filter(|i| *i < len)
            }
            TargetData::Probabilities(_) => None,
        }
    }

    /// Whether the weighted targets of the row may be NaN: those of probabilities that are.
    pub(super) fn may_be_nan(&self, row: usize) -> bool {
        matches!(self.data, TargetData::Probabilities(_)) && !self.is_ignored(row)
    }

    pub(super) fn is_label(&self, row: usize, class: u32) -> bool {
        matches!(&self.data, TargetData::Labels(labels) if labels[row] == class)
    }

    /// Whether the classes whose logit is not −∞ get a share of their own.
    pub(super) fn spreads_over_unmasked(&self) -> bool {
        self.spreads_over_unmasked
    }

    /// Sets the values of ignored rows to 0, one value for each row from `first_row` on. A product with 0 would keep NaN.
    #[inline(always)]
    pub(super) fn zero_ignored(&self, first_row: usize, out: &mut [A]) {
        if !self.may_ignore {
            return;
        }
        match (&self.data, &self.row_weights) {
            (TargetData::Labels(labels), _) => {
                for (out, &label) in out.iter_mut().zip(&labels[first_row..]) {
                    *out = if label == IGNORED { A::ZERO } else { *out };
                }
            }
            (TargetData::Probabilities(_), Some(weights)) => {
                for (out, &weight) in out.iter_mut().zip(&weights[first_row..]) {
                    *out = if weight == 0. { A::ZERO } else { *out };
                }
            }
            (TargetData::Probabilities(_), None) => {}
        }
    }

    /// The row's term in the divisor of a mean.
    pub(super) fn weight(&self, row: usize) -> f64 {
        let class_weight = match &self.data {
            TargetData::Labels(labels) if labels[row] == IGNORED => return 0.,
            TargetData::Labels(labels) => {
                self.class_params.weight.at(labels[row] as usize).to_f64()
            }
            TargetData::Probabilities(_) => 1.,
        };
        class_weight * self.row_weight(row)
    }

    /// Fills `out` with the class weights from `class` on, times [`unmasked_scale`](LossParams::unmasked_scale).
    pub(super) fn scaled_class_weights(&self, class: usize, out: &mut [A]) {
        self.class_params.weight.copy_to(class, out);
        out.iter_mut().for_each(|weight| *weight *= self.unmasked_scale);
    }

    /// The weighted targets of `len` classes of a row, followed by zeros up to the length of `buffer`. They are written to
    /// `buffer`, except for class indices without padding: there a uniform block is not copied unless its label's value is
    /// smaller than the others', and a block of values for each class is not copied unless it has the label.
    #[inline(always)]
    pub(super) fn block<'b>(
        &'b self,
        row: usize,
        class: usize,
        len: usize,
        buffer: &'b mut [A],
    ) -> TargetBlock<'b, A> {
        if let TargetData::Labels(labels) = &self.data
            && len == buffer.len()
        {
            let (label, label_index) = (labels[row] as usize, self.label_in(row, class, len));
            match (&self.class_params.off_value, label_index) {
                (ClassValues::Uniform(r), None) => return TargetBlock::Uniform(*r, None),
                (ClassValues::PerClass(r), None) => {
                    return TargetBlock::Slice(&r[class..class + len]);
                }
                // A negative difference would cancel digits of the sum.
                (ClassValues::Uniform(r), Some(i)) if !self.label_is_below => {
                    let on_value = self.class_params.on_value.at(label);
                    return TargetBlock::Uniform(*r, Some((i, on_value)));
                }
                (_, Some(_)) => {}
            }
        }
        let (out, padding) = buffer.split_at_mut(len);
        self.load(BlockPos { row, class, axis: InnerAxis::Class }, out);
        padding.fill(A::ZERO);
        TargetBlock::Slice(buffer)
    }

    /// Fills `out` with the weighted targets of a block.
    #[inline(always)]
    pub(super) fn load(&self, pos: BlockPos, out: &mut [A]) {
        match (&self.data, pos.axis) {
            (TargetData::Labels(labels), InnerAxis::Row) => {
                let on_value = self.class_params.on_value.at(pos.class);
                let off_value = self.class_params.off_value.at(pos.class);
                let class = pos.class as u32;
                for (r, &label) in out.iter_mut().zip(&labels[pos.row..]) {
                    *r = if label == class { on_value } else { off_value };
                }
            }
            _ => self.load_slow(pos, out),
        }
    }

    /// Like [`load`](Self::load), for the other cases. Compiled once and not for each instruction set.
    #[inline(never)]
    fn load_slow(&self, pos: BlockPos, out: &mut [A]) {
        let ClassParams { prob_scale, off_value, on_value, .. } = &self.class_params;
        match &self.data {
            TargetData::Labels(labels) => {
                off_value.copy_to(pos.class, out);
                let label = labels[pos.row] as usize;
                let label_index = label.checked_sub(pos.class);
                if let Some(r) = label_index.and_then(|i| out.get_mut(i)) {
                    *r = on_value.at(label);
                }
            }
            TargetData::Probabilities(probabilities) => {
                probabilities.load(pos, out);
                match (prob_scale, off_value) {
                    (ClassValues::Uniform(scale), ClassValues::Uniform(off_value)) => {
                        out.iter_mut().for_each(|r| *r = *scale * *r + *off_value);
                    }
                    _ => {
                        for (i, r) in out.iter_mut().enumerate() {
                            let class = pos.class_of(i);
                            *r = prob_scale.at(class) * *r + off_value.at(class);
                        }
                    }
                }
            }
        }
    }
}

/// A [`ClassTable`] whose tensor is locked for reading.
pub(super) enum LockedClassTable<'a> {
    Uniform(ClassParams<f64>),
    PerClass(StorageRef<'a>),
}

impl<'a> LockedClassTable<'a> {
    pub(super) fn new(class_table: &'a ClassTable) -> Self {
        match class_table {
            ClassTable::Uniform(class_params) => Self::Uniform(*class_params),
            ClassTable::PerClass(tensor) => Self::PerClass(tensor.storage_and_layout().0),
        }
    }

    fn class_params<A: Real>(&self) -> Result<ClassParams<ClassValues<'_, A>>> {
        match self {
            Self::Uniform(params) => Ok(params.map(|v| ClassValues::Uniform(A::from_f64(v)))),
            Self::PerClass(storage) => {
                let Storage::Cpu(storage) = &**storage else {
                    let message = "the class params are not on the CPU".to_string();
                    return Err(candle_core::Error::Msg(message).into());
                };
                let values = A::cpu_storage_as_slice(storage)?;
                let num_classes = values.len() / CLASS_FIELDS;
                let fields = ClassParams::from_fields(field_slices(values, num_classes));
                Ok(fields.map(ClassValues::PerClass))
            }
        }
    }
}

/// One of the [`ClassParams`], of all classes.
enum ClassValues<'a, A> {
    Uniform(A),
    PerClass(&'a [A]),
}

impl<A: Real> ClassValues<'_, A> {
    /// Copies the values from `class` on.
    fn copy_to(&self, class: usize, out: &mut [A]) {
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

/// Class targets in row-major order.
pub(crate) fn label_values(targets: Operand<CpuStorage>) -> Result<Vec<i64>> {
    // The number of classes is for the error of a target out of range, and none is.
    read_integers(targets, usize::MAX, &|_, target| Some(target))
}

/// Checks the class targets.
pub(crate) fn check_labels(
    targets: Operand<CpuStorage>,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<()> {
    read_labels(targets, num_classes, ignore_index, None).map(drop)
}

/// The indices of the rows that count, or `None` if all count. Checks the row weights, and the class targets of these rows, for
/// arithmetic in `dtype`.
pub(crate) fn counted_rows(
    params: &LossParams,
    dtype: DType,
    targets: Operand<CpuStorage>,
) -> Result<Option<Vec<i64>>> {
    match dtype {
        DType::F64 => counted_rows_in::<f64>(params, targets),
        _ => counted_rows_in::<f32>(params, targets),
    }
}

fn counted_rows_in<A: Real>(
    params: &LossParams,
    targets: Operand<CpuStorage>,
) -> Result<Option<Vec<i64>>> {
    let num_rows = num_rows(targets.1.dims(), params.class_dim);
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<A>::new(params, &class_table, targets)?;
    let rows = || (0..num_rows).filter(|row| !targets.is_ignored(*row));
    let num_counted = rows().count();
    if num_counted == num_rows {
        return Ok(None);
    }
    let mut counted = default_vec(num_counted)?;
    for (counted, row) in counted.iter_mut().zip(rows()) {
        *counted = row as i64;
    }
    Ok(Some(counted))
}

/// The weight of each row, checked, and rounded to the dtype of the arithmetic.
fn read_row_weights<A: Real>(params: &LossParams) -> Result<Option<Vec<f64>>> {
    let Some(tensor) = &params.row_weights else {
        return Ok(None);
    };
    let (storage, layout) = tensor.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else {
        let message = "the row weights are not on the CPU".to_string();
        return Err(candle_core::Error::Msg(message).into());
    };
    let mut weights = default_vec::<f64>(layout.shape().elem_count())?;
    // Beyond the rank, the class dimension makes each element a row.
    let rows = StridedRows::new((storage, layout), layout.shape().rank(), 0)?;
    par_split([&mut weights], BLOCK, 1, &|first, [weights]| {
        for (i, block) in weights.chunks_mut(BLOCK).enumerate() {
            let row = first + i * BLOCK;
            rows.load(BlockPos { row, class: 0, axis: InnerAxis::Row }, block);
        }
    });
    for (row, weight) in weights.iter_mut().enumerate() {
        let value = *weight;
        *weight = A::from_f64(value).to_f64();
        if !(value >= 0. && weight.is_finite()) {
            return Err(Error::RowWeightValue { row, value });
        }
    }
    Ok(Some(weights))
}

/// The class targets as indices, each checked, or [`IGNORED`] where they equal `ignore_index` or the row's weight is 0.
fn read_labels(
    targets: Operand<CpuStorage>,
    num_classes: usize,
    ignore_index: Option<i64>,
    row_weights: Option<&[f64]>,
) -> Result<Vec<u32>> {
    let label_of = |row: usize, target: i64| match usize::try_from(target) {
        _ if Some(target) == ignore_index => Some(IGNORED),
        _ if row_weights.is_some_and(|weights| weights[row] == 0.) => Some(IGNORED),
        Ok(class) if class < num_classes => Some(class as u32),
        _ => None,
    };
    read_integers(targets, num_classes, &label_of)
}

/// What `label_of` makes of each class target, of any integer dtype. `None` is the error for a target out of range.
fn read_integers<L: Copy + Default + Send>(
    (targets, layout): Operand<CpuStorage>,
    num_classes: usize,
    label_of: &(impl Fn(usize, i64) -> Option<L> + Sync),
) -> Result<Vec<L>> {
    match targets {
        CpuStorage::U8(values) => read_integers_of(values, layout, num_classes, label_of),
        CpuStorage::U32(values) => read_integers_of(values, layout, num_classes, label_of),
        CpuStorage::I16(values) => read_integers_of(values, layout, num_classes, label_of),
        CpuStorage::I32(values) => read_integers_of(values, layout, num_classes, label_of),
        CpuStorage::I64(values) => read_integers_of(values, layout, num_classes, label_of),
        _ => Err(Error::TargetsDType { dtype: targets.dtype(), expected: "an integer dtype" }),
    }
}

fn read_integers_of<T: Copy + Into<i64> + Sync, L: Copy + Default + Send>(
    values: &[T],
    layout: &Layout,
    num_classes: usize,
    label_of: &(impl Fn(usize, i64) -> Option<L> + Sync),
) -> Result<Vec<L>> {
    check_layout(layout, values.len())?;
    let offsets = RowOffsets::new(layout, None);
    let mut labels = default_vec(layout.shape().elem_count())?;
    let first_bad_row = AtomicUsize::new(usize::MAX);
    par_split([&mut labels], BLOCK, 1, &|first, [labels]| {
        let mut done = 0;
        while done < labels.len() {
            let run = offsets.run(first + done);
            for (i, out) in labels[done..].iter_mut().take(run.len).enumerate() {
                let row = first + done + i;
                let label = label_of(row, values[run.offset + i * run.stride].into());
                *out = label.unwrap_or_else(|| {
                    first_bad_row.fetch_min(row, Ordering::Relaxed);
                    L::default()
                });
            }
            done += run.len;
        }
    });
    match first_bad_row.into_inner() {
        usize::MAX => Ok(labels),
        row => {
            let target = values[offsets.run(row).offset].into();
            Err(Error::TargetOutOfRange { row, target, num_classes, function: TargetsOf::Loss })
        }
    }
}
