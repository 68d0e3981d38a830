"""lm-evaluation-harness (EleutherAI) over an engine, at any exit and with any strategy.

lm_eval turns tasks into requests of three kinds:

    generate_until          decoded by the engine's strategy; its rows are refilled as texts end
    loglikelihood           scored (scoring.py) by one pass through the layers whose distribution
    loglikelihood_rolling   the strategy has: E for early exit, all for the others

This module alone imports lm_eval, which `pip install 'lsjax[eval]'` brings.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import maybe_truncate, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from lsjax.config import ConfigError, check
from lsjax.data.chat import render_chat
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling
from lsjax.evaluation.answers import Answer
from lsjax.evaluation.scoring import Score, Text, score

# What a task may say of sampling, with the engine's name for it.
SAMPLING = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    "no_repeat_ngram_size": "no_repeat_ngram",
}
BOOTSTRAP = 1000  # resamplings for a standard error that has no formula


class HarnessModel(TemplateLM):
    """An engine as lm_eval's model; `engine.use(strategy)` changes who answers from then on.

    name: of the model, for the results. seed: of the first sampled text; each further one has the
    next number. answers: who answered, by task and document, request by request.

    Context and continuation are encoded together and parted where the context's own tokens end, as
    lm_eval's models do it. A context that does not fit loses its beginning.
    """

    def __init__(self, engine: Engine, *, name: str = "lsjax", seed: int = 0):
        super().__init__()
        self.engine, self.name, self.seed = engine, name, seed
        self.tokenizer = engine.tokenizer
        self.answers: dict[tuple[str, int], list[Answer]] = defaultdict(list)
        self._encode = lru_cache(maxsize=4096)(self.tokenizer.encode)
        self._scores: dict[tuple, Score] = {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text. Raises ConfigError where there is none."""
        check(bool(self.tokenizer.eos_ids), "this tokenizer has no token that ends a text")
        return self.tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: the token that begins texts, else the one
        that ends them."""
        bos_id = self.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers apart in lm_eval's cache of requests."""
        return self.tokenizer.fingerprint

    @property
    def depth(self) -> int:
        """Layers that the distribution of the strategy's tokens comes from."""
        return self.engine.strategy.depth(self.engine.model.config)

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes into the config of its results."""
        answer = Answer.by(self.engine.strategy)
        return {
            "model": f"{self.name}, {answer}",
            "strategy": answer.strategy,
            "exit_layer": answer.exit_layer,
            "num_draft_tokens": answer.num_draft_tokens,
            "draft_vocab": answer.draft_vocab,
            "draft_confidence": answer.draft_confidence,
            "loglikelihood_layers": self.depth,
            "model_dtype": str(self.engine.model.dtype),
            "max_length": self.engine.max_length,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids. The beginning token comes first where the tokenizer puts it there, unless the
        text has it already, as one of a chat template may."""
        has_bos = string.startswith(self.tokenizer.special_tokens.get("bos_token", ""))
        add_bos = self.tokenizer.add_bos and add_special_tokens is not False and not has_bos
        return list(self._encode(string, add_bos=add_bos))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages in the model's chat template. Raises ChatTemplateError without one."""
        return render_chat(
            self.tokenizer.chat_template or "{{ raise_exception('this model has none') }}",
            chat_history,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.tokenizer.special_tokens,
        )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        found = super().loglikelihood(requests, disable_tqdm)
        return self._noted("loglikelihood", requests, found)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, window by window."""
        texts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            texts.append(Text([self.prefix_token_id, *ids], len(ids)))
        found = [one.log_prob for one in self._score(texts, disable_tqdm)]
        return self._noted("loglikelihood_rolling", requests, found)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The engine's texts, each up to the first of its `until` strings.

        Raises ConfigError for what a task says of generation and the engine does not do.
        """
        asked = [
            self._request(*request.args, seed=self.seed + number)
            for number, request in enumerate(requests)
        ]
        who = str(Answer.by(self.engine.strategy))
        with tqdm(total=len(asked), desc=who, disable=disable_tqdm) as bar:
            completions = self.engine.generate(asked, on_completion=lambda *_: bar.update())
        texts = [completion.text for completion in completions]
        return self._noted("generate_until", requests, texts, [Answer.of(c) for c in completions])

    def _request(self, context: str, settings: dict[str, Any], *, seed: int) -> Request:
        """lm_eval's request as the engine's."""
        try:
            settings = dict(normalize_gen_kwargs(settings))
        except ValueError as error:
            raise ConfigError(f"{error}: correct the task, or --gen-kwargs") from None
        until, room = settings.pop("until"), settings.pop("max_gen_toks")
        is_greedy = not settings.pop("do_sample", False)
        beams = settings.pop("num_beams", 1)
        check(beams == 1, f"the task asks for {beams} beams: add num_beams=1 to --gen-kwargs")
        unknown = ", ".join(sorted(settings.keys() - SAMPLING.keys()))
        check(not unknown, f"the task sets {unknown}, which the engine does not know")
        check(
            1 <= room < self.engine.max_length,
            f"the task asks for {room} new tokens, not 1..{self.engine.max_length - 1}: "
            "add a max_gen_toks there to --gen-kwargs",
        )
        sampling = {SAMPLING[name]: value for name, value in settings.items()}
        sampling["temperature"] = 0.0 if is_greedy else sampling.get("temperature", 1.0)
        for name, value in sampling.items():
            kinds = int if name in ("top_k", "no_repeat_ngram") else int | float
            check(
                isinstance(value, kinds),
                f"{name} is {value!r}, but must be a number: correct the task, or --gen-kwargs",
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        ids, _ = maybe_truncate(ids, room, self.engine.max_length)
        # Texts are without special tokens: the spelling of one is meant to end them as a token.
        special = {text: token for token, text in self.tokenizer.special_spelling.items()}
        return Request(
            prompt=ids,
            max_new_tokens=room,
            stop=tuple(text for text in until if text and text not in special),
            stop_ids=tuple(special[text] for text in until if text in special),
            sampling=Sampling(seed=seed, **sampling),
        )

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        texts = [
            Text([*(context or [self.prefix_token_id]), *continuation], len(continuation))
            for _, context, continuation in requests
        ]
        return [(one.log_prob, one.is_greedy) for one in self._score(texts, disable_tqdm)]

    def _score(self, texts: Sequence[Text], quiet: bool) -> list[Score]:
        """Scores of the texts. What strategies of one depth ask again is known."""
        engine, depth = self.engine, self.depth
        keys = [(depth, text.count, _digest(text.tokens)) for text in texts]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._scores}
        found = score(
            engine.model,
            list(new.values()),
            exit_layer=depth,
            batch_size=engine.batch_size,
            max_length=engine.max_length,
            mesh=engine.mesh,
            track=partial(tqdm, desc=str(Answer.forward_pass(depth)), disable=quiet or not new),
        )
        self._scores.update(zip(new, found, strict=True))
        return [self._scores[key] for key in keys]

    def _noted(
        self,
        kind: str,
        requests: list[Instance],
        results: list,
        answers: Sequence[Answer] | None = None,
    ) -> list:
        """The results, once it is noted who gave them (a forward pass by default) and lm_eval's
        cache, if there is one, has them."""
        answers = answers or [Answer.forward_pass(self.depth)] * len(requests)
        for request, result, answer in zip(requests, results, answers, strict=True):
            self.answers[request.task_name, request.doc_id].append(answer)
            self.cache_hook.add_partial(kind, request.args, result)
        return results


def find_tasks(names: Sequence[str], directory: Path | None = None) -> tuple[TaskManager, list]:
    """lm_eval's index of tasks, and those of these names or patterns; tasks of the directory come
    first, and where they are all, lm_eval's own 14 thousand are not looked through.

    Raises ConfigError for a name that no task has.
    """
    for own in (True, False):
        if own and directory is None:
            continue
        manager = TaskManager(
            include_path=None if directory is None else str(directory), include_defaults=not own
        )
        found = {name: manager.match_tasks([name]) for name in names}
        if all(found.values()):
            break
    for name in names:
        check(
            bool(found[name]),
            f"no task is called {name}: `lm_eval ls tasks` lists lm_eval's own, and --task-path "
            "names a directory with more",
        )
    return manager, [task for name in names for task in found[name]]


def evaluate(model: HarnessModel, manager: TaskManager, tasks: list, **options: Any) -> dict:
    """`lm_eval.simple_evaluate`; each of its samples also says under "answered_by" who answered
    its requests. options: simple_evaluate's.

    Raises what lm_eval raises for a task that is wrong or whose data can't be had.
    """
    # lm_eval would bootstrap in forks of this process, which has JAX's threads.
    os.environ["DISABLE_MULTIPROC"] = "1"
    model.answers.clear()
    results = simple_evaluate(
        model, tasks=tasks, task_manager=manager, bootstrap_iters=BOOTSTRAP, **options
    )
    for task, samples in results["samples"].items():
        for sample in samples:
            answers = model.answers[task, sample["doc_id"]]
            sample["answered_by"] = [answer.to_json() for answer in answers]
    return results


def _digest(tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()
