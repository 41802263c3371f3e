//! The dtypes of logits.

use super::exp::Exp;
use super::operands::Values;
use super::vector::Packed;
use candle_core::WithDType;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::mem::MaybeUninit;

/// A dtype of logits.
pub(super) trait Element: WithDType {
    const ZERO: Self;
    /// The dtype of the arithmetic.
    type Real: Exp;
    /// What the kernels take for it where no more than the values in any order is needed.
    type Packed: Packed<Real = Self::Real>;

    /// The values as they are, if the kernels can take them so without a copy.
    fn as_packed(values: &[Self]) -> Option<&[Self::Packed]>;
    /// The same of memory to write to.
    fn as_packed_room(room: &mut [MaybeUninit<Self>]) -> Option<&mut [MaybeUninit<Self::Packed>]>;
    /// The values of a tensor of this dtype, or nothing if its dtype is another.
    fn values<'a>(values: &Values<'a>) -> Option<&'a [Self]>;
    /// Rounds every value.
    fn round(values: &[Self::Real], out: &mut [Self]);
}

macro_rules! element {
    ($element:ident, $variant:ident, $real:ident, $packed:ident, $zero:expr, $some:expr, $some_mut:expr, $round:expr) => {
        impl Element for $element {
            const ZERO: Self = $zero;
            type Real = $real;
            type Packed = $packed;

            #[inline(always)]
            fn as_packed(values: &[Self]) -> Option<&[$packed]> {
                $some(values)
            }
            #[inline(always)]
            fn as_packed_room(
                room: &mut [MaybeUninit<Self>],
            ) -> Option<&mut [MaybeUninit<$packed>]> {
                $some_mut(room)
            }
            #[inline(always)]
            fn values<'a>(values: &Values<'a>) -> Option<&'a [Self]> {
                if let Values::$variant(values) = values { Some(values) } else { None }
            }
            #[inline(always)]
            fn round(values: &[$real], out: &mut [Self]) {
                $round(out, values);
            }
        }
    };
}

element!(f32, F32, f32, f32, 0., Some, Some, <[f32]>::copy_from_slice);
element!(f64, F64, f64, f64, 0., Some, Some, <[f64]>::copy_from_slice);
element!(bf16, BF16, f32, bf16, bf16::ZERO, Some, Some, |out: &mut [bf16], values: &[f32]| {
    out.iter_mut().zip(values).for_each(|(out, &value)| *out = bf16::from_f32(value));
});
// Processors convert f16 eight at a time; half knows which do.
element!(
    f16,
    F16,
    f32,
    f32,
    f16::ZERO,
    |_| None,
    |_| None,
    HalfFloatSliceExt::convert_from_f32_slice
);
