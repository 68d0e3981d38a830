"""Checks that transformers loads lsjax's exports with equal logits (needs `make peers`).

python scripts/proofs/exports.py tests/golden
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import lsjax


def main(golden: Path) -> None:
    """Compares the models in `golden` with their exports; exits with 1 on a difference."""
    ids, wrong = torch.arange(12)[None], 0
    for source in sorted(file.parent for file in golden.glob("*/config.json")):
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            exported = Path(folder) / "exported"
            lsjax.save(lsjax.load(source), exported)
            original, export = (
                AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(ids).logits
                for path in (source, exported)
            )
        difference = (original - export).abs().max().item()
        wrong += difference > 0
        print(f"{source.name}: largest difference of the logits {difference}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
