//! The exponential function of numbers that are not positive, in vectors.
//!
//! With n the integer nearest to x/ln 2 and r = x − n·ln 2,
//!
//! ```text
//! exp(x) = 2ⁿ·exp(r)        |r| ≤ ln 2 / 2 = 0.347
//! ```
//!
//! - **n**: a float of the size of 1.5·2^(bits of the mantissa) has no room for a fraction, so adding
//!   that constant rounds to an integer, which then stands in the lowest bits. Taking it off again
//!   gives n as a float. The constant is larger by the bias of the exponent, for the last step.
//! - **r**: n·ln 2 must be subtracted more precisely than it can be written down, because most of x
//!   goes away (Cody and Waite). A fused multiply-add does not round the product, and the f32 nearest to
//!   ln 2 happens to be right to 28 bits, which leaves an error of n·1.9e-9. Otherwise ln 2 is split
//!   in two: a high part of so few bits that n times it is exact, and a low part that brings in the
//!   digits that are missing.
//! - **exp(r)**: a polynomial 1 + r + ... In f32 it is the one of degree 6 whose largest relative error
//!   on |r| ≤ ln 2 / 2 is smallest, 3.1e-9 (found by Lawson's iteration); in f64 the Taylor series,
//!   up to the last term that is not far below half an ulp.
//! - **2ⁿ**: the lowest bits of the sum in the first step, n plus the bias, moved to the place of the
//!   exponent. An exponent of all zeros means 0, so x is held to where n + bias is 0.
//!
//! In f32 the result is within 1.1 ulp for x > −10 and within 4.5 ulp all over (1.1 all over without a
//! fused multiply-add); in f64 it is within 2. Results below 2^−126.5, or 2^−1022.5 in f64, are 0. The
//! result is exactly 1 at 0, and NaN for NaN. Above 0 the bounds hold too as long as the true value
//! is finite; beyond that the result is any number.

use super::vector::{Real, is_fused};
use pulp::Simd;

/// The constants of the steps above.
pub(super) trait Exp: Real {
    const LOG2_E: Self;
    /// 1.5·2^(bits of the mantissa) + bias.
    const ROUND: Self;
    /// The parts of −ln 2, the largest first, for fused multiply-adds.
    const MINUS_LN_2: &[Self];
    /// The same for separate instructions, n times the first part being exact.
    const MINUS_LN_2_EXACT: &[Self];
    /// The polynomial's coefficients, of the highest power first.
    const POLYNOMIAL: &[Self];
    /// −bias·ln 2.
    const LOWEST: Self;
}

impl Exp for f32 {
    const LOG2_E: Self = std::f32::consts::LOG2_E;
    const ROUND: Self = 12_582_912. + 127.;
    const MINUS_LN_2: &[Self] = &[-std::f32::consts::LN_2];
    const MINUS_LN_2_EXACT: &[Self] = &[-355. / 512., 2.121_944_4e-4];
    const POLYNOMIAL: &[Self] =
        &[1.381_458_4e-3, 8.368_724e-3, 4.166_839e-2, 1.666_652_1e-1, 4.999_999_4e-1, 1., 1.];
    const LOWEST: Self = -127. * std::f32::consts::LN_2;
}

impl Exp for f64 {
    const LOG2_E: Self = std::f64::consts::LOG2_E;
    const ROUND: Self = 6_755_399_441_055_744. + 1023.;
    const MINUS_LN_2: &[Self] = Self::MINUS_LN_2_EXACT;
    const MINUS_LN_2_EXACT: &[Self] = &[-0.693_147_180_369_123_8, -1.908_214_929_270_587_7e-10];
    const POLYNOMIAL: &[Self] = &[
        1. / 6_227_020_800.,
        1. / 479_001_600.,
        1. / 39_916_800.,
        1. / 3_628_800.,
        1. / 362_880.,
        1. / 40_320.,
        1. / 5040.,
        1. / 720.,
        1. / 120.,
        1. / 24.,
        1. / 6.,
        0.5,
        1.,
        1.,
    ];
    const LOWEST: Self = -1023. * std::f64::consts::LN_2;
}

/// e to the power of each x.
#[inline(always)]
pub(super) fn exp<A: Exp, S: Simd>(simd: S, x: A::Vector<S>) -> A::Vector<S> {
    let [a, b] = factors::<A, S>(simd, x);
    A::times(simd, a, b)
}

/// sum + e to the power of each x.
#[inline(always)]
pub(super) fn add_exp<A: Exp, S: Simd>(
    simd: S,
    sum: A::Vector<S>,
    x: A::Vector<S>,
) -> A::Vector<S> {
    let [a, b] = factors::<A, S>(simd, x);
    A::mul_add(simd, a, b, sum)
}

/// exp(r) and 2ⁿ.
#[inline(always)]
fn factors<A: Exp, S: Simd>(simd: S, x: A::Vector<S>) -> [A::Vector<S>; 2] {
    let x = A::at_least(simd, x, A::splat(simd, A::LOWEST));
    let round = A::splat(simd, A::ROUND);
    let shifted = A::mul_add(simd, x, A::splat(simd, A::LOG2_E), round);
    let n = A::minus(simd, shifted, round);

    let minus_ln_2 = if is_fused::<S>() { A::MINUS_LN_2 } else { A::MINUS_LN_2_EXACT };
    let mut r = x;
    for &part in minus_ln_2 {
        r = A::mul_add(simd, n, A::splat(simd, part), r);
    }

    let mut polynomial = A::splat(simd, A::ZERO);
    for (i, &coefficient) in A::POLYNOMIAL.iter().enumerate() {
        let coefficient = A::splat(simd, coefficient);
        polynomial = match i {
            0 => coefficient,
            _ => A::mul_add(simd, polynomial, r, coefficient),
        };
    }
    [polynomial, A::power_of_two(simd, shifted)]
}

#[cfg(test)]
mod tests {
    use super::super::vector::{Kernel, dispatch};
    use super::*;
    use pulp::{Arch, Scalar128b};

    struct InPlace<'a, A>(&'a mut [A]);

    impl<A: Exp> Kernel for InPlace<'_, A> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, simd: S) {
            let vectors = A::as_vectors_mut::<S>(self.0);
            for x in vectors {
                *x = exp::<A, S>(simd, *x);
            }
        }
    }

    /// By this processor's vectors, and by arrays.
    fn both<A: Exp>(numbers: &[A]) -> [Vec<A>; 2] {
        let whole = numbers.len().next_multiple_of(64);
        let mut numbers = [numbers.to_vec(), numbers.to_vec()];
        numbers.iter_mut().for_each(|numbers| numbers.resize(whole, A::ZERO));
        dispatch(Arch::new(), InPlace(&mut numbers[0]));
        InPlace(&mut numbers[1]).run(Scalar128b);
        numbers
    }

    /// The largest error in units of the last place, the true value by the standard library in f64.
    fn worst_f32(numbers: &[f32]) -> [f64; 2] {
        both(numbers).map(|results| {
            let ulps = numbers.iter().zip(results).map(|(&x, y)| {
                let exact = f64::from(x).exp();
                let ulp = 2f64.powi(exact.log2().floor().max(-126.) as i32 - 23);
                (f64::from(y) - exact).abs() / ulp
            });
            ulps.fold(0., f64::max)
        })
    }

    #[test]
    fn f32_within_its_bounds() {
        // Every 997th number of either sign, every exponent and the subnormal ones among them.
        let numbers = (0..=u32::MAX).step_by(997).map(f32::from_bits);
        let numbers: Vec<f32> = numbers.filter(|x| (-87.33..88.).contains(x)).collect();
        let near: Vec<f32> = numbers.iter().copied().filter(|x| (-10.0..=0.).contains(x)).collect();
        let (near, all) = (worst_f32(&near), worst_f32(&numbers));
        assert!(near[0] <= 1.1 && near[1] <= 1.1, "{near:?}");
        assert!(all[0] <= 4.5 && all[1] <= 1.1, "{all:?}");

        // Where n steps to the next integer, |r| is largest.
        let steps = (-126..=126).map(|n| (f64::from(n) + 0.5) * std::f64::consts::LN_2);
        let steps: Vec<f32> =
            steps.flat_map(|x| [(x as f32).next_down(), x as f32, (x as f32).next_up()]).collect();
        let worst = worst_f32(&steps);
        assert!(worst[0] <= 4.5 && worst[1] <= 1.1, "{worst:?}");
    }

    /// Of the two ulps the standard library's own error may be one.
    #[test]
    fn f64_within_its_bound() {
        let numbers: Vec<f64> = (-70_800..70_900)
            .map(|i| f64::from(i) * 1e-2 + f64::from(i % 7) * 1e-13)
            .chain((-1021..1023).map(|n| (f64::from(n) + 0.5) * std::f64::consts::LN_2))
            .collect();
        for results in both(&numbers) {
            for (&x, y) in numbers.iter().zip(results) {
                let exact = x.exp();
                let ulps = (y - exact).abs() / (exact * f64::EPSILON);
                assert!(ulps <= 2., "{x}: {y} is {ulps} off {exact}");
            }
        }
    }

    /// Subnormal as far as n allows, then 0.
    #[test]
    fn small_results() {
        let (smallest, last) = (f64::from(f32::MIN_POSITIVE), 2f64.powf(-126.5));
        let numbers: Vec<f32> = (0..20_000).map(|i| -86. - i as f32 * 1e-4).collect();
        for results in both(&numbers) {
            for (&x, y) in numbers.iter().zip(results) {
                let exact = f64::from(x).exp();
                let error = (f64::from(y) - exact).abs() / exact.max(smallest);
                assert!(error < 1e-6 || exact < last * (1. + 1e-5), "{x}: {y}");
                assert!(y == 0. || exact > last * (1. - 1e-5), "{x}: {y}");
            }
        }
    }

    #[test]
    fn edges() {
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
        for results in both(&cases.map(|(x, _)| x)) {
            for ((x, expected), y) in cases.into_iter().zip(results) {
                assert_eq!(y, expected, "{x}");
            }
        }
        let cases = [
            (0., 1.),
            (-0., 1.),
            (-1e300, 0.),
            (f64::NEG_INFINITY, 0.),
            (f64::MIN, 0.),
            (-710., 0.),
        ];
        for results in both(&cases.map(|(x, _)| x)) {
            for ((x, expected), y) in cases.into_iter().zip(results) {
                assert_eq!(y, expected, "{x}");
            }
        }
        for results in both(&[f32::NAN, -f32::NAN]) {
            assert!(results[..2].iter().all(|y| y.is_nan()), "{:?}", &results[..2]);
        }
        for results in both(&[f64::NAN, -f64::NAN]) {
            assert!(results[..2].iter().all(|y| y.is_nan()), "{:?}", &results[..2]);
        }
    }
}
