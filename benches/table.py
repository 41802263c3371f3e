"""Prints the results of `cargo bench --bench loss` as Markdown tables.

    python3 benches/table.py [TABLE.md ...]

Each TABLE.md is the output of benches/pytorch.py or benches/burn. Its times are compared with those of the crate, and its
title names the columns. All times are medians.
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent / "target" / "criterion"


def read_results():
    """{(shape and dtype, pass): {implementation: milliseconds}}"""
    results = {}
    for path in ROOT.glob("*/*/new/benchmark.json"):
        names = json.loads(path.read_text())
        shape, dtype, pass_name = names["group_id"].split(" ", 2)
        estimates = json.loads((path.parent / "estimates.json").read_text())
        median = estimates["median"]["point_estimate"] / 1e6
        results.setdefault((f"{shape} {dtype}", pass_name), {})[names["function_id"]] = median
    return results


def read_peer(path):
    """The title of a table, and {shape and dtype: (forward, forward and backward)}."""
    name, rows = None, {}
    for line in pathlib.Path(path).read_text().splitlines():
        if line.startswith("# "):
            name = line[2:].strip()
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and re.match(r"[\dx]+ \w+$", cells[0]):
            rows[cells[0]] = tuple(float(cell) for cell in cells[1:])
    return name or path, rows


def sort_key(name):
    product = 1
    for length in name.split()[0].split("x"):
        product *= int(length)
    return product, name


def number(value):
    return "" if value is None else f"{value:.3g}"


def ratio(a, b):
    return None if a is None or b is None else a / b


def table(title, head, rows):
    print(f"{title}\n")
    print("| " + " | ".join(head) + " |")
    print("| --- " + "| ---: " * (len(head) - 1) + "|")
    for name, *values in rows:
        print("| " + " | ".join([name, *map(number, values)]) + " |")
    print()


def main():
    results = read_results()
    peers = [read_peer(path) for path in sys.argv[1:]]
    names = sorted({name for name, _ in results}, key=sort_key)
    forward = {name: results.get((name, "forward"), {}) for name in names}
    backward = {name: results.get((name, "backward"), {}) for name in names}
    both = {name: results.get((name, "forward and backward"), {}) for name in names}

    implementations = ["fused", "stock ops", "candle-nn"]
    table(
        "Milliseconds",
        ["", *(f"forward: {i}" for i in implementations), *(f"with backward: {i}" for i in implementations)],
        [
            (n, *(forward[n].get(i) for i in implementations), *(both[n].get(i) for i in implementations))
            for n in names
        ],
    )

    def kernels(n):
        parts = forward[n].get("kernel"), backward[n].get("kernel")
        return None if None in parts else sum(parts)

    def least(n):
        parts = kernels(n), both[n].get("candle's zeros and addition")
        return None if None in parts else sum(parts)

    table(
        "Kernels alone, milliseconds and ratios",
        ["", "forward", "to reading", "backward", "to copying", "candle's zeros and addition",
         "fused with backward, to the three"],
        [
            (
                n,
                forward[n].get("kernel"),
                ratio(forward[n].get("kernel"), forward[n].get("read the bytes")),
                backward[n].get("kernel"),
                ratio(backward[n].get("kernel"), backward[n].get("copy the bytes")),
                both[n].get("candle's zeros and addition"),
                ratio(both[n].get("fused"), least(n)),
            )
            for n in names
        ],
    )

    head, rows = ["", "stock ops, forward", "stock ops, with backward"], []
    for name, _ in peers:
        head += [f"{name}, forward", f"{name}, with backward", f"{name}, to our kernels"]
    for n in names:
        row = [n, ratio(forward[n].get("stock ops"), forward[n].get("fused"))]
        row.append(ratio(both[n].get("stock ops"), both[n].get("fused")))
        for _, theirs in peers:
            their_forward, their_both = theirs.get(n, (None, None))
            row.append(ratio(their_forward, forward[n].get("fused")))
            row.append(ratio(their_both, both[n].get("fused")))
            row.append(ratio(their_both, kernels(n)))
        rows.append(row)
    table("How many times as long the others take", head, rows)


main()
