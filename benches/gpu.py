"""Times cross-entropy with label smoothing in PyTorch, torch.compile and Liger on a GPU, on the shapes of benches/gpu.rs.

    pip install torch liger-kernel
    python3 benches/gpu.py

Liger's forward overwrites the logits with their gradient. Each step therefore copies the logits, and the time of the copy
is subtracted. Each time is the median over several samples. A sample times many calls and ends by synchronizing the device.
"""

import statistics
import time

import torch
import torch.nn.functional as F

CLASSES = [256, 1024, 4096, 16_384, 65_536, 128_256, 262_144]
SMALL = [(32, 3), (128, 10)]
MIN_BYTES = 256 << 20
SAMPLES, SAMPLE_SECONDS = 15, 0.02


def seconds(f):
    def sample(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    sample(3)
    calls = min(10_000, max(3, int(SAMPLE_SECONDS / (sample(3) / 3))))
    return statistics.median(sample(calls) for _ in range(SAMPLES)) / calls


def eager(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def forward_and_backward(loss, logits, labels):
    def step():
        logits.grad = None
        loss(logits, labels).backward()

    return step


def main():
    compiled = torch.compile(eager)
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        liger = LigerCrossEntropyLoss(label_smoothing=0.1)
    except ImportError:
        liger = None
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, microseconds\n")
    print("| | copy, GB/s | PyTorch, forward | with backward | compiled, forward | with backward | Liger, with backward |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for dtype in [torch.bfloat16, torch.float32]:
        size = torch.empty((), dtype=dtype).element_size()
        large = [(-(-MIN_BYTES // (k * size)), k) for k in CLASSES]
        for rows, classes in SMALL + large:
            torch._dynamo.reset()
            logits = (torch.randn(rows, classes, device="cuda") * 3).to(dtype).requires_grad_()
            labels = torch.arange(rows, device="cuda") * 7919 % classes
            copy = seconds(lambda: logits.detach().clone())
            times = []
            for loss in [eager, compiled]:
                with torch.no_grad():
                    times.append(seconds(lambda: loss(logits, labels)))
                times.append(seconds(forward_and_backward(loss, logits, labels)))
            if liger is not None:
                def step():
                    fresh = logits.detach().clone().requires_grad_()
                    liger(fresh, labels).backward()

                times.append(seconds(step) - copy)
            bandwidth = 2 * rows * classes * size / copy / 1e9
            name = f"{rows}x{classes} {str(dtype).removeprefix('torch.')}"
            print(f"| {name} | {bandwidth:.0f} | " + " | ".join(f"{1e6 * x:.1f}" for x in times) + " |")
            del logits, labels
            torch.cuda.empty_cache()


main()
