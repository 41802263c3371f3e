//! The state of a row over a range of the classes, in f64.

use super::softmax::finite_max;
use crate::formula::{EXTRA_FIELDS, ExtraState, SoftmaxState};

/// The state of a row over a range of the classes, and what some options need beside it.
#[derive(Clone, Copy, Default)]
pub(super) struct RowState {
    pub softmax: SoftmaxState<f64>,
    pub extras: ExtraState<f64>,
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

impl RowState {
    /// The state with these fields: those of the softmax state, and of the extras if there are more.
    pub(super) fn from_fields(mut fields: impl Iterator<Item = f64>) -> Self {
        let Self { softmax, extras } = Self::default();
        let softmax = softmax.into_fields().map(|default| fields.next().unwrap_or(default));
        let extras = extras.into_fields().map(|default| fields.next().unwrap_or(default));
        Self {
            softmax: SoftmaxState::from_fields(softmax),
            extras: ExtraState::from_fields(extras),
        }
    }

    /// The first N fields.
    pub(super) fn into_fields<const N: usize>(self) -> [f64; N] {
        let mut fields = self.softmax.into_fields().into_iter().chain(self.extras.into_fields());
        [(); N].map(|()| fields.next().unwrap_or_default())
    }

    /// The state over two ranges of one row, relative to the larger maximum. `other` has the later classes.
    #[inline(always)]
    pub(super) fn merge<const EXTRAS: bool>(self, other: Self) -> Self {
        let max = self.softmax.max.max(other.softmax.max);
        // Only a larger maximum has a class of its own.
        let has_first = self.softmax.max >= other.softmax.max;
        let (a, b) = (self.with_max::<EXTRAS>(max), other.with_max::<EXTRAS>(max));
        let softmax = SoftmaxState {
            max,
            sum_exp: a.softmax.sum_exp + b.softmax.sum_exp,
            target_sum: a.softmax.target_sum + b.softmax.target_sum,
            target_dot: a.softmax.target_dot + b.softmax.target_dot,
        };
        if !EXTRAS {
            return Self { softmax, extras: a.extras };
        }
        let (a, b) = (a.extras, b.extras);
        let extras = ExtraState {
            num_unmasked: a.num_unmasked + b.num_unmasked,
            unmasked_sum: a.unmasked_sum + b.unmasked_sum,
            unmasked_dot: a.unmasked_dot + b.unmasked_dot,
            exp_dot: a.exp_dot + b.exp_dot,
            label_logit: a.label_logit.max(b.label_logit),
            prediction: if has_first { a.prediction } else { b.prediction },
        };
        Self { softmax, extras }
    }

    /// The same state relative to another maximum.
    #[inline(always)]
    fn with_max<const EXTRAS: bool>(mut self, max: f64) -> Self {
        let Self { softmax, extras } = &mut self;
        if softmax.max == max || softmax.max == f64::NEG_INFINITY {
            return self;
        }
        let shift = softmax.max - max;
        let factor = shift.exp();
        if EXTRAS {
            extras.unmasked_dot += extras.unmasked_sum * shift;
            extras.exp_dot = (extras.exp_dot + softmax.sum_exp * shift) * factor;
        }
        softmax.sum_exp *= factor;
        softmax.target_dot +=
            if softmax.target_sum == 0. { 0. } else { softmax.target_sum * shift };
        self
    }
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
