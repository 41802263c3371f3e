//! The dtypes: [`Element`] for those of logits, [`Real`] for those of the arithmetic and its vectors.
//!
//! pulp names an operation after its dtype. Here an operation has one name, so that a loop is written once.

use super::simd::has_fma;
use candle_core::{CpuStorage, WithDType};
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use pulp::{Simd, bytemuck};
use std::slice;

/// Vectors that a loop works on at a time, so that its constants are loaded once.
pub(super) const UNROLL: usize = 4;

/// The numbers of a floating-point storage.
pub(crate) enum FloatSlice<'a> {
    /// A function of the position, since candle does not export the type.
    F8(Box<dyn Fn(usize) -> f32 + Sync + 'a>, usize),
    BF16(&'a [bf16]),
    F16(&'a [f16]),
    F32(&'a [f32]),
    F64(&'a [f64]),
}

impl<'a> FloatSlice<'a> {
    /// `None` for a storage of another kind of dtype.
    pub(super) fn new(storage: &'a CpuStorage) -> Option<Self> {
        Some(match storage {
            CpuStorage::F8E4M3(values) => Self::F8(Box::new(|i| values[i].to_f32()), values.len()),
            CpuStorage::BF16(values) => Self::BF16(values),
            CpuStorage::F16(values) => Self::F16(values),
            CpuStorage::F32(values) => Self::F32(values),
            CpuStorage::F64(values) => Self::F64(values),
            _ => return None,
        })
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::F8(_, len) => *len,
            Self::BF16(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
        }
    }
}

/// A dtype of logits.
pub(crate) trait Element: WithDType + Default {
    /// The dtype of the arithmetic.
    type Real: Real;
    /// The elements of [`UNROLL`] vectors of the arithmetic.
    type Chunk<S: Simd>: Copy;
    /// Whether [`to_vectors`](Self::to_vectors) is so slow that a loop with two passes converts a block only once.
    const SLOW_TO_VECTORS: bool;

    /// The values, if they are of this dtype.
    fn as_slice<'a>(values: &FloatSlice<'a>) -> Option<&'a [Self]>;
    /// Rounds to the nearest.
    fn round(values: &[Self::Real], out: &mut [Self]);

    /// The whole chunks among the values.
    fn as_chunks<S: Simd>(values: &[Self]) -> &[Self::Chunk<S>];
    fn chunk_values<S: Simd>(chunk: &Self::Chunk<S>) -> &[Self];
    /// The values in the arithmetic, in an order that [`from_vectors`](Self::from_vectors) undoes.
    fn to_vectors<S: Simd>(
        simd: S,
        chunk: Self::Chunk<S>,
    ) -> [<Self::Real as Real>::Vector<S>; UNROLL];
    /// Rounds to the nearest.
    fn from_vectors<S: Simd>(
        simd: S,
        vectors: [<Self::Real as Real>::Vector<S>; UNROLL],
    ) -> Self::Chunk<S>;
}

/// A dtype of the arithmetic, its vectors, and the constants of [`exp`](super::exp).
pub(crate) trait Real: Element<Real = Self> {
    type Vector<S: Simd>: Copy;
    const ZERO: Self;
    const NEG_INFINITY: Self;

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

    fn from_f32(value: f32) -> Self;
    fn to_float_slice(values: &[Self]) -> FloatSlice<'_>;
    /// The values of a storage, if they are of this dtype.
    fn as_slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
    fn as_vectors<S: Simd>(values: &[Self]) -> &[Self::Vector<S>];
    fn as_vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [Self::Vector<S>];
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;

    fn vadd<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vsub<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn vmul<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// a·b + c, rounded once where that is one instruction, else twice.
    fn vmul_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// The maximum of each pair. If one of them is NaN, either.
    fn vmax<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// The maximum of `value` and `min`. NaN where `value` is NaN.
    fn clamp_min<S: Simd>(simd: S, value: Self::Vector<S>, min: Self::Vector<S>)
    -> Self::Vector<S>;
    /// a·b, but 0 where a is 0, even if b is infinite.
    fn mul_or_zero<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `value`, but 0 where it is −∞. The loops subtract this number from the logits.
    fn vfinite_base<S: Simd>(simd: S, value: Self::Vector<S>) -> Self::Vector<S>;
    /// 2^(n − bias), where n is the integer in the lowest bits of `bits`.
    fn exp2_from_bits<S: Simd>(simd: S, bits: Self::Vector<S>) -> Self::Vector<S>;

    fn reduce_sum<S: Simd>(simd: S, vector: Self::Vector<S>) -> Self;
    fn reduce_max<S: Simd>(simd: S, vector: Self::Vector<S>) -> Self;
}

/// Implements both traits for a dtype of the arithmetic. The arguments are pulp's names of each operation.
macro_rules! real {
    (
        $real:ident, $storage:ident,
        consts: { $($consts:tt)* },
        vector: $vector:ident,
        as_vectors: $as_vectors:ident,
        as_vectors_mut: $as_vectors_mut:ident,
        splat: $splat:ident,
        add: $add:ident,
        sub: $sub:ident,
        mul: $mul:ident,
        mul_add: $mul_add:ident,
        max: $max:ident,
        less_than: $less_than:ident,
        equal: $equal:ident,
        select: $select:ident,
        reduce_sum: $reduce_sum:ident,
        reduce_max: $reduce_max:ident,
        exp2_from_bits: $exp2_from_bits:expr,
    ) => {
        impl Real for $real {
            type Vector<S: Simd> = S::$vector;
            const ZERO: Self = 0.;
            const NEG_INFINITY: Self = $real::NEG_INFINITY;
            $($consts)*

            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                value.into()
            }
            fn to_float_slice(values: &[Self]) -> FloatSlice<'_> {
                FloatSlice::$storage(values)
            }
            fn as_slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
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
            fn vadd<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$add(a, b)
            }
            #[inline(always)]
            fn vsub<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$sub(a, b)
            }
            #[inline(always)]
            fn vmul<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$mul(a, b)
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
                    false => simd.$add(simd.$mul(a, b), c),
                }
            }
            #[inline(always)]
            fn vmax<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$max(a, b)
            }
            #[inline(always)]
            fn clamp_min<S: Simd>(simd: S, value: S::$vector, min: S::$vector) -> S::$vector {
                match has_fma::<S>() {
                    // One instruction. For a NaN it returns its second operand (x86) or the NaN (Arm).
                    true => simd.$max(min, value),
                    false => simd.$select(simd.$less_than(value, min), min, value),
                }
            }
            #[inline(always)]
            fn mul_or_zero<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                let zero = simd.$splat(0.);
                simd.$select(simd.$equal(a, zero), zero, simd.$mul(a, b))
            }
            #[inline(always)]
            fn vfinite_base<S: Simd>(simd: S, value: S::$vector) -> S::$vector {
                let is_neg_infinity = simd.$equal(value, simd.$splat(Self::NEG_INFINITY));
                simd.$select(is_neg_infinity, simd.$splat(0.), value)
            }
            #[inline(always)]
            fn exp2_from_bits<S: Simd>(simd: S, bits: S::$vector) -> S::$vector {
                $exp2_from_bits(simd, bits)
            }
            #[inline(always)]
            fn reduce_sum<S: Simd>(simd: S, vector: S::$vector) -> Self {
                simd.$reduce_sum(vector)
            }
            #[inline(always)]
            fn reduce_max<S: Simd>(simd: S, vector: S::$vector) -> Self {
                simd.$reduce_max(vector)
            }
        }

        impl Element for $real {
            type Real = Self;
            type Chunk<S: Simd> = [S::$vector; UNROLL];
            const SLOW_TO_VECTORS: bool = false;

            #[inline(always)]
            fn as_slice<'a>(values: &FloatSlice<'a>) -> Option<&'a [Self]> {
                if let FloatSlice::$storage(values) = values { Some(values) } else { None }
            }
            #[inline(always)]
            fn round(values: &[Self], out: &mut [Self]) {
                out.copy_from_slice(values);
            }
            #[inline(always)]
            fn as_chunks<S: Simd>(values: &[Self]) -> &[[S::$vector; UNROLL]] {
                Self::as_vectors::<S>(values).as_chunks().0
            }
            #[inline(always)]
            fn chunk_values<S: Simd>(chunk: &[S::$vector; UNROLL]) -> &[Self] {
                bytemuck::cast_slice(chunk)
            }
            #[inline(always)]
            fn to_vectors<S: Simd>(_: S, chunk: [S::$vector; UNROLL]) -> [S::$vector; UNROLL] {
                chunk
            }
            #[inline(always)]
            fn from_vectors<S: Simd>(_: S, vectors: [S::$vector; UNROLL]) -> [S::$vector; UNROLL] {
                vectors
            }
        }
    };
}

real! {
    f32, F32,
    consts: {
        const LOG2_E: Self = std::f32::consts::LOG2_E;
        const ROUND_MAGIC: Self = 12_582_912. + 127.;
        const MINUS_LN_2_FMA: &[Self] = &[-std::f32::consts::LN_2];
        const MINUS_LN_2_SPLIT: &[Self] = &[-355. / 512., 2.121_944_4e-4];
        const EXP_POLYNOMIAL: &[Self] =
            &[1.381_458_4e-3, 8.368_724e-3, 4.166_839e-2, 1.666_652_1e-1, 4.999_999_4e-1, 1., 1.];
        const EXP_MIN: Self = -127. * std::f32::consts::LN_2;
    },
    vector: f32s,
    as_vectors: as_simd_f32s,
    as_vectors_mut: as_mut_simd_f32s,
    splat: splat_f32s,
    add: add_f32s,
    sub: sub_f32s,
    mul: mul_f32s,
    mul_add: mul_add_e_f32s,
    max: max_f32s,
    less_than: less_than_f32s,
    equal: equal_f32s,
    select: select_f32s,
    reduce_sum: reduce_sum_f32s,
    reduce_max: reduce_max_f32s,
    exp2_from_bits: |simd: S, bits| {
        let bits = simd.transmute_u32s_f32s(bits);
        simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23)))
    },
}

real! {
    f64, F64,
    consts: {
        const LOG2_E: Self = std::f64::consts::LOG2_E;
        const ROUND_MAGIC: Self = 6_755_399_441_055_744. + 1023.;
        const MINUS_LN_2_FMA: &[Self] = Self::MINUS_LN_2_SPLIT;
        const MINUS_LN_2_SPLIT: &[Self] =
            &[-0.693_147_180_369_123_8, -1.908_214_929_270_587_7e-10];
        const EXP_POLYNOMIAL: &[Self] = &[
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
        const EXP_MIN: Self = -1023. * std::f64::consts::LN_2;
    },
    vector: f64s,
    as_vectors: as_simd_f64s,
    as_vectors_mut: as_mut_simd_f64s,
    splat: splat_f64s,
    add: add_f64s,
    sub: sub_f64s,
    mul: mul_f64s,
    mul_add: mul_add_e_f64s,
    max: max_f64s,
    less_than: less_than_f64s,
    equal: equal_f64s,
    select: select_f64s,
    reduce_sum: reduce_sum_f64s,
    reduce_max: reduce_max_f64s,
    exp2_from_bits: |_: S, mut bits: S::f64s| {
        // pulp has no shift of 64 bits.
        for bits in bytemuck::cast_slice_mut::<_, u64>(slice::from_mut(&mut bits)) {
            *bits <<= 52;
        }
        bits
    },
}

/// Implements the methods of [`Element`] that the half types share: a chunk is two vectors of 16-bit integers.
macro_rules! half_element {
    ($storage:ident) => {
        type Real = f32;
        type Chunk<S: Simd> = [S::u16s; 2];

        #[inline(always)]
        fn as_slice<'a>(values: &FloatSlice<'a>) -> Option<&'a [Self]> {
            if let FloatSlice::$storage(values) = values { Some(values) } else { None }
        }
        #[inline(always)]
        fn as_chunks<S: Simd>(values: &[Self]) -> &[[S::u16s; 2]] {
            S::as_simd_u16s(values.reinterpret_cast()).0.as_chunks().0
        }
        #[inline(always)]
        fn chunk_values<S: Simd>(chunk: &[S::u16s; 2]) -> &[Self] {
            bytemuck::cast_slice::<_, u16>(chunk).reinterpret_cast()
        }
    };
}

/// A bf16 is the upper half of an f32. So a 32-bit lane holds two bf16. A shift and a mask turn a vector of such pairs into
/// two vectors of f32, and no number moves to another lane.
impl Element for bf16 {
    half_element!(BF16);
    const SLOW_TO_VECTORS: bool = false;

    #[inline(always)]
    fn round(values: &[f32], out: &mut [Self]) {
        out.iter_mut().zip(values).for_each(|(out, &value)| *out = bf16::from_f32(value));
    }
    #[inline(always)]
    fn to_vectors<S: Simd>(simd: S, [a, b]: [S::u16s; 2]) -> [S::f32s; UNROLL] {
        let ([a, b], [c, d]) = (unpack_bf16(simd, a), unpack_bf16(simd, b));
        [a, b, c, d]
    }
    #[inline(always)]
    fn from_vectors<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; UNROLL]) -> [S::u16s; 2] {
        [pack_bf16(simd, a, b), pack_bf16(simd, c, d)]
    }
}

/// Processors convert f16 eight at a time, by instructions that pulp does not have. `half` chooses them at run time.
impl Element for f16 {
    half_element!(F16);
    const SLOW_TO_VECTORS: bool = true;

    #[inline(always)]
    fn round(values: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(values);
    }
    #[inline(always)]
    fn to_vectors<S: Simd>(simd: S, chunk: [S::u16s; 2]) -> [S::f32s; UNROLL] {
        let mut vectors = [simd.splat_f32s(0.); UNROLL];
        let floats = bytemuck::cast_slice_mut::<_, f32>(&mut vectors);
        Self::chunk_values::<S>(&chunk).convert_to_f32_slice(floats);
        vectors
    }
    #[inline(always)]
    fn from_vectors<S: Simd>(simd: S, vectors: [S::f32s; UNROLL]) -> [S::u16s; 2] {
        let mut chunk = [simd.splat_u16s(0); 2];
        let halves = bytemuck::cast_slice_mut::<_, u16>(&mut chunk);
        halves.reinterpret_cast_mut::<f16>().convert_from_f32_slice(bytemuck::cast_slice(&vectors));
        chunk
    }
}

/// The bf16 in the lower and in the upper half of each 32-bit lane, as f32.
#[inline(always)]
fn unpack_bf16<S: Simd>(simd: S, pairs: S::u16s) -> [S::f32s; 2] {
    let pairs: S::u32s = bytemuck::cast(pairs);
    let lower = simd.wrapping_dyn_shl_u32s(pairs, simd.splat_u32s(16));
    let upper = simd.and_u32s(pairs, simd.splat_u32s(0xffff_0000));
    [simd.transmute_f32s_u32s(lower), simd.transmute_f32s_u32s(upper)]
}

/// Undoes [`unpack_bf16`], rounding to the nearest.
#[inline(always)]
fn pack_bf16<S: Simd>(simd: S, lower: S::f32s, upper: S::f32s) -> S::u16s {
    let (lower, upper) = (round_to_bf16(simd, lower), round_to_bf16(simd, upper));
    let lower = simd.wrapping_dyn_shr_u32s(lower, simd.splat_u32s(16));
    let upper = simd.and_u32s(upper, simd.splat_u32s(0xffff_0000));
    bytemuck::cast(simd.or_u32s(lower, upper))
}

/// The nearest bf16 of each number, in the upper half of its lane. The lower half is arbitrary.
#[inline(always)]
fn round_to_bf16<S: Simd>(simd: S, value: S::f32s) -> S::u32s {
    let bits = simd.transmute_u32s_f32s(value);
    // Half a unit of the last place kept, less one bit if that place is even: ties go to even.
    let last = simd.wrapping_dyn_shr_u32s(bits, simd.splat_u32s(16));
    let odd = simd.and_u32s(last, simd.splat_u32s(1));
    let rounded = simd.add_u32s(bits, simd.add_u32s(odd, simd.splat_u32s(0x7fff)));
    let is_number = simd.equal_f32s(value, value);
    simd.select_u32s(is_number, rounded, simd.splat_u32s(0x7fc0_0000))
}
