"""Runs, models and results in a bucket. Long: a server on this machine has it, and leases wait."""

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import lsjax
from lsjax.checkpoints import load
from lsjax.checkpoints.lease import Lease
from lsjax.checkpoints.lock import LOCK, new_owner
from lsjax.checkpoints.run import CHECKPOINTS, METRICS, read_metrics
from lsjax.checkpoints.steps import MARKER, saved_steps
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.cli.flags.config_file import read_config_file
from lsjax.config import ConfigError, DataConfig, as_path
from lsjax.config.paths import find_files, split_step
from lsjax.data import pieces
from lsjax.data.pipeline import packed_rows
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.io import files, lines
from lsjax.io.files import local_copy, whole_directory, write_whole
from lsjax.io.lines import Lines
from lsjax.io.rows import read_lines
from lsjax.model.parameters import named_leaves
from lsjax.training import writer
from lsjax.training.run import Hook
from tests.programs import program

PROOFS = Path(__file__).parents[2] / "scripts" / "proofs"
TINY = ("--config", PROOFS / "tiny_run.py", "--checkpoints.every", 2, "--evaluation.every", 2)


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(PROOFS)
        import fake_bucket

        if fake_bucket.missing():
            pytest.skip(f"needs {fake_bucket.missing()}")
        with fake_bucket.served() as server:
            yield server


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    monkeypatch.setenv("LSJAX_CACHE", str(tmp_path / "cache"))
    return as_path("gs://lsjax-bucket") / tmp_path.name


def run(program, *words) -> int:
    return program([str(word) for word in words])


def message(program, *words, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run(program, *words)
    assert end.value.code == 2
    said = capsys.readouterr().err.lstrip("\n")  # of hidden progress bars
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # by gcsfs, of a trace
def test_a_run_in_a_bucket_resumes_decodes_and_converts(bucket, tmp_path, capsys):
    ours, local = bucket / "run", tmp_path / "run"
    assert run(program("train"), *TINY, "--workdir", ours, "--num-steps", 4) == 0
    assert [step.number for step in saved_steps(ours / CHECKPOINTS)] == [4, 2]
    # As if the process had been killed while it saved step 4.
    (ours / CHECKPOINTS / "4" / MARKER).unlink()
    capsys.readouterr()
    for workdir in (ours, local):
        assert run(program("train"), *TINY, "--workdir", workdir, "--num-steps", 4) == 0
    assert "resumes after step 2" in capsys.readouterr().out
    rows = [
        [
            {k: v for k, v in row.items() if k != "seconds"}
            for row in read_metrics(workdir)
            if row["kind"] != "time"
        ]
        for workdir in (ours, local)
    ]
    assert rows[0] == rows[1] and rows[0][-1]["kind"] == "evaluation"

    hf, output = bucket / "hf", bucket / "texts.jsonl"
    assert run(program("convert"), f"{ours}@best", hf) == 0
    assert "not an empty directory" in message(program("convert"), ours, hf, capsys=capsys)
    words = ("--prompt", "import", "--max-new-tokens", 4, "--json", output)
    texts = []
    for model in (ours, hf, local):
        run(program("decode"), "--model", model, *words, "--profile", bucket / "trace")
        texts.append(json.loads(output.read_text())["token_ids"])
    assert texts[0] == texts[1] == texts[2]
    assert find_files([f"{bucket}/trace/plugins/profile/*/*.xplane.pb"])
    leaves = [named_leaves(load(model)) for model in (hf, local)]
    assert all((leaf == leaves[1][path]).all() for path, leaf in leaves[0].items())
    assert load_tokenizer(hf).fingerprint == load_tokenizer(local).fingerprint


def test_one_of_two_trainers_in_a_bucket_goes_on(bucket, monkeypatch, capsys):
    """It waits for a trainer that was killed, and refuses another one while it runs. Once another
    has taken its lease, it stops before it saves and writes no metrics."""
    ours, config, refusals = bucket / "run", read_config_file(TINY[1]), []
    monkeypatch.setattr(writer, "Lease", partial(Lease, seconds=0.6))
    config = replace(config, num_steps=6, checkpoints=replace(config.checkpoints, every=2))

    def disturbed(run):
        def call(step, model):
            if step == 2:
                refusals.append(message(program("train"), *TINY, "--workdir", ours, capsys=capsys))
            if step == 4:
                write_whole(ours / LOCK, new_owner())
                refusals.append((ours / METRICS).read_bytes())
                while run.writer.holds():
                    time.sleep(0.01)
            return {}

        return Hook("disturbed", 2, call)

    write_whole(ours / LOCK, new_owner())
    with pytest.raises(CheckpointError, match="has begun to write there, .* not renew its lease"):
        lsjax.train(config, ours, hooks=[disturbed])
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "was writing" in one]
    assert "was writing there: waiting for up to 1 s to see whether it still is" in line
    refused, metrics = refusals
    assert "another trainer (process" in refused and "writes there: wait until it ends" in refused
    assert [step.number for step in saved_steps(ours / CHECKPOINTS)] == [4, 2]
    assert (ours / METRICS).read_bytes() == metrics
    assert (ours / LOCK).exists(), "it is the other one's"
    assert lsjax.train(config, ours, hooks=[], quiet=True).step == 6
    assert not (ours / LOCK).exists()


def test_damaged_steps_in_a_bucket_are_moved_aside(bucket, capsys):
    workdir = bucket / "run"
    assert run(program("train"), *TINY, "--workdir", workdir, "--num-steps", 4) == 0
    write_whole(workdir / CHECKPOINTS / "4" / "meta" / "metadata", b"{}")
    assert run(program("train"), *TINY, "--workdir", workdir, "--num-steps", 4) == 0
    assert "step 4 is damaged and skipped" in capsys.readouterr().out
    assert {path.name for path in (workdir / CHECKPOINTS).iterdir()} == {"2", "4", "4.damaged"}
    assert saved_steps(workdir / CHECKPOINTS)[0].meta["data"]


def test_tokens_in_a_bucket_are_those_of_a_disk(bucket, tmp_path, monkeypatch):
    """The corpus too; several pieces, and rows read by their ranges."""
    monkeypatch.setattr(pieces, "SMALLEST_PIECE", 300)
    text = "|".join(f"{n} " + "word " * (n % 11) for n in range(90))
    found = []
    for folder in (bucket, tmp_path):
        write_whole(folder / "corpus.txt", text.encode())
        config = DataConfig(source="text", paths=(f"{folder}/corpus.txt",), separator="|")
        options = dict(split="train", seq_len=32, cache=folder / "tokens")
        for _ in range(2):
            rows = packed_rows(config, ByteTokenizer(), **options)
        found.append((rows.fingerprint, rows.read(np.array([5, 0, -1, len(rows) - 1]))))
        assert len(rows.rows_S) > 8
    assert found[0][0] == found[1][0]
    for name, array in found[1][1].items():
        np.testing.assert_array_equal(found[0][1][name], array)


def test_a_changed_model_is_copied_again(bucket, monkeypatch):
    write_whole(bucket / "tokenizer.json", b"{}")
    write_whole(bucket / "weights.bin", b"large")
    first = local_copy(bucket)
    assert [file.name for file in first.iterdir()] == ["tokenizer.json"]
    assert local_copy(bucket) == first and local_copy(first) == first
    write_whole(bucket / "tokenizer.json", b"[]")
    assert (local_copy(bucket) / "tokenizer.json").read_bytes() == b"[]"
    assert (first / "tokenizer.json").read_bytes() == b"{}"
    for number in (1, 2):
        write_whole(bucket / f"m-0000{number}-of-00002.gguf", b"GGUF")
    assert len([*local_copy(bucket / "m-00002-of-00002.gguf").parent.iterdir()]) == 2
    write_whole(bucket / "tokenizer.json", b"1")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(ConfigError, match="has only 0.0 GB free"):
        local_copy(bucket)
    with pytest.raises(FileNotFoundError, match="none: does not exist"):
        local_copy(bucket / "none")


def test_files_of_a_bucket(bucket):
    for name in ("a.txt", "deep/b.txt", "deep/er/c.txt", "deep/d.json"):
        write_whole(bucket / name, b"one\ntwo\n")
    found = find_files([f"{bucket}/**/*.txt", f"{bucket}/a.txt"])
    assert [str(file.relative_to(bucket)) for file in found] == [
        "a.txt",
        "deep/b.txt",
        "deep/er/c.txt",
    ]
    assert list(read_lines(found[0])) == [(1, 0, "one\n"), (2, 4, "two\n")]
    assert found[0].stat().st_size == 8 and found[0].stat().st_mtime_ns > 1e18
    assert found[0].is_file() and not found[0].is_dir() and (bucket / "deep").is_dir()
    with pytest.raises(ConfigError, match="deep is a directory"):
        find_files([f"{bucket}/deep"])
    with pytest.raises(ConfigError, match="no file matches"):
        find_files([f"{bucket}/*.csv"])
    with pytest.raises(ConfigError, match="no file matches"):
        find_files(["gs://no-bucket/*.csv"])


def test_directories_appear_with_their_last_file_and_stay(bucket, monkeypatch):
    def write(text):
        with whole_directory(bucket / "made", last="config.json") as partial:
            for name in ("config.json", "sub/a.bin"):
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_text(text)
            assert text == "again" or not (bucket / "made").exists()

    write("first")
    write("again")
    names = ("config.json", "sub/a.bin")
    assert [(bucket / "made" / name).read_text() for name in names] == ["first"] * 2


def test_lines_of_a_bucket_are_written_at_intervals_and_at_the_end(bucket, monkeypatch):
    file = bucket / "lines.txt"
    growing = Lines(file)
    growing.write("one\n")
    assert not file.exists()
    growing.flush()
    assert file.read_text() == "one\n"
    monkeypatch.setattr(lines, "PAUSE", -1)
    growing.write("two\n")
    assert file.read_text() == "one\ntwo\n"
    growing.close()
    again = Lines(file)
    again.write("three\n")
    again.close()
    assert file.read_text() == "one\ntwo\nthree\n"
    emptied = Lines(file, empty=True)
    emptied.write("four\n")
    emptied.close()
    assert file.read_text() == "four\n"


def test_a_bucket_that_does_not_exist_or_forbids_is_one_line(bucket, server, tmp_path, capsys):
    none = "gs://no-bucket/run"
    said = message(program("train"), *TINY, "--workdir", none, capsys=capsys)
    assert f"{none} can't be written (NOT_FOUND: Not Found): check that the bucket exists" in said
    assert not server.has_bucket("no-bucket")
    said = message(program("decode"), "--model", none, "--prompt", "a", capsys=capsys)
    assert f"{none}: does not exist" in said
    with server.failing(403):
        said = message(program("train"), *TINY, "--workdir", bucket / "run", capsys=capsys)
        assert "run can't be written (PERMISSION_DENIED: " in said
        for run_program, *words in (
            (program("decode"), "--model", bucket / "run", "--prompt", "a"),
            (program("convert"), bucket / "run", tmp_path / "hf"),
        ):
            said = message(run_program, *words, capsys=capsys)
            assert "run cannot be reached (Forbidden" in said or "run/config.json cannot" in said


def test_text_becomes_a_path_in_a_bucket_or_a_local_one(bucket, monkeypatch):
    assert str(as_path(Path("gs://a/b"))) == "gs://a/b" == str(as_path("gs://a") / "b")
    assert isinstance(as_path("a/b"), Path)
    write_whole(bucket / "run" / "config.json", b"{}")
    assert split_step(f"{bucket}/run@best") == (bucket / "run", "best")
    with pytest.raises(ConfigError, match="s3://a/b is neither a local path nor one in a gs://"):
        as_path("s3://a/b")


def test_without_gcsfs_the_fix_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setattr("lsjax.config.paths.find_spec", lambda _: None)
    said = message(program("decode"), "--model", "gs://a/b", "--prompt", "a", capsys=capsys)
    assert said == "error: gs:// paths need the gcsfs package: pip install 'lsjax[gcs]'\n"
