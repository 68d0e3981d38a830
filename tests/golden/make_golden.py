"""Writes tests/golden: tiny random models by transformers, and what transformers computes.

The numbers are those of transformers in float32 on a CPU. The tests read only the result; this
script needs torch and transformers >= 5, which lsjax itself does not:

    python tests/golden/make_golden.py tests/golden
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

SHAPE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,  # logits then have a standard deviation of about 1
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,  # so that it matters within 24 tokens
)
YARN = dict(rope_type="yarn", rope_theta=500_000.0, factor=4.0, original_max_position_embeddings=16)
VARIANTS = {
    "mha_untied": dict(num_key_value_heads=4, tie_word_embeddings=False, num_hidden_layers=2),
    "gqa_tied": dict(num_hidden_layers=4, num_key_value_heads=1),
    "linear_rope": dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=10_000.0)),
    "llama3_rope": dict(rope_parameters=LLAMA3),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "head_dim": dict(head_dim=12),
    "sharded": dict(tie_word_embeddings=False, num_hidden_layers=2),
    "old_config": dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=5_000.0)),
    # Windows end within the 24 tokens.
    "mistral": dict(model_type="mistral", sliding_window=6, tie_word_embeddings=False),
    "qwen2": dict(
        model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3": dict(model_type="qwen3", head_dim=12, rope_parameters=YARN | dict(rope_theta=1e4)),
    "smollm3": dict(model_type="smollm3", num_hidden_layers=4, no_rope_layer_interval=2),
    "olmo2": dict(model_type="olmo2", num_key_value_heads=4, tie_word_embeddings=False),
    "olmo3": dict(
        model_type="olmo3",
        sliding_window=5,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters=dict(
            full_attention=YARN, sliding_attention=dict(rope_type="default", rope_theta=500_000.0)
        ),
    ),
}
DTYPES = {"mha_untied": torch.float32, "sharded": torch.float16}  # of the files; else bfloat16
BATCH, STEPS, PROMPT = 2, 24, 8


def write_model(name: str, directory: Path) -> None:
    """A random model with norms and biases that are not all ones and zeros."""
    fields = {"model_type": "llama", **SHAPE, **VARIANTS[name]}
    if fields["model_type"] != "llama":
        fields["pad_token_id"] = 0  # the defaults lie outside of the vocabulary
    config = transformers.AutoConfig.for_model(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif key.endswith("bias"):
                parameter.copy_(0.2 * torch.randn_like(parameter))
    if name == "gqa_tied":
        model.generation_config.assistant_early_exit = 2
        model.generation_config.num_assistant_tokens = 3
    shard_size = "12KB" if name == "sharded" else "5GB"
    model.to(DTYPES.get(name, torch.bfloat16)).save_pretrained(directory, max_shard_size=shard_size)
    if name == "old_config":
        age(directory / "config.json")


def age(file: Path) -> None:
    """Rewrites a config as transformers 4.30 wrote it."""
    raw = json.loads(file.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope["rope_theta"]
    raw["rope_scaling"] = {"type": rope["rope_type"], "factor": rope["factor"]}
    raw["torch_dtype"] = raw.pop("dtype")
    raw["transformers_version"] = "4.30.0"
    for key in ("head_dim", "attention_bias", "mlp_bias", "attention_dropout"):
        del raw[key]
    file.write_text(json.dumps(raw, indent=2) + "\n")


@torch.no_grad()
def compute(directory: Path) -> dict[str, np.ndarray]:
    """Logits [B, T, V], the loss of each exit at each token [L, B, T - 1], and greedy tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = torch.randint(3, SHAPE["vocab_size"], (BATCH, STEPS))
    out = model(tokens, output_hidden_states=True)
    # The last hidden state has passed the final norm already.
    exits = [model.lm_head(model.model.norm(x)) for x in out.hidden_states[1:-1]] + [out.logits]
    losses = [
        torch.nn.functional.cross_entropy(
            x[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
        )
        for x in exits
    ]
    prompt = tokens[:, :PROMPT]
    # In place of the file's: no early exit, no end token.
    model.generation_config = transformers.GenerationConfig(
        max_new_tokens=STEPS - PROMPT, do_sample=False, pad_token_id=0
    )
    greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt))
    return dict(
        tokens=tokens.numpy().astype(np.int32),
        logits=out.logits.numpy(),
        exit_losses=torch.stack(losses).numpy(),
        greedy=greedy.numpy().astype(np.int32),
    )


def main(destination: Path) -> None:
    """Writes every variant, from a fixed seed."""
    for number, name in enumerate(VARIANTS):
        torch.manual_seed(number)
        directory = destination / name
        write_model(name, directory)
        numbers = compute(directory)
        np.savez_compressed(directory / "golden.npz", **numbers)
        size = sum(file.stat().st_size for file in directory.iterdir())
        spread = numbers["logits"].std()
        print(f"{name}: {size / 1000:.0f} kB, standard deviation of logits {spread:.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
