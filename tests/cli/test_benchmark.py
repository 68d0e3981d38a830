"""The benchmark's figures: what must hold whatever the clock says."""

import json
import shutil

import pytest

from lsjax.cli import benchmark, grid
from lsjax.cli.benchmark import main
from lsjax.cli.grid import Grid, GridArguments
from lsjax.data.tokenizer_huggingface import ByteTokenizer


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path, numbered_times):
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(benchmark, "memory_bandwidth", lambda: 1e9)


def rows(tmp_path, *options) -> list[dict]:
    file = tmp_path / "rows.jsonl"
    given = ["--new-tokens", 16, "--repeats", 1, "--json", file, *options]
    assert main([str(option) for option in given]) == 0
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_with_an_identity_tail_every_draft_is_right(model, model_directory, tmp_path, capsys):
    grid = ("--exit-layers", 1, 2, "--num-draft-tokens", 2, 4)
    options = ("--identity-tail", 1, "--draft-vocab", 64, "--prompt-length", 30)
    found = rows(tmp_path, "--model", model_directory, *grid, *options)
    cells = [(r["exit_layer"], r["num_draft_tokens"], r["draft_vocab"]) for r in found]
    assert cells == [(None, None, None)] + [
        (e, d, v) for v in (None, 64) for e in (1, 2) for d in (2, 4)
    ]
    base, *others = found
    assert base["speedup"] == 1 and base["tokens_per_round"] == 1
    # The tiny model's weights are read for every token.
    assert base["bandwidth"] == pytest.approx(
        base["tokens_per_second"] * 4 * (4 * model.config.layer_params + 258 * 64)
    )
    assert base["share_of_bandwidth"] == pytest.approx(base["bandwidth"] / 1e9)
    for row in others:
        # 64 tokens hold all that the model says, which were counted.
        assert row["acceptance_rate"] == 1 == min(row["acceptance_by_position"])
        # 15 tokens after the first: rounds of d + 1.
        assert row["tokens_per_round"] == 15 / -(-15 // (row["num_draft_tokens"] + 1))
        assert row["share_of_ideal"] == row["speedup"] / row["ideal"]
        assert row["predicted"] > 0 and row["round_over_parts"] > 0
    # One to read prompts, one without drafts, and one for each vocabulary.
    assert "4 programs" in capsys.readouterr().out


def test_of_a_trained_model_drafts_are_refused_too(model_directory, tmp_path):
    options = ("--exit-layers", 3, "--prompt-length", 40, "--capacity", 1000)
    base, row = rows(tmp_path, "--model", model_directory, *options)
    assert 0 < row["acceptance_rate"] < 1
    assert row["acceptance_by_position"][0] >= row["acceptance_by_position"][-1]
    _, sure = rows(tmp_path, "--model", model_directory, *options, "--draft-confidence", 0.15)
    assert sure["acceptance_rate"] > row["acceptance_rate"]
    assert sure["ideal"] > row["ideal"] and sure["predicted"] > 0


def test_sampled_drafts_are_accepted_as_often_as_the_distributions_agree(model_directory, tmp_path):
    options = ("--identity-tail", 2, "--exit-layers", 2, "--num-draft-tokens", 3)
    found = rows(tmp_path, "--model", model_directory, *options, "--temperature", 1.5)
    assert found[1]["acceptance_rate"] == 1, "exit and model are one distribution"
    options = ("--exit-layers", 1, "--num-draft-tokens", 3, "--temperature", 1.5)
    assert 0 < rows(tmp_path, "--model", model_directory, *options)[1]["acceptance_rate"] < 1


def test_autoregressive_alone(model_directory, tmp_path):
    assert len(rows(tmp_path, "--model", model_directory)) == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (("--new-tokens", 1), "--new-tokens 1 is below 2"),
        (("--repeats", 0), "--repeats 0 is below 1"),
        (("--temperature", -1), "temperature -1.0 must be a finite number of at least 0"),
        (("--prompt-length", 0), "--prompt-length 0 is not in 1..511"),
        (("--prompt-length", 10**12), "--prompt-length 1000000000000 is not in 1..511"),
        (("--prompt", ""), "--prompt is an empty prompt"),
        (("--capacity", -5), "--capacity -5 is below 0"),
        (("--draft-vocab", 9), "--draft-vocab needs --exit-layers"),
        (("--draft-confidence", 0.5), "--draft-confidence needs --exit-layers"),
        (
            ("--exit-layers", 1, "--identity-tail", 1, "--draft-vocab", 10**12),
            "a draft vocabulary of 1000000000000 does not make the head of 258 smaller",
        ),
        (("--identity-tail", 4), "--identity-tail 4 is not in 1..3"),
        (("--exit-layers", 4), "exit layer 4 is not in 1..3"),
        (("--exit-layers", 1, "--draft-vocab", 9), "needs token counts"),
        (("--exit-layers", 1, "--num-draft-tokens"), "--exit-layers needs --num-draft-tokens"),
        (
            ("--exit-layers", 1, "--identity-tail", 1, "--draft-vocab", 258),
            "a draft vocabulary of 258 does not make the head of 258 smaller",
        ),
        (("--prompt-length", 500), "prompt 1 of 3: a prompt of 500 tokens and 64 new ones do not"),
        (("--json", "/nowhere/rows.jsonl"), "/nowhere/rows.jsonl can't be written"),
    ],
)
def test_bad_input(model_directory, refused, monkeypatch, options, words):
    """Before the model is loaded."""
    monkeypatch.delattr(grid, "load_engine")
    assert words in refused(main, "--model", model_directory, *options)


def test_the_prompts_are_not_overwritten(model_directory, refused, monkeypatch, tmp_path):
    monkeypatch.delattr(grid, "load_engine")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}')
    given = ("--model", model_directory, "--prompt-file", file, "--json", file)
    assert "prompts.jsonl would overwrite the prompts" in refused(main, *given)


@pytest.mark.parametrize(
    "length, ids", [(1, [256]), (3, [256, 97, 98]), (6, [256, 97, 98, 99, 97, 98])]
)
def test_a_prompt_that_is_repeated_begins_once(model_directory, tmp_path, length, ids):
    """The token of the beginning stands in front of the text and nowhere in it."""
    model = shutil.copytree(model_directory, tmp_path / "model")
    ByteTokenizer(add_bos=True).save(model)
    given = dict(model=model, prompt="abc", prompt_length=length)
    assert Grid(GridArguments(**given), pytest.fail).prompts == [ids]
