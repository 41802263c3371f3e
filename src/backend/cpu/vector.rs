//! Vectors of numbers, whatever the instruction set and the dtype.
//!
//! `pulp` has the instruction sets, the choice between them at run time, and the operations, under
//! names that carry the dtype. Here they get names without it, so that a kernel is written once.

use super::element::Element;
use half::bf16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use pulp::{Arch, Scalar, Scalar128b, Simd, WithSimd, bytemuck};
use std::any::TypeId;
use std::slice;

/// A piece of work that is compiled for each instruction set.
///
/// What it calls must be `#[inline(always)]`, or else is compiled for none of them.
pub(super) trait Kernel {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs a kernel by the processor's best instruction set.
pub(super) fn dispatch<K: Kernel>(arch: Arch, kernel: K) -> K::Output {
    arch.dispatch(Dispatch(kernel))
}

struct Dispatch<K>(K);

impl<K: Kernel> WithSimd for Dispatch<K> {
    type Output = K::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> K::Output {
        // Without vectors, arrays: the compiler finds for them what every processor of the target has.
        match TypeId::of::<S>() == TypeId::of::<Scalar>() {
            true => self.0.run(Scalar128b),
            false => self.0.run(simd),
        }
    }
}

/// Whether there is a fused multiply-add; without one it would be a function call.
#[inline(always)]
pub(super) fn is_fused<S: Simd>() -> bool {
    let has_vectors = TypeId::of::<S>() != TypeId::of::<Scalar128b>();
    has_vectors && cfg!(any(target_arch = "x86_64", target_arch = "aarch64"))
}

/// A dtype of the arithmetic, and the vectors of it.
pub(super) trait Real: Element<Real = Self> + Packed<Real = Self> + Default {
    type Vector<S: Simd>: Copy;
    const NEG_INFINITY: Self;

    fn from_f32(value: f32) -> Self;
    fn as_vectors<S: Simd>(values: &[Self]) -> &[Self::Vector<S>];
    fn as_vectors_mut<S: Simd>(values: &mut [Self]) -> &mut [Self::Vector<S>];
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;

    fn plus<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn minus<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn times<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// a·b + c, rounded once where that is fast.
    fn mul_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// The larger of each two; if one is NaN, either.
    fn larger<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `value`, but `other` where `value` is less than it. NaN stays.
    fn at_least<S: Simd>(
        simd: S,
        value: Self::Vector<S>,
        other: Self::Vector<S>,
    ) -> Self::Vector<S>;
    /// a·b, but 0 where a is 0, even if b is infinite.
    fn weigh<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    /// `value`, but `replacement` where it equals `key`.
    fn replace<S: Simd>(
        simd: S,
        value: Self::Vector<S>,
        key: Self,
        replacement: Self,
    ) -> Self::Vector<S>;
    /// The number whose exponent is in the lowest bits of `bits`, and whose mantissa is 1.
    fn power_of_two<S: Simd>(simd: S, bits: Self::Vector<S>) -> Self::Vector<S>;

    fn sum_of<S: Simd>(simd: S, vector: Self::Vector<S>) -> Self;
    fn max_of<S: Simd>(simd: S, vector: Self::Vector<S>) -> Self;
}

macro_rules! real {
    ($real:ident, $vector:ident, $as_vectors:ident, $as_vectors_mut:ident, $splat:ident,
     $add:ident, $sub:ident, $mul:ident, $mul_add:ident, $max:ident, $less:ident, $equal:ident,
     $select:ident, $sum:ident, $max_of:ident, $shift:expr) => {
        impl Real for $real {
            type Vector<S: Simd> = S::$vector;
            const NEG_INFINITY: Self = $real::NEG_INFINITY;

            #[inline(always)]
            fn from_f32(value: f32) -> Self {
                value.into()
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
            fn plus<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$add(a, b)
            }
            #[inline(always)]
            fn minus<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$sub(a, b)
            }
            #[inline(always)]
            fn times<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$mul(a, b)
            }
            #[inline(always)]
            fn mul_add<S: Simd>(
                simd: S,
                a: S::$vector,
                b: S::$vector,
                c: S::$vector,
            ) -> S::$vector {
                match is_fused::<S>() {
                    true => simd.$mul_add(a, b, c),
                    false => simd.$add(simd.$mul(a, b), c),
                }
            }
            #[inline(always)]
            fn larger<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$max(a, b)
            }
            #[inline(always)]
            fn at_least<S: Simd>(simd: S, value: S::$vector, other: S::$vector) -> S::$vector {
                match is_fused::<S>() {
                    // One instruction, which gives its second operand if there is a NaN (x86) or
                    // the NaN itself (Arm).
                    true => simd.$max(other, value),
                    false => simd.$select(simd.$less(value, other), other, value),
                }
            }
            #[inline(always)]
            fn weigh<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                let zero = simd.$splat(0.);
                simd.$select(simd.$equal(a, zero), zero, simd.$mul(a, b))
            }
            #[inline(always)]
            fn replace<S: Simd>(
                simd: S,
                value: S::$vector,
                key: Self,
                replacement: Self,
            ) -> S::$vector {
                let is_key = simd.$equal(value, simd.$splat(key));
                simd.$select(is_key, simd.$splat(replacement), value)
            }
            #[inline(always)]
            fn power_of_two<S: Simd>(simd: S, bits: S::$vector) -> S::$vector {
                $shift(simd, bits)
            }
            #[inline(always)]
            fn sum_of<S: Simd>(simd: S, vector: S::$vector) -> Self {
                simd.$sum(vector)
            }
            #[inline(always)]
            fn max_of<S: Simd>(simd: S, vector: S::$vector) -> Self {
                simd.$max_of(vector)
            }
        }

        impl Packed for $real {
            type Real = Self;
            type Pack<S: Simd> = [S::$vector; PACK];

            #[inline(always)]
            fn as_packs<S: Simd>(values: &[Self]) -> &[[S::$vector; PACK]] {
                Self::as_vectors::<S>(values).as_chunks().0
            }
            #[inline(always)]
            fn unpack<S: Simd>(_: S, pack: [S::$vector; PACK]) -> [S::$vector; PACK] {
                pack
            }
            #[inline(always)]
            fn pack<S: Simd>(_: S, vectors: [S::$vector; PACK]) -> [S::$vector; PACK] {
                vectors
            }
            #[inline(always)]
            fn as_values<S: Simd>(pack: &[S::$vector; PACK]) -> &[Self] {
                bytemuck::cast_slice(pack)
            }
        }
    };
}

real!(
    f32,
    f32s,
    as_simd_f32s,
    as_mut_simd_f32s,
    splat_f32s,
    add_f32s,
    sub_f32s,
    mul_f32s,
    mul_add_e_f32s,
    max_f32s,
    less_than_f32s,
    equal_f32s,
    select_f32s,
    reduce_sum_f32s,
    reduce_max_f32s,
    |simd: S, bits| {
        let bits = simd.transmute_u32s_f32s(bits);
        simd.transmute_f32s_u32s(simd.wrapping_dyn_shl_u32s(bits, simd.splat_u32s(23)))
    }
);

real!(
    f64,
    f64s,
    as_simd_f64s,
    as_mut_simd_f64s,
    splat_f64s,
    add_f64s,
    sub_f64s,
    mul_f64s,
    mul_add_e_f64s,
    max_f64s,
    less_than_f64s,
    equal_f64s,
    select_f64s,
    reduce_sum_f64s,
    reduce_max_f64s,
    |_: S, mut bits: S::f64s| {
        // pulp has no shift of 64 bits.
        for bits in bytemuck::cast_slice_mut::<_, u64>(slice::from_mut(&mut bits)) {
            *bits <<= 52;
        }
        bits
    }
);

/// How many vectors are worked on at a time, so that their constants are loaded once.
pub(super) const PACK: usize = 4;

/// A dtype that is read and written some vectors of the arithmetic at a time, in whatever order.
pub(super) trait Packed: Sized {
    type Real: Real;
    /// As many numbers as fill [`PACK`] vectors of the arithmetic.
    type Pack<S: Simd>: Copy;

    /// The whole packs among the values.
    fn as_packs<S: Simd>(values: &[Self]) -> &[Self::Pack<S>];
    fn unpack<S: Simd>(simd: S, pack: Self::Pack<S>) -> [<Self::Real as Real>::Vector<S>; PACK];
    /// Rounds to the nearest. The order is that of `unpack`.
    fn pack<S: Simd>(simd: S, vectors: [<Self::Real as Real>::Vector<S>; PACK]) -> Self::Pack<S>;
    fn as_values<S: Simd>(pack: &Self::Pack<S>) -> &[Self];
}

/// A bf16 is the upper half of an f32. So a lane of 32 bits holds two of them, and a vector of such lanes
/// splits into the lower and the upper ones without moving anything from lane to lane.
impl Packed for bf16 {
    type Real = f32;
    type Pack<S: Simd> = [S::u16s; 2];

    #[inline(always)]
    fn as_packs<S: Simd>(values: &[Self]) -> &[[S::u16s; 2]] {
        S::as_simd_u16s(values.reinterpret_cast()).0.as_chunks().0
    }
    #[inline(always)]
    fn unpack<S: Simd>(simd: S, [a, b]: [S::u16s; 2]) -> [S::f32s; PACK] {
        let ([a, b], [c, d]) = (halves(simd, a), halves(simd, b));
        [a, b, c, d]
    }
    #[inline(always)]
    fn pack<S: Simd>(simd: S, [a, b, c, d]: [S::f32s; PACK]) -> [S::u16s; 2] {
        [whole(simd, a, b), whole(simd, c, d)]
    }
    #[inline(always)]
    fn as_values<S: Simd>(pack: &[S::u16s; 2]) -> &[Self] {
        bytemuck::cast_slice::<_, u16>(pack).reinterpret_cast()
    }
}

/// The lower and the upper numbers of the lanes.
#[inline(always)]
fn halves<S: Simd>(simd: S, pairs: S::u16s) -> [S::f32s; 2] {
    let pairs: S::u32s = bytemuck::cast(pairs);
    let lower = simd.wrapping_dyn_shl_u32s(pairs, simd.splat_u32s(16));
    let upper = simd.and_u32s(pairs, simd.splat_u32s(0xffff_0000));
    [simd.transmute_f32s_u32s(lower), simd.transmute_f32s_u32s(upper)]
}

/// The other way round, rounded.
#[inline(always)]
fn whole<S: Simd>(simd: S, lower: S::f32s, upper: S::f32s) -> S::u16s {
    let (lower, upper) = (rounded_to_bf16(simd, lower), rounded_to_bf16(simd, upper));
    let lower = simd.wrapping_dyn_shr_u32s(lower, simd.splat_u32s(16));
    let upper = simd.and_u32s(upper, simd.splat_u32s(0xffff_0000));
    bytemuck::cast(simd.or_u32s(lower, upper))
}

/// The nearest bf16 of each number in its lane's upper half; the lower half is any.
#[inline(always)]
fn rounded_to_bf16<S: Simd>(simd: S, value: S::f32s) -> S::u32s {
    let bits = simd.transmute_u32s_f32s(value);
    // Half of the last place that stays, less one if that place is even: ties go to even.
    let last = simd.wrapping_dyn_shr_u32s(bits, simd.splat_u32s(16));
    let odd = simd.and_u32s(last, simd.splat_u32s(1));
    let rounded = simd.add_u32s(bits, simd.add_u32s(odd, simd.splat_u32s(0x7fff)));
    let is_number = simd.equal_f32s(value, value);
    simd.select_u32s(is_number, rounded, simd.splat_u32s(0x7fc0_0000))
}
