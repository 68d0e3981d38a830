"""Files that decoding finds in the directory of a run: token counts and held-out prompts.

token_counts.json   how often each token is learned, to choose a draft vocabulary by
prompts.jsonl       beginnings of held-out rows, for --prompt-file
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from lsjax.config import EvaluationConfig, LlamaConfig, check
from lsjax.data.packing import PackedRows
from lsjax.data.token_store import write_whole
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.vocabulary import COUNTS, write_counts

PROMPTS = "prompts.jsonl"
COUNTED = 4_000_000  # tokens that the draft vocabulary is counted from


def write_run_files(
    workdir: Path,
    tokenizer: Tokenizer,
    rows: PackedRows,
    prompts: Sequence[Sequence[int]],
    *,
    fresh: bool,
) -> None:
    """Writes the missing files, from the training rows and held-out prompts; all of them if
    `fresh`, as the data of a run without a saved step may still change."""
    if fresh or not (workdir / COUNTS).exists():
        write_counts(workdir / COUNTS, tokenizer, count_labels(rows))
    if fresh or not (workdir / PROMPTS).exists():
        texts = map(tokenizer.decode, prompts)
        lines = [json.dumps({"prompt": text}, ensure_ascii=False) for text in texts if text]
        write_whole(workdir / PROMPTS, "".join(f"{line}\n" for line in lines).encode())


def count_labels(rows: PackedRows, most: int = COUNTED) -> Counter[int]:
    """How often each token is learned in the first rows."""
    counts: Counter[int] = Counter()
    step = 256
    for first in range(0, min(len(rows), most // rows.seq_len + 1), step):
        labels_BT = rows.read(np.arange(first, min(first + step, len(rows))))["labels_BT"]
        tokens, times = np.unique(labels_BT[labels_BT >= 0], return_counts=True)
        counts.update(dict(zip(tokens.tolist(), times.tolist(), strict=True)))
    return counts


def held_out_prompts(
    held_out: Iterable[Mapping[str, np.ndarray]], config: EvaluationConfig
) -> list[list[int]]:
    """Beginnings of evenly spaced rows: the prompt of a row that has one, else its first
    `prompt_tokens`, at most half of the row.

    Raises ConfigError where no token is labelled, as there is nothing to evaluate either.
    """
    prompts: list[list[int]] = []
    for batch in held_out:
        for tokens_T, labels_T in zip(batch["tokens_BT"], batch["labels_BT"], strict=True):
            if not (labels_T >= 0).any():
                continue  # padding of the last batch
            half = max(1, min(config.prompt_tokens, len(tokens_T) // 2))
            prompt = int(np.argmax(labels_T >= 0))  # its tokens before the last have no label
            prompts.append(tokens_T[: prompt + 1 if prompt else half].tolist())
    check(
        bool(prompts),
        "no token of the held-out rows has a label: raise seq_len so that more than the prompts "
        "fits, or evaluation.batches",
    )
    most = min(config.num_prompts, len(prompts))
    return [prompts[(2 * number + 1) * len(prompts) // (2 * most)] for number in range(most)]


def sample_prompt(
    config: EvaluationConfig,
    model: LlamaConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
) -> list[int]:
    """Tokens that samples continue: the configured text, or the prompt in the middle. Empty where
    there are no samples.

    Raises ConfigError where the text leaves no room in the model's context.
    """
    if config.sample_tokens == 0:
        return []
    if not config.sample_prompt:
        return list(prompts[len(prompts) // 2])[: model.max_context - 1]
    prompt = tokenizer.encode(config.sample_prompt)
    check(
        0 < len(prompt) < model.max_context,
        f"evaluation.sample_prompt has {len(prompt)} tokens, but must have 1 to "
        f"{model.max_context - 1}, as the model's context is of {model.max_context}",
    )
    return prompt
