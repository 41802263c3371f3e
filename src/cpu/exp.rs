//! The exponential function of numbers x ≤ 0, in vectors.
//!
//! With n the integer nearest to x/ln 2 and r = x − n·ln 2,
//!
//! ```text
//! exp(x) = 2ⁿ·exp(r)        |r| ≤ ln 2 / 2 = 0.347
//! ```
//!
//! - **n**: a float near 1.5·2^(bits of the mantissa) has no bits for a fraction. So adding that constant rounds x/ln 2
//!   to an integer, which then stands in the lowest bits of the sum. Subtracting the constant gives n as a float. The
//!   constant also contains the bias of the exponent, for the last step.
//! - **r**: the subtraction of n·ln 2 cancels most of x, so the product must be exact to more digits than ln 2 has
//!   as a float (Cody and Waite). A fused multiply-add does not round the product. The f32 nearest to ln 2 is
//!   right to 28 bits, so one such step leaves an error of n·1.9e-9. Otherwise ln 2 is split into a high part with so few
//!   bits that its product with n is exact, and a low part with the missing digits.
//! - **exp(r)**: a polynomial 1 + r + ... In f32 it is the polynomial of degree 6 with the smallest maximum of the relative
//!   error on |r| ≤ ln 2 / 2, 3.1e-9, found by Lawson's iteration. In f64 it is the Taylor series, up to the last
//!   term that is not far below half an ulp.
//! - **2ⁿ**: the lowest bits of the sum in the first step, n plus the bias, shifted to the place of the exponent. Exponent
//!   bits of 0 mean the number 0, so x is clamped to where n + bias is 0.
//!
//! In f32 the error is at most 1.1 ulp for x > −10, and 4.5 ulp for all x (1.1 for all x without a fused
//! multiply-add). In f64 it is at most 2 ulp. Results below 2^−126.5, or 2^−1022.5 in f64, are 0. The result is exactly 1
//! at 0 and NaN for NaN. For x > 0 the bounds hold while the true value is finite; beyond that the result is arbitrary.

use super::dtype::Real;
use super::simd::has_fma;
use pulp::Simd;

/// exp(x).
#[inline(always)]
pub(super) fn exp<A: Real, S: Simd>(simd: S, x: A::Vector<S>) -> A::Vector<S> {
    let [a, b] = factors::<A, S>(simd, x);
    A::vmul(simd, a, b)
}

/// Adds exp(x) to `sum`, and exp(x)·x to `dot` if it is given.
#[inline(always)]
pub(super) fn add_exp<A: Real, S: Simd>(
    simd: S,
    sum: &mut A::Vector<S>,
    dot: Option<&mut A::Vector<S>>,
    x: A::Vector<S>,
) {
    let [a, b] = factors::<A, S>(simd, x);
    *sum = A::vmul_add(simd, a, b, *sum);
    if let Some(dot) = dot {
        // Where the exponential is 0, the clamped x is finite: 0·∞ counts as 0.
        let x = A::clamp_min(simd, x, A::splat(simd, A::EXP_MIN));
        *dot = A::vmul_add(simd, A::vmul(simd, a, b), x, *dot);
    }
}

/// The factors exp(r) and 2ⁿ of exp(x).
#[inline(always)]
fn factors<A: Real, S: Simd>(simd: S, x: A::Vector<S>) -> [A::Vector<S>; 2] {
    let x = A::clamp_min(simd, x, A::splat(simd, A::EXP_MIN));
    let round = A::splat(simd, A::ROUND_MAGIC);
    let shifted = A::vmul_add(simd, x, A::splat(simd, A::LOG2_E), round);
    let n = A::vsub(simd, shifted, round);

    let minus_ln_2 = if has_fma::<S>() { A::MINUS_LN_2_FMA } else { A::MINUS_LN_2_SPLIT };
    let mut r = x;
    for &part in minus_ln_2 {
        r = A::vmul_add(simd, n, A::splat(simd, part), r);
    }

    let polynomial = A::polynomial(simd, A::EXP_POLYNOMIAL, r);
    [polynomial, A::exp2_from_bits(simd, shifted)]
}

#[cfg(test)]
mod tests {
    use super::super::simd::dispatch;
    use super::*;
    use pulp::{Scalar128b, WithSimd};
    use std::fmt::Display;
    use std::ops::Neg;

    struct InPlace<'a, A>(&'a mut [A]);

    impl<A: Real> WithSimd for InPlace<'_, A> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            let vectors = A::as_vectors_mut::<S>(self.0);
            for x in vectors {
                *x = exp::<A, S>(simd, *x);
            }
        }
    }

    /// exp of the numbers by this processor's vectors, and by arrays.
    fn exp_both_ways<A: Real>(numbers: &[A]) -> [Vec<A>; 2] {
        let whole = numbers.len().next_multiple_of(64);
        let mut numbers = [numbers.to_vec(), numbers.to_vec()];
        numbers.iter_mut().for_each(|numbers| numbers.resize(whole, A::ZERO));
        dispatch(InPlace(&mut numbers[0]));
        InPlace(&mut numbers[1]).with_simd(Scalar128b);
        numbers
    }

    /// The largest error in ulps, against the standard library in f64.
    fn worst_f32(numbers: &[f32]) -> [f64; 2] {
        exp_both_ways(numbers).map(|results| {
            let ulps = numbers.iter().zip(results).map(|(&x, y)| {
                let exact = f64::from(x).exp();
                let ulp = 2f64.powi(exact.log2().floor().max(-126.) as i32 - 23);
                (f64::from(y) - exact).abs() / ulp
            });
            ulps.fold(0., f64::max)
        })
    }

    #[test]
    fn f32_error_is_within_its_bounds() {
        // Every 997th float: both signs, every exponent, subnormal numbers.
        let numbers = (0..=u32::MAX).step_by(997).map(f32::from_bits);
        let numbers: Vec<f32> = numbers.filter(|x| (-87.33..88.).contains(x)).collect();
        let near: Vec<f32> = numbers.iter().copied().filter(|x| (-10.0..=0.).contains(x)).collect();
        let (near, all) = (worst_f32(&near), worst_f32(&numbers));
        assert!(near[0] <= 1.1 && near[1] <= 1.1, "{near:?}");
        assert!(all[0] <= 4.5 && all[1] <= 1.1, "{all:?}");

        // |r| is largest where n steps to the next integer.
        let steps = (-126..=126).map(|n| (f64::from(n) + 0.5) * std::f64::consts::LN_2);
        let steps: Vec<f32> =
            steps.flat_map(|x| [(x as f32).next_down(), x as f32, (x as f32).next_up()]).collect();
        let worst = worst_f32(&steps);
        assert!(worst[0] <= 4.5 && worst[1] <= 1.1, "{worst:?}");
    }

    /// One of the two ulps may be the standard library's own error.
    #[test]
    fn f64_error_is_within_its_bound() {
        let numbers: Vec<f64> = (-70_800..70_900)
            .map(|i| f64::from(i) * 1e-2 + f64::from(i % 7) * 1e-13)
            .chain((-1021..1023).map(|n| (f64::from(n) + 0.5) * std::f64::consts::LN_2))
            .collect();
        for results in exp_both_ways(&numbers) {
            for (&x, y) in numbers.iter().zip(results) {
                let exact = x.exp();
                let ulps = (y - exact).abs() / (exact * f64::EPSILON);
                assert!(ulps <= 2., "{x}: {y} is {ulps} off {exact}");
            }
        }
    }

    /// Results are subnormal as far as n allows, then 0.
    #[test]
    fn small_results_become_subnormal_then_zero() {
        let (smallest, last) = (f64::from(f32::MIN_POSITIVE), 2f64.powf(-126.5));
        let numbers: Vec<f32> = (0..20_000).map(|i| -86. - i as f32 * 1e-4).collect();
        for results in exp_both_ways(&numbers) {
            for (&x, y) in numbers.iter().zip(results) {
                let exact = f64::from(x).exp();
                let error = (f64::from(y) - exact).abs() / exact.max(smallest);
                assert!(error < 1e-6 || exact < last * (1. + 1e-5), "{x}: {y}");
                assert!(y == 0. || exact > last * (1. - 1e-5), "{x}: {y}");
            }
        }
    }

    fn assert_exact<A: Real + Display + Neg<Output = A>>(cases: &[(A, A)], nan: A) {
        let numbers: Vec<A> = cases.iter().map(|(x, _)| *x).collect();
        for results in exp_both_ways(&numbers) {
            for (&(x, expected), y) in cases.iter().zip(results) {
                assert!(y == expected, "{x}: {y}");
            }
        }
        for results in exp_both_ways(&[nan, -nan]) {
            assert!(results[..2].iter().all(|y| y.to_f64().is_nan()));
        }
    }

    #[test]
    fn special_values() {
        let cases = [
            (0., 1.),
            (-0., 1.),
            (-1e30, 0.),
            (f32::NEG_INFINITY, 0.),
            (f32::MIN, 0.),
            (-90., 0.),
            (f32::MIN_POSITIVE / 2., 1.),
            (-f32::MIN_POSITIVE / 2., 1.),
        ];
        assert_exact(&cases, f32::NAN);
        let cases = [
            (0., 1.),
            (-0., 1.),
            (-1e300, 0.),
            (f64::NEG_INFINITY, 0.),
            (f64::MIN, 0.),
            (-710., 0.),
        ];
        assert_exact(&cases, f64::NAN);
    }
}
