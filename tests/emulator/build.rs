//! Compiles the GPU's kernels for the CPU, once for each kind of input.

mod faults;

use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const LOGITS: [&str; 4] = ["f16", "bf16", "f32", "f64"];
const CLASSES: [&str; 5] = ["u8", "u32", "i16", "i32", "i64"];
const PROBABILITIES: [&str; 5] = ["f8", "f16", "bf16", "f32", "f64"];

/// The folder with the kernels' sources: the crate's, or a copy with the planted faults if EMULATOR_FAULTS is set.
fn kernel_sources(out: &Path) -> Result<PathBuf, Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=EMULATOR_FAULTS");
    let sources = env::current_dir()?.join("../../src/gpu");
    if env::var_os("EMULATOR_FAULTS").is_none() {
        return Ok(sources);
    }
    println!("cargo:rerun-if-changed=faults.txt");
    let list = fs::read_to_string("faults.txt")?;
    let copies = out.join("faults");
    fs::create_dir_all(&copies)?;
    for file in ["kernels.inc", "cuda.cu", "metal.metal"] {
        let text = fs::read_to_string(sources.join(file))?;
        fs::write(copies.join(file), faults::with_choices(&list, file, &text)?)?;
    }
    Ok(copies)
}

/// Sets the optimizations, and what the sanitizers need.
fn optimize_or_sanitize(build: &mut cc::Build) -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=EMULATOR_SANITIZE");
    let sanitizes = env::var_os("EMULATOR_SANITIZE").is_some();
    // With sanitizers, the compiler's optimizations take longer than they save.
    build.opt_level(if sanitizes { 0 } else { 1 });
    if sanitizes {
        build.flag("-fsanitize=address,undefined").flag("-fno-sanitize-recover=all").flag("-g1");
        // rustc keeps the linker from adding libraries by itself. This one has to come before libc.
        let asan = Command::new("cc").arg("-print-file-name=libasan.a").output()?.stdout;
        let asan = String::from_utf8(asan)?;
        let whole = format!("-Wl,--whole-archive,{},--no-whole-archive", asan.trim());
        for argument in [&whole, "-lubsan", "-lstdc++", "-lm"] {
            println!("cargo:rustc-link-arg={argument}");
        }
    }
    if env::var_os("EMULATOR_FAULTS").is_some() {
        // A misaligned access ends the program, as on a GPU.
        build.flag("-fsanitize=alignment").flag("-fsanitize-undefined-trap-on-error");
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include(".").warnings(false);
    // Products are not to be contracted with sums: the numbers are to be the same everywhere.
    build.flag("-ffp-contract=off");
    optimize_or_sanitize(&mut build)?;
    build.include("metal").include(kernel_sources(&out)?);

    // What Rust knows of them: lists of the definitions and the function.
    let (mut declared, mut lists) = (String::new(), String::new());
    let count = LOGITS.len() * (CLASSES.len() + PROBABILITIES.len()) * 2;
    for (dialect, path) in [("cuda", "cuda.cu"), ("metal", "metal.metal")] {
        println!("cargo:rerun-if-changed=../../src/gpu/{path}");
        let constant = dialect.to_uppercase();
        writeln!(lists, "const {constant}: [(&str, Kernels); {count}] = [")?;
        for logits in LOGITS {
            for targets in CLASSES.iter().chain(&PROBABILITIES) {
                for per_class in [0, 1] {
                    let name = format!("{dialect}_{logits}_{targets}_{per_class}");
                    let real = if logits == "f64" { "f64" } else { "f32" };
                    let class_targets = u8::from(CLASSES.contains(targets));
                    let definitions = format!(
                        "#define LOGITS {logits}\n#define REAL {real}\n#define TARGETS {targets}\n\
                         #define CLASS_TARGETS {class_targets}\n#define PER_CLASS {per_class}\n"
                    );
                    let file = out.join(format!("{name}.cpp"));
                    let source = env::current_dir()?.join(format!("{dialect}.cpp"));
                    let source = source.display().to_string();
                    let text =
                        format!("{definitions}#define KERNELS {name}\n#include {source:?}\n");
                    fs::write(&file, text)?;
                    build.file(file);
                    writeln!(
                        declared,
                        "fn {name}(_: *const c_char, _: c_uint, _: c_uint, _: Manner, _: *const *mut c_void, _: *const c_void, _: usize) -> bool;"
                    )?;
                    writeln!(lists, "({definitions:?}, {name}),")?;
                }
            }
        }
        writeln!(lists, "];")?;
    }
    build.try_compile("kernels")?;
    let rust = format!("unsafe extern \"C\" {{\n{declared}}}\n{lists}");
    fs::write(out.join("kernels.rs"), rust)?;
    println!("cargo:rustc-cfg=emulator");
    println!("cargo:rerun-if-changed=../../src/gpu/kernels.inc");
    for file in ["cuda.cpp", "cuda.hpp", "device.hpp", "entries.hpp", "metal.cpp", "metal"] {
        println!("cargo:rerun-if-changed={file}");
    }
    Ok(())
}
