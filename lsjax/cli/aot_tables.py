"""Tables of the report of lsjax.cli.aot: memory, times and communication of programs."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lsjax.aot.chips import GIB
from lsjax.aot.costs import SLICES
from lsjax.cli.show import table, wide_console

# Heading -> time of a report.
TIMES = {
    "HBM traffic": "memory_seconds",
    "core": "core_seconds",
    "sending": "sent_seconds",
    "at least, ms": "seconds",
    "without overlap": "serial_seconds",
}


def print_report(found: Mapping[str, Any]) -> None:
    """Prints tables of the programs' memory, time and communication."""
    people = wide_console()
    people.print(programs_table(found))
    if "train" in found["meshes"]:
        plain, exits = (found["training"][f"{name}_flops"] for name in ("plain", "exit"))
        people.print(f"the exits add {exits / plain:.1%} to the FLOPs of plain training")
    for one in found["programs"]:
        lines = [one["too_large"]] if one["too_large"] else []
        lines += [f"a loop of unknown length: {loop}" for loop in one["unknown_loops"]]
        if one["between_bytes"]:
            sent, least = one["between_bytes"] / 1e9, one["between_seconds"] * 1e3
            lines.append(f"each device sends {sent:.3f} GB to other slices: {least:.2f} ms alone")
        for line in lines:
            people.print(f"{title(one)}: {line}")
    if rounds := [one for one in found["programs"] if one["round"] and one["memory"]]:
        people.print(rounds_table(rounds, found["decoding"]["strategy"]))
    for one in found["programs"]:
        if one["collectives"]:
            people.print(collectives_table(one))


def title(one: Mapping[str, Any]) -> str:
    """Name of a program, with the rows and drafts of its round."""
    if one["round"] is None:
        return one["name"]
    rows, drafts = one["round"]["rows"], one["round"]["num_draft_tokens"]
    counts = f"{one['name']}, {rows} {'row' if rows == 1 else 'rows'}"
    return f"{counts}, {drafts} drafts" if drafts else counts


def programs_table(found: Mapping[str, Any]) -> Table:
    """Table with a row per program. Only the FLOPs of plain training count as useful."""
    training, rows = found["training"], []
    for one in found["programs"]:
        sizes = dict(found["meshes"][one["name"]])
        slices = f"{sizes.pop(SLICES)} slices of " if SLICES in sizes else ""
        mesh = slices + " x ".join(map(str, sizes.values()))
        if (memory := one["memory"]) is None:
            rows.append([title(one), mesh, "too large"])
            continue
        sizes = [f"{memory[part] / GIB:.2f}" for part in ("arguments", "temporaries", "total")]
        useful = ""
        if one["name"] in ("train", "plain"):
            ideal = training["plain_flops"] / training["peak_flops"]
            useful = f"{ideal / one['serial_seconds']:.1%}"
        share = f"{memory['total'] / memory['hbm']:.1%}"
        times = [f"{1e3 * one[key]:.2f}" for key in TIMES.values()]
        rows.append([title(one), mesh, one["attention"], *sizes, share, *times, useful])
    axes = " x ".join(next(iter(found["meshes"].values())))
    names = ["program", axes, "attention", "arguments", "temporaries", "all, GiB"]
    names += ["of HBM", *TIMES, "plain FLOPs of peak"]
    return table(f"{found['topology']}, per device", names, rows, left=3)


def rounds_table(found: Sequence[Mapping[str, Any]], strategy: str) -> Table:
    """Table of rounds: the least time for their reads, their own time, and that of a call."""
    rows = []
    for one in found:
        kind = one["round"]
        reads = kind["weights_seconds"] + kind["cache_seconds"]
        once = kind["once_per_call"]["serial_seconds"]
        times = (kind["weights_seconds"], reads, one["seconds"], one["serial_seconds"])
        row = [str(kind["rows"]), str(kind["num_draft_tokens"])]
        row += [f"{1e3 * seconds:.2f}" for seconds in times]
        row += [f"{one['serial_seconds'] / reads:.2f}", f"{one['operations']:.0f}"]
        rows.append([*row, f"{1e3 * once:.2f}"])
    names = ["rows", "drafts", "weights", "and cache", "takes at least", "without overlap"]
    names += ["over weights and cache", "kernels", "once per call"]
    each = "a token" if strategy == "autoregressive" else "a round"
    return table(f"decode: {each}, milliseconds", names, rows)


def collectives_table(figures: Mapping[str, Any]) -> Table:
    """Table of a program's collectives, by kind and mesh axes."""
    groups = defaultdict(list)
    for one in figures["collectives"]:  # sorted by bytes sent
        groups[one["kind"], " x ".join(one["axes"])].append(one)
    rows = []
    for names, found in groups.items():
        gb, sent = (sum(one[k] * one["count"] for one in found) / 1e9 for k in ("bytes", "sent"))
        largest = max(found, key=lambda one: one["bytes"])["shape"]
        count = sum(one["count"] for one in found)
        rows.append([*names, f"{count:.0f}", f"{gb:.3f}", f"{sent:.3f}", largest])
    within = f"{figures['sent_bytes'] / 1e9:.2f} GB sent by each device within its slice"
    names = ["kind", "over", "times", "GB", "GB sent", "largest"]
    return table(f"{title(figures)}: {within}", names, rows, left=2)
