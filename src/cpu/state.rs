//! The state of a row over a range of the classes, in f64.

use super::softmax::finite_max;
use crate::formula::{EXTRA_FIELDS, ExtraState, SoftmaxState};

/// What is computed of a row beside its softmax state: nothing, or an [`ExtraState`].
pub(super) trait Extras: Copy + Default + Send + Sync {
    /// Whether it is an [`ExtraState`].
    const ARE_WANTED: bool;
    fn get(&mut self) -> Option<&mut ExtraState<f64>>;
}

impl Extras for () {
    const ARE_WANTED: bool = false;

    #[inline(always)]
    fn get(&mut self) -> Option<&mut ExtraState<f64>> {
        None
    }
}

impl Extras for ExtraState<f64> {
    const ARE_WANTED: bool = true;

    #[inline(always)]
    fn get(&mut self) -> Option<&mut ExtraState<f64>> {
        Some(self)
    }
}

/// The state of a row over a range of the classes, and what some options need beside it.
#[derive(Clone, Copy, Default)]
pub(super) struct RowState<E> {
    pub softmax: SoftmaxState<f64>,
    pub extras: E,
}

impl Default for SoftmaxState<f64> {
    /// The state over no classes.
    fn default() -> Self {
        Self { max: f64::NEG_INFINITY, sum_exp: 0., target_sum: 0., target_dot: 0. }
    }
}

impl Default for ExtraState<f64> {
    /// The state over no classes.
    fn default() -> Self {
        Self { label_logit: f64::NEG_INFINITY, ..Self::from_fields([0.; EXTRA_FIELDS]) }
    }
}

impl<E: Extras> RowState<E> {
    /// The state with these fields: those of the softmax state, and of the extras if they are wanted.
    pub(super) fn from_fields(mut fields: impl Iterator<Item = f64>) -> Self {
        let mut state = Self::default();
        let mut next = |default| fields.next().unwrap_or(default);
        state.softmax = SoftmaxState::from_fields(state.softmax.into_fields().map(&mut next));
        if let Some(extras) = state.extras.get() {
            *extras = ExtraState::from_fields(extras.into_fields().map(next));
        }
        state
    }

    /// The same fields.
    pub(super) fn into_fields<const N: usize>(mut self) -> [f64; N] {
        let extras = self.extras.get().map(|extras| extras.into_fields());
        let mut fields = self.softmax.into_fields().into_iter().chain(extras.into_iter().flatten());
        [(); N].map(|()| fields.next().unwrap_or_default())
    }

    /// The state over two ranges of one row, relative to the larger maximum. `other` has the later classes.
    #[inline(always)]
    pub(super) fn merge(self, other: Self) -> Self {
        let max = self.softmax.max.max(other.softmax.max);
        // The later classes have the prediction only if their maximum is larger.
        let keeps_prediction = self.softmax.max >= other.softmax.max;
        let (mut a, mut b) = (self.with_max(max), other.with_max(max));
        a.softmax = SoftmaxState {
            max,
            sum_exp: a.softmax.sum_exp + b.softmax.sum_exp,
            target_sum: a.softmax.target_sum + b.softmax.target_sum,
            target_dot: a.softmax.target_dot + b.softmax.target_dot,
        };
        if let (Some(a), Some(b)) = (a.extras.get(), b.extras.get()) {
            *a = ExtraState {
                num_unmasked: a.num_unmasked + b.num_unmasked,
                unmasked_sum: a.unmasked_sum + b.unmasked_sum,
                unmasked_dot: a.unmasked_dot + b.unmasked_dot,
                exp_dot: a.exp_dot + b.exp_dot,
                label_logit: a.label_logit.max(b.label_logit),
                prediction: if keeps_prediction { a.prediction } else { b.prediction },
            };
        }
        a
    }

    /// The same state relative to another maximum.
    #[inline(always)]
    fn with_max(mut self, max: f64) -> Self {
        let softmax = &mut self.softmax;
        if softmax.max == max || softmax.max == f64::NEG_INFINITY {
            return self;
        }
        let shift = softmax.max - max;
        let factor = shift.exp();
        if let Some(extras) = self.extras.get() {
            extras.unmasked_dot += extras.unmasked_sum * shift;
            extras.exp_dot = moved_exp_dot(extras.exp_dot, softmax.sum_exp, shift, factor);
        }
        softmax.sum_exp *= factor;
        softmax.target_dot += match softmax.target_sum == 0. {
            true => 0.,
            false => softmax.target_sum * shift,
        };
        self
    }
}

/// Σ exp(x − max)·(x − max) relative to a maximum that is larger by −`shift`, with `factor` = exp(shift).
#[inline(always)]
pub(super) fn moved_exp_dot(exp_dot: f64, sum_exp: f64, shift: f64, factor: f64) -> f64 {
    // A shift of 0 moves nothing, even if +∞ makes `sum_exp` NaN. A factor of 0 makes the sum 0, even if the shift is infinite. A NaN
    // of `exp_dot` remains.
    let moved = if shift != 0. && factor > 0. { sum_exp * shift } else { 0. };
    (exp_dot + moved) * factor
}

impl SoftmaxState<f64> {
    /// Adds `delta` to the weighted target of a logit that the state contains.
    #[inline(always)]
    pub(super) fn add_to_target(self, delta: f64, logit: f64) -> Self {
        if delta == 0. {
            return self;
        }
        Self {
            target_sum: self.target_sum + delta,
            target_dot: self.target_dot + delta * (logit - finite_max(self.max)),
            ..self
        }
    }
}
