"""What the peers take on a GPU: PyTorch, torch.compile and Liger, on the shapes of benches/gpu.rs.

    pip install torch liger-kernel
    python3 benches/gpu.py

Liger's forward writes the gradient already, in place of the logits, so it gets a fresh copy at each step, whose time is
subtracted. Medians of spans that end with a wait for the device.
"""

import statistics
import time

import torch
import torch.nn.functional as F

CLASSES = [256, 1024, 4096, 16_384, 65_536, 128_256, 262_144]
SMALL = [(32, 3), (128, 10)]
BYTES = 256 << 20
SPANS, SPAN = 15, 0.02


def seconds(f):
    def span(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            f()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    span(3)
    calls = min(10_000, max(3, int(SPAN / (span(3) / 3))))
    return statistics.median(span(calls) for _ in range(SPANS)) / calls


def eager(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def both(loss, logits, labels):
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
        large = [(-(-BYTES // (k * size)), k) for k in CLASSES]
        for rows, classes in SMALL + large:
            torch._dynamo.reset()
            logits = (torch.randn(rows, classes, device="cuda") * 3).to(dtype).requires_grad_()
            labels = torch.arange(rows, device="cuda") * 7919 % classes
            copy = seconds(lambda: logits.detach().clone())
            figures = []
            for loss in [eager, compiled]:
                with torch.no_grad():
                    figures.append(seconds(lambda: loss(logits, labels)))
                figures.append(seconds(both(loss, logits, labels)))
            if liger is not None:
                # A step on a copy that takes the gradient in place, less the copy.
                def step():
                    fresh = logits.detach().clone().requires_grad_()
                    liger(fresh, labels).backward()

                figures.append(seconds(step) - copy)
            bandwidth = 2 * rows * classes * size / copy / 1e9
            name = f"{rows}x{classes} {str(dtype).removeprefix('torch.')}"
            print(f"| {name} | {bandwidth:.0f} | " + " | ".join(f"{1e6 * x:.1f}" for x in figures) + " |")
            del logits, labels
            torch.cuda.empty_cache()


main()
