"""Compiles the CUDA kernels to machine code for several architectures and every kind of input, without a GPU.

    python3 compile.py FOLDER_OF_NVRTC [SOURCE]

The folder holds libnvrtc.so.* and is in LD_LIBRARY_PATH. Fails if the compiler has anything to say, or a kernel needs more
registers than there are.
"""

import concurrent.futures
import ctypes
import glob
import sys

ARCHITECTURES = [75, 80, 90]
LOGITS = ["f16", "bf16", "f32", "f64"]
CLASSES = ["u8", "u32", "i16", "i32", "i64"]
PROBABILITIES = ["f8", "f16", "bf16", "f32", "f64"]


def definitions(logits, targets, per_class):
    values = {
        "LOGITS": logits,
        "REAL": "f64" if logits == "f64" else "f32",
        "TARGETS": targets,
        "CLASS_TARGETS": int(targets in CLASSES),
        "PER_CLASS": per_class,
    }
    return "".join(f"#define {name} {value}\n" for name, value in values.items())


def compile(library, source, architecture):
    """What the compiler says, and whether it succeeded."""
    nvrtc, program, size = ctypes.CDLL(library), ctypes.c_void_p(), ctypes.c_size_t()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"label_smoothing.cu", 0, None, None):
        return "no program", False
    options = [f"--gpu-architecture=sm_{architecture}".encode(), b"--std=c++17"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode().strip(), not failed and size.value > 0


def main(folder, path="src/backend/label_smoothing.cu"):
    with open(path) as file:
        source = file.read()
    (library,) = glob.glob(f"{folder}/libnvrtc.so.*")
    kinds = [(l, t, c) for l in LOGITS for t in CLASSES + PROBABILITIES for c in [0, 1]]
    jobs = [(kind, architecture) for kind in kinds for architecture in ARCHITECTURES]
    wrong = 0
    with concurrent.futures.ProcessPoolExecutor() as pool:
        results = [pool.submit(compile, library, definitions(*kind) + source, a) for kind, a in jobs]
        for (kind, architecture), result in zip(jobs, results):
            log, compiled = result.result()
            if log or not compiled:
                wrong += 1
                print(f"{kind} for sm_{architecture}: {log or 'failed'}")
    print(f"{len(jobs) - wrong} of {len(jobs)} compiled")
    return wrong > 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
