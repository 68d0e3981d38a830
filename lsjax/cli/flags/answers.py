"""Writes a model's own answers to prompts, for the training of exit blocks.

    lsjax answers --model PATH --chat --prompt-file prompts.jsonl --output answers
    lsjax answers --model PATH --chat --num-prompts 2000 --output answers

Without a file, a chat model writes the prompts too: its chat template ends where the user would
write. The directory --output gets three files. prompts.jsonl has the prompts that the model wrote.
answers.jsonl has an object with "prompt" and "text" on each line. asked.json has the settings. The
same command resumes a killed one. More prompts add answers.
"""

from dataclasses import dataclass

from lsjax.cli.flags.parse import Program
from lsjax.cli.flags.shared import ChatFlags, ModelFlags, SamplingFlags
from lsjax.config import GREEDY, AnyPath, bounded, check


@dataclass(frozen=True, kw_only=True)
class Arguments(ChatFlags, ModelFlags):
    """Writes a model's own answers to prompts."""

    output: AnyPath
    """Directory of the answers."""
    prompt_file: AnyPath | None = None
    """File of prompts, as that of decode.py."""
    num_prompts: int = bounded(0, low=0)
    """Number of prompts that the model writes itself, without a file."""
    max_new_tokens: int = bounded(128, low=1)
    """Maximum number of tokens of an answer."""
    sampling: SamplingFlags = GREEDY
    """Choice of the answers' tokens. Prompts are sampled with temperature 1."""
    batch_size: int = bounded(16, low=1)
    """Prompts decoded in parallel."""

    def __post_init__(self):
        super().__post_init__()
        check(
            (self.prompt_file is None) == (self.num_prompts > 0),
            "give one of --prompt-file and --num-prompts",
        )
        check(
            self.chat or self.prompt_file is not None,
            "--num-prompts needs a chat model: add --chat, or give --prompt-file",
        )


PROGRAM = Program(
    "answers",
    "lsjax.cli.answers:answer",
    Arguments,
    __doc__,
    common="""
        model output prompt_file num_prompts chat system max_new_tokens temperature seed
        batch_size dtype
    """,
    usage="--model PATH --output DIRECTORY",
)
