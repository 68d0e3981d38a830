"""The program that writes a model's own answers."""

import json

import jax
import pytest
from flax import nnx

import lsjax
from lsjax.cli import answers
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.engine import Engine
from tests.programs import program

main = program("answers")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    """A model with a chat template that spells the beginning-of-text token. All its tokens are
    about as probable, so that texts end."""
    directory = tmp_path_factory.mktemp("chatty")
    config = lsjax.LlamaConfig.tiny(num_layers=2, init_std=0.02)
    model = jax.jit(lambda: lsjax.Llama(config, rngs=nnx.Rngs(0)))()
    lsjax.save(model, directory / "model", tokenizer=ByteTokenizer(chat_template=TEMPLATE))
    return directory / "model"


@pytest.fixture
def write(chatty, tmp_path, capsys):
    """Runs the program; the rows of answers.jsonl."""

    def run(*flags):
        given = ["--model", chatty, "--output", tmp_path / "out", "--max-new-tokens", 12]
        code = main([*given, "--batch-size", 2, *flags])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return rows(tmp_path / "out" / "answers.jsonl")

    return run


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"

    def put(*texts):
        file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        return "--prompt-file", file

    return put


@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_those_of_the_model(write, prompts, chatty, chat):
    """As text that training encodes to the same tokens: without the token that it puts first."""
    found = write(*prompts("one", "two", "one"), *["--chat"] * chat)
    tokenizer = ByteTokenizer(chat_template=TEMPLATE)
    engine = Engine(lsjax.load(chatty), tokenizer)
    assert len(found) == 3
    for row in found:
        assert row["prompt"] in (
            ("<user>one<assistant>", "<user>two<assistant>") if chat else ("one", "two")
        )
        ids = tokenizer.encode(row["prompt"])
        assert ids[0] == tokenizer.bos_id and tokenizer.bos_id not in ids[1:]
        assert row["text"] == engine.generate([ids], max_new_tokens=12)[0].text


def test_a_killed_program_resumes(write, prompts, tmp_path):
    """It keeps whole lines, and answers what is missing. More prompts add answers."""
    whole = write(*prompts("a", "b", "c", "b"))
    file = tmp_path / "out" / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[2] + lines[1] + lines[0][:9])
    again = write(*prompts("a", "b", "c", "b"))
    assert again[:2] == [whole[2], whole[1]] and len(again) == 4
    key = json.dumps
    assert sorted(map(key, again)) == sorted(map(key, whole))
    assert len(write(*prompts("a", "b", "c", "b", "d"))) == 5


def test_a_chat_model_writes_the_prompts(write, tmp_path, chatty):
    """They are its own continuations of the template's beginning, and all are answered."""
    found = write("--chat", "--num-prompts", 3)
    asked = rows(tmp_path / "out" / "prompts.jsonl")
    assert len(asked) >= 3 and all(row["prompt"].strip() for row in asked)
    assert [f"<user>{row['prompt']}<assistant>" for row in asked] == [
        one["prompt"] for one in found
    ]
    tokenizer = ByteTokenizer(chat_template=TEMPLATE)
    ids = tokenizer.encode("<user>")
    sampling = lsjax.Sampling(temperature=1.0, seed=asked[1]["seed"])
    request = lsjax.Request(prompt=ids, max_new_tokens=answers.PROMPT_TOKENS, sampling=sampling)
    text = Engine(lsjax.load(chatty), tokenizer, batch_size=2).generate([request])[0]
    assert text.text.strip() == asked[1]["prompt"] and text.finish_reason == "eos"
    more = write("--chat", "--num-prompts", len(asked) + 1)
    later = rows(tmp_path / "out" / "prompts.jsonl")
    assert later[: len(asked)] == asked and len({row["seed"] for row in later}) == len(later)
    assert len(more) == len(later)


def test_bad_input(refused, write, prompts, chatty, tmp_path, monkeypatch):
    given = ["--model", chatty, "--output", tmp_path / "out"]
    assert "give one of --prompt-file and --num-prompts" in refused(main, *given)
    assert "add --chat" in refused(main, *given, "--num-prompts", 1)
    write(*prompts("a"))
    said = refused(main, *given, *prompts("a"), "--max-new-tokens", 9)
    assert "max_new_tokens was 12 and is now 9" in said
    other = [*given[:2], "--output", tmp_path / "other", "--chat", "--num-prompts", 1]
    monkeypatch.setattr(answers, "PROMPT_TOKENS", 1)
    assert "give --prompt-file" in refused(main, *other)
