//! Comparisons that also say what they reject.

use candle_core::DType;

/// The errors allowed in a result: the rounding errors of the arithmetic, absolute, and those of the rounding of a gradient to its
/// dtype, relative.
pub fn roundings(dtype: DType) -> (f64, f64) {
    match dtype {
        DType::F64 => (1e-12, 0.),
        DType::F32 => (4e-6, 0.),
        DType::F16 => (4e-6, 1. / 2048.),
        _ => (4e-6, 1. / 256.),
    }
}

/// The first number that differs from the expected one by more than an absolute or a relative error.
pub fn first_difference(
    actual: &[f64],
    expected: &[f64],
    absolute: f64,
    relative: f64,
) -> Option<(usize, f64, f64)> {
    assert_eq!(actual.len(), expected.len());
    let pairs = actual.iter().copied().zip(expected.iter().copied()).enumerate();
    pairs.map(|(i, (actual, expected))| (i, actual, expected)).find(|(_, actual, expected)| {
        let error = (actual - expected).abs();
        let is_close = error.is_finite() && error <= absolute + relative * expected.abs();
        !is_close && actual != expected && !(actual.is_nan() && expected.is_nan())
    })
}

pub fn assert_close(name: &str, actual: &[f64], expected: &[f64], absolute: f64, relative: f64) {
    let difference = first_difference(actual, expected, absolute, relative);
    assert_eq!(difference, None, "{name}");
}

/// The losses, then a gradient of each input.
pub type Results = Vec<Vec<f64>>;

/// The first number that is farther from the expected one than roundings explain.
pub fn difference(dtype: DType, actual: &Results, expected: &Results) -> Option<(usize, f64, f64)> {
    assert_eq!(actual.len(), expected.len());
    let (roundings, half_ulp) = roundings(dtype);
    // The losses have the dtype of the arithmetic.
    let relative = |i| if i == 0 { roundings } else { roundings + half_ulp };
    let mut pairs = actual.iter().zip(expected).enumerate();
    pairs.find_map(|(i, (actual, expected))| {
        first_difference(actual, expected, roundings, relative(i))
    })
}

pub fn assert_agrees(name: &str, dtype: DType, actual: &Results, expected: &Results) {
    assert_eq!(difference(dtype, actual, expected), None, "{name}, {dtype:?}");
}

/// Checks that the comparison accepts a peer's results only where its rule is right.
pub fn assert_verdict(
    name: &str,
    dtype: DType,
    peer: &Results,
    expected: &Results,
    is_right: bool,
) {
    let difference = difference(dtype, peer, expected);
    assert_eq!(difference.is_none(), is_right, "{name}, {dtype:?}: {difference:?}");
}
