"""Where text comes from, how it becomes tokens, and how tokens become rows."""

import string
from dataclasses import dataclass
from typing import Literal

from lsjax.config.checked import Checked, ConfigError, bounded, check

FILES = ("text", "jsonl", "tsv")
ROWS = ("jsonl", "tsv", "tfds")
READERS = {
    "paths": FILES,
    "validation_paths": FILES,
    "separator": ("text",),
    "text_template": ROWS,
    "prompt_template": ROWS,
    "response_template": ROWS,
    "tfds_name": ("tfds",),
    "tfds_split": ("tfds",),
    "tfds_data_dir": ("tfds",),
    "validation_split": ("tfds",),
}


@dataclass(frozen=True, kw_only=True)
class DataConfig(Checked):
    """One source of documents, its tokenizer, and the packing of its tokens.

    A document is a text, or a prompt with its response. docs/data.md has an example of each source.
    """

    source: Literal["python_source", "text", "jsonl", "tsv", "tfds"] = "python_source"
    """The standard library's source of the running interpreter; text files; jsonl files with an
    object on each line; tsv files with columns under a header; a TensorFlow data set."""
    paths: tuple[str, ...] = ()
    """Files of text, jsonl and tsv, or patterns such as books/**/*.txt."""
    separator: str = "file"
    """Where documents of text end: with the `file`, at each `blank_line`, or at a given marker."""

    text_template: str = "{text}"
    """The document of a row of jsonl, tsv or tfds; its fields in braces."""
    prompt_template: str = ""
    """The prompt of a row, such as "Question: {question} Answer:". Both templates together replace
    that of the text."""
    response_template: str = ""
    """The response of a row, such as " {answer}"."""
    train_on_prompt: bool = False
    """Whether the tokens of prompts are labels too."""

    tfds_name: str = ""
    """Name of the TensorFlow data set, with its config if it has several: cnn_dailymail,
    wikipedia/20230601.en."""
    tfds_split: str = "train"
    """Split or part of one, such as train[:10%]."""
    tfds_data_dir: str = ""
    """Where data sets lie; empty is TFDS's own, ~/tensorflow_datasets."""

    validation_fraction: float = bounded(0.05, low=0, below=1)
    """Share of the documents that is kept from training, chosen by a hash of each; read without a
    validation set of its own."""
    validation_paths: tuple[str, ...] = ()
    """Files of a validation set of its own (text, jsonl, tsv)."""
    validation_split: str = ""
    """Split of a validation set of its own (tfds)."""
    max_documents: int | None = bounded(None, low=1)
    """At most so many documents of the source, its first ones; a validation set is read whole."""

    tokenizer: str = "sentencepiece"
    """`bytes`; `sentencepiece`, trained on the training documents; or the path of a model's
    directory, a tokenizer.json, tokenizer.model or .gguf."""
    vocab_size: int = 512
    """Size of the vocabulary that is trained."""
    append_end: bool = True
    """Whether each document ends with the tokenizer's end token."""
    allow_special: bool = False
    """Whether the spelling of a special token ("</s>", "<|im_end|>") in a document is that token;
    else it is plain text. For templates that spell them, where the fields can be trusted."""

    packing: bool = True
    """Whether a row holds several documents; they never attend to one another. Else one each."""
    too_long: Literal["split", "truncate", "drop"] | None = None
    """What becomes of a document that is longer than a row. By default a text is split, and a
    response truncated. With split, texts fill every row; else whole documents share rows."""

    def __post_init__(self):
        super().__post_init__()
        self._check_source()
        self._check_templates()
        check(self.tokenizer != "", "tokenizer is empty: choose bytes, sentencepiece or a path")
        check(
            self.tokenizer != "sentencepiece" or self.vocab_size >= 260,
            f"vocab_size {self.vocab_size} is below 260: 256 bytes, <unk>, <s>, </s> and a letter",
        )
        check(
            not (self.has_prompts and self.too_long == "split"),
            "too_long 'split' would part a response from its prompt: choose truncate or drop",
        )

    @property
    def has_prompts(self) -> bool:
        """Whether a document is a prompt with its response."""
        return self.prompt_template != ""

    @property
    def has_validation_set(self) -> bool:
        """Whether there is a validation set of its own."""
        return bool(self.validation_paths or self.validation_split)

    @property
    def held_out_fraction(self) -> float:
        """Share of the source's documents that is kept for validation."""
        return 0.0 if self.has_validation_set else self.validation_fraction

    @property
    def long_documents(self) -> Literal["split", "truncate", "drop"]:
        """`too_long`, with the default resolved."""
        return self.too_long or ("truncate" if self.has_prompts else "split")

    def _check_source(self):
        for name, sources in READERS.items():
            check(
                self.source in sources or getattr(self, name) == getattr(DataConfig, name),
                f"{name} is read by source {', '.join(sources)}, not by {self.source}: leave it "
                "out, or choose another source",
            )
        check(
            self.source not in FILES or bool(self.paths),
            f"source {self.source} needs paths: name files or patterns",
        )
        check(
            self.source != "tfds" or self.tfds_name != "",
            "source tfds needs tfds_name, such as gsm8k",
        )
        check(self.separator != "", "separator is empty: choose file, blank_line or a marker")

    def _check_templates(self):
        check(
            bool(self.prompt_template) == bool(self.response_template),
            "prompt_template and response_template go together: give both or neither",
        )
        for name in ("text_template", "prompt_template", "response_template"):
            template = getattr(self, name)
            try:
                fields = [part[1:] for part in string.Formatter().parse(template)]
            except ValueError as error:
                raise ConfigError(f"{name} {template!r}: {error}; write {{{{ for a brace") from None
            for field, spec, conversion in fields:
                check(
                    field is None or (field != "" and not spec and not conversion),
                    f"{name} {template!r} holds braces that are more than a field's name: write "
                    "{name} for a field, {{ for a brace",
                )
        check(
            self.has_prompts or "{" in self.text_template,
            f"text_template {self.text_template!r} names no field: write one in braces",
        )
