"""From a configuration to its source of documents."""

from collections.abc import Iterator
from itertools import islice

from lsjax.config import DataConfig
from lsjax.data.documents import Document, Source
from lsjax.data.python_source import PythonSource
from lsjax.data.row_files import RowFiles
from lsjax.data.splits import is_held_out
from lsjax.data.text_files import TextFiles


def open_source(config: DataConfig, *, validation: bool = False) -> Source:
    """The source; with `validation` the validation set of its own, if the config has one.

    Raises ConfigError where files are missing.
    """
    paths = config.validation_paths if validation else config.paths
    match config.source:
        case "python_source":
            return PythonSource()
        case "text":
            return TextFiles(paths, config.separator)
        case "jsonl" | "tsv":
            return RowFiles(paths, config)
        case "tfds":
            # Only here: its import takes a second.
            from lsjax.data.tfds_source import TfdsSource

            return TfdsSource(config, config.validation_split if validation else config.tfds_split)


def training_documents(config: DataConfig) -> Iterator[Document]:
    """The documents that are not held out, without those beyond config.max_documents."""
    documents = islice(open_source(config).documents(), config.max_documents)
    fraction = config.held_out_fraction
    return (document for document in documents if not is_held_out(document, fraction))
