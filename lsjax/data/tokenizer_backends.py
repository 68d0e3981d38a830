"""Tokenizers of the encoding libraries: `tokenizers` (also for plain bytes) and `sentencepiece`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lsjax.config import AnyPath
from lsjax.data.tokenizer import PROBE, Tokenizer, TokenizerError
from lsjax.io.files import write_whole

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's spelling of a byte


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` pipeline (a tokenizer.json), with the decoder of Llama 3 or Llama 2.

    backend: the pipeline; its truncation and padding are disabled.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added, vocab = backend.get_added_tokens_decoder(), backend.get_vocab()
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        piece_bytes, self.leading_spaces = _piece_decoder(backend)
        self._pieces = {i: piece_bytes(token) for token, i in vocab.items()}
        self._pieces |= {i: token.content.encode() for i, token in added.items()}
        self.special_spelling = {i: token.content for i, token in added.items() if token.special}
        self._pieces |= dict.fromkeys(self.special_spelling, b"")

    @property
    def adds_bos(self) -> bool:
        """Whether other readers of the pipeline put `bos_id` before a text."""
        return self._backend.encode("").ids[:1] == [self.bos_id]

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

    def _save_model(self, directory: AnyPath) -> str:
        if self.add_bos != self.adds_bos:
            bos = [(self.spelling(self.bos_id), self.bos_id)] if self.add_bos else []
            names = [name for name, _ in bos]
            self._backend.post_processor = processors.TemplateProcessing(
                single=[*names, "$A"], pair=[*names, "$A", *names, "$B:1"], special_tokens=bos
            )
        write_whole(directory / "tokenizer.json", self._backend.to_str(pretty=True).encode())
        return "PreTrainedTokenizerFast"


class ByteTokenizer(HuggingFaceTokenizer):
    """UTF-8 bytes as ids 0..255, `<s>` 256, `</s>` 257: for tests and tiny models."""

    def __init__(self, *, add_bos: bool = True, chat_template: str | None = None):
        backend = tokenizers.Tokenizer(models.BPE(bytes_by_character(), []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<s>", "</s>"])
        super().__init__(backend)
        self.bos_id, self.eos_ids = 256, (257,)
        self.add_bos, self.chat_template = add_bos, chat_template


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, run by the sentencepiece library.

    Decoding equals the library's, except that a broken character is one U+FFFD, not one per byte.

    model: content of a tokenizer.model. Raises RuntimeError for anything else.
    """

    def __init__(self, model: bytes):
        processor = sentencepiece.SentencePieceProcessor()
        processor.LoadFromSerializedProto(model)
        self.model, self._processor = model, processor
        self.vocab_size = processor.vocab_size()
        bos_id, eos_id = processor.bos_id(), processor.eos_id()  # -1 if missing
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_ids = (eos_id,) if eos_id >= 0 else ()
        self.add_bos = self.bos_id is not None
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
        self._specials = re.compile(f"({'|'.join(map(re.escape, self.special_spelling.values()))})")

    def _encode_batch(self, texts: Sequence[str], allow_special: bool) -> list[list[int]]:
        if not allow_special:
            # In threads of its own, as it keeps Python's lock.
            return self._processor.encode(list(texts), num_threads=4)
        return [self._encode_special(text) for text in texts]

    def _encode_special(self, text: str) -> list[int]:
        parts = self._specials.split(text)  # every second one is a special token
        batch = [self._processor.encode(part) for part in parts]
        batch[1::2] = [[self._processor.piece_to_id(part)] for part in parts[1::2]]
        return [*chain.from_iterable(batch)]

    def _save_model(self, directory: AnyPath) -> str:
        """Writes tokenizer.model, and tokenizer.json for transformers if an equal one exists."""
        write_whole(directory / "tokenizer.model", self.model)
        converted, some = self._as_bpe(), range(min(1 << 10, self.vocab_size))
        texts = [PROBE, PROBE[::-1], *self._processor.id_to_piece(list(some))]
        if converted._encode_batch(texts, True) != self._encode_batch(texts, True):
            return "LlamaTokenizer"
        return converted._save_model(directory)

    def _as_bpe(self) -> HuggingFaceTokenizer:
        """A BPE with the same merges: equal except for rare ties, and for unigram or normalizing
        models and user-defined pieces."""
        processor, ids = self._processor, range(self.vocab_size)
        names = processor.id_to_piece(list(ids))
        plain = [i for i in ids if not (processor.is_unused(i) or processor.is_byte(i))]
        normal = {names[i]: i for i in plain if i not in self.special_spelling}
        merges = []  # every split of a piece into two pieces, ordered by the piece's score
        for piece in sorted(normal, key=lambda p: (-processor.get_score(normal[p]), normal[p])):
            pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
            known = [pair for pair in pairs if pair[0] in normal and pair[1] in normal]
            merges += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
        vocab, unknown = dict(zip(names, ids, strict=True)), names[processor.unk_id()]
        model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
        backend = tokenizers.Tokenizer(model)
        normal_form = [normalizers.Replace(" ", "▁")]
        text_form = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if processor.encode("a", out_type=str)[0].startswith("▁"):
            normal_form.insert(0, normalizers.Prepend("▁"))
            text_form.append(decoders.Strip(" ", 1, 0))
        backend.normalizer = normalizers.Sequence(normal_form)
        backend.decoder = decoders.Sequence(text_form)
        backend.add_special_tokens([*self.special_spelling.values()])
        converted = HuggingFaceTokenizer(backend)
        converted.bos_id, converted.add_bos = self.bos_id, self.add_bos
        return converted


def bytes_by_character() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as themselves, the others from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def _piece_decoder(backend: tokenizers.Tokenizer) -> tuple[Callable[[str], bytes], int]:
    """A function from a vocabulary entry to its bytes, and the number of leading spaces dropped."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    steps = {step["type"]: step for step in decoder.get("decoders", [decoder])}
    table = bytes_by_character() if "ByteLevel" in steps else {}
    supported = {"ByteLevel", "Replace", "Metaspace", "Strip", "ByteFallback", "Fuse"}
    for unknown in steps.keys() - supported:
        raise TokenizerError(f"its decoder {unknown} is not supported: use another file")

    def piece_bytes(token: str) -> bytes:
        if table:
            known = table.keys() >= set(token)
            return bytes(table[c] for c in token) if known else token.encode()
        byte = BYTE_PIECE.fullmatch(token) if "ByteFallback" in steps else None
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    prepends = "Metaspace" in steps and steps["Metaspace"].get("prepend_scheme") != "never"
    return piece_bytes, steps.get("Strip", {}).get("start", int(prepends))
