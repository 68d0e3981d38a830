"""Reports made by hand."""

from typing import Any

from lsjax.config import LlamaConfig
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from lsjax.evaluation.scores import Cell
from lsjax.reporting.record import Measured, Report

SHAPE = LlamaConfig.tiny(vocab_size=100, num_layers=16)


def answer(
    strategy, prompt: int, seconds: float, drafted=(), accepted=(), **more
) -> dict[str, Any]:
    """An answer of 11 tokens beside a text of autoregressive decoding that took 10 s."""
    own = strategy._asdict() if isinstance(strategy, Cell) else Cell.of(strategy)._asdict()
    own |= {"id": str(prompt), "sample": 0, "group": "", "seen": False, "seed": None}
    own |= {"num_prompt_tokens": 5, "num_new_tokens": 11, "compile_seconds": 1.0, "rounds": 4}
    own |= {"decode_seconds": seconds, "base_seconds": 10.0, "base_num_new_tokens": 11}
    own |= {"difference": None, "sources": None}
    own |= {"drafted": sum(drafted), "accepted": sum(accepted), "repeated_4grams": 0.25}
    own |= {"drafted_by_position": [*drafted], "accepted_by_position": [*accepted]}
    return own | {"scores": {}} | more


def answers(exit_seconds=(5.0, 4.0), auto_seconds=(5.0, 5.0)) -> tuple[dict[str, Any], ...]:
    """Two prompts by autoregressive decoding, auto, and exit 1 with 2 and 3 drafts."""
    found = []
    for prompt in (0, 1):
        found += [
            answer(Autoregressive(), prompt, 10.0),
            answer(Cell("auto"), prompt, auto_seconds[prompt], [4], [2]),
            answer(SelfSpeculative(1, 2), prompt, 8.0, [5, 5], [4, 2]),
            answer(SelfSpeculative(1, 3), prompt, exit_seconds[prompt], [4, 4, 4], [4, 3, prompt]),
        ]
    return tuple(found)


def measured(kind: str, last: float, seed: int = 0, **more) -> Measured:
    """Two batches of 10 and 30 tokens. Exit E of 16 has the loss last + 16 - E in both, and an
    agreement of E / 16."""
    tokens = (10, 30)
    losses = tuple(tuple(n * (last + 16 - e) for e in range(1, 17)) for n in tokens)
    agreed = tuple(tuple(n * e / 16 for e in range(1, 17)) for n in tokens)
    own = dict(kind=kind, seed=seed, loss_nE=losses, agreed_nE=agreed, tokens_n=tokens)
    own |= dict(about={"machine": "a & b"}, alike={"machine": "m"})
    return Measured(**own | more)


def report(*models: Measured, **more) -> Report:
    """With LayerSkip and without, if no models are given."""
    if not models:
        models = measured("layerskip", 2.5, exits=(1, 2), answers=answers()), measured("plain", 2.0)
    own = dict(title="tiny <model>", shape=SHAPE, about={"machine": "a & b"}, recipe={})
    return Report(models=models, **own | more)
