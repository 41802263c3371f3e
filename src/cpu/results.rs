//! The results of the rows, from their states over all classes: the formula of the loss, what backward needs, and the metrics.

use super::dtype::Real;
use super::parallel::default_vec;
use super::state::RowState;
use super::targets::Targets;
use crate::error::Result;
use crate::formula::{
    Divisor, ExtraState, ForwardOut, LossParams, METRIC_FIELDS, RowMetrics, SavedIn, SoftmaxState,
};
use candle_core::{CpuStorage, Layout};
use std::sync::atomic::{AtomicU32, Ordering};

/// A row's loss, and the first fields of [`SavedState`](crate::formula::SavedState).
const ROW_RESULTS: usize = 4;
/// The last field of `SavedState`, and the metrics but the prediction.
const EXTRA_RESULTS: usize = 1 + METRIC_FIELDS;

/// The results of all rows.
pub(super) struct RowResults<A> {
    /// Before the row weights.
    losses: Vec<A>,
    /// ([`num_saved_fields`](LossParams::num_saved_fields), N).
    saved: Vec<A>,
    /// ([`METRIC_FIELDS`], N), or empty.
    metrics: Vec<A>,
    /// Empty without metrics. Each thread writes those of its own rows.
    predictions: Vec<AtomicU32>,
}

/// The fields of the results of some rows. Those that are not needed are empty.
pub(super) type Fields<'a, A> = [&'a mut [A]; ROW_RESULTS];
pub(super) type AllFields<'a, A> = [&'a mut [A]; ROW_RESULTS + EXTRA_RESULTS];

impl<A: Real> RowResults<A> {
    pub(super) fn new(params: &LossParams, num_rows: usize) -> Result<Self> {
        let num_metrics = if params.wants_metrics { num_rows } else { 0 };
        let predictions = default_vec::<u32>(num_metrics)?;
        Ok(Self {
            losses: default_vec(num_rows)?,
            saved: default_vec(params.num_saved_fields() * num_rows)?,
            metrics: default_vec(METRIC_FIELDS * num_metrics)?,
            predictions: predictions.into_iter().map(AtomicU32::new).collect(),
        })
    }

    /// The fields if no option needs extras.
    pub(super) fn fields(&mut self) -> Fields<'_, A> {
        let [max, sum_exp, target_sum] = field_slices_mut(&mut self.saved, self.losses.len());
        [&mut self.losses, max, sum_exp, target_sum]
    }

    /// All fields, and the predictions.
    pub(super) fn all_fields(&mut self) -> (AllFields<'_, A>, &[AtomicU32]) {
        let num_rows = self.losses.len();
        let [max, sum_exp, target_sum, share] = field_slices_mut(&mut self.saved, num_rows);
        let metrics = field_slices_mut(&mut self.metrics, num_rows);
        let results = [&mut self.losses[..], max, sum_exp, target_sum];
        (all_fields(results, share, metrics), &self.predictions)
    }

    /// The reduction of the losses, with the other results. If another process has failed, the divisor is NaN, so that
    /// [`MeanOrZero`](crate::Reduction::MeanOrZero) does not hide it.
    pub(super) fn reduce(
        self,
        params: &LossParams,
        targets: &Targets<A>,
        process_failed: bool,
    ) -> ForwardOut<CpuStorage> {
        let Self { mut losses, saved, metrics, predictions } = self;
        let num_rows = losses.len();
        let divisor = params.divisor.map(|divisor| match divisor {
            Divisor::Number(number) => number,
            Divisor::WeightSum(()) if process_failed => f64::NAN,
            Divisor::WeightSum(()) => sum_rows(num_rows, |row| targets.weight(row)),
        });
        // In the dtype of the arithmetic the product could overflow, although the mean is finite.
        let weighted = |row: usize, loss: A| targets.row_weight(row) * loss.to_f64();
        let losses = match divisor {
            None => {
                if params.row_weights.is_some() {
                    for (row, loss) in losses.iter_mut().enumerate() {
                        *loss = A::from_f64(weighted(row, *loss));
                    }
                }
                losses
            }
            Some(0.) if params.zero_if_no_weight => vec![A::ZERO],
            Some(divisor) => {
                let sum = sum_rows(num_rows, |row| weighted(row, losses[row]));
                vec![A::from_f64(sum / divisor)]
            }
        };
        let saved = params.saves_state.then(|| SavedIn {
            storage: Some(A::to_cpu_storage_owned(saved)),
            layout: Layout::contiguous((params.num_saved_fields(), num_rows)),
            divisor: divisor.map(Divisor::Number),
        });
        let metrics = params.wants_metrics.then(|| RowMetrics {
            values: A::to_cpu_storage_owned(metrics),
            predictions: CpuStorage::U32(
                predictions.into_iter().map(AtomicU32::into_inner).collect(),
            ),
        });
        ForwardOut { loss: A::to_cpu_storage_owned(losses), saved, metrics }
    }
}

/// All results of a row, or their fields, in their order.
#[inline(always)]
fn all_fields<T>(
    [loss, max, sum_exp, target_sum]: [T; ROW_RESULTS],
    share: T,
    [nll, correct, confidence, entropy, lse, counted]: [T; METRIC_FIELDS],
) -> [T; ROW_RESULTS + EXTRA_RESULTS] {
    [loss, max, sum_exp, target_sum, share, nll, correct, confidence, entropy, lse, counted]
}

/// Writes the results of a row at index `i` of each field. No option needs extras.
#[inline(always)]
pub(super) fn write_row<A: Real>(
    params: &LossParams,
    targets: &Targets<A>,
    row: usize,
    i: usize,
    state: RowState<()>,
    out: &mut Fields<A>,
) {
    let log_sum = state.softmax.sum_exp.ln();
    write_fields(out, i, row_results(params, targets, row, state.softmax, log_sum));
}

/// Writes all results of a row at index `i` of each field, and its prediction.
#[inline(always)]
pub(super) fn write_row_with_extras<A: Real>(
    params: &LossParams,
    targets: &Targets<A>,
    predictions: &[AtomicU32],
    row: usize,
    i: usize,
    mut state: RowState<ExtraState<f64>>,
    out: &mut AllFields<A>,
) {
    let mut share = 0.;
    if params.unmasked_epsilon != 0. {
        share = params.unmasked_epsilon / (state.extras.num_unmasked * params.unmasked_scale());
        state.softmax.target_sum += share * state.extras.unmasked_sum;
        state.softmax.target_dot += share * state.extras.unmasked_dot;
    }
    let log_sum = state.softmax.sum_exp.ln();
    let (metrics, prediction) = row_metrics(targets, row, state, log_sum);
    let results = row_results(params, targets, row, state.softmax, log_sum);
    write_fields(out, i, all_fields(results, A::from_f64(share), metrics.map(A::from_f64)));
    if let Some(out) = predictions.get(row) {
        out.store(prediction, Ordering::Relaxed);
    }
}

/// A row's loss before its row weight, and the first fields of its `SavedState`: the formula of the loss.
#[inline(always)]
fn row_results<A: Real>(
    params: &LossParams,
    targets: &Targets<A>,
    row: usize,
    softmax: SoftmaxState<f64>,
    log_sum: f64,
) -> [A; ROW_RESULTS] {
    let lse = softmax.max + log_sum;
    let loss = match targets.is_ignored(row) {
        true => 0.,
        // z·lse comes first: without z-loss an overflowing lse² would become 0·∞.
        false => softmax.target_sum * log_sum - softmax.target_dot + params.z_loss * lse * lse,
    };
    [loss, softmax.max, softmax.sum_exp, softmax.target_sum].map(A::from_f64)
}

/// A row's metrics, in the order of [`RowMetrics::values`], and its prediction.
#[inline(always)]
fn row_metrics<A: Real>(
    targets: &Targets<A>,
    row: usize,
    RowState { softmax, extras }: RowState<ExtraState<f64>>,
    log_sum: f64,
) -> ([f64; METRIC_FIELDS], u32) {
    if targets.is_ignored(row) {
        return ([0.; METRIC_FIELDS], 0);
    }
    // A row whose logits are all −∞ has no softmax.
    let no_softmax = softmax.sum_exp == 0.;
    let [sum_exp, log_sum] =
        [softmax.sum_exp, log_sum].map(|value| if no_softmax { f64::NAN } else { value });
    // The sum of a row with +∞ is NaN too, but its largest logit is known.
    let has_prediction = !no_softmax && !extras.exp_dot.is_nan();
    let prediction = if has_prediction { extras.prediction as u32 } else { 0 };
    let is_correct = has_prediction && targets.is_label(row, prediction);
    let values = [
        log_sum - (extras.label_logit - softmax.max),
        f64::from(u8::from(is_correct)),
        1. / sum_exp,
        log_sum - extras.exp_dot / sum_exp,
        softmax.max + log_sum,
        1.,
    ];
    (values, prediction)
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

/// Writes index `i` of each field that is not empty.
#[inline(always)]
pub(super) fn write_fields<T: Copy, const N: usize>(
    fields: &mut [&mut [T]; N],
    i: usize,
    values: [T; N],
) {
    for (field, value) in fields.iter_mut().zip(values) {
        if let Some(slot) = field.get_mut(i) {
            *slot = value;
        }
    }
}

/// The fields of a tensor (N, len), a slice for each, to be written. Fields beyond its end are empty.
pub(super) fn field_slices_mut<T, const N: usize>(
    mut values: &mut [T],
    len: usize,
) -> [&mut [T]; N] {
    [(); N].map(|()| values.split_off_mut(..len).unwrap_or_default())
}
