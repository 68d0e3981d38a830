"""Writes a model's own answers to prompts. Without a file, the model writes the prompts too."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from itertools import count, islice
from typing import Any

from rich.console import Console

from lsjax.checkpoints.exit_blocks import base_fingerprint
from lsjax.cli.decode import generate_all
from lsjax.cli.engines import check_sampling, load_engine, open_model
from lsjax.cli.flags.answers import Arguments
from lsjax.cli.notes import notes_console
from lsjax.cli.prompts import prompt_rows, read_request
from lsjax.cli.setup import waiting
from lsjax.config import AnyPath, ConfigError, Sampling, check
from lsjax.config.checked import differences, shown
from lsjax.data.chat import Dialogue, render_chat
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.completion import Completion
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request, encode_prompt
from lsjax.io.files import read_json, write_json, write_whole
from lsjax.io.lines import Lines
from lsjax.io.rows import Fields

PROMPTS, ANSWERS, ASKED = "prompts.jsonl", "answers.jsonl", "asked.json"
PROMPT_TOKENS = 128  # of a prompt that the model writes
PATIENCE = 64  # such prompts in a row that do not end
USER = "\x00"  # stands for the user's message in a chat template


def answer(arguments: Arguments) -> None:
    """Writes the missing prompts and answers.

    Raises ConfigError, CheckpointError, TokenizerError or OSError, each in one line, for bad input.
    """
    notes, directory = notes_console(), arguments.output
    check_sampling(arguments.sampling, 1)
    with waiting(notes, f"opening {arguments.model.name}"):
        model = open_model(arguments)
    engine = load_engine(model, notes, long_lived=True)
    directory.mkdir(parents=True, exist_ok=True)
    check_asked(directory / ASKED, arguments, engine)
    file = arguments.prompt_file
    if file is None:
        file = directory / PROMPTS
        write_prompts(engine, arguments, file, notes)
    given = [
        read_request(where, row, default_request(arguments), number)
        for number, (_, where, row) in enumerate(prompt_rows([], file))
    ]
    check(bool(given), f"{file} has no prompts: add at least one")
    asked = [as_prompt(one, arguments, engine) for one in given]
    known = Counter(str(row.get("prompt")) for row in whole_rows(directory / ANSWERS))
    missing = []
    for text, request in asked:
        if known[text]:
            known[text] -= 1
        else:
            missing.append((text, request))

    def line(index: int, completion: Completion) -> Fields:
        text, _ = missing[index]
        return {"prompt": text, "text": completion.text, "ended_by": completion.finish_reason}

    requests = [request for _, request in missing]
    write_texts(engine, requests, directory / ANSWERS, line, notes)
    print(f"{len(asked)} answers: {directory / ANSWERS}")


def default_request(arguments: Arguments) -> Request:
    """The request of a row that has a prompt alone."""
    new = arguments.max_new_tokens
    return Request(prompt="?", max_new_tokens=new, sampling=arguments.sampling)


def as_prompt(request: Request, arguments: Arguments, engine: Engine) -> tuple[str, Request]:
    """The prompt as text for training, and the request with its ids. A beginning-of-text token is
    not in the text, as training puts it before each prompt."""
    tokenizer, text = engine.tokenizer, request.prompt
    ids = text
    if arguments.chat:
        text, ids = Dialogue(tokenizer, arguments.system).prompt(text)
        if tokenizer.add_bos:
            text = text.removeprefix(tokenizer.special_tokens.get("bos_token", ""))
    request = replace(request, prompt=ids)
    ids = encode_prompt(request, tokenizer, engine.model, engine.max_length)
    return text, replace(request, prompt=ids)


def write_prompts(engine: Engine, arguments: Arguments, file: AnyPath, notes: Console) -> None:
    """Adds prompts to the file, as the user of the chat would write them. Each has the seed of its
    text. Empty ones are left out, and so are those that do not end."""
    header = user_header(engine.tokenizer, arguments.system)
    ids = engine.tokenizer.encode(header, add_bos=False)
    rows = whole_rows(file)
    check(
        all(isinstance(row.get("seed"), int) for row in rows),
        f"{file} has prompts that the model did not write: give them as --prompt-file",
    )
    seeds = count(max((row["seed"] + 1 for row in rows), default=arguments.sampling.seed))
    missing, failed = arguments.num_prompts - len(rows), 0
    while missing > 0:
        # Some are left out, so a batch more is asked for.
        chosen = [*islice(seeds, missing + engine.batch_size)]

        def line(index: int, completion: Completion, chosen=chosen) -> Fields | None:
            text = completion.text.strip()
            ended = text and completion.finish_reason != "length"
            return {"prompt": text, "seed": chosen[index]} if ended else None

        requests = [
            Request(
                prompt=ids,
                max_new_tokens=PROMPT_TOKENS,
                sampling=Sampling(temperature=1.0, seed=seed),
            )
            for seed in chosen
        ]
        written = write_texts(engine, requests, file, line, notes)
        failed = 0 if written else failed + len(requests)
        check(
            failed < PATIENCE,
            f"none of {failed} prompts that the model wrote has text and ends within "
            f"{PROMPT_TOKENS} tokens: give --prompt-file",
        )
        missing -= written


def user_header(tokenizer: Tokenizer, system: str | None) -> str:
    """The chat template up to the place where the user writes. Raises ChatTemplateError."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": USER})
    text = render_chat(tokenizer, messages, add_generation_prompt=False)
    check(USER in text, "the chat template changes the user's message: give --prompt-file")
    return text[: text.index(USER)]


def write_texts(
    engine: Engine,
    requests: Sequence[Request],
    file: AnyPath,
    line: Callable[[int, Completion], Fields | None],
    notes: Console,
) -> int:
    """Adds the texts to the file. Returns how many have a line."""
    written = 0
    with closing(Lines(file)) as lines:

        def show(index: int, completion: Completion) -> None:
            nonlocal written
            row = line(index, completion)
            if row is not None:
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1

        if requests:
            generate_all(engine, requests, notes, show)
    return written


def whole_rows(file: AnyPath) -> list[dict[str, Any]]:
    """Rows of a file, without an incomplete last line, which is cut off. Raises ConfigError for a
    line that is not an object."""
    content = file.read_bytes() if file.exists() else b""
    end = content.rfind(b"\n") + 1
    if end < len(content):
        write_whole(file, content[:end])
    try:
        rows = [json.loads(line) for line in content[:end].splitlines()]
    except ValueError:
        rows = [None]
    check(all(isinstance(row, dict) for row in rows), f"{file} has lines that are not objects")
    return rows


def check_asked(file: AnyPath, arguments: Arguments, engine: Engine) -> None:
    """Notes the settings of new answers. Raises ConfigError if those of earlier ones differ."""
    model = engine.model
    now = {
        "weights": base_fingerprint(model, model.dtype),
        "chat": arguments.chat,
        "system": arguments.system,
        "max_new_tokens": arguments.max_new_tokens,
        "sampling": asdict(arguments.sampling),
    }
    before = read_json(file, ConfigError) if file.exists() else None
    if before is None:
        write_json(file, now)
        return
    changes = ", ".join(
        f"{name} was {shown(was)} and is now {shown(is_)}"
        for name, was, is_ in differences(before, now)
    )
    check(not changes, f"{file.parent} has other answers ({changes}): choose another --output")
