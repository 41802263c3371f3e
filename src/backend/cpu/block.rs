//! The arithmetic of a block, compiled for each instruction set and picked at run time.
//!
//! The loops are plain Rust over fixed numbers of lanes, which the compiler turns into the vector
//! instructions of whatever function they are inlined into; `pulp` provides these functions and the
//! choice between them.

use super::element::Real;
use pulp::{Arch, Simd, WithSimd};

/// Elements that are worked on side by side. Blocks are padded to a multiple of it.
pub(super) const LANES: usize = 16;

/// What a block of classes says of its row.
pub(super) struct Sums<A> {
    /// The largest logit x; −inf if there is none.
    pub max: A,
    /// Σ exp(x − max).
    pub sum: A,
    /// S = Σ r.
    pub total: A,
    /// T = Σ r·(x − max).
    pub shortfall: A,
}

/// The sums of a block of logits and coefficients, which are padded to whole lanes with −inf and 0.
pub(super) fn sums<A: Real>(arch: Arch, logits: &[A], coefficients: &[A]) -> Sums<A> {
    arch.dispatch(Forward {
        logits: logits.as_chunks().0,
        coefficients: coefficients.as_chunks().0,
    })
}

struct Forward<'a, A> {
    logits: &'a [[A; LANES]],
    coefficients: &'a [[A; LANES]],
}

impl<A: Real> WithSimd for Forward<'_, A> {
    type Output = Sums<A>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Sums<A> {
        match fused::<S>() {
            true => self.run::<true>(),
            false => self.run::<false>(),
        }
    }
}

impl<A: Real> Forward<'_, A> {
    #[inline(always)]
    fn run<const FUSED: bool>(self) -> Sums<A> {
        // Passes over NaN, which comes back through the sum of exponentials.
        let larger = |a, b| if b > a { b } else { a };
        let add = |a, b| a + b;

        let mut max = [A::NEG_INFINITY; LANES];
        for x in self.logits {
            for i in 0..LANES {
                max[i] = larger(max[i], x[i]);
            }
        }
        let max = reduce(max, larger);
        // −inf − −inf is NaN; relative to 0 instead, the exponentials are 0 and T is −inf.
        let base = if max == A::NEG_INFINITY { A::ZERO } else { max };

        let mut sum = [A::ZERO; LANES];
        let mut total = [A::ZERO; LANES];
        let mut shortfall = [A::ZERO; LANES];
        for (x, r) in self.logits.iter().zip(self.coefficients) {
            for i in 0..LANES {
                let x = x[i] - base;
                sum[i] += x.exp::<FUSED>();
                total[i] += r[i];
                // 0·∞ is 0 here: what has no weight has no say.
                shortfall[i] += if r[i] == A::ZERO { A::ZERO } else { r[i] * x };
            }
        }
        Sums {
            max,
            sum: reduce(sum, add),
            total: reduce(total, add),
            shortfall: reduce(shortfall, add),
        }
    }
}

/// All lanes as one, in pairs.
#[inline(always)]
fn reduce<A: Real>(mut lanes: [A; LANES], f: impl Fn(A, A) -> A) -> A {
    let mut len = LANES;
    while len > 1 {
        len /= 2;
        for i in 0..len {
            lanes[i] = f(lanes[i], lanes[i + len]);
        }
    }
    lanes[0]
}

/// What the gradient of a row's logits needs: exp(x − max)·scale − r·upstream.
#[derive(Clone, Copy)]
pub(super) struct RowGradient<A> {
    pub max: A,
    pub scale: A,
    pub upstream: A,
}

/// Turns a block of logits into their gradient. `rows` has one entry if the block lies in one row,
/// or one for each element.
pub(super) fn gradient<A: Real>(
    arch: Arch,
    logits: &mut [A],
    coefficients: &[A],
    rows: &[RowGradient<A>],
) {
    arch.dispatch(Backward { logits, coefficients, rows });
}

struct Backward<'a, A> {
    logits: &'a mut [A],
    coefficients: &'a [A],
    rows: &'a [RowGradient<A>],
}

impl<A: Real> WithSimd for Backward<'_, A> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        match fused::<S>() {
            true => self.run::<true>(),
            false => self.run::<false>(),
        }
    }
}

impl<A: Real> Backward<'_, A> {
    #[inline(always)]
    fn run<const FUSED: bool>(self) {
        let of = |x: A, r: A, row: RowGradient<A>| {
            (x - row.max).exp::<FUSED>() * row.scale - r * row.upstream
        };
        let block = self.logits.iter_mut().zip(self.coefficients);
        match *self.rows {
            [row] => block.for_each(|(x, &r)| *x = of(*x, r, row)),
            _ => block.zip(self.rows).for_each(|((x, &r), &row)| *x = of(*x, r, row)),
        }
    }
}

/// Whether the instruction set has a fused multiply-add; without one it would be a function call.
fn fused<S: Simd>() -> bool {
    !S::IS_SCALAR && cfg!(any(target_arch = "x86_64", target_arch = "aarch64"))
}
