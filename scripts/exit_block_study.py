"""What exit blocks give a model that may not change, by the tokens that they are trained on.

    python scripts/exit_block_study.py --model smollm2 --spec-bench question.jsonl \\
        --topv2 topv2/test.tsv --code build/evidence/quickstart/runs/layerskip-0/prompts.jsonl \\
        --output build/evidence/exit_blocks

A chat model writes prompts and answers. Blocks are trained on some of the answers, on all, and on
all with other texts (--texts). Each is then measured on other kinds of prompts, in the model's chat
template. How many tokens of the model's own answers does it propose? How many first drafts of
rounds are right? How fast is `auto` with the blocks and without? The same command resumes. Prints
a table, and writes it for scripts/results.py.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro
from evidence_list import TABLE
from proofs.mixed_prompts import Arguments as Prompts, kinds_of_prompts

import lsjax
from lsjax.checkpoints.run import read_metrics
from lsjax.cli.answers import ANSWERS
from lsjax.cli.setup import keep_compiled_programs
from lsjax.data.chat import Dialogue
from lsjax.data.token_counts import read_counts
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.evaluation.exits import score_batches
from lsjax.evaluation.intervals import Estimate, from_samples, ratio
from lsjax.io.files import write_json
from lsjax.reporting.machine import made_on
from lsjax.reporting.markdown import table

KINDS = ("questions", "requests", "code")
BATCH, LENGTH = 8, 512  # rows and tokens of a step
DRAFTS = 4  # of a round, when acceptance is counted
PIECE, START = 1_600, 60  # characters of a piece of other texts, and of its prompt


@dataclass(frozen=True)
class Arguments(Prompts):
    """What to train and to measure. The output gets answers, runs and figures."""

    model: str = "smollm2"
    """The model, as it was released."""
    answers: tuple[int, ...] = (1_000, 3_000, 9_000)
    """Answers to train on, about 110 tokens each."""
    texts: tuple[Path, ...] = ()
    """Text files for one more training, beside the most answers. They cost no decoding."""
    exits: tuple[int, ...] = (2, 4)
    """Exits that get a block."""
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
    began = time.monotonic()
    for variant in variants(arguments):
        if code := make(arguments, variant):
            return code
        print(f"{variant.title}: {(time.monotonic() - began) / 60:.1f} minutes so far", flush=True)
    lines = [*table(acceptance_rows(arguments)), "", *table(speed_rows(arguments)), ""]
    lines += table([("measured on", ""), *made_on().items()])
    (arguments.output / TABLE).write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))
    return 0


class Variant(NamedTuple):
    """What a training reads."""

    answers: int
    texts: bool = False  # also the other texts

    @property
    def title(self) -> str:
        """In tables."""
        return f"{self.answers:,}" + " and texts" * self.texts

    @property
    def name(self) -> str:
        """Part of the names of its files."""
        return f"{self.answers}" + "-texts" * self.texts


def variants(arguments: Arguments) -> list[Variant]:
    """All trainings, those with fewer answers first."""
    numbers = sorted(arguments.answers)
    return [*map(Variant, numbers), *([Variant(numbers[-1], True)] if arguments.texts else [])]


def make(arguments: Arguments, variant: Variant) -> int:
    """Answers, blocks and figures of a training. Returns the exit code of what failed."""
    folder, run = arguments.output / "answers", arguments.output / f"blocks-{variant.name}"
    figures = figures_file(arguments, variant)
    if figures.exists():
        return 0
    model, number = arguments.model, variant.answers
    write = f"answers --model {model} --chat --num-prompts {number} --output {folder} "
    write += f"--batch-size 32 --dtype {arguments.dtype}"
    paths, documents = f"{folder / ANSWERS}", number
    if variant.texts:
        others = arguments.output / "texts.jsonl"
        documents += write_texts(arguments.texts, others)
        paths += f" {others}"
    steps = 600 + documents // 7
    train = f"train --config exit_blocks --workdir {run} --init-from {model} "
    train += f"--data.tokenizer {model} --data.paths {paths} "
    train += f"--data.max-documents {documents} --dtype {arguments.dtype} "
    train += f"--exit-blocks.keep-states --exit-blocks.exits {' '.join(map(str, arguments.exits))} "
    train += f"--exit-blocks.draft-vocab {arguments.draft_vocab} --num-steps {steps} "
    train += f"--batch-size {BATCH} --seq-len {LENGTH} --checkpoints.every {steps // 4} "
    train += f"--evaluation.every {steps}"
    for command in (write, train):
        print(f"lsjax {command}", flush=True)
        found = subprocess.run([sys.executable, "-m", "lsjax", *command.split()])
        if found.returncode:
            return found.returncode
    write_json(figures, measured(arguments, run))
    return 0


def write_texts(files: Sequence[Path], output: Path) -> int:
    """Writes rows with pieces of the files, and returns their number. A piece begins with its
    prompt, which training does not count."""
    rows = []
    for file in files:
        text = file.read_text()
        for begin in range(0, len(text), PIECE):
            prompt, rest = text[begin:][:START], text[begin:][START:PIECE]
            if prompt.strip() and rest.strip():
                rows.append({"prompt": prompt, "text": rest})
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def measured(arguments: Arguments, run: Path) -> dict[str, Any]:
    """Counts of first drafts, and seconds of texts, of each kind of prompts."""
    keep_compiled_programs()
    tokenizer = load_tokenizer(arguments.model)
    model = lsjax.load(arguments.model, exit_blocks=run)
    counts = read_counts(run / "token_counts.json", tokenizer)
    vocabulary = lsjax.DraftVocabulary.most_frequent(
        counts, arguments.draft_vocab, model.vocab_size
    )
    found: dict[str, Any] = {"tokens": counts.total(), "losses": read_metrics(run)[-1]}
    for kind in KINDS:
        asked = kinds_of_prompts(arguments)[kind]
        texts = [Dialogue(tokenizer).prompt(text.strip())[1] for text in asked]
        answers, taken = seconds(arguments, model, tokenizer, vocabulary, texts)
        found[kind] = {
            "agreement": agreed(arguments, model, vocabulary, texts, answers),
            "acceptance": accepted(arguments, model, tokenizer, vocabulary, texts),
            "seconds": taken,
        }
    return found


def agreed(
    arguments: Arguments,
    model: lsjax.Llama,
    vocabulary: lsjax.DraftVocabulary,
    texts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> dict[int, Any]:
    """By exit, for each text: the answer's tokens, and those that the block proposes."""
    length = max(map(len, texts)) + arguments.new_tokens
    batches = []
    for text, answer in zip(texts, answers, strict=True):
        row = [*text, *answer]
        tokens, labels = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        tokens[: len(row)] = row
        asked = slice(len(text) - 1, len(row) - 1)  # positions whose next token is of the answer
        labels[asked] = row[len(text) :]
        batch = dict(tokens_BT=tokens, labels_BT=labels, positions_BT=np.arange(length))
        batch["segments_BT"] = (np.arange(length) < len(row)).astype(np.int32)
        batches.append({name: array[None] for name, array in batch.items()})
    sums = score_batches(model, batches, dtype="float32", draft_ids_W=vocabulary.ids_W)
    tokens, proposed_nE = sums.tokens_n.tolist(), sums.agreed_nE
    return {
        one: {"drafted": tokens, "accepted": proposed_nE[:, one - 1].tolist()}
        for one in arguments.exits
    }


def accepted(
    arguments: Arguments,
    model: lsjax.Llama,
    tokenizer: Tokenizer,
    vocabulary: lsjax.DraftVocabulary,
    texts: Sequence[Sequence[int]],
) -> dict[int, Any]:
    """By exit, for each text: the rounds, and those whose first draft was right."""
    options = dict(max_new_tokens=arguments.new_tokens, vocabulary=vocabulary)
    one = lsjax.acceptance(model, tokenizer, texts, arguments.exits, DRAFTS, **options)
    return {
        exit_layer: {
            "drafted": one.drafted_nEJ[:, at, 0].tolist(),
            "accepted": one.accepted_nEJ[:, at, 0].tolist(),
        }
        for at, exit_layer in enumerate(one.exits)
    }


def seconds(
    arguments: Arguments,
    model: lsjax.Llama,
    tokenizer: Tokenizer,
    vocabulary: lsjax.DraftVocabulary,
    texts: Sequence[Sequence[int]],
) -> tuple[list[list[int]], dict[str, list[float]]]:
    """The answers, and the seconds of each, the median of the repeats. Strategies take turns."""
    engine = lsjax.Engine(model, tokenizer)
    strategies = {
        "autoregressive": lsjax.Autoregressive(),
        "without": lsjax.Adaptive(()),
        "with": lsjax.Adaptive(arguments.exits, vocabulary),
    }
    taken: dict[str, list[list[float]]] = {name: [[] for _ in texts] for name in strategies}
    answers: list[list[int]] = [[] for _ in texts]
    for repeat in range(-1, arguments.repeats):  # the first one compiles
        for number, text in enumerate(texts):
            for name, strategy in strategies.items():
                engine.use(strategy)
                (one,) = engine.generate([text], max_new_tokens=arguments.new_tokens)
                answers[number] = answers[number] or one.token_ids
                if one.token_ids != answers[number]:
                    raise SystemExit(f"{name} wrote another text: {one.text!r}")
                if repeat >= 0:
                    taken[name][number].append(one.decode_seconds)
    medians = {name: [statistics.median(each) for each in own] for name, own in taken.items()}
    return answers, medians


def figures_file(arguments: Arguments, variant: Variant) -> Path:
    """The file of a training's figures."""
    return arguments.output / f"figures-{variant.name}.json"


def figures_of(arguments: Arguments, variant: Variant) -> dict[str, Any]:
    """The measured figures of a training."""
    return json.loads(figures_file(arguments, variant).read_text())


def acceptance_rows(arguments: Arguments) -> list[tuple[str, ...]]:
    """By tokens, exit and kind: the share of the answers that blocks propose. Then the share of
    right first drafts, over all kinds: rounds often begin where drafts are hard."""
    rows = [("answers", "their tokens", "exit", *KINDS, "all", "first drafts of rounds")]
    for variant in variants(arguments):
        found = figures_of(arguments, variant)
        for exit_layer in map(str, arguments.exits):
            own, first = (
                [found[kind][what][exit_layer] for kind in KINDS]
                for what in ("agreement", "acceptance")
            )
            shares = [share(part).text() for part in (*([one] for one in own), own, first)]
            rows.append((variant.title, f"{found['tokens']:,}", exit_layer, *shares))
    return rows


def share(counts: Sequence[Mapping[str, Sequence[int]]]) -> Estimate:
    """Share of right drafts, with an interval from the texts."""
    right, drafts = ([n for one in counts for n in one[name]] for name in ("accepted", "drafted"))
    return from_samples(ratio, right, drafts, of="prompts")


def speed_rows(arguments: Arguments) -> list[tuple[str, ...]]:
    """Speedups of `auto` by kind, and with blocks over without."""
    rows = [("answers", "kind", "auto without blocks", "with blocks", "with over without")]
    for variant in variants(arguments):
        found = figures_of(arguments, variant)
        for kind in KINDS:
            taken = found[kind]["seconds"]
            pairs = (("autoregressive", "without"), ("autoregressive", "with"), ("without", "with"))
            gains = [from_samples(ratio, taken[a], taken[b], of="prompts") for a, b in pairs]
            rows.append((variant.title, kind, *(f"{gain.text()}x" for gain in gains)))
    return rows


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Arguments)))
