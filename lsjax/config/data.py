"""Data of a run: source of the text, tokenizer, and packing of tokens into rows."""

import re
from dataclasses import dataclass
from typing import Literal

from lsjax.config.checked import Checked, bounded, check

FILES = ("text", "jsonl", "tsv", "array_record")
ROWS = ("jsonl", "tsv", "tfds")
READ_BY = {  # fields that only some sources read
    "paths": FILES,
    "validation_paths": FILES,
    "separator": ("text",),
    "ids_field": ("array_record",),
    "text_template": ROWS,
    "prompt_template": ROWS,
    "response_template": ROWS,
    "tfds_name": ("tfds",),
    "tfds_split": ("tfds",),
    "tfds_data_dir": ("tfds",),
    "validation_split": ("tfds",),
}
TEMPLATE = re.compile(r"([^{}]|\{\{|\}\}|\{[^{}:!]+\})*")  # characters, {{, }} and {name}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked, prefix="data."):
    """One source of documents, its tokenizer, and the packing of its tokens.

    A document is a text, or a prompt with its response. docs/training.md has examples of sources.
    """

    source: Literal["python_source", "text", "jsonl", "tsv", "tfds", "array_record"] = (
        "python_source"
    )
    """python_source: the standard library of the running Python. text: text files. jsonl: files
    with an object on each line. tsv: files with columns under a header. tfds: a TensorFlow data
    set. array_record: ArrayRecord files of tf.train.Example with token ids, as MaxText reads."""
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
    """Name of the TensorFlow data set, with its config if it has several: cnn_dailymail,
    wikipedia/20230601.en."""
    tfds_split: str = "train"
    """Split, or part of one, such as train[:10%]."""
    tfds_data_dir: str = ""
    """Directory of the data sets; empty means TFDS's default, ~/tensorflow_datasets."""

    validation_fraction: float = bounded(0.05, low=0, below=1)
    """Share of the documents that is held out, chosen by a hash of each. Has no effect with a
    separate validation set."""
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
    """Whether the spelling of a special token ("</s>", "<|im_end|>") in a document becomes that
    token instead of plain text. For templates with special tokens, if the fields can be trusted."""

    packing: bool = True
    """Whether a row may hold several documents, which never attend to one another."""
    too_long: Literal["split", "truncate", "drop"] | None = None
    """Treatment of documents longer than a row. By default texts are split and responses truncated.
    With split, texts fill every row; otherwise complete documents share rows."""

    def __post_init__(self):
        super().__post_init__()
        self._check_source()
        self._check_templates()
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

    def _check_source(self):
        for name, sources in READ_BY.items():
            check(
                self.source in sources or getattr(self, name) == getattr(DataConfig, name),
                f"data.{name} is read by source {', '.join(sources)}, not by {self.source}: leave "
                "it out, or choose another source",
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

    def _check_templates(self):
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
