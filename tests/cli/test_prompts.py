"""Prompts from files, and requests with settings of their own."""

import dataclasses
import io
import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from lsjax.cli import benchmark
from lsjax.cli.engines import OpenModel
from lsjax.cli.evaluate import read_questions
from lsjax.cli.prompts import Arguments, choose_requests, prompt_rows
from lsjax.config import ConfigError, LlamaConfig, Sampling
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.request import Request

MODEL = Path("nowhere")


def read_prompts(prompt, file) -> list[str]:
    asked = choose_requests(Arguments(model=MODEL, prompt=prompt, prompt_file=file))
    return [request.prompt for request in asked]


@pytest.mark.parametrize(
    "name, content, prompts",
    [
        ("p.txt", "one\ntwo\n", ["one\ntwo"]),  # the editor's last line break is not meant
        ("p.txt", "one\n\n", ["one\n"]),
        ("p.txt", "  a", ["  a"]),
        ("p.txt", "\ufeffa", ["a"]),  # the mark that Windows puts first
        ("p.jsonl", '{"prompt": "é\\n"}\n\n  \n{"id": 1, "prompt": "b"}', ["é\n", "b"]),
        ("p.jsonl", '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n', ["a", "b"]),
        ("p.jsonl", '{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}\n', ["a\u2028b\x85c", "d"]),
        ("p.jsonl", '{"prompt": "\\ud83d\\ude42 \\u0000"}', ["🙂 \0"]),
        ("p.jsonl", '{"turns": ["a", "b"]}\n', ["a"]),
    ],
)
def test_reads(tmp_path, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(None, tmp_path / name) == prompts


def test_a_prompt_is_taken_as_it_is():
    assert read_prompts("a\n", None) == ["a\n"]


ONE = b'{"prompt": "a"}\n'


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", b"", "p.txt is an empty prompt: it needs at least one character"),
        ("p.txt", b"\n", "p.txt is an empty prompt"),
        ("p.txt", b"a\nb\xff", "p.txt, line 2 is not UTF-8 text: save it as UTF-8"),
        ("p.md", b"a", "p.md: extension '.md' is not one of .jsonl, .tsv, .csv"),
        ("p", b"a", "p: extension '' is not one of .jsonl, .tsv, .csv"),
        ("p.jsonl", b"", "p.jsonl: every file is empty: name others"),
        ("p.jsonl", b"\n \n", "p.jsonl has no prompts: add"),
        ("p.jsonl", ONE + b'{"prompt": "b"', "line 2 is not JSON (Expecting ',' delimiter)"),
        ("p.jsonl", ONE + b"\nhello\n", "line 3 is not JSON (Expecting value)"),
        ("p.jsonl", ONE + b'{"prompt": "a\0b"}', "line 2 is not JSON (Invalid control character"),
        ("p.jsonl", ONE + b'{"prompt": "\xc3"}', "line 2 is not UTF-8"),
        ("p.jsonl", ONE + b'{"n": ' + b"1" * 5000 + b"}", "line 2 is not JSON (Exceeds the limit"),
        ("p.jsonl", ONE + b"[" * 200_000, "line 2 is not JSON"),
        ("p.jsonl", ONE + b'{"text": "b"}', 'line 2 is not an object with a text under "prompt"'),
        ("p.jsonl", ONE + b'{"prompt": 3}', "line 2 is not an object with"),
        ("p.jsonl", ONE + b'{"prompt": null}', "line 2 is not an object with"),
        ("p.jsonl", ONE + b'"b"', "line 2 is not an object"),
        ("p.jsonl", ONE + b'{"prompt": ""}', "line 2 is an empty prompt"),
        ("p.jsonl", ONE + b'{"prompt": "\\ud800"}', r"line 2 contains '\ud800', a lone surrogate"),
        ("p.jsonl", b'{"turns": []}', "line 1 is not an object with"),
    ],
)
def test_refuses_with_file_and_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        read_prompts(None, tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("prompt, both", [(None, ""), ("a", " and not both")])
def test_one_source_of_prompts(tmp_path, prompt, both):
    with pytest.raises(ConfigError, match=f"give one of --prompt and --prompt-file{both}$"):
        read_prompts(prompt, tmp_path / "p.txt" if prompt else None)


def test_refuses_an_empty_prompt():
    with pytest.raises(ConfigError, match="--prompt is an empty prompt"):
        read_prompts("", None)


DEFAULT = dict(
    model=MODEL,
    max_new_tokens=9,
    stop=("x",),
    stop_ids=(5,),
    sampling=Sampling(temperature=0.5, top_k=4, seed=40),
    logprobs=True,
    json=Path("-"),
)


def requests_of(tmp_path, *rows, num_samples=1):
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return choose_requests(Arguments(prompt_file=file, num_samples=num_samples, **DEFAULT))


def test_an_object_says_what_is_its_own(tmp_path):
    """Each option there, the rest by default; one stop or a list of them, which may be empty."""
    numbers = dict(temperature=1, top_k=7, top_p=0.9, min_p=0.1, seed=3)
    repeats = dict(repetition_penalty=1.5, no_repeat_ngram=2)
    ends = dict(max_new_tokens=3, stop="end", stop_ids=7)
    found = requests_of(
        tmp_path,
        {"prompt": "a"} | numbers | repeats | ends,
        {"prompt": "b", "stop": ["y", "z"], "stop_ids": [1, 2], "reference": "left alone"},
        {"turns": ["c", "d"], "stop": [], "temperature": 0, "top_p": None},
    )
    assert found[0] == Request(
        prompt="a",
        max_new_tokens=3,
        stop=("end",),
        stop_ids=(7,),
        sampling=Sampling(**numbers, **repeats),
        log_probs=True,
    )
    assert found[1] == Request(
        prompt="b",
        max_new_tokens=9,
        stop=("y", "z"),
        stop_ids=(1, 2),
        sampling=Sampling(temperature=0.5, top_k=4, seed=41),
        log_probs=True,
    )
    assert (found[2].prompt, found[2].stop, found[2].stop_ids) == ("c", (), (5,))
    assert found[2].sampling == Sampling(temperature=0, top_k=4, seed=42)


def test_seeds(tmp_path):
    """They count over all texts; one of an object's own holds, also where it is the default."""
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "seed": 40},
        {"prompt": "c", "seed": 0},
        {"prompt": "d"},
    ]
    assert [r.sampling.seed for r in requests_of(tmp_path, *rows)] == [40, 40, 0, 43]
    found = requests_of(tmp_path, *rows, num_samples=2)
    assert [r.prompt for r in found] == list("aabbccdd")
    assert [r.sampling.seed for r in found] == [40, 41, 40, 41, 0, 1, 46, 47]
    alone = choose_requests(Arguments(prompt="a", num_samples=3, **DEFAULT))
    assert [r.sampling.seed for r in alone] == [40, 41, 42]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": "hot"}, "temperature 'hot' must be a finite number"),
        ({"temperature": True}, "temperature True must be a finite number"),
        ({"temperature": -1}, "temperature -1 must be a finite number from 0"),
        ({"temperature": float("nan")}, "temperature nan must be"),
        ({"top_k": 1.5}, "top_k 1.5 must be a whole number"),
        ({"top_p": [0.5]}, "top_p [0.5] must be a finite number"),
        ({"max_new_tokens": "9"}, "max_new_tokens '9' must be a whole number"),
        ({"seed": 2**32}, "seed 4294967296 must be a whole number from 0 to 4294967295"),
        ({"seed": -1}, "seed -1 must be a whole number from 0"),
        ({"stop": 3}, "stop [3] must be a tuple, each item text"),
        ({"stop": ["a", 3]}, "stop ['a', 3] must be a tuple, each item text"),
        ({"stop": ["a", ""]}, "a stop string is empty"),
        ({"stop_ids": ["a"]}, "stop_ids ['a'] must be a tuple, each item a whole number"),
        (
            {"stop_ids": -2},
            "stop_ids [-2] must be a tuple, each item a whole number of at least 0",
        ),
        ({"no_repeat_ngram": -2}, "no_repeat_ngram -2 must be a whole number from 0"),
        ({"temperature": 0, "top_k": 5}, "top_k has no effect on greedy decoding"),
    ],
)
def test_options_are_refused_with_file_and_line(tmp_path, options, words):
    with pytest.raises(ConfigError) as error:
        requests_of(tmp_path, {"prompt": "a"}, {"prompt": "b"} | options)
    assert str(error.value).startswith(f"{tmp_path / 'p.jsonl'}, line 2: {words}")


ROWS = """{"q": "a", "n": 1}
{"q": 2}
{"q": "long one", "n": 3}
[]
{"n": 4}
{"q": "", "n": ""}
{"q": "e", "n": 6}
"""


def prompts_of(file, notes=None, **options) -> list[str]:
    """What the benchmark takes of a file, with room for 6 tokens."""
    arguments = benchmark.Arguments(
        model=MODEL, prompt_file=file, new_tokens=2, repeats=1, max_length=8, **options
    )
    tokenizer = ByteTokenizer(add_bos=False)
    source = SimpleNamespace(config=LlamaConfig.tiny())
    model = OpenModel(arguments, source, tokenizer, None)
    rows = partial(prompt_rows, benchmark.PROMPTS, file)
    task = dataclasses.replace(benchmark.OWN_PROMPTS, max_new_tokens=2)
    notes = notes or Console(quiet=True)
    questions, *_ = read_questions(task, arguments, model, notes, 1, rows)
    return [tokenizer.decode(question.request.prompt) for question in questions]


def test_rows_become_prompts_by_a_template(tmp_path):
    """Every bad row is named, and the others are taken."""
    (tmp_path / "rows.jsonl").write_text(ROWS)
    notes = Console(record=True, file=io.StringIO(), width=1000)
    options = dict(prompt_template="{q}:{n}", bad_rows="skip")
    assert prompts_of(tmp_path / "rows.jsonl", notes, **options) == ["a:1", ":", "e:6"]
    warnings = notes.export_text().splitlines()
    assert [re.search(r", line (\d)", warning)[1] for warning in warnings] == ["2", "3", "4", "5"]
    words = ("has no field 'n'", "do not fit", "is not an object", "has no field 'q'")
    assert all(word in warning for word, warning in zip(words, warnings, strict=True))


@pytest.mark.parametrize(
    "options, found",
    [
        ({"limit": 2}, ["a", "b"]),
        ({"limit": 9}, ["a", "b", "c", "d", "e"]),
    ],
)
def test_some_of_the_prompts(tmp_path, options, found):
    (tmp_path / "p.jsonl").write_text("".join(f'{{"prompt": "{c}"}}\n' for c in "abcde"))
    assert prompts_of(tmp_path / "p.jsonl", **options) == found


@pytest.mark.parametrize(
    "content, words",
    [
        ('{"prompt": "a"}\n{"prompt": []}\n', "p.jsonl, line 2: prompt is []"),
        ('{"prompt": "a"}\n\n{"prompt": "long one"}\n', "p.jsonl, line 3: a prompt of 8 tokens"),
    ],
)
def test_a_bad_row_is_refused(tmp_path, content, words):
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(words)):
        prompts_of(tmp_path / "p.jsonl")


def test_a_file_in_which_nothing_is_left(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "long one"}\n')
    with pytest.raises(ConfigError, match="the data have no examples"):
        prompts_of(tmp_path / "p.jsonl", bad_rows="skip")
