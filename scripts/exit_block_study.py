"""What exit blocks give a model that may not change, by the tokens that they are trained on.

    python scripts/exit_block_study.py --model smollm2 --loss-text wikitext2.txt \\
        --spec-bench question.jsonl --topv2 topv2/test.tsv --output build/evidence/exit_blocks \\
        --code build/evidence/quickstart/runs/layerskip-0/prompts.jsonl

A chat model writes prompts and answers. Blocks are trained on some of them, and on all. Each is
then measured on other kinds of prompts, in the model's chat template. How many tokens of the
model's own answers does it propose? How many first drafts of rounds are right? How fast is `auto`
with the blocks of the most data, and without? Then the same model is finetuned with LayerSkip on
the same data. The same command resumes. Prints tables, and writes them for scripts/results.py.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from evidence_list import TABLE
from exit_block_measures import Measured
from proofs.mixed_prompts import Arguments as Prompts, kinds_of_prompts

import lsjax
from lsjax.checkpoints.run import read_metrics
from lsjax.cli.answers import ANSWERS
from lsjax.cli.setup import keep_compiled_programs
from lsjax.data.token_counts import read_counts
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.evaluation.intervals import Estimate, from_samples, ratio
from lsjax.io.files import write_json
from lsjax.reporting.machine import made_on
from lsjax.reporting.markdown import table

KINDS = ("questions", "requests", "code")
MOST_STEPS = 6_000  # of blocks
ROWS, TOKENS = 4, 192  # of a step with LayerSkip
DATA = "--data.source jsonl --data.text-template {prompt}{text} --data.allow-special "


@dataclass(frozen=True)
class Arguments(Prompts):
    """What to train and to measure. The output gets answers, runs and figures."""

    model: str = "smollm2"
    """The model, as it was released."""
    answers: tuple[int, ...] = (300, 1_000)
    """Answers to train on. With its prompt, one has about 170 tokens."""
    loss_text: Path = Path("wikitext2.txt")
    """A text of others. The loss of the last exit on it shows what a training changed."""
    exits: tuple[int, ...] = (2,)
    """Exits that get a block."""
    layerskip_steps: int = 0
    """Steps of LayerSkip on the same data as the last blocks. None by default."""
    layerskip_exits: tuple[int, ...] = (8,)
    """Exits that draft after LayerSkip."""
    draft_vocab: int = 4_096
    """Tokens that are drafted."""
    prompts: int = 12
    """Prompts of each kind that are measured."""
    new_tokens: int = 96
    """New tokens of each."""
    repeats: int = 2
    """Timed texts of each prompt and strategy."""
    dtype: str = "bfloat16"
    """Type of the training's products."""


def main(arguments: Arguments) -> int:
    """Makes what is missing, and prints the tables. Returns the exit code of what failed."""
    arguments.output.mkdir(parents=True, exist_ok=True)
    for variant in variants(arguments):
        if code := make(arguments, variant):
            return code
    lines = [*table(acceptance_rows(arguments)), "", *table(speed_rows(arguments)), ""]
    lines += table([("measured on", ""), *made_on().items()])
    (arguments.output / TABLE).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    return 0


class Variant(NamedTuple):
    """What a training reads, and what it trains."""

    answers: int
    layerskip_steps: int = 0  # of LayerSkip; 0 trains blocks

    @property
    def title(self) -> str:
        """In tables."""
        trained = "LayerSkip" if self.layerskip_steps else "blocks"
        return f"{trained}, {self.answers:,} answers"

    @property
    def name(self) -> str:
        """Part of the names of its files."""
        return f"{self.answers}" + "-layerskip" * bool(self.layerskip_steps)


def variants(arguments: Arguments) -> list[Variant]:
    """All trainings, those with fewer answers first."""
    found = [Variant(number) for number in sorted(arguments.answers)]
    steps = arguments.layerskip_steps
    return [*found, found[-1]._replace(layerskip_steps=steps)] if steps else found


def timed_variants(arguments: Arguments) -> list[Variant]:
    """Those that are timed: the blocks with the most data, and LayerSkip."""
    return variants(arguments)[-2 if arguments.layerskip_steps else -1 :]


def make(arguments: Arguments, variant: Variant) -> int:
    """Answers, a training and figures. Returns the exit code of what failed."""
    folder, run = arguments.output / "answers", arguments.output / f"run-{variant.name}"
    figures = figures_file(arguments, variant)
    if figures.exists():
        return 0
    model, number = arguments.model, variant.answers
    write = f"answers --model {model} --chat --num-prompts {number} --output {folder} "
    write += f"--batch-size 96 --dtype {arguments.dtype}"
    train = f"train --workdir {run} --init-from {model} --data.tokenizer {model} "
    train += f"--data.paths {folder / ANSWERS} --data.max-documents {number} "
    train += f"--dtype {arguments.dtype} "
    if steps := variant.layerskip_steps:
        train += f"--config continual_smollm2_135m {DATA}"
        train += f"--batch-size {ROWS} --seq-len {TOKENS} --optimizer.warmup-steps {steps // 20} "
    else:
        steps = min(300 + number, MOST_STEPS)
        exits = " ".join(map(str, arguments.exits))
        train += f"--config exit_blocks --exit-blocks.keep-states --exit-blocks.exits {exits} "
        train += f"--exit-blocks.draft-vocab {arguments.draft_vocab} "
    train += f"--num-steps {steps} --checkpoints.every {steps // 4} "
    train += f"--evaluation.every {steps} --evaluation.batches 2"
    for command in (write, train):
        print(f"lsjax {command}", flush=True)
        found = subprocess.run([sys.executable, "-m", "lsjax", *command.split()])
        if found.returncode:
            return found.returncode
    write_json(figures, measured(arguments, variant, run))
    return 0


def measured(arguments: Arguments, variant: Variant, run: Path) -> dict[str, Any]:
    """What `Measured` finds of each kind of prompts, and the loss of the last exit."""
    keep_compiled_programs()
    tokenizer = load_tokenizer(arguments.model)
    if variant.layerskip_steps:
        model, exits = lsjax.load(run), arguments.layerskip_exits
    else:
        model, exits = lsjax.load(arguments.model, exit_blocks=run), arguments.exits
    counts = read_counts(run / "token_counts.json", tokenizer)
    size = arguments.draft_vocab
    vocabulary = lsjax.DraftVocabulary.most_frequent(counts, size, model.vocab_size)
    own = Measured(model, tokenizer, exits, vocabulary, arguments.new_tokens, arguments.repeats)
    last_loss = own.last_loss(arguments.loss_text.read_text("utf-8"))
    found = {"tokens": counts.total(), "last loss": last_loss}
    asked = kinds_of_prompts(arguments)
    timed = variant in timed_variants(arguments)
    return found | {kind: own.kind(asked[kind], timed) for kind in KINDS}


def figures_file(arguments: Arguments, variant: Variant) -> Path:
    """The file of a training's figures."""
    return arguments.output / f"figures-{variant.name}.json"


def figures_of(arguments: Arguments, variant: Variant) -> dict[str, Any]:
    """The measured figures of a training."""
    return json.loads(figures_file(arguments, variant).read_text())


def acceptance_rows(arguments: Arguments) -> list[tuple[str, ...]]:
    """By training, exit and kind: the share of the answers that the exit proposes. Then the share
    of right first drafts, over all kinds: rounds often begin where drafts are hard."""
    names = "trained", "their tokens", "minutes", "loss of the last exit", "exit"
    rows = [(*names, *KINDS, "all", "first drafts of rounds")]
    for variant in variants(arguments):
        found = figures_of(arguments, variant)
        tokens, last_loss = f"{found['tokens']:,}", f"{found['last loss']:.3f}"
        about = tokens, f"{minutes(arguments, variant):.0f}", last_loss
        for exit_layer in found[KINDS[0]]["agreement"]:
            own, first = (
                [found[kind][what][exit_layer] for kind in KINDS]
                for what in ("agreement", "acceptance")
            )
            shares = [share(part).text() for part in (*([one] for one in own), own, first)]
            rows.append((variant.title, *about, exit_layer, *shares))
    return rows


def minutes(arguments: Arguments, variant: Variant) -> float:
    """Time of the training: states, steps and evaluation, without pauses before a restart."""
    rows = read_metrics(arguments.output / f"run-{variant.name}")
    last = {row["began"]: row for row in rows if row["kind"] == "time"}
    return sum(row["wall"] - row["restarts"] for row in last.values()) / 60


def share(counts: Sequence[Mapping[str, Sequence[int]]]) -> Estimate:
    """Share of right drafts, with an interval from the texts."""
    right, drafts = ([n for one in counts for n in one[name]] for name in ("accepted", "drafted"))
    return from_samples(ratio, right, drafts, of="prompts")


def speed_rows(arguments: Arguments) -> list[tuple[str, ...]]:
    """Speedups of `auto` by kind, and with exits over without. The last row is of all kinds."""
    rows = [("trained", "kind", "auto without exits", "with exits", "with over without")]
    for variant in timed_variants(arguments):
        found = figures_of(arguments, variant)
        for kind in (*KINDS, "all"):
            each = [found[one]["seconds"] for one in (KINDS if kind == "all" else [kind])]
            taken = {name: [t for one in each for t in one[name]] for name in each[0]}
            pairs = (("autoregressive", "without"), ("autoregressive", "with"), ("without", "with"))
            gains = [from_samples(ratio, taken[a], taken[b], of="prompts") for a, b in pairs]
            rows.append((variant.title, kind, *(f"{gain.text()}x" for gain in gains)))
    return rows


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
