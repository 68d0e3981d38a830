"""TensorFlow data sets without TensorFlow, written here and read back."""

import shutil
import sys

import pytest
import tensorflow_datasets as tfds

from lsjax.config import ConfigError, DataConfig
from lsjax.data.pieces import Document
from lsjax.data.pipeline import packed_rows
from lsjax.data.shards import SPLITS
from lsjax.data.sources import document_source
from lsjax.data.tokenizer_backends import ByteTokenizer
from tests.data import tiny_questions  # noqa: F401 (TFDS knows it from then on)

PAIRS = dict(prompt_template="{question}", response_template=" {answer} ({number})")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Prepared by TFDS itself, as it is by the first use of a data set that downloads."""
    folder = str(tmp_path_factory.mktemp("tfds"))
    tfds.disable_progress_bar()
    document_source(config(folder))
    return folder


def config(folder, name="tiny_questions", **rest):
    return DataConfig(source="tfds", tfds_name=name, tfds_data_dir=folder, **(PAIRS | rest))


def test_every_row_of_a_split_or_a_part_is_a_document(data_dir):
    expected = {Document(f" It is {n + 1}. ({n})", f"What is {n} + 1?") for n in range(20)}
    documents = list(document_source(config(data_dir)).documents())
    assert set(documents) == expected and len(documents) == 20
    part = list(document_source(config(data_dir, tfds_split="train[:25%]")).documents())
    assert part == documents[:5]
    assert "tensorflow" not in sys.modules


def test_rows_of_both_splits(data_dir, tmp_path):
    own = config(data_dir, validation_split="validation")
    settings = dict(seq_len=64, cache=tmp_path)
    train, held = (packed_rows(own, ByteTokenizer(), split=split, **settings) for split in SPLITS)
    assert (train.num_documents, held.num_documents, held.num_shared) == (20, 10, 5)


def test_the_fingerprint_tells_parts_and_splits_apart(data_dir, tmp_path):
    settings = dict(seq_len=64, cache=tmp_path, split="train")
    prints = [
        packed_rows(config(data_dir, tfds_split=split), ByteTokenizer(), **settings).fingerprint
        for split in (*SPLITS, "train[:25%]", "train")
    ]
    assert prints[0] == prints[3] and len(set(prints)) == 3


def test_what_is_not_there_is_one_clear_line(data_dir):
    cases = [
        ("tiny_questions", "no", "has no split 'no' .* choose one of train, validation, test"),
        ("tiny_questions", "train[:x]", "has no split .* or a part such as train"),
        ("topv2", "train", "has no 'topv2': .* use source jsonl or tsv with its"),
        ("tiny_answers", "train", "check the spelling, set the tfds_data_dir"),
        ("tiny questions", "train", "tfds_name 'tiny questions': "),
        ("by_hand", "train", "could not be prepared .*Get questions.zip from the lib"),
    ]
    for name, split, message in cases:
        with pytest.raises(ConfigError, match=message) as error:
            document_source(config(data_dir, name, tfds_split=split))
        assert "\n" not in str(error.value)
    broken = config(data_dir, response_template="{reply}")
    with pytest.raises(ConfigError, match="train, row 0 has no field 'reply', it has answer, numb"):
        list(document_source(broken).documents())


def test_a_data_set_that_only_tensorflow_reads_is_refused(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path, dirs_exist_ok=True)
    info = next(tmp_path.glob("tiny_questions/*/dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ConfigError, match="was prepared as tfrecord, which only TensorFlow reads"):
        document_source(config(str(tmp_path)))
