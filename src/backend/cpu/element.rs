//! The dtypes: what logits are stored in, and what the arithmetic runs in.

use super::exp::{exp_f32, exp_f64};
use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A dtype of logits.
pub(super) trait Element: WithDType {
    const ZERO: Self;
    /// The dtype of the arithmetic.
    type Real: Real;
    /// Rounds every value.
    fn from_reals(values: &[Self::Real], out: &mut [Self]);
}

macro_rules! element {
    ($element:ident, $real:ident, $zero:expr, $round:expr) => {
        impl Element for $element {
            const ZERO: Self = $zero;
            type Real = $real;

            fn from_reals(values: &[$real], out: &mut [Self]) {
                $round(out, values);
            }
        }
    };
}

element!(bf16, f32, bf16::ZERO, HalfFloatSliceExt::convert_from_f32_slice);
element!(f16, f32, f16::ZERO, HalfFloatSliceExt::convert_from_f32_slice);
element!(f32, f32, 0., <[f32]>::copy_from_slice);
element!(f64, f64, 0., <[f64]>::copy_from_slice);

/// A dtype of the arithmetic. Its conversions are exact, but for f64 to f32.
pub(super) trait Real: Element<Real = Self> + Default {
    const NEG_INFINITY: Self;
    fn from_bf16s(values: &[bf16], out: &mut [Self]);
    fn from_f16s(values: &[f16], out: &mut [Self]);
    fn from_f32s(values: &[f32], out: &mut [Self]);
    fn from_f64s(values: &[f64], out: &mut [Self]);
    /// e to the power of self. `FUSED` says that the processor has a fused multiply-add.
    fn exp<const FUSED: bool>(self) -> Self;
}

macro_rules! real {
    ($real:ident, $exp:ident, $from_half:expr) => {
        impl Real for $real {
            const NEG_INFINITY: Self = $real::NEG_INFINITY;

            fn from_bf16s(values: &[bf16], out: &mut [Self]) {
                $from_half(values, out);
            }

            fn from_f16s(values: &[f16], out: &mut [Self]) {
                $from_half(values, out);
            }

            fn from_f32s(values: &[f32], out: &mut [Self]) {
                out.iter_mut().zip(values).for_each(|(out, value)| *out = *value as $real);
            }

            fn from_f64s(values: &[f64], out: &mut [Self]) {
                out.iter_mut().zip(values).for_each(|(out, value)| *out = *value as $real);
            }

            #[inline(always)]
            fn exp<const FUSED: bool>(self) -> Self {
                $exp::<FUSED>(self)
            }
        }
    };
}

real!(f32, exp_f32, HalfFloatSliceExt::convert_to_f32_slice);
real!(f64, exp_f64, HalfFloatSliceExt::convert_to_f64_slice);
