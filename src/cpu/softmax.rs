//! The arithmetic of a block: online softmax forward, the gradient backward.

use super::dtype::{Real, UNROLL};
use super::exp::{add_exp, exp};
use crate::formula::SoftmaxState;
use pulp::Simd;

/// The most rows that a loop works on side by side.
pub(super) const ROWS_AT_ONCE: usize = 128;

/// The elements of a vector.
#[inline(always)]
pub(super) fn vector_len<A: Real, S: Simd>() -> usize {
    size_of::<A::Vector<S>>() / size_of::<A>()
}

impl Default for SoftmaxState<f64> {
    /// The state over no classes.
    fn default() -> Self {
        Self { max: f64::NEG_INFINITY, sum_exp: 0., target_sum: 0., target_dot: 0. }
    }
}

impl SoftmaxState<f64> {
    /// The state over two ranges of one row, relative to the larger maximum.
    #[inline(always)]
    pub(super) fn merge(self, other: Self) -> Self {
        let max = self.max.max(other.max);
        let (a, b) = (self.with_max(max), other.with_max(max));
        Self {
            max,
            sum_exp: a.sum_exp + b.sum_exp,
            target_sum: a.target_sum + b.target_sum,
            target_dot: a.target_dot + b.target_dot,
        }
    }

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

    /// The same state relative to another maximum.
    #[inline(always)]
    fn with_max(self, max: f64) -> Self {
        if self.max == max || self.max == f64::NEG_INFINITY {
            return self;
        }
        let shift = self.max - max;
        let moved = if self.target_sum == 0. { 0. } else { self.target_sum * shift };
        Self { sum_exp: self.sum_exp * shift.exp(), target_dot: self.target_dot + moved, ..self }
    }
}

/// The number that is subtracted from logits: their maximum, but 0 if that is −∞, since −∞ − −∞ is NaN.
fn finite_max<A: Real>(max: A) -> A {
    if max == A::NEG_INFINITY { A::ZERO } else { max }
}

/// The whole chunks of [`UNROLL`] vectors among the values.
#[inline(always)]
fn chunks<A: Real, S: Simd>(values: &[A]) -> &[[A::Vector<S>; UNROLL]] {
    A::as_vectors::<S>(values).as_chunks().0
}

/// The largest logit of a block of whole chunks.
#[inline(always)]
pub(super) fn block_max<A: Real, S: Simd>(simd: S, logits: &[A]) -> A {
    let mut max = [A::splat(simd, A::NEG_INFINITY); UNROLL];
    for x in chunks::<A, S>(logits) {
        for i in 0..UNROLL {
            max[i] = A::vmax(simd, x[i], max[i]);
        }
    }
    let [a, b, c, d] = max;
    let (a, b) = (A::vmax(simd, a, b), A::vmax(simd, c, d));
    A::reduce_max(simd, A::vmax(simd, a, b))
}

/// The state over a block of whole chunks with one weighted target for all classes.
///
/// `max` is the largest logit of this and the earlier blocks of the row. A block that does not raise it is merged without
/// an exponential.
#[inline(always)]
pub(super) fn state_of_uniform<A: Real, S: Simd>(
    simd: S,
    max: A,
    logits: &[A],
    target: A,
) -> SoftmaxState<f64> {
    let base = A::splat(simd, finite_max(max));
    let mut sum_exp = [A::splat(simd, A::ZERO); UNROLL];
    let r = A::splat(simd, target);
    let mut target_dot = sum_exp;
    for x in chunks::<A, S>(logits) {
        for i in 0..UNROLL {
            let x = A::vsub(simd, x[i], base);
            sum_exp[i] = add_exp::<A, S>(simd, sum_exp[i], x);
            // Σ (x − max), multiplied by r afterwards, would overflow for logits masked with the dtype's minimum.
            target_dot[i] = A::vmul_add(simd, r, x, target_dot[i]);
        }
    }
    let target = target.to_f64();
    let target_dot = sum_vectors::<A, S>(simd, target_dot);
    SoftmaxState {
        max: max.to_f64(),
        sum_exp: sum_vectors::<A, S>(simd, sum_exp),
        target_sum: target * logits.len() as f64,
        // 0·∞ counts as 0.
        target_dot: if target == 0. { 0. } else { target_dot },
    }
}

/// The state over a block of whole chunks with a weighted target for each class. `max` is as in [`state_of_uniform`].
#[inline(always)]
pub(super) fn state_of_slice<A: Real, S: Simd>(
    simd: S,
    max: A,
    logits: &[A],
    targets: &[A],
) -> SoftmaxState<f64> {
    let base = A::splat(simd, finite_max(max));
    let mut sum_exp = [A::splat(simd, A::ZERO); UNROLL];
    let (mut target_sum, mut target_dot) = (sum_exp, sum_exp);
    for (x, r) in chunks::<A, S>(logits).iter().zip(chunks::<A, S>(targets)) {
        for i in 0..UNROLL {
            let x = A::vsub(simd, x[i], base);
            sum_exp[i] = add_exp::<A, S>(simd, sum_exp[i], x);
            target_sum[i] = A::vadd(simd, target_sum[i], r[i]);
            target_dot[i] = A::vadd(simd, target_dot[i], A::mul_or_zero(simd, r[i], x));
        }
    }
    SoftmaxState {
        max: max.to_f64(),
        sum_exp: sum_vectors::<A, S>(simd, sum_exp),
        target_sum: sum_vectors::<A, S>(simd, target_sum),
        target_dot: sum_vectors::<A, S>(simd, target_dot),
    }
}

#[inline(always)]
fn sum_vectors<A: Real, S: Simd>(simd: S, [a, b, c, d]: [A::Vector<S>; UNROLL]) -> f64 {
    let (a, b) = (A::vadd(simd, a, b), A::vadd(simd, c, d));
    A::reduce_sum(simd, A::vadd(simd, a, b)).to_f64()
}

impl<A: Real> SoftmaxState<[A; ROWS_AT_ONCE]> {
    /// The states of rows side by side, over no classes.
    pub(super) const EMPTY_ROWS: Self = Self {
        max: [A::NEG_INFINITY; ROWS_AT_ONCE],
        sum_exp: [A::ZERO; ROWS_AT_ONCE],
        target_sum: [A::ZERO; ROWS_AT_ONCE],
        target_dot: [A::ZERO; ROWS_AT_ONCE],
    };

    /// Adds classes, each with a logit and a weighted target for every row. The first `rows` rows count.
    #[inline(always)]
    pub(super) fn add_classes<S: Simd>(
        &mut self,
        simd: S,
        rows: usize,
        logits: &[[A; ROWS_AT_ONCE]],
        targets: &[[A; ROWS_AT_ONCE]],
    ) {
        let Self { max, sum_exp, target_sum, target_dot } = self;
        let fields = A::as_vectors_mut::<S>(max)
            .iter_mut()
            .zip(A::as_vectors_mut::<S>(sum_exp))
            .zip(A::as_vectors_mut::<S>(target_sum))
            .zip(A::as_vectors_mut::<S>(target_dot));
        let vectors = rows.div_ceil(vector_len::<A, S>());
        for (i, (((max, sum_exp), target_sum), target_dot)) in fields.take(vectors).enumerate() {
            let mut new_max = *max;
            for x in logits {
                new_max = A::vmax(simd, A::as_vectors::<S>(x)[i], new_max);
            }
            let base = A::vfinite_max(simd, new_max);
            // The new classes are summed apart from the old ones: fewer roundings than one by one.
            let zero = A::splat(simd, A::ZERO);
            let (mut new_sum_exp, mut new_target_sum, mut new_target_dot) = (zero, zero, zero);
            for (x, r) in logits.iter().zip(targets) {
                let (x, r) = (A::as_vectors::<S>(x)[i], A::as_vectors::<S>(r)[i]);
                let x = A::vsub(simd, x, base);
                new_sum_exp = add_exp::<A, S>(simd, new_sum_exp, x);
                new_target_sum = A::vadd(simd, new_target_sum, r);
                new_target_dot = A::vadd(simd, new_target_dot, A::mul_or_zero(simd, r, x));
            }
            let shift = A::vsub(simd, *max, base);
            let moved = A::vadd(simd, *target_dot, A::mul_or_zero(simd, *target_sum, shift));
            *max = new_max;
            *sum_exp = A::vmul_add(simd, *sum_exp, exp::<A, S>(simd, shift), new_sum_exp);
            *target_sum = A::vadd(simd, *target_sum, new_target_sum);
            *target_dot = A::vadd(simd, moved, new_target_dot);
        }
    }

    pub(super) fn row(&self, i: usize) -> SoftmaxState<f64> {
        SoftmaxState {
            max: self.max[i].to_f64(),
            sum_exp: self.sum_exp[i].to_f64(),
            target_sum: self.target_sum[i].to_f64(),
            target_dot: self.target_dot[i].to_f64(),
        }
    }
}

/// The coefficients of a row's gradient, exp(x − max)·exp_scale + r·neg_grad_output. `T` is a number, a vector, or a
/// collection with a number for each row.
#[derive(Clone, Copy)]
pub(super) struct GradCoeffs<T> {
    pub max: T,
    /// grad_output·(S + 2·z·lse) / Σ exp(x − max).
    pub exp_scale: T,
    pub neg_grad_output: T,
}

impl<A: Real> GradCoeffs<Vec<A>> {
    /// The coefficients of one row, the same for every class of a vector.
    #[inline(always)]
    pub(super) fn splat<S: Simd>(&self, simd: S, row: usize) -> GradCoeffs<A::Vector<S>> {
        GradCoeffs {
            max: A::splat(simd, self.max[row]),
            exp_scale: A::splat(simd, self.exp_scale[row]),
            neg_grad_output: A::splat(simd, self.neg_grad_output[row]),
        }
    }

    /// The coefficients of the rows from `row` on, in vectors.
    #[inline(always)]
    pub(super) fn vectors<S: Simd>(
        &self,
        row: usize,
    ) -> impl Iterator<Item = GradCoeffs<A::Vector<S>>> {
        let max = A::as_vectors::<S>(&self.max[row..]).iter();
        let exp_scale = A::as_vectors::<S>(&self.exp_scale[row..]);
        let neg_grad_output = A::as_vectors::<S>(&self.neg_grad_output[row..]);
        max.zip(exp_scale).zip(neg_grad_output).map(|((&max, &exp_scale), &neg_grad_output)| {
            GradCoeffs { max, exp_scale, neg_grad_output }
        })
    }
}

/// Writes the gradient of a block of whole vectors. `coeffs` and `targets` have an item for each vector of logits.
#[inline(always)]
pub(super) fn write_grad<A: Real, S: Simd>(
    simd: S,
    coeffs: impl Iterator<Item = GradCoeffs<A::Vector<S>>>,
    logits: &[A],
    targets: impl Iterator<Item = A::Vector<S>>,
    out: &mut [A],
) {
    let logits = A::as_vectors::<S>(logits).iter();
    let out = A::as_vectors_mut::<S>(out).iter_mut();
    for (((out, &x), r), row) in out.zip(logits).zip(targets).zip(coeffs) {
        let target_term = A::vmul(simd, r, row.neg_grad_output);
        let exp = exp::<A, S>(simd, A::vsub(simd, x, row.max));
        *out = A::vmul_add(simd, exp, row.exp_scale, target_term);
    }
}
