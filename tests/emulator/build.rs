//! Compiles the GPU's kernels for the CPU, once for each kind of input.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

const LOGITS: [&str; 4] = ["f16", "bf16", "f32", "f64"];
const CLASSES: [&str; 5] = ["u8", "u32", "i16", "i32", "i64"];
const PROBABILITIES: [&str; 5] = ["f8", "f16", "bf16", "f32", "f64"];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut build = cc::Build::new();
    build.cpp(true).std("c++17").include(".").opt_level(1).warnings(false);
    // Products are not to be contracted with sums: the numbers are to be the same everywhere.
    build.flag("-ffp-contract=off").flag("-g1");
    println!("cargo:rerun-if-env-changed=EMULATOR_SANITIZE");
    if env::var_os("EMULATOR_SANITIZE").is_some() {
        build.flag("-fsanitize=address,undefined").flag("-fno-sanitize-recover=all");
        // rustc keeps the linker from adding libraries by itself. This one has to come before libc.
        let asan = Command::new("cc").arg("-print-file-name=libasan.a").output()?.stdout;
        let asan = String::from_utf8(asan)?;
        let whole = format!("-Wl,--whole-archive,{},--no-whole-archive", asan.trim());
        for argument in [&whole, "-lubsan", "-lstdc++", "-lm"] {
            println!("cargo:rustc-link-arg={argument}");
        }
    }

    // What Rust knows of them: a list of the definitions and the function.
    let (mut declared, mut listed) = (String::new(), String::new());
    for logits in LOGITS {
        for targets in CLASSES.iter().chain(&PROBABILITIES) {
            for per_class in [0, 1] {
                let name = format!("kernels_{logits}_{targets}_{per_class}");
                let real = if logits == "f64" { "f64" } else { "f32" };
                let class_targets = u8::from(CLASSES.contains(targets));
                let definitions = format!(
                    "#define LOGITS {logits}\n#define REAL {real}\n#define TARGETS {targets}\n\
                     #define CLASS_TARGETS {class_targets}\n#define PER_CLASS {per_class}\n"
                );
                let file = out.join(format!("{name}.cpp"));
                let source = env::current_dir()?.join("cuda.cpp");
                let source = format!(
                    "{definitions}#define KERNELS {name}\n#include {:?}\n",
                    source.display().to_string()
                );
                fs::write(&file, source)?;
                build.file(file);
                writeln!(
                    declared,
                    "fn {name}(_: *const c_char, _: c_uint, _: c_uint, _: Manner, _: *const *mut c_void, _: *const c_void, _: usize) -> bool;"
                )?;
                writeln!(listed, "({definitions:?}, {name}),")?;
            }
        }
    }
    build.try_compile("kernels")?;
    let count = LOGITS.len() * (CLASSES.len() + PROBABILITIES.len()) * 2;
    let rust = format!(
        "unsafe extern \"C\" {{\n{declared}}}\nconst KERNELS: [(&str, Kernels); {count}] = [\n{listed}];\n"
    );
    fs::write(out.join("kernels.rs"), rust)?;
    println!("cargo:rustc-cfg=emulator");
    for file in ["cuda.cpp", "cuda.hpp", "device.hpp", "../../src/backend/label_smoothing.cu"] {
        println!("cargo:rerun-if-changed={file}");
    }
    Ok(())
}
