//! The exponential function, as straight-line code that a compiler can vectorise.
//!
//! With n the integer nearest to x/ln 2 and r = x − n·ln 2,
//!
//! ```text
//! exp(x) = 2ⁿ·exp(r)        |r| ≤ ln 2 / 2 = 0.347
//! ```
//!
//! - **n**: a float of the size of 1.5·2^(bits of the mantissa) has no room for a fraction, so adding
//!   that constant rounds to an integer, which then stands in the lowest bits. Taking it off again
//!   gives n as a float.
//! - **r**: ln 2 is split in two (Cody and Waite). Its high part has so few bits that n times it is
//!   exact, and the subtraction too; its low part brings in the digits that are missing.
//! - **exp(r)**: the Taylor series, up to the last term that is not far below half an ulp.
//! - **2ⁿ**: n plus the exponent's bias, moved from the lowest bits to the exponent's place. An
//!   exponent of all zeros means 0 there and one of all ones infinity, so with n held to what the
//!   exponent can hold, small results are 0 and large ones infinite.
//!
//! The result is within 1 ulp in f32 (1.25 without a fused multiply-add) and within 2 in f64, where the
//! true value lies between the smallest normal number and half the largest. Below that it is 0, exact
//! or instead of a subnormal number. It is exactly 1 at 0, and NaN for NaN.

macro_rules! exp {
    ($name:ident, $real:ident, $bits:ident, $magic:expr, $ln_2:expr, $series:expr) => {
        /// e to the power of x. `FUSED` says that the processor has a fused multiply-add.
        #[inline(always)]
        pub(super) fn $name<const FUSED: bool>(x: $real) -> $real {
            const MANTISSA: u32 = $real::MANTISSA_DIGITS - 1;
            const BIAS: i32 = $real::MAX_EXP - 1;
            const LOWEST: $real = -BIAS as $real * std::$real::consts::LN_2;
            const HIGHEST: $real = (BIAS + 1) as $real * std::$real::consts::LN_2;
            // Where there is no such instruction, `mul_add` would be a function call.
            let mul_add =
                |a: $real, b: $real, c: $real| if FUSED { a.mul_add(b, c) } else { a * b + c };

            // Comparisons are false for NaN, which so comes through.
            let x = if x < LOWEST { LOWEST } else { x };
            let x = if x > HIGHEST { HIGHEST } else { x };

            let shifted = mul_add(x, std::$real::consts::LOG2_E, $magic);
            let n = shifted - $magic;
            let [high, low] = $ln_2;
            let r = mul_add(n, -low, mul_add(n, -high, x));

            let [first, rest @ ..] = $series;
            let mut series: $real = first;
            for coefficient in rest {
                series = mul_add(series, r, coefficient);
            }
            let scale = (shifted.to_bits() << MANTISSA).wrapping_add((BIAS as $bits) << MANTISSA);
            series * $real::from_bits(scale)
        }
    };
}

exp!(
    exp_f32,
    f32,
    u32,
    12_582_912.,
    [355. / 512., -2.121_944_4e-4],
    [1. / 5040., 1. / 720., 1. / 120., 1. / 24., 1. / 6., 0.5, 1., 1.]
);

exp!(
    exp_f64,
    f64,
    u64,
    6_755_399_441_055_744.,
    [0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10],
    [
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
        1.
    ]
);

#[cfg(test)]
mod tests {
    use super::*;

    /// The error in units of the last place, the true value by the standard library in f64.
    fn ulps_f32(x: f32, y: f32) -> f64 {
        let exact = f64::from(x).exp();
        let ulp = 2f64.powi(exact.log2().floor() as i32 - 23);
        (f64::from(y) - exact).abs() / ulp
    }

    #[test]
    fn f32_within_its_bound() {
        // Every 1997th number of either sign, every exponent among them.
        let numbers = (0..=u32::MAX).step_by(1_997).map(f32::from_bits);
        let (mut fused, mut split) = (0f64, 0f64);
        for x in numbers.filter(|x| (-87.33..88.).contains(x)) {
            fused = fused.max(ulps_f32(x, exp_f32::<true>(x)));
            split = split.max(ulps_f32(x, exp_f32::<false>(x)));
        }
        assert!(fused <= 1. && split <= 1.25, "{fused} {split}");
    }

    /// Of the two ulps the standard library's own error may be one.
    #[test]
    fn f64_within_its_bound() {
        let mut worst = [0f64; 2];
        for i in -70_800..70_900 {
            let x = f64::from(i) * 1e-2 + f64::from(i % 7) * 1e-13;
            let exact = x.exp();
            let ulp = exact * f64::EPSILON;
            for (worst, y) in worst.iter_mut().zip([exp_f64::<true>(x), exp_f64::<false>(x)]) {
                *worst = worst.max((y - exact).abs() / ulp);
            }
        }
        assert!(worst[0] <= 2. && worst[1] <= 2., "{worst:?}");
    }

    #[test]
    fn edges() {
        for (x, y) in [
            (0., 1.),
            (-0., 1.),
            (-1e30, 0.),
            (f32::NEG_INFINITY, 0.),
            (-88., 0.),
            (f32::INFINITY, f32::INFINITY),
            (1e30, f32::INFINITY),
            (f32::MIN_POSITIVE / 2., 1.),
        ] {
            assert_eq!(exp_f32::<true>(x), y, "{x}");
            assert_eq!(exp_f32::<false>(x), y, "{x}");
        }
        assert!(exp_f32::<true>(f32::NAN).is_nan());
        for (x, y) in [
            (0., 1.),
            (-1e300, 0.),
            (f64::NEG_INFINITY, 0.),
            (-709., 0.),
            (f64::INFINITY, f64::INFINITY),
        ] {
            assert_eq!(exp_f64::<true>(x), y, "{x}");
            assert_eq!(exp_f64::<false>(x), y, "{x}");
        }
        assert!(exp_f64::<true>(f64::NAN).is_nan());
    }
}
