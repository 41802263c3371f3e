//! The map of the logits by a scale and a softcap, in vectors.
//!
//! With y = scale·x, u = y/cap and e = exp(−2·|u|), the logit and its slope are
//!
//! ```text
//! v     = cap·tanh(u)     = cap·(1 − e)/(1 + e), with the sign of u       |u| > 0.55
//!                         = y·(1 + u²·P(u²))                              |u| ≤ 0.55
//! dv/dx = scale·(1 − tanh²(u))
//!       = scale·4·e/(1 + e)²                                              |u| > 0.55
//! ```
//!
//! For small u, 1 − e would cancel digits. The polynomial P interpolates (tanh(u)/u − 1)/u² at Chebyshev nodes, with a relative
//! error of tanh of 5.4e-9 in f32 and 5.1e-18 in f64. The product begins with y and not with cap·u, so a logit that is tiny
//! against the cap keeps its digits even if u underflows. For large u the slope 1 − tanh² would cancel.
//!
//! The error of v is at most 4 ulp. That of the slope is at most 8 + 6·|u| ulp: the relative error of an exponential, and of u
//! itself, grows with its argument.

use super::dtype::Real;
use super::exp::exp;
use crate::formula;
use pulp::Simd;

/// The parameters of the map in the dtype of the arithmetic.
#[derive(Clone, Copy)]
pub(super) struct LogitMap<A> {
    scale: A,
    cap: Option<Cap<A>>,
}

#[derive(Clone, Copy)]
struct Cap<A> {
    cap: A,
    inverse: A,
}

/// Up to this |u| the polynomial is used.
const SMALL: f64 = 0.55;

impl<A: Real> LogitMap<A> {
    pub(super) fn new(map: formula::LogitMap<f64>) -> Self {
        let cap = |cap: f64| Cap { cap: A::from_f64(cap), inverse: A::from_f64(1. / cap) };
        Self { scale: A::from_f64(map.scale), cap: map.cap.map(cap) }
    }

    /// Maps the whole vectors among the logits.
    #[inline(always)]
    pub(super) fn map<S: Simd>(self, simd: S, logits: &mut [A]) {
        for x in A::as_vectors_mut::<S>(logits) {
            *x = self.value_and_slope(simd, *x).0;
        }
    }

    /// Maps the whole vectors among the logits, and writes the slope of the map at each.
    #[inline(always)]
    pub(super) fn map_with_slopes<S: Simd>(self, simd: S, logits: &mut [A], slopes: &mut [A]) {
        let slopes = A::as_vectors_mut::<S>(slopes);
        for (x, slope) in A::as_vectors_mut::<S>(logits).iter_mut().zip(slopes) {
            (*x, *slope) = self.value_and_slope(simd, *x);
        }
    }

    #[inline(always)]
    fn value_and_slope<S: Simd>(self, simd: S, x: A::Vector<S>) -> (A::Vector<S>, A::Vector<S>) {
        let scale = A::splat(simd, self.scale);
        // A finite logit that overflows stays finite: −∞ marks a masked class.
        let y = A::clamp_min(simd, A::vmul(simd, scale, x), A::splat(simd, A::LOWEST));
        let (value, slope) = match self.cap {
            None => (y, scale),
            Some(cap) => {
                let (value, slope) = softcap::<A, S>(simd, y, cap);
                (value, A::vmul(simd, scale, slope))
            }
        };
        let neg_infinity = A::splat(simd, A::NEG_INFINITY);
        (A::select_equal(simd, x, neg_infinity, neg_infinity, value), slope)
    }
}

/// cap·tanh(y/cap), and 1 − tanh²(y/cap).
#[inline(always)]
fn softcap<A: Real, S: Simd>(
    simd: S,
    y: A::Vector<S>,
    cap: Cap<A>,
) -> (A::Vector<S>, A::Vector<S>) {
    let (zero, one) = (A::splat(simd, A::ZERO), A::splat(simd, A::ONE));
    let u = A::vmul(simd, y, A::splat(simd, cap.inverse));
    let u_squared = A::vmul(simd, u, u);
    let p = A::polynomial(simd, A::TANH_POLYNOMIAL, u_squared);
    let p = A::vmul(simd, u_squared, p);
    let small_value = A::vmul_add(simd, y, p, y);
    let tanh = A::vmul_add(simd, u, p, u);
    let small_slope = A::vsub(simd, one, A::vmul(simd, tanh, tanh));

    let minus_u = A::vsub(simd, zero, u);
    let size = A::vmax(simd, u, minus_u);
    let minus_size = A::vsub(simd, zero, size);
    let e = exp::<A, S>(simd, A::vadd(simd, minus_size, minus_size));
    let sum = A::vadd(simd, one, e);
    let tanh = A::vdiv(simd, A::vsub(simd, one, e), sum);
    let value = A::vmul(simd, A::splat(simd, cap.cap), tanh);
    let value = A::select_equal(simd, u, size, value, A::vsub(simd, zero, value));
    let root = A::vdiv(simd, A::vadd(simd, one, one), sum);
    let slope = A::vmul(simd, e, A::vmul(simd, root, root));

    let limit = A::splat(simd, A::from_f64(SMALL));
    let larger = A::vmax(simd, size, limit);
    let by_size = |small, large| A::select_equal(simd, larger, limit, small, large);
    (by_size(small_value, value), by_size(small_slope, slope))
}

#[cfg(test)]
mod tests {
    use super::super::simd::dispatch;
    use super::*;
    use pulp::{Scalar128b, WithSimd};

    struct Mapped<'a, A>(LogitMap<A>, &'a mut [A], &'a mut [A]);

    impl<A: Real> WithSimd for Mapped<'_, A> {
        type Output = ();

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            self.0.map_with_slopes(simd, self.1, self.2);
        }
    }

    /// The values and slopes by this processor's vectors, and by arrays.
    fn both_ways<A: Real>(scale: f64, cap: Option<f64>, logits: &[A]) -> [[Vec<A>; 2]; 2] {
        let map = LogitMap::<A>::new(formula::LogitMap { scale, cap });
        let mut values = logits.to_vec();
        values.resize(logits.len().next_multiple_of(64), A::ZERO);
        let mut results = [(); 2].map(|()| [values.clone(), values.clone()]);
        let [[a, b], [c, d]] = &mut results;
        dispatch(Mapped(map, a, b));
        Mapped(map, c, d).with_simd(Scalar128b);
        results
    }

    /// The largest errors of value and slope as a share of their bounds, against the standard library in f64.
    fn worst_f32(scale: f64, cap: f64, logits: &[f32]) -> [f64; 2] {
        let mut worst = [0.; 2];
        for [values, slopes] in both_ways(scale, Some(cap), logits) {
            for (i, &x) in logits.iter().enumerate() {
                let u = f64::from(scale as f32) * f64::from(x) / f64::from(cap as f32);
                let expected = [
                    f64::from(cap as f32) * if u.abs() < 1e-8 { u } else { u.tanh() },
                    f64::from(scale as f32) / u.cosh().powi(2),
                ];
                let allowed = [4., 8. + 6. * u.abs()];
                let results = [values[i], slopes[i]].into_iter().zip(expected).zip(allowed);
                for (worst, ((actual, exact), allowed)) in worst.iter_mut().zip(results) {
                    let ulp = 2f64.powi(exact.abs().log2().floor().max(-126.) as i32 - 23);
                    *worst = f64::max(*worst, (f64::from(actual) - exact).abs() / ulp / allowed);
                }
            }
        }
        worst
    }

    #[test]
    fn f32_error_is_within_its_bound() {
        for cap in [1e-3, 0.7, 30., 50., 1e6, 1e12] {
            for scale in [1., 0.3, 7.] {
                // Relative to the cap, both signs, from tiny to saturated.
                let logits = (-10_000..=10_000)
                    .map(|i| f64::from(i) / 10_000. * 9.)
                    .chain((0..2000).map(|i| 10f64.powf(f64::from(i) / 50. - 40.)));
                let logits: Vec<f32> = logits.map(|u| (u * cap / scale) as f32).collect();
                let [value, slope] = worst_f32(scale, cap, &logits);
                assert!(value <= 1. && slope <= 1., "cap {cap}, scale {scale}: {value}, {slope}");
            }
        }
    }

    /// One of the ulps may be the standard library's own error.
    #[test]
    fn f64_error_is_within_its_bound() {
        let (cap, scale) = (30f64, 0.7f64);
        let logits: Vec<f64> = (-40_000..=40_000).map(|i| f64::from(i) * 1e-2 + 1e-13).collect();
        for [values, slopes] in both_ways(scale, Some(cap), &logits) {
            for ((&x, v), slope) in logits.iter().zip(values).zip(slopes) {
                let u = scale * x / cap;
                let (exact, exact_slope) = (cap * u.tanh(), scale / u.cosh().powi(2));
                assert!((v - exact).abs() <= 4. * f64::EPSILON * exact.abs(), "{x}: {v}, {exact}");
                let error = (slope - exact_slope).abs();
                let allowed = (8. + 6. * u.abs()) * f64::EPSILON;
                assert!(error <= allowed * exact_slope, "{x}: {slope}, {exact_slope}");
            }
        }
    }

    #[test]
    fn special_values() {
        let logits =
            [f32::NEG_INFINITY, f32::INFINITY, f32::NAN, f32::MAX, f32::MIN, 0., 1e-30, 1e-42];
        for [values, slopes] in both_ways(2., Some(5.), &logits) {
            assert_eq!(values[..2], [f32::NEG_INFINITY, 5.]);
            assert!(values[2].is_nan());
            assert_eq!(values[3..8], [5., -5., 0., 2e-30, 2. * 1e-42]);
            assert_eq!(slopes[..2], [0., 0.]);
            assert_eq!(slopes[3..8], [0., 0., 2., 2., 2.]);
        }
        for [values, slopes] in both_ways(2., None, &logits) {
            assert_eq!(values[..2], [f32::NEG_INFINITY, f32::INFINITY]);
            assert!(values[2].is_nan());
            assert_eq!(values[3..8], [f32::INFINITY, f32::MIN, 0., 2e-30, 2. * 1e-42]);
            assert_eq!(slopes[3..8], [2.; 5]);
        }
    }
}
