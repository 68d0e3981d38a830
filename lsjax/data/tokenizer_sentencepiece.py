"""SentencePiece models, run by their own library, and the same BPE for `tokenizers`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

from lsjax.data.tokenizer import PROBE, Tokenizer, TokenizerError, first_line
from lsjax.data.tokenizer_huggingface import added_token, all_merges, set_bos


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, run by the sentencepiece library.

    Decoding equals the library's, but for bytes that are no UTF-8: a broken character is one
    U+FFFD here, there one for each byte.

    Args:
      model: a serialized ModelProto, the content of a tokenizer.model.
      add_bos: as Llama 2 does, unless the model has no such token.
      eos_ids: None takes the model's own.
    """

    def __init__(
        self,
        model: bytes,
        *,
        add_bos: bool = True,
        eos_ids: Sequence[int] | None = None,
        chat_template: str | None = None,
    ):
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise TokenizerError(f"not a SentencePiece model ({first_line(error)})") from error
        self._model, self._processor = model, processor
        self.vocab_size = processor.vocab_size()
        bos_id, eos_id = processor.bos_id(), processor.eos_id()  # -1 if there is none
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
        # The rule for leading spaces stands in the normalizer's settings: ask the decoder instead.
        space = processor.piece_to_id("▁")
        if processor.id_to_piece(space) == "▁":
            self.leading_spaces = (float("inf"), 1, 0)[len(processor.decode([space, space]))]
        self._specials = re.compile("|".join(map(re.escape, self.special_spelling.values())))

    def _encode(self, text: str, allow_special: bool) -> list[int]:
        if not allow_special:
            return self._processor.encode(text)
        ids, end = [], 0
        for match in self._specials.finditer(text):
            ids += self._processor.encode(text[end : match.start()])
            ids.append(self._processor.piece_to_id(match[0]))
            end = match.end()
        return ids + self._processor.encode(text[end:])

    def piece_id(self, piece: str) -> int | None:
        """Id of a token by its spelling; None if there is no such token."""
        found = self._processor.piece_to_id(piece)  # the unknown token's where there is none
        return found if self._processor.id_to_piece(found) == piece else None

    def _save_model(self, directory: Path) -> str:
        """Writes tokenizer.model and, if it can be had, a tokenizer.json.

        The json is for transformers, which does not run SentencePiece: a BPE with the same merges,
        equal to the model but for rare ties. It is left out where it would differ on a test text
        (unigram models, normalizing ones, user-defined pieces).
        """
        (directory / "tokenizer.model").write_bytes(self._model)
        backend = self._as_bpe()
        if backend is None:
            return "LlamaTokenizer"
        backend.save(str(directory / "tokenizer.json"))
        return "PreTrainedTokenizerFast"

    def _as_bpe(self) -> tokenizers.Tokenizer | None:
        """The same BPE for the `tokenizers` library, or None where it would not be the same."""
        processor = self._processor
        names = processor.id_to_piece(list(range(self.vocab_size)))
        vocab = {piece: i for i, piece in enumerate(names)}
        normal = {
            piece: i
            for piece, i in vocab.items()
            if not (i in self.special_spelling or processor.is_byte(i) or processor.is_unused(i))
        }
        order = sorted(normal, key=lambda p: (-processor.get_score(normal[p]), normal[p]))
        has_bytes = any(processor.is_byte(i) for i in range(self.vocab_size))
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab,
                all_merges(order, normal),
                unk_token=names[processor.unk_id()],
                fuse_unk=True,
                byte_fallback=has_bytes,
            )
        )
        prefixed = processor.encode("a", out_type=str)[0].startswith("▁")
        prefix = [normalizers.Prepend("▁")] if prefixed else []
        strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
        backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        backend.add_special_tokens([added_token(piece) for piece in self.special_spelling.values()])
        set_bos(backend, self.bos_id if self.add_bos else None)
        texts = [PROBE, PROBE[::-1], *names[: 1 << 10]]
        same = all(
            backend.encode(text, add_special_tokens=False).ids == self._encode(text, True)
            for text in texts
        )
        return backend if same else None
