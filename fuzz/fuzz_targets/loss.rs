//! Calls the loss, `smooth_targets` and `check_targets` in all their forms with arbitrary tensors and options.
//!
//! - An invalid call must return an error, a valid one must not.
//! - The results of a valid call must agree with the formula, up to rounding.
//! - Each input also checks one of these, or nothing more: the gradients of views have the same bits as those of copies; the metrics
//!   agree with the formula; the loss over three processes agrees with the formula.
//! - No call may panic or hang. A tensor that does not fit into memory must be an error.
//!
//! Some inputs avoid limits of candle itself: its conversions and sums panic on empty views that begin beyond the end
//! of their storage, and abort on views that are larger than memory.
//!
//! RELIABILITY.md has the commands.

#![no_main]

mod arguments;
mod case;
mod compare;
mod formula;
mod head;
mod input;
mod options;

use candle_core::{DType, Result};
use cap::Cap;
use case::Case;
use compare::{element_count, to_f64s};
use formula::Formula;
use input::{BuiltTensor, Call, Input, MAX_ELEMENTS};
use libfuzzer_sys::{Corpus, fuzz_target};
use std::alloc::System;

/// Makes large allocations fail. The library must return an error for them.
#[global_allocator]
static ALLOCATOR: Cap<System> = Cap::new(System, 64 << 20);

fuzz_target!(|input: Input| -> Corpus {
    match run(&input) {
        Ok(Some(())) => Corpus::Keep,
        // Skipped, since it would take too long.
        Ok(None) => Corpus::Reject,
        Err(error) => panic!("candle: {error}"),
    }
});

fn run(input: &Input) -> Result<Option<()>> {
    let mut dims = input.dims.get();
    if dims.is_empty() && matches!(input.call, Call::Linear { .. }) {
        dims.push(3);
    }
    let class_dim = match input.options.class_dim {
        None => dims.len().wrapping_sub(1),
        Some(255) => usize::MAX,
        Some(dim) => usize::from(dim) % 6,
    };
    let num_classes = dims.get(class_dim).copied().unwrap_or(3);
    let Some((loss, smoothing, mut formula)) = options::build(&input.options, num_classes)? else {
        return Ok(None);
    };
    let mut rows = dims.clone();
    if class_dim < rows.len() {
        rows.remove(class_dim);
    }
    let row_weights = input.options.row_weights.as_ref();
    let row_weights = match row_weights.map(|weights| weights.build(&rows)).transpose()? {
        Some(None) => return Ok(None),
        weights => weights.flatten(),
    };
    let are_row_weights_valid = match &row_weights {
        Some(weights) => set_row_weights(&mut formula, weights, &rows)?,
        None => true,
    };
    let dtype = input.targets.dtype(9);
    let mut targets_dims = if dtype.is_float() { &dims } else { &rows }.clone();
    match input.targets_mistake.get() {
        None => {}
        Some(0..3) => targets_dims.push(1),
        Some(3..6) => drop(targets_dims.pop()),
        Some(_) => targets_dims = if dtype.is_float() { &rows } else { &dims }.clone(),
    }
    let targets = match dtype.is_float() {
        true => input.targets.floats(&targets_dims, dtype)?,
        false => input.targets.labels(&targets_dims, dtype, num_classes)?,
    };
    let Some(targets) = targets else {
        return Ok(None);
    };
    let case = Case {
        input,
        loss,
        smoothing,
        formula,
        dims,
        class_dim,
        row_weights: row_weights.map(|weights| weights.view),
        are_row_weights_valid,
        targets: targets.view,
        are_targets_truncated: targets.is_truncated,
    };
    match &input.call {
        Call::Forward { logits } => case.forward(logits),
        Call::Linear { .. } => case.linear(),
        Call::SmoothTargets { num_classes: len } => {
            case.smooth_targets(len.map_or(num_classes, |len| len.get()))
        }
        Call::CheckTargets { num_classes: len } => {
            case.check_targets(len.map_or(num_classes, |len| len.get()))
        }
    }
}

/// Sets the row weights of the formula if they are valid. Returns whether they are, as far as it looks: those of a large call are not
/// read, because that call fails.
fn set_row_weights(formula: &mut Formula, weights: &BuiltTensor, rows: &[usize]) -> Result<bool> {
    let (view, dtype) = (&weights.view, weights.view.dtype());
    let has_dtype = dtype == DType::U8 || dtype.is_float() && dtype != DType::F8E8M0;
    if !has_dtype || element_count(rows) > MAX_ELEMENTS {
        return Ok(has_dtype);
    }
    let fits = !weights.is_truncated && view.dims() == rows;
    let values = if fits { to_f64s(view)? } else { vec![] };
    let are_valid = fits && values.iter().all(|value| value.is_finite() && *value >= 0.);
    formula.row_weights = are_valid.then_some(values);
    Ok(are_valid)
}
