"""Finds the fastest constants and launches of the CUDA kernels on a GPU, for src/gpu/{cuda.cu,kernels.inc,cuda.rs,params.rs}.

    python3 tune.py LIBRARY [--seconds 120] [--json FILE] [--compile-only]

LIBRARY is libnvrtc.so.13. PyTorch must be installed. For each shape, the program starts from what the crate does. It changes one thing at a
time and keeps what is faster: the number of packs that a thread loads at once, the threads of a block, the registers that are left to it,
the threads of a row, the number of blocks in a launch, and the cache hints of loads and stores. In the end it times the crate's plan and
the best ones again, in turn. Each variant's first result is compared with PyTorch's in float64, on memory that was filled with NaN.

GB/s count the logits: once in forward, which reduces the losses and saves what backward needs, and twice in backward and in the copy. A time
is the median of samples of many launches, queued while the device sleeps. The launches take several sets of logits in turn, together
larger than the GPU's cache. The crate lets the driver translate PTX, where this program compiles machine code: benches/gpu.rs confirms
a winner. With --compile-only the program compiles some variants, which needs no GPU.
"""

import argparse
import concurrent.futures
import ctypes
import json
import multiprocessing
import os
import re
import statistics
import sys
import time
from typing import NamedTuple

import instructions
from compile import compile, definitions, read_source

SOURCE = read_source(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../src/gpu"))
SIZES = instructions.SIZES
# The most important shapes first, since the time may end.
SHAPES = [("bf16", k) for k in [4096, 1024, 65_536, 256, 16_384, 262_144, 128_256, 50_257]] + [("f32", 1024), ("f32", 65_536)]
LOGITS_BYTES, BYTES_OF_SETS = 1 << 30, 2 << 30
# Some launches have more blocks than the crate's. Their partial sums need room.
MAX_PARTIALS = 1 << 18
SAMPLES, SAMPLE_SECONDS = 5, 2e-3
LOAD_HINTS = ["", "L1::no_allocate", "cs"]
STORE_HINTS = ["", "cs"]
READ = """
extern "C" __global__ void __launch_bounds__(256) read(const uint4 *from, unsigned long long count, unsigned *to) {
  unsigned any = 0;
  unsigned long long step = gridDim.x * 256ull;
  for (unsigned long long i = blockIdx.x * 256ull + threadIdx.x; i < count; i += 4 * step) {
    uint4 packs[4];
#pragma unroll
    for (int u = 0; u < 4; u++) packs[u] = from[i + u * step < count ? i + u * step : i];
#pragma unroll
    for (int u = 0; u < 4; u++) any |= packs[u].x ^ packs[u].y ^ packs[u].z ^ packs[u].w;
  }
  if (any == 0x12345678) *to = any;
}
"""


class Build(NamedTuple):
    """How the kernels are compiled. The hints are suffixes of the instructions for loads and stores."""

    packs: int = 4
    threads: int = 256
    # The least number of blocks that a multiprocessor has room for: MIN_BLOCKS.
    min_blocks: int = 4
    load_hint: str = ""
    store_hint: str = ""


class Plan(NamedTuple):
    """How a kernel is launched. With 0 blocks for each multiprocessor, each task has a block."""

    build: Build
    threads_per_row: int
    blocks_per_multiprocessor: int = 4


THREADS_ON_MULTIPROCESSOR = [1024, 768, 1280, 1536, 512]
PLAIN_BUILDS = [
    Build(packs, threads, on_multiprocessor // threads)
    for threads in [256, 128, 512]
    for packs in [4, 2, 8]
    for on_multiprocessor in THREADS_ON_MULTIPROCESSOR
]
HINTED_BUILDS = [
    Build(packs, 256, min_blocks, load_hint, store_hint)
    for load_hint in LOAD_HINTS
    for store_hint in STORE_HINTS
    for packs, min_blocks in [(4, 4), (4, 5), (2, 6), (8, 3)]
]


def builds():
    """All that are tried, the crate's first."""
    return list(dict.fromkeys([Build(), *PLAIN_BUILDS, *HINTED_BUILDS]))


def text_of(build, dtype):
    """The source, without the kernels that are not timed."""
    text = SOURCE
    replacements = {
        "#define PACKS 4": f"#define PACKS {build.packs}",
        "#define THREADS 256": f"#define THREADS {build.threads}",
        "#define MIN_BLOCKS (sizeof(Real) == 4 ? 4 : 2)": f"#define MIN_BLOCKS {build.min_blocks}",
        "#define MAX_PARTIALS 4096": f"#define MAX_PARTIALS {MAX_PARTIALS}",
    }
    words = "{%0, %1, %2, %3}"
    if build.load_hint:
        outputs = ", ".join(f'"=r"(pack.word[{i}])' for i in range(4))
        load = f'asm volatile("ld.global.{build.load_hint}.v4.u32 {words}, [%4];" : {outputs} : "l"(from))'
        replacements["{ return *(const Pack *)from; }"] = f"{{ Pack pack; {load}; return pack; }}"
    if build.store_hint:
        inputs = ", ".join(f'"r"(pack.word[{i}])' for i in range(4))
        store = f'asm volatile("st.global.{build.store_hint}.v4.u32 [%4], {words};" :: {inputs}, "l"(to) : "memory")'
        replacements["{ *(Pack *)to = pack; }"] = f"{{ {store}; }}"
    for old, new in replacements.items():
        if old not in text:
            raise SystemExit(f"the source has no {old}")
        text = text.replace(old, new)
    for kernel in ["forward_strided", "finish", "backward_strided", "smooth"]:
        text = re.sub(rf"__global__ void __launch_bounds__\(THREADS\) {kernel}\(.*?\n}}\n", "", text, flags=re.S)
    return definitions(dtype, "u32", 0) + text


def compile_text(library, text):
    """In a process of its own: the machine code, or nothing if that fails."""
    log, code = compile(library, text, "sm_90")
    if not code:
        print(log)
    return code


class Failure(Exception):
    """A variant gives a wrong result, or does not run."""


class Gpu:
    """The driver, beside PyTorch."""

    def __init__(self):
        import torch

        torch.zeros(1, device="cuda")
        self.torch, self.driver = torch, ctypes.CDLL("libcuda.so.1")
        properties = torch.cuda.get_device_properties(0)
        self.multiprocessors = properties.multi_processor_count
        print(f"{properties.name}, PyTorch {torch.__version__}; GB/s, in brackets divided by the copy's", flush=True)

    def call(self, function, *arguments):
        if error := getattr(self.driver, function)(*arguments):
            raise Failure(f"{function}: error {error}")

    def load(self, code, kernel):
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), code)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        return function

    def launcher(self, function, blocks, threads, arguments):
        """A function that launches. An argument is a tensor, bytes, a number, or None."""
        held = []
        for argument in arguments:
            if isinstance(argument, bytes):
                held.append(ctypes.create_string_buffer(argument, len(argument)))
            else:
                held.append(ctypes.c_uint64(argument.data_ptr() if hasattr(argument, "data_ptr") else argument or 0))
        pointers = (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        launch = lambda _held=held: self.call("cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, 0, stream, pointers, None)
        return launch

    def seconds(self, calls):
        """The median time of one of these calls, which are made in turn."""
        cuda, turn = self.torch.cuda, 0

        def sample(count, sleep):
            nonlocal turn
            start, end = (cuda.Event(enable_timing=True) for _ in range(2))
            cuda._sleep(sleep)
            start.record()
            for _ in range(count):
                calls[turn % len(calls)]()
                turn += 1
            end.record()
            return start, end

        def elapsed(events):
            events[1].synchronize()
            return events[0].elapsed_time(events[1]) / 1e3

        elapsed(sample(2, 1))
        count = min(max(int(SAMPLE_SECONDS / (elapsed(sample(3, 1)) / 3)), 2), 64)
        samples = [sample(count, 1 << 18) for _ in range(SAMPLES)]
        return statistics.median(map(elapsed, samples)) / count


class Shape:
    """The inputs of a shape, and what is known about it."""

    def __init__(self, gpu, dtype, classes):
        torch = gpu.torch
        self.gpu, self.dtype, self.classes = gpu, dtype, classes
        self.rows = -(-LOGITS_BYTES // (classes * SIZES[dtype]))
        self.bytes = self.rows * classes * SIZES[dtype]
        torch_dtype = {"bf16": torch.bfloat16, "f32": torch.float32}[dtype]
        shape = (self.rows, classes)
        self.sets = [torch.randn(shape, device="cuda", dtype=torch_dtype) * 3 for _ in range(max(2, BYTES_OF_SETS // self.bytes))]
        self.gradients = [torch.empty_like(logits) for logits in self.sets]
        self.labels = (torch.arange(self.rows, device="cuda") * 7919 % classes).to(torch.int32)
        self.saved = [torch.zeros(1 + 3 * self.rows, device="cuda") for _ in self.sets]
        self.out = torch.zeros(1, device="cuda")
        self.grad_output, self.scratch = torch.ones(1, device="cuda"), torch.zeros(4 + 4 * MAX_PARTIALS, device="cuda")
        self.loss, self.some_rows, self.gradient = self.expected()
        pairs = list(zip(self.sets, self.gradients))
        self.copy = 2 * self.bytes / gpu.seconds([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]) / 1e9

    def expected(self):
        """PyTorch's loss, and its gradient of some rows, in float64."""
        torch, loss, step = self.gpu.torch, 0, max(1, (1 << 25) // self.classes)
        cross_entropy = lambda x, y: torch.nn.functional.cross_entropy(x, y, label_smoothing=0.1, reduction="sum") / self.rows
        for start in range(0, self.rows, step):
            logits, labels = self.sets[0][start:][:step].double(), self.labels[start:][:step].long()
            loss += cross_entropy(logits, labels).item()
        logits = self.sets[0][:step].double().requires_grad_()
        cross_entropy(logits, self.labels[:step].long()).backward()
        return loss, step, logits.grad

    def params(self, plan, tasks):
        fields = instructions.params(self.classes, self.rows, plan.threads_per_row, tasks)
        fields.update(saved_start=1, divisor_start=0)
        return instructions.packed(SOURCE, "Params", fields)

    def check(self, kernel, launch):
        """Compares the results of the first set."""
        self.out.fill_(float("nan"))
        if kernel == "backward":
            self.gradients[0].fill_(float("nan"))
        launch()
        if kernel == "forward":
            error, most = abs(self.out.item() - self.loss) / abs(self.loss), 2e-6
        else:
            gradient = self.gradients[0]
            difference = gradient[: self.some_rows].double() - self.gradient
            error, most = (difference.norm() / self.gradient.norm()).item(), {"bf16": 3e-3, "f32": 1e-5}[self.dtype]
            if gradient.isnan().any().item():
                error = float("nan")
        if not error <= most:
            raise Failure(f"the result has an error of {error}")

    def launches(self, kernel, plan, function):
        """A launch for each set of logits, of which the first has been checked."""
        build = plan.build
        tasks = -(-self.rows // (build.threads // plan.threads_per_row))
        max_blocks = min(tasks, plan.blocks_per_multiprocessor * self.gpu.multiprocessors or tasks, MAX_PARTIALS)
        blocks = -(-tasks // -(-tasks // max_blocks))
        params, launches = self.params(plan, tasks), []
        for logits, saved, gradient in zip(self.sets, self.saved, self.gradients):
            arguments = [logits, self.labels, None, None]
            if kernel == "forward":
                arguments += [None, self.out, saved, None, None, self.scratch, params]
            else:
                arguments += [self.grad_output, saved, gradient, params]
            launches.append(self.gpu.launcher(function, blocks, build.threads, arguments))
        self.check(kernel, launches[0])
        return launches

    def bandwidth(self, kernel, launches):
        """GB/s."""
        return (1 if kernel == "forward" else 2) * self.bytes / self.gpu.seconds(launches) / 1e9


def steps():
    """Functions from the best plan so far to lists of plans that differ from it in one respect."""
    grids = lambda build: [number * 256 // build.threads for number in [3, 4, 5, 6, 8, 16, 0]]
    by_grid = lambda plan: [plan._replace(blocks_per_multiprocessor=blocks) for blocks in grids(plan.build)]
    by_row = lambda plan: [
        plan._replace(threads_per_row=threads, blocks_per_multiprocessor=blocks)
        for threads in [plan.threads_per_row * by // 4 for by in [1, 2, 8, 16]]
        for blocks in {plan.blocks_per_multiprocessor, 0}
    ]
    by_build = lambda plan, builds: [
        Plan(build, min(plan.threads_per_row, build.threads), blocks)
        for build in builds
        for blocks in {plan.blocks_per_multiprocessor * plan.build.threads // build.threads, 0}
    ]
    return [
        by_grid,
        by_row,
        lambda plan: by_build(plan, [build for build in PLAIN_BUILDS if build.threads == 256]),
        lambda plan: by_build(plan, HINTED_BUILDS),
        lambda plan: by_build(plan, [build for build in PLAIN_BUILDS if build.threads != 256]),
        by_row,
        by_grid,
    ]


def search(shape, kernel, codes, seconds):
    """Prints the best plans, and returns all, with their GB/s."""
    end, known, functions, launches_of = time.monotonic() + seconds, {}, {}, {}
    size, multiprocessors = SIZES[shape.dtype], shape.gpu.multiprocessors
    crate = best = Plan(Build(), instructions.threads_per_row(shape.classes, size, shape.rows, multiprocessors))

    def bandwidth(plan):
        build = plan.build
        if plan in known:
            return known[plan]
        if not 1 <= plan.threads_per_row <= build.threads or not codes.get((build, shape.dtype)):
            return 0
        try:
            if build not in functions:
                functions[build] = shape.gpu.load(codes[build, shape.dtype], kernel)
            launches_of[plan] = shape.launches(kernel, plan, functions[build])
            known[plan] = shape.bandwidth(kernel, launches_of[plan])
        except Failure as failure:
            print(f"{kernel} {shape.dtype} {shape.classes}: {plan}: {failure}", flush=True)
            if plan == crate:
                raise
            known[plan] = 0
        return known[plan]

    bandwidth(crate)
    for step in steps():
        for plan in step(best):
            if time.monotonic() < end and bandwidth(plan) > known[best]:
                best = plan
    # The largest of many noisy figures is too large, so the best plans are timed again.
    finalists = sorted(filter(known.get, known), key=known.get, reverse=True)[:5]
    finalists += [crate] * (crate not in finalists)
    again = {plan: [] for plan in finalists}
    for _ in range(5):
        for plan in finalists:
            again[plan].append(shape.bandwidth(kernel, launches_of[plan]))
    print(f"{kernel} {shape.dtype} {shape.rows}x{shape.classes}: copy {shape.copy:.0f}, {len(known)} plans")
    for plan in sorted(finalists, key=lambda plan: -statistics.median(again[plan])):
        speed = statistics.median(again[plan])
        spread = f"from {min(again[plan]):.0f} to {max(again[plan]):.0f}"
        print(f"  {speed:.0f} ({speed / shape.copy:.2f}), {spread}: {'the crate: ' if plan == crate else ''}{plan}", flush=True)
    fields = lambda plan: {**plan._asdict(), "build": plan.build._asdict()}
    about = {"kernel": kernel, "dtype": shape.dtype, "rows": shape.rows, "classes": shape.classes, "copy": shape.copy}
    return [{**about, **fields(plan), "GB/s": speed, "again": again.get(plan, [])} for plan, speed in known.items()]


def print_reading(shape, code):
    """What reading alone reaches, by the number of blocks on a multiprocessor."""
    function = shape.gpu.load(code, "read")
    cells = []
    for blocks in [4, 8, 16, 64]:
        grid = blocks * shape.gpu.multiprocessors
        launches = [shape.gpu.launcher(function, grid, 256, [logits, shape.bytes // 16, shape.out]) for logits in shape.sets]
        cells.append(f"{shape.bytes / shape.gpu.seconds(launches) / 1e9:.0f} with {blocks} blocks")
    print("reading alone:", ", ".join(cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("library", metavar="LIBRARY")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--json", metavar="FILE", help="gets all that was measured")
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    if options.compile_only:
        some = [(Build(2, 128, 8), "bf16"), (Build(8, 512, 2), "f32"), *((build, "bf16") for build in HINTED_BUILDS[::5])]
        return not all([compile_text(options.library, text) for text in [READ, *(text_of(*job) for job in some)]])
    jobs = [(build, dtype) for build in builds() for dtype in SIZES]
    texts = [text_of(*job) for job in jobs] + [READ]
    # The processes start before this one opens the GPU.
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        compiled = list(pool.map(compile_text, [options.library] * len(texts), texts))
    codes = dict(zip(jobs, compiled))
    gpu, end, results = Gpu(), time.monotonic() + options.seconds, []
    for i, (dtype, classes) in enumerate(SHAPES):
        shape = None  # frees the memory of the last one
        shape = Shape(gpu, dtype, classes)
        if i == 0:
            print_reading(shape, compiled[-1])
        for kernel in ["forward", "backward"]:
            left = (end - time.monotonic()) / (2 * (len(SHAPES) - i))
            results += search(shape, kernel, codes, max(left, 0.5))
            if options.json:
                with open(options.json, "w") as file:
                    json.dump(results, file)


if __name__ == "__main__":
    sys.exit(main())
