"""Continues prompts: autoregressively, from an early exit, or self-speculatively.

    python decode.py --model PATH --prompt "Once upon a time"
    python decode.py --model PATH --prompt-file prompts.jsonl --strategy self_speculative \\
        --exit-layer 8 --num-draft-tokens 4 --json results.jsonl
    python decode.py --model PATH --interactive

docs/decoding.md explains the strategies and what is printed.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from lsjax.cli.flags.parse import Program
from lsjax.cli.flags.shared import ChatFlags, ModelFlags, SamplingFlags, StrategyFlags
from lsjax.config import GREEDY, AnyPath, bounded, check


@dataclass(frozen=True, kw_only=True)
class Arguments(ChatFlags, StrategyFlags, ModelFlags):
    """Continues prompts with a Llama."""

    prompt: str | None = None
    """Text to continue."""
    prompt_file: AnyPath | None = None
    """File of prompts. A .txt file is one prompt. A .jsonl file has an object with "prompt" on each
    line, and optionally max_new_tokens, stop, stop_ids, and sampling fields such as temperature."""
    interactive: bool = False
    """Chats in the terminal, with the model's chat template."""
    max_new_tokens: int = 128
    """Maximum number of new tokens."""
    sampling: SamplingFlags = GREEDY
    """Choice of tokens: penalties apply first, then temperature, top_k, top_p and min_p."""
    num_samples: int = bounded(1, low=1)
    """Number of texts per prompt."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text before this string; may be repeated."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a text, in addition to the model's own."""
    logprobs: bool = False
    """Writes the log-probability of each new token to the JSON lines."""
    json: AnyPath | None = None
    """Writes one JSON object per text to this file. With "-", standard output has only these."""
    show_drafts: bool = False
    """Colours accepted drafts, rejected drafts, and the model's own tokens."""
    profile: AnyPath | None = None
    """Writes a trace of decoding, for xprof or TensorBoard, to this directory."""

    def __post_init__(self):
        if self.interactive:
            object.__setattr__(self, "chat", True)
        super().__post_init__()
        check(
            self.json is not None or not self.logprobs,
            "--logprobs needs --json, the file to write them to: add --json or drop --logprobs",
        )
        for name in ("prompt", "prompt_file", "num_samples", "batch_size"):
            check(
                not self.interactive or getattr(self, name) == getattr(Arguments, name),
                f"{self.name_of(name)} has no effect with --interactive: leave it out",
            )


PROGRAM = Program(
    "decode",
    "lsjax.cli.decode:decode",
    Arguments,
    __doc__,
    common="""
        model prompt prompt_file interactive strategies exit_layers num_draft_tokens
        max_new_tokens temperature top_p seed num_samples stop chat system show_drafts json
        batch_size dtype
    """,
    usage="--model PATH",
)
