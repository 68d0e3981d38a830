"""A chat's token ids grow at the end, and stand for what the template says."""

import pytest

from lsjax.data.chat import ChatTemplateError, Dialogue
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.data.tokenizer_files import load_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TRIMS = TEMPLATE.replace("m.content", "m.content | trim")


@pytest.fixture(params=["bytes", "bpe_directory", "llama3_directory"])
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer(chat_template=TEMPLATE)
    tokenizer = load_tokenizer(request.getfixturevalue(request.param))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_a_first_turn(tokenizer):
    text, ids = Dialogue(tokenizer).prompt("hi")
    assert text == "[user] hi</s>[assistant] "
    assert ids == tokenizer.encode(text, add_bos=False)
    text, _ = Dialogue(tokenizer, "be brief").prompt("hi")
    assert text == "[system] be brief</s>[user] hi</s>[assistant] "


def test_a_prompt_changes_nothing(tokenizer):
    """What is not answered is not said."""
    dialogue = Dialogue(tokenizer)
    dialogue.prompt("lost")
    assert dialogue.prompt("hi") == Dialogue(tokenizer).prompt("hi") and dialogue.messages == []


def test_each_prompt_begins_with_all_that_was_read_and_said(tokenizer):
    """Replies in tokens of one byte each, which their text encoded again would not be."""
    byte_ids = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    dialogue, before, spoken = Dialogue(tokenizer, "s"), [], "[system] s</s>"
    for user in ("What is 7 + 5?", "  ", "é🙂", "bye"):
        prompt = text, ids = dialogue.prompt(user)
        assert ids[: len(before)] == before
        spoken += f"[user] {user}</s>[assistant] "
        assert text == spoken == tokenizer.decode(ids, skip_special=False)
        reply = "the world in the"
        reply_ids = [byte_ids[bytes([byte])] for byte in reply.encode()]
        again = tokenizer.encode(reply, add_bos=False)
        assert (again == reply_ids) == isinstance(tokenizer, ByteTokenizer)
        dialogue.add(user, prompt, reply, reply_ids)
        before, spoken = ids + reply_ids, f"{spoken}{reply}</s>"
    assert [m["role"] for m in dialogue.messages] == ["system", *["user", "assistant"] * 4]


def test_a_reply_without_ids_is_encoded(tokenizer):
    """One that was cut inside a token: the whole chat is, and from the next reply on it grows."""
    dialogue = Dialogue(tokenizer)
    dialogue.add("hi", dialogue.prompt("hi"), "ho", None)
    prompt = text, ids = dialogue.prompt("more")
    assert text == "[user] hi</s>[assistant] ho</s>[user] more</s>[assistant] "
    assert ids == tokenizer.encode(text, add_bos=False)
    reply_ids = [*tokenizer.encode("y", add_bos=False)] * 2
    dialogue.add("more", prompt, "yy", reply_ids)
    assert dialogue.prompt("end")[1][: len(ids) + 2] == ids + reply_ids


def test_a_template_that_changes_what_was_said():
    """The prompt is what the template says, encoded as a whole."""
    tokenizer = ByteTokenizer(chat_template=TRIMS)
    dialogue = Dialogue(tokenizer)
    dialogue.add("hi", dialogue.prompt("hi"), " ho ", tokenizer.encode(" ho ", add_bos=False))
    text, ids = dialogue.prompt("more")
    assert text == "[user] hi</s>[assistant] ho</s>[user] more</s>[assistant] "
    assert ids == tokenizer.encode(text, add_bos=False)


def test_an_empty_reply(tokenizer):
    dialogue = Dialogue(tokenizer)
    prompt = dialogue.prompt("hi")
    dialogue.add("hi", prompt, "", [])
    text, ids = dialogue.prompt("more")
    assert text == "[user] hi</s>[assistant] </s>[user] more</s>[assistant] "
    assert ids[: len(prompt[1])] == prompt[1]


def test_half_a_character_at_the_end(tokenizer):
    """A reply that was interrupted there shows as U+FFFD; its ids stay."""
    dialogue = Dialogue(ByteTokenizer(chat_template=TEMPLATE))
    prompt = dialogue.prompt("hi")
    dialogue.add("hi", prompt, "a�", [97, 0xC3])
    text, ids = dialogue.prompt("more")
    assert "[assistant] a�</s>[user] more" in text
    assert ids[: len(prompt[1]) + 3] == [*prompt[1], 97, 0xC3, 257]


def test_tokens_that_depend_on_where_a_text_begins(sentencepiece_model):
    """SentencePiece: always encoded as a whole."""
    tokenizer = load_tokenizer(sentencepiece_model)
    tokenizer.chat_template = TEMPLATE
    dialogue = Dialogue(tokenizer)
    reply = "once upon a time"
    dialogue.add("hi", dialogue.prompt("hi"), reply, tokenizer.encode(reply, add_bos=False))
    text, ids = dialogue.prompt("the café")
    assert ids == tokenizer.encode(text, add_bos=False)


def test_no_template():
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Dialogue(ByteTokenizer()).prompt("hi")
