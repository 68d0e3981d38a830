"""A sweep over exits and draft lengths that is killed and goes on."""

import json

import pytest

from lsjax.cli import grid, sweep
from lsjax.cli.sweep import main
from lsjax.decoding.engine import Engine
from lsjax.evaluation.results import append


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path, numbered_times):
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sweep, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr(sweep, "memory_bandwidth", lambda: 1e9)


def run(directory, output, *options) -> None:
    given = ["--model", directory, "--output", output, "--new-tokens", 12]
    assert main([str(option) for option in [*given, *options]]) == 0


def lines(output) -> list[dict]:
    return [json.loads(line) for line in (output / "texts.jsonl").read_text().splitlines()]


def test_a_killed_sweep_goes_on(model_directory, tmp_path, monkeypatch, capsys):
    """Killed in the second prompt's second cell, with half a line behind it."""
    output, prompts = tmp_path / "sweep", tmp_path / "prompts.jsonl"
    rows = [{"prompt": "Hello, "}, {"text": 1}, {"prompt": "<b>"}, {"prompt": "x" * 600}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = ("--exit-layers", 1, 3, "--num-draft-tokens", 2)
    options = (*cells, "--prompt-file", prompts, "--bad-rows", "skip")
    written = []

    def killed(file, row):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(row)
        append(file, row)

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "append", killed)
        with pytest.raises(SystemExit) as stop:
            run(model_directory, output, *options)
    assert stop.value.code == 130
    errors = capsys.readouterr().err
    assert 'prompts.jsonl, line 2 is no object with a text under "prompt"' in errors
    assert "prompts.jsonl, line 4: a prompt of 600 tokens and 12 new ones do not fit" in errors
    with (output / "texts.jsonl").open("a") as file:
        file.write('{"repeat": 1, "prom')
    assert not (output / "sweep.json").exists()

    run(model_directory, output, *options)
    printed = capsys.readouterr()
    assert "5 of 6 texts are there already" in printed.err
    decoded = [(row["prompt"], row["exit_layer"]) for row in lines(output)[1:]]
    # The last cell has autoregressive decoding beside it once more.
    assert decoded == [(0, None), (0, 1), (0, 3), (1, None), (1, 1), (1, None), (1, 3)]
    summary = json.loads((output / "sweep.json").read_text())
    found = [(row["exit_layer"], row["num_draft_tokens"]) for row in summary["rows"]]
    assert found == [(None, None), (1, 2), (3, 2)]
    assert "2 prompts of 3 to 7 tokens, 12 new ones, 1 repeat" in summary["title"]
    assert [sample["prompt"] for sample in summary["samples"]] == ["Hello, ", "<b>"]
    assert {kind for s in summary["samples"] for _, kind in s["pieces"]} <= {
        *("accepted", "refused", "corrected", "added", ""),
    }
    for name in ("sweep.png", "acceptance.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")

    # With everything there nothing is decoded but the samples.
    before = (output / "texts.jsonl").read_bytes()
    run(model_directory, output, *options)
    assert (output / "texts.jsonl").read_bytes() == before
    with pytest.raises(SystemExit) as stop:
        run(model_directory, output, *options, "--new-tokens", 13)
    assert stop.value.code == 2
    assert "new_tokens was 12 and is now 13" in capsys.readouterr().err
    append(output / "texts.jsonl", {"prompt": 0, "text": "of something else"})
    with pytest.raises(SystemExit) as stop:
        run(model_directory, output, *options)
    assert stop.value.code == 2
    assert "a line of the results has prompt, text and not repeat" in capsys.readouterr().err


def test_every_size_of_the_cache_is_warmed_up(model_directory, tmp_path, monkeypatch):
    """Before anything is timed: programs that have run before are faster."""
    prompts, order = tmp_path / "prompts.jsonl", []
    prompts.write_text("".join(json.dumps({"prompt": n * "x"}) + "\n" for n in (5, 400, 7)))
    generate = Engine.generate

    def noted(self, asked, **rest):
        order.append((self.strategy.name, len(asked[0])))
        return generate(self, asked, **rest)

    monkeypatch.setattr(Engine, "generate", noted)
    given = ("--exit-layers", 1, "--num-draft-tokens", 2, "--prompt-file", prompts)
    run(model_directory, tmp_path / "sweep", *given)
    assert sorted(order[:4]) == [
        *[("autoregressive", length) for length in (7, 400)],
        *[("self_speculative", length) for length in (7, 400)],
    ]
    assert len(order) == 4 + 6 + 1


@pytest.mark.parametrize(
    "options, words",
    [
        (("--exit-layers",), "--exit-layers is empty: name exits to draft from"),
        (("--repeats", 0), "--repeats 0 is below 1"),
        (("--exit-layers", 4), "exit layer 4 is not in 1..3"),
        (("--prompt-file", "bad.jsonl"), "bad.jsonl, line 2 is not JSON"),
        (("--prompt-file", "long.jsonl"), "long.jsonl, line 1: a prompt of 600 tokens and 64 new"),
        (("--prompt-file", "bad.jsonl", "--prompt", "x"), "give one of --prompt and"),
        (("--output", "bad.jsonl/x"), "bad.jsonl"),
    ],
)
def test_bad_input(model_directory, refused, monkeypatch, tmp_path, options, words):
    """Before the model is loaded."""
    monkeypatch.delattr(grid, "load_engine")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n{"prom\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 600}))
    given = ("--model", model_directory, "--exit-layers", 1, "--output", "out", *options)
    assert words in refused(main, *given)
