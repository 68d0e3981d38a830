"""The experiments of docs/results.md. scripts/evidence.py makes them, and scripts/results.py writes
the page. An experiment leaves a report, or a table.md, in its directory.

Inputs are in the repository's folder:

    smollm2         lsjax convert models/SmolLM2-135M-Instruct.Q4_1.gguf smollm2   (make smollm2)
    topv2           Human Annotated Data of google-research-datasets/Hinglish-TOP-Dataset
    python_doc      the unpacked package python3.13-doc of Debian
    question.jsonl  Spec-Bench's questions
    wikitext2.txt   the validation set of WikiText-2
    tinystories.txt tiny_stories_944k.txt of github.com/s-ajaykumar/smallGPT
"""

from dataclasses import dataclass
from pathlib import Path

from lsjax.reporting.record import REPORT

TABLE = "table.md"
SETTINGS = "--strategies self_speculative auto"
CODE = "build/evidence/quickstart/runs/layerskip-0/prompts.jsonl"
MIXED = f"--spec-bench question.jsonl --topv2 topv2/test.tsv --code {CODE}"
PUBLISHED = """
| published, Llama-2 7B | speedup | over the best fixed setting |
|---|---|---|
| DEL (COLM 2025) | 2.50x | 1.26 |
| LEDE (arXiv 2606.03113) | 2.58x to 2.72x | 1.17 |
"""
TOPV2 = "--task topv2 --data.paths topv2/train.tsv --data.validation-paths topv2/validation.tsv"


@dataclass(frozen=True)
class Experiment:
    """A section of docs/results.md."""

    name: str  # of the report's directory
    title: str
    text: str  # what was trained on what
    flags: str  # of the command
    program: str = "lsjax report"
    needs: tuple[str, ...] = ()  # inputs
    paper: str = ""  # the paper's figures, as a table

    @property
    def directory(self) -> Path:
        """Where its report or its table is."""
        return Path("build/evidence") / self.name

    @property
    def is_done(self) -> bool:
        """Whether it has left a report or a table."""
        return any((self.directory / name).exists() for name in (REPORT, TABLE))

    @property
    def command(self) -> str:
        """The command that makes it, and goes on after it was stopped."""
        own, dashes, benchmark = self.flags.partition(" -- ")
        flags = f"{own} --output {self.directory}".strip()
        return f"{self.program} {flags}{dashes}{benchmark}"


EXPERIMENTS = (
    Experiment(
        "quickstart",
        "The quickstart, with and without LayerSkip",
        "16 layers of width 256 learn the source code of Python's standard library from random "
        "weights, three times with LayerSkip and three times without. Pauses of some trainings "
        "are part of their minutes.",
        "--config quickstart --dtype bfloat16 --seeds 3 --prompts 16 --new-tokens 128 "
        "--num-draft-tokens 4 8",
    ),
    Experiment(
        "from_scratch",
        "From scratch",
        "16 layers of width 384, which read bytes, learn the same source code for longer.",
        "--config from_scratch_python --dtype bfloat16 --minutes 40 --new-tokens 128 "
        "--num-draft-tokens 4 8",
        paper="""
| the paper's models from scratch on CNN/DM (Table 4) | exit | accepted | speedup |
|---|---|---|---|
| Llama 1.5B | 8 of 24 | 0.774 | 1.76x |
| Llama 7B | 8 of 32 | 0.778 | 2.16x |
""",
    ),
    Experiment(
        "topv2",
        "Finetuning on a task: TOPv2",
        "SmolLM2-135M learns to turn an English request into its semantic tree, with the files of "
        "Human Annotated Data in [Hinglish-TOP]"
        "(https://github.com/google-research-datasets/Hinglish-TOP-Dataset). Held-out requests "
        "that are also in the training file are left out. Other programs ran beside both "
        "trainings, so their minutes are rough. Answers are greedy.",
        f"--config finetune_topv2_smollm2 --model smollm2 {TOPV2} --prompts 64 --dtype bfloat16 "
        "--num-draft-tokens 4 8",
        needs=("smollm2", "topv2"),
        paper="""
| the paper's Llama 1.5B on TOPv2 (Table 6) | exact match | accepted | speedup |
|---|---|---|---|
| exit 6 of 24, 8 drafts | 62.9 | 0.760 | 2.0x |
| exit 12 | 79.4 | 0.976 | 1.64x |
| exit 18 | 83.3 | 0.989 | 1.24x |
| all layers, with LayerSkip | 82.9 | | |
| all layers, without LayerSkip | 85.9 | | |
""",
    ),
    Experiment(
        "continual_text",
        "Continual pretraining on text",
        "SmolLM2-135M reads Python's documentation, by the recipe of `lsjax report`. The half hour "
        "includes the training without LayerSkip and the measurements. The paper's models read 52 "
        "billion tokens.",
        "--model smollm2 --data.paths 'python_doc/**/*.rst.txt' --minutes 30",
        needs=("smollm2", "python_doc"),
        paper="""
| the paper's continual pretraining on text (Table 3) | exit, drafts | accepted | speedup |
|---|---|---|---|
| Llama2 7B, CNN/DM | 8 of 32, 12 | 0.689 | 1.86x |
| Llama2 13B, CNN/DM | 15 of 40, 12 | 0.745 | 1.81x |
| Llama2 7B, XSUM | 8 of 32, 12 | 0.546 | 1.54x |
| Llama2 13B, XSUM | 15 of 40, 4 | 0.677 | 1.34x |
""",
    ),
    Experiment(
        "continual_code",
        "Continual pretraining on code",
        "The same on the source code of Python's standard library.",
        "--model smollm2 --data.source python_source --minutes 30",
        needs=("smollm2",),
        paper="""
| the paper's models on HumanEval (Tables 3 and 5) | exit, drafts | accepted | speedup |
|---|---|---|---|
| Llama2 7B, continual pretraining | 8 of 32, 6 | 0.671 | 1.83x |
| Llama2 13B, continual pretraining | 7 of 40, 4 | 0.570 | 1.66x |
| Llama1 7B, finetuned on code | 6 of 32, 12 | 0.45 | 1.82x |
""",
    ),
    Experiment(
        "released",
        "SmolLM2-135M as released",
        "Nothing is trained. Exits of a model without LayerSkip draft badly, so `auto` copies from "
        "earlier text.",
        "--no-training --model smollm2 --data.source python_source --prompts 16 --new-tokens 128",
        needs=("smollm2",),
    ),
    Experiment(
        "mixed_quickstart",
        "Choosing drafts automatically: the quickstart",
        "`auto` and fixed settings take turns on four kinds of prompts. Greedy texts, all equal.",
        f"{MIXED} -- --model build/evidence/quickstart/runs/layerskip-0 {SETTINGS} "
        "--exit-layers 1 2 4 --num-draft-tokens 4 8 12 --new-tokens 128 --repeats 2",
        program="python scripts/proofs/mixed_prompts.py",
        needs=("question.jsonl", "topv2", "build/evidence/quickstart/report.json"),
        paper=PUBLISHED,
    ),
    Experiment(
        "mixed_topv2",
        "Choosing drafts automatically: finetuned on TOPv2",
        "The same with the model of the section on TOPv2.",
        f"{MIXED} -- --model build/evidence/topv2/runs/layerskip-0 {SETTINGS} --exit-layers 8 15 "
        "--num-draft-tokens 4 8 12 --draft-vocab 4096 --new-tokens 64 --repeats 2",
        program="python scripts/proofs/mixed_prompts.py",
        needs=("question.jsonl", "topv2", "build/evidence/topv2/report.json"),
    ),
    Experiment(
        "mixed_released",
        "Choosing drafts automatically: SmolLM2-135M as released",
        "The same with a model without LayerSkip.",
        f"{MIXED} -- --model smollm2 --strategies self_speculative auto --exit-layers 15 "
        "--num-draft-tokens 4 --new-tokens 96 --repeats 2",
        program="python scripts/proofs/mixed_prompts.py",
        needs=("question.jsonl", "topv2", "smollm2", "build/evidence/quickstart/report.json"),
    ),
    Experiment(
        "exit_blocks",
        "A model that may not change: exit blocks",
        "Blocks behind exits 2 and 8 of SmolLM2-135M as released. It wrote all prompts and answers "
        "itself. LayerSkip then finetunes the same model on the same data, and drafts with exit "
        "8. The measured prompts are of other kinds. Minutes are those of the training. States are "
        "computed once: where a training found them in the cache, they are not part of its "
        "minutes. The first table has the share of the model's answers that the exit proposes, and "
        "the share of first drafts of rounds that are right. The loss of the last exit is that of "
        "WikiText-2, in nats a token: blocks leave it alone. The second table has the speed of "
        "`auto`. All texts equal those of the model without drafts.",
        "--answers 700 2100 7000 --exits 2 8 --prompts 16 --repeats 2 --layerskip-steps 500 "
        "--model smollm2 --loss-text wikitext2.txt --spec-bench question.jsonl "
        f"--topv2 topv2/test.tsv --code {CODE}",
        program="python scripts/exit_block_study.py",
        needs=(
            *("smollm2", "question.jsonl", "topv2", "wikitext2.txt"),
            "build/evidence/quickstart/report.json",
        ),
        paper="""
| published, other models | exit | speedup |
|---|---|---|
| Kangaroo (arXiv 2404.18911), Vicuna 7B | 2 of 32 | 1.68x |
""",
    ),
    Experiment(
        "int8",
        "int8 weights",
        "SmolLM2-135M as released and with int8 weights, on the same held-out text of WikiText-2. "
        "The agreement is that with the last exit of the same weights. lm-evaluation-harness runs "
        "two tasks of docs/tasks, with requests of TOPv2.",
        "--model smollm2 --text wikitext2.txt --topv2 topv2",
        program="python scripts/int8_study.py",
        needs=("smollm2", "wikitext2.txt", "topv2"),
    ),
    Experiment(
        "grpo",
        "Does acceptance last in reinforcement learning?",
        "8 layers of width 192 learn to add three numbers one by one, from texts with many "
        "mistakes. GRPO then rewards the right total, with rollouts that are autoregressive or "
        "speculative. The exits' loss is a term of the RL loss with weight 0.1, or not. Exit "
        "blocks stay as they are. Accepted: first drafts of texts at temperature 1, by exit. A "
        "text has 19 tokens. Numbers below 20 were chosen after trials with others: with numbers "
        "below 30 rewards did not rise in 150 steps.",
        "",
        program="python scripts/grpo_study.py",
    ),
    Experiment(
        "rollout_speed",
        "Seconds of a group of rollouts",
        "The policy that scripts/grpo_study.py trains writes 8 texts for each of 8 prompts, in 4, "
        "16 or 64 rows. Rows that end leave the batch. Tunix decodes all rows until the last one "
        "ends. Speedups compare medians with those of autoregressive rollouts in as many rows. "
        "Single batches differ by more than most of these speedups.",
        "--policy build/evidence/grpo/policy",
        program="python scripts/rollout_speed.py",
        needs=("build/evidence/grpo/policy",),
    ),
    Experiment(
        "recipes",
        "Recipes: one factor at a time",
        "The quickstart's recipe with one change, 400 steps, one seed. Losses differ from those of "
        "the same training without LayerSkip. The ideal is that of the best exit and length. Other "
        "programs ran beside some of these trainings, so times are rough.",
        "factors",
        program="python scripts/recipe_study.py",
    ),
    Experiment(
        "recipes_texts",
        "Recipes: vocabulary and shape",
        "The quickstart before this study with another tokenizer or shape, 400 steps, one seed.",
        "texts",
        program="python scripts/recipe_study.py",
    ),
    Experiment(
        "recipes_seeds",
        "Recipes: three seeds",
        "The quickstart as it is now, 800 steps. Losses differ from those of the same training "
        "without LayerSkip.",
        "seeds",
        program="python scripts/recipe_study.py",
    ),
    Experiment(
        "recipes_task",
        "Recipes: three seeds on TOPv2",
        "SmolLM2-135M, 100 steps. Exits 2, 4 and 8 are those of the recipe of `lsjax report`. "
        "Losses differ from those of the same training without LayerSkip. Other programs, with the "
        "lowest priority, ran beside some of these trainings and measurements.",
        "task",
        program="python scripts/recipe_study.py",
        needs=("smollm2", "topv2"),
    ),
)
