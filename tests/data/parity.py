#!/usr/bin/env python3
"""Makes parity.safetensors, the numbers that tests/parity.rs compares the crate with.

    pip install torch==2.15.0 numpy==2.4.6 safetensors==0.8.0     (any build of torch; the CPU is used)
    python tests/data/parity.py            write parity.safetensors beside this script
    python tests/data/parity.py --check    make everything again and compare it with the file

The tests need only the file. With the versions above the script always writes the same bytes. Another torch or processor may
change the last bits. --check allows this (1e-12) and reports it. Writing keeps the numbers that the file has already, if they
agree so far.

Tables of cases in the file:

    moduleinfo  the case grid of PyTorch's own tests of nn.CrossEntropyLoss (module_inputs_torch_nn_CrossEntropyLoss)
    opinfo      the case grid of its tests of functional.cross_entropy (sample_inputs_cross_entropy)
    torch       further cases that torch can compute: every combination of its options, other class dimensions, more classes
    formula     cases that torch cannot compute: over_others, a prior, a z-loss, and every combination with the other options
    options     row weights, masks of -inf, a scale and a softcap of the logits, and the metrics of the rows

The numbers of the first three tables come from torch.nn.functional.cross_entropy and torch's autograd, in float64. The numbers of
the fourth come from the formula below, by torch's autograd in float64. For every case that torch can compute, the script asserts
that the formula agrees with torch to 1e-12. Without a z-loss, it also asserts that the formula's row losses equal torch's losses
for the smoothed targets as probabilities. The fourth table therefore has a second check. The numbers of the fifth table come from
torch.nn.functional.cross_entropy too, one row at a time, of the classes that are not masked: see by_rows. The metrics are
torch's cross_entropy, argmax, softmax, logsumexp and torch.distributions.Categorical.entropy.

    r_ik   = (1 - e) w_k p_ik + e w_k pi_k        e = epsilon, or epsilon K / (K - 1) over the other classes; pi = 1/K or the prior
    loss_i = v_i (sum_k r_ik (lse_i - x_ik) + z lse_i^2), 0 where the target is the ignored index; v = 1 or the row weights
    mean   = sum_i loss_i / sum_i v_i w_{y_i} over the rows that are not ignored; / sum_i v_i for probabilities

x are the given logits, or cap tanh(scale x / cap), in which -inf stays -inf. In over_unmasked, pi_k is 1/n for the n classes of a
row whose logit is not -inf, and 0 for the others.

Every input is a small multiple of a power of two and is stored in bf16, so it is the same number in f64, f32, f16 and bf16. One
f64 result serves all four, and the tolerances cover only the rounding of the arithmetic and of the result. The logits are from
[-9, 9], as in PyTorch's tables. The tables differ from PyTorch's in two ways. Class weights are positive, because this crate
rejects negative ones. Probability targets are constants, so OpInfo's gradients of the targets are left out.

Sources: PyTorch 2.15 (BSD-3-Clause, https://github.com/pytorch/pytorch), torch/testing/_internal/common_modules.py and
common_methods_invocations.py, for the list of shapes and options of the first two tables. No code, text or data is taken from
them: the inputs are drawn here and the results are computed.
"""

import itertools
import pathlib
import sys

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save

FILE = pathlib.Path(__file__).with_name("parity.safetensors")
SEED = 20260

inputs = {}  # name -> float64 or int64 tensor; shared by the cases
cases = {}  # name -> line of the table, in order
results = {}  # name -> float64 tensor: the loss and the gradient of each case
metrics = {}  # name -> float64 tensor (5, rows): nll, prediction, confidence, entropy and lse of a case's rows
sizes = {}  # name -> float64 tensor: for each number of the loss, then of the gradient, the sum of the absolute values of its terms


# ---- inputs -------------------------------------------------------------------------------------------------------------------


def rng(name):
    """One generator per input, so that a new case does not change the other inputs."""
    return np.random.default_rng([SEED, *name.encode()])


def keep(name, make):
    if name not in inputs:
        value = torch.as_tensor(np.asarray(make(rng(name))))
        if value.is_floating_point():
            value = value.to(torch.float64)
            for dtype in (torch.bfloat16, torch.float16):
                assert torch.equal(value.to(dtype).to(torch.float64), value), f"{name} is not exact in {dtype}"
        inputs[name] = value
    return name


def dims(shape):
    return "x".join(map(str, shape)) or "scalar"


def logits(shape):
    """Multiples of 1/16 in [-9, 9]: eight significant bits, as many as bf16 has."""
    return keep(f"logits/{dims(shape)}", lambda r: r.integers(-144, 145, shape) / 16)


def labels(shape, classes, ignored=None):
    """Class targets. At least one row is not ignored. With several rows and an ignored index, at least one is ignored."""

    def make(r):
        y = r.integers(0, classes, shape)
        flat = y.reshape(-1)
        if ignored is not None and flat.size > 1:
            flat[flat == ignored] = ignored - 1 if ignored > 0 else 0
            flat[1 :: 3] = ignored
        return y

    label = "" if ignored is None else f"/ignoring{ignored}"
    return keep(f"labels/{dims(shape)}/{classes}{label}", make)


def shares(r, rows, classes, unit):
    """Rows of multiples of 1/unit that sum to exactly one, shaped like a softmax: the largest remainders are rounded up."""
    q = r.normal(size=(rows, classes)) * 1.2
    q = np.exp(q) / np.exp(q).sum(1, keepdims=True) * unit
    n = np.floor(q).astype(int)
    for i in range(rows):
        up = np.argsort(n[i] - q[i], kind="stable")[: unit - n[i].sum()]
        n[i, up] += 1
    assert (n.sum(1) == unit).all() and (n < 256).all()
    return n / unit


def unit(classes):
    return 64 if classes < 64 else 1024


def probabilities(shape, dim):
    def make(r):
        last = np.moveaxis(np.empty(shape), dim, -1).shape
        p = shares(r, int(np.prod(last[:-1])), last[-1], unit(last[-1])).reshape(last)
        return np.ascontiguousarray(np.moveaxis(p, -1, dim))

    return keep(f"probabilities/{dims(shape)}/dim{dim}", make)


def free_probabilities(shape):
    """Numbers in [0, 1) that do not sum to one, as in OpInfo. The formula needs no normalisation."""
    return keep(f"unnormalised/{dims(shape)}", lambda r: r.integers(0, 256, shape) / 256)


def weights(classes, zero=False):
    """Class weights in (0, 9]; with `zero`, class 0 has weight 0."""

    def make(r):
        w = r.integers(1, 145, classes) / 16
        if zero:
            w[0] = 0
        return w

    return keep(f"weights/{classes}{'/zero' if zero else ''}", make)


def mask(shape, dim, y):
    """Classes to mask, about a third; never a label."""
    classes = np.arange(shape[dim]).reshape([-1 if i == dim else 1 for i in range(len(shape))])
    return (rng(f"mask/{dims(shape)}").random(shape) < 0.35) & (classes != np.expand_dims(inputs[y].numpy(), dim))


def masked(name, shape, dim, y, value):
    """A copy of an input with `value` where a class is masked."""
    return keep(f"{name}/masked/{y}", lambda _: np.where(mask(shape, dim, y), value, inputs[name].numpy()))


def row_weights(shape):
    """Numbers from 1/16 to 4, and 0 for every third row."""

    def make(r):
        v = r.integers(1, 65, shape) / 16
        v.reshape(-1)[2::3] = 0
        return v

    return keep(f"row_weights/{dims(shape)}", make)


def row_mask(shape):
    return keep(f"row_mask/{dims(shape)}", lambda r: r.permutation(np.arange(int(np.prod(shape))) % 2).reshape(shape))


def prior(classes):
    return keep(f"prior/{classes}", lambda r: shares(r, 1, classes, unit(classes))[0])


def upstream(shape):
    """grad_output for the losses of reduction none, of either sign. The file names it `upstream`."""
    return keep(f"upstream/{dims(shape)}", lambda r: r.integers(-64, 65, shape) / 16)


# ---- torch and the formula --------------------------------------------------------------------------------------------------------


def by_torch(x, y, dim, kind, epsilon, reduction, w, ignore):
    """torch.nn.functional.cross_entropy, with the classes moved to dimension 1 (0 without a batch)."""
    assert kind in ("none", "over_all")
    at = 0 if x.dim() == 1 else 1
    soft = y.is_floating_point()
    options = {} if ignore is None else {"ignore_index": ignore}
    target = y.movedim(dim, at) if soft else y
    return F.cross_entropy(
        x.movedim(dim, at), target, weight=w, reduction=reduction, label_smoothing=epsilon if kind == "over_all" else 0.0, **options
    )


def mapped(x, scale, cap):
    """The scaled and capped logits."""
    x = scale * x
    return x if cap is None else torch.where(x == -torch.inf, x, cap * torch.tanh(x / cap))


def by_rows(x, y, dim, kind, epsilon, reduction, w, ignore, z, v, scale, cap):
    """torch.nn.functional.cross_entropy of each row's classes that are not masked. It has the row weights, the z-loss, the scale and
    the softcap by hand. Returns the loss, and for labels the metrics."""
    x = x.movedim(dim, -1)
    shape, k = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, k)
    soft = y.is_floating_point()
    y = y.movedim(dim, -1).reshape(-1, k) if soft else y.reshape(-1)
    v = torch.ones(len(x), dtype=torch.float64) if v is None else v.reshape(-1).double()
    losses, divisor, measured = [], 0.0, []
    for row, target, weight in zip(x, y, v):
        if weight == 0 or not soft and target == ignore:
            losses.append(torch.zeros((), dtype=torch.float64))
            measured.append(torch.zeros(5, dtype=torch.float64))
            continue
        kept = row.detach() != -torch.inf
        row = mapped(row, scale, cap)
        of_all, n = row, int(kept.sum())
        row, class_weights = row[kept], None if w is None else w[kept]
        assert soft or kept[target]
        target = target[kept] if soft else kept[:target].sum()
        e = {"none": 0.0, "over_others": epsilon * n / max(n - 1, 1)}.get(kind, epsilon)
        loss = F.cross_entropy(row[None], target[None], weight=class_weights, label_smoothing=e, reduction="sum")
        losses.append(weight * (loss + z * torch.logsumexp(row, 0) ** 2))
        divisor += weight if soft or w is None else weight * class_weights[target]
        if not soft:
            with torch.no_grad():
                nll = F.cross_entropy(row[None], target[None])
                entropy = torch.distributions.Categorical(logits=row).entropy()
                probability = torch.softmax(row, 0).max()
                measured.append(torch.stack([nll, of_all.argmax().double(), probability, entropy, torch.logsumexp(row, 0)]))
    losses = torch.stack(losses)
    loss = losses.reshape(shape) if reduction == "none" else losses.sum() / (divisor if reduction == "mean" else 1.0)
    return loss, None if soft else torch.stack(measured, 1)


def by_formula(x, y, dim, kind, epsilon, reduction, w, ignore, pi, z, v=None, scale=1.0, cap=None):
    """The formula of the head comment. Returns loss, size of the loss, gradient and size of the gradient."""
    x = x.movedim(dim, -1)
    shape, k = x.shape[:-1], x.shape[-1]
    x = x.reshape(-1, k)
    is_mapped = cap is not None or scale != 1.0
    unmasked = x.detach() != -torch.inf
    if is_mapped:
        tanh = torch.zeros_like(x) if cap is None else torch.tanh(scale * x.detach() / cap)
        x = mapped(x, scale, cap)
    soft = y.is_floating_point()
    w = torch.ones(k, dtype=torch.float64) if w is None else w
    pi = torch.full((k,), 1 / k, dtype=torch.float64) if pi is None else pi
    if kind == "over_unmasked":
        pi = unmasked.double() / unmasked.sum(-1, keepdim=True)
    e = {"none": 0.0, "over_others": epsilon * k / (k - 1) if k > 1 else None}.get(kind, epsilon)
    if soft:
        p = y.movedim(dim, -1).reshape(-1, k)
        counts = torch.ones(len(x), dtype=torch.bool)
        divisor = torch.tensor(float(len(x)), dtype=torch.float64)
    else:
        y = y.reshape(-1)
        counts = torch.ones(len(x), dtype=torch.bool) if ignore is None else y != ignore
        y = torch.where(counts, y, 0)
        p = F.one_hot(y, k).to(torch.float64)
        divisor = (w[y] * counts).sum()
    if v is not None:
        v = v.reshape(-1).double()
        counts = counts & (v != 0)
        divisor = ((1 if soft else w[y]) * counts * v).sum()
    own, spread = (1 - e) * w * p, e * w * pi
    r = own + spread
    # Subtracting the row's maximum keeps torch's own rounding far below the tolerances of the test.
    top = x.detach().max(-1, keepdim=True).values
    x = x - top
    log_sum = torch.logsumexp(x, -1)
    lse = log_sum + top[:, 0]
    # 0 times infinity is 0.
    rows = torch.where(r == 0, 0.0, r * (log_sum[:, None] - x)).sum(-1)
    rows = torch.where(counts, rows + z * lse**2, 0.0)
    factor = torch.ones(len(x), dtype=torch.float64) if v is None else v
    rows = factor * rows
    divisor = divisor if reduction == "mean" else 1.0
    loss = rows.reshape(shape) if reduction == "none" else rows.sum() / divisor

    # Without a z-loss, the row is torch's cross-entropy with the smoothed targets as probabilities.
    if z == 0.0 and unmasked.all():
        q = (1 - e) * p + e * pi
        other = F.cross_entropy(x, q, weight=w, reduction="none")
        close("rows", rows, factor * torch.where(counts, other, 0.0))

    # The size of a row's loss or gradient is the sum of the absolute values of its terms. Rounding errors are proportional to
    # this size. `+ 1` and `1 +` account for the relative errors of the exponentials and of their sum. A scaled or capped logit is
    # rounded itself, and so is the derivative of tanh, 1 - tanh^2.
    with torch.no_grad():
        terms = own.abs() + spread.abs()
        softmax = torch.exp(x - log_sum[:, None])
        distance = torch.where(terms + softmax == 0, 0.0, log_sum[:, None] - x + 1)
        if is_mapped:
            magnitude = torch.where(unmasked, (x + top).abs(), 0.0)
            distance = distance + magnitude + (softmax * magnitude).sum(-1, keepdim=True)
        size = (terms * distance).sum(-1) + z * (lse**2 + lse.abs())
        size = factor * torch.where(counts, size, 0.0)
        loss_size = size.reshape(shape) if reduction == "none" else size.sum() / divisor
        pull = terms.sum(-1, keepdim=True) + 2 * z * lse.abs()[:, None]
        grad_size = softmax * pull * distance + terms
        grad_size = grad_size if not is_mapped else grad_size * scale * (1 + tanh**2)
        grad_size = factor[:, None] * torch.where(counts[:, None], grad_size, 0.0) / divisor
        grad_size = grad_size.reshape(*shape, k).movedim(-1, dim)
        # The gradient in closed form checks autograd on the formula.
        grad = softmax * (r.sum(-1) + 2 * z * lse)[:, None] - r
        grad = grad if not is_mapped else grad * scale * (1 - tanh**2)
        grad = factor[:, None] * torch.where(counts[:, None], grad, 0.0) / divisor
        grad = grad.reshape(*shape, k).movedim(-1, dim)
    return loss, loss_size, grad, grad_size


def close(what, a, b):
    assert a.shape == b.shape, f"{what}: {a.shape} {b.shape}"
    assert torch.isfinite(a).all() and torch.isfinite(b).all(), f"{what}: not finite"
    assert ((a - b).abs() <= 1e-12 * b.abs().clamp(min=1)).all(), f"{what}: off by {(a - b).abs().max():.3g}"


def case(
    name, x, y, dim, reduction="mean", kind="none", epsilon=0.0, w=None, ignore=None, pi=None, z=0.0, v=None, scale=1.0, cap=None,
    dim_given=True,
):
    """One line of the table and its results. `x`, `y`, `w`, `pi` and `v` are names of inputs."""
    assert name not in cases, name
    get = lambda n: None if n is None else inputs[n]
    value = inputs[x].clone().requires_grad_()
    given = value, inputs[y], dim, kind, epsilon, reduction, get(w), ignore
    loss, loss_size, grad, grad_size = by_formula(*given, get(pi), z, get(v), scale, cap)
    arrives = upstream(loss.shape) if reduction == "none" else None
    if arrives is not None:
        u = inputs[arrives]
        at = (lambda t: t) if u.dim() == 0 else (lambda t: t.unsqueeze(dim))
        grad, grad_size = grad * at(u), grad_size * at(u.abs())
    else:
        u = torch.ones((), dtype=torch.float64)
    (auto,) = torch.autograd.grad(loss, value, u, retain_graph=True)
    close(f"{name}: closed form", grad, auto)
    measured = None
    if not name.startswith("formula/"):
        if name.startswith("options/"):
            stated, measured = by_rows(*given, z, get(v), scale, cap)
        else:
            stated = by_torch(*given)
        (stated_grad,) = torch.autograd.grad(stated, value, u)
        close(f"{name}: loss", loss.detach(), stated.detach())
        close(f"{name}: grad", auto, stated_grad)
        loss, auto = stated, stated_grad
    if measured is not None:
        metrics[f"metrics/{name}"] = measured
    results[f"loss/{name}"] = loss.detach()
    results[f"grad/{name}"] = auto
    sizes[f"size/{name}"] = torch.cat([loss_size.reshape(-1), grad_size.reshape(-1)])
    line = [name, f"logits={x}", f"targets={y}", f"reduction={reduction}", f"smoothing={kind}"]
    line += [f"epsilon={epsilon!r}"] if kind != "none" else []
    line += [f"class_dim={dim}"] if dim_given else []
    named = (("weights", w), ("ignore", ignore), ("prior", pi), ("upstream", arrives))
    line += [f"{key}={value}" for key, value in named if value is not None]
    line += [f"z={z!r}"] if z else []
    line += [f"row_weights={v}"] if v is not None else []
    line += [f"scale={scale!r}"] if scale != 1.0 else []
    line += [f"cap={cap!r}"] if cap is not None else []
    cases[name] = " ".join(line)


# ---- PyTorch's tables -----------------------------------------------------------------------------------------------------------

REDUCTIONS = ("mean", "sum", "none")


def without(shape, dim):
    return tuple(n for i, n in enumerate(shape) if i != dim)


def moduleinfo():
    options = {
        "plain": {},
        "weights": {"w": weights(3)},
        "ignore": {"ignore": 1},
        "smoothing": {"kind": "over_all", "epsilon": 0.15},
        "ignore_smoothing": {"ignore": 1, "kind": "over_all", "epsilon": 0.15},
    }
    hard = {"2d": (2, 3), "3d": (2, 3, 5), "4d": (2, 3, 5, 5), "6d": (2, 3, 5, 5, 2, 2)}
    soft = {"2d": (5, 3), "3d": (5, 3, 4), "4d": (5, 3, 4, 2), "6d": (2, 3, 5, 5, 2, 2)}
    for reduction, (option, given) in itertools.product(REDUCTIONS, options.items()):
        ignored = given.get("ignore")
        given = {"reduction": reduction, **given}
        tail = f"{option}/{reduction}"
        for rank, shape in hard.items():
            y = labels(without(shape, 1), 3, ignored)
            case(f"moduleinfo/{rank}/{tail}", logits(shape), y, 1, **given)
        if ignored is None:
            for rank, shape in soft.items():
                case(f"moduleinfo/{rank}_probabilities/{tail}", logits(shape), probabilities(shape, 1), 1, **given)
            case(f"moduleinfo/unbatched/{tail}", logits((3,)), labels((), 3), 0, **given)


def opinfo():
    small = (2, 3)
    table = {f"shape_{dims(s)}": (s, {}) for s in (small, (2, 3, 1), (2, 3, 1, 2), (2, 3, 1, 2, 3))}
    table |= {r: (small, {"reduction": r}) for r in REDUCTIONS}
    table |= {f"weights_{r}": (small, {"reduction": r, "w": weights(3)}) for r in REDUCTIONS}
    table |= {"ignore": (small, {"ignore": 1})}
    for (name, (shape, given)), soft in itertools.product(table.items(), (False, True)):
        if soft and "ignore" in given:
            continue
        y = free_probabilities(shape) if soft else labels(without(shape, 1), 3, given.get("ignore"))
        case(f"opinfo/{name}/{'probabilities' if soft else 'labels'}", logits(shape), y, 1, **given)


# ---- further tables ---------------------------------------------------------------------------------------------------------------


def every_combination(table, smoothings):
    """Every combination of the options on two small shapes: the classes last, and the classes in the middle.

    One class weight is zero. The ignored index is unset, 1 or -100.
    """
    for (shape, dim), smoothing, weighted, reduction in itertools.product(
        (((4, 5), 1), ((2, 4, 3), 1)), smoothings, (False, True), REDUCTIONS
    ):
        kind, epsilon, z = smoothing
        k = shape[dim]
        given = {"reduction": reduction, "kind": kind, "epsilon": epsilon, "z": z, "dim_given": len(shape) > 2}
        given |= {"w": weights(k, zero=True)} if weighted else {}
        given |= {"pi": prior(k)} if kind == "toward" else {}
        tail = ([f"{kind}_{epsilon}"] if kind != "none" else []) + ([f"z{z}"] if z else []) + (["weights"] if weighted else [])
        for ignored in (None, 1, -100):
            y = labels(without(shape, dim), k, ignored)
            words = [*tail, *([f"ignore{ignored}"] if ignored is not None else [])] or ["plain"]
            case(f"{table}/{dims(shape)}/labels/{'+'.join(words)}/{reduction}", logits(shape), y, dim, ignore=ignored, **given)
        name = f"{table}/{dims(shape)}/probabilities/{'+'.join(tail or ['plain'])}/{reduction}"
        case(name, logits(shape), probabilities(shape, dim), dim, **given)


def some_shapes(table, shapes, smoothings, reductions):
    """All options together, with class weights and an ignored index, on shapes that differ in rank, class dimension and class count."""
    for (shape, dim), (kind, epsilon, z), reduction in itertools.product(shapes, smoothings, reductions):
        k = shape[dim]
        if kind == "over_others" and k == 1:
            continue  # there are no other classes
        given = {"reduction": reduction, "kind": kind, "epsilon": epsilon, "z": z, "w": weights(k)}
        given |= {"pi": prior(k)} if kind == "toward" else {}
        given |= {"dim_given": dim != len(shape) - 1}
        # The ignored index 300 exceeds u8. It must not match targets of 44 (300 - 256).
        ignored = 300 if k == 67 else -100 if k == 300 else k - 1 if k > 1 and len(shape) > 1 else None
        tail = f"{kind}_{epsilon}{f'+z{z}' if z else ''}/{reduction}"
        name = f"{table}/{dims(shape)}_dim{dim}"
        if k == 67:
            y = keep(f"labels/{dims(without(shape, dim))}/67/44", lambda r: r.choice([44, 0, 66], without(shape, dim)))
        else:
            y = labels(without(shape, dim), k, ignored)
        case(f"{name}/labels/{tail}", logits(shape), y, dim, ignore=ignored, **given)
        case(f"{name}/probabilities/{tail}", logits(shape), probabilities(shape, dim), dim, **given)


def options(shape, dim, reductions):
    """Each new option alone and with others, for labels and probabilities."""
    k, rows = shape[dim], without(shape, dim)
    table = {
        "scale": {"scale": 0.5, "kind": "over_all", "epsilon": 0.1},
        "cap": {"cap": 4.0},
        "scale_cap": {"scale": 1.5, "cap": 2.0, "kind": "over_others", "epsilon": 0.1, "z": 0.05, "w": weights(k)},
        "row_weights": {"v": row_weights(rows), "kind": "over_all", "epsilon": 0.1},
        "row_mask": {"v": row_mask(rows), "z": 0.05},
        "row_weights_weights": {"v": row_weights(rows), "kind": "over_others", "epsilon": 0.1, "w": weights(k), "ignore": 1},
        "unmasked": {"kind": "over_unmasked", "epsilon": 0.1},
        "unmasked_weights": {"kind": "over_unmasked", "epsilon": 1.0, "w": weights(k, zero=True)},
        "unmasked_row_weights": {"kind": "over_unmasked", "epsilon": 0.3, "z": 0.05, "v": row_weights(rows)},
        "all": {
            "kind": "over_unmasked", "epsilon": 0.2, "z": 0.05, "v": row_weights(rows), "w": weights(k, zero=True), "scale": 1.5,
            "cap": 3.0, "ignore": 1,
        },
    }
    for (option, given), reduction in itertools.product(table.items(), reductions):
        ignored = given.get("ignore")
        y = labels(rows, k, ignored)
        x, p = logits(shape), probabilities(shape, dim)
        if given.get("kind") == "over_unmasked":
            x, p = masked(x, shape, dim, y, -np.inf), masked(p, shape, dim, y, 0.0)
        given = {**given, "reduction": reduction, "dim_given": dim != len(shape) - 1}
        case(f"options/{dims(shape)}/labels/{option}/{reduction}", x, y, dim, **given)
        case(f"options/{dims(shape)}/probabilities/{option}/{reduction}", x, p, dim, **{**given, "ignore": None})


LAYOUTS = [((5,), 0), ((3, 4), 0), ((2, 5, 3), 2), ((2, 3, 2, 4), 2), ((2, 2, 3, 2, 3), 4), ((2, 2, 2, 2, 2, 3), 5)]
COUNTS = [((3, 1), 1), ((3, 2), 1), ((3, 67), 1), ((2, 67, 2), 1)]


def make():
    moduleinfo()
    opinfo()
    every_combination("torch", [("none", 0.0, 0.0), ("over_all", 0.1, 0.0), ("over_all", 1.0, 0.0)])
    some_shapes("torch", LAYOUTS, [("over_all", 0.15, 0.0)], REDUCTIONS)
    some_shapes("torch", COUNTS, [("over_all", 0.1, 0.0)], ("mean", "none"))
    some_shapes("torch", [((2, 300), 1)], [("over_all", 0.1, 0.0)], ("sum",))
    # With 0.9 over the others, the label's target is less than the other classes', and the one-hot part is negative.
    formula = [("none", 0.0, 0.05), ("over_all", 0.1, 0.05), ("over_others", 0.1, 0.0), ("over_others", 0.1, 0.05)]
    formula += [("over_others", 0.9, 0.0), ("toward", 0.1, 0.0), ("toward", 0.1, 0.05), ("toward", 1.0, 0.0)]
    every_combination("formula", formula)
    some_shapes("formula", LAYOUTS, [("over_others", 0.15, 0.0), ("toward", 0.15, 0.001)], REDUCTIONS)
    some_shapes("formula", COUNTS, [("over_others", 0.1, 0.001), ("toward", 0.1, 0.0)], ("mean", "none"))
    some_shapes("formula", [((2, 300), 1)], [("over_others", 0.1, 0.001), ("toward", 0.1, 0.0)], ("sum",))
    options((5, 6), 1, ("mean", "none"))
    options((2, 4, 3), 1, ("sum",))


def stored(value):
    if value.is_floating_point():
        return value.to(torch.bfloat16)
    return value.to(torch.int16)


def main():
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    make()
    tensors = {name: stored(value).contiguous() for name, value in inputs.items()}
    tensors |= {name: value.contiguous() for name, value in results.items()}
    tensors |= {name: value.contiguous() for name, value in metrics.items()}
    tensors |= {name: stored(value).contiguous() for name, value in sizes.items()}
    # The table is text in a tensor of bytes, because candle's loader hands out tensors and no metadata.
    tensors["cases"] = torch.frombuffer(bytearray("\n".join(cases.values()).encode()), dtype=torch.uint8)
    old = load_file(FILE) if FILE.exists() else {}
    if not sys.argv[1:]:
        agree = {name: old[name] for name in tensors.keys() & old.keys() if name != "cases"}
        for name, value in agree.items():
            check(name, tensors[name], value)
        tensors |= agree
    data = save(tensors)
    tables = [name.split("/")[0] for name in cases]
    counts = ", ".join(f"{table} {tables.count(table)}" for table in dict.fromkeys(tables))
    print(f"{len(cases)} cases ({counts}), {len(inputs)} inputs, {len(data)} bytes, torch {torch.__version__}")
    if not sys.argv[1:]:
        FILE.write_bytes(data)
    elif FILE.read_bytes() == data:
        print("the file is the same to the byte")
    else:
        assert old.keys() == tensors.keys(), f"other tensors: {sorted(old.keys() ^ tensors.keys())[:10]}"
        for name, value in tensors.items():
            check(name, value, old[name])
        print("the file differs in the last bits only (1e-12)")


def check(name, value, old):
    """Asserts that a tensor of the file agrees with the one made now."""
    assert value.dtype == old.dtype and value.shape == old.shape, f"{name} has another dtype or shape"
    if name in results or name in metrics:
        close(name, value, old)
    elif name in sizes:  # sizes only set tolerances, so the last place of bf16 may differ
        assert torch.allclose(value.double(), old.double(), rtol=0.01, atol=0), f"{name} is not the same"
    else:
        assert torch.equal(value, old), f"{name} is not the same"


if __name__ == "__main__":
    main()
