"""The model card (README.md) of an exported run: what it is, how it was trained, how to decode."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from lsjax.checkpoints.exit_blocks import ExitBlocksRun
from lsjax.checkpoints.huggingface import GenerationDefaults
from lsjax.checkpoints.run import RunSource, read_recipe
from lsjax.config import (
    EarlyExitConfig,
    ExitBlocksConfig,
    LayerDropoutConfig,
    LoraConfig,
    OptimizerConfig,
    as_path,
)
from lsjax.config.checked import differences

# Parts of the configuration that the card lists where they differ from the defaults.
SECTIONS = {
    "layer_dropout": LayerDropoutConfig(),
    "early_exit": EarlyExitConfig(),
    "optimizer": OptimizerConfig(),
    "lora": LoraConfig(),
    "exit_blocks": ExitBlocksConfig(),
}
CARD = """\
---
library_name: transformers
tags: [{tags}]
---

# {name}

A model with {parameters:.1f} million parameters and {layers} layers, trained from {origin} by lsjax
{version}. {method}

## Training

{training}

{recipe}

## Exits

{exits}

## Decoding

With lsjax:

```sh
lsjax decode --model {name} --prompt "..." --strategy auto
```

With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("...", return_tensors="pt")
output = model.generate(**inputs, {options})
print(tokenizer.decode(output[0], skip_special_tokens=True))
```
{batches}"""
LAYERSKIP = """\
It was trained with [LayerSkip](https://arxiv.org/abs/2404.16710): its first layers draft tokens,
and the other layers verify them. So texts are those of the complete model."""
PLAIN = "It was trained without layer dropout and early exits."
BATCHES = """
transformers drafts for one text at a time. For batches pass `assistant_early_exit=None`.
"""


BLOCKS_CARD = """\
---
base_model: {base}
tags: [lsjax, speculative-decoding]
---

# {name}

Exit blocks for {base}: small layers behind exits {exits}, with {parameters:.1f} million parameters.
They draft tokens, and the model verifies them. So texts stay those of the model, token for token.
lsjax {version} trained them.

## Training

{training}

{recipe}

## Exits

The blocks stand in place of their exits. {scores}

## Decoding

```sh
lsjax decode --model {base} --exit-blocks {name} --prompt "..." --strategy auto
```

Another base is refused: `base.json` has its fingerprint. The file has Hugging Face's names. Block E
has those of layer E.
"""


def blocks_card(name: str, run: ExitBlocksRun, parameters: int) -> str:
    """Markdown text. name: of the exported directory. parameters: of all blocks."""
    return BLOCKS_CARD.format(
        name=name,
        base=as_path(run.settings["init_from"]).name,
        exits=", ".join(map(str, run.blocks.exits)),
        parameters=parameters / 1e6,
        version=version("lsjax"),
        training=_training(run),
        recipe=_table(("setting", "value"), _recipe(run)),
        scores=_exits(run, GenerationDefaults()),
    )


def model_card(name: str, run: RunSource, generation: GenerationDefaults) -> str:
    """Markdown text. name: of the exported directory. generation: the decoding defaults in it."""
    settings = run.settings
    options = replace(generation, agreement_E=None).to_json()  # what transformers knows
    origin = settings.get("init_from")
    has_exits = run.early_exit.get("curriculum", "none") != "none"
    is_layerskip = has_exits or (settings.get("layer_dropout") or {}).get("p_max", 0) > 0
    return CARD.format(
        name=name,
        parameters=run.config.num_params / 1e6,
        layers=run.config.num_layers,
        version=version("lsjax"),
        origin=f"the weights of {as_path(origin).name}" if origin else "random weights",
        training=_training(run),
        recipe=_table(("setting", "value"), _recipe(run)),
        exits=_exits(run, generation),
        tags="layerskip, lsjax" if is_layerskip else "lsjax",
        method=LAYERSKIP if is_layerskip else PLAIN,
        options=", ".join(f"{key}={value}" for key, value in options.items()) or "do_sample=False",
        batches=BATCHES if options else "",
    )


def _training(run: RunSource) -> str:
    steps, rows, length = (run.settings.get(key) for key in ("num_steps", "batch_size", "seq_len"))
    return f"Step {run.step} of {steps}, each of {rows} rows of {length} tokens."


def _recipe(run: RunSource) -> Iterator[tuple[str, str]]:
    """Settings that differ from the defaults, and functions that the run was given."""
    for name, default in SECTIONS.items():
        given = run.settings.get(name) or {}
        before = {key: value for key, value in asdict(default).items() if key in given}
        for path, _, value in differences(_as_json(before), given, name):
            yield path, str(value)
    for name, function in read_recipe(run.path).items():
        yield name, f"{function['name']} (sha256 {function['sha256'][:12]})"


def _as_json(section: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(v) if isinstance(v, tuple) else v for key, v in section.items()}


def _exits(run: RunSource, generation: GenerationDefaults) -> str:
    scores = run.evaluation
    if scores is None:
        return "The exits were not evaluated."
    figures = zip(scores["loss_E"], scores["agreement_E"], strict=True)
    rows = [
        (f"{number}", "infinite" if loss is None else f"{loss:.3f}", f"{agreement:.3f}")
        for number, (loss, agreement) in enumerate(figures, start=1)
    ]
    lines = [
        f"On {scores['tokens']:,} held-out tokens, at step {scores['step']}. The agreement of an "
        "exit is the share of tokens at which its argmax is that of the last exit.",
        _table(("exit", "loss (nats per token)", "agreement"), rows),
    ]
    if generation.exit_layer:
        lines.append(
            f"Exit {generation.exit_layer} with {generation.num_draft_tokens} draft tokens has the "
            "best ideal speedup, by bytes of weights, and is the default here."
        )
    return "\n\n".join(lines)


def _table(heading: tuple[str, ...], rows: Any) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
