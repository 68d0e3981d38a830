"""An exported run decodes in transformers with its own exit, and can be read again here.

make peers
python -m pytest tests/proofs/test_exports.py
"""

import json

import pytest

import lsjax
from lsjax.checkpoints.run import METRICS, begin_run
from lsjax.checkpoints.saving import Checkpoints
from lsjax.config import LlamaConfig, TrainConfig
from lsjax.training.step import init_state
from tests.programs import program

transformers = pytest.importorskip("transformers", reason="needs transformers: make peers")
torch = pytest.importorskip("torch", reason="needs torch: make peers")
pytestmark = pytest.mark.filterwarnings("default")  # theirs

CONFIG = TrainConfig(num_steps=1, batch_size=1, seq_len=8, model=LlamaConfig.tiny())
NEW = 24


def test_an_exported_run_drafts_in_transformers(model, tokenizer, tmp_path):
    run, exported, back = (tmp_path / name for name in ("run", "exported", "back"))
    begin_run(run, CONFIG, tokenizer)
    with Checkpoints(run / "checkpoints", CONFIG.checkpoints) as checkpoints:
        checkpoints.save(init_state(CONFIG, model), step=1, data={})
    row = {"kind": "evaluation", "step": 1, "tokens": 9, "loss_E": [2.0] * 4}
    (run / METRICS).write_text(json.dumps(row | {"agreement_E": [0.1, 0.8, 0.8, 1]}) + "\n")
    assert program("convert")([f"{run}", f"{exported}"]) == 0
    defaults = lsjax.read_generation_defaults(exported)
    assert defaults.exit_layer == 2

    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    chosen = theirs.generation_config
    assert chosen.assistant_early_exit == 2
    assert chosen.num_assistant_tokens == defaults.num_draft_tokens
    prompt = tokenizer.encode("Once upon a time")
    options = dict(max_new_tokens=NEW, do_sample=False)
    (found,) = theirs.generate(torch.tensor([prompt]), **options).tolist()
    (whole,) = theirs.generate(
        torch.tensor([prompt]), **options, assistant_early_exit=None
    ).tolist()
    assert found == whole

    theirs.save_pretrained(back)
    tokenizer.save(back)
    assert lsjax.read_generation_defaults(back) == defaults
    strategy = lsjax.SelfSpeculative(defaults.exit_layer, defaults.num_draft_tokens)
    engine = lsjax.Engine(lsjax.load(back), tokenizer, strategy)
    (done,) = engine.generate([prompt], max_new_tokens=NEW)
    assert done.token_ids == found[len(prompt) :] and done.drafted > 0
