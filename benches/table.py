"""Prints the two tables of benches/README.md from the results of `cargo bench --bench loss`.

    python3 benches/table.py [PEER.md ...]

Each PEER.md is the output of benches/pytorch.py or benches/burn, and its title names the columns. All times are medians in
milliseconds. The results of other benchmarks and of shapes that are not in NAMES are ignored.
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent / "target" / "criterion"
NAMES = [
    "32x3 f32",
    "4096x1000 f32",
    "4096x1000 bf16",
    "8x21x256x256 f32",
    "1024x32000 f32",
    "1024x32000 bf16",
    "256x128256 f32",
    "1x128256 f32",
]


def read_time(group, function):
    path = ROOT / group / function / "new" / "estimates.json"
    return json.loads(path.read_text())["median"]["point_estimate"] / 1e6 if path.exists() else None


def read_peer(path):
    """The title of a table, and {shape and dtype: (forward, step)}."""
    text = pathlib.Path(path).read_text()
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    rows = re.findall(r"^\| ([\dx]+ \w+) \| (\S+) \| (\S+) \|$", text, re.MULTILINE)
    return title[1] if title else path, {name: (float(forward), float(step)) for name, forward, step in rows}


def ratio(a, b):
    return a / b if a and b else None


def number(value):
    # The inner format rounds to three digits, the outer one avoids exponents.
    return f"{float(f'{value:.3g}'):g}" if value else ""


def steps(name, peers):
    forward, step = f"{name} forward", f"{name} forward and backward"
    ours = read_time(forward, "fused"), read_time(step, "fused")
    others = [(read_time(forward, "stock ops"), read_time(step, "stock ops"))]
    others += [times.get(name, (None, None)) for _, times in peers]
    return [
        *ours,
        read_time(step, "candle's zeros and addition"),
        read_time(step, "candle-nn"),
        *(ratio(theirs, our) for other in others for theirs, our in zip(other, ours)),
    ]


def kernels(name):
    return [
        ratio(read_time(f"{name} forward", "kernel"), read_time(f"{name} forward", "read the bytes")),
        ratio(read_time(f"{name} backward", "kernel"), read_time(f"{name} backward", "copy the bytes")),
    ]


def print_table(head, row):
    print("| | " + " | ".join(head) + " |")
    print("| --- " + "| ---: " * len(head) + "|")
    for name in NAMES:
        print("| " + " | ".join([name, *map(number, row(name))]) + " |")


def main():
    peers = [read_peer(path) for path in sys.argv[1:]]
    head = ["forward, ms", "step, ms", "zeros and addition, ms", "candle-nn: step, ms"]
    for peer in ["stock ops", *(title for title, _ in peers)]:
        head += [f"{peer}: forward, ×", "step, ×"]
    print_table(head, lambda name: steps(name, peers))
    print()
    print_table(["forward kernel to reading, ×", "backward kernel to copying, ×"], kernels)


main()
