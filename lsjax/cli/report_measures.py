"""What a report measures of a model: its exits on held-out rows, and texts by all strategies."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any

import numpy as np
from rich.console import Console

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.run import is_run, read_metrics, read_run_config
from lsjax.cli import engines
from lsjax.cli.flags.shared import ModelFlags, StrategyFlags
from lsjax.cli.notes import notes_console
from lsjax.cli.setup import bar, choose_dtype
from lsjax.config import (
    AnyPath,
    ConfigError,
    LlamaConfig,
    TrainConfig,
    as_path,
    check,
    split_step,
)
from lsjax.config.checked import from_json
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.data.vocabulary import make_tokenizer
from lsjax.decoding.auto.adaptive import Adaptive
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, Strategy
from lsjax.evaluation import answers, exits, speeds
from lsjax.evaluation.exits import BatchSums
from lsjax.evaluation.scores import Cell, Scores, exact_match
from lsjax.evaluation.tasks import TASKS
from lsjax.io.files import cache_directory, read_json, write_json
from lsjax.model.llama import stacked
from lsjax.reporting import machine
from lsjax.reporting.figures import rows_of
from lsjax.reporting.held_out import HeldOut, described, held_out
from lsjax.reporting.plan import Plan
from lsjax.reporting.recipes import without_layerskip
from lsjax.reporting.record import Kind, Measured, curve
from lsjax.reporting.texts import with_origins
from lsjax.training.early_exit import exits_with_loss
from lsjax.training.metrics import TIME

NUM_TEXTS = 3  # with the origin of their tokens
DEPTHS = (8, 4, 2)  # parts of the depth at which a model without LayerSkip has static settings
# Fields of an answer's line that a report does not keep.
LEFT_OUT = {"key", "prompt", "text", "token_ids", "reference", "log_probs"}


@dataclass(frozen=True, kw_only=True)
class DecodingFlags(ModelFlags, StrategyFlags):
    """Flags of a model and of the strategies that decode with it."""


class Measures:
    """Measures the models of one report, which are trained already."""

    def __init__(self, plan: Plan, directory: AnyPath, console: Console):
        self.plan, self.directory = plan, directory
        self.notes = notes_console()
        self.notes.quiet = console.quiet

    @property
    def is_task(self) -> bool:
        """Whether the data have prompts with responses."""
        return self.plan.config.data.has_prompts

    def path(self, kind: Kind, seed: int) -> AnyPath:
        """The model: the directory of its training, or the one that was given."""
        if kind == "given":
            return as_path(self.plan.asked.model)
        return self.directory / "runs" / f"{kind}-{seed}"

    def config(self, kind: Kind, seed: int) -> TrainConfig:
        """The configuration of a training."""
        own = self.plan.config
        own = without_layerskip(own) if kind == "plain" else own
        return replace(own, seed=own.seed + seed)

    def open(self, path: AnyPath) -> engines.OpenModel:
        """The checkpoint with its tokenizer."""
        return engines.open_model(ModelFlags(model=path))

    def engine(self, path: AnyPath) -> Engine:
        """An engine for the model. Texts that are no answers go on past their end."""
        return engines.load_engine(self.open(path), self.notes, ignore_end=not self.is_task)

    @cached_property
    def first(self) -> AnyPath:
        """The model that drafts, of the first seed."""
        return self.path("layerskip" if self.plan.asked.training else "given", 0)

    @cached_property
    def shape(self) -> LlamaConfig:
        """Shape of all models."""
        return self.open(self.first).source.config

    @cached_property
    def held_out(self) -> HeldOut:
        """Rows and prompts. The tokenizer is that of the first model, as of all others."""
        return self.held_out_of(self.open(self.first).tokenizer, self.shape)

    def held_out_of(self, tokenizer: Tokenizer, shape: LlamaConfig) -> HeldOut:
        """Rows and prompts in the tokens of a model."""
        asked = self.plan.asked
        return held_out(
            self.plan.config,
            tokenizer,
            num_batches=self.plan.num_batches,
            num_prompts=self.plan.num_prompts,
            max_new_tokens=asked.new_tokens,
            max_context=shape.max_context,
            sampling=asked.sampling,
            stop=TASKS[asked.task].stop if asked.task else (),
        )

    def check(self) -> None:
        """Raises ConfigError if the work would fail later: for bad data, prompts without room,
        exits or draft lengths that do not fit, or a missing package of the score."""
        config, asked = self.plan.config, self.plan.asked
        source = open_checkpoint(config.init_from or asked.model) if asked.model else None
        shape = config.model if source is None else source.config
        if asked.training:
            tokenizer = make_tokenizer(config.data, cache=cache_directory())
        else:
            tokenizer = load_tokenizer(asked.model)
        questions = self.held_out_of(tokenizer.fitted(shape.vocab_size), shape).questions
        if self.is_task:
            self.score("", questions[0])
        for exit_layer, length in product(self.exits(shape, ()), asked.num_draft_tokens):
            SelfSpeculative(exit_layer, length).validate(shape)

    def measured(self, kind: Kind, seed: int) -> Measured:
        """Measures one model, if it has not been measured."""
        file = self.directory / f"measured-{kind}-{seed}.json"
        if file.exists():
            return from_json(Measured, read_json(file, ConfigError), str(file))
        path = self.path(kind, seed)
        sums = self.scored(path)
        finite_E = np.isfinite(sums.loss_nE).all(0)
        check(
            finite_E.all(),
            f"the held-out loss of exit {finite_E.argmin() + 1} of {path} is not a number: its "
            "training diverged; lower the learning rate in a new --output",
        )
        rows = () if kind == "given" else read_metrics(path)
        # Without the time between a kill and the next start.
        clocks = [row["wall"] - row["restarts"] for row in rows if row["kind"] == TIME]
        found = Measured(
            kind=kind,
            seed=seed,
            exits=self.trained(path, kind),
            loss_nE=tuple(map(tuple, sums.loss_nE.tolist())),
            agreed_nE=tuple(map(tuple, sums.agreed_nE.tolist())),
            tokens_n=tuple(sums.tokens_n.tolist()),
            training=curve(rows),
            training_seconds=clocks[-1] if clocks else 0.0,
            answers=self.answered(kind, seed),
            about=self.about(),
            alike=self.alike(),
        )
        write_json(file, asdict(found))
        return found

    def trained(self, path: AnyPath, kind: Kind) -> tuple[int, ...]:
        """Exits with a loss in training, besides the last one; none if that is not known."""
        directory, _ = split_step(path)
        if kind == "plain" or not is_run(directory):
            return ()
        config = read_run_config(directory)
        with_loss = exits_with_loss(config.early_exit, self.shape.num_layers, config.num_steps)
        return config.exit_blocks.exits or with_loss

    def exits(self, shape: LlamaConfig, trained: tuple[int, ...]) -> tuple[int, ...]:
        """Exits of the static settings. trained: those that auto chooses from."""
        asked, layers = self.plan.asked, shape.num_layers
        usual = tuple(sorted({max(1, layers // part) for part in DEPTHS} - {layers}))
        return asked.exit_layers or trained or usual

    def scored(self, path: AnyPath) -> BatchSums:
        """Loss and agreement of every exit on the held-out rows."""
        return self.scorer(path)(bar(self.notes, "scoring the exits")(list(self.held_out.rows)))

    def scorer(self, path: AnyPath) -> Callable[[Iterable], BatchSums]:
        """Scores every exit of a model on batches."""
        names = ("dtype", "micro_batches", "attention", "kernels")
        settings = {name: getattr(self.plan.config, name) for name in names}
        model = stacked(load(path, dtype=choose_dtype("auto")))
        return partial(exits.score_batches, model, **settings)

    def answered(self, kind: Kind, seed: int) -> tuple[dict[str, Any], ...]:
        """Decodes the held-out prompts; without LayerSkip only for the score of a task."""
        if kind == "plain" and not self.is_task:
            return ()
        path = self.path(kind, seed)
        engine, held = self.engine(path), self.held_out
        strategies = [Autoregressive()] if kind == "plain" else self.strategies(path)
        asked = answers.conditions(
            engine, path.name, self.plan.asked.sampling, prompts=held.alike["prompts"]
        )

        def figures(question: answers.Question, done: Completion, base: Completion) -> dict:
            scores = self.score(done.text, question) if self.is_task else {}
            return speeds.timed_beside(engine, question, done, base) | {"scores": scores}

        file = self.directory / f"answers-{kind}-{seed}.jsonl"
        given = (engine, strategies, held.questions, asked, file, self.notes, figures)
        found = answers.complete(*given, timed=True)
        return tuple({k: v for k, v in one.items() if k not in LEFT_OUT} for one in found)

    def strategies(self, path: AnyPath) -> list[Strategy]:
        """Autoregressive decoding, auto, and each exit with each draft length. The fixed settings
        have the draft vocabulary that auto has."""
        asked, model = self.plan.asked, self.open(path)
        chosen = DecodingFlags(strategies=("autoregressive", "auto"), model=path)
        found = engines.make_strategies(chosen, model)
        own = self.exits(model.source.config, engines.trained_exits(model))
        if not own:
            return found
        static = DecodingFlags(
            model=path,
            strategies=("self_speculative",),
            exit_layers=own,
            num_draft_tokens=asked.num_draft_tokens,
            draft_vocab=found[-1].draft_vocab,
        )
        return found + engines.make_strategies(static, model)

    @property
    def score_name(self) -> str:
        """Name of the task's main score; empty for text."""
        question = answers.Question(id="", request=self.held_out.questions[0].request)
        return next(iter(self.score("", question))) if self.is_task else ""

    def score(self, text: str, question: answers.Question) -> Scores:
        """Scores of an answer: the task's, or whether it equals the reference."""
        task = self.plan.asked.task
        if task is not None:
            return TASKS[task].score(text, question)
        return exact_match(text, question.reference)

    def texts(self, model: Measured) -> list[dict[str, Any]]:
        """The first texts, by the fixed setting with the best ideal speedup. If none is faster than
        autoregressive decoding, drafts are looked up."""
        file = self.directory / "texts.json"
        if file.exists():
            return read_json(file, ConfigError, ("texts",))["texts"]
        path = self.path(model.kind, model.seed)
        engine, strategies = self.engine(path), self.strategies(path)
        ideals = {Cell.of(row): row["ideal"] or 0 for row in rows_of(self.shape, model)}
        strategy = max(strategies, key=lambda one: ideals[Cell.of(one)])
        if ideals[Cell.of(strategy)] <= 1:
            strategy = Adaptive(())
        engine.use(strategy)
        found = []
        for question in self.held_out.questions[:NUM_TEXTS]:
            (done,) = engine.generate([replace(question.request, log_probs=True)])
            text = with_origins(engine.tokenizer, question.request.prompt, done)
            found.append({"by": str(Cell.of(strategy)), **text})
        write_json(file, {"texts": found})
        return found

    def about(self) -> dict[str, str]:
        """Where, when and on what a model was measured."""
        asked, held = self.plan.asked, self.held_out
        how = "greedy" if not asked.sampling.temperature else "sampled, temperature "
        how += f"{asked.sampling.temperature:g}" * bool(asked.sampling.temperature)
        return {
            **machine.made_on(),
            "data": described(self.plan.config.data),
            "held out": f"{held.rows.rows.describe()}; {len(held.rows)} batches are scored",
            "prompts": f"{len(held.questions)}, at most {asked.new_tokens} new tokens, {how}",
            "dtype of decoding": f"{choose_dtype('auto')}",
        }

    def alike(self) -> dict[str, Any]:
        """What must be equal in reports that are compared."""
        asked = self.plan.asked
        return {
            "machine": machine.machine_name(),
            "dtype": choose_dtype("auto"),
            **self.held_out.alike,
            "new tokens": asked.new_tokens,
            "temperature": asked.sampling.temperature,
            "score": self.score_name,
        }
