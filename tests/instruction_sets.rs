//! The kernels for each of the CPU's instruction sets, by name, at sizes around their block sizes.

mod common;

use candle_core::Result;
use candle_label_smoothing::testing::{choose_instruction_set, instruction_sets};
use common::check_shape;
use std::io::Write;
use std::sync::{Mutex, MutexGuard};

/// The choice of an instruction set holds for all threads.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static CHOICE: Mutex<()> = Mutex::new(());
    CHOICE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Compares with the reference on this instruction set, or prints that the processor lacks it.
fn check(instruction_set: &str) -> Result<()> {
    let _guard = one_at_a_time();
    if !choose_instruction_set(instruction_set) {
        // Set by the checks of processors that are known to have it.
        assert_ne!(option_env!("REQUIRED_INSTRUCTION_SET"), Some(instruction_set));
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

/// Vectors add in another order and round a multiply-add once, so the last bits show which kernels have run.
#[test]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn chosen_instruction_set_is_used() -> Result<()> {
    use candle_label_smoothing::Smoothing;
    use common::{random, random_labels, unreduced, values};

    let _guard = one_at_a_time();
    let logits = random(&[64, 1000], 6., 1)?.to_dtype(candle_core::DType::F32)?;
    let labels = random_labels(&[64], 1000, 2)?;
    let loss = unreduced(Smoothing::over_all(0.1)?);
    let mut results = Vec::new();
    for name in instruction_sets() {
        if choose_instruction_set(name) {
            results.push(values(&loss.forward(&logits, &labels)?)?);
        }
    }
    for (i, result) in results.iter().enumerate() {
        assert!(!results[..i].contains(result), "two instruction sets give the same bits");
    }
    Ok(())
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
