"""The files beside a tokenizer: which of them counts, and bad ones are one error."""

import json
import shutil

import pytest

from lsjax.data.tokenizer import TokenizerError
from lsjax.data.tokenizer_files import load_tokenizer


def test_settings_come_from_the_files_beside(bpe_directory):
    tokenizer = load_tokenizer(bpe_directory)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (0, (1, 2), True)
    assert tokenizer.chat_template == "d"
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_jinja_file_goes_before_the_config(bpe_directory, tmp_path):
    shutil.copytree(bpe_directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(tmp_path).chat_template == "from the file"


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[1]"),
        ("tokenizer_config.json", '{"bos_token": "<nowhere>"}'),
        ("tokenizer_config.json", '{"chat_template": [1]}'),
        ("generation_config.json", '{"eos_token_id": [[1]]}'),
    ],
)
def test_bad_settings(bpe_directory, tmp_path, name, content):
    shutil.copy(bpe_directory / "tokenizer.json", tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_added_tokens_that_the_model_lacks(sentencepiece_model, tmp_path):
    shutil.copy(sentencepiece_model, tmp_path)
    config = {"added_tokens_decoder": {"420": {"content": "<|im_end|>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    with pytest.raises(TokenizerError, match="im_end"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("value", ["a", True, 1.5, [1, "a"], {}])
@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
def test_ids_that_are_none_are_named_with_field_value_and_file(
    bpe_directory, tmp_path, name, value
):
    """And </s>, which the other settings name, is not blamed."""
    shutil.copytree(bpe_directory, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(TokenizerError) as error:
        load_tokenizer(tmp_path)
    assert f"{tmp_path}/generation_config.json: {name} {value!r} must be" in str(error.value)
    assert "</s>" not in str(error.value)
