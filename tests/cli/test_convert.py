"""The convert program: what it writes, and how it refuses."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from lsjax.checkpoints import load
from lsjax.checkpoints.huggingface import GenerationDefaults, read_generation_defaults
from lsjax.cli.errors import one_line_errors
from lsjax.config import ConfigError
from lsjax.data.tokenizer import MOST_EXTRA
from lsjax.data.tokenizer_backends import bytes_by_character
from lsjax.data.tokenizer_files import load_tokenizer
from tests.checkpoints.test_gguf import from_golden, metadata, write
from tests.programs import program

main = program("convert")

GOLDEN = Path(__file__).parents[1] / "golden"


def source(tmp_path: Path, tokens: int = 64) -> Path:
    """A golden model with a tokenizer of that many tokens: three special ones and characters."""
    directory = Path(shutil.copytree(GOLDEN / "gqa_tied", tmp_path / "source"))
    special = ["<pad>", "<s>", "</s>"]
    pieces = special + [chr(0x100 + i) for i in range(tokens - len(special))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_writes_a_whole_directory(tmp_path, capsys, dtype):
    given, made = source(tmp_path), tmp_path / "made"
    assert main([str(given), str(made), "--dtype", dtype]) == 0
    assert f"million parameters in {dtype}" in capsys.readouterr().out
    one, other = load(given, dtype=dtype), load(made, dtype=dtype)
    assert other.dtype == jnp.dtype(dtype) and one.config == other.config
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert read_generation_defaults(made) == GenerationDefaults(exit_layer=2, num_draft_tokens=3)
    assert load_tokenizer(made).fingerprint == load_tokenizer(given).fingerprint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "source"]


def test_reads_all_parts_of_a_split_gguf(tmp_path, capsys):
    config, tensors = from_golden("gqa_tied")
    pieces = [*bytes_by_character()][: config.vocab_size - 1]
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*pieces, pieces[0] + pieces[1]],
        "tokenizer.ggml.merges": [f"{pieces[0]} {pieces[1]}"],
    }
    write(tmp_path / "m.gguf", metadata(config) | fields, tensors, split_max_tensors=20)
    assert main([str(tmp_path / "m-00002-of-00002.gguf"), str(tmp_path / "made")]) == 0
    assert "million parameters" in capsys.readouterr().out
    made, twin = (jax.tree.leaves(load(path)) for path in (tmp_path / "made", GOLDEN / "gqa_tied"))
    jax.tree.map(np.testing.assert_array_equal, made, twin)
    assert load_tokenizer(tmp_path / "made").encode(pieces[0] + pieces[1]) == [63]


def refused(capsys: pytest.CaptureFixture, *argv: Path) -> str:
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in argv])
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    assert printed.out == ""
    return printed.err


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    given = source(tmp_path)
    assert "nowhere: does not exist" in refused(capsys, tmp_path / "nowhere", tmp_path / "made")
    assert "is not an empty directory" in refused(capsys, given, given)
    (given / "model.safetensors").write_bytes(b"cut")
    assert "model.safetensors: Error while deserializing header" in refused(
        capsys, given, tmp_path / "made"
    )
    (given / "config.json").unlink()
    assert "config.json: does not exist" in refused(capsys, given, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_tokenizer_must_belong_to_the_model(tmp_path, capsys):
    given = source(tmp_path, tokens=64 + MOST_EXTRA + 1)
    words = "129 tokens, but the model's table has 64"
    assert words in refused(capsys, given, tmp_path / "made")
    (given / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(capsys, given, tmp_path / "made")


def test_a_few_tokens_without_a_row_are_kept(tmp_path, capsys):
    """Such as a <pad> that somebody added."""
    given, made = source(tmp_path, tokens=65), tmp_path / "made"
    assert main([str(given), str(made)]) == 0
    assert load_tokenizer(made).vocab_size == 65 and load(made).config.vocab_size == 64
    capsys.readouterr()


def test_help_explains(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    assert "SOURCE DESTINATION" in printed and "bfloat16" in printed


@pytest.mark.parametrize(
    "error, code, printed",
    [
        (ConfigError("[3] is\n not 4"), 2, "error: [3] is not 4\n"),
        (FileNotFoundError(2, "No such file", "a"), 2, "error: [Errno 2] No such file: 'a'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_of_the_input(capsys, error, code, printed):
    with pytest.raises(SystemExit) as exit_, one_line_errors():
        raise error
    assert exit_.value.code == code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("error", [ValueError("a bug"), TypeError("a bug")])
def test_bugs_keep_their_traceback(error):
    with pytest.raises(type(error), match="a bug"), one_line_errors():
        raise error


def test_writes_the_first_layers(tmp_path, capsys):
    given, made = source(tmp_path), tmp_path / "made"
    assert main([str(given), str(made), "--exit", "2"]) == 0
    assert load(made).config.num_layers == 2
    assert read_generation_defaults(made) == GenerationDefaults()
    layers = load(given).config.num_layers
    with pytest.raises(SystemExit):
        main([str(given), str(tmp_path / "more"), "--exit-layer", str(layers + 1)])
    message = f"exit layer {layers + 1} is out of range: use --exit-layer 1..{layers}"
    assert message in capsys.readouterr().err
