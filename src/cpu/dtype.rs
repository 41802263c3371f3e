//! The dtypes: [`Element`] for those of logits, [`Real`] for those of the arithmetic and its vectors.
//!
//! pulp names an operation after its dtype. Here an operation has one name, so that a loop is written once.

use super::simd::has_fma;
use candle_core::{CpuStorage, WithDType};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::{Simd, bytemuck};
use std::slice;

/// Vectors that a loop works on at a time, so that its constants are loaded once.
pub(super) const UNROLL: usize = 4;

/// A dtype of logits.
pub(crate) trait Element: WithDType + Default {
    /// The dtype of the arithmetic.
    type Real: Real;
    /// The values rounded to the nearest: in `buffer`, or where they are if they have this dtype.
    fn round<'a>(values: &'a [Self::Real], buffer: &'a mut [Self]) -> &'a [Self];
}

/// A dtype of the arithmetic, its vectors, and the constants of [`exp`](super::exp).
pub(crate) trait Real: Element<Real = Self> {
    type Vector<S: Simd>: Copy;
    const ZERO: Self;
    const ONE: Self;
    const NEG_INFINITY: Self;
    /// The lowest finite number.
    const LOWEST: Self;
    /// The indices of the elements of a vector, and some more.
    const LANES: &[Self];

    const LOG2_E: Self;
    /// 1.5·2^(bits of the mantissa) + bias of the exponent.
    const ROUND_MAGIC: Self;
    /// The parts of −ln 2 for fused multiply-adds, the largest first.
    const MINUS_LN_2_FMA: &[Self];
    /// The parts of −ln 2 for separate instructions. The product of n and the first part is exact.
    const MINUS_LN_2_SPLIT: &[Self];
    /// The polynomial's coefficients, from the highest power down.
    const EXP_POLYNOMIAL: &[Self];
    /// −bias·ln 2.
    const EXP_MIN: Self;
    /// The coefficients of the polynomial of [`logit_map`](super::logit_map), from the highest power down.
    const TANH_POLYNOMIAL: &[Self];

    fn from_f32(value: f32) -> Self;
    /// A bf16 is the upper half of an f32.
    #[inline(always)]
    fn from_bf16(value: bf16) -> Self {
        Self::from_f32(f32::from_bits(u32::from(value.to_bits()) << 16))
    }
    /// The values of a storage, if they are of this dtype.
    fn as_slice(storage: &CpuStorage) -> Option<&[Self]>;
    /// The whole vectors among the values.
    fn as_vectors<S: Simd>(values: &[Self]) -> &[Self::Vector<S>];
    fn as_vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [Self::Vector<S>];
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;

    fn vadd<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vsub<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vmul<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vdiv<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// The maximum of each pair. If one of them is NaN, either.
    fn vmax<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// a·b + c, rounded once where that is one instruction, else twice.
    fn vmul_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// `then` where a = b, else `otherwise`.
    fn select_equal<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        then: Self::Vector<S>,
        otherwise: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// 2^(n − bias), where n is the integer in the lowest bits of `bits`.
    fn exp2_from_bits<S: Simd>(simd: S, bits: Self::Vector<S>) -> Self::Vector<S>;
    fn reduce_sum<S: Simd>(simd: S, vector: Self::Vector<S>) -> Self;
    fn reduce_max<S: Simd>(simd: S, vector: Self::Vector<S>) -> Self;

    /// The maximum of `value` and `min`. NaN where `value` is NaN.
    #[inline(always)]
    fn clamp_min<S: Simd>(
        simd: S,
        value: Self::Vector<S>,
        min: Self::Vector<S>,
    ) -> Self::Vector<S> {
        let max = Self::vmax(simd, min, value);
        match has_fma::<S>() {
            // For a NaN the instruction returns its second operand (x86) or the NaN (Arm).
            true => max,
            false => Self::select_equal(simd, value, value, max, value),
        }
    }

    /// a·b, but 0 where a is 0, even if b is infinite.
    #[inline(always)]
    fn mul_or_zero<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S> {
        let zero = Self::splat(simd, Self::ZERO);
        Self::select_equal(simd, a, zero, zero, Self::vmul(simd, a, b))
    }

    /// The polynomial with these coefficients, from the highest power down.
    #[inline(always)]
    fn polynomial<S: Simd>(simd: S, coefficients: &[Self], x: Self::Vector<S>) -> Self::Vector<S> {
        let mut sum = Self::splat(simd, Self::ZERO);
        for (i, &coefficient) in coefficients.iter().enumerate() {
            let coefficient = Self::splat(simd, coefficient);
            sum = match i {
                0 => coefficient,
                _ => Self::vmul_add(simd, sum, x, coefficient),
            };
        }
        sum
    }

    /// `value`, but 0 where it is −∞. The loops subtract this number from the logits.
    #[inline(always)]
    fn vfinite_max<S: Simd>(simd: S, value: Self::Vector<S>) -> Self::Vector<S> {
        let neg_infinity = Self::splat(simd, Self::NEG_INFINITY);
        Self::select_equal(simd, value, neg_infinity, Self::splat(simd, Self::ZERO), value)
    }
}

/// Implements both traits for a dtype of the arithmetic. The arguments are pulp's names of each operation.
macro_rules! real {
    (
        $real:ident, $storage:ident,
        vector: $vector:ident,
        as_vectors: $as_vectors:ident,
        as_vectors_mut: $as_vectors_mut:ident,
        splat: $splat:ident,
        mul_add: $mul_add:ident,
        equal: $equal:ident,
        select: $select:ident,
        binary: { $($binary:ident: $binary_op:ident,)* },
        reduce: { $($reduce:ident: $reduce_op:ident,)* },
        $($items:tt)*
    ) => {
        impl Real for $real {
            type Vector<S: Simd> = S::$vector;
            const ZERO: Self = 0.;
            const ONE: Self = 1.;
            const LOWEST: Self = $real::MIN;
            const LANES: &[Self] = &{
                let (mut lanes, mut i) = ([0.; 64], 1);
                while i < 64 {
                    lanes[i] = lanes[i - 1] + 1.;
                    i += 1;
                }
                lanes
            };
            const NEG_INFINITY: Self = $real::NEG_INFINITY;

            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                value.into()
            }
            #[inline(always)]
            fn as_slice(storage: &CpuStorage) -> Option<&[Self]> {
                if let CpuStorage::$storage(values) = storage { Some(values) } else { None }
            }
            #[inline(always)]
            fn as_vectors<S: Simd>(values: &[Self]) -> &[S::$vector] {
                S::$as_vectors(values).0
            }
            #[inline(always)]
            fn as_vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [S::$vector] {
                S::$as_vectors_mut(values).0
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, value: Self) -> S::$vector {
                simd.$splat(value)
            }
            #[inline(always)]
            fn vmul_add<S: Simd>(
                simd: S,
                a: S::$vector,
                b: S::$vector,
                c: S::$vector,
            ) -> S::$vector {
                match has_fma::<S>() {
                    true => simd.$mul_add(a, b, c),
                    false => Self::vadd(simd, Self::vmul(simd, a, b), c),
                }
            }
            #[inline(always)]
            fn select_equal<S: Simd>(
                simd: S,
                a: S::$vector,
                b: S::$vector,
                then: S::$vector,
                otherwise: S::$vector,
            ) -> S::$vector {
                simd.$select(simd.$equal(a, b), then, otherwise)
            }
            $(
                #[inline(always)]
                fn $binary<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                    simd.$binary_op(a, b)
                }
            )*
            $(
                #[inline(always)]
                fn $reduce<S: Simd>(simd: S, vector: S::$vector) -> Self {
                    simd.$reduce_op(vector)
                }
            )*
            $($items)*
        }

        impl Element for $real {
            type Real = Self;

            #[inline(always)]
            fn round<'a>(values: &'a [Self], _: &'a mut [Self]) -> &'a [Self] {
                values
            }
        }
    };
}

real! {
    f32, F32,
    vector: f32s,
    as_vectors: as_simd_f32s,
    as_vectors_mut: as_mut_simd_f32s,
    splat: splat_f32s,
    mul_add: mul_add_e_f32s,
    equal: equal_f32s,
    select: select_f32s,
    binary: { vadd: add_f32s, vsub: sub_f32s, vmul: mul_f32s, vdiv: div_f32s, vmax: max_f32s, },
    reduce: { reduce_sum: reduce_sum_f32s, reduce_max: reduce_max_f32s, },

    const LOG2_E: Self = std::f32::consts::LOG2_E;
    const ROUND_MAGIC: Self = 12_582_912. + 127.;
    const MINUS_LN_2_FMA: &[Self] = &[-std::f32::consts::LN_2];
    const MINUS_LN_2_SPLIT: &[Self] = &[-355. / 512., 2.121_944_4e-4];
    const EXP_POLYNOMIAL: &[Self] =
        &[1.381_458_4e-3, 8.368_724e-3, 4.166_839e-2, 1.666_652_1e-1, 4.999_999_4e-1, 1., 1.];
    const EXP_MIN: Self = -127. * std::f32::consts::LN_2;
    const TANH_POLYNOMIAL: &[Self] =
        &[-6.610_227_7e-3, 2.130_938_9e-2, -5.390_943e-2, 1.333_311_3e-1, -3.333_333e-1];

    #[inline(always)]
    fn exp2_from_bits<S: Simd>(simd: S, bits: S::f32s) -> S::f32s {
        let bits = simd.transmute_u32s_f32s(bits);
        simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23)))
    }
}

real! {
    f64, F64,
    vector: f64s,
    as_vectors: as_simd_f64s,
    as_vectors_mut: as_mut_simd_f64s,
    splat: splat_f64s,
    mul_add: mul_add_e_f64s,
    equal: equal_f64s,
    select: select_f64s,
    binary: { vadd: add_f64s, vsub: sub_f64s, vmul: mul_f64s, vdiv: div_f64s, vmax: max_f64s, },
    reduce: { reduce_sum: reduce_sum_f64s, reduce_max: reduce_max_f64s, },

    const LOG2_E: Self = std::f64::consts::LOG2_E;
    const ROUND_MAGIC: Self = 6_755_399_441_055_744. + 1023.;
    const MINUS_LN_2_FMA: &[Self] = Self::MINUS_LN_2_SPLIT;
    const MINUS_LN_2_SPLIT: &[Self] = &[-0.693_147_180_369_123_8, -1.908_214_929_270_587_7e-10];
    const EXP_POLYNOMIAL: &[Self] = &inverse_factorials::<14>();
    const EXP_MIN: Self = -1023. * std::f64::consts::LN_2;
    const TANH_POLYNOMIAL: &[Self] = &[
        -2.060_276_537_636_634e-5,
        8.511_313_685_577_671e-5,
        -2.346_347_410_887_237e-4,
        5.889_360_520_074_057e-4,
        -1.455_661_830_100_716e-3,
        3.592_110_378_689_024e-3,
        -8.863_234_397_814_355e-3,
        2.186_948_849_366_694_4e-2,
        -5.396_825_396_743_401_6e-2,
        1.333_333_333_333_271_4e-1,
        -1. / 3.,
    ];

    #[inline(always)]
    fn exp2_from_bits<S: Simd>(_: S, mut bits: S::f64s) -> S::f64s {
        // pulp has no shift of 64 bits.
        for bits in bytemuck::cast_slice_mut::<_, u64>(slice::from_mut(&mut bits)) {
            *bits <<= 52;
        }
        bits
    }
}

/// 1/(N − 1)! down to 1/0!.
const fn inverse_factorials<const N: usize>() -> [f64; N] {
    let mut inverses = [1.; N];
    let (mut i, mut factorial) = (1, 1.);
    while i < N {
        factorial *= i as f64;
        inverses[N - 1 - i] = 1. / factorial;
        i += 1;
    }
    inverses
}

impl Element for bf16 {
    type Real = f32;

    #[inline(always)]
    fn round<'a>(values: &'a [f32], buffer: &'a mut [Self]) -> &'a [Self] {
        let rounded = &mut buffer[..values.len()];
        rounded.iter_mut().zip(values).for_each(|(out, &value)| *out = round_to_bf16(value));
        rounded
    }
}

/// The nearest bf16. The function of `half` has branches, which a loop in vectors pays for.
#[inline(always)]
fn round_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    // Half a unit of the last place kept, less one bit if that place is even: ties go to even.
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    if value.is_nan() { bf16::NAN } else { bf16::from_bits(rounded as u16) }
}

/// Processors convert f16 eight at a time, by instructions that pulp does not have. `half` chooses them at run time.
impl Element for f16 {
    type Real = f32;

    #[inline(always)]
    fn round<'a>(values: &'a [f32], buffer: &'a mut [Self]) -> &'a [Self] {
        let rounded = &mut buffer[..values.len()];
        rounded.convert_from_f32_slice(values);
        rounded
    }
}
