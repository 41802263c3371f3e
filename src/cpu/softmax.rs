//! The arithmetic of a block: online softmax forward, the gradient backward.

use super::dtype::{Real, UNROLL};
use super::exp::{add_exp, exp};
use super::state::Extras;
use crate::formula::SoftmaxState;
use pulp::Simd;
use std::array;

/// A buffer whose vectors do not cross cache lines.
#[derive(Clone)]
#[repr(align(64))]
pub(super) struct Aligned<T>(pub T);

/// The most rows that a loop works on side by side.
pub(super) const ROWS_AT_ONCE: usize = 128;

/// The elements of a vector.
#[inline(always)]
pub(super) fn vector_len<A: Real, S: Simd>() -> usize {
    size_of::<A::Vector<S>>() / size_of::<A>()
}

/// The number that is subtracted from logits: their maximum, but 0 if that is −∞, since −∞ − −∞ is NaN.
pub(super) fn finite_max<A: Real>(max: A) -> A {
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
    max_of_vectors::<A, S>(simd, max)
}

/// The state over a block of whole chunks with one weighted target for all classes, and Σ exp(x − max)·(x − max) if extras are
/// wanted.
///
/// `max` is the largest logit of this and the earlier blocks of the row. A block that does not raise it is merged without
/// an exponential.
#[inline(always)]
pub(super) fn state_of_uniform<E: Extras, A: Real, S: Simd>(
    simd: S,
    max: A,
    logits: &[A],
    target: A,
) -> (SoftmaxState<f64>, f64) {
    let base = A::splat(simd, finite_max(max));
    let mut sum_exp = [A::splat(simd, A::ZERO); UNROLL];
    let r = A::splat(simd, target);
    let (mut exp_dot, mut target_dot) = (sum_exp[0], sum_exp);
    for x in chunks::<A, S>(logits) {
        for i in 0..UNROLL {
            let x = A::vsub(simd, x[i], base);
            add_exp::<A, S>(simd, &mut sum_exp[i], E::ARE_WANTED.then_some(&mut exp_dot), x);
            // Σ (x − max), multiplied by r afterwards, would overflow for logits masked with the dtype's minimum.
            target_dot[i] = A::vmul_add(simd, r, x, target_dot[i]);
        }
    }
    let target = target.to_f64();
    let target_dot = sum_vectors::<A, S>(simd, target_dot);
    let state = SoftmaxState {
        max: max.to_f64(),
        sum_exp: sum_vectors::<A, S>(simd, sum_exp),
        target_sum: target * logits.len() as f64,
        // 0·∞ counts as 0.
        target_dot: if target == 0. { 0. } else { target_dot },
    };
    (state, A::reduce_sum(simd, exp_dot).to_f64())
}

/// The chunks whose targets are summed before they are added to other sums: the roundings of a longer sum of equal numbers all go
/// to one side.
const SUMMED_AT_ONCE: usize = 4;

/// The state over a block of whole chunks with a weighted target for each class. The arguments and the second result are as in
/// [`state_of_uniform`].
#[inline(always)]
pub(super) fn state_of_slice<E: Extras, A: Real, S: Simd>(
    simd: S,
    max: A,
    logits: &[A],
    targets: &[A],
) -> (SoftmaxState<f64>, f64) {
    let base = A::splat(simd, finite_max(max));
    let mut sum_exp = [A::splat(simd, A::ZERO); UNROLL];
    let (mut exp_dot, mut target_sum, mut target_dot) = (sum_exp[0], sum_exp, sum_exp);
    let logits = chunks::<A, S>(logits).chunks(SUMMED_AT_ONCE);
    for (logits, targets) in logits.zip(chunks::<A, S>(targets).chunks(SUMMED_AT_ONCE)) {
        // The targets may all be equal.
        let mut sum = [A::splat(simd, A::ZERO); UNROLL];
        for (x, r) in logits.iter().zip(targets) {
            for i in 0..UNROLL {
                let x = A::vsub(simd, x[i], base);
                add_exp::<A, S>(simd, &mut sum_exp[i], E::ARE_WANTED.then_some(&mut exp_dot), x);
                sum[i] = A::vadd(simd, sum[i], r[i]);
                target_dot[i] = A::vadd(simd, target_dot[i], A::mul_or_zero(simd, r[i], x));
            }
        }
        for i in 0..UNROLL {
            target_sum[i] = A::vadd(simd, target_sum[i], sum[i]);
        }
    }
    let state = SoftmaxState {
        max: max.to_f64(),
        sum_exp: sum_vectors::<A, S>(simd, sum_exp),
        target_sum: sum_vectors::<A, S>(simd, target_sum),
        target_dot: sum_vectors::<A, S>(simd, target_dot),
    };
    (state, A::reduce_sum(simd, exp_dot).to_f64())
}

/// The number of the block's classes whose logit is not −∞, the sum of their weights, and Σ weight·(x − max) over them. The block
/// has whole vectors.
#[inline(always)]
pub(super) fn unmasked_of_slice<A: Real, S: Simd>(
    simd: S,
    max: A,
    logits: &[A],
    weights: &[A],
) -> [f64; 3] {
    let base = A::splat(simd, finite_max(max));
    let mut sums = [A::splat(simd, A::ZERO); 3];
    let weights = A::as_vectors::<S>(weights);
    for (&x, &weight) in A::as_vectors::<S>(logits).iter().zip(weights) {
        add_unmasked::<A, S>(simd, &mut sums, x, A::vsub(simd, x, base), weight);
    }
    sums.map(|sum| A::reduce_sum(simd, sum).to_f64())
}

/// Adds the logits of a vector that are not −∞ to the three sums of [`unmasked_of_slice`].
#[inline(always)]
pub(super) fn add_unmasked<A: Real, S: Simd>(
    simd: S,
    [count, sum, dot]: &mut [A::Vector<S>; 3],
    x: A::Vector<S>,
    distance: A::Vector<S>,
    weight: A::Vector<S>,
) {
    let (zero, one) = (A::splat(simd, A::ZERO), A::splat(simd, A::ONE));
    let neg_infinity = A::splat(simd, A::NEG_INFINITY);
    let or_zero = |value| A::select_equal(simd, x, neg_infinity, zero, value);
    *count = A::vadd(simd, *count, or_zero(one));
    *sum = A::vadd(simd, *sum, or_zero(weight));
    *dot = A::vadd(simd, *dot, or_zero(A::mul_or_zero(simd, weight, distance)));
}

/// Adds to the weighted targets of a block what the classes get whose logit is not −∞: `share` times the class weight. The block
/// has whole vectors. `shares` has an item for each.
#[inline(always)]
pub(super) fn add_shares<A: Real, S: Simd>(
    simd: S,
    shares: impl Iterator<Item = A::Vector<S>>,
    logits: &[A],
    weights: &[A],
    targets: &mut [A],
) {
    let zero = A::splat(simd, A::ZERO);
    let neg_infinity = A::splat(simd, A::NEG_INFINITY);
    let logits = A::as_vectors::<S>(logits).iter().zip(A::as_vectors::<S>(weights));
    let targets = A::as_vectors_mut::<S>(targets).iter_mut();
    for ((r, (&x, &weight)), share) in targets.zip(logits).zip(shares) {
        let added = A::vmul(simd, share, weight);
        *r = A::vadd(simd, *r, A::select_equal(simd, x, neg_infinity, zero, added));
    }
}

/// The index of the first logit that equals `max`, which is one of them. The block has whole chunks.
#[inline(always)]
pub(super) fn position_of<A: Real, S: Simd>(simd: S, max: A, logits: &[A]) -> usize {
    let (lanes, len) = (A::as_vectors::<S>(A::LANES)[0], vector_len::<A, S>());
    let negated = |index: usize| A::splat(simd, A::from_f64(-(index as f64)));
    let (max, none, chunk) =
        (A::splat(simd, max), A::splat(simd, A::LOWEST), negated(UNROLL * len));
    // The indices are negated, so that the first of equals is the largest.
    let mut indices: [_; UNROLL] = array::from_fn(|i| A::vsub(simd, negated(i * len), lanes));
    let mut first = [none; UNROLL];
    for x in chunks::<A, S>(logits) {
        for i in 0..UNROLL {
            let index = A::select_equal(simd, x[i], max, indices[i], none);
            first[i] = A::vmax(simd, index, first[i]);
            indices[i] = A::vadd(simd, indices[i], chunk);
        }
    }
    (-max_of_vectors::<A, S>(simd, first).to_f64()) as usize
}

#[inline(always)]
fn max_of_vectors<A: Real, S: Simd>(simd: S, [a, b, c, d]: [A::Vector<S>; UNROLL]) -> A {
    let (a, b) = (A::vmax(simd, a, b), A::vmax(simd, c, d));
    A::reduce_max(simd, A::vmax(simd, a, b))
}

#[inline(always)]
fn sum_vectors<A: Real, S: Simd>(simd: S, [a, b, c, d]: [A::Vector<S>; UNROLL]) -> f64 {
    let (a, b) = (A::vadd(simd, a, b), A::vadd(simd, c, d));
    A::reduce_sum(simd, A::vadd(simd, a, b)).to_f64()
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
