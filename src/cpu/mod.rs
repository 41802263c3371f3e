//! The kernels on the CPU.
//!
//! A loop (`rows`) works on blocks along one axis: 256 classes of a row, or some classes of up to 128 rows side by side. A
//! block of inputs is copied to the stack in the dtype of the arithmetic (`input`, `targets`), unless it can be used where
//! it is. The arithmetic of a block (`softmax`, `exp`) is written once for both dtypes (`dtype`) and compiled for each
//! instruction set (`simd`). Blocks have a fixed size and merge in a fixed order, so the result has the same bits for
//! every number of threads (`parallel`).

mod dtype;
mod exp;
mod input;
mod logit_map;
mod parallel;
mod results;
mod rows;
mod side_by_side;
pub(crate) mod simd;
mod softmax;
mod state;
mod targets;

use crate::error::{Error, Result};
use crate::formula::{
    Divisor, EXTRA_FIELDS, ExtraState, ForwardOut, LossParams, STATE_FIELDS, SavedState,
    SoftmaxState,
};
use crate::layout::{self, inner_size, num_rows};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, WithDType};
use dtype::{Element, Real};
use half::{bf16, f16};
pub(crate) use input::readable_len;
use input::{BlockPos, InnerAxis, Logits, StridedRows};
use parallel::{BLOCK, SEGMENT, default_vec, par_build, par_rewrite, par_split};
use results::{RowResults, field_slices_mut, write_fields, write_row, write_row_with_extras};
use rows::{GradInputs, for_each_row};
use softmax::{GradCoeffs, ROWS_AT_ONCE};
use state::{Extras, RowState};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use targets::{LockedClassTable, Targets};
pub(crate) use targets::{check_labels, counted_rows, label_values};

type Operand<'a> = layout::Operand<'a, CpuStorage>;
type OperandMut<'a> = layout::OperandMut<'a, CpuStorage>;

/// The fields of a row's state in memory, with those that some options need.
const ALL_STATE_FIELDS: usize = STATE_FIELDS + EXTRA_FIELDS;

// ---- Forward

/// The losses of all rows, or their reduction.
pub(crate) fn forward(
    params: &LossParams,
    [logits, targets]: [Operand; 2],
) -> Result<ForwardOut<CpuStorage>> {
    match logits.0.dtype() {
        DType::F64 => forward_in::<f64>(params, logits, targets),
        _ => forward_in::<f32>(params, logits, targets),
    }
}

/// [`forward`] with arithmetic in `A`. The other functions named `_in` also compute in `A`.
fn forward_in<A: Real>(
    params: &LossParams,
    logits: Operand,
    targets: Operand,
) -> Result<ForwardOut<CpuStorage>> {
    let axis = InnerAxis::of_forward(params, logits.1.dims());
    let logits = Logits::new(params, logits)?;
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<A>::new(params, &class_table, targets)?;
    let mut rows = RowResults::new(params, logits.num_rows())?;
    match params.needs_extras() {
        false => {
            let out = rows.fields();
            for_each_row(&logits, &targets, axis, out, &|row, i, state, out| {
                write_row(params, &targets, row, i, state, out);
            })?;
        }
        true => {
            let (out, predictions) = rows.all_fields();
            for_each_row(&logits, &targets, axis, out, &|row, i, state, out| {
                write_row_with_extras(params, &targets, predictions, row, i, state, out);
            })?;
        }
    }
    Ok(rows.reduce(params, &targets, false))
}

/// Merges the states over a range of the classes, whose logits are given, into those of the ranges before it. The first range
/// overwrites them.
pub(crate) fn merge_tile(
    params: &LossParams,
    is_first: bool,
    states: OperandMut,
    [logits, targets]: [Operand; 2],
) -> Result<()> {
    match logits.0.dtype() {
        DType::F64 => merge_tile_in::<f64>(params, is_first, states, logits, targets),
        _ => merge_tile_in::<f32>(params, is_first, states, logits, targets),
    }
}

fn merge_tile_in<A: Real>(
    params: &LossParams,
    is_first: bool,
    states: OperandMut,
    logits: Operand,
    targets: Operand,
) -> Result<()> {
    let axis = InnerAxis::of_forward(params, logits.1.dims());
    let logits = Logits::new(params, logits)?;
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<A>::new(params, &class_table, targets)?;
    match params.needs_extras() {
        false => {
            let states = states_mut::<STATE_FIELDS>(states)?;
            merge_rows::<(), A, STATE_FIELDS>(&logits, &targets, axis, is_first, states)
        }
        true => {
            let states = states_mut::<ALL_STATE_FIELDS>(states)?;
            merge_rows::<ExtraState<f64>, A, ALL_STATE_FIELDS>(
                &logits, &targets, axis, is_first, states,
            )
        }
    }
}

fn merge_rows<E: Extras, A: Real, const N: usize>(
    logits: &Logits<A>,
    targets: &Targets<A>,
    axis: InnerAxis,
    is_first: bool,
    states: [&mut [f64]; N],
) -> Result<()> {
    for_each_row(logits, targets, axis, states, &|row, i, state: RowState<E>, out| {
        let merged = if targets.is_ignored(row) {
            // Rows side by side are read even if they are ignored. `finish` must not take their NaN for a failure.
            RowState::default()
        } else if is_first {
            state
        } else {
            RowState::from_fields(out.iter().map(|field| field[i])).merge(state)
        };
        write_fields(out, i, merged.into_fields());
    })
}

/// The losses from the states of ranges that make up all classes, (ranges, fields, N). If the states are NaN, because a process failed,
/// so are the losses, those of ignored rows too.
pub(crate) fn finish(
    params: &LossParams,
    logits_dtype: DType,
    [states, targets]: [Operand; 2],
) -> Result<ForwardOut<CpuStorage>> {
    match logits_dtype {
        DType::F64 => finish_in::<f64>(params, states, targets),
        _ => finish_in::<f32>(params, states, targets),
    }
}

fn finish_in<A: Real>(
    params: &LossParams,
    states: Operand,
    targets: Operand,
) -> Result<ForwardOut<CpuStorage>> {
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<A>::new(params, &class_table, targets)?;
    let (storage, &[num_ranges, num_fields, num_rows]) = (states.0, states.1.dims()) else {
        return Err(not_contiguous());
    };
    let values = f64::cpu_storage_as_slice(storage)?;
    if !states.1.is_contiguous() || states.1.start_offset() != 0 {
        return Err(not_contiguous());
    }
    let state_of = |range: usize, row: usize| {
        let field = |field| values[(range * num_fields + field) * num_rows + row];
        let extras = match num_fields == ALL_STATE_FIELDS {
            true => ExtraState::from_fields([4, 5, 6, 7, 8, 9].map(field)),
            false => ExtraState::default(),
        };
        RowState { softmax: SoftmaxState::from_fields([0, 1, 2, 3].map(field)), extras }
    };
    let mut rows = RowResults::<A>::new(params, num_rows)?;
    let (out, predictions) = rows.all_fields();
    let process_failed = AtomicBool::new(false);
    par_split(out, 1, num_ranges, &|first, mut out| {
        for i in 0..out[0].len() {
            let row = first + i;
            let mut state = state_of(0, row);
            for range in 1..num_ranges {
                state = state.merge(state_of(range, row));
            }
            write_row_with_extras(params, &targets, predictions, row, i, state, &mut out);
            if state.softmax.target_sum.is_nan() && !targets.may_be_nan(row) {
                out[0][i] = A::from_f64(f64::NAN);
                process_failed.store(true, Ordering::Relaxed);
            }
        }
    });
    Ok(rows.reduce(params, &targets, process_failed.into_inner()))
}

/// The fields of a tensor (N, len), a slice for each. The elements of a field are adjacent.
fn tensor_fields<A: Real, const N: usize>(
    (storage, layout): Operand<'_>,
    len: usize,
) -> Result<[&[A]; N]> {
    let values = A::cpu_storage_as_slice(storage)?;
    let (start, &[stride, 1]) = (layout.start_offset(), layout.stride()) else {
        return Err(not_contiguous());
    };
    let mut fields = [&values[..0]; N];
    for (i, field) in fields.iter_mut().enumerate() {
        let first = start + i * stride;
        *field = values.get(first..first + len).ok_or_else(not_contiguous)?;
    }
    Ok(fields)
}

/// The fields of the states, to be written.
fn states_mut<const N: usize>((storage, layout): OperandMut<'_>) -> Result<[&mut [f64]; N]> {
    let len = layout.shape().elem_count();
    match storage {
        CpuStorage::F64(values) if layout.is_contiguous() && values.len() == len => {
            Ok(field_slices_mut(values, len / N))
        }
        _ => Err(not_contiguous()),
    }
}

fn unsupported(dtype: DType) -> Error {
    candle_core::Error::UnsupportedDTypeForOp(dtype, "label-smoothing-loss-in-place").bt().into()
}

fn not_contiguous() -> Error {
    candle_core::Error::RequiresContiguous { op: "label-smoothing-loss" }.bt().into()
}

// ---- Backward

/// The gradient of the logits, in their dtype and shape, contiguous.
pub(crate) fn backward(
    params: &LossParams,
    tensors: [Operand; 4],
    divisor: Option<Divisor<usize>>,
) -> Result<CpuStorage> {
    match tensors[0].0.dtype() {
        DType::BF16 => backward_of::<bf16>(params, tensors, divisor),
        DType::F16 => backward_of::<f16>(params, tensors, divisor),
        DType::F64 => backward_of::<f64>(params, tensors, divisor),
        _ => backward_of::<f32>(params, tensors, divisor),
    }
}

fn backward_of<T: Element>(
    params: &LossParams,
    [logits, targets, grad_output, saved]: [Operand; 4],
    divisor: Option<Divisor<usize>>,
) -> Result<CpuStorage> {
    let dims = logits.1.dims();
    let len = dims.iter().product();
    let logits = Logits::<T::Real>::new(params, logits)?;
    let inputs = [targets, grad_output, saved];
    let gradient = with_grad_inputs(params, dims, inputs, divisor, |grad| match grad {
        Some(grad) if len > 0 => {
            let unit = grad.unit(logits.classes().len());
            par_build(len, unit, |start, out| grad.write(&logits, start, out))
        }
        _ => default_vec::<T>(len),
    })?;
    Ok(T::to_cpu_storage_owned(gradient))
}

/// Replaces contiguous logits by their gradient. They have the dtype of the arithmetic.
pub(crate) fn backward_in_place(
    params: &LossParams,
    (logits, layout): OperandMut,
    inputs: [Operand; 3],
    divisor: Option<Divisor<usize>>,
) -> Result<()> {
    if layout.start_offset() != 0 || !layout.is_contiguous() {
        return Err(not_contiguous());
    }
    match logits {
        CpuStorage::F32(values) => backward_in_place_of(params, values, layout, inputs, divisor),
        CpuStorage::F64(values) => backward_in_place_of(params, values, layout, inputs, divisor),
        _ => Err(unsupported(logits.dtype())),
    }
}

fn backward_in_place_of<A: Real>(
    params: &LossParams,
    logits: &mut [A],
    layout: &Layout,
    inputs: [Operand; 3],
    divisor: Option<Divisor<usize>>,
) -> Result<()> {
    let dims = layout.dims();
    with_grad_inputs::<A, _>(params, dims, inputs, divisor, |grad| match grad {
        None => {
            logits.fill(A::ZERO);
            Ok(())
        }
        Some(grad) => {
            let unit = grad.unit(dims[params.class_dim]);
            par_rewrite(logits, unit, |start, old, out| {
                let old = A::to_cpu_storage_owned(old);
                grad.write(&Logits::of_piece(params, (&old, layout), start), start, out);
            })
        }
    })
}

/// Calls `f` with the inputs of the gradient of logits of this shape, or with `None` if the gradient is 0.
fn with_grad_inputs<A: Real, R>(
    params: &LossParams,
    dims: &[usize],
    [targets, grad_output, saved]: [Operand; 3],
    divisor: Option<Divisor<usize>>,
    f: impl FnOnce(Option<GradInputs<A>>) -> Result<R>,
) -> Result<R> {
    let divisor = match divisor {
        None => 1.,
        Some(Divisor::Number(number)) => number,
        Some(Divisor::WeightSum(index)) => {
            let values = A::cpu_storage_as_slice(saved.0)?;
            values.get(index).ok_or_else(not_contiguous)?.to_f64()
        }
    };
    if params.zero_if_no_weight && divisor == 0. {
        return f(None);
    }
    let class_table = LockedClassTable::new(&params.class_table);
    let num_rows = num_rows(dims, params.class_dim);
    let targets = Targets::new(params, &class_table, targets)?;
    let [max, sum_exp, target_sum] = tensor_fields(saved, num_rows)?;
    let unmasked_shares = match params.unmasked_epsilon == 0. {
        true => None,
        false => {
            let [.., shares] = tensor_fields::<A, 4>(saved, num_rows)?;
            let mut padded = default_vec(num_rows + ROWS_AT_ONCE)?;
            padded[..num_rows].copy_from_slice(shares);
            Some(padded)
        }
    };
    let saved = SavedState { max, sum_exp, target_sum };
    let grad_output = StridedRows::new(grad_output, grad_output.1.shape().rank(), 0)?;
    f(Some(GradInputs {
        targets: &targets,
        inner_size: inner_size(dims, params.class_dim).max(1),
        coeffs: grad_coeffs(params, &targets, saved, &grad_output, divisor)?,
        unmasked_shares,
    }))
}

/// The coefficients of each row's gradient.
fn grad_coeffs<A: Real>(
    params: &LossParams,
    targets: &Targets<A>,
    saved: SavedState<&[A]>,
    grad_output: &StridedRows,
    divisor: f64,
) -> Result<GradCoeffs<Vec<A>>> {
    let num_rows = saved.max.len();
    let new = || default_vec(num_rows + ROWS_AT_ONCE);
    let (mut max, mut exp_scale, mut neg_grad_output) = (new()?, new()?, new()?);
    let out = [&mut max, &mut exp_scale, &mut neg_grad_output].map(|out| &mut out[..num_rows]);
    par_split(out, BLOCK, 1, &|first, mut out| {
        let mut grad_outputs = [0.; BLOCK];
        for i in 0..out[0].len() {
            let row = first + i;
            if i % BLOCK == 0 {
                let len = BLOCK.min(out[0].len() - i);
                let pos = BlockPos { row, class: 0, axis: InnerAxis::Row };
                grad_output.load(pos, &mut grad_outputs[..len]);
            }
            let grad_output: f64 = grad_outputs[i % BLOCK] * targets.row_weight(row) / divisor;
            let sum_exp = saved.sum_exp[row].to_f64();
            let mut softmax_coeff = saved.target_sum[row].to_f64();
            if params.z_loss != 0. {
                let lse = saved.max[row].to_f64() + sum_exp.ln();
                softmax_coeff += params.z_loss * (2. * lse);
            }
            let exp_scale = A::from_f64(grad_output * softmax_coeff / sum_exp);
            write_fields(&mut out, i, [saved.max[row], exp_scale, A::from_f64(-grad_output)]);
        }
    });
    Ok(GradCoeffs { max, exp_scale, neg_grad_output })
}

/// Adds a bias of each class to contiguous logits (rows, classes) of the same dtype.
pub(crate) fn add_bias((logits, layout): OperandMut, bias: Operand) -> Result<()> {
    if layout.start_offset() != 0 || !layout.is_contiguous() {
        return Err(not_contiguous());
    }
    match logits {
        CpuStorage::F64(logits) => add_bias_in(logits, bias),
        CpuStorage::F32(logits) => add_bias_in(logits, bias),
        _ => Err(unsupported(logits.dtype())),
    }
}

fn add_bias_in<A: Real>(logits: &mut [A], (bias, layout): Operand) -> Result<()> {
    let (start, end) = layout.contiguous_offsets().ok_or_else(not_contiguous)?;
    let bias = A::cpu_storage_as_slice(bias)?.get(start..end).ok_or_else(not_contiguous)?;
    par_split([logits], bias.len(), 1, &|_, [rows]| {
        for row in rows.chunks_mut(bias.len().max(1)) {
            row.iter_mut().zip(bias).for_each(|(logit, &bias)| *logit += bias);
        }
    });
    Ok(())
}

/// Copies some rows and columns of a tensor (.., columns), in the arithmetic's dtype `dtype`. The rows are those with these indices, or
/// a range.
pub(crate) fn gather(
    tensor: Operand,
    indices: Option<&[i64]>,
    rows: &Range<usize>,
    columns: &Range<usize>,
    dtype: DType,
) -> Result<CpuStorage> {
    match dtype {
        DType::F64 => gather_in::<f64>(tensor, indices, rows, columns),
        _ => gather_in::<f32>(tensor, indices, rows, columns),
    }
}

fn gather_in<A: Real>(
    tensor: Operand,
    indices: Option<&[i64]>,
    rows: &Range<usize>,
    columns: &Range<usize>,
) -> Result<CpuStorage> {
    let source = StridedRows::new(tensor, tensor.1.shape().rank() - 1, 0)?;
    let gathered = build_rows(rows.len(), columns.len(), |i, column, block: &mut [A]| {
        let row = indices.map_or(rows.start + i, |indices| indices[i] as usize);
        let pos = BlockPos { row, class: columns.start + column, axis: InnerAxis::Class };
        source.load(pos, block);
    })?;
    Ok(A::to_cpu_storage_owned(gathered))
}

/// Rows of numbers, contiguous. `load(row, column, block)` fills a block of a row.
fn build_rows<A: Real>(
    num_rows: usize,
    num_columns: usize,
    load: impl Fn(usize, usize, &mut [A]) + Sync,
) -> Result<Vec<A>> {
    let unit = num_columns.min(SEGMENT);
    par_build(num_rows * num_columns, unit, |start, out| {
        let mut block = [A::ZERO; BLOCK];
        // Without columns nothing is written.
        let (mut row, mut column) = (start / num_columns.max(1), start % num_columns.max(1));
        while out.remaining() > 0 {
            let len = BLOCK.min(num_columns - column).min(out.remaining());
            load(row, column, &mut block[..len]);
            out.write(&block[..len]);
            column += len;
            if column == num_columns {
                (row, column) = (row + 1, 0);
            }
        }
    })
}

/// Asks for huge pages under zeros that will be written as a whole.
pub(crate) fn advise_huge_pages(storage: &mut CpuStorage) {
    match storage {
        CpuStorage::BF16(values) => parallel::advise_huge_pages(values),
        CpuStorage::F16(values) => parallel::advise_huge_pages(values),
        CpuStorage::F32(values) => parallel::advise_huge_pages(values),
        CpuStorage::F64(values) => parallel::advise_huge_pages(values),
        _ => {}
    }
}

// ---- Targets

/// The smoothed targets of all rows, in f32.
pub(crate) fn smooth_targets(params: &LossParams, labels: Operand) -> Result<CpuStorage> {
    // Class indices have no class dimension, so each of them is a row.
    let num_rows = num_rows(labels.1.dims(), params.class_dim);
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<f32>::new(params, &class_table, labels)?;
    let smoothed = build_rows(num_rows, params.num_classes, |row, class, block| {
        targets.load(BlockPos { row, class, axis: InnerAxis::Class }, block);
    })?;
    Ok(f32::to_cpu_storage_owned(smoothed))
}
