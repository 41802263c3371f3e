//! Comparisons of results.

use crate::formula::Approx;
use candle_core::{DType, Device, Result, Tensor};
use candle_label_smoothing::Error;

/// Asserts that the result is an error exactly if the call is invalid, and returns the value.
#[track_caller]
pub fn check_validity<T>(result: std::result::Result<T, Error>, is_valid: bool) -> Option<T> {
    match result {
        Ok(value) => {
            assert!(is_valid, "expected an error");
            Some(value)
        }
        Err(error) => {
            let message = error.to_string();
            assert!(!is_valid && !matches!(error, Error::Candle(_)), "{message}");
            None
        }
    }
}

/// The number of elements of a shape, which saturates.
pub fn element_count(dims: &[usize]) -> usize {
    if dims.contains(&0) { 0 } else { nonzero_product(dims) }
}

/// The product of the dimensions that are not 0.
fn nonzero_product(dims: &[usize]) -> usize {
    let lens = dims.iter().filter(|len| **len != 0);
    lens.fold(1, |product, &len| product.saturating_mul(len))
}

/// Whether f64 elements of this shape would exceed the address space. The library refuses such a shape in any dtype.
pub fn exceeds_address_space(dims: &[usize]) -> bool {
    nonzero_product(dims) > isize::MAX as usize / 8
}

pub fn contiguous_copy(view: &Tensor) -> Result<Tensor> {
    match view.dims().contains(&0) {
        true => Tensor::zeros(view.dims(), view.dtype(), &Device::Cpu),
        false => view.detach().force_contiguous(),
    }
}

pub fn to_f64s(tensor: &Tensor) -> Result<Vec<f64>> {
    if tensor.dims().contains(&0) {
        return Ok(vec![]);
    }
    let tensor = contiguous_copy(tensor)?.flatten_all()?;
    match tensor.dtype() {
        // The direct conversion from F8E4M3 to F64 never returns in candle 0.11.1.
        DType::F8E4M3 => tensor.to_dtype(DType::F32)?.to_dtype(DType::F64)?.to_vec1(),
        _ => tensor.to_dtype(DType::F64)?.to_vec1(),
    }
}

#[track_caller]
pub fn assert_same_bits(actual: &Tensor, expected: &Tensor) -> Result<()> {
    assert_eq!((actual.dims(), actual.dtype()), (expected.dims(), expected.dtype()));
    for (actual, expected) in to_f64s(actual)?.iter().zip(to_f64s(expected)?) {
        let is_same =
            actual.to_bits() == expected.to_bits() || actual.is_nan() && expected.is_nan();
        assert!(is_same, "{actual}, expected {expected}");
    }
    Ok(())
}

#[track_caller]
pub fn assert_close(name: &str, actual: &Tensor, expected: &[Approx]) -> Result<()> {
    let (dtype, actual) = (actual.dtype(), to_f64s(actual)?);
    assert_eq!(actual.len(), expected.len(), "{name}");
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let expected = expected.rounded_to(dtype);
        assert!(expected.accepts(*actual), "{name} {i}: {actual}, expected {expected:?}");
    }
    Ok(())
}
