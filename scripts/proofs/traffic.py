"""Counts the HBM traffic of compiled programs a second time, and compares it with `lsjax aot`.

    python scripts/proofs/traffic.py

Reads the text of a program by its own regular expressions, line by line. Each computation gets the
number of its runs from its callers. Copies count at their start, by the memory of both sides.
Prints both counts in MB, of a call with one round, and of the call without the round. Exit code 1:
two counts differ by more than 0.1%. Needs libtpu (pip install 'lsjax[tpu]'), no TPU.
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import jax

from lsjax.aot.chips import slice_of
from lsjax.aot.costs import CostAnalysis, Trips
from lsjax.aot.decoding import decode_program, kinds_of_rounds, round_trips
from lsjax.aot.hlo import parse
from lsjax.aot.programs import train_step
from lsjax.config import (
    DecodingShape,
    EarlyExitConfig,
    LayerDropoutConfig,
    LlamaConfig,
    MeshConfig,
    TrainConfig,
)
from lsjax.decoding.scopes import ROUNDS
from lsjax.sharding import make_mesh

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, (.*))?$")
ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\](\{[^}]*\})?")
CALLS = re.compile(r"\b(condition|body|to_apply|calls|branch_computations)=\{?([^}\s]*?)[,}]? ")
SLICES = ("slice", "dynamic-slice", "gather")
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # operation -> its operand with new elements
VIEWS = ("bitcast", "convert", "copy", "reshape", "transpose")
NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
    *("while", "conditional", "call", "partition-id", "replica-id", "optimization-barrier"),
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
    *("copy-done", "slice-done", "all-reduce-start", "all-reduce-done", "custom-call"),
    *("all-gather-start", "all-gather-done", "collective-permute-start", "send", "recv"),
    *("collective-permute-done", "send-done", "recv-done"),
}


class Line(NamedTuple):
    """One instruction."""

    is_root: bool
    name: str
    shape: str
    opcode: str
    inputs: list[str]
    rest: str


def computations(text: str) -> tuple[dict[str, dict[str, Line]], str]:
    """Lines by name of each computation, callees first, and the name of the entry."""
    found: dict[str, dict[str, Line]] = {}
    entry = ""
    for line in text.splitlines():
        if head := HEAD.match(line):
            current = found[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif one := LINE.match(line):
            root, name, shape, opcode, inputs, rest = one.groups()
            names = re.findall(r"%([\w.\-]+)", inputs) or [inputs]
            current[name] = Line(bool(root), name, shape, opcode, names, f"{rest or ''} ")
    return found, entry


def sizes(shape: str) -> list[tuple[int, bool]]:
    """Bytes of each array, and whether it is in HBM: S(...) names another memory."""
    return [
        (math.prod(map(int, re.findall(r"\d+", dims))) * int(bits or 8) // 8, "S(" not in layout)
        for _, bits, dims, layout in ARRAY.findall(shape)
    ]


def in_hbm(shape: str) -> int:
    """Bytes in HBM."""
    return sum(size for size, is_here in sizes(shape) if is_here)


def whole(shape: str) -> int:
    """Bytes in any memory."""
    return sum(size for size, _ in sizes(shape))


def elements(shape: str) -> int:
    """Elements of the first array."""
    return math.prod(map(int, re.findall(r"\d+", ARRAY.search(shape)[3])))


def runs(parts: dict[str, dict[str, Line]], entry: str, trips: dict[str, float]) -> Counter[str]:
    """How often each computation runs in control flow. trips: by the end of a loop's or a
    conditional's name, its trips or the share of its last branch."""
    times: Counter[str] = Counter({entry: 1})
    for name, lines in reversed(parts.items()):
        for line in lines.values():
            if line.opcode in ("while", "conditional", "call"):
                for callee, count in callees(line, parts, trips):
                    times[callee] += times[name] * count
    return times


def callees(line: Line, parts, trips: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Computations of a loop, a conditional or a call, and the runs of each."""
    called = dict(CALLS.findall(line.rest))
    op_name = (re.findall(r'op_name="([^"]*)"', line.rest) or [""])[0]
    known = [count for end, count in trips.items() if op_name.endswith(end)]
    if line.opcode == "call":
        yield called["to_apply"].strip("%"), 1
    elif line.opcode == "conditional":
        first, last = re.findall(r"[\w.\-]+", line.rest.partition("branch_computations=")[2])[:2]
        share = known[0] if known else 1
        yield from ((first, 1 - share), (last, share))
    else:
        condition, body = (called[role].strip("%,") for role in ("condition", "body"))
        count = known[0] if known else limit(parts[condition])
        yield from ((condition, count), (body, count))


def limit(condition: dict[str, Line]) -> int:
    """The constant that a loop's counter is compared with."""
    constants = [line for line in condition.values() if line.opcode == "constant"]
    return max(int(line.inputs[0]) for line in constants if line.inputs[0].isdigit())


def traffic(lines: dict[str, Line], line: Line, parts: dict[str, dict[str, Line]]) -> float:
    """Bytes from and to HBM of one run of an instruction."""
    if line.opcode in ("copy-start", "slice-start"):
        to, source = sizes(line.shape)[:2]
        if line.opcode == "slice-start":  # ((source), slice, flag)
            to, source = source, to
        return to[0] * (to[1] + source[1])
    is_kernel = line.opcode == "custom-call" and "tpu_custom_call" in line.rest
    if line.opcode in NO_TRAFFIC and not is_kernel:
        return 0
    operands = [lines[name].shape for name in line.inputs if name in lines]
    if line.opcode == "fusion":
        return fused(line, operands, parts[re.search(r"calls=%([\w.\-]+)", line.rest)[1]], parts)
    if line.opcode in SLICES:
        read = whole(line.shape) if in_hbm(operands[0]) else 0
        return read + sum(map(in_hbm, operands[1:])) + in_hbm(line.shape)
    if line.opcode in UPDATES:
        new = whole(operands[UPDATES[line.opcode]]) if in_hbm(line.shape) else 0
        return new + sum(map(in_hbm, operands[1:]))
    return sum(map(in_hbm, operands)) + in_hbm(line.shape)


def fused(line: Line, operands: list[str], inner: dict[str, Line], parts) -> float:
    """Bytes of a fusion: what it reads of each operand, and what it writes of each result."""
    total = 0.0
    for number, shape in enumerate(operands):
        if in_hbm(shape):
            (name,) = (
                one.name
                for one in inner.values()
                if one.opcode == "parameter" and one.inputs == [str(number)]
            )
            share = min(1, read(inner, name, parts) / max(1, elements(shape)))
            total += in_hbm(shape) * share
    pairs = zip(sizes(line.shape), written(inner, root_of(inner), parts), strict=True)
    return total + sum(size * share for (size, is_here), share in pairs if is_here)


def root_of(inner: dict[str, Line]) -> Line:
    """The result of a fusion."""
    return next(line for line in inner.values() if line.is_root)


def read(inner: dict[str, Line], name: str, parts) -> float:
    """Elements of a value in a fusion that the fusion reads."""
    total = elements(inner[name].shape) if inner[name].is_root else 0
    for user in inner.values():
        if name not in user.inputs or user.opcode == "parameter":
            continue
        first = user.inputs[0] == name
        if user.opcode in VIEWS:
            total += read(inner, user.name, parts)
        elif user.opcode in SLICES and first:
            total += elements(user.shape)
        elif user.opcode in UPDATES and first:
            total += later_reads(inner, user.name, parts)
        elif user.opcode == "fusion":
            deeper = parts[re.search(r"calls=%([\w.\-]+)", user.rest)[1]]
            number = [str(user.inputs.index(name))]
            parameter = next(
                one.name
                for one in deeper.values()
                if one.opcode == "parameter" and one.inputs == number
            )
            total += read(deeper, parameter, parts)
        else:
            total += elements(inner[name].shape)
    return total


def later_reads(inner: dict[str, Line], name: str, parts) -> float:
    """Elements of an array that are read after its update in place; results are not reads."""
    users = [user for user in inner.values() if name in user.inputs and user.opcode != "parameter"]
    total = 0.0
    for user in users:
        if user.opcode in VIEWS or (user.opcode in UPDATES and user.inputs[0] == name):
            total += later_reads(inner, user.name, parts)
        elif user.opcode in SLICES and user.inputs[0] == name:
            total += elements(user.shape)
        elif user.opcode != "tuple":
            total += elements(inner[name].shape)
    return total


def written(inner: dict[str, Line], line: Line, parts) -> list[float]:
    """Share of each of a fusion's results that it writes: that of the update, if it is in place."""
    if line.opcode == "tuple":
        return [share for name in line.inputs for share in written(inner, inner[name], parts)]
    if line.opcode == "fusion":
        deeper = parts[re.search(r"calls=%([\w.\-]+)", line.rest)[1]]
        return written(deeper, root_of(deeper), parts)
    if line.opcode in VIEWS and inner[line.inputs[0]].opcode != "parameter":
        return written(inner, inner[line.inputs[0]], parts)
    if line.opcode in UPDATES:
        new = elements(inner[line.inputs[UPDATES[line.opcode]]].shape)
        return [new / max(1, elements(line.shape))]
    return [1.0] * len(sizes(line.shape))


def megabytes(text: str, trips: dict[str, float]) -> float:
    """MB through HBM in one run of a program."""
    parts, entry = computations(text)
    times = runs(parts, entry, trips)
    return (
        sum(
            times[name] * traffic(lines, line, parts)
            for name, lines in parts.items()
            if times[name]
            for line in lines.values()
        )
        / 1e6
    )


LLAMA_7B, LLAMA_8B = LlamaConfig.llama2_7b(), replace(LlamaConfig.llama3_8b(), num_layers=16)
TOKEN, DRAFTS = DecodingShape(strategy="autoregressive"), DecodingShape()
AUTO = DecodingShape(strategy="auto")
OF_DRAFTS = {"/draft/while": 5, "/draft/while/body/cond": 0.8}
# Without drafts, one of six verifications runs, with all layers. Both exits are scored in one of 27
# rounds: twice the head's 0.53 billion weights are 1% of those of 27 rounds.
OF_AUTO = {
    "/draft/while": 0,
    "/verify/up_to_0_drafts/while": 1,
    "/verify/up_to_0_drafts/while/body/cond": 1 / 27,
    **{f"/verify/up_to_{length}_drafts/while": 0 for length in (1, 3, 6, 10, 15)},
    "/layers_0_to_3/while": 1,
    "/layers_4_to_7/while": 1,
}
# Model, shape, rows, index of the kind of round, and trips for the second count.
DECODING = {
    "7B, token, 1 row": (LLAMA_7B, TOKEN, 1, 0, {}),
    "7B, round (8, 4), 1 row": (LLAMA_7B, DRAFTS, 1, 0, OF_DRAFTS),
    "7B, token, 8 rows": (LLAMA_7B, TOKEN, 8, 0, {}),
    "8B, 16 layers, round (4, 4), 64 rows": (LLAMA_8B, DRAFTS, 64, 0, OF_DRAFTS),
    "8B, 16 layers, auto without drafts, 1 row": (LLAMA_8B, AUTO, 1, 0, OF_AUTO),
}


# A training step on four chips. One exit has a loss in each step, in 4 chunks as the last one.
TRAINING = TrainConfig(
    model=replace(LlamaConfig.llama3_2_1b(), num_layers=4),
    num_steps=100,
    batch_size=8,
    seq_len=2_048,
    layer_dropout=LayerDropoutConfig(p_max=0.2),
    early_exit=EarlyExitConfig(curriculum="rotational", rotation=2, e_scale=0.1),
    remat="nothing_saveable",
    mesh=MeshConfig(fsdp=4),
)
COLUMNS = "| {:45} | {:>12} | {:>12} |"


def same(title: str, text: str, trips: Trips, own: dict[str, float], mesh, chip) -> bool:
    """Prints MB of a program by lsjax.aot and counted here; returns whether they are equal."""
    costs = CostAnalysis(parse(text), dict(mesh.shape), trips, chip).program()
    counts = costs.amounts["moved_bytes"] / 1e6, megabytes(text, own)
    print(COLUMNS.format(title, *(f"{count:.2f}" for count in counts)), flush=True)
    return math.isclose(*counts, rel_tol=0.001)


def main() -> int:
    """Prints a row per program when it is ready."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    chip, devices = slice_of("v5e:2x2")
    mesh = make_mesh(MeshConfig(tensor=4), devices)
    print(COLUMNS.format("program, v5e:2x2", "lsjax.aot", "second count"))
    equal = []
    for title, (model, shape, rows, index, own) in DECODING.items():
        text = decode_program(model, shape, rows, mesh).compile().as_text()
        trips = round_trips(model, shape, kinds_of_rounds(shape, model)[index])
        own = {"/rounds/while": 1, **own}
        equal.append(same(title, text, trips, own, mesh, chip))
        trips, own = trips | {rf"/{ROUNDS}/while$": 0}, own | {"/rounds/while": 0}
        equal.append(same("its call alone", text, trips, own, mesh, chip))
    mesh = make_mesh(TRAINING.mesh, devices)
    lowered, trips = train_step(TRAINING, mesh)
    own = {"/exits/while": 1, "/loss_chunks/while": 4}
    equal.append(same("1B, 4 layers, step", lowered.compile().as_text(), trips, own, mesh, chip))
    return int(not all(equal))


if __name__ == "__main__":
    sys.exit(main())
