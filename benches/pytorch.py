"""Times PyTorch's cross_entropy with label smoothing on the CPU, on the shapes of benches/loss.rs.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python3 benches/pytorch.py > pytorch.md

Prints a table of medians in milliseconds. PyTorch uses as many threads as the process may have processors.

The two variables make glibc keep freed memory, as mimalloc does for the crate's benchmarks. Preloading mimalloc helped
PyTorch less, since mimalloc returns the largest blocks to the system.
"""

import os
import statistics
import time

import torch
from torch.nn.functional import cross_entropy

SHAPES = [
    (32, 3),
    (128, 10),
    (4096, 1000),
    (1024, 32_000),
    (256, 128_256),
    (1, 128_256),
    (8, 21, 256, 256),
]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def median(run, seconds=2.0):
    run()
    times, end = [], time.perf_counter() + seconds
    while len(times) < 7 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main():
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"# PyTorch {torch.__version__.split('+')[0]}\n")
    print("| | forward | forward and backward |\n| --- | ---: | ---: |")
    for shape in SHAPES:
        for name, dtype in DTYPES.items():
            logits = (torch.rand(shape) * 16 - 8).to(dtype).requires_grad_()
            rows = shape[:1] + shape[2:]
            targets = torch.randint(0, shape[1], rows)

            def forward():
                return cross_entropy(logits, targets, label_smoothing=0.1)

            def both():
                logits.grad = None
                forward().backward()

            dims = "x".join(map(str, shape))
            print(f"| {dims} {name} | {median(forward):.4g} | {median(both):.4g} |", flush=True)


main()
