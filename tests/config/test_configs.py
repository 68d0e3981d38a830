"""The files in configs/ against the numbers that the paper gives (its Tables 8 to 10)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lsjax.cli.flags.config_file import read_config_file
from lsjax.training.layer_dropout import layer_rates

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.py"))

# L, p_max, e_scale, R (0: gradual), schedule of the rates, learning rate, rows, steps, context.
PAPER = {
    "continual_llama2_7b": (32, 0.1, 0.2, 8, "constant", 3e-5, 64 * 4, 50_000, 4096),
    "continual_llama2_13b": (40, 0.1, 0.1, 39, "constant", 2e-5, 64 * 4, 50_000, 4096),
    "continual_llama3_8b": (32, 0.1, 0.1, 8, "constant", None, None, None, None),
    "continual_llama3_2_1b": (16, 0.1, 0.1, 8, "constant", None, None, None, None),
    "from_scratch_1_5b": (24, 0.1, 0.2, 23, "exponential", 8e-4, 32 * 4, 50_000, 4096),
    "from_scratch_7b": (32, 0.2, 0.2, 31, "exponential", 8e-4, 32 * 4, 50_000, 4096),
    "finetune_code": (32, 0.1, 1.0, 16, "constant", 1e-4, 32 * 4, 10_000, 2048),
    "finetune_topv2": (24, 0.2, 1.0, 0, "constant", 1e-4, 8 * 32, 5_800, None),
}
TOKENS = {  # that the paper says the run sees
    "continual_llama2_7b": 52e9,
    "continual_llama2_13b": 52e9,
    "continual_llama3_8b": 419e9,
    "continual_llama3_2_1b": 839e9,
    "from_scratch_1_5b": 26e9,
    "from_scratch_7b": 26e9,
}
FAMILIES = {
    "continual_olmo2_1b",
    "continual_qwen3_0_6b",
    "continual_qwen3_8b",
    "continual_smollm3_3b",
}
PARAMETERS = {  # as published
    "continual_llama2_13b": 13_015_864_320,
    "continual_llama3_70b": 70_553_706_496,
    "continual_olmo2_1b": 1_484_916_736,
    "continual_qwen3_0_6b": 596_049_920,
    "continual_qwen3_8b": 8_190_735_360,
    "continual_smollm3_3b": 3_075_098_624,
    "finetune_code": 6_738_415_616,
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    config = read_config_file(CONFIGS / f"{name}.py")
    layers, p_max, e_scale, rotation, schedule, rate, rows, steps, context = PAPER[name]
    dropout, exits = config.layer_dropout, config.early_exit
    assert config.model.num_layers == layers
    assert (dropout.p_max, dropout.distribution, dropout.schedule) == (
        p_max,
        "exponential",
        schedule,
    )
    assert not dropout.rescale and dropout.skip == "mask"
    assert (exits.weights, exits.e_scale) == ("paper", e_scale)
    assert exits.curriculum == ("rotational" if rotation else "gradual")
    assert rotation in (0, exits.rotation)
    given = (config.optimizer.learning_rate, config.batch_size, config.num_steps, config.seq_len)
    for own, paper in zip(given, (rate, rows, steps, context), strict=True):
        assert paper in (None, own)
    if name in TOKENS:
        tokens = config.num_steps * config.batch_size * config.seq_len
        assert tokens == pytest.approx(TOKENS[name], rel=0.01)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_names_its_command(file):
    config = read_config_file(file)
    assert f"--config configs/{file.name} --workdir runs/" in " ".join(file.read_text().split())
    assert config.model is not None or config.init_from


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_meshes_follow_the_advice(file):
    """A device has 128 of the model's width or more, on any number of devices (docs/pods.md)."""
    config = read_config_file(file)
    assert config.mesh.fsdp >= 1
    assert config.mesh.fsdp == 1 or config.model.hidden_size // config.mesh.fsdp >= 128


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_have_the_published_number_of_parameters(name):
    assert read_config_file(CONFIGS / f"{name}.py").model.num_params == PARAMETERS[name]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_have_the_recipe_of_llama_3(name):
    """And the tokens of Llama-2, as the paper gives no steps for Llama-3."""
    config, llama3, llama2 = (
        read_config_file(CONFIGS / f"{file}.py")
        for file in (name, "continual_llama3_8b", "continual_llama2_7b")
    )
    assert config.layer_dropout == llama3.layer_dropout
    assert dataclasses.replace(config.early_exit, token_share=1.0) == llama3.early_exit
    assert config.optimizer == llama3.optimizer
    shapes = [(c.num_steps, c.batch_size, c.seq_len) for c in (config, llama2)]
    assert shapes[0] == shapes[1]


def test_topv2_has_one_example_in_each_row():
    """So that rows are the paper's samples, each with layer dropout of its own."""
    assert not read_config_file(CONFIGS / "finetune_topv2.py").data.packing


def test_siblings_are_their_papers():
    """LayerDrop leaves out any layer, PLD none of them first."""
    layerdrop, pld = (
        layer_rates(read_config_file(CONFIGS / f"{name}.py").layer_dropout, 32)
        for name in ("layerdrop", "pld")
    )
    np.testing.assert_allclose(layerdrop, 0.2)
    np.testing.assert_allclose(pld, 0.5 * np.arange(32) / 31, rtol=1e-6)


def test_all_of_them_are_there():
    siblings = {"lite", "layerdrop", "pld", "dont_drop_dropout"}
    ours = {"quickstart", "from_scratch_python", "continual_llama3_70b", "exit_blocks"}
    smollm2 = {"continual_smollm2_135m", "finetune_topv2_smollm2"}
    assert {file.stem for file in FILES} == {*PAPER, *siblings, *ours, *smollm2, *FAMILIES}
