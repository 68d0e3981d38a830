"""A small model on disk, and how programs refuse bad input."""

import pytest

import lsjax
from lsjax.checkpoints.huggingface import GenerationDefaults
from lsjax.cli import flags


@pytest.fixture(scope="session")
def model_directory(model, tokenizer, tmp_path_factory):
    """The tiny model with a byte tokenizer; it says to draft 4 tokens with 3 layers."""
    directory = tmp_path_factory.mktemp("models") / "tiny [x] :smile:"  # no markup, no picture
    defaults = GenerationDefaults(exit_layer=3, num_draft_tokens=4)
    lsjax.save(model, directory, generation=defaults, tokenizer=tokenizer)
    return directory


@pytest.fixture(autouse=True)
def tests_keep_their_own_cache(monkeypatch):
    """The programs would change JAX's settings for all tests that follow."""
    monkeypatch.setattr(flags, "keep_compiled_programs", lambda: None)


@pytest.fixture
def refused(capsys):
    """Runs a program that must refuse its input: its one line on stderr."""

    def run(main, *argv) -> str:
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in argv])
        printed = capsys.readouterr()
        assert exit_.value.code == 2, printed.err
        assert printed.err.startswith("error: ") and printed.err.count("\n") == 1, printed.err
        assert printed.out == ""
        return printed.err

    return run
