"""What the benchmark prints and writes: the table, the pictures, and whether texts are exact."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from lsjax.cli.show import or_dash, show_table, wide_console
from lsjax.config import ConfigError
from lsjax.decoding.cost import RoundCosts, weight_bytes
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.evaluation.answers import ALL, Answer, Cell
from lsjax.evaluation.exactness import FLOAT32_MARGIN
from lsjax.evaluation.plots import check_plots, plot_acceptance, plot_grid
from lsjax.evaluation.speed import CellSpeed, margin_of

SHOWN = 10  # differing texts
# Heading, attribute of CellSpeed and format.
COLUMNS = (
    *(("E", "exit_layer", ""), ("d", "num_draft_tokens", ""), ("N", "draft_vocab", "")),
    *(("tokens/s", "tokens_per_second", ".1f"), ("from", "slowest", ".1f")),
    *(("to", "fastest", ".1f"), ("speedup", "speedup", ".2f")),
    *(("accepted", "acceptance_rate", ".3f"), ("tokens/round", "tokens_per_round", ".2f")),
    *(("ideal", "ideal", ".2f"), ("share", "share_of_ideal", ".2f")),
    *(("predicted", "predicted", ".2f"), ("off by", "off_by", "+.0%")),
    *(("round/parts", "round_over_parts", ".2f"), ("equal", "equal", ""), ("differ", "differ", "")),
    ("margin", "widest_margin", ".1e"),
)


def show(title: str, rows: Sequence[CellSpeed]) -> None:
    """The rows as a table; the best speedup is green."""
    lines, best = [], max(row.speedup for row in rows)
    for row in rows:
        figures = [or_dash(getattr(row, name), form) for _, name, form in COLUMNS]
        lines.append([row.strategy.replace("_", " "), row.group, *figures])
    headings = ["strategy", "prompts", *(heading for heading, _, _ in COLUMNS)]
    green = {n: "bold green" for n, row in enumerate(rows) if row.speedup == best > 1}
    show_table(title, headings, lines, left=2, styles=green)


def show_costs(engine: Engine, base: CellSpeed, costs: RoundCosts | None, bandwidth: float) -> None:
    """Compilation, memory bandwidth, and passes of several positions."""
    config, console = engine.model.config, wide_console()
    weights = weight_bytes(config, engine.model.dtype.itemsize)
    console.print(
        f"{engine.num_programs} programs, {engine.compile_seconds:.1f} s compiling; autoregressive "
        f"decoding reads {weights / 1e6:.0f} MB of weights a token, "
        f"{base.bandwidth / 1e9:.1f} GB/s, {base.share_of_bandwidth:.0%} of this memory's "
        f"{bandwidth / 1e9:.1f} GB/s"
    )
    if costs is not None:
        one = costs.pass_seconds(config.num_layers, 1)
        widths = {width: costs.pass_seconds(config.num_layers, width) for width in costs.head}
        passes = ", ".join(f"{width} at {seconds / one:.2f}" for width, seconds in widths.items())
        console.print(f"A pass of one position takes {one * 1e3:.1f} ms; times that, {passes}")


def write(output: Path, title: str, rows: Sequence[CellSpeed], notes: Console) -> None:
    """The table as JSON lines, in which infinity is null, and the pictures of a grid."""
    with (output / "cells.jsonl").open("w", encoding="utf-8") as lines:
        for row in rows:
            values = {k: None if v == math.inf else v for k, v in asdict(row).items()}
            print(json.dumps(values), file=lines)
    whole = [row for row in rows if row.group == ALL and row.num_draft_tokens is not None]
    if len({(row.exit_layer, row.num_draft_tokens) for row in whole}) < 2:
        return
    try:
        check_plots()
    except ConfigError as error:
        notes.print(f"no pictures: {error}")
        return
    plot_grid(whole, output / "benchmark.png", title=title)
    plot_acceptance(whole, output / "acceptance.png", title=title.partition(",")[0])


def verdict(answers: Sequence[Answer], engine: Engine) -> int:
    """Shows the widest differences from autoregressive decoding; 1 if one of them is a fault."""
    console, dtype = Console(highlight=False, soft_wrap=True), str(engine.model.dtype)
    found = [(one, one["difference"]) for one in answers if one["difference"]]
    found.sort(key=lambda pair: margin_of(pair[1]))
    # The widest of all repeats.
    widest = {(Cell.of(answer), answer["id"]): difference for answer, difference in found}
    if widest:
        console.print(f"{len(widest)} texts differ; the widest margins:")
    for (cell, prompt), one in sorted(widest.items(), key=lambda p: -margin_of(p[1]))[:SHOWN]:
        tokens = " became ".join(
            "the end" if token is None else repr(engine.tokenizer.decode([token]))
            for token in (one["expected"], one["found"])
        )
        margin = f"margin {margin_of(one):.1e}"
        if one["roundings"] is not None:
            margin += f", {one['roundings']:.2g} roundings of {dtype}"
        where = f"prompt {prompt}, {cell}: new token {1 + one['index']}"
        console.print(f"  {where}, {tokens}, {margin}", markup=False)
    wrong = sum(margin_of(one) > FLOAT32_MARGIN for one in widest.values())
    if dtype == "float32" and wrong:
        console.print(f"[bold red]{wrong} differences are wider than {FLOAT32_MARGIN:.0e}")
        return 1
    drafting = [one for one in answers if one["strategy"] == SelfSpeculative.name]
    if dtype == "float32" and drafting and drafting[0]["seed"] is None:
        console.print("[green]Self-speculation gives the tokens of autoregressive decoding.")
    return 0
