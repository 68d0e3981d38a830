"""The page holds all of a run, whatever its texts are, and needs nothing else."""

import base64
import json
import re
from dataclasses import asdict
from html.parser import HTMLParser

import pytest

from lsjax.cli.report import main, settings
from lsjax.config import DataConfig, LlamaConfig, TrainConfig
from lsjax.config.json_form import versioned
from lsjax.evaluation.speed import Row

EVIL = "<script>alert('x')</script>&\"'"
VOID = {"meta", "img", "source", "br"}


def write_run(directory, layers: int):
    """A run with metrics, a sweep one level below, and an evaluation beside."""
    directory.mkdir()
    config = TrainConfig(
        model=LlamaConfig.tiny(num_layers=layers),
        data=DataConfig(source="text", paths=(f"{EVIL}.txt",)),
        batch_size=2,
        seq_len=8,
        num_steps=12,
        seed=5,
    )
    (directory / "config.json").write_text(json.dumps(versioned(config)))
    step = dict(grad_norm=1.0, last_exit_loss=2.0, learning_rate=0.1, tokens=16, seconds=0.5)
    scores = dict(loss_E=[3.25] * layers, agreement_E=[0.625] * layers, tokens=1234)
    metrics = [
        {"kind": "step", "step": 1, "exits": [1, layers], "exit_losses": [3.0, 2.0], **step},
        {"kind": "evaluation", "step": 1, **scores},
        {"kind": "sample", "step": 1, "text": f"own {EVIL}", "acceptance_rate": None},
    ]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))


def write_sweep(directory):
    directory.mkdir()
    rows = [
        Row("autoregressive", None, None, None, 10.0, 9.0, 11.0, 1.0, None, [], 1.0),
        Row("self_speculative", 1, 2, None, 17.0, 9.0, 19.0, 1.7, 0.75, [0.8, 0.7], 2.5, 2.0, 0.85),
    ]
    rows[1].predicted = 1.8
    pieces = [["good", "accepted"], [EVIL, "refused"], ["<b>", "corrected"], ["rest", ""]]
    sample = {"prompt": f"once {EVIL}", "pieces": pieces, "drafted": 2, "accepted": 1}
    summary = {"title": f"tiny {EVIL}", "settings": {}, "rows": [asdict(row) for row in rows]}
    summary["samples"] = [sample]
    (directory / "sweep.json").write_text(json.dumps(summary))


def write_evaluation(file):
    figures = dict(tokens_per_second=12.5, ms_per_token=80.0, speedup=None)
    figures |= dict(acceptance_rate=0.5, tokens_per_round=None, examples=7)
    figures |= dict(ideal=1.25, share_of_ideal=None)
    scores = {f"match {EVIL}": {"mean": 0.375, "stderr": 0.01}}
    row = {"strategy": "early exit, exit 2", "group": "all", "scores": scores, **figures}
    asked = {"task": "topv2", "stop": [EVIL]}
    rows = [row, row | {"group": f"weather {EVIL}", "examples": 3}]
    summary = {"asked": asked, "bad_rows": [f"rows, line 3: {EVIL}"], "figures": rows}
    file.write_text(json.dumps(summary))


class Balanced(HTMLParser):
    """Raises where tags do not close in order; keeps tags with attributes, and the text."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """A whole run, and one that has but begun."""
    directory = tmp_path_factory.mktemp("runs")
    whole, other = directory / "whole & <i>run</i>".replace("/", "|"), directory / "other"
    write_run(whole, 4)
    write_sweep(whole / "sweep")
    write_evaluation(whole / "topv2.summary.json")
    write_run(other, 2)
    assert main([str(whole), str(other), "--output", str(directory / "report.html")]) == 0
    return (directory / "report.html").read_text()


def test_every_section(page):
    text = Balanced(page).text
    for words in (
        *("At a glance", "Exits", "Configuration", "Training", "Speed: sweep", "Every cell"),
        *("Acceptance by draft position", "Drafts and what became of them", "Evaluation: topv2"),
        *("1,234 tokens", "3.250", "0.625", "E = 1, d = 2", "1.70x", "0.750", "0.85", "1.80"),
        *("early exit, exit 2", "0.375 ± 0.010", "80.00", "1 row was left out", "rows, line 3"),
        *("By category", "weather <script>"),
        *("num_layers 4", "num_layers 2", "seed 5", "own <script>", "1 of 2 drafts accepted"),
    ):
        assert words in text, words


def test_texts_are_escaped(page):
    tags = Balanced(page).tags
    assert "<script" not in page and not {"script", "i", "b", "link", "iframe"} & {
        t for t, _ in tags
    }
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "whole & <i>run<|i>" in Balanced(page).text
    kinds = [attributes.get("class") for tag, attributes in tags if tag == "span"]
    # After the legend: the prompt and the pieces.
    assert kinds[4:] == ["prompt", "accepted", "refused", "corrected", ""]
    assert page.count("&lt;script&gt;") >= 6


def test_nothing_comes_from_elsewhere(page):
    pictures = []
    for tag, attributes in Balanced(page).tags:
        for name in ("src", "srcset", "href"):
            if name in attributes:
                assert attributes[name].startswith("data:image/png;base64,"), tag
                pictures.append(base64.b64decode(attributes[name].partition(",")[2]))
    assert not re.search(r"https?://|@import|url\(", re.sub(r'"data:[^"]*"', "", page))
    # Exits, two trainings, heat maps and acceptance, each for bright and dark pages.
    assert len(pictures) == 2 * 5 and len({*pictures}) == 10
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)


def test_settings_leave_out_what_is_off():
    config = {"seed": 0, "on": True, "off": False, "none": None, "part": {"p": 0.5, "x": []}}
    assert settings(config | {"empty": {"a": ""}}) == [
        ("run", "seed 0, on true"),
        ("part", "p 0.5"),
    ]


def test_parts_alone(tmp_path):
    """A sweep's directory and an evaluation's file are no runs."""
    write_sweep(tmp_path / "sweep")
    write_evaluation(tmp_path / "topv2.summary.json")
    given = [str(tmp_path / name) for name in ("sweep", "topv2.summary.json")]
    assert main([*given, "--output", str(tmp_path / "page.html")]) == 0
    text = Balanced((tmp_path / "page.html").read_text()).text
    assert "Speed: sweep" in text and "Evaluation: topv2" in text and "Training" not in text


@pytest.mark.parametrize(
    "names, words",
    [
        (["nowhere"], "nowhere does not exist: name a run"),
        (["empty"], "empty holds nothing to report"),
        (["broken"], "sweep.json is not what its name says (KeyError('rows'))"),
        (["old.summary.json"], "is not what its name says (KeyError('ideal'))"),
        (["sweep", "sweep"], "can't be told apart: rename"),
        (["sweep", "--output", "nowhere/x.html"], "nowhere/x.html can't be written"),
    ],
)
def test_bad_input(tmp_path, refused, monkeypatch, names, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text('{"title": 1}')
    write_sweep(tmp_path / "sweep")
    write_evaluation(tmp_path / "old.summary.json")
    summary = json.loads((tmp_path / "old.summary.json").read_text())
    del summary["figures"][0]["ideal"]
    (tmp_path / "old.summary.json").write_text(json.dumps(summary))
    assert words in refused(main, *names)


def test_a_loss_that_was_no_number(tmp_path):
    write_run(tmp_path / "run", 2)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text(file.read_text().replace("[3.25, 3.25]", "[null, 3.25]"))
    assert main([str(tmp_path / "run"), "--output", str(tmp_path / "page.html")]) == 0
    assert "nan" in Balanced((tmp_path / "page.html").read_text()).text
