"""The decode program: what it prints and writes, and how it refuses."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lsjax.cli import decode
from lsjax.cli.drafts import marked
from lsjax.cli.notes import summary
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive
from lsjax.model.exit_blocks import with_exit_blocks
from lsjax.terminal import CONTROLS, visible
from tests.cli.test_drafts import completion_of, console
from tests.marks import long
from tests.programs import program

main = program("decode")

ROOT = Path(__file__).parents[2]
NEW = 24
PROMPT = "Once\tupon :smile: [bold]a"  # rich would change each of these
FIELDS = [
    *("prompt", "text", "token_ids", "num_prompt_tokens", "num_new_tokens"),
    *("prefill_seconds", "decode_seconds", "tokens_per_second", "compile_seconds"),
    *("strategy", "exit_layer", "num_draft_tokens", "draft_vocab", "draft_confidence"),
    *("seed", "rounds"),
    *("drafted", "accepted", "acceptance_rate", "tokens_per_round"),
    *("drafted_by_position", "accepted_by_position"),
    *("sources", "log_probs", "finish_reason"),
]
PLAIN, SELF = ["--strategy", "autoregressive"], ["--strategy", "self_speculative"]


@pytest.fixture(scope="module")
def expected(model, tokenizer):
    """What the library says to the prompt."""
    engine = Engine(model, tokenizer, Autoregressive())
    return engine.generate([PROMPT], max_new_tokens=NEW)[0]


@pytest.fixture
def run(model_directory, capfdbinary):
    """Runs the program; what it printed (line breaks as they were)."""

    def run_(*options) -> tuple[str, str]:
        given = ["--model", model_directory, "--max-new-tokens", NEW, *options]
        assert main([str(option) for option in given]) == 0
        sys.stdout.flush()
        return tuple(stream.decode() for stream in capfdbinary.readouterr())

    return run_


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


@pytest.mark.parametrize(
    "options, exit_layer, drafts",
    [
        (PLAIN, None, None),
        (["--strategy", "early_exit", "--exit-layer", "4"], 4, None),
        (SELF, 3, 4),  # from generation_config.json
        ([*SELF, "--num-draft-tokens", "2"], 3, 2),
        ([*SELF, "--exit-layer", "1"], 1, 4),
    ],
    ids=["autoregressive", "early_exit", "self_speculative", "drafts", "exit"],
)
def test_strategies(run, expected, tmp_path, options, exit_layer, drafts):
    """All give the same tokens; the text is printed as it is, the figures are written."""
    file = tmp_path / "out.jsonl"
    file.write_text("an older run\n")
    out, err = run("--prompt", PROMPT, "--json", file, *options)
    assert out == PROMPT + expected.text + "\n"
    (line,) = lines_of(file.read_text(encoding="utf-8"))
    assert list(line) == FIELDS
    same = ("token_ids", "text", "num_prompt_tokens", "num_new_tokens", "finish_reason")
    assert {key: line[key] for key in same} == {key: getattr(expected, key) for key in same}
    assert line["prompt"] == PROMPT
    assert line["strategy"] == options[1] and line["sources"] is None
    assert (line["exit_layer"], line["num_draft_tokens"]) == (exit_layer, drafts)
    drafted = sum(line["drafted_by_position"])
    assert line["drafted"] == drafted and (drafted > 0) == (drafts is not None)
    assert line["accepted"] == sum(line["accepted_by_position"])
    assert line["acceptance_rate"] == (line["accepted"] / drafted if drafted else None)
    later = len(line["token_ids"]) - 1
    assert line["tokens_per_round"] == later / line["rounds"]
    assert line["tokens_per_second"] == later / line["decode_seconds"]
    assert line["prefill_seconds"] > 0 and line["compile_seconds"] > 0
    assert "tiny [x] :smile:: 0M parameters" in err and f"{later + 1} new tokens at" in err
    assert ("drafts accepted" in err) == bool(drafts)


@pytest.mark.long
def test_a_model_with_an_exit_chooses_its_drafts(run, expected, tmp_path, monkeypatch):
    """The default, as generation_config.json names an exit. Seconds are measured once."""
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "out.jsonl"
    for _ in range(2):
        out, err = run("--prompt", PROMPT, "--json", file)
        assert out == PROMPT + expected.text + "\n"
        (line,) = lines_of(file.read_text(encoding="utf-8"))
        assert line["strategy"] == "auto" and line["exit_layer"] is None
        assert sum(one["rounds"] for one in line["sources"].values()) == line["rounds"]
        (most, *_) = sorted(line["sources"], key=lambda name: -line["sources"][name]["rounds"])
        assert f"{most}: " in err and "of rounds" in err
    (kept,) = (tmp_path / "cache" / "round_seconds").iterdir()
    seconds, _ = json.loads(kept.read_text())
    assert len(seconds) == 4  # lookup and exits 1, 2 and 3
    (counts,) = (tmp_path / "cache" / "token_counts").iterdir()
    assert json.loads(counts.read_text())["total"] == 2 * len(expected.token_ids)


def test_batches_and_json_to_stdout(run, expected, tmp_path):
    """Nothing but JSON there, in the file's order."""
    file = tmp_path / "prompts.jsonl"
    prompts = [PROMPT, "a", "bc"]
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    found = [
        lines_of(run("--prompt-file", file, "--json", "-", "--batch-size", size, *SELF)[0])
        for size in ("1", "9")
    ]
    for lines in found:
        assert [list(line) for line in lines] == [FIELDS] * 3
        assert sorted(line["prompt"] for line in lines) == sorted(prompts)
        by_prompt = {line["prompt"]: line["token_ids"] for line in lines}
        assert by_prompt == {line["prompt"]: line["token_ids"] for line in found[0]}
        assert by_prompt[PROMPT] == expected.token_ids


def test_text_file_and_stop_strings(run, expected, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    text = expected.text
    late, early = text[8:10], text[4:6]
    out, err = run("--prompt-file", file, "--stop", late, "--stop", early, *SELF)
    assert out == PROMPT + text[: min(text.index(late), text.index(early))] + "\n"
    assert "1 ended by stop" in err


def test_streamed_text_is_printed_as_it_is(run, model, tokenizer):
    (completion,) = Engine(model, tokenizer).generate(["a"], max_new_tokens=NEW)
    assert "\f" in completion.text  # which rich would leave out
    assert run("--prompt", "a", *PLAIN)[0] == "a" + completion.text + "\n"


def test_show_drafts(run, model, tokenizer, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    out, _ = run("--prompt", "a", "--show-drafts", *SELF)
    legend, *rest = out.split("\n")
    assert "accepted draft" in legend and "\x1b[1;32m" in legend
    engine = Engine(model, tokenizer, SelfSpeculative(3, 4))
    (completion,) = engine.generate(["a"], max_new_tokens=NEW)
    rejected = int((completion.trace.replaced_n >= 0).sum())
    assert "\n".join(rest).count("\x1b[2;9;31m") == rejected > 0


def test_show_drafts_in_a_file(run, model, tokenizer, tmp_path):
    """Marks without colours, and then each text by itself."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in "ab"))
    engine = Engine(model, tokenizer, SelfSpeculative(3, 4))
    completions = engine.generate(["a", "b"], max_new_tokens=NEW)
    rejected = [int((one.trace.replaced_n >= 0).sum()) for one in completions]
    for given, number in ((("--prompt", "a"), 1), (("--prompt-file", prompts), 2)):
        out, _ = run(*given, "--show-drafts", *SELF)
        assert out.startswith("New text begins at the first mark: {+token of the full model+}")
        assert out.count("[-") == 1 + sum(rejected[:number])
        for prompt, one in zip("ab"[:number], completions, strict=False):
            assert f"\n\n{prompt}{one.text}\n" in out


def test_chat(run, model_directory, tmp_path):
    directory = shutil.copytree(model_directory, tmp_path / "chat")
    template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template}))
    given = ["--chat", "--system", "s", "--prompt", "hi", "--json", "-", "--model", directory]
    (line,) = lines_of(run(*given, *PLAIN)[0])
    assert line["prompt"] == "hi" and line["num_prompt_tokens"] == len("system=s;user=hi;")
    shown, _ = run("--chat", "--prompt", "hi", "--model", directory, *PLAIN)
    assert shown.startswith("hi\n\n")  # the answer begins below the question


def test_summary():
    completion = completion_of("abababa", b"abababa", "nnnnnnn", {})
    assert summary([completion] * 2, wall_seconds=4.0) == (
        "14 new tokens at 3.0 tokens/s; 50% of 4-grams are repeated; 2 ended by stop"
    )


@pytest.mark.parametrize("has_block", [False, True])
def test_why_few_drafts_were_accepted(model, tokenizer, has_block):
    """Only exits without a block are told that LayerSkip trains exits."""
    model = with_exit_blocks(model, (1,)) if has_block else model
    engine, notes = Engine(model, tokenizer, SelfSpeculative(1, 2)), console(colours=False)
    completion = replace(completion_of("ab", b"ab", "nn", {}), drafted=4, accepted=0)
    decode.conclude(notes, engine, [completion])
    said = " ".join(notes.file.getvalue().split())
    assert "Few drafts of exit 1 were accepted" in said
    assert ("not trained with LayerSkip" in said, "Its block" in said) == (not has_block, has_block)


@pytest.fixture(scope="module")
def bad(model_directory, tmp_path_factory):
    """A directory of damaged models and prompt files."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty.gguf").touch()
    (root / "notes.bin").write_text("hello, no model")
    cut = shutil.copytree(model_directory, root / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    bare = shutil.copytree(model_directory, root / "bare")
    (bare / "tokenizer.json").unlink()
    other = shutil.copytree(ROOT / "tests" / "golden" / "gqa_tied", root / "other")
    ByteTokenizer().save(other)
    silent = shutil.copytree(model_directory, root / "silent")
    (silent / "generation_config.json").write_text("{}")
    (root / "good.txt").write_text("a")
    (root / "empty.txt").touch()
    (root / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 3}\n')
    (root / "long.jsonl").write_text(f'{{"prompt": "a"}}\n{{"prompt": "{"b" * 600}"}}\n')
    return root


@pytest.mark.parametrize(
    "options, words",
    [
        ("--model nowhere", "nowhere: does not exist: give an existing directory"),
        (f"--model nowhere {' '.join(SELF)}", "nowhere: does not exist"),
        ("--model owner/it", "or download it: hf download owner/it --local-dir models/it$"),
        (
            "--model {bad}/silent@5",
            "silent is not a training run, so it has no steps: leave out @5",
        ),
        (
            "--model {bad}/silent@best",
            "silent is not a training run, so it has no steps: leave out",
        ),
        ("--model {bad}/silent@x", "silent@x: 'x' is not a step of .*silent: write a number, or"),
        ("--model {bad}/notes.bin@5", "notes.bin is not a training run, so it has no steps"),
        ("--model {bad}/empty.gguf", "empty.gguf: is not a GGUF file"),
        ("--model {bad}/notes.bin", "notes.bin: is not a GGUF file"),
        ("--model {bad}/cut", "cut/model.safetensors: "),
        ("--model {bad}/bare", "bare has neither tokenizer.json nor tokenizer.model"),
        ("--model {bad}/other", "the tokenizer has 258 tokens, but the model's table has 64"),
        (
            "--strategy self_speculative --exit-layer 0",
            "exit layer 0 is out of range: use --exit-layer 1..3",
        ),
        (
            "--strategy self_speculative --exit-layer 4",
            "exit layer 4 is out of range: use --exit-layer 1..3",
        ),
        (
            "--strategy self_speculative --exit-layer 5",
            "exit layer 5 is out of range: use --exit-layer 1..3",
        ),
        (
            "--strategy early_exit --exit-layer 0",
            "exit layer 0 is out of range: use --exit-layer 1..4",
        ),
        ("--strategy early_exit --exit-layer 5", "layer 5 is out of range: use --exit-layer 1..4"),
        ("--strategy early_exit", "early_exit needs --exit-layer"),
        (
            "--strategy self_speculative --draft-vocab 0",
            "--draft-vocab 0 must be a whole number of at least 1",
        ),
        ("--strategy self_speculative --model {bad}/silent", "needs --exit-layer and --num-draft"),
        (
            "--strategy self_speculative --num-draft-tokens -1",
            "num_draft_tokens -1 is out of range: use 0..512",
        ),
        (
            "--strategy early_exit --exit-layer 2 3",
            "several .* give one value each to --strategy",
        ),
        (
            "--strategy self_speculative --draft-confidence 0.5 0.6",
            "several .* give one value each to .* --draft-confidence",
        ),
        ("--exit-layer 2 --model {bad}/silent", "--exit-layer has no effect on autoregressive"),
        (
            "--num-draft-tokens 2 --model {bad}/silent",
            "--num-draft-tokens has no effect on autoregressive",
        ),
        ("--prompt " + "a" * 600, "600 tokens and 128 new ones .* length of 512: shorten the"),
        ("--no-prompt --prompt-file {bad}/long.jsonl", "prompt 2 of 2: a prompt of 600 tokens and"),
        ("--max-new-tokens 0", "max_new_tokens 0 is below 1: use 1 or more"),
        ("--max-new-tokens 512", "1 tokens and 512 new ones .* length of 512: .* lower --max-new"),
        ("--max-length 100", "128 new ones .* length of 100: .* or raise --max-length"),
        ("--max-length 1", "max length 1 is out of range: use --max-length 2..512"),
        ("--max-length 513", "max length 513 is out of range: use --max-length 2..512"),
        ("--temperature -1", "temperature -1.0 must be .* from 0 to 1e.30: 0 is greedy"),
        ("--temperature nan", "temperature nan must be a finite number from 0"),
        ("--temperature 1 --top-p 0", "top_p 0.0 must be .* above 0 and at most 1: 1 is all"),
        ("--top-k 5", "--top-k has no effect on greedy decoding: choose a --temperature above 0"),
        ("--num-samples 2", "--num-samples has no effect on greedy decoding"),
        (
            "--draft-confidence 0.5 --model {bad}/silent",
            "--draft-confidence has no effect on autoregressive",
        ),
        (
            "--strategy self_speculative --draft-confidence 2",
            "draft_confidence 2.0 is out of range: use a value from 0 to 1",
        ),
        ("--temperature 1 --num-samples 0", "--num-samples 0 must be a whole number of at least 1"),
        ("--temperature 1 --seed -1", "seed -1 must be a whole number from 0"),
        ("--prompt=", "--prompt is an empty prompt: it needs at least one character"),
        ("--stop=", "a stop string is empty: give the text to stop at"),
        ("--batch-size 0", "batch size 0 is below 1: choose --batch-size 1 or more"),
        ("--mesh.tensor 2", "a mesh of tensor 2 needs 2 devices, but there are 1"),
        ("--mesh.slices 2", "mesh.slices 2 is for training: decode without the flag"),
        ("--mesh.data -2", "mesh.data -2 is not a size: choose 1 or more, or -1"),
        ("--mesh.context 2", "mesh.context 2 is for training: decode without the flag"),
        ("--system s", "--system needs --chat: add it"),
        ("--no-prompt --interactive --temperature -1", "temperature -1.0 must be a finite number"),
        ("--no-prompt --interactive --top-k 5", "--top-k has no effect on greedy decoding"),
        ("--stop-ids 999", r"stop ids \[999\] are not all in the vocab"),
        ("--chat", "no chat template: use --prompt without --chat"),
        ("--prompt-file {bad}/good.txt", "give one of --prompt and --prompt-file and not both"),
        ("--no-prompt", "give one of --prompt and --prompt-file$"),
        ("--no-prompt --prompt-file {bad}/empty.txt", "empty.txt is an empty prompt"),
        ("--no-prompt --prompt-file {bad}/bad.jsonl", "bad.jsonl, line 2 is not an object with"),
        ("--no-prompt --prompt-file nowhere.txt", "No such file or directory: 'nowhere.txt'"),
        ("--json {bad}", "bad.* can't be written .Is a directory.: name a file"),
        ("--json {bad}/nowhere/out.jsonl", "nowhere/out.jsonl can't be written .No such file"),
        (
            "--no-prompt --prompt-file {bad}/good.txt --json {bad}/good.txt",
            "good.txt would overwrite the prompts: name another file",
        ),
    ],
)
def test_bad_input(model_directory, bad, refused, monkeypatch, tmp_path, options, words):
    """Refused before the model is loaded; what an older run has written stays as it is."""
    monkeypatch.delattr(decode, "load_engine")
    old = tmp_path / "old.jsonl"
    old.write_text("an older run\n")
    given = [option.format(bad=bad) for option in options.split(" ")]
    if "--no-prompt" in given:
        given.remove("--no-prompt")
    elif not options.startswith("--prompt") or "--prompt-file" in options:
        given = ["--prompt", "a", *given]
    if "--model" not in given:
        given = ["--model", model_directory, *given]
    if "--json" not in given:
        given += ["--json", old]
    assert re.search(words, refused(main, *given).strip())
    assert old.read_text() == "an older run\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.jsonl"]


def test_log_probs_that_nobody_would_see(model_directory, refused):
    given = ["--model", model_directory, "--prompt", "a", "--logprobs"]
    assert "--logprobs needs --json" in refused(main, *given)


def test_bad_input_makes_no_file(model_directory, refused, tmp_path):
    given = ["--model", model_directory, "--prompt", "a" * 600]
    refused(main, *given, "--json", tmp_path / "new.jsonl")
    assert not any(tmp_path.iterdir())


def test_damage_found_while_loading(model_directory, refused, tmp_path):
    """The weights end in a NaN: an older run's lines stay."""
    directory = shutil.copytree(model_directory, tmp_path / "damaged")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + np.float32("nan").tobytes())
    (tmp_path / "old.jsonl").write_text("an older run\n")
    given = ["--model", directory, "--prompt", "a", "--json", tmp_path / "old.jsonl"]
    assert "values are NaN, infinite" in refused(main, *given)
    assert (tmp_path / "old.jsonl").read_text() == "an older run\n"


@pytest.mark.parametrize("options", [["--strategy", "beam"], ["--no-such-flag"]])
def test_unknown_options(model_directory, capsys, options):
    with pytest.raises(SystemExit) as exit_:
        main(["--model", str(model_directory), "--prompt", "a", *options])
    assert exit_.value.code == 2
    assert options[-1] in capsys.readouterr().err


def test_as_a_script(model_directory, expected):
    given = ["--model", str(model_directory), "--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    done = subprocess.run(
        [sys.executable, "-W", "error", "decode.py", *given, *PLAIN, "--json", "-"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    (line,) = lines_of(done.stdout)
    assert line["token_ids"] == expected.token_ids


@pytest.mark.long
@pytest.mark.parametrize("options", [PLAIN, SELF], ids=["autoregressive", "self_speculative"])
def test_samples(run, tmp_path, options):
    """Two texts for each of two prompts, seeds in a row; one seed repeats, alone and in a batch."""
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ab"}\n{"prompt": "c"}\n')
    drawn = ["--temperature", "1", "--top-p", "0.9", "--json", "-", *options]
    given = ["--prompt-file", file, "--num-samples", "2", "--seed", "7", *drawn]
    lines = lines_of(run(*given, "--batch-size", "4")[0])
    found = {(line["prompt"], line["seed"]): line["token_ids"] for line in lines}
    assert sorted(found) == [("ab", 7), ("ab", 8), ("c", 9), ("c", 10)]
    assert found["ab", 7] != found["ab", 8]
    (alone,) = lines_of(run("--prompt", "c", "--seed", "10", *drawn)[0])
    assert alone["token_ids"] == found["c", 10]
    assert run("--prompt", "c", "--json", "-", *options)[0].find('"seed": null') > 0


@pytest.fixture
def in_a_terminal(monkeypatch):
    """Programs of this test take their output for a terminal without colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")


@pytest.mark.parametrize("show_drafts", [[], ["--show-drafts"]], ids=["plain", "drafts"])
@pytest.mark.parametrize("samples", [1, *long(2)])
def test_a_terminal_is_shown_control_characters(
    run, model, tokenizer, in_a_terminal, show_drafts, samples
):
    """Streamed texts, complete ones, and what is not shown of the prompt."""
    prompt = "a\x1b[2J"
    (completion,) = Engine(model, tokenizer).generate([prompt], max_new_tokens=NEW)
    assert CONTROLS.search(completion.text)
    drawn = ["--temperature", "1", "--num-samples", "2"] if samples == 2 else []
    out, err = run("--prompt", prompt, *show_drafts, *drawn, *SELF)
    assert r"a\x1b[2J" in out and not CONTROLS.search(out) and not CONTROLS.search(err)
    if not drawn and not show_drafts:
        assert out == visible(prompt + completion.text) + "\n"


def test_json_has_no_control_characters(run, model, tokenizer, tmp_path):
    """The text is the same once it is read."""
    prompt = "\x7f\x9b"
    (completion,) = Engine(model, tokenizer).generate([prompt], max_new_tokens=NEW)
    out, _ = run("--prompt", prompt, "--json", "-", *PLAIN)
    assert not CONTROLS.search(out)
    (line,) = lines_of(out)
    assert (line["prompt"], line["text"]) == (prompt, completion.text)


def test_drafts_in_a_pipe_leave_the_text_as_it_is(run, model, tokenizer):
    prompt = "a\x1b[2J\t"
    engine = Engine(model, tokenizer, SelfSpeculative(3, 4))
    (completion,) = engine.generate([prompt], max_new_tokens=NEW)
    shown = marked(console(colours=False), tokenizer, tokenizer.encode(prompt), completion)
    expected = prompt + "".join(one.text for one in shown.segments) + "\n"
    expected += f"\n{prompt}{completion.text}\n\n"
    out, _ = run("--prompt", prompt, "--show-drafts", *SELF)
    assert out.partition("\n")[2] == expected  # after the legend


def test_an_error_of_a_template_is_shown(model_directory, refused, in_a_terminal, tmp_path):
    directory = shutil.copytree(model_directory, tmp_path / "evil")
    (directory / "chat_template.jinja").write_text("{{ raise_exception('no \x1b[2J') }}")
    given = ["--model", directory, "--prompt", "a", "--chat"]
    assert r"the chat template fails: no \x1b[2J" in refused(main, *given)


def test_the_last_seed_is_followed_by_the_first(run, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ab"}\n{"prompt": "ab"}\n{"prompt": "ab", "seed": 4294967295}\n')
    drawn = ["--temperature", "1", "--seed", 2**32 - 1, "--json", "-", *PLAIN]
    lines = lines_of(run("--prompt-file", file, *drawn)[0])
    assert [line["seed"] for line in lines] == [2**32 - 1, 0, 2**32 - 1]


def test_a_full_disk_names_the_file_of_the_lines(model_directory, capsys):
    given = ["--model", str(model_directory), "--prompt", "a", "--max-new-tokens", "2", *PLAIN]
    with pytest.raises(SystemExit) as end:
        main([*given, "--json", "/dev/full"])
    assert end.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: /dev/full can't be written (No space left on device): free")
