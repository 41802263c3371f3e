//! The choice of an instruction set at run time, among those of [pulp](https://docs.rs/pulp).
//!
//! pulp compiles an operation ([`WithSimd`]) for each instruction set. A function that handles vectors must be
//! `#[inline(always)]`. Otherwise it is compiled once, for the baseline processor. The functions that copy strided
//! inputs are compiled so on purpose, to keep the code small.

use pulp::{Arch, Scalar128b, Simd, WithSimd};
use std::any::TypeId;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The instruction set that the tests chose, by its position in [`instruction_sets`].
static CHOSEN: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The instruction sets for which this build has kernels: their names, and `None` if this processor lacks them.
pub(crate) fn instruction_sets() -> Vec<(&'static str, Option<Arch>)> {
    vec![
        #[cfg(target_arch = "x86_64")]
        ("AVX-512", pulp::x86::V4::try_new().map(Arch::V4)),
        #[cfg(target_arch = "x86_64")]
        ("AVX2 and FMA", pulp::x86::V3::try_new().map(Arch::V3)),
        #[cfg(target_arch = "aarch64")]
        ("NEON", pulp::aarch64::Neon::try_new().map(Arch::Neon)),
        #[cfg(target_arch = "wasm32")]
        ("SIMD128", pulp::wasm::Simd128::try_new().map(Arch::Simd128)),
        ("no vectors", Some(Arch::Scalar)),
    ]
}

/// Makes all kernels use this instruction set, for the tests. Returns false and changes nothing if this processor lacks it.
pub(crate) fn choose(name: &str) -> bool {
    let mut sets = instruction_sets().into_iter();
    match sets.position(|(known, arch)| known == name && arch.is_some()) {
        Some(position) => CHOSEN.store(position, Ordering::Relaxed),
        None => return false,
    }
    true
}

/// Runs the operation on the processor's best instruction set.
pub(super) fn dispatch<O: WithSimd>(op: O) -> O::Output {
    let chosen = match CHOSEN.load(Ordering::Relaxed) {
        usize::MAX => None,
        position => instruction_sets().get(position).and_then(|set| set.1),
    };
    match chosen.unwrap_or_else(Arch::new) {
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
