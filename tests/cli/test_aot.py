"""The program that compiles for TPUs and GPUs: what it refuses, and reports where a compiler is
there."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from lsjax.aot import chips
from lsjax.config import ConfigError, MeshConfig
from lsjax.sharding import make_mesh
from tests.programs import program

main = program("aot")

CONFIGS = Path(__file__).parents[2] / "configs"
QUICKSTART = ("--config", CONFIGS / "quickstart.py")
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the tpu extra"
)
needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(module) for module in chips.COMPILERS["cuda"][0]),
    reason="needs the cuda extra",
)


@pytest.fixture(autouse=True)
def compilation_cache():
    """The program turns it off; jax looks at the setting once, unless it begins anew."""
    before = jax.config.jax_enable_compilation_cache
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    reset_cache()


def test_missing_arguments(refused):
    assert "--config is missing" in refused(main)
    assert "--topology is missing: name a slice such as v5p:4x4x4" in refused(main, *QUICKSTART)


def test_unknown_chips(refused):
    words = refused(main, *QUICKSTART, "--topology", "v9:2x2")
    assert "'v9:2x2' names no known chip (v5e, v5p, v6e, h100, a100, l4, rtx4090): name" in words


def test_no_programs(refused):
    words = refused(main, *QUICKSTART, "--topology", "v5e:2x2", "--programs")
    assert "--programs is empty: choose from train, evaluate, prefill, decode" in words


def test_no_rows(refused):
    words = refused(main, *QUICKSTART, "--topology", "v5e:2x2", "--decoding.batch-size")
    assert "--decoding.batch-size is empty: give numbers of rows, such as 1 8 64" in words


@pytest.mark.parametrize("topology, extra", [("v5e:2x2", "tpu"), ("h100:1", "cuda")])
def test_without_a_compiler(refused, monkeypatch, topology, extra):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    words = refused(main, *QUICKSTART, "--topology", topology)
    assert (
        f"the compiler for {topology.partition(':')[0]} is missing: pip install 'lsjax[{extra}]'"
        in words
    )


@pytest.mark.parametrize("topology", ["h100", "h100:9", "h100:2x4"])
def test_one_host_of_gpus(refused, monkeypatch, topology):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: True)
    words = refused(main, *QUICKSTART, "--topology", topology)
    assert (
        f"{topology!r} is an unknown slice: use one such as h100:8, a100:8, l4:1 or rtx4090:1"
        in words
    )


@needs_libtpu
@pytest.mark.parametrize(
    "flags, words",
    [
        (("--topology", "v5e:3x5"), "'v5e:3x5' is an unknown slice"),
        (("--topology", "v5e:2x2", "--mesh.tensor", "5"), "needs 5 devices, but there are 4"),
        (
            ("--topology", "v5e:2x2", "--mesh.data", "4", "--batch-size", "6"),
            "6 rows (batch_size / micro_batches) can't be sharded over 4 devices",
        ),
        (
            ("--topology", "v5e:2x2", "--mesh.context", "4", "--seq-len", "60"),
            "rows of 60 tokens can't be sharded over mesh.context 4: choose a seq_len that is a "
            "multiple of 8",
        ),
        (
            ("--topology", "v5e:2x2", "--decoding-mesh.slices", "2"),
            "mesh.slices 2 is for training",
        ),
        (
            ("--topology", "v5e:2x2", "--decoding.prompt-tokens", "9999"),
            "is beyond the model's context",
        ),
    ],
)
def test_what_does_not_fit(refused, flags, words):
    assert words in refused(main, *QUICKSTART, *flags)


@needs_libtpu
def test_devices_of_two_slices():
    _, devices = chips.slice_of("v5e:2x2", 2)
    mesh = make_mesh(MeshConfig(slices=2, data=-1, fsdp=2), devices[::-1])
    assert mesh.shape == dict(data=4, fsdp=2, context=1, tensor=1)
    slices = [[device.slice_index for device in row.flat] for row in mesh.devices]
    assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
    for wrong in (1, 4):
        with pytest.raises(ConfigError, match=f"mesh.slices is {wrong}, but the devices are in 2"):
            make_mesh(MeshConfig(slices=wrong, data=-1), devices)


@needs_libtpu
def test_two_at_once():
    """Another program holds libtpu meanwhile, and ends when its input does."""
    other = "import sys\nfrom lsjax.aot.chips import slice_of\nslice_of('v5e:2x2')\n"
    other += "print('holds it', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "holds it\n"
        # In a new process: this one may have loaded libtpu already.
        subprocess.run([sys.executable, "-c", other], input="", text=True, check=True)


@needs_libtpu
def test_a_report_of_a_small_model(tmp_path, capsys):
    """The quickstart's model, cut to two layers, on four chips: what is there, and that devices
    gather each layer's weights once forward and once backward."""
    file = tmp_path / "report.json"
    flags = ["--mesh.data", "2", "--mesh.fsdp", "2", "--model.num-layers", "2"]
    flags += ["--early-exit.exits", "1"]
    topology = ["--topology", "v5e:2x2", "--programs", "train", "evaluate", "--output", str(file)]
    # As in the program: Mosaic refuses exact products, which the tests ask for, of bfloat16.
    with jax.default_matmul_precision("default"):
        assert main([*map(str, QUICKSTART), *topology, *flags]) == 0
    assert "per device" in capsys.readouterr().out
    found = json.loads(file.read_text())
    train, evaluate = found["programs"]
    assert 0 < evaluate["memory"]["temporaries"] < train["memory"]["temporaries"]
    assert evaluate["unknown_loops"] == []
    mesh = {"data": 2, "fsdp": 2, "context": 1, "tensor": 1}
    assert found["meshes"] == {"train": mesh, "evaluate": mesh}
    assert train["too_large"] is None and train["unknown_loops"] == []
    assert 0 < train["memory"]["total"] < train["memory"]["hbm"]
    assert train["cycles"] > 0 and train["seconds"] > 0
    # Rows of the embedding and their gradients; the sum of the table's gradient is wider.
    exchanged = [one["shape"] for one in train["collectives"] if one["kind"] == "all-to-all"]
    assert exchanged and all(shape.startswith("bf16[") for shape in exchanged)
    gathers = [one for one in train["collectives"] if one["kind"] == "all-gather"]
    assert any("fsdp" in one["axes"] and one["count"] == 2 for one in gathers)


@needs_libtpu
def test_reference_kernels_on_a_tpu(tmp_path):
    """Attention is XLA's, and rows are not padded."""
    file = tmp_path / "report.json"
    flags = ["--model.num-layers", "2", "--early-exit.exits", "1", "--topology", "v5e:2x2"]
    flags += ["--programs", "train", "decode", "--decoding.prompt-tokens", "64"]
    found = {}
    for kernels in ("auto", "reference"):
        more = ["--kernels", kernels, "--output", str(file)]
        with jax.default_matmul_precision("default"):
            assert main([*map(str, QUICKSTART), *flags, *more]) == 0
        found[kernels] = json.loads(file.read_text())
        assert found[kernels]["kernels"] == kernels
    (train, decode), (plain_train, plain_decode) = (one["programs"] for one in found.values())
    assert (train["attention"], plain_train["attention"]) == ("splash", "xla")
    # Sums over devices: 5 tokens are verified, padded to 8 rows.
    sums, plain_sums = (
        [sum_["shape"] for sum_ in one["collectives"] if sum_["kind"] == "all-reduce"]
        for one in (decode, plain_decode)
    )
    assert any(shape.startswith("bf16[1,8,") for shape in sums)
    assert any(shape.startswith("bf16[1,5,") for shape in plain_sums)
    assert not any(shape.startswith("bf16[1,8,") for shape in plain_sums)


@needs_libtpu
def test_rounds_of_two_batches(tmp_path, capsys):
    """A program for each number of rows. `auto` reports a round with and one without drafts. Each
    reads its weights, and neither takes all six verifications."""
    file = tmp_path / "report.json"
    flags = ["--model.num-layers", "2", "--early-exit.exits", "1", "--topology", "v5e:2x2"]
    flags += ["--programs", "decode", "--decoding.prompt-tokens", "64", "--output", str(file)]
    flags += ["--decoding.num-draft-tokens", "1", "--decoding.batch-size", "1", "9"]
    found = {}
    for strategy in ("autoregressive", "auto"):
        more = ["--decoding.strategy", strategy]
        with jax.default_matmul_precision("default"):
            assert main([*map(str, QUICKSTART), *flags, *more]) == 0
        found[strategy] = json.loads(file.read_text())["programs"]
        printed = capsys.readouterr().out
        assert "decode, 9 rows" in printed and "once per call" in printed
    assert [one["round"]["rows"] for one in found["autoregressive"]] == [1, 9]
    kinds = [(one["round"]["rows"], one["round"]["num_draft_tokens"]) for one in found["auto"]]
    assert kinds == [(1, 0), (1, 1), (9, 0), (9, 1)]
    for one in [*found["autoregressive"], *found["auto"]]:
        assert one["unknown_loops"] == []
        assert one["seconds"] == max(one[f"{part}_seconds"] for part in ("memory", "core", "sent"))
        assert one["seconds"] <= one["serial_seconds"]
        assert one["round"]["once_per_call"]["serial_seconds"] >= 0
    token, without = found["autoregressive"][0], found["auto"][0]
    assert token["operations"] < without["operations"] < 3 * token["operations"]


@needs_libtpu
def test_two_slices_send_only_gradients(tmp_path):
    """Layers have gradients in bfloat16, the table and the norms in float32."""
    file = tmp_path / "report.json"
    flags = ["--mesh.slices", "2", "--mesh.fsdp", "4", "--model.hidden-size", "512"]
    flags += ["--model.no-tie-embeddings", "--model.num-layers", "2", "--early-exit.exits", "1"]
    flags += ["--batch-size", "8", "--programs", "train", "--output", str(file)]
    with jax.default_matmul_precision("default"):
        assert main([*map(str, QUICKSTART), "--topology", "v5e:2x2", *flags]) == 0
    found = json.loads(file.read_text())
    mesh = {"slices": 2, "data": 1, "fsdp": 4, "context": 1, "tensor": 1}
    assert found["meshes"]["train"] == mesh
    assert found["training"]["devices"] == 8
    (train,) = found["programs"]
    between = [one for one in train["collectives"] if "slices" in one["axes"]]
    assert {one["kind"] for one in between} == {"all-reduce"}
    assert train["between_bytes"] == sum(one["sent"] * one["count"] for one in between)
    layer, table = 512 * (2 * 256 + 2 * 128) + 3 * 512 * 704, 384 * 512
    matrices = 2 * 2 * layer + 4 * 2 * table
    assert matrices / 4 <= train["between_bytes"] <= matrices / 4 + 20_000


@needs_cuda
def test_reference_kernels_on_a_gpu(tmp_path):
    file = tmp_path / "report.json"
    flags = [
        "--model.num-layers",
        "2",
        "--early-exit.exits",
        "1",
        "--topology",
        "h100:1",
        "--kernels",
        "reference",
    ]
    flags += ["--programs", "train", "decode", "--decoding.prompt-tokens", "64"]
    assert main([*map(str, QUICKSTART), *flags, "--output", str(file)]) == 0
    assert [one["attention"] for one in json.loads(file.read_text())["programs"]] == ["xla"] * 2


@pytest.mark.parametrize("card", ["a100", "l4", "rtx4090"])
@needs_cuda
def test_other_cards(tmp_path, card):
    """A token of a small model."""
    file = tmp_path / "report.json"
    flags = ["--model.num-layers", "2", "--early-exit.exits", "1", "--topology", f"{card}:1"]
    flags += [
        "--programs",
        "decode",
        "--decoding.strategy",
        "autoregressive",
        "--decoding.prompt-tokens",
        "64",
    ]
    assert main([*map(str, QUICKSTART), *flags, "--output", str(file)]) == 0
    (decode,) = json.loads(file.read_text())["programs"]
    assert decode["attention"] == "flash decoding"
    assert 0 < decode["round"]["weights_seconds"] < decode["seconds"]


@needs_cuda
def test_a_report_for_a_gpu(tmp_path, capsys):
    """A token of a small model on one card, and its training on two."""
    file = tmp_path / "report.json"
    flags = ["--output", str(file), "--model.num-layers", "2", "--early-exit.exits", "1"]
    decoding = ["--programs", "decode", "--decoding.strategy", "autoregressive"]
    decoding += ["--decoding.prompt-tokens", "64"]
    assert main([*map(str, QUICKSTART), "--topology", "h100:1", *decoding, *flags]) == 0
    assert "decode: a token" in capsys.readouterr().out
    (decode,) = json.loads(file.read_text())["programs"]
    assert 0 < decode["round"]["weights_seconds"] < decode["seconds"]
    assert decode["operations"] > 0
    assert decode["unknown_loops"] == [] and decode["attention"] == "flash decoding"

    training = ["--programs", "train", "--mesh.data", "2"]
    assert main([*map(str, QUICKSTART), "--topology", "h100:2", *training, *flags]) == 0
    (train,) = json.loads(file.read_text())["programs"]
    assert train["attention"] == "flash" and train["flops"] > 0
    kernels = {name: n for name, n in train["kernels"].items() if name.startswith("flash")}
    assert kernels == {
        "flash_forward": 2,
        "flash_dq": 2,
        "flash_dkv": 2,
    }
    assert {one["kind"] for one in train["collectives"]} == {"all-reduce"}


@needs_cuda
def test_a_program_that_no_card_holds(capsys):
    """The compiler takes it; the report compares it with the card."""
    flags = ["--model.num-layers", "2", "--model.vocab-size", "200000000"]
    flags += ["--early-exit.exits", "1", "--programs", "decode"]
    flags += ["--decoding.prompt-tokens", "64"]
    assert main([*map(str, QUICKSTART), "--topology", "h100:1", *flags]) == 1
    assert "decode needs" in capsys.readouterr().out
