"""Compares recipes for small budgets: one factor at a time, then the best ones with three seeds.

    python scripts/recipe_study.py factors --output build/evidence/recipes
    python scripts/recipe_study.py texts --output build/evidence/recipes_texts
    python scripts/recipe_study.py seeds --output build/evidence/recipes_seeds
    python scripts/recipe_study.py task --output build/evidence/recipes_task

All recipes of a part train as many steps. Each gets a report (`lsjax report --no-training`) on the
same held-out text. The same command resumes a killed study, and skips what is finished. The ideal
speedup and the agreement are those of the best fixed setting. Prints a table, and writes it for
scripts/results.py.
"""

import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from evidence_list import TABLE

from lsjax.checkpoints.run import read_metrics, read_run_config
from lsjax.data.pieces import is_held_out
from lsjax.data.sources import document_source
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.evaluation.intervals import from_seeds
from lsjax.reporting.figures import Speed, agreements, loss_differences, losses, speeds
from lsjax.reporting.markdown import table
from lsjax.reporting.record import REPORT, read_report

PLAIN, BASE, PAPER = "without LayerSkip", "the recipe", "the paper's"
WITHOUT = "--early-exit.curriculum none --early-exit.exits --layer-dropout.p-max 0"
EXPONENTIAL = "--layer-dropout.distribution exponential"
# The quickstart's recipe before this study, and changes of it. The paper's is that of its training
# from scratch.
OLD = "--data.vocab-size 384 --model.vocab-size 384 --early-exit.exits 2 4"
FACTORS = {
    PLAIN: WITHOUT,
    BASE: "",
    PAPER: "--early-exit.curriculum rotational --early-exit.rotation 8 --early-exit.exits "
    "--early-exit.weights paper --early-exit.e-scale 0.2 --layer-dropout.p-max 0.1 "
    f"--layer-dropout.schedule exponential {EXPONENTIAL}",
    "exit 2": "--early-exit.exits 2",
    "exit 4": "--early-exit.exits 4",
    "exits 1, 2, 4": "--early-exit.exits 1 2 4",
    "exits 2, 4, 8": "--early-exit.exits 2 4 8",
    "exits weigh a half": "--early-exit.weights custom --early-exit.custom-weights "
    "0 1 0 1 0 0 0 0 0 0 0 0 0 0 0 2",
    "the paper's weights": "--early-exit.weights paper",
    "no dropout": "--layer-dropout.p-max 0",
    "dropout 0.1": "--layer-dropout.p-max 0.1",
    "dropout 0.5": "--layer-dropout.p-max 0.5",
    "exponential dropout": EXPONENTIAL,
    "half of the tokens": "--early-exit.token-share 0.5",
    "learning rate 1e-3": "--optimizer.learning-rate 1e-3",
    "learning rate 4e-3": "--optimizer.learning-rate 4e-3",
}
# Tokenizers and shapes, whose losses are compared by the byte.
SIZES = {
    BASE: "",
    **{
        f"vocabulary {size:,}": f"--data.vocab-size {size} --model.vocab-size {size}"
        for size in (1024, 2048, 4096)
    },
    "12 wider layers": "--model.num-layers 12 --model.hidden-size 320 "
    "--model.intermediate-size 832 --model.num-heads 5 --model.num-kv-heads 1",
}
# The best recipes on the quickstart as it is now.
BEST = {PLAIN: WITHOUT, BASE: "", "dropout 0.1": FACTORS["dropout 0.1"], PAPER: FACTORS[PAPER]}
# The same for TOPv2: exits at quarters of the depth, and exits as early as the quickstart's. The
# paper's is that of its finetuning on TOPv2.
UNIFORM = "--early-exit.weights uniform --early-exit.custom-weights"
TASK = {
    PLAIN: WITHOUT,
    "exits 8, 15, 23": UNIFORM,
    "exits 2, 4, 8": f"--early-exit.exits 2 4 8 {UNIFORM}",
    PAPER: "--early-exit.curriculum gradual --early-exit.exits --early-exit.weights paper "
    "--early-exit.custom-weights --early-exit.token-share 1 --layer-dropout.p-max 0.2",
}


@dataclass(frozen=True)
class Part:
    """A part of the study: recipes that are compared, as changes of a configuration."""

    config: str
    recipes: Mapping[str, str]
    steps: int
    seeds: tuple[int, ...]
    decoding: str  # flags of the report
    base: str = ""  # flags of all recipes

    @property
    def warmup_steps(self) -> int:
        """As a share of the steps, that of the quickstart."""
        return self.steps * 60 // 800


HEADING = (
    "recipe",
    "loss",
    "of a byte",
    "difference",
    "best exit: agreement",
    "ideal",
    "auto",
    "step",
)
TEXTS = "--prompts 16 --new-tokens 128 --num-draft-tokens 4 8"
# A row is a batch. 64 batches are scored on 30 exits. With four rows each, that takes longer than
# the training.
ANSWERS = "--prompts 16 --task topv2 --num-draft-tokens 4 --batch-size 1"
PARTS = {
    "factors": Part("quickstart", FACTORS, 400, (0,), TEXTS, OLD),
    "texts": Part("quickstart", SIZES, 400, (0,), TEXTS, OLD),
    "seeds": Part("quickstart", BEST, 800, (0, 1, 2), TEXTS),
    "task": Part("finetune_topv2_smollm2", TASK, 100, (0, 1, 2), ANSWERS),
}


@dataclass(frozen=True)
class Arguments:
    """What to train."""

    part: Annotated[Literal["factors", "texts", "seeds", "task"], tyro.conf.Positional]
    """factors: one at a time, on the quickstart. texts: its vocabulary and shape. seeds: three
    seeds of the best recipes. task: three seeds on TOPv2."""
    output: Path
    """Folder of the trainings and reports."""
    recipes: tuple[str, ...] = ()
    """Names of recipes; all of the part by default."""
    model: str = "smollm2"
    """For the task: SmolLM2 in the format of Hugging Face."""
    data: str = "topv2"
    """For the task: the folder of TOPv2's files."""


def main(arguments: Arguments) -> int:
    """Trains what is missing, and prints the table. Returns the exit code of what failed."""
    part, directory = PARTS[arguments.part], arguments.output
    directory.mkdir(parents=True, exist_ok=True)
    names = arguments.recipes or tuple(part.recipes)
    data = (
        f"--dtype bfloat16 --data.tokenizer {arguments.model} --init-from {arguments.model}".split()
    )
    for name in ("train", "validation"):
        flag = "--data.paths" if name == "train" else "--data.validation-paths"
        data += [flag, f"{arguments.data}/{name}.tsv"]
    for seed in part.seeds:  # first one seed of all: a study that stops there can be read
        for name in names:
            code = measure(part, name, seed, directory, data if arguments.part == "task" else [])
            if code:
                return code
    lines = table(rows(directory, part, names))
    about = read_report(report_of(directory, names[0], part.seeds[0])).about
    made = [(name, about[name]) for name in ("machine", "versions", "commit", "date")]
    lines += ["", *table([("measured on", ""), *made, ("prompts", about["prompts"])]), ""]
    (directory / TABLE).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    return 0


def measure(part: Part, name: str, seed: int, directory: Path, data: list[str]) -> int:
    """Trains a recipe and reports on it; returns the exit code of what failed."""
    run, report = directory / run_name(name, seed), report_of(directory, name, seed)
    if (report / REPORT).exists():
        return 0
    common = (
        f"--num-steps {part.steps} --seed {seed} --optimizer.warmup-steps {part.warmup_steps} "
        f"--evaluation.every {part.steps} --evaluation.sample-tokens 0 "
        f"--checkpoints.every {max(1, part.steps // 4)} --workdir"
    )
    train = ["train.py", "--config", part.config, *common.split(), str(run), *data]
    show = ["-m", "lsjax", "report", "--no-training", "--model", str(run), *part.decoding.split()]
    show += ["--output", str(report)]
    print(f"{run.name}", flush=True)
    with run.with_name(run.name + ".log").open("a") as log:
        flags = f"{part.base} {part.recipes[name]}".split()
        for command in ([*train, *flags], show):
            found = subprocess.run([sys.executable, *command], stdout=log, stderr=log)
            if found.returncode:
                return found.returncode
    return 0


def run_name(name: str, seed: int) -> str:
    """Name of a training's directory."""
    return f"{name.replace(',', '').replace(' ', '_')}-{seed}"


def report_of(directory: Path, name: str, seed: int) -> Path:
    """Directory of a training's report."""
    return directory / f"{run_name(name, seed)}.report"


def rows(directory: Path, part: Part, names: Iterable[str]) -> list[tuple[str, ...]]:
    """A heading, and a row for each recipe."""
    reports = {
        name: [read_report(report_of(directory, name, s)) for s in part.seeds] for name in names
    }
    first = next(iter(reports))
    plain, plain_step = reports.get(PLAIN, ()), step_seconds(directory, part, first)
    found = [HEADING]
    for name, own in reports.items():
        gap = ""
        if plain and name != PLAIN:
            both = ([one.models[0] for one in some] for some in (own, plain))
            gap = loss_differences(*both).text("+.3f")
        fast = [speeds(one) for one in own]
        fixed = [[one for one in each if one.cell.exit_layer is not None] for each in fast]
        best = [max(each, key=lambda one: one.figures["ideal"]) for each in fixed]
        ideal = statistics.fmean(one.figures["ideal"] for one in best)
        exit_ = best[0].cell.exit_layer
        agreed = from_seeds([agreements(one, one.main)[exit_ - 1] for one in own]).value
        auto = [speed_of(one, "auto") for one in fast]
        doubt = "" if all(one.figures["trusted"] for one in auto) else "?"
        speedup = from_seeds([one.speedup for one in auto]).text()
        step = step_seconds(directory, part, name) / plain_step
        loss = from_seeds([losses(one, one.main)[-1] for one in own]).value
        of_byte = ""  # of texts alone: answers have labels without the prompts' bytes
        if part.decoding == TEXTS:
            size = bytes_per_token(directory / run_name(name, part.seeds[0]))
            of_byte = f"{loss / size:.3f}"
        shown = f"{loss:.3f}", of_byte, gap, f"{exit_}: {agreed:.3f}"
        found.append((name, *shown, f"{ideal:.2f}x", f"{speedup}x{doubt}", f"{step:.2f}"))
    filled = [column for column in zip(*found, strict=True) if any(column[1:])]
    return list(zip(*filled, strict=True))


def bytes_per_token(run: Path) -> float:
    """Bytes of a token of the held-out documents."""
    data, tokenizer = read_run_config(run).data, load_tokenizer(run)
    documents = document_source(data).documents()
    texts = [one.text for one in documents if is_held_out(one.key, data.held_out_fraction)]
    tokens = sum(map(len, tokenizer.encode_batch(texts, add_bos=False)))
    return sum(len(text.encode()) for text in texts) / tokens


def speed_of(found: Iterable[Speed], strategy: str) -> Speed:
    """The speed of a strategy."""
    return next(one for one in found if one.cell.strategy == strategy)


def step_seconds(directory: Path, part: Part, name: str) -> float:
    """Median seconds of a training step."""
    rows = [row for s in part.seeds for row in read_metrics(directory / run_name(name, s))]
    return statistics.median(row["seconds"] for row in rows if row["kind"] == "step")


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
