//! The kernels for each of the CPU's instruction sets, by name, at sizes around their block sizes.

mod common;

use candle_core::Result;
use candle_label_smoothing::testing::{choose_instruction_set, instruction_sets};
use common::check_shape;
use std::io::Write;
use std::sync::Mutex;

/// Compares with the reference on this instruction set, or prints that the processor lacks it.
fn check(instruction_set: &str) -> Result<()> {
    // The choice holds for all threads.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if !choose_instruction_set(instruction_set) {
        // The test harness captures `eprintln!` of passing tests.
        let _ = writeln!(std::io::stderr(), "skipped: this processor lacks {instruction_set}");
        return Ok(());
    }
    for classes in (1..=17).chain([33, 64, 129, 257, 300, 16_385]) {
        check_shape(&[3, classes], 1, classes as u64)?;
    }
    for rows in [127, 257] {
        check_shape(&[rows, 3], 1, rows as u64)?;
    }
    for inner_size in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 65, 129] {
        check_shape(&[2, 5, inner_size], 1, inner_size as u64)?;
    }
    check_shape(&[2, 33, 7], 1, 1)?;
    check_shape(&[2, 129, 7], 1, 2)?;
    check_shape(&[1, 2, 20_000], 1, 3)
}

#[test]
#[cfg(target_arch = "x86_64")]
fn avx512() -> Result<()> {
    check("AVX-512")
}

#[test]
#[cfg(target_arch = "x86_64")]
fn avx2_and_fma() -> Result<()> {
    check("AVX2 and FMA")
}

#[test]
#[cfg(target_arch = "aarch64")]
fn neon() -> Result<()> {
    check("NEON")
}

#[test]
#[cfg(target_arch = "wasm32")]
fn simd128() -> Result<()> {
    check("SIMD128")
}

#[test]
fn no_vectors() -> Result<()> {
    check("no vectors")
}

/// Fails if a set without a test is added.
#[test]
fn every_instruction_set_has_a_test() {
    let tested = ["AVX-512", "AVX2 and FMA", "NEON", "SIMD128", "no vectors"];
    for name in instruction_sets() {
        assert!(tested.contains(&name), "{name} has no test");
    }
    assert!(!choose_instruction_set("unknown"));
}
