//! The dtypes of logits.

use super::exp::Exp;
use super::operands::Values;
use super::vector::Packed;
use candle_core::{CpuStorage, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A dtype of logits.
pub(super) trait Element: WithDType {
    const ZERO: Self;
    /// The dtype of the arithmetic.
    type Real: Exp;
    /// What the kernels take for it where no more than the values in any order is needed.
    type Packed: Packed<Real = Self::Real>;

    /// The values of a tensor of this dtype, or nothing if its dtype is another.
    fn values<'a>(values: &Values<'a>) -> Option<&'a [Self]>;
    /// The way back.
    fn to_values(values: &[Self]) -> Values<'_>;
    /// The values of a storage of this dtype, likewise.
    fn values_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    /// The values as they are, if the kernels can take them so.
    fn as_packed(values: &[Self]) -> Option<&[Self::Packed]>;
    /// Values that had to be brought to the stack, by way of a block if need be.
    fn to_packed<'a>(reals: &'a [Self::Real], block: &'a mut [Self]) -> &'a [Self::Packed];
    /// The way back.
    fn from_packed<'a>(packed: &'a [Self::Packed], block: &'a mut [Self]) -> &'a [Self];
    /// Rounds every value.
    fn round(values: &[Self::Real], out: &mut [Self]);
}

macro_rules! element {
    (
        $element:ident, $variant:ident, $real:ident, $packed:ident, $zero:expr,
        as_packed: $as_packed:expr,
        to_packed: |$reals:ident, $room:ident| $to_packed:expr,
        from_packed: |$packed_values:ident, $block:ident| $from_packed:expr,
        round: |$values:ident, $out:ident| $round:expr,
    ) => {
        impl Element for $element {
            const ZERO: Self = $zero;
            type Real = $real;
            type Packed = $packed;

            #[inline(always)]
            fn values<'a>(values: &Values<'a>) -> Option<&'a [Self]> {
                if let Values::$variant(values) = values { Some(values) } else { None }
            }
            fn to_values(values: &[Self]) -> Values<'_> {
                Values::$variant(values)
            }
            fn values_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                if let CpuStorage::$variant(values) = storage { Some(values) } else { None }
            }
            #[inline(always)]
            fn as_packed(values: &[Self]) -> Option<&[$packed]> {
                $as_packed(values)
            }
            #[inline(always)]
            fn to_packed<'a>($reals: &'a [$real], $room: &'a mut [Self]) -> &'a [$packed] {
                $to_packed
            }
            #[inline(always)]
            fn from_packed<'a>(
                $packed_values: &'a [$packed],
                $block: &'a mut [Self],
            ) -> &'a [Self] {
                $from_packed
            }
            #[inline(always)]
            fn round($values: &[$real], $out: &mut [Self]) {
                $round
            }
        }
    };
}

element! {
    f32, F32, f32, f32, 0.,
    as_packed: Some,
    to_packed: |reals, _block| reals,
    from_packed: |packed, _block| packed,
    round: |values, out| out.copy_from_slice(values),
}

element! {
    f64, F64, f64, f64, 0.,
    as_packed: Some,
    to_packed: |reals, _block| reals,
    from_packed: |packed, _block| packed,
    round: |values, out| out.copy_from_slice(values),
}

element! {
    bf16, BF16, f32, bf16, bf16::ZERO,
    as_packed: Some,
    to_packed: |reals, block| {
        // They were bf16 before.
        let block = &mut block[..reals.len()];
        Self::round(reals, block);
        block
    },
    from_packed: |packed, _block| packed,
    round: |values, out| {
        out.iter_mut().zip(values).for_each(|(out, &value)| *out = bf16::from_f32(value));
    },
}

// Processors convert f16 eight at a time; half knows which do. The kernels see f32.
element! {
    f16, F16, f32, f32, f16::ZERO,
    as_packed: |_| None,
    to_packed: |reals, _block| reals,
    from_packed: |packed, block| {
        let block = &mut block[..packed.len()];
        Self::round(packed, block);
        block
    },
    round: |values, out| out.convert_from_f32_slice(values),
}
