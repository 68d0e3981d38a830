"""docs/results.md and README.md's tables, written from reports (scripts/results.py)."""

from pathlib import Path

import pytest

from lsjax.reporting.record import write_report
from tests.reporting.reports import measured, report

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    """The scripts, in an empty folder."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.chdir(tmp_path)
    import evidence_list
    import results

    return evidence_list, results


def pages(names) -> None:
    Path("docs").mkdir()
    sections = [f"<!-- {name} -->\nold {name}\n<!-- end {name} -->\n" for name in names]
    Path("docs/results.md").write_text("".join(["by hand\n", *sections]))
    Path("README.md").write_text("<!-- results -->\n| what |\n|---|\n<!-- end results -->\n")


def test_a_section_comes_from_its_report(scripts):
    evidence_list, results = scripts
    pages([one.name for one in evidence_list.EXPERIMENTS])
    first, second, *_ = evidence_list.EXPERIMENTS
    first.directory.mkdir(parents=True)
    write_report(report(measured("layerskip", 2.5), measured("plain", 2.25)), first.directory)
    assert results.main() == 0
    page, readme = Path("docs/results.md").read_text(), Path("README.md").read_text()
    assert "by hand" in page and f"old {first.name}" not in page and f"old {second.name}" in page
    assert f"    {first.command}\n" in page and f"## {first.title}" in page
    assert "| difference | +0.250" in page
    assert f"| {first.title} |" in readme and "+0.250" in readme
    results.main()
    assert Path("README.md").read_text() == readme and Path("docs/results.md").read_text() == page


def test_a_row_stays_when_its_report_is_gone(scripts):
    evidence_list, results = scripts
    pages([one.name for one in evidence_list.EXPERIMENTS])
    first, second, *_ = evidence_list.EXPERIMENTS
    for one, loss in ((first, 2.5), (second, 2.75)):
        one.directory.mkdir(parents=True)
        write_report(report(measured("layerskip", loss), measured("plain", 2.25)), one.directory)
        results.main()
        (one.directory / "report.json").unlink()
    rows = Path("README.md").read_text().splitlines()
    assert [row.split(" | ")[0] for row in rows[3:5]] == [f"| {first.title}", f"| {second.title}"]
    assert "+0.250" in rows[3] and "+0.500" in rows[4]


def test_no_table_has_rows_of_two_machines(scripts):
    evidence_list, results = scripts
    titles = [one.title for one in evidence_list.EXPERIMENTS[:3]]
    new = {
        titles[0]: ("one", [titles[0], "1"]),
        titles[1]: ("another", [titles[1], "2"]),
        titles[2]: ("one", [titles[2], "3"]),
    }
    first = results.tables_of("<!-- results -->\n<!-- end results -->", dict([*new.items()][:2]))
    readme = "\n".join(["<!-- results -->", *first, "<!-- end results -->"])
    blocks = "\n".join(results.tables_of(readme, dict([*new.items()][2:]))).split("\n\n")
    found = [[line.split(" | ")[0].strip("| ") for line in one.splitlines()] for one in blocks]
    assert [(one[0], one[2:]) for one in found] == [
        ("on one", [titles[0], titles[2]]),
        ("on another", [titles[1]]),
    ]


def test_a_table_of_another_experiment(scripts):
    evidence_list, results = scripts
    pages([one.name for one in evidence_list.EXPERIMENTS])
    last = evidence_list.EXPERIMENTS[-1]
    last.directory.mkdir(parents=True)
    (last.directory / evidence_list.TABLE).write_text("| recipe |\n|---|\n| best |\n")
    picture = f"{last.name}.png"
    (last.directory / picture).write_bytes(b"its picture")
    results.main()
    page = Path("docs/results.md").read_text()
    assert f"| recipe |\n|---|\n| best |\n\n![{last.title}]({picture})\n" in page
    assert Path("docs", picture).read_bytes() == b"its picture"


def test_a_page_without_the_section_is_refused(scripts):
    evidence_list, results = scripts
    first, *others = evidence_list.EXPERIMENTS
    pages([one.name for one in others])
    first.directory.mkdir(parents=True)
    write_report(report(measured("layerskip", 2.5), measured("plain", 2.25)), first.directory)
    with pytest.raises(SystemExit, match=f"<!-- {first.name} -->"):
        results.main()


def test_the_page_has_all_sections(scripts):
    evidence_list, _ = scripts
    page, readme = (ROOT / "docs/results.md").read_text(), (ROOT / "README.md").read_text()
    for one in evidence_list.EXPERIMENTS:
        assert page.count(f"<!-- {one.name} -->\n") == page.count(f"<!-- end {one.name} -->\n") == 1
    assert readme.count("<!-- results -->\n") == readme.count("<!-- end results -->\n") == 1
