"""Injects faults into a copy of the source, one at a time, and checks that the tests find each.

    python tests/proofs/faults.py
    python tests/proofs/faults.py --only "stale cache slot"

Prints a line for each fault; exits with 1 if any fault is missed. A fault takes a minute or two.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    """A change of the source, and the tests that must find it."""

    name: str
    file: str  # below lsjax/
    right: str
    wrong: str
    tests: str


FAULTS = (
    Fault(
        "exit off by one",
        "training/early_exit.py",
        "on = (exits - 1) % config.rotation",
        "on = exits % config.rotation",
        "tests/training/test_early_exit.py",
    ),
    Fault(
        "wrong rotation phase",
        "model/operations.py",
        "[first * cos - second * sin, second * cos + first * sin]",
        "[first * cos + second * sin, second * cos - first * sin]",
        "tests/checkpoints/test_huggingface.py",
    ),
    Fault(
        "unscaled micro-batch",
        "training/step.py",
        "return objective(config, model, part, state.step, rows_B, num_labels, **knobs)",
        "own = (part['labels_BT'] >= 0).sum()\n"
        "        return objective(config, model, part, state.step, rows_B, own, **knobs)",
        "tests/training/test_step.py",
    ),
    Fault(
        "stale cache slot",
        "model/attention.py",
        "seen_BRS = slots <= position_BR[:, :, None]",
        "seen_BRS = slots <= position_BR[:, :, None] + 1",
        "tests/model/test_llama.py tests/decoding/test_strategies.py",
    ),
    Fault(
        "unfiltered draft probabilities",
        "decoding/rounds.py",
        "log_q_BTN = lax.dynamic_update_slice_in_dim(log_q_BTN, log_BTN, i, axis=1)",
        "wrong = jax.nn.log_softmax(logits_BTN)\n"
        "                log_q_BTN = lax.dynamic_update_slice_in_dim(log_q_BTN, wrong, i, axis=1)",
        "tests/decoding/test_sampling.py",
    ),
    Fault(
        "dropped label at a row's end",
        "data/packing.py",
        "labelled_BT = labelled[place_BT] & inside_BT",
        "labelled_BT = labelled[place_BT] & (np.arange(seq_len) < lengths_B[:, None] - 1)",
        "tests/data/test_packing.py",
    ),
    Fault(
        "wrong rope scaling",
        "model/operations.py",
        "(keep + (1 - keep) / scaling.factor)",
        "(keep + (1 - keep) * scaling.factor)",
        "tests/model/test_rope.py tests/checkpoints/test_huggingface.py",
    ),
    Fault(
        "lost optimizer state",
        "checkpoints/steps.py",
        "        return jax.tree.unflatten(",
        "        leaves = [a if a.ndim == 0 or 'opt_state' not in p else a * 0\n"
        "                  for p, a in zip(named_leaves(like), leaves, strict=True)]\n"
        "        return jax.tree.unflatten(",
        "tests/checkpoints/test_saving.py",
    ),
    Fault(
        "stop token inside a draft",
        "decoding/state.py",
        "count_B = jnp.minimum(jnp.minimum(count_B, to_stop_B), room_B)",
        "count_B = jnp.minimum(count_B, room_B)",
        "tests/decoding/test_stops.py tests/decoding/test_strategies.py",
    ),
    Fault(
        "unsharded head",
        "model/parameters.py",
        'Parameter("head", "lm_head", "output", _TABLE)',
        'Parameter("head", "lm_head", "output")',
        "tests/test_sharding.py",
    ),
)


def main(only: str = "") -> int:
    """Injects the faults and prints which test finds each.

    Args:
        only: name of the single fault to inject; all by default.
    """
    missed = 0
    for fault in FAULTS:
        if only not in ("", fault.name):
            continue
        with tempfile.TemporaryDirectory() as name:
            copy = Path(name)
            for folder in ("lsjax", "tests", "configs", "scripts", "benchmarks", "docs"):
                shutil.copytree(ROOT / folder, copy / folder)
            for file in ("pyproject.toml", "train.py", "decode.py", "README.md"):
                shutil.copy(ROOT / file, copy / file)
            source = copy / "lsjax" / fault.file
            text = source.read_text(encoding="utf-8")
            if text.count(fault.right) != 1:
                raise SystemExit(f"{fault.name}: {fault.file} does not have the line to change")
            source.write_text(text.replace(fault.right, fault.wrong), encoding="utf-8")
            cache = str(ROOT / ".cache" / "xla")
            done = subprocess.run(
                [sys.executable, "-m", "pytest", "-x", "-q", *fault.tests.split()],
                cwd=copy,
                env=os.environ | {"PYTHONPATH": name, "JAX_COMPILATION_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=False,
            )
        found = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        missed += not found
        print(f"{fault.name}: {found[0] if found else 'NOT FOUND'}"[:120], flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(tyro.cli(main, description=__doc__))
