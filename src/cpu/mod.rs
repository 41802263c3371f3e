//! The kernels on the CPU.
//!
//! A loop (`rows`) works on blocks along one axis: 256 classes of a row, or some classes of 128 rows side by side. It reads
//! contiguous logits in place where one target value holds for a block of classes. Elsewhere it copies a block of inputs to
//! the stack (`input`, `targets`). The arithmetic of a block (`softmax`, `exp`) is written once for all dtypes (`dtype`) and
//! compiled for each instruction set (`simd`). Blocks have a fixed size and merge in a fixed order, so the result has
//! the same bits for every number of threads (`parallel`).

mod dtype;
mod exp;
mod input;
mod parallel;
mod rows;
mod simd;
mod softmax;
mod targets;

use crate::error::{Error, Result};
use crate::formula::{Divisor, ForwardOut, LossParams, SavedState, SoftmaxState};
use crate::layout::{self, inner_size, num_rows};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, WithDType};
use dtype::{Element, FloatSlice, Real};
use half::{bf16, f16};
use input::{BlockPos, FEW_CLASSES, InnerAxis, StridedRows, field_slices};
use parallel::{BLOCK, default_vec, par_build, par_rewrite, par_split};
use rows::{GradInputs, GradOrder, for_each_row};
use softmax::GradCoeffs;
use targets::{LockedClassTable, Targets, read_labels};

type Operand<'a> = layout::Operand<'a, CpuStorage>;

// ---- Forward

/// The losses of all rows, or their reduction.
pub(crate) fn forward(
    params: &LossParams,
    logits: Operand,
    targets: Operand,
    divisor: Option<Divisor>,
    save: bool,
) -> Result<ForwardOut<CpuStorage>> {
    match logits.0.dtype() {
        DType::BF16 => forward_typed::<bf16>(params, logits, targets, divisor, save),
        DType::F16 => forward_typed::<f16>(params, logits, targets, divisor, save),
        DType::F32 => forward_typed::<f32>(params, logits, targets, divisor, save),
        DType::F64 => forward_typed::<f64>(params, logits, targets, divisor, save),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn forward_typed<T: Element>(
    params: &LossParams,
    logits: Operand,
    targets: Operand,
    divisor: Option<Divisor>,
    save: bool,
) -> Result<ForwardOut<CpuStorage>> {
    let num_classes = params.num_classes;
    let axis = InnerAxis::of_forward(params, logits.1.dims(), num_classes);
    let logits = StridedRows::new(logits, params.class_dim)?;
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<T::Real>::new(params, &class_table, targets)?;
    let mut rows = RowResults::new(logits.num_rows)?;
    for_each_row::<T, _, _>(
        &logits,
        &targets,
        axis,
        0..num_classes,
        rows.fields(),
        &|row, i, state, out| RowResults::write(params, &targets, row, i, state, out),
    )?;
    Ok(rows.reduce(&targets, divisor, save))
}

/// Merges the states over a range of the classes, whose logits are given, into those of the ranges before it. The logits
/// are f32 or f64.
pub(crate) fn merge_tile(
    params: &LossParams,
    state: (&mut CpuStorage, &Layout),
    logits: Operand,
    targets: Operand,
) -> Result<()> {
    match logits.0.dtype() {
        DType::F32 => merge_tile_typed::<f32>(params, state, logits, targets),
        DType::F64 => merge_tile_typed::<f64>(params, state, logits, targets),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn merge_tile_typed<T: Element>(
    params: &LossParams,
    (states, layout): (&mut CpuStorage, &Layout),
    logits: Operand,
    targets: Operand,
) -> Result<()> {
    let first = params.first_class;
    let classes = first..first + logits.1.dims()[params.class_dim];
    let axis = InnerAxis::of_forward(params, logits.1.dims(), classes.len());
    let logits = StridedRows::new(logits, params.class_dim)?.with_first_class(first);
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<T::Real>::new(params, &class_table, targets)?;
    let out: [_; SoftmaxState::<()>::FIELDS] =
        field_slices_mut(contiguous_mut::<f64>(states, layout)?, logits.num_rows);
    for_each_row::<T, _, _>(&logits, &targets, axis, classes, out, &|_, i, state, out| {
        let merged = match first {
            0 => state,
            _ => SoftmaxState::from_fields(out.each_ref().map(|field| field[i])).merge(state),
        };
        write_fields(out, i, merged.into_fields());
    })
}

/// The losses from the states over all classes.
pub(crate) fn finish(
    params: &LossParams,
    logits_dtype: DType,
    states: Operand,
    targets: Operand,
    divisor: Option<Divisor>,
    save: bool,
) -> Result<ForwardOut<CpuStorage>> {
    match logits_dtype {
        DType::F64 => finish_typed::<f64>(params, states, targets, divisor, save),
        _ => finish_typed::<f32>(params, states, targets, divisor, save),
    }
}

fn finish_typed<A: Real>(
    params: &LossParams,
    (states, layout): Operand,
    targets: Operand,
    divisor: Option<Divisor>,
    save: bool,
) -> Result<ForwardOut<CpuStorage>> {
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<A>::new(params, &class_table, targets)?;
    let num_rows = layout.dims()[1];
    // The fields take the place of the classes.
    let states = StridedRows::new((states, layout), 0)?;
    let mut rows = RowResults::<A>::new(num_rows)?;
    par_split(rows.fields(), 1, 1, &|first, mut out| {
        for i in 0..out[0].len() {
            let row = first + i;
            let mut fields = [0.; SoftmaxState::<()>::FIELDS];
            states.load(BlockPos { row, class: 0, axis: InnerAxis::Class }, &mut fields);
            let state = SoftmaxState::from_fields(fields);
            RowResults::write(params, &targets, row, i, state, &mut out);
        }
    });
    Ok(rows.reduce(&targets, divisor, save))
}

/// The loss of each row, and what backward needs of it.
struct RowResults<A> {
    losses: Vec<A>,
    /// ([`SavedState::FIELDS`], N).
    saved: Vec<A>,
}

/// The loss, and the fields of [`SavedState`].
const ROW_RESULTS: usize = 1 + SavedState::<()>::FIELDS;

impl<A: Real> RowResults<A> {
    fn new(num_rows: usize) -> Result<Self> {
        Ok(Self {
            losses: default_vec(num_rows)?,
            saved: default_vec(SavedState::<()>::FIELDS * num_rows)?,
        })
    }

    fn fields(&mut self) -> [&mut [A]; ROW_RESULTS] {
        let [max, sum_exp, target_sum] = field_slices_mut(&mut self.saved, self.losses.len());
        [&mut self.losses, max, sum_exp, target_sum]
    }

    /// Writes a row's results to index `i` of the fields: the formula of the loss.
    fn write(
        params: &LossParams,
        targets: &Targets<A>,
        row: usize,
        i: usize,
        state: SoftmaxState<f64>,
        fields: &mut [&mut [A]; ROW_RESULTS],
    ) {
        let log_sum = state.sum_exp.ln();
        let lse = state.max + log_sum;
        let loss = match targets.is_ignored(row) {
            true => 0.,
            // z·lse comes first: without z-loss an overflowing lse² would become 0·∞.
            false => state.target_sum * log_sum - state.target_dot + params.z_loss * lse * lse,
        };
        let results = [loss, state.max, state.sum_exp, state.target_sum];
        write_fields(fields, i, results.map(A::from_f64));
    }

    fn reduce(
        self,
        targets: &Targets<A>,
        divisor: Option<Divisor>,
        save: bool,
    ) -> ForwardOut<CpuStorage> {
        let Self { losses, saved } = self;
        let num_rows = losses.len();
        let saved = save.then(|| A::to_cpu_storage_owned(saved));
        let (divisor, weight_sum) = match divisor {
            None => {
                let loss = A::to_cpu_storage_owned(losses);
                return ForwardOut { loss, weight_sum: None, saved };
            }
            Some(Divisor::Number(number)) => (number, None),
            Some(Divisor::WeightSum) => {
                let sum = sum_rows(num_rows, |row| targets.weight(row).to_f64());
                (sum, Some(CpuStorage::F64(vec![sum])))
            }
        };
        let loss = sum_rows(num_rows, |row| losses[row].to_f64()) / divisor;
        let loss = A::to_cpu_storage_owned(vec![A::from_f64(loss)]);
        ForwardOut { loss, weight_sum, saved }
    }
}

/// Sums a number of each row in f64: a sum of a million losses in f32 would lose half their digits. The additions to
/// several partial sums do not wait for each other.
fn sum_rows(num_rows: usize, of_row: impl Fn(usize) -> f64) -> f64 {
    let mut sums = [0.; 8];
    for first in (0..num_rows).step_by(sums.len()) {
        for (row, sum) in (first..num_rows).zip(&mut sums) {
            *sum += of_row(row);
        }
    }
    sums.iter().sum()
}

/// [`field_slices`], to be written.
fn field_slices_mut<T, const N: usize>(mut values: &mut [T], len: usize) -> [&mut [T]; N] {
    [(); N].map(|()| {
        let (field, rest) = std::mem::take(&mut values).split_at_mut(len);
        values = rest;
        field
    })
}

/// Writes index `i` of each field.
fn write_fields<T: Copy, const N: usize>(fields: &mut [&mut [T]; N], i: usize, values: [T; N]) {
    for (field, value) in fields.iter_mut().zip(values) {
        field[i] = value;
    }
}

/// The values of a contiguous tensor that is changed in place.
fn contiguous_mut<'a, A: Real>(
    storage: &'a mut CpuStorage,
    layout: &Layout,
) -> Result<&'a mut [A]> {
    let values = layout
        .contiguous_offsets()
        .and_then(|(start, end)| A::as_slice_mut(storage)?.get_mut(start..end));
    values.ok_or_else(|| candle_core::Error::RequiresContiguous { op: "in place" }.bt().into())
}

// ---- Backward

/// The gradient of the logits, in their dtype and shape, contiguous.
pub(crate) fn backward(
    params: &LossParams,
    logits: Operand,
    targets: Operand,
    grad_output: Operand,
    saved: Operand,
) -> Result<CpuStorage> {
    match logits.0.dtype() {
        DType::BF16 => backward_typed::<bf16>(params, logits, targets, grad_output, saved),
        DType::F16 => backward_typed::<f16>(params, logits, targets, grad_output, saved),
        DType::F32 => backward_typed::<f32>(params, logits, targets, grad_output, saved),
        DType::F64 => backward_typed::<f64>(params, logits, targets, grad_output, saved),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn backward_typed<T: Element>(
    params: &LossParams,
    logits: Operand,
    targets: Operand,
    grad_output: Operand,
    saved: Operand,
) -> Result<CpuStorage> {
    let dims = logits.1.dims();
    let logits = StridedRows::new(logits, params.class_dim)?.with_first_class(params.first_class);
    let gradient = with_grad_inputs::<T, _>(params, dims, targets, grad_output, saved, |grad| {
        par_build(dims.iter().product(), grad.piece_multiple(), |start, out| {
            grad.write(&logits, start, out)
        })
    })?;
    Ok(T::to_cpu_storage_owned(gradient))
}

/// Overwrites contiguous logits, f32 or f64, with their gradient.
pub(crate) fn backward_in_place(
    params: &LossParams,
    logits: (&mut CpuStorage, &Layout),
    targets: Operand,
    grad_output: Operand,
    saved: Operand,
) -> Result<()> {
    match logits.0.dtype() {
        DType::F32 => in_place_typed::<f32>(params, logits, targets, grad_output, saved),
        DType::F64 => in_place_typed::<f64>(params, logits, targets, grad_output, saved),
        dtype => Err(Error::LogitsDType { dtype }),
    }
}

fn in_place_typed<A: Real>(
    params: &LossParams,
    (logits, layout): (&mut CpuStorage, &Layout),
    targets: Operand,
    grad_output: Operand,
    saved: Operand,
) -> Result<()> {
    let (dims, logits) = (layout.dims(), contiguous_mut::<A>(logits, layout)?);
    with_grad_inputs::<A, _>(params, dims, targets, grad_output, saved, |grad| {
        par_rewrite(logits, grad.piece_multiple(), |start, logits, out| {
            let logits = StridedRows::piece(logits, start, dims, params.class_dim);
            grad.write(&logits.with_first_class(params.first_class), start, out);
        });
        Ok(())
    })
}

/// Prepares [`GradInputs`] for logits of dimensions `dims`, and calls `f` with them.
fn with_grad_inputs<T: Element, R>(
    params: &LossParams,
    dims: &[usize],
    targets: Operand,
    grad_output: Operand,
    saved: Operand,
    f: impl FnOnce(&GradInputs<T>) -> Result<R>,
) -> Result<R> {
    let num_classes = dims[params.class_dim];
    let order = match InnerAxis::of_memory(params, dims) {
        InnerAxis::Class if num_classes <= FEW_CLASSES => GradOrder::SideBySide,
        InnerAxis::Class => GradOrder::RowByRow,
        InnerAxis::Row => GradOrder::ClassByClass,
    };
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<T::Real>::new(params, &class_table, targets)?;
    let saved = saved_slices::<T::Real>(saved, num_rows(dims, params.class_dim))?;
    let grad_output = StridedRows::new(grad_output, grad_output.1.shape().rank())?;
    let (exp_scale, neg_grad_output) = grad_coeffs(params, saved, &grad_output)?;
    f(&GradInputs {
        targets: &targets,
        order,
        first_class: params.first_class,
        num_classes,
        inner_size: inner_size(dims, params.class_dim).max(1),
        coeffs: GradCoeffs {
            max: saved.max,
            exp_scale: &exp_scale,
            neg_grad_output: &neg_grad_output,
        },
    })
}

fn saved_slices<A: Real>(
    (saved, layout): Operand<'_>,
    num_rows: usize,
) -> Result<SavedState<&[A]>> {
    let values = A::cpu_storage_as_slice(saved)?;
    let values = layout.contiguous_offsets().and_then(|(start, end)| values.get(start..end));
    match values {
        Some(values) if values.len() == SavedState::<()>::FIELDS * num_rows => {
            Ok(SavedState::from_fields(field_slices(values, num_rows)))
        }
        _ => Err(candle_core::Error::RequiresContiguous { op: "backward" }.bt().into()),
    }
}

/// `exp_scale` and `neg_grad_output` of each row.
fn grad_coeffs<A: Real>(
    params: &LossParams,
    saved: SavedState<&[A]>,
    grad_output: &StridedRows,
) -> Result<(Vec<A>, Vec<A>)> {
    let num_rows = saved.max.len();
    let (mut exp_scale, mut neg_grad_output) = (default_vec(num_rows)?, default_vec(num_rows)?);
    par_split([&mut exp_scale, &mut neg_grad_output], BLOCK, 1, &|first, [scales, negs]| {
        let blocks = scales.chunks_mut(BLOCK).zip(negs.chunks_mut(BLOCK));
        for (i, (scales, negs)) in blocks.enumerate() {
            let first = first + i * BLOCK;
            grad_output.load(BlockPos { row: first, class: 0, axis: InnerAxis::Row }, negs);
            for (row, (exp_scale, neg)) in (first..).zip(scales.iter_mut().zip(negs)) {
                let grad_output: A = *neg;
                let sum_exp = saved.sum_exp[row].to_f64();
                let mut softmax_coeff = saved.target_sum[row].to_f64();
                if params.z_loss != 0. {
                    let lse = saved.max[row].to_f64() + sum_exp.ln();
                    softmax_coeff += params.z_loss * (2. * lse);
                }
                *exp_scale = A::from_f64(grad_output.to_f64() * softmax_coeff / sum_exp);
                *neg = A::from_f64(-grad_output.to_f64());
            }
        }
    });
    Ok((exp_scale, neg_grad_output))
}

// ---- Targets

/// The smoothed targets of all rows, in f32.
pub(crate) fn smooth_targets(params: &LossParams, labels: Operand) -> Result<CpuStorage> {
    let num_rows = match labels.0.dtype().is_int() {
        true => labels.1.shape().elem_count(),
        false => num_rows(labels.1.dims(), params.class_dim),
    };
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<f32>::new(params, &class_table, labels)?;
    let num_classes = params.num_classes;
    let smoothed = par_build(num_rows * num_classes, num_classes, |start, out| {
        let mut block = [0.; BLOCK];
        let (mut row, mut class) = (start / num_classes, start % num_classes);
        while out.remaining() > 0 {
            let len = BLOCK.min(num_classes - class).min(out.remaining());
            targets.write(BlockPos { row, class, axis: InnerAxis::Class }, &mut block[..len]);
            out.write(&block[..len]);
            class += len;
            if class == num_classes {
                (row, class) = (row + 1, 0);
            }
        }
    })?;
    Ok(f32::to_cpu_storage_owned(smoothed))
}

/// Checks that each class target is a class or the ignored index.
pub(crate) fn check_class_targets(
    targets: Operand,
    num_classes: usize,
    ignore_index: Option<i64>,
) -> Result<()> {
    read_labels(targets, num_classes, ignore_index).map(|_| ())
}

/// The number of elements of a floating-point storage.
pub(crate) fn float_len(storage: &CpuStorage) -> Option<usize> {
    FloatSlice::new(storage).map(|values| values.len())
}
