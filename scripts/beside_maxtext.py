"""Compiles MaxText's training step of Llama-2 7B for the slice of a report of `lsjax aot`, and
counts its costs in the same way, for the second table of scripts/pods.py.

Needs libtpu (pip install 'lsjax[tpu]'), no TPU. MaxText is a checkout of AI-Hypercomputer/maxtext,
and its own train_compile runs in an environment with Python 3.12:

    python3.12 -m venv ../env
    ../env/bin/pip install "jax[tpu]==0.10.2" absl-py aqtp drjax flax grain huggingface_hub \\
        jinja2 jaxtyping numpy omegaconf optax orbax-checkpoint pathwaysutils pillow psutil \\
        pydantic pyyaml qwix sentencepiece sympy tensorboardX tiktoken tokamax transformers

jax and libtpu should have the same versions as in lsjax's environment. Rows, tokens and the mesh
come from the report; all else is MaxText's default.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsjax.aot.chips import CHIPS, slice_size
from lsjax.aot.costs import CostAnalysis
from lsjax.aot.hlo import parse
from lsjax.aot.programs import cost_figures, memory_figures

COLUMNS = (
    "program",
    "slice",
    "data x fsdp",
    "GiB a device",
    "without overlap, s",
    "plain FLOPs of peak",
    "sent GB",
)
# Runs MaxText's program, and saves the compiled program and its memory.
KEEP = """
import json, pathlib, runpy, sys
import jax
directory = pathlib.Path(sys.argv.pop(1))
compile = jax.stages.Lowered.compile
def kept(*arguments, **options):
    compiled = compile(*arguments, **options)
    found = compiled.memory_analysis()
    names = [name for name in dir(found) if name.endswith("_in_bytes")]
    sizes = {name: getattr(found, name) for name in names}
    (directory / "memory.json").write_text(json.dumps(sizes))
    (directory / "program.txt").write_text(compiled.as_text())
    return compiled
jax.stages.Lowered.compile = kept
runpy.run_module("maxtext.trainers.pre_train.train_compile", run_name="__main__", alter_sys=True)
"""


def of_maxtext(
    maxtext: Path, python: Path, policy: str, found: Mapping[str, Any], directory: Path
) -> dict[str, Any]:
    """Memory and costs of MaxText's program for the slice, rows and tokens of a report.

    maxtext: its checkout. python: interpreter of its environment. policy: its remat policy. found:
    the report. directory: for MaxText's output.
    """
    training, mesh, topology = found["training"], found["meshes"]["train"], found["topology"]
    flags = {
        "model_name": "llama2-7b",
        "per_device_batch_size": training["batch_size"] / training["devices"],
        "max_target_length": training["seq_len"],
        "remat_policy": policy,
        "ici_data_parallelism": mesh["data"],
        "ici_fsdp_parallelism": mesh["fsdp"],
        "ici_tensor_parallelism": mesh["tensor"],
        "allow_split_physical_axes": True,
        "internal_compile": True,
        "internal_compile_num_devices": slice_size(topology),
        "compile_topology": topology,
        "compile_topology_num_slices": 1,
        "dataset_type": "synthetic",
        "enable_checkpointing": False,
        "base_output_directory": directory,
        "run_name": "beside",
    }
    source = maxtext / "src"
    command = [str(python), "-c", KEEP, str(directory)]
    command += [str(source / "maxtext/configs/base.yml")]
    command += [f"{name}={value}" for name, value in flags.items()]
    # Without Google Cloud's packages, and from shapes alone.
    environment = {"PYTHONPATH": str(source), "DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    chip = next(chip for chip in CHIPS if chip.name == topology.partition(":")[0])
    program = parse((directory / "program.txt").read_text())
    costs = CostAnalysis(program, mesh, {}, chip).program()
    sizes = json.loads((directory / "memory.json").read_text())
    memory = memory_figures(sizes.__getitem__, chip)
    return {"memory": memory, **cost_figures(costs, chip), "policy": policy}


def row(name: str, found: Mapping[str, Any], program, ratio: str = "") -> list[str]:
    """Table cells of a program. Only the FLOPs of plain training count as useful."""
    training, mesh = found["training"], found["meshes"]["train"]
    useful = training["plain_flops"] / training["peak_flops"]
    return [
        name,
        found["topology"],
        f"{mesh['data']} x {mesh['fsdp']}",
        f"{program['memory']['total'] / 2**30:.1f}",
        f"{program['serial_seconds']:.3f}{ratio}",
        f"{useful / program['serial_seconds']:.1%}",
        f"{program['sent_bytes'] / 1e9:.1f}",
    ]
