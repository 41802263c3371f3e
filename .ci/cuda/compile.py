"""Compiles the CUDA kernels with NVRTC for several architectures and every combination of dtypes. Needs no GPU.

    python3 compile.py FOLDER_OF_NVRTC [FOLDER_OF_SOURCES]

FOLDER_OF_NVRTC holds libnvrtc.so.* and libnvrtc-builtins.so.*. Fails if a compilation fails or prints a warning.
"""

import concurrent.futures
import ctypes
import glob
import os
import sys

# All variants are compiled to PTX, as the crate does at run time. Only for half types, the kernels have other text before 80. Some variants
# are compiled to machine code, for Hopper and for Blackwell.
PTX_ARCHITECTURE, OLD_PTX_ARCHITECTURE = "compute_90", "compute_75"
ARCHITECTURES = ["sm_90", "sm_100", "sm_120"]
LOGITS_DTYPES = ["f16", "bf16", "f32", "f64"]
LABEL_DTYPES = ["u8", "u32", "i16", "i32", "i64"]
PROBABILITY_DTYPES = ["f8", "f16", "bf16", "f32", "f64"]
# The options that are set alone, and their sum. A cap comes with a scale.
SINGLE_OPTIONS, ALL_OPTIONS = [1, 3, 4, 8, 16], 31
# The dtypes of logits and targets, whether the class params differ between classes, and the options.
COMPILED_VARIANTS = [("bf16", "u32", 0, 0), ("f16", "bf16", 0, 0), ("f32", "i64", 1, ALL_OPTIONS), ("f64", "f8", 1, 0)]


def definitions(logits, targets, per_class, options=0):
    values = {
        "LOGITS": logits,
        "REAL": "f64" if logits == "f64" else "f32",
        "TARGETS": targets,
        "CLASS_TARGETS": int(targets in LABEL_DTYPES),
        "PER_CLASS": per_class,
        "OPTIONS": options,
    }
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def compile(library, source, architecture, *options):
    """Returns the log of the compiler and the machine code for sm_*, or PTX for compute_*. There is none if it fails."""
    # The compiler looks for this library by name.
    for builtins in glob.glob(os.path.join(os.path.dirname(library), "libnvrtc-builtins.so.*"))[:1]:
        ctypes.CDLL(builtins, ctypes.RTLD_GLOBAL)
    nvrtc, program = ctypes.CDLL(library), ctypes.c_void_p()

    def fetch(what):
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, data)
        return data.raw

    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"cuda.cu", 0, None, None):
        return "NVRTC cannot create a program", b""
    options = [option.encode() for option in (f"--gpu-architecture={architecture}", "--std=c++17", *options)]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    log = fetch("ProgramLog").rstrip(b"\0").decode().strip()
    code = b"" if failed else fetch("CUBIN" if architecture.startswith("sm_") else "PTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log, code


def read_source(folder):
    """Returns the text of the CUDA dialect with the shared text in its place, as the crate puts it together."""
    with open(f"{folder}/cuda.cu") as dialect, open(f"{folder}/kernels.inc") as shared:
        return dialect.read().replace('#include "kernels.inc"', shared.read())


def main(folder, path="src/gpu"):
    source = read_source(path)
    (library,) = glob.glob(f"{folder}/libnvrtc.so.*")
    # Whether the class params differ changes the text in the same way for all dtypes, so it alternates.
    targets_dtypes = LABEL_DTYPES + PROBABILITY_DTYPES
    variants = [(l, t, (i + k) % 2, 0) for i, l in enumerate(LOGITS_DTYPES) for k, t in enumerate(targets_dtypes)]
    with_options = [(l, t, c, ALL_OPTIONS) for l in LOGITS_DTYPES for t, c in [("i64", 0), ("u8", 1), ("f32", 1), ("bf16", 0)]]
    with_options += [("bf16", "u32", 0, option) for option in SINGLE_OPTIONS]
    jobs = [(variant, architecture) for variant in COMPILED_VARIANTS for architecture in ARCHITECTURES]
    jobs += [(variant, PTX_ARCHITECTURE) for variant in variants + with_options]
    jobs += [(variant, OLD_PTX_ARCHITECTURE) for variant in variants if variant[0] in ["f16", "bf16"]]
    failures = 0
    with concurrent.futures.ProcessPoolExecutor() as pool:
        results = [pool.submit(compile, library, definitions(*variant) + source, a) for variant, a in jobs]
        for (variant, architecture), result in zip(jobs, results):
            log, code = result.result()
            if log or not code:
                failures += 1
                print(f"{variant} for {architecture}: {log or 'failed'}")
    print(f"{len(jobs) - failures} of {len(jobs)} compiled")
    return failures > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
