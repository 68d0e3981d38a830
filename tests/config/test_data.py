"""DataConfig: defaults that work anywhere, and one clear line for what cannot."""

import pytest

from lsjax.config import ConfigError, DataConfig

ROWS = dict(source="jsonl", paths=("rows.jsonl",))
PAIRS = dict(prompt_template="Q: {question}\nA:", response_template=" {answer}")


def test_defaults_need_no_file_and_can_be_keys():
    config = DataConfig()
    assert config.source == "python_source" and config.tokenizer == "sentencepiece"
    assert {config: 1}[DataConfig()] == 1
    assert config != DataConfig(validation_fraction=0.1)


@pytest.mark.parametrize(
    ("rest", "expected"),
    [({}, "split"), ({"too_long": "drop"}, "drop"), (PAIRS, "truncate")],
)
def test_long_documents_by_default(rest, expected):
    """Texts are split, so that no token is lost; a response is never parted from its prompt."""
    assert DataConfig(**ROWS, **rest).long_documents == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "text"}, "data.source text needs data.paths"),
        (
            {"paths": ("a.txt",)},
            "paths is read by source text, jsonl, tsv, array_record, not by python_source",
        ),
        ({"validation_paths": ("a.txt",)}, "validation_paths is read by source text, jsonl, tsv"),
        ({"separator": "blank_line"}, "is read by source text, not by python_source"),
        ({"source": "text", "paths": ("a.txt",), "separator": ""}, "separator is empty"),
        ({"source": "tfds"}, "data.source tfds needs data.tfds_name, such as gsm8k"),
        ({"tfds_name": "gsm8k"}, "tfds_name is read by source tfds, not by python_source"),
        (
            {"validation_split": "test"},
            "validation_split is read by source tfds, not by python_source",
        ),
        ({"tfds_split": "test"}, "tfds_split is read by source tfds, not by python_source"),
        ({"tfds_data_dir": "x"}, "tfds_data_dir is read by source tfds"),
        ({"text_template": "{a}"}, "text_template is read by source jsonl, tsv, tfds, not by"),
        (PAIRS, "prompt_template is read by source jsonl, tsv, tfds, not by python_source"),
        (ROWS | {"prompt_template": "{q}"}, "go together: give both or neither"),
        (ROWS | PAIRS | {"too_long": "split"}, "would part a response from its prompt"),
        (ROWS | {"text_template": "{text"}, "{{ for a brace"),
        (ROWS | {"text_template": "{}"}, "write {name} for a field, {{ for a brace"),
        (ROWS | {"text_template": "{text!r}"}, "write {name} for a field"),
        (ROWS | {"text_template": "text"}, "names no field"),
        ({"validation_fraction": 1.0}, "1.0 must be a finite number of at least 0 and below 1"),
        ({"validation_fraction": -0.1}, "-0.1 must be a finite number of at least 0 and below 1"),
        ({"max_documents": 0}, "max_documents 0 must be a whole number of at least 1"),
        ({"tokenizer": ""}, "choose bytes, sentencepiece or a path"),
        ({"vocab_size": 100}, "data.vocab_size 100 must be a whole number of at least 260: 256 by"),
    ],
)
def test_what_cannot_be_is_one_clear_line(changes, message):
    with pytest.raises(ConfigError) as error:
        DataConfig(**changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["source", "too_long"])
def test_unknown_choices_name_those_there_are(name):
    with pytest.raises(ConfigError, match=f"{name} 'csv' must be one of "):
        DataConfig(**{name: "csv"})
