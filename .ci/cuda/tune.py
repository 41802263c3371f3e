"""Finds the fastest constants and launches of the CUDA kernels on a GPU, for src/gpu/cuda.cu, kernels.inc and params.rs.

    python3 tune.py LIBRARY [--seconds 120] [--json FILE] [--compile-only]

LIBRARY is libnvrtc.so.13. PyTorch must be installed. For each shape, the program starts from what the crate does. It changes one thing at a
time and keeps what is faster: the number of packs that a thread loads at once, the threads and the blocks of a multiprocessor, the threads
of a row, the number of blocks in a launch, and the cache hints of loads and stores. The first result of each variant is compared with
PyTorch's in float64, on memory that was filled with NaN.

GB/s count the logits: once in forward, which reduces the losses and saves what backward needs, and twice in backward and in the copy. A time
is the median of samples of many launches, queued while the device sleeps. The launches take several sets of logits in turn, together
larger than the GPU's cache. With --compile-only the program compiles a variant that changes all that can be changed, which needs no GPU.
"""

import argparse
import concurrent.futures
import ctypes
import glob
import json
import multiprocessing
import os
import re
import statistics
import time
from typing import NamedTuple

import instructions
from compile import compile, definitions, read_source

SOURCE = read_source(os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../src/gpu"))
SIZES = instructions.SIZES
# The most important shapes first, since the time may end.
SHAPES = [("bf16", k) for k in [4096, 1024, 65_536, 256, 16_384, 262_144, 128_256, 50_257]] + [("f32", 1024), ("f32", 65_536)]
LOGITS_BYTES, BYTES_OF_SETS = 1 << 30, 2 << 30
# More blocks than the crate launches must find room for their partial sums.
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
    """How the kernels are compiled."""

    packs: int = 4
    threads: int = 256
    # What __launch_bounds__ asks for.
    blocks: int = 4
    load: str = ""
    store: str = ""


class Plan(NamedTuple):
    """How a kernel is launched. `waves` is the number of blocks by that of blocks that fit the device, or 0 for a block a task."""

    build: Build
    threads_per_row: int
    waves: int = 1


def builds():
    """All that are tried, the crate's first."""
    rooms = [1024, 768, 1280, 1536, 512]  # threads on a multiprocessor
    some = [Build()] + [Build(p, t, room // t) for t in [256, 128, 512] for p in [4, 2, 8] for room in rooms]
    hints = [Build(p, 256, b, load, store) for load in LOAD_HINTS for store in STORE_HINTS for p, b in [(4, 4), (4, 5), (2, 6), (8, 3)]]
    return list(dict.fromkeys(some + hints))


def text_of(build, dtype):
    """The source, without the kernels that are not timed."""
    text = SOURCE
    changes = {
        "#define PACKS 4": f"#define PACKS {build.packs}",
        "#define THREADS 256": f"#define THREADS {build.threads}",
        "#define MIN_BLOCKS (sizeof(Real) == 4 ? 4 : 2)": f"#define MIN_BLOCKS {build.blocks}",
        "#define MAX_PARTIALS 4096": f"#define MAX_PARTIALS {MAX_PARTIALS}",
    }
    words = "{%0, %1, %2, %3}"
    if build.load:
        outputs = ", ".join(f'"=r"(pack.word[{i}])' for i in range(4))
        load = f'asm volatile("ld.global.{build.load}.v4.u32 {words}, [%4];" : {outputs} : "l"(from))'
        changes["{ return *(const Pack *)from; }"] = f"{{ Pack pack; {load}; return pack; }}"
    if build.store:
        inputs = ", ".join(f'"r"(pack.word[{i}])' for i in range(4))
        store = f'asm volatile("st.global.{build.store}.v4.u32 [%4], {words};" :: {inputs}, "l"(to) : "memory")'
        changes["{ *(Pack *)to = pack; }"] = f"{{ {store}; }}"
    for old, new in changes.items():
        if old not in text:
            raise SystemExit(f"the source has no {old}")
        text = text.replace(old, new)
    for kernel in ["forward_strided", "finish", "backward_strided", "smooth"]:
        text = re.sub(rf"__global__ void __launch_bounds__\(THREADS\) {kernel}\(.*?\n}}\n", "", text, flags=re.S)
    return definitions(dtype, "u32", 0) + text


def compile_text(library, text):
    """In a process of its own: the machine code."""
    for builtins in glob.glob(os.path.join(os.path.dirname(library), "libnvrtc-builtins.so.13*"))[:1]:
        ctypes.CDLL(builtins, ctypes.RTLD_GLOBAL)
    log, code = compile(library, text, "sm_90")
    if not code:
        raise SystemExit(log)
    return code


class Gpu:
    """The driver, beside PyTorch."""

    def __init__(self):
        import torch

        torch.zeros(1, device="cuda")
        self.torch, self.driver = torch, ctypes.CDLL("libcuda.so.1")
        properties = torch.cuda.get_device_properties(0)
        self.multiprocessors = properties.multi_processor_count
        print(f"{properties.name}, PyTorch {torch.__version__}; GB/s, and by the copy's", flush=True)

    def call(self, function, *arguments):
        if error := getattr(self.driver, function)(*arguments):
            raise SystemExit(f"{function}: error {error}")

    def load(self, code, kernel, threads):
        """A kernel, and the number of its blocks that fit the device."""
        module, function, blocks = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        self.call("cuModuleLoadData", ctypes.byref(module), code)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        self.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(blocks), function, threads, ctypes.c_size_t(0))
        return function, blocks.value * self.multiprocessors

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
        self.out, self.saved = torch.zeros(1, device="cuda"), torch.zeros(1 + 3 * self.rows, device="cuda")
        self.grad_output, self.scratch = torch.ones(1, device="cuda"), torch.zeros(4 + 4 * MAX_PARTIALS, device="cuda")
        pairs = list(zip(self.sets, self.gradients))
        self.copy = 2 * self.bytes / gpu.seconds([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs]) / 1e9
        self.loss, self.some_rows, self.gradient = self.expected()

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

    def check(self, kernel, launch, plan):
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
            raise SystemExit(f"{kernel} {self.dtype} {self.classes}: {plan} has an error of {error}")

    def bandwidth(self, kernel, plan, loaded):
        """GB/s of a plan."""
        build = plan.build
        function, room = loaded
        tasks = -(-self.rows // (build.threads // plan.threads_per_row))
        most = min(tasks, plan.waves * room or tasks, MAX_PARTIALS)
        blocks = -(-tasks // -(-tasks // most))
        params, launches = self.params(plan, tasks), []
        for logits, gradient in zip(self.sets, self.gradients):
            shared = [logits, self.labels, None, None]
            forward = [None, self.out, self.saved, None, None, self.scratch]
            arguments = shared + (forward if kernel == "forward" else [self.grad_output, self.saved, gradient]) + [params]
            launches.append(self.gpu.launcher(function, blocks, build.threads, arguments))
        self.check(kernel, launches[0], plan)
        return (1 if kernel == "forward" else 2) * self.bytes / self.gpu.seconds(launches) / 1e9


def changes(plan):
    """Lists of plans that differ from a plan in one respect."""
    build, threads = plan.build, plan.threads_per_row
    yield [plan._replace(waves=waves) for waves in [1, 2, 4, 0]]
    yield [plan._replace(threads_per_row=t, waves=w) for t in [threads // 4, threads // 2, threads * 2, threads * 4] for w in {plan.waves, 0}]
    yield [plan._replace(build=Build(p, build.threads, b)) for p in [2, 4, 8] for b in range(2, 7)]
    yield [plan._replace(build=build._replace(load=load, store=store)) for load in LOAD_HINTS for store in STORE_HINTS]
    other = [b for b in builds() if b.threads != build.threads and not b.load + b.store]
    yield [Plan(b, min(threads, b.threads), waves) for b in other for waves in {plan.waves, 0}]
    yield [plan._replace(threads_per_row=t, waves=w) for t in [threads // 2, threads, threads * 2] for w in [1, 2, 4, 0]]


def search(shape, kernel, codes, seconds):
    """Prints the best plans, and returns all, with their GB/s."""
    end, known, loaded = time.monotonic() + seconds, {}, {}

    def bandwidth(plan):
        build = plan.build
        if not 1 <= plan.threads_per_row <= build.threads or (build, shape.dtype) not in codes:
            return 0
        if build not in loaded:
            loaded[build] = shape.gpu.load(codes[build, shape.dtype], kernel, build.threads)
        if plan not in known:
            known[plan] = shape.bandwidth(kernel, plan, loaded[build])
        return known[plan]

    best = crate = Plan(Build(), instructions.threads_per_row(shape.classes, SIZES[shape.dtype]))
    bandwidth(best)
    # A generator of lists sees the best plan at the time.
    for step in range(len(list(changes(best)))):
        for plan in list(changes(best))[step]:
            if time.monotonic() < end and bandwidth(plan) > known[best]:
                best = plan
    cell = lambda plan: f"{known[plan]:.0f} ({known[plan] / shape.copy:.2f})"
    print(f"{kernel} {shape.dtype} {shape.rows}x{shape.classes}: copy {shape.copy:.0f}, crate {cell(crate)}, best {cell(best)} of {len(known)}")
    for plan in sorted(known, key=known.get, reverse=True)[:5]:
        print(f"  {cell(plan)}: {plan}", flush=True)
    return [[kernel, shape.dtype, shape.rows, shape.classes, shape.copy, plan.build, *plan[1:], speed] for plan, speed in known.items()]


def print_reading(shape, code):
    """What reading alone reaches, by the number of blocks on a multiprocessor."""
    function, _ = shape.gpu.load(code, "read", 256)
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
        compile_text(options.library, text_of(Build(2, 128, 8, LOAD_HINTS[-1], STORE_HINTS[-1]), "bf16"))
        return
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
            left = (end - time.monotonic()) / (len(SHAPES) - i)
            results += search(shape, kernel, codes, max(left / 2, 0.5))
        if options.json:
            with open(options.json, "w") as file:
                json.dump(results, file)


if __name__ == "__main__":
    main()
