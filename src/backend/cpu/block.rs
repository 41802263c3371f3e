//! The arithmetic of a block, in vectors.

use super::element::Element;
use super::exp::{Exp, add_exp, exp};
use super::vector::{PACK, Packed, Real};
use candle_core::WithDType;
use pulp::Simd;

/// Rows that are worked on side by side where the classes are not next to each other.
pub(super) const ROWS: usize = 128;

/// How many classes of one row are worked on at once: a pack.
#[inline(always)]
pub(super) fn lanes<A: Real, S: Simd>() -> usize {
    PACK * size_of::<A::Vector<S>>() / size_of::<A>()
}

/// What a range of classes says of its row.
#[derive(Clone, Copy)]
pub(super) struct Partial {
    /// The largest logit x; −inf if there is none.
    pub max: f64,
    /// Σ exp(x − max).
    pub sum: f64,
    /// S = Σ r.
    pub total: f64,
    /// T = Σ r·(x − max). A common offset of the logits does not enter it, and all of its terms have one
    /// sign where r has, so no digits are lost to either.
    pub shortfall: f64,
}

impl Default for Partial {
    /// No classes.
    fn default() -> Self {
        Self { max: f64::NEG_INFINITY, sum: 0., total: 0., shortfall: 0. }
    }
}

impl From<[f64; 4]> for Partial {
    fn from([max, sum, total, shortfall]: [f64; 4]) -> Self {
        Self { max, sum, total, shortfall }
    }
}

impl From<Partial> for [f64; 4] {
    fn from(Partial { max, sum, total, shortfall }: Partial) -> Self {
        [max, sum, total, shortfall]
    }
}

impl Partial {
    /// Two ranges of one row as one: sums move to the common maximum.
    #[inline(always)]
    pub(super) fn merge(self, other: Self) -> Self {
        let max = self.max.max(other.max);
        let (ours, theirs) = (self.moved_to(max), other.moved_to(max));
        Self {
            max,
            sum: ours.sum + theirs.sum,
            total: ours.total + theirs.total,
            shortfall: ours.shortfall + theirs.shortfall,
        }
    }

    /// With `surplus` more of the coefficient of a logit that is in already.
    #[inline(always)]
    pub(super) fn with_surplus(self, surplus: f64, logit: f64) -> Self {
        if surplus == 0. {
            return self;
        }
        Self {
            total: self.total + surplus,
            shortfall: self.shortfall + surplus * (logit - base(self.max)),
            ..self
        }
    }

    #[inline(always)]
    fn moved_to(self, max: f64) -> Self {
        if self.max == max || self.max == f64::NEG_INFINITY {
            return self;
        }
        let by = self.max - max;
        let moved = if self.total == 0. { 0. } else { self.total * by };
        Self { sum: self.sum * by.exp(), shortfall: self.shortfall + moved, ..self }
    }
}

/// What the numbers are relative to: their maximum, but 0 if that is −inf, since −inf − −inf is NaN.
/// The exponentials are 0 then and T is −inf.
fn base<A: Element>(max: A) -> A {
    if max.to_f64() == f64::NEG_INFINITY { A::ZERO } else { max }
}

/// The largest logit of a block, whole packs of them.
#[inline(always)]
pub(super) fn largest<T: Packed, S: Simd>(simd: S, logits: &[T]) -> T::Real {
    let mut max = [T::Real::splat(simd, T::Real::NEG_INFINITY); PACK];
    for &pack in T::as_packs::<S>(logits) {
        let x = T::unpack(simd, pack);
        for i in 0..PACK {
            max[i] = T::Real::larger(simd, x[i], max[i]);
        }
    }
    let [a, b, c, d] = max;
    let (a, b) = (T::Real::larger(simd, a, b), T::Real::larger(simd, c, d));
    T::Real::max_of(simd, T::Real::larger(simd, a, b))
}

/// What a block of classes that weigh the same says of its row, whole packs of them.
///
/// `max` is the largest logit so far, this block's own included: relative to it, most blocks merge
/// without an exponential.
#[inline(always)]
pub(super) fn sums_of_equals<T: Packed<Real: Exp>, S: Simd>(
    simd: S,
    max: T::Real,
    logits: &[T],
    coefficient: T::Real,
) -> Partial {
    let base = T::Real::splat(simd, base(max));
    let mut sum = [T::Real::splat(simd, T::Real::ZERO); PACK];
    let r = T::Real::splat(simd, coefficient);
    let mut shortfall = sum;
    for &pack in T::as_packs::<S>(logits) {
        let x = T::unpack(simd, pack);
        for i in 0..PACK {
            let x = T::Real::minus(simd, x[i], base);
            sum[i] = add_exp::<T::Real, S>(simd, sum[i], x);
            // Not Σ (x − max) and r afterwards: logits masked with the dtype's lowest number would
            // overflow.
            shortfall[i] = T::Real::mul_add(simd, r, x, shortfall[i]);
        }
    }
    let coefficient = coefficient.to_f64();
    let shortfall = sum_of::<T::Real, S>(simd, shortfall);
    Partial {
        max: max.to_f64(),
        sum: sum_of::<T::Real, S>(simd, sum),
        total: coefficient * logits.len() as f64,
        // 0·∞ is 0 here: what has no weight has no say.
        shortfall: if coefficient == 0. { 0. } else { shortfall },
    }
}

/// The same of classes with a coefficient each.
#[inline(always)]
pub(super) fn sums_of_row<T: Packed<Real: Exp>, S: Simd>(
    simd: S,
    max: T::Real,
    logits: &[T::Real],
    coefficients: &[T::Real],
) -> Partial {
    let base = T::Real::splat(simd, base(max));
    let mut sum = [T::Real::splat(simd, T::Real::ZERO); PACK];
    let (mut total, mut shortfall) = (sum, sum);
    let logits = T::Real::as_packs::<S>(logits);
    for (&x, &r) in logits.iter().zip(T::Real::as_packs::<S>(coefficients)) {
        let (x, r) = (T::Real::unpack(simd, x), T::Real::unpack(simd, r));
        for i in 0..PACK {
            let x = T::Real::minus(simd, x[i], base);
            sum[i] = add_exp::<T::Real, S>(simd, sum[i], x);
            total[i] = T::Real::plus(simd, total[i], r[i]);
            shortfall[i] = T::Real::plus(simd, shortfall[i], T::Real::weigh(simd, r[i], x));
        }
    }
    Partial {
        max: max.to_f64(),
        sum: sum_of::<T::Real, S>(simd, sum),
        total: sum_of::<T::Real, S>(simd, total),
        shortfall: sum_of::<T::Real, S>(simd, shortfall),
    }
}

#[inline(always)]
fn sum_of<A: Real, S: Simd>(simd: S, [a, b, c, d]: [A::Vector<S>; PACK]) -> f64 {
    let (a, b) = (A::plus(simd, a, b), A::plus(simd, c, d));
    A::sum_of(simd, A::plus(simd, a, b)).to_f64()
}

/// The same of many rows, side by side.
pub(super) struct RowSums<A> {
    max: [A; ROWS],
    sum: [A; ROWS],
    total: [A; ROWS],
    shortfall: [A; ROWS],
}

impl<A: Exp> RowSums<A> {
    pub(super) const EMPTY: Self = Self {
        max: [A::NEG_INFINITY; ROWS],
        sum: [A::ZERO; ROWS],
        total: [A::ZERO; ROWS],
        shortfall: [A::ZERO; ROWS],
    };

    /// Adds classes: a line of rows for each, of which the first `rows` count.
    #[inline(always)]
    pub(super) fn add<S: Simd>(
        &mut self,
        simd: S,
        rows: usize,
        logits: &[[A; ROWS]],
        coefficients: &[[A; ROWS]],
    ) {
        let Self { max, sum, total, shortfall } = self;
        let lines = A::as_vectors_mut::<S>(max)
            .iter_mut()
            .zip(A::as_vectors_mut::<S>(sum))
            .zip(A::as_vectors_mut::<S>(total))
            .zip(A::as_vectors_mut::<S>(shortfall));
        let vectors = rows.div_ceil(size_of::<A::Vector<S>>() / size_of::<A>());
        for (i, (((max, sum), total), shortfall)) in lines.take(vectors).enumerate() {
            let mut new = *max;
            for x in logits {
                new = A::larger(simd, A::as_vectors::<S>(x)[i], new);
            }
            let base = A::replace(simd, new, A::NEG_INFINITY, A::ZERO);
            // The new classes on their own first: fewer roundings than one by one.
            let zero = A::splat(simd, A::ZERO);
            let (mut new_sum, mut new_total, mut new_shortfall) = (zero, zero, zero);
            for (x, r) in logits.iter().zip(coefficients) {
                let (x, r) = (A::as_vectors::<S>(x)[i], A::as_vectors::<S>(r)[i]);
                let x = A::minus(simd, x, base);
                new_sum = add_exp::<A, S>(simd, new_sum, x);
                new_total = A::plus(simd, new_total, r);
                new_shortfall = A::plus(simd, new_shortfall, A::weigh(simd, r, x));
            }
            let by = A::minus(simd, *max, base);
            let moved = A::plus(simd, *shortfall, A::weigh(simd, *total, by));
            *max = new;
            *sum = A::mul_add(simd, *sum, exp::<A, S>(simd, by), new_sum);
            *total = A::plus(simd, *total, new_total);
            *shortfall = A::plus(simd, moved, new_shortfall);
        }
    }

    pub(super) fn row(&self, i: usize) -> Partial {
        Partial {
            max: self.max[i].to_f64(),
            sum: self.sum[i].to_f64(),
            total: self.total[i].to_f64(),
            shortfall: self.shortfall[i].to_f64(),
        }
    }
}

/// What the gradient of a row needs: exp(x − max)·scale + r·against.
#[derive(Clone, Copy)]
pub(super) struct RowGradient<A> {
    pub max: A,
    pub scale: A,
    /// The upstream gradient with its sign turned.
    pub against: A,
}

/// The gradient of classes that weigh the same, whole packs of them, emitted pack by pack.
#[inline(always)]
pub(super) fn gradient_of_equals<T: Packed<Real: Exp>, S: Simd>(
    simd: S,
    row: RowGradient<T::Real>,
    logits: &[T],
    coefficient: T::Real,
    mut emit: impl FnMut(&[T]),
) {
    let max = T::Real::splat(simd, row.max);
    let scale = T::Real::splat(simd, row.scale);
    let rest = T::Real::splat(simd, coefficient * row.against);
    for &x in T::as_packs::<S>(logits) {
        let mut x = T::unpack(simd, x);
        for x in &mut x {
            let e = exp::<T::Real, S>(simd, T::Real::minus(simd, *x, max));
            *x = T::Real::mul_add(simd, e, scale, rest);
        }
        emit(T::as_values::<S>(&T::pack(simd, x)));
    }
}

/// The gradient of classes with a coefficient each, whole packs of them, in place.
#[inline(always)]
pub(super) fn gradient_of_row<A: Exp, S: Simd>(
    simd: S,
    row: RowGradient<A>,
    logits: &mut [A],
    coefficients: &[A],
) {
    let max = A::splat(simd, row.max);
    let scale = A::splat(simd, row.scale);
    let against = A::splat(simd, row.against);
    let coefficients = A::as_vectors::<S>(coefficients);
    for (x, &r) in A::as_vectors_mut::<S>(logits).iter_mut().zip(coefficients) {
        let e = exp::<A, S>(simd, A::minus(simd, *x, max));
        *x = A::mul_add(simd, e, scale, A::times(simd, r, against));
    }
}

/// The gradient of one class of many rows, in place; `max`, `scale` and `against` have a number for
/// each row. Whole vectors of them.
#[inline(always)]
pub(super) fn gradient_of_class<A: Exp, S: Simd>(
    simd: S,
    [max, scale, against]: [&[A]; 3],
    logits: &mut [A],
    coefficients: &[A],
) {
    let rows = A::as_vectors::<S>(max)
        .iter()
        .zip(A::as_vectors::<S>(scale))
        .zip(A::as_vectors::<S>(against));
    let coefficients = A::as_vectors::<S>(coefficients);
    for ((x, &r), ((&max, &scale), &against)) in
        A::as_vectors_mut::<S>(logits).iter_mut().zip(coefficients).zip(rows)
    {
        let e = exp::<A, S>(simd, A::minus(simd, *x, max));
        *x = A::mul_add(simd, e, scale, A::times(simd, r, against));
    }
}
