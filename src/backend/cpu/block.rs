//! The arithmetic of a block, compiled for each instruction set and picked at run time.
//!
//! The loops are plain Rust over fixed numbers of lanes, which the compiler turns into the vector
//! instructions of whatever function they are inlined into; `pulp` provides these functions and the
//! choice between them.

use super::element::Real;
use pulp::{Arch, Simd, WithSimd};

/// Classes of one row that are worked on side by side. Blocks are padded to a multiple of it.
pub(super) const LANES: usize = 16;

/// Rows that are worked on side by side where the classes are not next to each other.
pub(super) const ROWS: usize = 64;

/// What a block of classes says of its row, or of each of its rows.
pub(super) struct Sums<A, const N: usize> {
    /// The largest logit x; −inf if there is none.
    pub max: [A; N],
    /// Σ exp(x − max).
    pub sum: [A; N],
    /// S = Σ r.
    pub total: [A; N],
    /// T = Σ r·(x − max).
    pub shortfall: [A; N],
}

/// The sums of a block of logits and coefficients of one row, padded to whole lanes with −inf and 0.
pub(super) fn sums_of_row<A: Real>(arch: Arch, logits: &[A], coefficients: &[A]) -> Sums<A, 1> {
    let (logits, coefficients) = (logits.as_chunks::<LANES>().0, coefficients.as_chunks().0);
    arch.dispatch(Forward { logits, coefficients, common: true }).reduce()
}

/// The sums of a block of classes of many rows: a line of rows for each class.
pub(super) fn sums_of_rows<A: Real>(
    arch: Arch,
    logits: &[[A; ROWS]],
    coefficients: &[[A; ROWS]],
) -> Sums<A, ROWS> {
    arch.dispatch(Forward { logits, coefficients, common: false })
}

struct Forward<'a, A, const N: usize> {
    logits: &'a [[A; N]],
    coefficients: &'a [[A; N]],
    /// Whether all lanes belong to one row and so have one maximum.
    common: bool,
}

impl<A: Real, const N: usize> WithSimd for Forward<'_, A, N> {
    type Output = Sums<A, N>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Sums<A, N> {
        match fused::<S>() {
            true => self.run::<true>(),
            false => self.run::<false>(),
        }
    }
}

impl<A: Real, const N: usize> Forward<'_, A, N> {
    #[inline(always)]
    fn run<const FUSED: bool>(self) -> Sums<A, N> {
        let mut max = [A::NEG_INFINITY; N];
        for x in self.logits {
            for i in 0..N {
                max[i] = larger(max[i], x[i]);
            }
        }
        if self.common {
            max = [reduce(max, larger); N];
        }
        // −inf − −inf is NaN; relative to 0 instead, the exponentials are 0 and T is −inf.
        let base = max.map(|max| if max == A::NEG_INFINITY { A::ZERO } else { max });

        let mut sum = [A::ZERO; N];
        let mut total = [A::ZERO; N];
        let mut shortfall = [A::ZERO; N];
        for (x, r) in self.logits.iter().zip(self.coefficients) {
            for i in 0..N {
                let x = x[i] - base[i];
                sum[i] += x.exp::<FUSED>();
                total[i] += r[i];
                // 0·∞ is 0 here: what has no weight has no say.
                shortfall[i] += if r[i] == A::ZERO { A::ZERO } else { r[i] * x };
            }
        }
        Sums { max, sum, total, shortfall }
    }
}

impl<A: Real, const N: usize> Sums<A, N> {
    /// The lanes of one row as one.
    fn reduce(self) -> Sums<A, 1> {
        let add = |a, b| a + b;
        Sums {
            max: [reduce(self.max, larger)],
            sum: [reduce(self.sum, add)],
            total: [reduce(self.total, add)],
            shortfall: [reduce(self.shortfall, add)],
        }
    }
}

/// The larger number. Passes over NaN, which comes back through the sum of exponentials.
#[inline(always)]
fn larger<A: Real>(a: A, b: A) -> A {
    if b > a { b } else { a }
}

/// All lanes as one, in pairs.
#[inline(always)]
fn reduce<A: Real, const N: usize>(mut lanes: [A; N], f: impl Fn(A, A) -> A) -> A {
    let mut len = N;
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
