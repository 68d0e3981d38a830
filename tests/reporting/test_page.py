"""Pages of reports that were made by hand."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from lsjax.config import ConfigError
from lsjax.reporting.compared import auto_ratio, compare
from lsjax.reporting.figures import in_words
from lsjax.reporting.page import write_page
from lsjax.reporting.record import read_report, write_report
from tests.reporting.reports import answers, measured, report

STEPS = [
    {"kind": "step", "step": n, "last_exit_loss": 3.0, "exits": [1, 4], "exit_losses": [4.0, 3.0]}
    for n in (1, 2)
]
EVALUATION = {"kind": "evaluation", "step": 2, "loss_E": [4.0] * 16, "agreement_E": [0.5] * 16}
TEXTS = (
    {
        "by": "exit 1",
        "prompt": "<p>",
        "tokens": [
            {"text": "a", "origin": "added", "probability": 0.5},
            {"text": "&b", "origin": "accepted", "exit": 1, "probability": 0.25},
            {"text": "c", "origin": "corrected", "rejected": '"x<', "probability": 1.0},
        ],
    },
)


@pytest.fixture
def whole():
    models = [
        measured("layerskip", 2.5, exits=(1,), answers=answers(), training=(*STEPS, EVALUATION)),
        measured("plain", 2.0, training=tuple(STEPS), training_seconds=90.0),
    ]
    made = report(
        *models, texts=TEXTS, recipe={"early_exit.exits": [1, 2], "data.separator": "a|\n"}
    )
    return replace(made, answer=in_words(made))


class Reader(HTMLParser):
    """Text by tag, and what the page would fetch."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.texts, self.titles = [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "link", "img", "iframe") or "src" in given:
            self.fetched.append(tag)
        self.fetched += [v for k, v in attrs if k.endswith("href") and not v.startswith("#")]
        self.titles.append((given.get("class"), given.get("title")))

    def handle_data(self, data):
        self.texts.append(data)


def test_a_page(whole, tmp_path):
    """One file that fetches nothing, with the answer, all pictures and the marked text."""
    file = write_page(whole, tmp_path)
    page, reader = file.read_text(), Reader()
    reader.feed(page)
    assert reader.fetched == []
    assert whole.answer in reader.texts and "<p>" in reader.texts and "&b" in reader.texts
    assert page.count("<svg ") == 4
    names = {
        "exits.svg",
        "acceptance.svg",
        "speeds.svg",
        "training.svg",
        "report.html",
        "report.md",
    }
    assert {one.name for one in tmp_path.iterdir()} == names
    assert ("accepted", "exit 1, probability 0.25") in reader.titles
    assert ("corrected", 'probability 1.0, instead of "x<') in reader.titles
    text = "".join(reader.texts)
    assert "training without LayerSkip, seed 0" in text and "1.5 minutes" in text
    assert "early_exit.exits" in text and "1 2" in text


def test_markdown(whole, tmp_path):
    """The same tables and pictures; rows of a table have as many cells as its heading."""
    write_page(whole, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"**{whole.answer}**" in text
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / name).exists()
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.replace(r"\|", "").count("|") for line in block.splitlines()}) == 1, block
    assert r"| data.separator | `a\|\n` |" in text
    assert "| 1* | 17.500" in text and "| autoregressive | 1.00" in text


def test_little_was_measured(tmp_path):
    """A model without texts and training has the picture of its exits only."""
    made = report(measured("given", 2.0))
    write_page(replace(made, answer=in_words(made)), tmp_path)
    assert {one.name for one in tmp_path.iterdir()} == {"exits.svg", "report.html", "report.md"}


def test_reports_are_read_as_they_were_written(whole, tmp_path):
    write_report(whole, tmp_path)
    assert read_report(tmp_path) == whole
    (tmp_path / "report.json").write_text('{"format": 0}')
    with pytest.raises(ConfigError, match="has format 0, but this lsjax reads 1: redo it"):
        read_report(tmp_path)
    with pytest.raises(ConfigError, match="has no report.json: name the --output of"):
        read_report(tmp_path / "none")


def test_comparing(whole, tmp_path):
    """Differences from the first one, on the same batches and prompts."""
    faster = measured("layerskip", 2.25, exits=(2,), answers=answers(auto_seconds=(4.0, 2.5)))
    other = report(faster, measured("plain", 2.0))
    for name, made in (("one", whole), ("two", other)):
        (tmp_path / name).mkdir()
        write_report(made, tmp_path / name)
    words, page = compare([tmp_path / "one", tmp_path / "two"], tmp_path / "both")
    assert words.startswith("one: loss 2.500, auto 2.00 (2.00 to 2.00)x, self speculative, exit 1")
    assert "loss 2.250, difference -0.250 (-0.250 to -0.250), auto 3.25 (2.50 to 4.00)x" in words
    assert (auto_ratio(whole, other).low, auto_ratio(whole, other).high) == (1.25, 2.0)
    reader = Reader()
    reader.feed(page.read_text())
    assert words in reader.texts and page.read_text().count("<svg ") == 1


def test_what_was_not_measured_alike_is_not_compared(whole, tmp_path):
    models = tuple(replace(one, alike={"machine": "c"}) for one in whole.models)
    for name, made in (("one", whole), ("two", replace(whole, models=models))):
        (tmp_path / name).mkdir()
        write_report(made, tmp_path / name)
    both = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(ConfigError, match=r"one and two were not measured alike \(machine: 'm'"):
        compare(both, tmp_path / "both")
    assert not (tmp_path / "both").exists()
