"""How programs refuse bad input."""

import pytest

from lsjax.cli import setup


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a program that must refuse its input: its one line on stderr."""
    monkeypatch.setattr(setup, "PATIENCE", 3600)  # a slow machine's compiling is no line of it

    def run(main, *argv) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in argv])
        printed = capsys.readouterr()
        assert exit_.value.code == 2, printed.err
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        assert printed.out == ""
        return printed.err

    return run
