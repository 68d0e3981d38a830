"""The tokenizer in a GGUF equals the one it was made of; bad files are one error."""

import json
import random

import numpy as np
import pytest
import sentencepiece
from tokenizers import Regex, normalizers, pre_tokenizers

from lsjax.data.tokenizer import TokenizerError
from lsjax.data.tokenizer_files import load_tokenizer

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6


def write_gguf(file, *, model, tokens, types, split=0, **settings):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(file, "llama", split_max_tensors=split)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in settings.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    for name in "abc" if split else "":
        writer.add_tensor(name, np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if split:
        writer.write_tensors_to_file()
    writer.close()
    return file


def write_bpe_gguf(file, backend, pre, first=None, more=(), **settings):
    model = json.loads(backend.to_str())["model"]
    tokens = [backend.id_to_token(i) for i in range(backend.get_vocab_size())]
    tokens[0] = first or tokens[0]
    tokens += more
    types = [CONTROL if i < 3 else NORMAL for i in range(len(tokens))]
    merges = [" ".join(merge) for merge in model["merges"]]
    return write_gguf(
        file, model="gpt2", tokens=tokens, types=types, token_merges=merges, tokenizer_pre=pre,
        **settings,
    )  # fmt: skip


def write_sentencepiece_gguf(file, model_file, **settings):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ids = range(processor.vocab_size())
    types = [
        UNKNOWN if processor.is_unknown(i) else
        CONTROL if processor.is_control(i) else
        BYTE if processor.is_byte(i) else NORMAL
        for i in ids
    ]  # fmt: skip
    tokens, scores = ([f(i) for i in ids] for f in (processor.id_to_piece, processor.get_score))
    return write_gguf(
        file, model="llama", tokens=tokens, types=types, token_scores=scores,
        bos_token_id=1, eos_token_id=2, unk_token_id=0, **settings,
    )  # fmt: skip


def test_sentencepiece_is_the_same_model(sentencepiece_model, texts, tmp_path):
    original = load_tokenizer(sentencepiece_model)
    file = write_sentencepiece_gguf(tmp_path / "m.gguf", sentencepiece_model, eot_token_id=5)
    tokenizer = load_tokenizer(file)
    for text in texts:
        assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.fingerprint == original.fingerprint
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2, 5), True)
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert again.fingerprint == tokenizer.fingerprint and again.eos_ids == (2, 5)


def test_without_the_space_put_first(sentencepiece_model, tmp_path):
    file = write_sentencepiece_gguf(
        tmp_path / "m.gguf", sentencepiece_model, add_space_prefix=False, add_bos_token=False
    )
    tokenizer = load_tokenizer(file)
    ids = tokenizer.encode("little house")
    assert tokenizer.decode([ids[0]])[0] == "l"
    space = tokenizer.encode(" little")
    assert tokenizer.decode(space) == " little"


# The words of each family, from its tokenizer.json.
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + LETTERS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
SPLITS = {
    "llama-bpe": LLAMA3,
    "smaug-bpe": LLAMA3,
    "dbrx": LLAMA3,
    "qwen2": CONTRACTIONS + LETTERS + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES,
    "tekken": CASES + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES,
}
BEGINS = ("llama-bpe", "tekken")
WHOLE_WORDS = (*BEGINS, "smaug-bpe")


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", *SPLITS, None])
def test_bpe_equals_the_trained_pipeline(pre, train_bpe, texts, tmp_path):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre not in SPLITS)
    first = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []
    if pre in SPLITS:
        first = [pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated")]
    backend = train_bpe(pre_tokenizers.Sequence([*first, byte_level]))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    file = write_bpe_gguf(
        tmp_path / "m.gguf", backend, pre, bos_token_id=0, eos_token_id=1, chat_template="c"
    )
    tokenizer = load_tokenizer(file)
    assert tokenizer.add_bos == (pre in BEGINS) and tokenizer.chat_template == "c"
    for text in [*texts, "cafe\u0301 1234 it's WE'LL /path//to HTTPServer"]:
        assert tokenizer.encode(text, add_bos=False) == backend.encode(text).ids
    assert tokenizer.encode("</s>", add_bos=False) == [1]
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert [again.encode(t) for t in texts] == [tokenizer.encode(t) for t in texts]
    assert again.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("pre", ["qwen2", "dbrx", *WHOLE_WORDS])
def test_only_some_families_take_a_word_that_is_a_token(pre, train_bpe, tmp_path):
    backend = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    file = write_bpe_gguf(tmp_path / "m.gguf", backend, pre, more=["qzx"])  # no merges make it
    ids = load_tokenizer(file).encode("qzx", add_bos=False)
    whole = [backend.get_vocab_size()]
    assert ids == (whole if pre in WHOLE_WORDS else backend.encode("qzx").ids)


def test_split_files_have_it_in_the_first(train_bpe, tmp_path):
    backend = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    write_bpe_gguf(tmp_path / "m.gguf", backend, "gpt-2", split=1)
    first, *others = sorted(tmp_path.iterdir())
    assert [file.name for file in others] == ["m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]
    expected = load_tokenizer(first).fingerprint
    assert {load_tokenizer(file).fingerprint for file in others} == {expected}
    first.unlink()
    with pytest.raises(TokenizerError, match="m-00002-of-00003.gguf.*m-00001-of-00003.gguf"):
        load_tokenizer(others[0])


def test_llama_3_from_before_its_words_had_a_name(train_bpe, tmp_path):
    """Told by its first token; what does not have it is GPT-2's kind (above)."""
    split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend = train_bpe(pre_tokenizers.Sequence([split, byte_level]))
    settings = dict(bos_token_id=0, eos_token_id=1)
    named = write_bpe_gguf(tmp_path / "a.gguf", backend, "llama-bpe", **settings)
    unnamed = write_bpe_gguf(
        tmp_path / "b.gguf", backend, None, first="<|begin_of_text|>", **settings
    )
    text = "it's 12345 WE'LL"
    assert load_tokenizer(unnamed).add_bos
    assert load_tokenizer(unnamed).encode(text) == load_tokenizer(named).encode(text)


def test_smollm_splits_digits(train_bpe, tmp_path):
    backend = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))  # has joined digits
    assert len(backend.encode("12345").ids) < 5
    smollm = load_tokenizer(write_bpe_gguf(tmp_path / "a.gguf", backend, "smollm"))
    gpt2 = load_tokenizer(write_bpe_gguf(tmp_path / "b.gguf", backend, "gpt-2"))
    digits = [backend.token_to_id(digit) for digit in "12345"]
    assert smollm.encode("12345") == digits
    assert gpt2.encode("12345") == backend.encode("12345").ids != digits


def test_bad_files_are_one_line_that_names_them(train_bpe, tmp_path):
    backend = train_bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))
    good = write_bpe_gguf(tmp_path / "good.gguf", backend, "smollm").read_bytes()
    cases = {
        "pre": write_bpe_gguf(tmp_path / "pre.gguf", backend, "unheard-of"),
        "eos": write_bpe_gguf(tmp_path / "eos.gguf", backend, "smollm", eos_token_id=10**6),
        "kind": write_gguf(tmp_path / "kind.gguf", model="t5", tokens=["a"], types=[1]),
        "scores": write_gguf(tmp_path / "scores.gguf", model="llama", tokens=["a"], types=[1]),
    }
    for part in (0, 3, 30, len(good) // 2, len(good) - 9):
        cases[f"cut at {part}"] = tmp_path / f"cut{part}.gguf"
        cases[f"cut at {part}"].write_bytes(good[:part])
    cases["garbage"] = tmp_path / "garbage.gguf"
    cases["garbage"].write_bytes(random.Random(2).randbytes(3000))
    cases["missing"] = tmp_path / "missing.gguf"
    cases["endless array"] = tmp_path / "endless.gguf"
    key, array_of_bytes = b"tokenizer.x", b"\x09\0\0\0" + b"\0\0\0\0" + b"\xff" * 7 + b"\0"
    cases["endless array"].write_bytes(
        b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7)
        + len(key).to_bytes(8, "little") + key + array_of_bytes
    )  # fmt: skip
    for name, file in cases.items():
        with pytest.raises(TokenizerError) as error:
            print(name, load_tokenizer(file))
        assert str(file) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(TokenizerError, match="unheard-of.*smollm"):
        load_tokenizer(cases["pre"])
