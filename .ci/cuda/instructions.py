"""Counts the instructions that the CUDA kernels execute for each element, by running their machine code. Needs no GPU.

    python3 instructions.py FOLDER [--source FOLDER_OF_SOURCES] [--listing KERNEL DTYPE K]

FOLDER gets the compiler and the disassembler from PyPI if it lacks them. The line `forward bf16 4096 7.4` means that a block executes
7.4 instructions per element of its rows of K = 4096 classes; one of a warp counts for its 32 threads. The program fails if a figure
is above its limit, if the compiler spills registers or uses too many, if an access of the hot loop is not 16 bytes wide, or if a
block leaves out an element or accesses what is not its own. --listing prints a kernel's machine code, each instruction with how
often a block executes it.

Machine code is translated to Python, a function for each stretch without jumps. To count, the first thread of each warp runs for
its warp. Numbers that would come from other threads come from itself, which changes no jump, because all logits are equal. The label
is class 0, so that the first thread does the work for the label, too. To check the accesses, all threads of the block run. The threads of
a warp do not diverge here, so where they wait for each other is not checked, but that they do not in the hot loop.
"""

import argparse
import collections
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
import types

from compile import compile, definitions, read_source

WHEELS = ["nvidia-cuda-nvrtc==13.0.88", "nvidia-cuda-cuobjdump==13.5.37", "nvidia-cuda-nvdisasm==13.5.37"]
CLASSES = [256, 1024, 4096, 16_384, 65_536, 128_256, 262_144]
# The most instructions per element, in the order of CLASSES.
LIMITS = {
    "bf16": {"forward": [11.8, 8.6, 7.8, 7.9, 7.9, 7.8, 7.8], "backward": [10.6, 7.8, 7.1, 7.1, 7.1, 7.0, 7.1]},
    "f32": {"forward": [12.7, 9.5, 9.0, 9.1, 9.0, 8.8, 8.7], "backward": [11.0, 8.2, 7.8, 7.8, 7.8, 7.6, 7.5]},
}
SIZES = {"bf16": 2, "f32": 4}
THREADS, WARP, PACK = 256, 32, 16
# A multiprocessor has so many registers, which warps get in units, and shall have room for so many blocks.
REGISTERS, REGISTER_UNIT, MIN_BLOCKS = 65_536, 256, 4
# The counted block works on so many tasks, one after the other. A task is a group of rows.
TASKS = 16
SHARED_BYTES, LOCAL_BYTES = 64 << 10, 16 << 10
WORD = 0xFFFFFFFF


class Failure(Exception):
    """A kernel is not as it should be, or this program does not know enough to tell."""


# ---- The launch of a kernel


def threads_per_row(classes, size, rows=math.inf, multiprocessors=1):
    """Mirrors `threads_for_packs` of src/gpu/params.rs."""
    packs = classes * size // PACK
    threads = 1 << min(max(packs // 128, min(packs // 4, 4), 1), THREADS).bit_length() - 1
    while threads < THREADS and rows * threads < 2 * MIN_BLOCKS * multiprocessors * THREADS and packs > 4 * threads:
        threads *= 2
    return threads


def params(classes, rows, threads, tasks):
    """The fields of `Params` that are not 0."""
    return {
        "logits": {"class_stride": 1, "rank": 1, "lengths": [rows], "strides": [classes]},
        "targets": {"rank": 1, "lengths": [rows], "strides": [1]},
        "grad_output": {"rank": 1, "lengths": [rows], "strides": [0]},
        "row_weights": {"rank": 1, "lengths": [rows], "strides": [1]}, "logit_scale": 1, "softcap": 1, "inverse_softcap": 1,
        "num_rows": rows, "num_classes": classes, "tile_classes": classes, "inner_size": 1, "num_tasks": tasks, "num_splits": 1,
        "classes_per_split": classes, "row_shift": threads.bit_length() - 1, "divisor_start": 1,
        "has_ignore_index": 1, "ignore_index": -100, "saves": 1, "reduces": 1, "weighted": 1, "prob_scale": 0.9,
        "off_value": 0.1 / classes, "on_value": 0.9 + 0.1 / classes, "weight": 1, "divisor": 1, "scale": 1, "unscale": 1,
        "no_weight": math.nan,
    }  # fmt: skip


def buffers(classes, rows, size):
    """The size of each buffer of the kernels, and the bytes that fill it over and over. An argument that is not here is null."""
    zero, one, logits = bytes(4), struct.pack("<f", 1), rows * classes * size
    return {
        "logits": (logits, one[-size:]), "targets": (4 * rows, zero), "out": (8, zero), "saved": (12 * rows, one),
        "scratch": (1 << 17, zero), "grad_output": (4, one), "divisor": (8, one), "grad_logits": (logits, zero),
        "row_weights": (rows, b"\1"), "metrics": (24 * rows, zero), "predictions": (4 * rows, zero),
    }  # fmt: skip


def packed(source, name, values):
    """The bytes of a struct that the source declares. Fields without a value are 0."""
    formats = {"u32": "<I", "i32": "<i", "u64": "<Q", "i64": "<q", "Real": "<f"}
    declarations = re.sub(r"//.*", "", re.search(rf"struct {name} {{(.*?)\n}};", source, re.S)[1])
    data, values = b"", dict(values)
    for kind, fields in re.findall(r"(\w+)\s+([^;]+);", declarations):
        for field, length in re.findall(r"(\w+)(?:\[(\w+)\])?", fields):
            count = int(re.search(rf"#define {length} (\d+)", source)[1]) if length else 1
            value = values.pop(field, [])
            items = value if isinstance(value, list) else [value]
            for item in items + [0] * (count - len(items)):
                item = struct.pack(formats[kind], item) if kind in formats else packed(source, kind, item)
                data += bytes(-len(data) % min(len(item), 8)) + item
    if values:
        raise Failure(f"has no field in struct {name} called {', '.join(values)}")
    return data + bytes(-len(data) % 8)


class Buffer:
    """Memory that repeats a few bytes where nothing has been written. It lists the offset and the size of each access."""

    def __init__(self, name, size, pattern):
        self.name, self.size, self.pattern = name, size, pattern * max(1, PACK // len(pattern))
        self.written, self.loads, self.stores = {}, [], []

    def check(self, offset, size):
        if offset + size > self.size or offset % size:
            raise Failure(f"accesses {size} bytes at offset {offset} of {self.name}, which has {self.size}")

    def load(self, offset, size):
        self.check(offset, size)
        self.loads.append((offset, size))
        data = self.pattern[offset % len(self.pattern) :][:size]
        if self.written:
            data = bytes(self.written.get(offset + i, data[i]) for i in range(size))
        return int.from_bytes(data, "little")

    def store(self, offset, size, value):
        self.check(offset, size)
        self.stores.append((offset, size))
        self.written.update(enumerate((value & (1 << 8 * size) - 1).to_bytes(size, "little"), offset))


class Launch:
    """The arguments of a launch of two blocks. Each of them works on `tasks` tasks."""

    def __init__(self, source, kernel, classes, size, tasks):
        threads = threads_per_row(classes, size)
        self.rows, self.row_bytes = tasks * THREADS // threads, classes * size
        known = buffers(classes, 2 * self.rows, size)
        # The address of a buffer is its number times 2⁴⁰.
        self.buffers, self.by_name = collections.defaultdict(lambda: Buffer("no buffer", 0, b"\0")), {}
        data = bytearray(0x210)
        struct.pack_into("<6I", data, 0, THREADS, 1, 1, 2, 1, 1)
        struct.pack_into("<I", data, 0x28, LOCAL_BYTES)
        for declaration in re.search(rf"\b{kernel}\(([^()]*)\)", source)[1].split(","):
            name = declaration.split()[-1].lstrip("*")
            if "Params" in declaration:
                data += packed(source, "Params", params(classes, 2 * self.rows, threads, 2 * tasks))
            elif name in known:
                self.buffers[len(self.buffers) + 1] = self.by_name[name] = Buffer(name, *known[name])
                data += struct.pack("<Q", len(self.buffers) << 40)
            else:
                data += bytes(8)
        self.constants = Buffer("constants", len(data), bytes(data))
        self.words = struct.unpack(f"<{len(data) // 4}I", data)


# ---- Arithmetic of the translated code


def real(word):
    return struct.unpack("<f", struct.pack("<I", word & WORD))[0]


def bits(value):
    try:
        return struct.unpack("<I", struct.pack("<f", value))[0]
    except OverflowError:
        return bits(math.copysign(math.inf, value))


def signed(value, width=32):
    return (value & (1 << width) - 1) - (value >> (width - 1) & 1) * (1 << width)


def pick(function, a, b):
    """The minimum or maximum of floats: NaN only if both are."""
    return b if a != a else a if b != b else function(a, b)


def pick_halves(function, a, b):
    """The same for each half of two words, which are bf16."""
    high, low = (bits(pick(function, real(a << by & 0xFFFF0000), real(b << by & 0xFFFF0000))) for by in (0, 16))
    return high | low >> 16


def limited(function):
    """A function of the special function unit, which has a limit where Python has an error."""
    try:
        return function()
    except (OverflowError, ZeroDivisionError):
        return math.inf


def lookup(table, a, b, c):
    """A function of three words, bit by bit, by its truth table."""
    return sum((a ^ (i // 4 - 1)) & (b ^ (i // 2 % 2 - 1)) & (c ^ (i % 2 - 1)) for i in range(8) if table >> i & 1)


def permuted(a, selector, b):
    """Any four of the bytes of two words, or their signs."""
    octets, picks = (a | b << 32).to_bytes(8, "little"), [selector >> shift & 15 for shift in (0, 4, 8, 12)]
    return int.from_bytes(bytes(octets[i] if i < 8 else octets[i - 8] // 128 * 255 for i in picks), "little")


# ---- The translation of instructions
#
# In translated code, r has the registers and, from 256 on, the uniform ones; p has the predicates and, from 8 on, the uniform ones.
# Results that are discarded go to the last place of either. c has the words of the constant bank, t is the thread, v a result.


def place(text):
    """The index of a register in r."""
    uniform, index = re.fullmatch(r"(U?)R(\d+|Z)", text).groups()
    return 511 if index == "Z" else int(index) + 256 * len(uniform)


def word(text):
    """A source as an integer. If negated it may be 2³², for the carry of a subtraction."""
    if text[0] == "-" and not text[1].isdigit():
        return f"({1 << 32} - {word(text[1:])})"
    if text[0] == "~":
        return f"({word(text[1:])} ^ {WORD})"
    if text[0] == "|":
        return f"abs(signed({word(text.strip('|'))}))"
    if constant := re.fullmatch(r"c\[0x0\]\[(0x\w+)\]", text):
        return f"c[{int(constant[1], 16) // 4}]"
    if re.match("U?R", text):
        return f"r[{place(text)}]" if text[-1] != "Z" else "0"
    return str(int(text, 0) & WORD)


def pair(text):
    """A source as the 64 bits of two registers."""
    return f"({word(text)} | r[{place(text) + 1}] << 32)" if text[-1] != "Z" else "0"


def number(text):
    """A source as a float."""
    if re.match(r"-?\||-[RUc]", text):
        return f"-({number(text[1:])})" if text[0] == "-" else f"abs({number(text.strip('|'))})"
    is_literal = re.fullmatch(r"[-+]?(INF|QNAN|[\d.]+(e[-+]?\d+)?)", text)
    return f"float('{text.replace('Q', '')}')" if is_literal else f"real({word(text)})"


def flag(text):
    """A predicate."""
    negated, uniform, index = re.fullmatch(r"(!?)(U?)P(\d|T)", text).groups()
    value = "True" if index == "T" else f"p[{int(index) + 8 * len(uniform)}]"
    return f"(not {value})" if negated else value


def address(text):
    """The sum in the last brackets."""
    terms = []
    for term in text[text.rindex("[") + 1 : -1].split("+"):
        register, _, suffix = term.partition(".")
        value = str(int(term, 0)) if "0x" in term else pair(register) if suffix == "64" else word(register)
        terms.append(f"{value} * {suffix[1:]}" if suffix.startswith("X") else value)
    return " + ".join(terms)


# {w0} in a template is source 0 as a word. The other letters are further ways to read it.
READERS = {
    "w": lambda i, text: word(text),
    "u": lambda i, text: f"({word(text)} & {WORD})",
    "i": lambda i, text: f"({word(text)} & {WORD})" if i.has("U32") else f"signed({word(text)})",
    "d": lambda i, text: pair(text),
    "f": lambda i, text: number(text),
    "p": lambda i, text: flag(text),
    "t": lambda i, text: text,
    "c": lambda i, text: next({"AND": "and", "OR": "or", "XOR": "!="}[flag] for flag in i.flags if flag in ("AND", "OR", "XOR")),
}


def shift_add(i):
    """The low word of a shifted and a second word, or the same with the high word of a pair."""
    if not i.has("HI"):
        return "({w0} << {w2} & 0xffffffff) + {w1}"
    shifted, carry = ("signed({w0}) << {w2}", "{p3}") if i.has("SX32") else ("({u0} | {u2} << 32) << {w3}", "{p4}")
    return f"({shifted} >> 32 & 0xffffffff) + {{w1}}" + f" + {carry}" * i.has("X")


def shift(i):
    """A word of a shifted pair, or a shifted high word."""
    pair, by = "({u0} | {u2} << 32)", "({u1} & 63)" if i.has("W") else "min({u1}, 63)"
    if i.has("L"):
        return f"{pair} << {by} >> {32 * i.has('HI')}"
    word = "signed({w2})" if i.has("S32") else "{u2}"
    return f"{word if i.has('HI') else f'signed({pair}, 64)' if i.has('S64') else pair} >> {by}"


def comparison(i):
    operator = {"LT": "<", "LE": "<=", "GT": ">", "GE": ">=", "EQ": "==", "NE": "!="}
    # True if a float is NaN, as the opposites are not.
    opposite = {"LTU": ">=", "LEU": ">", "GTU": "<=", "GEU": "<", "NEU": "=="}
    a, b = ("{f0}", "{f1}") if i.name == "FSETP" else ("{i0}", "{i1}")
    if i.flags[0] in ("NAN", "NUM"):
        return f"({a} == {a} and {b} == {b}) is {i.has('NUM')}"
    result = f"not {a} {opposite[i.flags[0]]} {b}" if i.flags[0] in opposite else f"{a} {operator[i.flags[0]]} {b}"
    # The high words of pairs decide if they differ, or else the comparison of the low words.
    return f"{{p3}} if {a} == {b} else {result}" if i.has("EX") else result


def halves(i):
    """How the compiler loads a constant: two halves, to which the product of 0 and 0 is added."""
    if any("RZ" not in text for text in i.sources[:2]):
        raise ValueError
    high, low = map(float, i.sources[2:])
    return str((bits(high) & 0xFFFF0000 | bits(low) >> 16) if i.has("BF16_V2") else int.from_bytes(struct.pack("<2e", low, high), "little"))


def larger_halves(i):
    function = f"pick_halves(min if {flag(i.sources[-1])} else max, "
    template = f"{function}{{w0}}, {{w1}})" if len(i.sources) == 3 else f"{function}{function}{{w0}}, {{w1}}), {{w2}})"
    return {"BF16_V2": template}[i.flags[0]]


def flags_to_word(i):
    shift = next((8 * int(flag[1]) for flag in i.flags if re.fullmatch(r"B\d", flag)), 0)
    return f"{{u1}} & ~({{w2}} << {shift}) | (sum(p[n] << n for n in range(7)) & {{w2}}) << {shift}"


def word_to_flags(i):
    source, _, part = i.sources[1].partition(".B")
    chosen = [n for n in range(7) if int(i.sources[2], 0) >> n & 1]
    return "; ".join(f"p[{n}] = {word(source)} >> {8 * int(part or 0) + n} & 1 > 0" for n in chosen)


SPECIAL_FUNCTIONS = {"EX2": "2.0 ** {f0}", "LG2": "math.log2({f0})", "RCP": "1 / {f0}", "RSQ": "{f0} ** -0.5"}
SPECIAL_REGISTERS = {"SR_TID.X": "t.index", "SR_LANEID": f"t.index % {WARP}", "SR_CTAID.X": "0", "SR_CgaCtaId": "0", "SRZ": "0"}
# What an instruction computes. What it returns from other threads is its own, and division never needs the slow path.
VALUES = {
    "MOV": "{w0}", "R2UR": "{w0}", "SHFL": "{w0}", "VOTE": "-{p0}", "VOTEU": "-{p0}", "FCHK": "0",
    "REDUX": lambda i: f"{{w0}} * {WARP if i.has('SUM') else 1}",
    **dict.fromkeys(["S2R", "S2UR", "CS2R"], lambda i: SPECIAL_REGISTERS[i.sources[0]]), "P2R": flags_to_word,
    "IADD3": lambda i: "{w0} + {w1} + {w2}" + "".join(f" + {{p{n}}}" for n in range(3, len(i.sources))),
    "IMAD": lambda i: "{w0} * {w1} + {w2}" + " + {p3}" * i.has("X"), "IMAD.WIDE": lambda i: "{i0} * {i1} + {d2}" + " + {p3}" * i.has("X"),
    "VIADD": "{w0} + {w1}", "LEA": shift_add, "SHF": shift, "IABS": "abs(signed({w0}))", "PRMT": "permuted({u0}, {u1}, {u2})",
    "LOP3": "lookup({w3}, {u0}, {u1}, {u2})", "PLOP3": "lookup({w3}, -{p0}, -{p1}, -{p2})", "SEL": "{w0} if {p2} else {w1}",
    "VIADDMNMX": lambda i: "(min if {p3} else max)(signed({w0} + {w1})%s, {i2})" % (f" & {WORD}" if i.has("U32") else ""),
    "VIMNMX": "(min if {p2} else max)({i0}, {i1})", "IMNMX": "(min if {p2} else max)({i0}, {i1})", "ISETP": comparison,
    "POPC": "bin({u0}).count('1')", "FLO": lambda i: {True: "{u0}.bit_length() - 1"}[i.has("U32")],
    "BREV": "int(format({u0}, '032b')[::-1], 2)",
    "FADD": "bits({f0} + {f1})", "FMUL": "bits({f0} * {f1})", "FFMA": "bits({f0} * {f1} + {f2})", "FSETP": comparison,
    "FMNMX": "bits(pick(min if {p2} else max, {f0}, {f1}))", "FSEL": "bits({f0} if {p2} else {f1})",
    "MUFU": lambda i: f"bits(limited(lambda: {SPECIAL_FUNCTIONS[i.flags[0]]}))",
    "F2I": lambda i: {True: "int({f0})"}[i.has("TRUNC")], "I2FP": "bits({i0})",
    "I2F": lambda i: "bits({d0})" if i.has("U64") else {False: "bits({i0})"}[i.has("S64", "U16", "S16", "U8", "S8")],
    "HFMA2": halves, "HMNMX2": larger_halves, "VHMNMX": larger_halves,
    "F2FP": lambda i: {"BF16": "bits({f0}) & 0xffff0000 | bits({f1}) >> 16"}[i.flags[0]],
}  # fmt: skip
# The predicates that an instruction sets, from what it computes.
SETS = {
    "IADD3": ["v >> 32 > 0", "v >> 32 > 1"], "LEA": ["v >> 32 > 0"], "IMAD": ["v >> 32 > 0"], "IMAD.WIDE": ["v >> 64 > 0"],
    "LOP3": ["v != 0"], "PLOP3": ["v != 0", "lookup({w4}, -{p0}, -{p1}, -{p2}) != 0"], "VOTE": ["v != 0"], "VOTEU": ["v != 0"],
    "SHFL": ["True"], "FCHK": ["False"],
    "ISETP": ["v {c0} {p2}", "(not v) {c0} {p2}"], "FSETP": ["v {c0} {p2}", "(not v) {c0} {p2}"],
}  # fmt: skip
WITHOUT_RESULT = {"ISETP", "FSETP", "PLOP3", "FCHK", "STG", "STS", "STL", "ST", "RED"}
# What other instructions do. Some do nothing to a thread that is alone. At a barrier, the others get their turn.
ACTIONS = {
    "BSSY": "t.meeting_points['{t0}'] = {t1}", "BSYNC": "return t.meeting_points['{t0}']", "CALL": "return {w0}", "RET": "return {w0}",
    "BRA": lambda i: "pass" if i.has("DIV", "CONV") else f"if {' and '.join(map(flag, i.sources[:-1])) or True}: return {i.sources[-1]}",
    "EXIT": "return None", "R2P": word_to_flags, "BAR": lambda i: {"SYNC": "pass", "ARV": "pass"}[i.flags[0]],
    **dict.fromkeys(["NOP", "WARPSYNC", "ENDCOLLECTIVE", "BREAK", "YIELD", "NANOSLEEP"], "pass"),
    **dict.fromkeys(["MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL", "DEPBAR"], "pass"),
}  # fmt: skip
JUMPS = {"BSYNC", "CALL", "RET", "BRA", "EXIT", "BAR"}
UPDATES = {"INC": "0 if v >= {w1} else v + 1", "ADD": "v + {w1}", "EXCH": "{w1}", "OR": "v | {w1}", "AND": "v & {w1}"}


class Instruction:
    """An instruction, its sources, the register of its result, and the predicates that it sets."""

    def __init__(self, text):
        self.text, self.sets, self.result = text, [], "RZ"
        self.guard, opcode, sources = re.fullmatch(r"(?:@(\S+)\s+)?(\S+)\s*(.*)", text).groups()
        name, *self.flags = opcode.split(".")
        # An instruction of the uniform registers is like that of the others.
        self.name = name[1:] if name[0] == "U" and name[1:] in (*VALUES, "LDC") else name
        self.name += ".WIDE" if self.name == "IMAD" and self.has("WIDE", "HI") else ""
        self.access = re.fullmatch("(LD|ST|ATOM|RED)([GSLC]?)", self.name)
        self.size = next((int(flag.strip("US")) // 8 for flag in self.flags if re.fullmatch("[US]?(8|16)|64|128", flag)), 4)
        self.sources = re.split("[, ]+", sources.replace(".reuse", ""))
        if self.name not in ACTIONS:
            self.take_sets()
            if self.name not in WITHOUT_RESULT and re.fullmatch(r"U?R(\d+|Z)", self.sources[0]):
                self.result = self.sources.pop(0)
                self.take_sets()

    def take_sets(self):
        while len(self.sets) < len(SETS.get(self.name, "12")) and re.fullmatch(r"U?P(\d|T)", self.sources[0]):
            self.sets.append(self.sources.pop(0))

    def has(self, *flags):
        return not set(flags).isdisjoint(self.flags)

    def translated(self):
        """The instruction in Python."""
        try:
            if self.name in ACTIONS:
                lines = [ACTIONS[self.name] if isinstance(ACTIONS[self.name], str) else ACTIONS[self.name](self)]
            else:
                lines = self.access_memory() if self.access else self.compute()
            lines = [re.sub(r"\{([a-z])(\d)\}", lambda m: READERS[m[1]](self, self.sources[int(m[2])]), line) for line in lines]
        except (AttributeError, IndexError, KeyError, StopIteration, TypeError, ValueError):
            raise Failure(f"has an instruction that this program does not know: {self.text}") from None
        return [f"if {flag(self.guard)}:"] + [" " + line for line in lines] if self.guard else lines

    def compute(self):
        if self.has("SAT", "SH", "F64", "64"):
            raise ValueError
        value = VALUES[self.name]
        lines = ["v = " + (value if isinstance(value, str) else value(self))]
        if self.sets:
            places = ["p[-1]" if "T" in text else flag(text) for text in self.sets]
            lines.append(f"{', '.join(places)} = {', '.join(SETS[self.name][: len(places)])}")
        is_pair = self.name == "CS2R" and not self.has("32") or self.has("WIDE") or self.name == "F2I" and self.has("U64", "S64")
        return lines + self.write("v >> 32" if self.name == "IMAD.WIDE" and self.has("HI") else "v", 2 if is_pair else 1)

    def write(self, value, words):
        return [f"r[{place(self.result) + n}] = {value} >> {32 * n} & {WORD}" for n in range(words) if self.result[-1] != "Z"]

    def access_memory(self):
        kind, space = self.access.groups()
        memory = {"S": "t.shared", "L": "t.local", "C": "t.constants"}.get(space, "t.buffers[a >> 40]")
        offset, words = f"a & {WORD if space in ('S', 'L', 'C') else (1 << 40) - 1}, {self.size}", max(1, self.size // 4)
        lines = [f"a = {address(self.sources[0])}"]
        if kind == "ST":
            value = "0" if self.sources[1] == "RZ" else " | ".join(f"r[{place(self.sources[1]) + n}] << {32 * n}" for n in range(words))
            return lines + [f"{memory}.store({offset}, {value})"]
        lines.append(f"v = {memory}.load({offset})")
        if kind != "LD":
            if self.size != 4 or self.has("F32", "F16x2", "S32"):
                raise ValueError
            lines.append(f"{memory}.store({offset}, {next(UPDATES[flag] for flag in self.flags if flag in UPDATES)})")
        return lines + self.write(f"signed(v, {8 * self.size})" if self.has("S8", "S16") else "v", words)


# ---- The execution of a block


class Program:
    """A kernel's machine code, as functions of the stretches between jumps. Each of them returns the address of the next one."""

    def __init__(self, code):
        self.code = {address: Instruction(text) for address, text in code}
        self.after, self.functions = dict(zip(self.code, list(self.code)[1:])), {}
        starts = {self.after.get(address) for address, i in self.code.items() if i.name in JUMPS}
        # A number that could be an address could be the target of a jump.
        starts.update(int(text, 16) for i in self.code.values() for text in i.sources if re.fullmatch("0x[0-9a-f]+", text))
        self.stretches, start = collections.defaultdict(list), 0
        for address in self.code:
            start = address if address in starts else start
            self.stretches[start].append(address)

    def function(self, start):
        """Translates a stretch when it is first reached."""
        if start not in self.functions:
            lines = [line for address in self.stretches[start] for line in self.code[address].translated()]
            scope = dict(globals())
            exec("\n ".join(["def stretch(r, p, c, t):", *lines, f"return {self.after.get(self.stretches[start][-1])}"]), scope)
            self.functions[start] = scope["stretch"]
        return self.functions[start]

    def run(self, launch, indices):
        """Runs these threads of block 0. Returns how often each instruction was executed."""
        visits, shared = collections.Counter(), Buffer("shared memory", SHARED_BYTES, b"\0")
        threads = [self.thread(launch, shared, index, visits) for index in indices]
        while threads:
            threads = [thread for thread in threads if next(thread, "end") != "end"]
        return {address: visits[start] for start, stretch in self.stretches.items() for address in stretch}

    def thread(self, launch, shared, index, visits):
        """Runs a thread to its end, with a pause at each barrier of the block."""
        t = types.SimpleNamespace(index=index, buffers=launch.buffers, constants=launch.constants, shared=shared, meeting_points={})
        t.local = Buffer("local memory", LOCAL_BYTES, b"\0")
        r, p, start = [0] * 512, [False] * 17, 0
        while start is not None:
            visits[start] += 1
            if visits[start] > 1_000_000:
                raise Failure("does not end")
            before, start = start, self.function(start)(r, p, launch.words, t)
            if self.code[self.stretches[before][-1]].name == "BAR":
                yield


# ---- The compiler


def install(folder):
    """The paths of the compiler's library and of the disassembler."""
    root = os.path.join(folder, "nvidia", "cu13")
    files = ["lib/libnvrtc.so.13", "lib/libnvrtc-builtins.so.13.0", "bin/cuobjdump", "bin/nvdisasm"]
    library, _, tool, _ = paths = [os.path.join(root, file) for file in files]
    if not all(map(os.path.exists, paths)):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", folder]
        subprocess.run(pip + WHEELS, check=True)
    return library, tool


def compiled(library, tool, source):
    """The machine code of each kernel, as addresses and texts, and what the compiler says."""
    log, code = compile(library, source, "sm_90", "--ptxas-options=-v")
    if not code:
        raise Failure(log)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        listing = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for part in listing.split("Function : ")[1:]:
        lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", part, re.M)
        kernels[part.split()[0]] = [(int(address, 16), text) for address, text in lines]
    return kernels, log


# ---- What is checked


def check_registers(log, kernel):
    entry = re.search(rf"entry function '{kernel}'(.*?)(Compiling|\Z)", log, re.S)[1]
    spilled, used = sum(map(int, re.findall(r"(\d+) bytes spill", entry))), int(re.search(r"Used (\d+) registers", entry)[1])
    if spilled:
        yield f"spills {spilled} bytes of registers"
    blocks = REGISTERS // (-(-used * WARP // REGISTER_UNIT) * REGISTER_UNIT) // (THREADS // WARP)
    if blocks < MIN_BLOCKS:
        yield f"uses {used} registers, which leaves room for only {blocks} blocks"


def check_accesses(launch, kernel):
    """Whether the block, of which all threads have run, has accessed all elements of its rows once."""
    accesses = {"logits": launch.by_name["logits"].loads}
    if kernel == "backward":
        accesses["grad_logits"] = launch.by_name["grad_logits"].stores
    for name, places in accesses.items():
        packs = collections.Counter(offset for offset, size in places if size == PACK)
        if any(offset % launch.row_bytes for offset, size in places if size != PACK):
            yield f"has a narrow access to {name} that is not the label's"
        if set(packs) != set(range(0, launch.rows * launch.row_bytes, PACK)):
            yield f"accesses less or more of {name} than its rows"
        # A thread that has less than four packs left may load one of them again instead.
        repeated, allowed = sum(packs.values()) - len(packs), 3 * THREADS if name == "logits" else 0
        if repeated > allowed:
            yield f"accesses packs of {name} again, {repeated} times"


def count(program, source, kernel, classes, size):
    """How often each instruction is executed, and how many of them per element."""
    launch = Launch(source, kernel, classes, size, TASKS)
    counts = program.run(launch, range(0, THREADS, WARP))
    if WARP * sum(size for _, size in launch.by_name["logits"].loads) < launch.rows * launch.row_bytes:
        raise Failure(f"does less than {TASKS} tasks")
    return counts, WARP * sum(counts.values()) / (launch.rows * classes)


def check(program, source, log, kernel, dtype):
    """Prints the figures of a kernel, and yields what is wrong."""
    yield from check_registers(log, kernel)
    for classes, limit in zip(CLASSES, LIMITS[dtype][kernel]):
        try:
            counts, figure = count(program, source, kernel, classes, SIZES[dtype])
            launch = Launch(source, kernel, classes, SIZES[dtype], 1)
            program.run(launch, range(THREADS))
        except Failure as failure:
            yield f"for {classes} classes, {failure}"
            return
        print(f"{kernel} {dtype} {classes} {figure:.1f}", flush=True)
        if round(figure, 1) > limit:
            yield f"for {classes} classes, executes {figure:.2f} instructions per element, more than {limit}"
        yield from (f"for {classes} classes, {failure}" for failure in check_accesses(launch, kernel))
    hot = [program.code[address] for address, times in counts.items() if 2 * times > max(counts.values())]
    meetings = [i for i in hot if i.name in ("WARPSYNC", "BAR", "SHFL", "VOTE") or i.has("DIV")]
    yield from (f"makes threads wait for each other in the hot loop: {i.text}" for i in meetings)
    yield from (f"has a narrow access in the hot loop: {i.text}" for i in hot if i.name in ("LDG", "STG", "LD", "ST") and i.size != PACK)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", metavar="FOLDER", help="of the compiler and the disassembler")
    parser.add_argument("--source", metavar="FOLDER", default=os.path.join(os.path.dirname(__file__), "../../src/gpu"))
    parser.add_argument("--options", type=int, default=0, help="what the macro OPTIONS is, for information: the limits are those of 0")
    parser.add_argument("--listing", nargs=3, metavar=("KERNEL", "DTYPE", "K"))
    options = parser.parse_args()
    library, tool = install(options.folder)
    source, failures = read_source(options.source), 0
    for dtype, kernels in LIMITS.items():
        code, log = compiled(library, tool, definitions(dtype, "u32", 0, options.options) + source)
        for kernel in kernels:
            program = Program(code[kernel])
            if options.listing and options.listing[:2] == [kernel, dtype]:
                for address, times in count(program, source, kernel, int(options.listing[2]), SIZES[dtype])[0].items():
                    print(f"{times:8} {address:06x} {program.code[address].text}")
            for failure in [] if options.listing else check(program, source, log, kernel, dtype):
                failures += 1
                print(f"{kernel} {dtype} {failure}", file=sys.stderr)
    return failures > 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failure as failure:
        sys.exit(str(failure))
