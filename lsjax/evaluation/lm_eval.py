"""Runs lm-evaluation-harness (EleutherAI) on an engine, at any exit and with any strategy.

lm_eval turns tasks into requests of three kinds:

    generate_until          decoded by the engine's strategy; rows are refilled as texts end
    loglikelihood           scored by one pass through the layers that the strategy's distribution
    loglikelihood_rolling   comes from: E for early exit, all for the others

Only this module imports lm_eval, which `pip install 'lsjax[eval]'` installs.
"""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from itertools import islice
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_table  # noqa: F401
from tqdm import tqdm

from lsjax.config import AnyPath, ConfigError, Sampling, check
from lsjax.data.chat import render_chat
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.evaluation.exits import score_texts
from lsjax.evaluation.scores import Cell

SAMPLING = {field.name for field in dataclasses.fields(Sampling)} - {"seed"}


class EngineLM(TemplateLM):
    """An engine as lm_eval's model. `engine.use(strategy)` changes the strategy of later answers.

    name: the model's name in the results. seed: seed of the first sampled text; each further text
    has the next seed. A context that does not fit is truncated at its beginning.
    """

    def __init__(self, engine: Engine, *, name: str = "lsjax", seed: int = 0):
        super().__init__()
        self.engine, self.name, self.seed = engine, name, seed
        self.tokenizer = engine.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises ConfigError if the tokenizer has no such token."""
        check(bool(self.tokenizer.eos_ids), "this tokenizer has no token that ends a text")
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """Context of a text without one: the token that begins texts, or that ends them."""
        bos_id = self.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in lm_eval's cache of requests."""
        return self.tokenizer.fingerprint

    @property
    def depth(self) -> int:
        """Number of layers that the distribution of the strategy's tokens comes from."""
        return self.engine.strategy.depth(self.engine.model.config)

    def get_model_info(self) -> dict[str, Any]:
        """The model's entries in the config of lm_eval's results."""
        cell = Cell.of(self.engine.strategy)
        model = {"model": f"{self.name}, {cell}", "loglikelihood_layers": self.depth}
        return model | cell._asdict()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids. The beginning token is added, unless the text (of a chat template) has it."""
        has_bos = string.startswith(self.tokenizer.special_tokens.get("bos_token", ""))
        add_bos = self.tokenizer.add_bos and add_special_tokens is not False and not has_bos
        return self.tokenizer.encode(string, add_bos=add_bos)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages in the model's chat template. Raises ChatTemplateError without one."""
        return render_chat(
            self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each complete text, window by window."""
        texts, windows = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            prefix, length = self.prefix_token_id, self.engine.max_length
            own = [*get_rolling_token_windows(ids, prefix, length, context_len=1)]
            texts += [([*inputs, scored[-1]], len(scored)) for inputs, scored in own]
            windows.append(len(own))
        scores = iter(self._score(texts, disable_tqdm))
        return [sum(log_prob for log_prob, _ in islice(scores, count)) for count in windows]

    def _loglikelihood_tokens(
        self, requests: list[tuple], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would produce it.
        requests: texts, ids of the context, ids of the continuation."""
        texts = []
        for _, context, continuation in requests:
            tokens = [*(context or [self.prefix_token_id]), *continuation]
            tokens = tokens[-self.engine.max_length - 1 :]
            texts.append((tokens, min(len(continuation), len(tokens) - 1)))
        return self._score(texts, disable_tqdm)

    def _score(self, texts: Sequence, quiet: bool) -> list[tuple[float, bool]]:
        runtime = self.engine.runtime
        return score_texts(
            runtime.model,
            texts,
            exit_layer=self.depth,
            batch_size=runtime.batch_size,
            mesh=runtime.mesh,
            kernels=runtime.kernels,
            track=partial(tqdm, desc=f"one pass of {self.depth} layers", disable=quiet),
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The engine's texts, each up to the first of its `until` strings.

        Raises ConfigError for generation settings that the engine does not support.
        """
        first = Sampling(seed=self.seed)
        seeds = [first.of_text(number).seed for number in range(len(requests))]
        asked = [
            self._request(*request.args, seed=seed)
            for request, seed in zip(requests, seeds, strict=True)
        ]
        who = str(Cell.of(self.engine.strategy))
        with tqdm(total=len(asked), desc=who, disable=disable_tqdm) as bar:
            completions = self.engine.generate(asked, on_completion=lambda *_: bar.update())
        return [completion.text for completion in completions]

    def _request(self, context: str, settings: dict[str, Any], *, seed: int) -> Request:
        """Converts lm_eval's request to the engine's."""
        try:
            sampling = dict(normalize_gen_kwargs(settings))
        except ValueError as error:
            raise ConfigError(f"{error}: correct the task, or --gen-kwargs") from None
        until, room = sampling.pop("until"), sampling.pop("max_gen_toks")
        draws, beams = sampling.pop("do_sample", False), sampling.pop("num_beams", 1)
        sampling["no_repeat_ngram"] = sampling.pop("no_repeat_ngram_size", 0)
        sampling["temperature"] = sampling.get("temperature", 1.0) if draws else 0.0
        check(beams == 1, f"the task requests {beams} beams: add num_beams=1 to --gen-kwargs")
        unknown = ", ".join(sorted(sampling.keys() - SAMPLING))
        check(not unknown, f"the task sets {unknown}, which the engine lacks: drop them")
        length = self.engine.max_length
        check(
            1 <= room < length,
            f"the task requests {room} new tokens, which is out of range: "
            f"add a max_gen_toks in 1..{length - 1} to --gen-kwargs",
        )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        # Texts contain no special tokens: a stop string that spells one becomes a stop id.
        special = {text: token for token, text in self.tokenizer.special_spelling.items()}
        return Request(
            prompt=ids[-(length - room) :],
            max_new_tokens=room,
            stop=tuple(text for text in until if text and text not in special),
            stop_ids=tuple(special[text] for text in until if text in special),
            sampling=Sampling(seed=seed, **sampling),
        )


def find_tasks(names: Sequence[str], directory: AnyPath | None = None) -> dict[str, Any]:
    """Options of `evaluate`: the tasks with these names or patterns, and their index. They come
    from a directory's .yaml files, or else from lm_eval. Raises ConfigError for an unknown name."""
    include = None if directory is None else str(directory)
    manager = TaskManager(include_path=include, include_defaults=directory is None)
    unknown = ", ".join(name for name in names if not manager.match_tasks([name]))
    check(
        not unknown,
        f"no task is called {unknown}: `lm_eval ls tasks` lists lm_eval's own, and --task-path "
        "names a directory with others",
    )
    return {"tasks": manager.match_tasks(list(names)), "task_manager": manager}


def evaluate(model: EngineLM, output: AnyPath | None = None, **options: Any) -> dict:
    """Runs `simple_evaluate` with these options, and saves the results in `output`."""
    # Otherwise lm_eval bootstraps in forks of this process, which are unsafe with JAX.
    os.environ["DISABLE_MULTIPROC"] = "1"
    tracker = None if output is None else EvaluationTracker(output_path=str(output))
    folder = model.get_model_info()["model"].replace(", ", "_").replace(" ", "_")
    options |= {"model_args": {"model": folder}, "evaluation_tracker": tracker}
    # Iterations are for standard errors without a formula.
    results = simple_evaluate(model, bootstrap_iters=1000, **options)
    if tracker is not None:
        tracker.save_results_aggregated(results, results["samples"])
        for task, samples in results["samples"].items():
            tracker.save_results_samples(task, samples)
    return results
