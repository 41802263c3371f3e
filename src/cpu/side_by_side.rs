//! The states of rows side by side: vectors hold one class of several rows.
//!
//! The terms of a group of classes are summed in the dtype of the arithmetic, and the sums of groups in f64. In f32 the roundings
//! of a sum of equal terms all go to one side, so the error of a longer sum would grow with the number of classes.

use super::dtype::Real;
use super::exp::{add_exp, exp};
use super::softmax::{Aligned, ROWS_AT_ONCE, add_unmasked, vector_len};
use super::state::{Extras, RowState, moved_exp_dot};
use crate::formula::{ExtraState, SoftmaxState};
use pulp::Simd;

/// A number of each row.
pub(super) type Rows<T> = [T; ROWS_AT_ONCE];

/// A group of classes: the logits and the weighted targets of the rows for each class.
pub(super) struct ClassGroup<'a, A> {
    pub logits: &'a [Aligned<Rows<A>>],
    pub targets: &'a [Aligned<Rows<A>>],
    /// The class weights, if the sums over the classes whose logit is not −∞ are needed.
    pub weights: Option<&'a [A]>,
}

/// The classes whose terms are summed before they are added to other sums: fewer roundings than one by one.
const SUMMED_AT_ONCE: usize = 8;

/// The states of the rows, with extras if they are needed.
#[repr(align(64))]
pub(super) struct RowStates<T> {
    softmax: SoftmaxState<Rows<T>>,
    extras: Option<ExtraState<Rows<T>>>,
}

impl<T: Real> RowStates<T> {
    /// The states over no classes.
    #[inline(always)]
    pub(super) fn new<E: Extras>() -> Self {
        let RowState { softmax, mut extras } = RowState::<E>::default();
        let rows = |value| [T::from_f64(value); ROWS_AT_ONCE];
        Self {
            softmax: SoftmaxState::from_fields(softmax.into_fields().map(rows)),
            extras: extras
                .get()
                .map(|extras| ExtraState::from_fields(extras.into_fields().map(rows))),
        }
    }

    /// The state of one of the rows. Predictions count from `first_class`.
    #[inline(always)]
    pub(super) fn row<E: Extras>(&self, i: usize, first_class: usize) -> RowState<E> {
        let SoftmaxState { max, sum_exp, target_sum, target_dot } = &self.softmax;
        let softmax = [max, sum_exp, target_sum, target_dot].map(|field| field[i].to_f64());
        let mut state =
            RowState { softmax: SoftmaxState::from_fields(softmax), extras: E::default() };
        if let (Some(out), Some(extras)) = (state.extras.get(), &self.extras) {
            *out = ExtraState {
                num_unmasked: extras.num_unmasked[i].to_f64(),
                unmasked_sum: extras.unmasked_sum[i].to_f64(),
                unmasked_dot: extras.unmasked_dot[i].to_f64(),
                exp_dot: extras.exp_dot[i].to_f64(),
                label_logit: extras.label_logit[i].to_f64(),
                prediction: first_class as f64 + extras.prediction[i].to_f64(),
            };
        }
        state
    }

    /// Forgets the largest logits.
    pub(super) fn reset_max(&mut self) {
        self.softmax.max = [T::NEG_INFINITY; ROWS_AT_ONCE];
    }

    /// Sets the logit of a row's label.
    pub(super) fn set_label_logit(&mut self, row: usize, logit: T) {
        if let Some(extras) = &mut self.extras {
            extras.label_logit[row] = logit;
        }
    }
}

impl<A: Real> RowStates<A> {
    /// Overwrites the states by those over a group of classes. They are relative to the largest logits of the group and of the
    /// groups before. Predictions count from the first class of the group. The first `rows` rows count.
    #[inline(always)]
    pub(super) fn set_to_group<E: Extras, S: Simd>(
        &mut self,
        simd: S,
        rows: usize,
        group: &ClassGroup<A>,
    ) {
        let SoftmaxState { max, sum_exp, target_sum, target_dot } = &mut self.softmax;
        let vectors = rows.div_ceil(vector_len::<A, S>());
        let fields = A::as_vectors_mut::<S>(max)
            .iter_mut()
            .zip(A::as_vectors_mut::<S>(sum_exp))
            .zip(A::as_vectors_mut::<S>(target_sum))
            .zip(A::as_vectors_mut::<S>(target_dot));
        let zero = A::splat(simd, A::ZERO);
        for (i, (((max, sum_exp), target_sum), target_dot)) in fields.take(vectors).enumerate() {
            let mut new_max = *max;
            for x in group.logits {
                new_max = A::vmax(simd, A::as_vectors::<S>(&x.0)[i], new_max);
            }
            let base = A::vfinite_max(simd, new_max);
            let (mut sums, mut exp_dot) = ([zero; 3], zero);
            let logits = group.logits.chunks(SUMMED_AT_ONCE);
            for (logits, targets) in logits.zip(group.targets.chunks(SUMMED_AT_ONCE)) {
                let [mut exp, mut sum, mut dot] = [zero; 3];
                for (x, r) in logits.iter().zip(targets) {
                    let (x, r) = (A::as_vectors::<S>(&x.0)[i], A::as_vectors::<S>(&r.0)[i]);
                    let x = A::vsub(simd, x, base);
                    add_exp::<A, S>(simd, &mut exp, E::ARE_WANTED.then_some(&mut exp_dot), x);
                    sum = A::vadd(simd, sum, r);
                    dot = A::vadd(simd, dot, A::mul_or_zero(simd, r, x));
                }
                for (sum, new) in sums.iter_mut().zip([exp, sum, dot]) {
                    *sum = A::vadd(simd, *sum, new);
                }
            }
            *max = new_max;
            [*sum_exp, *target_sum, *target_dot] = sums;
            if E::ARE_WANTED
                && let Some(extras) = &mut self.extras
            {
                extras.set_to_group(simd, i, new_max, exp_dot, group);
            }
        }
    }
}

impl<A: Real> ExtraState<Rows<A>> {
    /// Overwrites vector `i` of the sums and the prediction.
    #[inline(always)]
    fn set_to_group<S: Simd>(
        &mut self,
        simd: S,
        i: usize,
        max: A::Vector<S>,
        sum_of_exp_dot: A::Vector<S>,
        group: &ClassGroup<A>,
    ) {
        let Self { num_unmasked, unmasked_sum, unmasked_dot, exp_dot, prediction, .. } = self;
        let zero = A::splat(simd, A::ZERO);
        let (mut first, mut nan_or_zero) = (zero, zero);
        // From the last class to the first, so that the first of equals remains.
        for (k, x) in group.logits.iter().enumerate().rev() {
            let (x, index) = (A::as_vectors::<S>(&x.0)[i], A::splat(simd, A::from_f64(k as f64)));
            first = A::select_equal(simd, x, max, index, first);
            nan_or_zero = A::select_equal(simd, x, x, nan_or_zero, x);
        }
        // ∞ − ∞ is NaN.
        let infinity = A::splat(simd, A::from_f64(f64::INFINITY));
        A::as_vectors_mut::<S>(exp_dot)[i] =
            A::select_equal(simd, max, infinity, nan_or_zero, sum_of_exp_dot);
        A::as_vectors_mut::<S>(prediction)[i] = first;
        if let Some(weights) = group.weights {
            let base = A::vfinite_max(simd, max);
            let mut sums = [zero; 3];
            for (x, &weight) in group.logits.iter().zip(weights) {
                let x = A::as_vectors::<S>(&x.0)[i];
                let (distance, weight) = (A::vsub(simd, x, base), A::splat(simd, weight));
                add_unmasked::<A, S>(simd, &mut sums, x, distance, weight);
            }
            let fields = [num_unmasked, unmasked_sum, unmasked_dot];
            for (field, sum) in fields.into_iter().zip(sums) {
                A::as_vectors_mut::<S>(field)[i] = sum;
            }
        }
    }
}

impl RowStates<f64> {
    /// Merges the states over the next group of classes, from `first_class` on, as [`set_to_group`](RowStates::set_to_group)
    /// gives them.
    #[inline(always)]
    pub(super) fn merge<E: Extras, A: Real, S: Simd>(
        &mut self,
        simd: S,
        rows: usize,
        first_class: usize,
        group: &RowStates<A>,
    ) {
        // The compiler knows then that no index is out of bounds.
        let rows = rows.min(ROWS_AT_ONCE);
        let SoftmaxState { max, sum_exp, target_sum, target_dot } = &mut self.softmax;
        let new = &group.softmax;
        let mut shift = Aligned([0.; ROWS_AT_ONCE]);
        let mut factor = Aligned([1.; ROWS_AT_ONCE]);
        let mut is_raised = false;
        for ((shift, &from), to) in shift.0.iter_mut().zip(&*max).zip(&new.max).take(rows) {
            let to = to.to_f64();
            // The sums over no finite logit do not change.
            let keeps = from == to || from == f64::NEG_INFINITY;
            *shift = if keeps { 0. } else { from - to };
            is_raised |= !keeps;
        }
        if is_raised {
            let shifts = f64::as_vectors::<S>(&shift.0).iter();
            let factors = f64::as_vectors_mut::<S>(&mut factor.0).iter_mut();
            let vectors = rows.div_ceil(vector_len::<f64, S>());
            for (factor, &shift) in factors.zip(shifts).take(vectors) {
                *factor = exp::<f64, S>(simd, shift);
            }
        }
        if E::ARE_WANTED
            && let (Some(extras), Some(new)) = (&mut self.extras, &group.extras)
        {
            for i in 0..rows {
                let (shift, factor) = (shift.0[i], factor.0[i]);
                let moved = extras.unmasked_sum[i] * shift;
                extras.num_unmasked[i] += new.num_unmasked[i].to_f64();
                extras.unmasked_sum[i] += new.unmasked_sum[i].to_f64();
                extras.unmasked_dot[i] += moved + new.unmasked_dot[i].to_f64();
                let exp_dot = moved_exp_dot(extras.exp_dot[i], sum_exp[i], shift, factor);
                extras.exp_dot[i] = exp_dot + new.exp_dot[i].to_f64();
                if group.softmax.max[i].to_f64() > max[i] {
                    extras.prediction[i] = first_class as f64 + new.prediction[i].to_f64();
                }
                extras.label_logit[i] = extras.label_logit[i].max(new.label_logit[i].to_f64());
            }
        }
        for i in 0..rows {
            let shift = shift.0[i];
            let moved = if target_sum[i] == 0. { 0. } else { target_sum[i] * shift };
            max[i] = new.max[i].to_f64();
            sum_exp[i] = sum_exp[i] * factor.0[i] + new.sum_exp[i].to_f64();
            target_sum[i] += new.target_sum[i].to_f64();
            target_dot[i] += moved + new.target_dot[i].to_f64();
        }
    }
}
