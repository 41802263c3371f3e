//! Code compiled for each instruction set, and the choice between them at run time. The instruction sets are
//! [pulp](https://docs.rs/pulp)'s.

use pulp::{Arch, Scalar, Scalar128b, Simd, WithSimd};
use std::any::TypeId;

/// An operation that is compiled for each instruction set.
///
/// All that it calls must be `#[inline(always)]`. Otherwise the callee is compiled for the baseline processor.
pub(super) trait SimdOp {
    type Output;
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs the operation on the processor's best instruction set.
pub(super) fn dispatch<O: SimdOp>(op: O) -> O::Output {
    Arch::new().dispatch(Dispatch(op))
}

struct Dispatch<O>(O);

impl<O: SimdOp> WithSimd for Dispatch<O> {
    type Output = O::Output;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> O::Output {
        // Without vectors, arrays of 128 bits: the compiler vectorises them for the target's baseline.
        match TypeId::of::<S>() == TypeId::of::<Scalar>() {
            true => self.0.run(Scalar128b),
            false => self.0.run(simd),
        }
    }
}

/// Whether a fused multiply-add is one instruction. Elsewhere it would be a function call.
#[inline(always)]
pub(super) fn has_fma<S: Simd>() -> bool {
    let has_vectors = TypeId::of::<S>() != TypeId::of::<Scalar128b>();
    has_vectors && cfg!(any(target_arch = "x86_64", target_arch = "aarch64"))
}
