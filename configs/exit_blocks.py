"""Exit blocks for a model that may not change: drafts get better, and the text stays the same.

    lsjax answers --model PATH --chat --num-prompts 3000 --output answers
    python train.py --config configs/exit_blocks.py --workdir runs/blocks --init-from PATH \
        --data.tokenizer PATH
    python decode.py --model PATH --exit-blocks runs/blocks --prompt "..."

Each block is a small layer behind an exit. It learns to say what the last exit says, on text that
the model wrote itself. docs/exit_blocks.md explains the settings. Kangaroo (arXiv 2404.18911)
drafts so with exit 2 of 32. The loss of the last third of the steps is that of arXiv 2602.23881.
"""

from lsjax.config import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ExitBlocksConfig,
    OptimizerConfig,
    TrainConfig,
)

config = TrainConfig(
    init_from="models/SmolLM2-135M-Instruct.Q4_1.gguf",
    data=DataConfig(
        source="jsonl",
        paths=("answers/answers.jsonl",),
        text_template="{prompt}{text}",  # blocks learn from the prompts, too
        allow_special=True,  # the prompts have the tokens of the chat template
        tokenizer="models/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    num_steps=2_000,
    batch_size=2,  # for thousands of answers; larger data and accelerators want more
    seq_len=512,
    exit_blocks=ExitBlocksConfig(exits=(4, 8)),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=50),
    checkpoints=CheckpointConfig(every=500),
    evaluation=EvaluationConfig(every=500, batches=16, sample_tokens=0),
)
