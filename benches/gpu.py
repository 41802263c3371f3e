"""Times cross-entropy with label smoothing in PyTorch, torch.compile, QuACK and Liger on a GPU, on the shapes of benches/gpu.rs.

    pip install torch liger-kernel quack-kernels packaging
    python3 benches/gpu.py

With arguments such as x4096, it prints the lines whose name contains one of them. The mean reduces the losses. Forward keeps what
backward needs. "With backward" is forward and the gradient of the logits, which is added to nothing.

QuACK has no label smoothing. Liger computes the gradient in forward and overwrites the logits with it. So it comes last, and its
calls take the gradient of the call before as logits.

The calls take several sets of inputs in turn, so that none finds its logits in the GPU's cache. Each result stays in memory
until its set's next turn. A time is the median over samples of many calls, each the time between two CUDA events. The calls are
queued while the device sleeps, so that the times are the device's. Only Liger's are not, as Liger waits for the device in each call.

The second table begins with hidden states. Its calls are not queued ahead, and take one set of inputs. Memory is the peak of a step beyond
the inputs and the gradients of hidden states and weight.
"""

import importlib.metadata
import sys
from collections import deque
from itertools import cycle
from statistics import median

import torch
import torch.nn.functional as F

try:
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerFusedLinearCrossEntropyLoss
except ImportError as error:
    print(error, file=sys.stderr)
    LigerCrossEntropyLoss = None
try:
    from quack.cross_entropy import cross_entropy as quack
except ImportError as error:
    print(error, file=sys.stderr)
    quack = None

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
SMALL = [(32, 3), (128, 10)]
CLASSES = [256, 1024, 4096, 16_384, 65_536, 128_256, 262_144]
MIN_BYTES = 1 << 30
QUACK = [(32_768, k) for k in CLASSES[:5]] + [(16_384, 131_072), (8192, 262_144)]
HEADS = [(8192, 4096, 32_000), (8192, 4096, 151_936)]
MIN_BYTES_OF_SETS, MAX_SETS = 512 << 20, 32
SAMPLES, SAMPLE_SECONDS = 15, 0.02
# The host waits when about a thousand launches are in a stream.
MAX_QUEUED = 64
MAX_SLEEP = 1 << 26


def cases():
    for dtype, torch_dtype in DTYPES.items():
        large = [(-(-MIN_BYTES // (k * torch_dtype.itemsize)), k) for k in CLASSES]
        quack_only = [shape for shape in QUACK if dtype == "bf16" and shape not in large]
        for rows, classes in SMALL + large + quack_only:
            yield f"{rows}x{classes} {dtype}", rows, classes, torch_dtype


def input_sets(rows, classes, dtype):
    num_sets = -(-MIN_BYTES_OF_SETS // (rows * classes * dtype.itemsize))
    for _ in range(min(max(num_sets, 2), MAX_SETS)):
        logits = (torch.randn(rows, classes, device="cuda", dtype=dtype) * 3).requires_grad_()
        yield logits, labels_of(rows, classes)


def seconds(call, sets, ahead=True):
    """The median time of one call. `ahead` queues the calls of a sample before the device starts the first."""
    turns, results = cycle(sets), deque(maxlen=len(sets))
    sleep = 1 << 20  # in cycles

    def queue(calls):
        for _ in range(calls):
            results.append(call(*next(turns)))

    def sample(calls, ahead):
        nonlocal sleep
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if ahead:
                torch.cuda._sleep(sleep)
            start.record()
            queue(calls)
            is_late = ahead and start.query()
            end.record()
            end.synchronize()
            if not is_late or sleep >= MAX_SLEEP:
                if is_late:
                    print("The host, not the device, may limit the next line.", file=sys.stderr)
                return start.elapsed_time(end) / 1e3
            sleep *= 2

    # The first calls compile the kernels and fill the memory pool. The next ones set how many calls a sample has.
    queue(2 * len(sets))
    estimate = sample(3, ahead=False) / 3
    calls = min(max(int(SAMPLE_SECONDS / estimate), 1), MAX_QUEUED)
    return median(sample(calls, ahead) for _ in range(SAMPLES)) / calls


def microseconds(call, sets, ahead=True):
    """A cell of the table. A peer that fails on a shape does not end the run."""
    try:
        return f"{1e6 * seconds(call, sets, ahead):.1f}"
    except Exception as error:
        print(error, file=sys.stderr)
        return "failed"


def with_backward(loss):
    return lambda logits, labels: torch.autograd.grad(loss(logits, labels), logits)


def eager(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def print_line(name, sets):
    compiled = torch.compile(eager, dynamic=False)
    size = sets[0][0].numel() * sets[0][0].element_size()
    copy = seconds(lambda logits, _: logits.detach().clone(), sets)
    cells = [name, f"{2 * size / copy / 1e9:.0f}"]
    for loss in [eager, compiled, quack]:
        calls = [loss, with_backward(loss)]
        cells += [microseconds(call, sets) for call in calls] if loss else ["", ""]
    if LigerCrossEntropyLoss:
        liger = with_backward(LigerCrossEntropyLoss(label_smoothing=0.1))
        cells.append(microseconds(liger, sets, ahead=False))
    else:
        cells.append("")
    print(f"| {' | '.join(cells)} |", flush=True)


def labels_of(rows, classes):
    return torch.arange(rows, device="cuda") * 7919 % classes


def heads(rows, hidden_size, classes):
    """Methods from hidden states, and their inputs."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(rows, hidden_size, **options).requires_grad_()
    weight = (torch.randn(classes, hidden_size, **options) * (3 / hidden_size**0.5)).requires_grad_()
    labels = labels_of(rows, classes)

    def logits_first(hidden, weight):
        return F.cross_entropy(hidden @ weight.t(), labels, label_smoothing=0.1)

    methods = {"PyTorch": logits_first, "torch.compile": torch.compile(logits_first, dynamic=False)}
    if LigerCrossEntropyLoss:
        liger = LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1)
        methods["Liger"] = lambda hidden, weight: liger(weight, hidden, labels)
    return methods, (hidden, weight)


def print_head(name, shape):
    methods, inputs = heads(*shape)
    for method, loss in methods.items():
        step = lambda *inputs: torch.autograd.grad(loss(*inputs), inputs)
        try:
            # Liger computes the gradients in forward.
            forward = "" if method == "Liger" else f"{1e3 * seconds(loss, [inputs], ahead=False):.2f}"
            cells = [forward, f"{1e3 * seconds(step, [inputs], ahead=False):.2f}", f"{peak_gib(step, inputs):.2f}"]
        except Exception as error:
            print(error, file=sys.stderr)
            cells = ["failed", "", ""]
        print(f"| {name} | {method} | {' | '.join(cells)} |", flush=True)


def peak_gib(step, inputs):
    """The most memory in use during a step, beyond the inputs and the gradients, which are as large as the inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = step(*inputs)
    torch.cuda.synchronize()
    size = sum(x.numel() * x.element_size() for x in gradients)
    return (torch.cuda.max_memory_allocated() - before - size) / 2**30


def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main():
    versions = [f"{name} {version(name)}" for name in ["torch", "quack-kernels", "liger-kernel"]]
    print(f"{torch.cuda.get_device_name()}, {', '.join(versions)}; microseconds\n")
    peers = "PyTorch, forward | with backward | torch.compile, forward | with backward | QuACK, forward | with backward"
    print(f"| | copy, GB/s | {peers} | Liger, with backward |\n| --- |{' ---: |' * 8}")
    is_wanted = lambda name: any(filter in name for filter in sys.argv[1:] or [""])
    for name, rows, classes, dtype in cases():
        if is_wanted(name):
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            print_line(name, list(input_sets(rows, classes, dtype)))
    print("\n| from hidden states, bf16 | | forward, ms | with backward | memory, GiB |\n| --- | --- | ---: | ---: | ---: |")
    for shape in HEADS:
        name = f"{'x'.join(map(str, shape))} bf16"
        if is_wanted(name):
            torch._dynamo.reset()
            torch.cuda.empty_cache()
            print_head(name, shape)


main()
