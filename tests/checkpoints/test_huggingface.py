"""Hugging Face directories: round trips and damage. tests/families has transformers' numbers."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from flax import nnx
from safetensors.numpy import load_file, save_file

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.families import NEUTRAL
from lsjax.checkpoints.huggingface import GenerationDefaults, read_generation_defaults, save
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import LlamaConfig, RopeScaling
from lsjax.model.llama import Llama, stacked
from tests.marks import long

GOLDEN = Path(__file__).parents[1] / "golden"
Q0 = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def copied(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def edit_json(file: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def edit_tensors(directory: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})


def edit_header(file: Path, change: Callable[[dict], object]) -> None:
    blob = file.read_bytes()
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + blob[8 + length :])


def assert_same(one: Llama, other: Llama) -> None:
    assert one.config == other.config
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_loaded_model_has_the_structure_of_a_new_one():
    model = load(GOLDEN / "biases")
    new = jax.eval_shape(lambda: Llama(model.config, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(model) == jax.tree.structure(new)
    assert isinstance(model.layers, nnx.List)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", *long("float16")])
@pytest.mark.parametrize("form", ["one file", "stacked, several files"])
@pytest.mark.parametrize("name", ["biases", *long("mha_untied", "llama3_rope")])
def test_export_then_import_is_bit_equal(tmp_path, name, form, dtype):
    model = load(GOLDEN / name, dtype=dtype)
    assert model.dtype == jnp.dtype(dtype)
    if form == "one file":
        save(model, tmp_path / "out")
        assert (tmp_path / "out" / WEIGHTS).exists()
    else:
        save(stacked(model), tmp_path / "out", shard_bytes=10_000)
        sizes = [file.stat().st_size for file in (tmp_path / "out").glob("model-*.safetensors")]
        assert len(sizes) > 2 and max(sizes) < 10_000 + 3_000  # the header comes on top
    assert_same(load(tmp_path / "out", dtype=dtype), model)


def test_export_gives_back_the_tensors_that_were_imported(tmp_path):
    save(load(GOLDEN / "mha_untied"), tmp_path / "out")
    ours, theirs = (load_file(path / WEIGHTS) for path in (tmp_path / "out", GOLDEN / "mha_untied"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    with safetensors.safe_open(tmp_path / "out" / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_export_of_a_new_model(tmp_path):
    scaling = RopeScaling(kind="llama3", factor=8.0)
    config = LlamaConfig.tiny(num_layers=2, rope_scaling=scaling, rope_theta=5e5, head_dim=20)
    model = jax.jit(lambda: Llama(config, rngs=nnx.Rngs(0)))()
    save(model, tmp_path / "deep" / "out")
    assert_same(load(tmp_path / "deep" / "out"), model)


def test_config_is_readable_by_transformers_4_and_5(tmp_path):
    save(load(GOLDEN / "linear_rope"), tmp_path / "out")
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 10_000
    assert raw["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
    assert raw["rope_parameters"].items() >= raw["rope_scaling"].items()
    assert raw["eos_token_id"] is None  # not transformers' default of 2


def test_generation_defaults(tmp_path):
    assert read_generation_defaults(GOLDEN / "gqa_tied") == GenerationDefaults(
        exit_layer=2, num_draft_tokens=3
    )
    assert read_generation_defaults(GOLDEN / "biases") == GenerationDefaults()
    assert read_generation_defaults(tmp_path / "model.gguf") == GenerationDefaults()
    kept = GenerationDefaults(exit_layer=1, num_draft_tokens=7, agreement_E=(0.25, 1.0))
    save(load(GOLDEN / "gqa_tied"), tmp_path / "out", generation=kept)
    assert read_generation_defaults(tmp_path / "out") == kept
    # What generation_config.json does not say is taken from config.json.
    edit_json(tmp_path / "out" / "config.json", lambda raw: raw.update(num_assistant_tokens=5))
    edit_json(tmp_path / "out" / "generation_config.json", lambda raw: raw.clear())
    assert read_generation_defaults(tmp_path / "out") == GenerationDefaults(num_draft_tokens=5)
    edit_json(tmp_path / "out" / "config.json", lambda raw: raw.update(assistant_early_exit=0))
    with pytest.raises(CheckpointError, match="out: assistant_early_exit .*: exit_layer 0 must"):
        read_generation_defaults(tmp_path / "out")


def test_export_refuses_a_directory_with_something_in_it(tmp_path):
    model = load(GOLDEN / "mha_untied")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an empty directory"):
        save(model, tmp_path)
    with pytest.raises(CheckpointError, match="notes: is not an empty directory"):
        save(model, tmp_path / "notes")
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    assert_same(load(tmp_path / "empty"), model)


def test_interrupted_export_leaves_nothing(tmp_path):
    def interrupted(parts):
        yield from parts[:5]
        seen.extend(tmp_path.iterdir())
        raise KeyboardInterrupt

    seen: list[Path] = []
    with pytest.raises(KeyboardInterrupt):
        save(load(GOLDEN / "mha_untied"), tmp_path / "out", track=interrupted)
    assert len(seen) == 1 and ".partial-" in str(seen[0])
    assert list(tmp_path.iterdir()) == []


def test_links_are_followed_as_in_the_hub_cache(tmp_path):
    blobs = copied(tmp_path, "sharded")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for number, file in enumerate(blobs.iterdir()):
        blob = file.rename(tmp_path / f"blob{number}")
        (snapshot / file.name).symlink_to(Path("..") / blob.name)
    assert_same(load(snapshot), load(GOLDEN / "sharded"))


def test_derived_tensors_of_older_checkpoints_are_skipped(tmp_path):
    directory = copied(tmp_path, "mha_untied")
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    edit_tensors(directory, lambda t: t.update({name: np.ones(4, np.float32)}))
    assert_same(load(directory), load(GOLDEN / "mha_untied"))


def test_redundant_head_must_be_the_embedding(tmp_path):
    directory = copied(tmp_path, "mha_untied")
    edit_json(directory / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    with pytest.raises(CheckpointError, match="'lm_head.weight': differs .* tie_word_embeddings"):
        load(directory)
    edit_tensors(directory, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    assert load(directory).head is None


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(architectures=["GPT2LMHeadModel"]),
            "'GPT2LMHeadModel'. is .*; only Llama",
        ),
        (
            dict(architectures=None, model_type="gpt2"),
            "architecture 'gpt2' is .*; only Llama",
        ),
        (dict(architectures=["Qwen3MoeForCausalLM"]), "'Qwen3MoeForCausalLM'. is not supported"),
        (dict(architectures=["Qwen2ForCausalLM"]), "q_proj.bias': tensor is missing .6 of 27"),
        (dict(architectures=7), "architecture 7"),
        (dict(hidden_act="gelu"), "hidden_act is 'gelu', .* in which it is 'silu'"),
        (dict(quantization_config={"bits": 4}), "quantization_config"),
        (dict(hidden_size=None), "hidden_size None must be a whole number"),
        (dict(hidden_size="32"), "hidden_size '32' must be a whole number"),
        (dict(hidden_size=32.0), "hidden_size 32.0 must be a whole number"),
        (dict(num_hidden_layers=True), "num_layers True must be a whole number"),
        (dict(num_hidden_layers=10**4), "10000 layers, but 21 tensors"),
        (dict(num_hidden_layers=10**12), "num_hidden_layers is 1000000000000, more than 10000"),
        (dict(num_hidden_layers=0), "num_layers 0 must be"),
        (dict(num_hidden_layers=1), "'model.layers.1.* .*expects no such tensor"),
        (dict(num_hidden_layers=3), "'model.layers.2.*' *: tensor is missing .9 of 30"),
        (dict(num_attention_heads=0), "num_heads 0 must be"),
        (dict(num_key_value_heads=3), "num_heads 4 is not a multiple of num_kv_heads 3"),
        (dict(head_dim=7), "head_dim 7 must be even"),
        (dict(vocab_size=65), "'lm_head.weight': shape .64, 32., but .* .65, 32."),
        (
            dict(intermediate_size=2**31 - 1),
            "shape .32, 48., but the config expects .32, 2147483647",
        ),
        (dict(rms_norm_eps="small"), "norm_eps 'small' must be a finite number"),
        (dict(rms_norm_eps=float("nan")), "norm_eps nan must be a finite number"),
        (dict(tie_word_embeddings="no"), "tie_embeddings 'no' must be True or False"),
        (dict(attention_bias=True), "o_proj.bias': tensor is missing .8 of 29"),
        (dict(rope_scaling=[1]), "rope_scaling is .1., but must be an object"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope type 'dynamic'"),
        (dict(rope_parameters={"rope_type": "longrope"}), "rope type 'longrope'"),
        (dict(rope_parameters={"rope_type": "yarn"}), "rope: rope_scaling.factor is missing"),
        (dict(rope_scaling={"type": 3}), "rope type 3; only linear, llama3, yarn"),
        (dict(rope_scaling={"type": "linear"}), "rope: rope_scaling.factor is missing"),
        (dict(rope_scaling={"type": []}), "rope type \\[\\]; only linear"),
        (
            dict(rope_scaling={"type": "linear", "factor": 0.5}),
            "factor 0.5 must be a finite number of at least 1",
        ),
        (
            dict(rope_scaling={"type": "linear", "factor": float("inf")}),
            "factor inf must be a finite number",
        ),
        (dict(rope_parameters={"rope_theta": "1e4"}), "rope_theta '1e4' must be a finite number"),
        (
            dict(rope_parameters={"rope_theta": -1}),
            "rope_theta -1 must be a finite number above 0",
        ),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
        (dict(sliding_window=4096), "sliding_window is 4096, which changes the computation"),
        (dict(attention_multiplier=0.5), "attention_multiplier is 0.5"),
        (dict(embedding_multiplier=12.0), "embedding_multiplier is 12.0"),
        (dict(logits_scaling=8), "logits_scaling is 8"),
        (dict(residual_multiplier=0.22), "residual_multiplier is 0.22"),
        (dict(num_local_experts=8), "num_local_experts is 8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_that_cannot_work(tmp_path, change, message):
    directory = copied(tmp_path, "mha_untied")
    edit_json(directory / "config.json", lambda raw: raw.update(change))
    with pytest.raises(CheckpointError, match=message) as error:
        load(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)


def test_keys_that_change_nothing(tmp_path, caplog):
    """Neutral and harmless values pass without a word; unknown keys get one warning."""
    directory = copied(tmp_path, "mha_untied")
    expected = open_checkpoint(directory).config
    neutral = {key: value for key, values in NEUTRAL.items() for value in values}
    for values in (dict.fromkeys(NEUTRAL), neutral | {"use_cache": False}):
        edit_json(directory / "config.json", lambda raw, values=values: raw.update(values))
        assert open_checkpoint(directory).config == expected
    assert not caplog.records
    edit_json(directory / "config.json", lambda raw: raw.update(novel_gate=True, a=0, b=None))
    assert open_checkpoint(directory).config == expected
    (record,) = caplog.records
    assert record.getMessage().endswith("config.json: unknown keys are ignored: a, novel_gate")


def nan(tensors):
    tensors["model.norm.weight"][3] = np.nan


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q0), f"'{Q0}': tensor is missing .1 of 21"),
        (
            lambda t: t.update(stray=np.zeros(3)),
            "'stray': shape .*expects no such tensor",
        ),
        (lambda t: t.update({Q0: t[Q0][:-1]}), f"'{Q0}': shape .31, 32., but .* .32, 32."),
        (lambda t: t.update({Q0: t[Q0].astype(np.int8)}), f"'{Q0}' has the dtype I8, not F64 or"),
        (nan, "'model.norm.weight': 1 of 32 values are NaN, infinite or"),
        (lambda t: t.update({Q0: t[Q0] / np.float32(0)}), f"'{Q0}': 1024 of 1024 values are NaN"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_tensors_that_are_not_the_models(tmp_path, change, message):
    directory = copied(tmp_path, "mha_untied")
    edit_tensors(directory, change)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


@pytest.mark.parametrize("name", ["mha_untied", "gqa_tied"])
@pytest.mark.parametrize("values", [1, 100])
def test_tensors_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch, name, values):
    """The same weights, and the same count of bad values, from rows far apart."""
    whole = load(GOLDEN / name)
    monkeypatch.setattr("lsjax.checkpoints.tensors.AT_ONCE", values)
    assert_same(load(GOLDEN / name), whole)

    def spoil(tensors):
        tensors[Q0][[0, 9, -1], 5] = np.inf

    directory = copied(tmp_path, name)
    edit_tensors(directory, spoil)
    with pytest.raises(CheckpointError, match=f"'{Q0}': 3 of 1024 values are NaN"):
        load(directory)


def test_weights_beyond_the_range_of_float16(tmp_path):
    directory = copied(tmp_path, "mha_untied")
    edit_tensors(directory, lambda t: t.update({Q0: t[Q0] * np.float32(1e6)}))
    with pytest.raises(CheckpointError, match=f"'{Q0}': .* too large for float16"):
        load(directory, dtype=jnp.float16)
    assert load(directory, dtype=jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "entry, message",
    [
        (dict(dtype="F33"), "unknown variant `F33`"),
        (dict(dtype=None), "invalid type: null"),
        (dict(shape="32"), 'invalid type: string "32"'),
        (dict(shape=[-32, -32]), "invalid value: integer `-32`"),
        (dict(shape=[32.0, 32]), "invalid type: floating point `32.0`"),
        (dict(shape=[2**62, 2**62]), "overflow computing buffer size"),
        (dict(shape=[10**4000]), "number out of range"),
        (dict(shape=[32, 31]), "invalid shape, data type, or offset"),
        (dict(data_offsets=[0]), "invalid length 1, expected a tuple of size 2"),
        (dict(data_offsets=[10**9, 10**9 + 4096]), "invalid offset for tensor"),
        (dict(data_offsets=[0, 4096]), "invalid offset for tensor"),
    ],
)
def test_header_that_lies(tmp_path, entry, message):
    """What the safetensors package says of each."""
    directory = copied(tmp_path, "mha_untied")
    edit_header(directory / WEIGHTS, lambda header: header[Q0].update(entry))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: .*{message}.*: damaged") as error:
        load(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda b: b"", "header too small"),
        (lambda b: b[:5], "header too small"),
        (lambda b: b[:500], "invalid header length"),
        (lambda b: b[:-1], "file not fully covered"),
        (lambda b: b + b"\0", "file not fully covered"),
        (lambda b: (2**63).to_bytes(8, "little") + b[8:], "header too large"),
        (lambda b: b[:8] + b"[" * (len(b) - 8), "invalid JSON in header"),
        (lambda b: b"a text file, not a model", "header too large"),
    ],
)
def test_damaged_safetensors(tmp_path, damage, message):
    file = copied(tmp_path, "mha_untied") / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: .*{message}.*: damaged or cut off"):
        load(file.parent)


@pytest.mark.parametrize("target", ["../weights.safetensors", "/etc/passwd", "..", "", 3, None])
def test_index_that_points_elsewhere(tmp_path, target):
    directory = copied(tmp_path, "sharded")
    shutil.copy(directory / "model-00001-of-00004.safetensors", tmp_path / "weights.safetensors")
    edit_json(directory / INDEX, lambda raw: raw["weight_map"].update({Q0: target}))
    with pytest.raises(CheckpointError, match=f"{INDEX}: weight_map names {target!r}, but"):
        load(directory)


def test_index_that_names_no_files(tmp_path):
    directory = copied(tmp_path, "sharded")
    file = next(directory.glob("model-*.safetensors"))
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file.name}: No such file"):
        load(directory)
    edit_json(directory / INDEX, lambda raw: raw.update(weight_map=[]))
    with pytest.raises(CheckpointError, match="weight_map names .., but must name files"):
        load(directory)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "does not exist: give an existing"),
        (b"", "is not a GGUF file"),
        (b"PK\3\4" + bytes(50), "is not a GGUF file.*pickles are never read, as they can run code"),
    ],
)
def test_file_that_is_no_model(tmp_path, content, message):
    path = tmp_path / "model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model: .*{message}"):
        load(path)


def test_directory_that_is_no_model(tmp_path):
    directory = copied(tmp_path, "mha_untied")
    with pytest.raises(CheckpointError, match=f"{WEIGHTS}: is not a GGUF .* the directory"):
        load(directory / WEIGHTS)
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")
    pickles = "only pytorch_model.bin: pickles .* never read.*from_pretrained.*save_pretrained"
    with pytest.raises(CheckpointError, match=pickles) as error:
        load(directory)
    assert f"('{directory}')" in str(error.value) and "\n" not in str(error.value)
    (directory / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="holds neither .*: add the weights as safetensors"):
        load(directory)
    (directory / "config.json").write_text('{"hidden_size": ')
    with pytest.raises(CheckpointError, match="config.json: is not JSON"):
        load(directory)
    (directory / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="config.json: is not JSON"):
        load(directory)
    (directory / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json: holds a list"):
        load(directory)
    (directory / "config.json").rename(directory / "model.gguf")
    with pytest.raises(
        CheckpointError, match="config.json: does not exist: give model.gguf itself"
    ):
        load(directory)


@pytest.mark.parametrize("step", ["5", "best"])
def test_a_step_of_what_is_no_run_is_refused(tmp_path, step):
    directory = copied(tmp_path, "mha_untied")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for model in (directory, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError) as error:
            load(f"{model}@{step}")
        words = f"{model}@{step}: {model} is not a training run, so it has no steps: leave out @"
        assert str(error.value).startswith(words)


@pytest.mark.parametrize("room", [100, 10_000])
def test_export_to_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, full_disk, room):
    """First the configuration does not fit, then the weights."""
    model = load(GOLDEN / "mha_untied")
    with full_disk(room), pytest.raises((CheckpointError, OSError)) as error:
        save(model, tmp_path / "out")
    assert re.match(rf"{tmp_path}/out:? can't be written \(.*File too large", str(error.value))
    assert list(tmp_path.iterdir()) == []
