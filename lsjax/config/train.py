"""Configuration of a training run: its step, data, checkpoints and evaluation."""

import re
from dataclasses import dataclass
from typing import Literal

from lsjax.config.checked import Checked, bounded, check
from lsjax.config.llama import LlamaConfig
from lsjax.config.step import MeshConfig, StepConfig

Source = Literal["python_source", "text", "jsonl", "tsv", "tfds", "array_record"]
FILES = ("text", "jsonl", "tsv", "array_record")
ROWS = ("jsonl", "tsv", "tfds")
READ_BY = {  # fields that only these sources read
    FILES: ("paths", "validation_paths"),
    ROWS: ("text_template", "prompt_template", "response_template"),
    ("text",): ("separator",),
    ("array_record",): ("ids_field",),
    ("tfds",): ("tfds_name", "tfds_split", "tfds_data_dir", "validation_split"),
}
TEMPLATE = re.compile(r"([^{}]|\{\{|\}\}|\{[^{}:!]+\})*")  # characters, {{, }} and {name}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked, prefix="data."):
    """One source of documents, its tokenizer, and the packing of its tokens. A document is a text,
    or a prompt with its response. docs/training.md has examples of sources."""

    source: Source = "python_source"
    """Where documents come from. python_source: the standard library of the running Python. text:
    text files. jsonl: files with an object on each line. tsv: files with columns under a header.
    tfds: a TensorFlow data set. array_record: ArrayRecord files of tf.train.Example with token ids,
    as MaxText reads."""
    paths: tuple[str, ...] = ()
    """Files for text, jsonl, tsv and array_record, or patterns such as books/**/*.txt."""
    separator: str = "file"
    """End of a document of text: the end of the `file`, a `blank_line`, or another marker."""

    ids_field: str = "inputs"
    """Name of the integers in a record of array_record: a document, used as it is."""
    text_template: str = "{text}"
    """Document of a row of jsonl, tsv or tfds, with the row's fields in braces."""
    prompt_template: str = ""
    """Prompt of a row, such as "Question: {question} Answer:". The prompt and response templates
    together replace the text template."""
    response_template: str = ""
    """Response of a row, such as " {answer}"."""
    train_on_prompt: bool = False
    """Whether the tokens of prompts are labels too."""

    tfds_name: str = ""
    """Name of the TensorFlow data set, with its config if it has several: wikipedia/20230601.en."""
    tfds_split: str = "train"
    """Split, or part of one, such as train[:10%]."""
    tfds_data_dir: str = ""
    """Directory of the data sets; empty means TFDS's default, ~/tensorflow_datasets."""

    validation_fraction: float = bounded(0.05, low=0, below=1)
    """Share of the documents that is held out, by a hash of each. Ignored with a validation set."""
    validation_paths: tuple[str, ...] = ()
    """Files of a separate validation set (text, jsonl, tsv, array_record)."""
    validation_split: str = ""
    """Split of a separate validation set (tfds)."""
    max_documents: int | None = bounded(None, low=1)
    """Largest number of documents, the source's first ones; a validation set is read completely."""

    tokenizer: str = "sentencepiece"
    """`bytes`; `sentencepiece`, trained on the training documents; or the path of a model
    directory, a tokenizer.json, tokenizer.model or .gguf."""
    vocab_size: int = bounded(512, low=260, hint="256 bytes, <unk>, <s>, </s> and a letter")
    """Size of a trained vocabulary."""
    append_end: bool = True
    """Whether each document ends with the tokenizer's end token."""
    allow_special: bool = False
    """Whether the spelling of a special token ("</s>") in a document becomes that token instead of
    plain text. For templates with special tokens, if the fields can be trusted."""

    packing: bool = True
    """Whether a row may hold several documents, which never attend to one another."""
    too_long: Literal["split", "truncate", "drop"] | None = None
    """Treatment of documents longer than a row. By default texts are split and responses truncated.
    With split, texts fill every row; otherwise complete documents share rows."""

    def __post_init__(self):
        super().__post_init__()
        for sources, names in READ_BY.items():
            for name in names:
                check(
                    self.source in sources or getattr(self, name) == getattr(DataConfig, name),
                    f"data.{name} is read by source {', '.join(sources)}, not by {self.source}: "
                    "leave it out, or choose another source",
                )
        check(
            self.source not in FILES or bool(self.paths),
            f"data.source {self.source} needs data.paths: name files or patterns",
        )
        check(
            self.source != "tfds" or self.tfds_name != "",
            "data.source tfds needs data.tfds_name, such as gsm8k",
        )
        check(self.separator != "", "data.separator is empty: choose file, blank_line or a marker")
        check(
            bool(self.prompt_template) == bool(self.response_template),
            "data.prompt_template and data.response_template go together: give both or neither",
        )
        for name in ("text_template", "prompt_template", "response_template"):
            template = getattr(self, name)
            check(
                TEMPLATE.fullmatch(template) is not None,
                f"data.{name} {template!r} has braces that do not hold just a field's name: "
                "write {name} for a field, {{ for a brace",
            )
        check(
            self.has_prompts or "{" in self.text_template,
            f"data.text_template {self.text_template!r} names no field: write one in braces",
        )
        check(
            self.tokenizer != "", "data.tokenizer is empty: choose bytes, sentencepiece or a path"
        )
        check(
            not (self.has_prompts and self.too_long == "split"),
            "data.too_long 'split' would part a response from its prompt: choose truncate or drop",
        )

    @property
    def has_prompts(self) -> bool:
        """Whether a document is a prompt with its response."""
        return self.prompt_template != ""

    @property
    def has_validation_set(self) -> bool:
        """Whether there is a separate validation set."""
        return bool(self.validation_paths or self.validation_split)

    @property
    def held_out_fraction(self) -> float:
        """Share of the source's documents that is held out for validation."""
        return 0.0 if self.has_validation_set else self.validation_fraction

    @property
    def long_documents(self) -> Literal["split", "truncate", "drop"]:
        """`too_long`, with the default resolved."""
        return self.too_long or ("truncate" if self.has_prompts else "split")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Checked, prefix="checkpoints."):
    """Checkpoints of a run: when they are saved, and which are kept."""

    every: int = bounded(500, low=1)
    """Steps between checkpoints; the last step is saved too."""
    keep_last: int = bounded(2, low=1)
    """Number of newest checkpoints to keep."""
    keep_best: int = bounded(1, low=0)
    """Number of further checkpoints to keep, by lowest held-out loss of the last exit."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Checked, prefix="evaluation."):
    """Evaluation of the model during the run."""

    every: int = bounded(500, low=1)
    """Steps between evaluations; the last step is evaluated too."""
    batches: int = bounded(8, low=1)
    """Batches of held-out rows on which every exit is scored; always the same batches."""
    sample_tokens: int = bounded(64, low=0)
    """Length of the sample text that the model writes; 0 disables it."""
    sample_prompt: str = ""
    """Beginning of the sample text; the start of a held-out document by default."""
    exit_layer: int | None = None
    """Exit that drafts the sample text. By default the nearest to a quarter of the layers, of those
    with a loss."""
    num_draft_tokens: int = bounded(4, low=1)
    """Draft tokens per round of the sample text."""
    num_prompts: int = bounded(8, low=1)
    """Largest number of held-out beginnings in prompts.jsonl, for decoding afterwards."""
    prompt_tokens: int = bounded(32, low=1)
    """Tokens of such a beginning, at most half a row. A row's own prompt is used instead."""


@dataclass(frozen=True, kw_only=True)
class ProfileConfig(Checked, prefix="profile."):
    """A trace of a few steps, for xprof or TensorBoard, in the run's directory profile/."""

    start: int = bounded(10, low=1)
    """First step of the trace. A run that resumes within the trace writes the rest of it."""
    steps: int = bounded(0, low=0)
    """Number of steps to trace; 0 disables it."""
    all_processes: bool = False
    """Whether each process writes its own trace, not only process 0."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(StepConfig):
    """A training run: its step, model, data, mesh, checkpoints and evaluation."""

    model: LlamaConfig | None = None
    """Shape of the model; by default that of the model in `init_from`."""
    init_from: str = ""
    """Hugging Face directory, GGUF file or run to start from; random parameters by default."""
    data: DataConfig = DataConfig()
    batch_size: int = bounded(low=1)
    """B: rows of a step on all devices and hosts together."""
    seq_len: int = bounded(low=2)
    """T: tokens of a row."""
    mesh: MeshConfig = MeshConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    max_skipped: int = bounded(10, low=1)
    """Consecutive steps with a non-finite loss or gradient after which the run stops."""
    tensorboard: bool = False
    """Whether the metrics are written for TensorBoard too (needs the tensorboard extra)."""
    wandb: bool = False
    """Whether the metrics go to Weights & Biases too (needs the wandb extra)."""
    profile: ProfileConfig = ProfileConfig()

    def __post_init__(self):
        super().__post_init__()
        check(
            self.model is not None or self.init_from != "",
            "there is no model: give its shape in model, or a checkpoint in init_from",
        )
        check(
            self.lora.rank == 0 or self.init_from != "",
            f"lora.rank {self.lora.rank} trains adapters of a trained model: name it in init_from",
        )
        check(
            not self.exit_blocks.exits or self.init_from != "",
            "exit_blocks.exits needs a trained model, which stays as it is: name it in init_from",
        )
        check(
            self.profile.steps == 0 or self.profile.start <= self.num_steps,
            f"profile.start {self.profile.start} is after the last step: use 1..{self.num_steps}",
        )
        self.check_batch(self.batch_size)
        if self.model is not None:
            self.check_model(self.model)

    def check_model(self, model: LlamaConfig) -> None:
        """Raises ConfigError if this run does not fit the model."""
        super().check_model(model)
        check(
            self.seq_len <= model.max_context,
            f"seq_len {self.seq_len} is longer than the model's context of {model.max_context}",
        )
        check(
            self.evaluation.sample_tokens == 0 or model.num_layers > 1,
            f"evaluation.sample_tokens {self.evaluation.sample_tokens} needs an exit that drafts, "
            "which a model of 1 layer does not have: set it to 0",
        )
        exit_layer = self.evaluation.exit_layer
        check(
            exit_layer is None or 1 <= exit_layer < model.num_layers,
            f"evaluation.exit_layer {exit_layer} is out of range: use 1..{model.num_layers - 1}",
        )
