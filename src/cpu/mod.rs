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
mod parallel;
mod rows;
pub(crate) mod simd;
mod softmax;
mod targets;

use crate::error::{Error, Result};
use crate::formula::{
    Divisor, ForwardOut, LossParams, SAVED_FIELDS, STATE_FIELDS, SavedIn, SavedState, SoftmaxState,
};
use crate::layout::{self, inner_size, num_rows};
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, WithDType};
use dtype::{Element, Real};
use half::{bf16, f16};
pub(crate) use input::float_len;
use input::{BlockPos, InnerAxis, StridedRows};
use parallel::{BLOCK, SEGMENT, default_vec, par_build, par_split};
use rows::{GradInputs, for_each_row};
use softmax::{GradCoeffs, ROWS_AT_ONCE};
pub(crate) use targets::read_labels;
use targets::{LockedClassTable, Targets};

type Operand<'a> = layout::Operand<'a, CpuStorage>;
type OperandMut<'a> = layout::OperandMut<'a, CpuStorage>;

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
    let logits = StridedRows::new(logits, params.class_dim, 0)?;
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<A>::new(params, &class_table, targets)?;
    let mut rows = RowResults::new(logits.num_rows)?;
    for_each_row(&logits, &targets, axis, rows.fields(), &|row, i, state, out| {
        write_fields(out, i, row_results(params, &targets, row, state));
    })?;
    Ok(rows.reduce(params, &targets))
}

/// Merges the states over a range of the classes, whose logits are given, into those of the ranges before it. The logits
/// are f32 or f64.
pub(crate) fn merge_tile(
    params: &LossParams,
    states: OperandMut,
    [logits, targets]: [Operand; 2],
) -> Result<()> {
    match logits.0.dtype() {
        DType::F64 => merge_tile_in::<f64>(params, states, logits, targets),
        _ => merge_tile_in::<f32>(params, states, logits, targets),
    }
}

fn merge_tile_in<A: Real>(
    params: &LossParams,
    states: OperandMut,
    logits: Operand,
    targets: Operand,
) -> Result<()> {
    let axis = InnerAxis::of_forward(params, logits.1.dims());
    let logits = StridedRows::new(logits, params.class_dim, params.first_class)?;
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<A>::new(params, &class_table, targets)?;
    for_each_row(&logits, &targets, axis, states_mut(states)?, &|_, i, state, out| {
        let merged = match params.first_class {
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
    let num_rows = states.1.dims()[1];
    let states = SoftmaxState::from_fields(tensor_fields(states, num_rows)?);
    let mut rows = RowResults::<A>::new(num_rows)?;
    par_split(rows.fields(), 1, 1, &|first, mut out| {
        for i in 0..out[0].len() {
            let row = first + i;
            let state = SoftmaxState::from_fields(states.into_fields().map(|field| field[row]));
            write_fields(&mut out, i, row_results(params, &targets, row, state));
        }
    });
    Ok(rows.reduce(params, &targets))
}

/// A row's loss, and its fields of [`SavedState`]: the formula of the loss.
fn row_results<A: Real>(
    params: &LossParams,
    targets: &Targets<A>,
    row: usize,
    state: SoftmaxState<f64>,
) -> [A; ROW_RESULTS] {
    let log_sum = state.sum_exp.ln();
    let lse = state.max + log_sum;
    let loss = match targets.is_ignored(row) {
        true => 0.,
        // z·lse comes first: without z-loss an overflowing lse² would become 0·∞.
        false => state.target_sum * log_sum - state.target_dot + params.z_loss * lse * lse,
    };
    [loss, state.max, state.sum_exp, state.target_sum].map(A::from_f64)
}

const ROW_RESULTS: usize = 1 + SAVED_FIELDS;

/// The [`row_results`] of all rows.
struct RowResults<A> {
    losses: Vec<A>,
    /// ([`SAVED_FIELDS`], N).
    saved: Vec<A>,
}

impl<A: Real> RowResults<A> {
    fn new(num_rows: usize) -> Result<Self> {
        Ok(Self { losses: default_vec(num_rows)?, saved: default_vec(SAVED_FIELDS * num_rows)? })
    }

    fn fields(&mut self) -> [&mut [A]; ROW_RESULTS] {
        let [max, sum_exp, target_sum] = field_slices_mut(&mut self.saved, self.losses.len());
        [&mut self.losses, max, sum_exp, target_sum]
    }

    fn reduce(self, params: &LossParams, targets: &Targets<A>) -> ForwardOut<CpuStorage> {
        let Self { losses, saved } = self;
        let num_rows = losses.len();
        let divisor = params.divisor.map(|divisor| match divisor {
            Divisor::Number(number) => number,
            Divisor::WeightSum(()) => sum_rows(num_rows, |row| targets.weight(row).to_f64()),
        });
        let losses = match divisor {
            None => losses,
            Some(divisor) => {
                let sum = sum_rows(num_rows, |row| losses[row].to_f64());
                vec![A::from_f64(sum / divisor)]
            }
        };
        let saved = params.saves_state.then(|| SavedIn {
            storage: Some(A::to_cpu_storage_owned(saved)),
            layout: Layout::contiguous((SAVED_FIELDS, num_rows)),
            divisor: divisor.map(Divisor::Number),
        });
        ForwardOut { loss: A::to_cpu_storage_owned(losses), saved }
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

/// Writes index `i` of each field.
fn write_fields<T: Copy, const N: usize>(fields: &mut [&mut [T]; N], i: usize, values: [T; N]) {
    for (field, value) in fields.iter_mut().zip(values) {
        field[i] = value;
    }
}

/// The fields of a tensor (N, len), a slice for each, to be written.
fn field_slices_mut<T, const N: usize>(mut values: &mut [T], len: usize) -> [&mut [T]; N] {
    [(); N].map(|()| values.split_off_mut(..len).unwrap_or_default())
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

/// The fields of the softmax states, to be written.
fn states_mut((storage, layout): OperandMut<'_>) -> Result<[&mut [f64]; STATE_FIELDS]> {
    let len = layout.shape().elem_count();
    match storage {
        CpuStorage::F64(values) if layout.is_contiguous() && values.len() == len => {
            Ok(field_slices_mut(values, len / STATE_FIELDS))
        }
        _ => Err(not_contiguous()),
    }
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
    let divisor = match divisor {
        None => 1.,
        Some(Divisor::Number(number)) => number,
        Some(Divisor::WeightSum(index)) => {
            let values = T::Real::cpu_storage_as_slice(saved.0)?;
            values.get(index).ok_or_else(not_contiguous)?.to_f64()
        }
    };
    let dims = logits.1.dims();
    let class_table = LockedClassTable::new(&params.class_table);
    let logits = StridedRows::new(logits, params.class_dim, params.first_class)?;
    let [max, sum_exp, target_sum] = tensor_fields(saved, logits.num_rows)?;
    let saved = SavedState { max, sum_exp, target_sum };
    let grad_output = StridedRows::new(grad_output, grad_output.1.shape().rank(), 0)?;
    let grad = GradInputs::<T::Real> {
        logits: &logits,
        targets: &Targets::new(params, &class_table, targets)?,
        inner_size: inner_size(dims, params.class_dim).max(1),
        coeffs: grad_coeffs(params, saved, &grad_output, divisor)?,
    };
    let len = dims.iter().product();
    let gradient = par_build(len, grad.unit(), |start, out| grad.write(start, out))?;
    Ok(T::to_cpu_storage_owned(gradient))
}

/// Replaces contiguous logits by their gradient, which is computed in memory of its own.
pub(crate) fn backward_in_place(
    params: &LossParams,
    (logits, layout): OperandMut,
    [targets, grad_output, saved]: [Operand; 3],
    divisor: Option<Divisor<usize>>,
) -> Result<()> {
    if layout.start_offset() != 0 || !layout.is_contiguous() {
        return Err(not_contiguous());
    }
    *logits = backward(params, [(logits, layout), targets, grad_output, saved], divisor)?;
    Ok(())
}

/// The coefficients of each row's gradient.
fn grad_coeffs<A: Real>(
    params: &LossParams,
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
            let grad_output: f64 = grad_outputs[i % BLOCK] / divisor;
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

// ---- Targets

/// The smoothed targets of all rows, in f32.
pub(crate) fn smooth_targets(params: &LossParams, labels: Operand) -> Result<CpuStorage> {
    // Class indices have no class dimension, so each of them is a row.
    let num_rows = num_rows(labels.1.dims(), params.class_dim);
    let class_table = LockedClassTable::new(&params.class_table);
    let targets = Targets::<f32>::new(params, &class_table, labels)?;
    let num_classes = params.num_classes;
    let unit = num_classes.min(SEGMENT);
    let smoothed = par_build(num_rows * num_classes, unit, |start, out| {
        let mut block = [0.; BLOCK];
        let (mut row, mut class) = (start / num_classes, start % num_classes);
        while out.remaining() > 0 {
            let len = BLOCK.min(num_classes - class).min(out.remaining());
            targets.load(BlockPos { row, class, axis: InnerAxis::Class }, &mut block[..len]);
            out.write(&block[..len]);
            class += len;
            if class == num_classes {
                (row, class) = (row + 1, 0);
            }
        }
    })?;
    Ok(f32::to_cpu_storage_owned(smoothed))
}
