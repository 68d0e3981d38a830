"""Tables of what programs for TPUs and GPUs need."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from lsjax.aot.chips import GIB
from lsjax.aot.report import Report

MOST_PROBLEMS = 3


def programs_table(reports: Sequence[Report]) -> Table:
    """A row for each program, per device."""
    table = Table(title="per device", title_justify="left", box=None)
    names = ("program", "arguments", "temporaries", "all, GiB", "of HBM", "computing", "sending")
    for name in (*names, "compiled in"):
        table.add_column(name, justify="left" if name == "program" else "right")
    for one in reports:
        if one.memory is None:
            table.add_row(one.name, "too large", *[""] * 5, f"{one.compile_seconds:.0f} s")
            continue
        memory = one.memory
        table.add_row(
            one.name,
            f"{memory.arguments / GIB:.2f}",
            f"{memory.temporaries / GIB:.2f}",
            f"{memory.total / GIB:.2f}",
            f"{memory.total / one.chip.hbm:.1%}",
            f"{one.compute_seconds * 1e3:.1f} ms",
            f"{one.sent_seconds * 1e3:.1f} ms",
            f"{one.compile_seconds:.0f} s",
        )
    kernels = ", ".join(f"{one.name} {one.attention}" for one in reports if one.memory)
    table.caption = f"attention: {kernels}" if kernels else None
    for one in reports:
        problems = [] if one.too_large is None else [one.too_large]
        problems += one.warnings
        problems += [f"a loop of unknown length: {name}" for name in one.costs.unknown_loops]
        more = len(problems) - MOST_PROBLEMS
        problems[MOST_PROBLEMS:] = [f"and {more} more"] if more > 0 else []
        table.caption = "\n".join(filter(None, (table.caption, *problems)))
        table.caption_justify = "left"
    return table


def training_lines(one: Report, reports: Sequence[Report], training: Mapping[str, Any]) -> str:
    """FLOPs of the step and the utilisation that its bound allows; beside plain training, if that
    was compiled."""
    plain, exits, peak = (training[f"{name}_flops"] for name in ("plain", "exit", "peak"))
    lines = [
        f"FLOPs of a step: {plain:.4g} of the plain model, {exits:.4g} ({exits / plain:.1%}) more "
        "for the exits"
    ]
    if one.memory is None:
        return lines[0]
    best = plain / peak / one.seconds
    apart = plain / peak / (one.compute_seconds + one.sent_seconds)
    lines.append(
        f"a step takes {one.seconds:.3f} s or more: the plain model's FLOPs at {best:.1%} of the "
        f"peak, {apart:.1%} where sending hides behind nothing"
    )
    other = next((o for o in reports if o.name == "plain" and o.memory is not None), None)
    if other is not None:
        more = one.memory.total - other.memory.total
        lines.append(
            f"over plain training: {more / GIB:+.2f} GiB ({more / other.memory.total:+.1%}), "
            f"{one.seconds / other.seconds - 1:+.1%} of the time"
        )
    return "\n".join(lines)


def round_lines(found: Mapping[str, Any], strategy: str) -> str:
    """A round of decoding beside what it has to read; what runs in it."""
    times = {name: f"{found[f'{name}_seconds'] * 1e3:.2f} ms" for name in ("weights", "once")}
    both = (found["weights_seconds"] + found["cache_seconds"]) * 1e3
    each = "a token" if strategy == "autoregressive" else "a round"
    passes = found["operations_in_layers"] / found["layer_passes"]
    return (
        f"decode: {each} takes {found['seconds'] * 1e3:.2f} ms or more, and {times['once']} once "
        f"per call\n"
        f"  weights over bandwidth: {times['weights']} ({found['over_weights']:.2f} times that); "
        f"with the cache in use: {both:.2f} ms ({found['over_weights_and_cache']:.2f} times)\n"
        f"  kernels: {found['operations']:.0f}, of them {found['operations_in_layers']:.0f} in "
        f"{found['layer_passes']} layers ({passes:.1f} each)\n"
        f"  loops: {found['loops']:.0f}, of them {found['loops_in_layers']:.0f} in layers; "
        f"conditionals: {found['conditionals']:.0f}, of them "
        f"{found['conditionals_in_layers']:.0f} in layers"
    )


def collectives_table(one: Report) -> Table:
    """What a program sends, by kind and by the axes of the mesh."""
    title = f"{one.name}: what devices do together, {one.sent_bytes / 1e9:.2f} GB sent by each"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("kind")
    table.add_column("over")
    for name in ("times", "GB", "GB sent", "largest"):
        table.add_column(name, justify="right")
    groups = defaultdict(list)
    for collective, count in one.costs.collectives.items():
        groups[collective.kind, collective.axes].append((collective, count))

    def sent(found) -> float:
        return sum(collective.sent * count for collective, count in found)

    for (kind, axes), found in sorted(groups.items(), key=lambda item: -sent(item[1])):
        table.add_row(
            kind,
            " x ".join(axes),
            f"{sum(count for _, count in found):.0f}",
            f"{sum(collective.bytes * count for collective, count in found) / 1e9:.3f}",
            f"{sent(found) / 1e9:.3f}",
            max((collective for collective, _ in found), key=lambda c: c.bytes).shape,
        )
    return table
