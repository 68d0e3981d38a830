"""What can be asked of decode.py, and what it means: requests and a strategy."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lsjax.checkpoints import read_generation_defaults
from lsjax.cli.prompts import read_requests
from lsjax.cli.setup import cache_directory
from lsjax.config import ConfigError, MeshConfig, check
from lsjax.data.chat import chat_prompt
from lsjax.data.token_counts import find_counts
from lsjax.data.tokenizers import Tokenizer
from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.request import Request
from lsjax.decoding.sampling import Sampling
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Continues prompts with a Llama."""

    model: Path
    """Hugging Face directory (config.json, safetensors, tokenizer), .gguf file, or directory of a
    training run (RUN@200 and RUN@best are steps of it)."""
    prompt: str | None = None
    """Text to continue."""
    prompt_file: Path | None = None
    """Prompts: .txt is one prompt, .jsonl has an object with "prompt" on each line, which may say
    of its own: max_new_tokens, stop, stop_ids, temperature and all that is about tokens here."""
    interactive: bool = False
    """A chat in the terminal, in the model's chat template."""
    strategy: Literal["autoregressive", "early_exit", "self_speculative"] = "autoregressive"
    """All layers for each token; the first layers only; or drafts by the first layers that the
    others verify: the same tokens as autoregressive."""
    exit_layer: int | None = None
    """Layers that draft, or that early_exit runs. Self-speculation takes it from the model's
    generation_config.json (assistant_early_exit) if that has it."""
    num_draft_tokens: int | None = None
    """Tokens drafted in a round (from num_assistant_tokens of the model, if it has that)."""
    draft_vocab: int | None = None
    """Drafts from this many of the most frequent tokens only: a cheaper head, the same text.
    python -m lsjax.cli.count_tokens counts them."""
    draft_confidence: float | None = None
    """Ends a draft before the token with which the exit gives it less than this probability: fewer
    drafts in vain, the same text."""
    max_new_tokens: int = 128
    """Ends a text that does not end by itself."""
    temperature: float = 0.0
    """0 is greedy: the likeliest token each time. Above 0 tokens are drawn, with logits divided by
    this."""
    top_k: int = 0
    """Draws from the k likeliest tokens only; 0 is all."""
    top_p: float = 1.0
    """Draws from the fewest tokens whose probabilities sum up to p."""
    min_p: float = 0.0
    """Draws from tokens at least min_p times as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that were there before, and multiplies those below."""
    no_repeat_ngram: int = 0
    """Says no n-gram of this size twice; 0 allows all."""
    seed: int = 0
    """Of the first text; each further one has the next number."""
    num_samples: int = 1
    """Texts for each prompt."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Ends a text where it would contain this; may be given several times."""
    stop_ids: tuple[int, ...] = ()
    """Token ids that end a text, beside the model's own."""
    logprobs: bool = False
    """Writes the log-probability of each new token to the JSON lines."""
    chat: bool = False
    """Puts the prompt into the model's chat template, as a user's message."""
    system: str | None = None
    """With --chat or --interactive: the system message."""
    batch_size: int = 1
    """Prompts decoded side by side."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and cache; auto is float32 on CPUs and bfloat16 on accelerators."""
    stack_layers: bool = False
    """Runs the layers in a loop: for models so deep that programs with every layer in them take
    too long to compile. Each token takes longer."""
    max_length: int | None = None
    """Of prompt and new tokens together; the model's context by default."""
    mesh: MeshConfig = MeshConfig()
    """Devices to decode on; one by default."""
    json: Path | None = None
    """Writes a JSON object a text to this file ("-": to standard output, and nothing else)."""
    show_drafts: bool = False
    """Shows which tokens the draft proposed and what the verification made of them."""


def prompt_ids(tokenizer: Tokenizer, prompt: str, arguments: Arguments) -> list[int]:
    """Token ids of a prompt, in the chat template if asked for."""
    if not (arguments.chat or arguments.interactive):
        return tokenizer.encode(prompt)
    text = chat_prompt(tokenizer, prompt, arguments.system)
    return tokenizer.encode(text, add_bos=False)


def choose_strategy(arguments: Arguments, tokenizer: Tokenizer) -> Strategy:
    """The strategy that the arguments name; a self-speculative one may leave exit and draft
    length to the model's directory.

    Raises ConfigError for a missing number, and for one that the strategy does not use.
    """
    exit_layer, drafts = arguments.exit_layer, arguments.num_draft_tokens
    if arguments.strategy != "self_speculative":
        for name in ("num_draft_tokens", "draft_vocab", "draft_confidence"):
            check(
                getattr(arguments, name) is None,
                f"--{name.replace('_', '-')} means nothing to {arguments.strategy}",
            )
    match arguments.strategy:
        case "autoregressive":
            check(exit_layer is None, "--exit-layer means nothing to autoregressive decoding")
            return Autoregressive()
        case "early_exit":
            check(exit_layer is not None, "early_exit needs --exit-layer, the layers to run")
            return EarlyExit(exit_layer)
    defaults = read_generation_defaults(arguments.model)
    exit_layer = defaults.exit_layer if exit_layer is None else exit_layer
    drafts = defaults.num_draft_tokens if drafts is None else drafts
    if exit_layer is None or drafts is None:
        raise ConfigError(
            f"self_speculative needs --exit-layer and --num-draft-tokens: {arguments.model} does "
            "not say them"
        )
    vocabulary = None
    if arguments.draft_vocab is not None:
        counts = find_counts(arguments.model, cache_directory(), tokenizer)
        size = arguments.draft_vocab
        vocabulary = DraftVocabulary.most_frequent(counts, size, tokenizer.vocab_size)
    return SelfSpeculative(
        exit_layer, drafts, vocabulary, draft_confidence=arguments.draft_confidence
    )


def check_together(arguments: Arguments) -> None:
    """Raises ConfigError for arguments that do not fit each other."""
    check(
        arguments.num_samples >= 1,
        f"--num-samples {arguments.num_samples} is below 1: choose 1 or more",
    )
    check(
        arguments.chat or arguments.interactive or arguments.system is None,
        "--system needs --chat or --interactive: give one of them, or no --system",
    )
    check("" not in arguments.stop, "--stop is empty: give the text to stop at")
    check(
        arguments.json is not None or not arguments.logprobs,
        "--logprobs needs --json, the file that they are written to: give both or none",
    )
    if arguments.interactive:
        for name in ("prompt", "prompt_file"):
            check(
                getattr(arguments, name) is None,
                f"--{name.replace('_', '-')} means nothing to --interactive: leave it out",
            )
        check(arguments.num_samples == 1, "--num-samples means nothing to --interactive")
        check(arguments.batch_size == 1, "--batch-size means nothing to --interactive")


def default_request(arguments: Arguments) -> Request:
    """What the arguments say of every text."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    return Request(
        prompt="",
        max_new_tokens=arguments.max_new_tokens,
        stop=arguments.stop,
        stop_ids=arguments.stop_ids,
        log_probs=arguments.logprobs,
        sampling=Sampling(**{name: getattr(arguments, name) for name in names}),
    )


def choose_requests(arguments: Arguments) -> list[Request]:
    """Every text that is asked for, each with a seed of its own; of a chat one that stands for its
    turns.

    Raises ConfigError for a number out of its range, and for one that greedy decoding ignores.
    """
    default = default_request(arguments)
    if arguments.interactive:
        requests = [dataclasses.replace(default, prompt="?")]  # the shortest message
    else:
        requests = read_requests(
            arguments.prompt, arguments.prompt_file, default, arguments.num_samples
        )
    if all(request.sampling.temperature == 0 for request in requests):
        plain = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "num_samples": 1, "seed": 0}
        for name, value in plain.items():
            check(
                getattr(arguments, name) == value,
                f"--{name.replace('_', '-')} means nothing to greedy decoding: choose a "
                "--temperature above 0",
            )
    return requests
