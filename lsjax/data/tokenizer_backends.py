"""Tokenizers of the encoding libraries: `tokenizers` (also for plain bytes) and `sentencepiece`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property

import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from lsjax.config import Path
from lsjax.data.files import one_line, write_whole
from lsjax.data.tokenizer import PROBE, Tokenizer, TokenizerError

MAX_TOKEN_ID = 1 << 24
BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's spelling of a byte
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")  # each digit is a word
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` pipeline (a tokenizer.json), with the decoder of Llama 3 or Llama 2.

    backend: the pipeline; its truncation and padding are disabled. add_bos: by default, what the
    post-processor does. Other arguments are as in `Tokenizer`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        add_bos: bool | None = None,
        chat_template: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id, self.eos_ids, self.chat_template = bos_id, tuple(eos_ids), chat_template
        has_bos = backend.encode("").ids[:1] == [bos_id]
        self.add_bos = has_bos if add_bos is None else add_bos and bos_id is not None
        if self.add_bos != has_bos:
            set_bos(backend, bos_id if self.add_bos else None)
        added = backend.get_added_tokens_decoder()
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        if not 0 < self.vocab_size <= MAX_TOKEN_ID:
            raise TokenizerError(f"largest token id {self.vocab_size - 1}: get an undamaged file")
        piece_bytes, self.leading_spaces = _piece_decoder(backend)
        self._pieces = {i: piece_bytes(token) for token, i in vocab.items()}
        self._pieces |= {i: token.content.encode() for i, token in added.items()}
        self.special_spelling = {i: token.content for i, token in added.items() if token.special}
        self._pieces |= dict.fromkeys(self.special_spelling, b"")

    @property
    def spaces_first_only(self) -> bool:
        """Whether SentencePiece's space is put before a text, but not after special tokens."""
        words = self._backend.pre_tokenizer
        return words is not None and b'"prepend_scheme":"first"' in words.__getstate__()

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # A second pipeline: the switch belongs to the whole object, which threads may share.
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> list[list[int]]:
        backend = self._backend if allow_special else self._plain
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    def _save_model(self, directory: Path) -> str:
        write_whole(directory / "tokenizer.json", self._backend.to_str(pretty=True).encode())
        return "PreTrainedTokenizerFast"


class ByteTokenizer(HuggingFaceTokenizer):
    """UTF-8 bytes as ids 0..255, `<s>` 256, `</s>` 257: for tests and tiny models."""

    def __init__(self, *, add_bos: bool = True, chat_template: str | None = None):
        words = pre_tokenizers.ByteLevel(False, use_regex=False)
        backend = byte_level_bpe(bytes_by_character(), [], words)
        backend.add_special_tokens([added_token("<s>"), added_token("</s>")])
        super().__init__(
            backend, bos_id=256, eos_ids=(257,), add_bos=add_bos, chat_template=chat_template
        )


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, run by the sentencepiece library.

    Decoding equals the library's, except that a broken character is one U+FFFD, not one per byte.

    model: content of a tokenizer.model. add_bos: has no effect if the model lacks the token.
    eos_ids: the model's own by default.
    """

    def __init__(
        self,
        model: bytes,
        *,
        add_bos: bool = True,
        eos_ids: Sequence[int] = (),
        chat_template: str | None = None,
    ):
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise TokenizerError(f"not a SentencePiece model ({one_line(error)})") from error
        self.model, self._processor = model, processor
        self.vocab_size = processor.vocab_size()
        bos_id, eos_id = processor.bos_id(), processor.eos_id()  # -1 if missing
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_ids = tuple(eos_ids or ([eos_id] if eos_id >= 0 else []))
        self.add_bos = add_bos and self.bos_id is not None
        self.chat_template = chat_template
        self.special_spelling, self._pieces = {}, {}
        for i, piece in enumerate(processor.id_to_piece(list(range(self.vocab_size)))):
            self._pieces[i] = piece.replace("▁", " ").encode()
            if processor.is_control(i) or processor.is_unknown(i):
                self.special_spelling[i] = piece
                self._pieces[i] = processor.decode([i]).encode()
            elif processor.is_byte(i):
                self._pieces[i] = bytes.fromhex(piece[3:5])
        # The normalizer's settings hide the rule for leading spaces, so test the decoder.
        space = processor.piece_to_id("▁")
        if processor.id_to_piece(space) == "▁":
            self.leading_spaces = (float("inf"), 1, 0)[len(processor.decode([space, space]))]
        self._specials = re.compile("|".join(map(re.escape, self.special_spelling.values())))

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> list[list[int]]:
        if not allow_special:
            threads = 1 if len(texts) == 1 else 4  # of its own, as it keeps Python's lock
            return self._processor.encode(list(texts), num_threads=threads)
        return [self._encode_special(text) for text in texts]

    def _encode_special(self, text: str) -> list[int]:
        ids, end = [], 0
        for match in self._specials.finditer(text):
            ids += self._processor.encode(text[end : match.start()])
            ids.append(self._processor.piece_to_id(match[0]))
            end = match.end()
        return ids + self._processor.encode(text[end:])

    def piece_id(self, piece: str) -> int | None:
        """Id of a token by its spelling; None if there is no such token."""
        found = self._processor.piece_to_id(piece)  # the unknown id if missing
        return found if self._processor.id_to_piece(found) == piece else None

    def _save_model(self, directory: Path) -> str:
        """Writes tokenizer.model, and tokenizer.json for transformers if `_as_bpe` makes one."""
        write_whole(directory / "tokenizer.model", self.model)
        backend = self._as_bpe()
        if backend is None:
            return "LlamaTokenizer"
        write_whole(directory / "tokenizer.json", backend.to_str(pretty=True).encode())
        return "PreTrainedTokenizerFast"

    def _as_bpe(self) -> tokenizers.Tokenizer | None:
        """A BPE of the `tokenizers` library with the same merges; equal except for rare ties.

        None if a test text differs: for unigram or normalizing models, or user-defined pieces.
        """
        processor, ids = self._processor, range(self.vocab_size)
        names = processor.id_to_piece(list(ids))
        vocab = dict(zip(names, ids, strict=True))
        bytes_ = {i for i in ids if processor.is_byte(i)}
        left_out = (
            {i for i in ids if processor.is_unused(i)} | bytes_ | self.special_spelling.keys()
        )
        normal = {piece: i for piece, i in vocab.items() if i not in left_out}
        merges = []  # every split of a piece into two pieces, ordered by the piece's score
        for piece in sorted(normal, key=lambda p: (-processor.get_score(normal[p]), normal[p])):
            pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
            known = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
            merges += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
        unknown = names[processor.unk_id()]
        model = models.BPE(
            vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(bytes_)
        )
        backend = tokenizers.Tokenizer(model)
        normal_form = [normalizers.Replace(" ", "▁")]
        text_form = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if processor.encode("a", out_type=str)[0].startswith("▁"):
            normal_form.insert(0, normalizers.Prepend("▁"))
            text_form.append(decoders.Strip(" ", 1, 0))
        backend.normalizer = normalizers.Sequence(normal_form)
        backend.decoder = decoders.Sequence(text_form)
        backend.add_special_tokens([added_token(piece) for piece in self.special_spelling.values()])
        set_bos(backend, self.bos_id if self.add_bos else None)
        texts = [PROBE, PROBE[::-1], *names[: 1 << 10]]
        same = all(
            backend.encode(text, add_special_tokens=False).ids == self._encode_special(text)
            for text in texts
        )
        return backend if same else None


def matched_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Splits a text into the matches of `pattern`, spelled as bytes."""
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


def byte_level_bpe(
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    pre_tokenizer: pre_tokenizers.PreTokenizer,
    *,
    whole_words: bool = False,
) -> tokenizers.Tokenizer:
    """A BPE over bytes. With `whole_words`, a word that is a token is used without merging."""
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=whole_words))
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend


def bytes_by_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def added_token(token: str, *, special: bool = True) -> AddedToken:
    """A token that is recognised wherever its spelling occurs in a text."""
    return AddedToken(token, special=special, normalized=False)


def set_bos(backend: tokenizers.Tokenizer, bos_id: int | None) -> None:
    """Makes other readers of the pipeline put `bos_id` first, or nothing."""
    bos = [] if bos_id is None else [(backend.id_to_token(bos_id), bos_id)]
    names = [name for name, _ in bos]
    backend.post_processor = processors.TemplateProcessing(
        single=[*names, "$A"], pair=[*names, "$A", *names, "$B:1"], special_tokens=bos
    )


def _piece_decoder(backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes], int]:
    """A function from a vocabulary entry to its bytes, and the number of leading spaces dropped."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    if "ByteLevel" in steps:
        table = bytes_by_character()

        def byte_level(token: str) -> bytes:
            known = table.keys() >= set(token)
            return bytes(table[c] for c in token) if known else token.encode()

        return byte_level, 0
    for unknown in steps.keys() - {"Replace", "Metaspace", "Strip", "ByteFallback", "Fuse"}:
        raise TokenizerError(
            f"its decoder ({unknown}) is not supported; supported are ByteLevel, Metaspace and "
            "SentencePiece's Replace, ByteFallback, Fuse, Strip"
        )

    def sentencepiece_like(token: str) -> bytes:
        byte = BYTE_PIECE.fullmatch(token) if "ByteFallback" in steps else None
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    prepends = "Metaspace" in steps and steps["Metaspace"].get("prepend_scheme") != "never"
    return sentencepiece_like, steps.get("Strip", {}).get("start", int(prepends))
