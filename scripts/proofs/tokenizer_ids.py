"""Compares token ids and chat prompts with those of transformers (needs `make peers`).

    python -m scripts.proofs.tokenizer_ids DIRECTORY [PRE]

DIRECTORY holds the files of a published tokenizer. With PRE, such as qwen2 or dbrx, a GGUF file of
the same tokenizer is compared too; PRE is its `tokenizer.ggml.pre`, or `llama` for SentencePiece.
Prints a line for each check; exits with 1 if one fails.
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer

from lsjax.data.chat import ChatTemplateError, render_chat
from lsjax.data.tokenizer import Tokenizer
from lsjax.data.tokenizer_files import CONTROL, NORMAL, USER_DEFINED, load_tokenizer
from tests.data.test_tokenizer_gguf import write_gguf, write_sentencepiece_gguf

UNUSED = 5
TEXTS = 1000
PARTS = [
    "it's WE'LL they'Ve don’t", "HTTPServer camelCase éÉcole ǅungla", "3.14 1234567 ١٢٣ 五 ½²",
    "def f(x):\n    return {k: v for k in x}  # TODO\n", "if (a<=b) { c->d[0] += 1; }\r\n",
    "https://example.org/a//b?c=d&e=%20", "مرحبا بالعالم، كيف حالك؟", "ภาษาไทยไม่มีช่องว่าง",
    "नमस्ते दुनिया", "你好，世界。", "こんにちは", "한국어 각", "việc nhiều điều", "Привет, мир!",
    "🙂👍🏽👨‍👩‍👧‍👦🏳️‍🌈", "cafe\u0301 e\u0323\u0302 A\u030a \u0041\u0300\u0316", "ﬁ Å ﷺ ｆｕｌｌ",
    "\x00\x01\x07\x1b[0m\x7f", "\u200b\u200d\ufeff\u00a0\u2028\u3000", "\ufffd\U0010ffff\ue000",
    "a" * 300, "Donaudampfschifffahrtsgesellschaft" * 8, "=" * 90, "\n\n\n\t\t \n", " ", "  ",
    " " * 37, "\r\n\r\n", "\t", "<s>", "</s>", "<unk>", "[INST]", "<|im_start|>", "<think>",
    "▁a ▁▁",
]  # fmt: skip
CHATS = [
    [("user", "Hi")],
    [("system", "Be brief.\n"), ("user", " What is 2+2? ")],
    [("user", "<b>é</b>"), ("assistant", "<think>\nhm\n</think>\n\n4"), ("user", "Sure?\n")],
]


def texts(spellings: list[str]) -> list[str]:
    """Random texts of all kinds of parts, with the spellings of special tokens."""
    chance = random.Random(0)
    parts = PARTS + chance.sample(spellings, min(len(spellings), 20))
    made = [*parts, ""]
    while len(made) < TEXTS:
        some = chance.choices(parts, k=chance.randint(1, 8))
        some.append("".join(chr(chance.randint(1, 0xD7FF)) for _ in range(chance.randint(0, 6))))
        made.append(chance.choice(["", " "]).join(some))
    return made[:TEXTS]


def write_byte_level_gguf(file: Path, theirs, pre: str) -> Path:
    """A GGUF with the types of tokens that llama.cpp's conversion gives."""
    backend = json.loads(theirs.backend_tokenizer.to_str())
    names = {i: token for token, i in backend["model"]["vocab"].items()}
    types = dict.fromkeys(names, NORMAL)
    for added in backend["added_tokens"]:
        spelled, i = added["content"], added["id"]
        control = added["special"] or (spelled.startswith("<|") and spelled.endswith("|>"))
        names[i], types[i] = spelled, CONTROL if control else USER_DEFINED
    ids = range(max(names) + 1)
    return write_gguf(
        file,
        model="gpt2",
        tokens=[names.get(i, f"[PAD{i}]") for i in ids],
        types=[types.get(i, UNUSED) for i in ids],
        token_merges=[" ".join(pair) for pair in backend["model"]["merges"]],
        tokenizer_pre=pre,
        bos_token_id=theirs.bos_token_id,
        eos_token_id=theirs.eos_token_id,
        add_bos_token=theirs.encode("")[:1] == [theirs.bos_token_id],
        chat_template=theirs.chat_template,
    )


def or_refused(render: Callable[..., str], *args, **options) -> str:
    """The chat, or "refused" if the template raises an exception of its own."""
    try:
        return render(*args, **options)
    except (ChatTemplateError, TemplateError):
        return "refused"


def main(directory: Path, pre: str | None) -> int:
    """Runs all checks."""
    theirs = AutoTokenizer.from_pretrained(directory)
    made = texts([token.content for token in theirs.added_tokens_decoder.values()])
    plain = [theirs.encode(text, add_special_tokens=False) for text in made]
    whole = [theirs.encode(text) for text in made]
    failures = 0

    def report(name: str, ours: Tokenizer) -> None:
        nonlocal failures
        for what, wanted, options in (("", plain, {"add_bos": False}), (", default", whole, {})):
            found = [ours.encode(text, **options) for text in made]
            wrong = [i for i in range(TEXTS) if found[i] != wanted[i]]
            failures += bool(wrong)
            print(f"{name}{what}: ids of {TEXTS - len(wrong)} of {TEXTS} texts are equal")
            for i in wrong[:3]:
                print(f"  {made[i]!r:.200}\n    {found[i][:20]}\n    {wanted[i][:20]}")
        for chat in CHATS if theirs.chat_template else ():
            messages = [{"role": role, "content": content} for role, content in chat]
            wanted = or_refused(
                theirs.apply_chat_template, messages, tokenize=False, add_generation_prompt=True
            )
            text = or_refused(render_chat, ours, messages)
            ids = theirs.encode(wanted, add_special_tokens=False)
            good = text == wanted and ours.encode(text, add_bos=False) == ids
            failures += not good
            print(f"{name}: chat of {len(chat)} messages {'is equal' if good else 'DIFFERS'}")
            if not good:
                print(f"  {text!r}\n  {wanted!r}")

    report("files", load_tokenizer(directory))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.gguf"
        if pre == "llama":
            model = directory / "tokenizer.model"
            write_sentencepiece_gguf(file, model, chat_template=theirs.chat_template)
        elif pre is not None:
            write_byte_level_gguf(file, theirs, pre)
        if pre is not None:
            report("GGUF", load_tokenizer(file))
    return int(failures > 0)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) == 3 else None))
