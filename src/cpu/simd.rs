//! The choice of an instruction set at run time, among those of [pulp](https://docs.rs/pulp).
//!
//! pulp compiles an operation ([`WithSimd`]) for each instruction set. A function that handles vectors must be
//! `#[inline(always)]`. Otherwise it is compiled once, for the baseline processor. The functions that copy strided
//! inputs are compiled so on purpose, to keep the code small.

use pulp::{Arch, Scalar128b, Simd, WithSimd};
use std::any::TypeId;

/// Runs the operation on the processor's best instruction set.
pub(super) fn dispatch<O: WithSimd>(op: O) -> O::Output {
    match Arch::new() {
        // Without vectors, arrays of 128 bits: the compiler vectorises them for the target's baseline.
        Arch::Scalar => op.with_simd(Scalar128b),
        arch => arch.dispatch(op),
    }
}

/// Whether a fused multiply-add is one instruction. Elsewhere it would be a function call.
#[inline(always)]
pub(super) fn has_fma<S: Simd>() -> bool {
    let has_vectors = TypeId::of::<S>() != TypeId::of::<Scalar128b>();
    has_vectors && cfg!(any(target_arch = "x86_64", target_arch = "aarch64"))
}
