"""GGUF files, written here with the gguf package from the golden models: twins of those."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind, quants

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.huggingface import read_generation_defaults, save
from lsjax.checkpoints.tensors import CheckpointError
from lsjax.config import LlamaConfig, RopeScaling
from lsjax.model.rope import rope_frequencies

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
NAMES_AFTER = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name: str, names: dict[str, str]) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{names[stem]}.{kind}"
    return f"{names[stem]}.{kind}"


NEOX = ("qwen2", "qwen3", "olmo2", "olmo3")  # llama.cpp keeps the order of their rows


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rows of queries and keys: pairs (i, i + H/2) side by side."""
    halves = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def metadata(config: LlamaConfig, **changes) -> dict:
    return {
        "general.architecture": "llama",
        "llama.block_count": config.num_layers,
        "llama.context_length": config.max_context,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_heads,
        "llama.attention.head_count_kv": config.num_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "llama.vocab_size": config.vocab_size,
    } | {f"llama.{key.replace('__', '.')}": value for key, value in changes.items()}


def write(path: Path, fields: dict, tensors: dict[str, tuple[np.ndarray, Kind]], **split) -> Path:
    """Tensors by their GGUF names, as they are to lie in the file, each with its type."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"], **split)
    adders = {
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in fields.items():
        if key != "general.architecture" and value is not None:
            adders[type(value)](key, value)
    for name, (tensor, kind) in tensors.items():
        raw = kind not in (Kind.F32, Kind.F16)
        writer.add_tensor(name, tensor, raw_dtype=kind if raw else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def from_golden(name: str, kind: Kind = Kind.F32) -> tuple[LlamaConfig, dict]:
    """The config and the tensors of a golden model, in the types llama.cpp would give them."""
    source = open_checkpoint(GOLDEN / name)
    config, tensors = source.config, {}
    names = NAMES_AFTER if config.norm_after else NAMES
    for key in source.shapes:
        weight = np.asarray(source.read(key)[:], np.float32)
        if "q_proj" in key and name not in NEOX:
            weight = interleaved(weight, config.num_heads)
        if "k_proj" in key and name not in NEOX:
            weight = interleaved(weight, config.num_kv_heads)
        fits = weight.ndim == 2 and weight.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
        used = kind if fits else Kind.F32
        tensors[gguf_name(key, names)] = (quants.quantize(weight, used), used)
    return config, tensors


def assert_same(one, other) -> None:
    assert one.config == other.config
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ["mha_untied", "gqa_tied", "biases", "head_dim"])
def test_equals_its_hugging_face_twin(tmp_path, name):
    config, tensors = from_golden(name)
    path = write(tmp_path / "m.gguf", metadata(config), tensors)
    twin, model = load(GOLDEN / name), load(path)
    # GGUF keeps neither the standard deviation of the initializer nor more digits than float32.
    assert model.config.norm_eps == twin.config.norm_eps == 1e-6
    model.config = twin.config
    assert_same(model, twin)
    assert read_generation_defaults(path).exit_layer is None


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "smollm3", "olmo2", "olmo3"])
def test_families_equal_their_hugging_face_twins(tmp_path, name):
    """Keys as llama.cpp's converter writes them; it knows no window of Qwen2's."""
    config, tensors = from_golden(name)
    architecture = "olmo2" if name == "olmo3" else name
    fields = {
        key.replace("llama", architecture): architecture if value == "llama" else value
        for key, value in metadata(config).items()
    }
    scaling = config.rope_scaling
    if scaling is not None:
        fields |= {
            f"{architecture}.rope.scaling.type": "yarn",
            f"{architecture}.rope.scaling.factor": scaling.factor,
            f"{architecture}.rope.scaling.original_context_length": scaling.original_context,
            f"{architecture}.rope.scaling.attn_factor": scaling.attention_factor,
        }
    if name == "olmo3":
        fields |= {
            "olmo2.attention.sliding_window": config.sliding_window,
            "olmo2.attention.sliding_window_pattern": [True, False, True, False],
        }
    twin, model = load(GOLDEN / name), load(write(tmp_path / "m.gguf", fields, tensors))
    kept = {"sliding_window": None, "full_attention_layers": ()} if name == "qwen2" else {}
    if name == "smollm3":
        kept = {"no_rope_layers": (3,)}  # llama.cpp's interval is 4, and the golden model's 2
    if scaling is not None:
        factor = float(str(np.float32(scaling.attention_factor)))
        kept["rope_scaling"] = replace(scaling, attention_factor=factor)
    assert replace(model.config, init_std=0.2) == replace(twin.config, **kept)
    model.config = twin.config
    assert_same(model, twin)


@pytest.mark.parametrize(
    "kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1]
)
def test_types_equal_their_dequantised_weights(tmp_path, kind):
    config, tensors = from_golden("gqa_tied", kind)
    fields = metadata(config)
    plain = {
        name: (quants.dequantize(tensor, used), Kind.F32)
        for name, (tensor, used) in tensors.items()
    }
    of_kind = sum(used == kind for _, used in tensors.values())
    assert of_kind >= 1 + 6 * config.num_layers  # all but down, whose rows of 48 fit no block
    model = load(write(tmp_path / "quantised.gguf", fields, tensors))
    assert_same(model, load(write(tmp_path / "plain.gguf", fields, plain)))
    true = np.asarray(load(GOLDEN / "gqa_tied").layers[0].attention.qkv.kernel)
    error = np.abs(np.asarray(model.layers[0].attention.qkv.kernel) - true).max()
    assert error < 0.15 * np.abs(true).max()


@pytest.mark.parametrize("first_has_tensors", [True, False])
def test_any_part_of_split_files_opens_all(tmp_path, first_has_tensors):
    config, tensors = from_golden("gqa_tied", Kind.Q8_0)
    whole = load(write(tmp_path / "whole.gguf", metadata(config), tensors))
    split = dict(split_max_tensors=15, small_first_shard=not first_has_tensors)
    write(tmp_path / "m.gguf", metadata(config), tensors, **split)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name[2:] for part in parts[1:3]] == [
        f"{number:05d}-of-{len(parts):05d}.gguf" for number in (2, 3)
    ]
    for part in parts:
        assert_same(load(part), whole)
    parts[1].rename(tmp_path / "aside")
    with pytest.raises(FileNotFoundError, match=parts[1].name):
        load(parts[2])
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match=r"tensor is missing \(\d+ of 38 are\)"):
        load(parts[0])


def test_tensors_of_split_files_are_reported_with_their_part(tmp_path):
    config, tensors = from_golden("gqa_tied")
    nan(tensors)
    write(tmp_path / "m.gguf", metadata(config), tensors, split_max_tensors=20)
    with pytest.raises(CheckpointError, match="m-0000(.)-of-.*blk.0.ffn_up.*1 of 1536") as error:
        load(tmp_path / "m-00001-of-00002.gguf")
    part = str(error.value).split(":")[0]
    assert b"blk.0.ffn_up.weight" in Path(part).read_bytes()


# Of each K-quant: where in its block of 256 numbers the float16 scales lie.
SCALES = {Kind.Q2_K: [80, 82], Kind.Q3_K: [108], Kind.Q4_K: [0, 2], Kind.Q5_K: [0, 2]}
SCALES |= {Kind.Q6_K: [208]}


def test_k_quants(tmp_path):
    config = LlamaConfig.tiny(
        hidden_size=256, intermediate_size=256, num_layers=1, head_dim=64, tie_embeddings=True
    )
    shapes = {
        "token_embd": (258, Kind.Q6_K),
        "blk.0.attn_q": (256, Kind.Q2_K),
        "blk.0.attn_k": (128, Kind.Q3_K),
        "blk.0.attn_v": (128, Kind.Q4_K),
        "blk.0.attn_output": (256, Kind.Q5_K),
        "blk.0.ffn_gate": (256, Kind.Q4_K),
        "blk.0.ffn_up": (256, Kind.Q5_K),
        "blk.0.ffn_down": (256, Kind.Q6_K),
    }
    rng, tensors = np.random.default_rng(0), {}
    for name, (rows, kind) in shapes.items():  # the package cannot make these: any bits will do
        block = rng.integers(0, 256, (rows, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
        for at in SCALES[kind]:
            block[:, at : at + 2] = np.full((rows, 1), 0.01, np.float16).view(np.uint8)
        tensors[f"{name}.weight"] = (block, kind)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        tensors[f"{name}.weight"] = (np.ones(256, np.float32), Kind.F32)
    model = load(write(tmp_path / "m.gguf", metadata(config), tensors))

    def weight(name):
        return quants.dequantize(*tensors[f"{name}.weight"])

    block = model.layers[0]
    qkv = np.asarray(block.attention.qkv.kernel)  # [D, K, G + 2, H]
    queries = qkv[:, :, :-2].reshape(256, 256).T
    np.testing.assert_array_equal(interleaved(queries, config.num_heads), weight("blk.0.attn_q"))
    keys = qkv[:, :, -2].reshape(256, 128).T
    np.testing.assert_array_equal(interleaved(keys, config.num_kv_heads), weight("blk.0.attn_k"))
    np.testing.assert_array_equal(qkv[:, :, -1].reshape(256, 128).T, weight("blk.0.attn_v"))
    np.testing.assert_array_equal(block.attention.out.kernel[...].T, weight("blk.0.attn_output"))
    gate_up = np.asarray(block.feed_forward.gate_up.kernel)
    np.testing.assert_array_equal(gate_up[:, 0].T, weight("blk.0.ffn_gate"))
    np.testing.assert_array_equal(gate_up[:, 1].T, weight("blk.0.ffn_up"))
    np.testing.assert_array_equal(block.feed_forward.down.kernel[...].T, weight("blk.0.ffn_down"))
    np.testing.assert_array_equal(model.embedding[...], weight("token_embd"))


def test_round_trip_through_hugging_face(tmp_path):
    config, tensors = from_golden("gqa_tied", Kind.Q8_0)
    model = load(write(tmp_path / "m.gguf", metadata(config), tensors))
    save(model, tmp_path / "out")
    assert_same(load(tmp_path / "out"), model)


def test_optional_metadata(tmp_path):
    config, tensors = from_golden("mha_untied")
    absent = dict(
        attention__head_count_kv=None,
        attention__key_length=None,
        rope__freq_base=None,
        rope__dimension_count=None,
        vocab_size=None,
    )
    read = open_checkpoint(write(tmp_path / "m.gguf", metadata(config, **absent), tensors)).config
    assert (read.num_kv_heads, read.head_dim, read.vocab_size) == (4, 8, 64)
    assert read.rope_theta == 10_000 and not read.tie_embeddings


def test_linear_scaling(tmp_path):
    config, tensors = from_golden("linear_rope")
    fields = dict(rope__scaling__type="linear", rope__scaling__factor=3.0)
    path = write(tmp_path / "m.gguf", metadata(config, **fields), tensors)
    assert open_checkpoint(path).config.rope_scaling == config.rope_scaling
    path = write(tmp_path / "old.gguf", metadata(config, rope__scale_linear=3.0), tensors)
    assert open_checkpoint(path).config.rope_scaling == config.rope_scaling


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_by_its_divisors(tmp_path, factor):
    config, tensors = from_golden("gqa_tied")
    # The divisors as llama.cpp's converter computes them: theta 5e5, H = 8, 8192 positions.
    wavelengths = 2 * np.pi * 5e5 ** (np.arange(4) / 4)
    blend = (8192 / wavelengths - 1) / 3
    divisors = np.where(wavelengths < 2048, 1.0, 1 / ((1 - blend) / factor + blend))
    divisors = np.where(wavelengths > 8192, factor, divisors).astype(np.float32)
    assert len(set(divisors.tolist())) == 3
    fields = metadata(config, rope__freq_base=5e5)

    def read(divisors):
        all_of_them = tensors | {"rope_freqs.weight": (divisors, Kind.F32)}
        return load(write(tmp_path / "m.gguf", fields, all_of_them)).config

    scaled = read(divisors)
    assert scaled.rope_scaling == RopeScaling(kind="llama3", factor=factor)
    plain = read(np.ones(4, np.float32))
    assert plain.rope_scaling is None
    ratio = rope_frequencies(plain) / rope_frequencies(scaled)
    np.testing.assert_allclose(ratio, divisors, rtol=1e-6)
    for wrong in (divisors * np.float32([1, 1, 1.01, 1]), divisors[:3], divisors * np.nan):
        with pytest.raises(CheckpointError, match="rope_freqs.weight': its divisors"):
            read(wrong)


def nan(tensors):
    tensors["blk.0.ffn_up.weight"][0][1, 2] = np.nan


def cut_row(tensors):
    tensor, kind = tensors["blk.1.attn_q.weight"]
    tensors["blk.1.attn_q.weight"] = (tensor[:-1], kind)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("blk.1.attn_k.weight"), "blk.1.attn_k.weight': tensor is missing"),
        (lambda t: t.pop("token_embd.weight"), "token_embd.weight': tensor is missing"),
        (
            lambda t: t.update({"blk.0.attn_q_norm.weight": t["output_norm.weight"]}),
            "blk.0.attn_q_norm.weight': shape .*, but the config expects no such tensor",
        ),
        (cut_row, "blk.1.attn_q.weight': shape .31, 32., but the config expects .32, 32."),
        (nan, "blk.0.ffn_up.weight': 1 of 1536 values are NaN, infinite or"),
        (
            lambda t: t.update({"output_norm.weight": (np.ones(32, np.int8), Kind.I8)}),
            "output_norm.weight': type I8 cannot be dequantised",
        ),
    ],
)
def test_tensors_that_are_not_the_models(tmp_path, change, message):
    config, tensors = from_golden("gqa_tied")
    change(tensors)
    path = write(tmp_path / "m.gguf", metadata(config), tensors)
    with pytest.raises(CheckpointError, match=f"m.gguf: tensor '{message}"):
        load(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"general.architecture": "gemma"},
            "general.architecture is 'gemma', not one of llama, olmo2,",
        ),
        ({"llama.expert_count": 8}, "num_local_experts is 8, .* in which it is 0 or 1"),
        ({"llama.block_count": None}, "num_layers None must be a whole number"),
        ({"llama.block_count": 100_000}, "num_hidden_layers is 100000, more than 10000"),
        ({"llama.block_count": "4"}, "num_layers '4' must be a whole number"),
        ({"llama.block_count": 3}, "blk.3.* .*expects no such tensor"),
        ({"llama.attention.head_count": [4, 4, 4, 4]}, "num_heads .4, 4, 4, 4. must be"),
        ({"llama.attention.head_count": 0}, "num_heads 0 must be"),
        ({"llama.attention.value_length": 4}, "value_length is 4; only 8"),
        ({"llama.rope.dimension_count": 4}, "dimension_count is 4; only 8"),
        ({"llama.rope.scaling.type": "longrope"}, "rope type 'longrope'; only linear"),
        ({"llama.rope.freq_base": float("nan")}, "rope_theta nan must be"),
        ({"llama.vocab_size": 65}, "shape .64, 32., but the config expects .65, 32."),
    ],
)
def test_metadata_that_cannot_work(tmp_path, change, message):
    config, tensors = from_golden("gqa_tied")
    path = write(tmp_path / "m.gguf", metadata(config) | change, tensors)
    with pytest.raises(CheckpointError, match=f"m.gguf: .*{message}") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_damaged_files(tmp_path):
    config, tensors = from_golden("gqa_tied")
    path = write(tmp_path / "m.gguf", metadata(config), tensors)
    blob = path.read_bytes()

    def fails(content, message):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"m.gguf: {message}") as error:
            load(path)
        assert "\n" not in str(error.value)

    for length in (4, 8, 20, 24, 60, 200, 700, 1500, len(blob) // 2, len(blob) - 40):
        fails(blob[:length], "not a complete GGUF file")
    fails(blob[:4] + (1).to_bytes(4, "little") + blob[8:], "not a complete GGUF .*version 1")
    fails(blob[:8] + bytes([255] * 8) + blob[16:], "not a complete GGUF file")  # count of tensors
    # A table whose length would have the reader loop for centuries.
    arrayed = metadata(config) | {"llama.list": [1, 2, 3]}
    blob = write(tmp_path / "a.gguf", arrayed, tensors).read_bytes()
    at = blob.index(b"llama.list") + len("llama.list") + 8
    fails(blob[:at] + (2**60).to_bytes(8, "little") + blob[at + 8 :], "not a complete GGUF file")


def test_big_endian_files_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="m.gguf: is a big-endian GGUF"):
        load(tmp_path / "m.gguf")


def test_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"pip install 'lsjax\[gguf\]'"):
        load(tmp_path / "m.gguf")
