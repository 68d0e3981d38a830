"""The engine: streaming, stop strings, batches, buckets of programs, limits."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from lsjax.config import ConfigError, LlamaConfig
from lsjax.data.tokenizer import TokenizerError
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.batching import ContinuousBatch
from lsjax.decoding.completion import Completion
from lsjax.decoding.conversation import Conversation
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.request import Request, encode_prompt
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.evaluation.comparison import identity_tail, last_logits
from lsjax.model.llama import Llama
from tests.marks import long
from tests.states import new_state
from tests.tunings import tune

PROMPTS = [[7], [1, 2, 3], list(range(40, 60)), [104, 105] * 8]
NEW = 24
STRATEGIES = [Autoregressive(), SelfSpeculative(1, 4)]
by_name = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)


@pytest.fixture(scope="module")
def engine_of(model, tokenizer):
    """One engine for each strategy and batch size."""
    return functools.cache(
        lambda strategy, batch_size=1: Engine(model, tokenizer, strategy, batch_size=batch_size)
    )


@pytest.fixture(scope="module")
def expected(engine_of):
    """What the model says, one prompt at a time."""
    return engine_of(Autoregressive()).generate(PROMPTS, max_new_tokens=NEW)


def results(completions):
    return [(c.text, c.token_ids, c.finish_reason) for c in completions]


def streamed(engine, prompt, **options) -> Completion:
    """The last item of a stream, whose pieces must make its text."""
    *pieces, completion = engine.stream(prompt, **options)
    assert all(isinstance(piece, str) and piece for piece in pieces)
    assert "".join(pieces) == completion.text
    return completion


@by_name
def test_stream_equals_generate(engine_of, expected, strategy):
    found = [streamed(engine_of(strategy), prompt, max_new_tokens=NEW) for prompt in PROMPTS]
    assert results(found) == results(expected)
    for prompt, completion in zip(PROMPTS, found, strict=True):
        assert completion.num_prompt_tokens == len(prompt)
        assert completion.prompt == ByteTokenizer().decode(prompt)


def test_a_stream_comes_in_pieces(engine_of):
    """Not all at the end: somebody waits for it."""
    assert sum(1 for _ in engine_of(Autoregressive()).stream(PROMPTS[2], max_new_tokens=NEW)) > 4


@pytest.fixture(scope="module")
def stops(expected):
    """Pairs of characters from all over the texts that the model writes."""
    return [c.text[at : at + 2] for c in expected[1:3] for at in range(0, len(c.text) - 1, 5)]


@pytest.mark.long
def test_stop_strings_do_not_depend_on_strategy_batch_or_streaming(engine_of, expected, stops):
    inside = 0
    for stop in stops:
        ways = []
        for strategy in STRATEGIES:
            alone = [
                streamed(engine_of(strategy), prompt, max_new_tokens=NEW, stop=[stop])
                for prompt in PROMPTS
            ]
            together = engine_of(strategy, 4).generate(PROMPTS, max_new_tokens=NEW, stop=[stop])
            ways += [alone, together]
            inside += sum(bool(c.finish_reason == "stop" and c.trace.accepted_n[-1]) for c in alone)
        for one, *others in zip(expected, *ways, strict=True):
            text, ids, reason = results(others[:1])[0]
            assert results(others) == [(text, ids, reason)] * 4
            assert text == one.text.partition(stop)[0]
            assert ids == one.token_ids[: len(ids)]
            assert reason == ("stop" if stop in one.text else one.finish_reason)
    assert inside, "no stop string ended inside accepted drafts"


def test_figures_of_a_stopped_text_count_what_is_kept(engine_of, stops):
    engine = engine_of(SelfSpeculative(1, 4), 4)
    for stop in stops:
        for c in engine.generate(PROMPTS, max_new_tokens=NEW, stop=[stop]):
            own = c.rounds - bool(c.trace.accepted_n[-1])  # the verification's own tokens
            assert len(c.token_ids) == c.num_new_tokens == 1 + c.accepted + own, stop


def test_the_time_behind_a_stop_string_is_not_the_text_s(engine_of, stops, monkeypatch):
    """Four rounds between two looks take four seconds here, so a text takes one for each round."""

    def run(self, function, *arguments):
        self._worked += 4.0
        return self._runtime.programs.get(function, *arguments)(*arguments)

    monkeypatch.setattr(ContinuousBatch, "_run", run)
    early = 0
    for stop in stops:
        found = engine_of(Autoregressive()).generate(PROMPTS, max_new_tokens=25, stop=[stop])
        for c in found:
            assert c.decode_seconds == pytest.approx(c.rounds)
            early += c.rounds % 4 > 0
    assert early, "every text ended at a look"


@pytest.mark.long
def test_a_stream_keeps_its_strategy(model, tokenizer):
    """What the engine is told to use meanwhile is for the next text. The text outgrows its cache
    afterwards, where the other strategy would have more room for drafts, or less."""
    tail, prompt, options = identity_tail(model, 1), [5, 6] * 150, dict(max_new_tokens=40)
    engine = Engine(tail, tokenizer, SelfSpeculative(1, 3), ignore_end=True)
    (expected,) = Engine(tail, tokenizer, ignore_end=True).generate([prompt], **options)
    for other in (SelfSpeculative(1, 12), Autoregressive()):
        engine.use(SelfSpeculative(1, 3))
        stream = engine.stream(prompt, **options)
        pieces = [next(stream)]
        engine.use(other)
        *rest, completion = stream
        assert completion.token_ids == expected.token_ids
        assert completion.num_draft_tokens == 3 and pieces and rest


def test_vocabularies_of_one_size_share_a_program_and_no_tokens(model, tokenizer):
    engine = Engine(model, tokenizer)
    for first in (0, 100):
        vocabulary = DraftVocabulary(np.arange(first, first + 100))
        engine.use(SelfSpeculative(1, 4, vocabulary))
        (completion,) = engine.generate([[5, 6]], max_new_tokens=NEW)
        drafts = completion.trace.replaced_n[completion.trace.replaced_n >= 0]
        assert len(drafts) and (first <= drafts).all() and (drafts < first + 100).all()
    assert len(engine.programs) == 2


def test_a_bucket_has_one_program(model, tokenizer):
    """Prompts of every length of a bucket share it; the next bucket adds a prefill only."""
    engine = Engine(model, tokenizer, SelfSpeculative(1, 4))
    assert len(engine.programs) == 0
    for length, programs in [(1, 2), (17, 2), (32, 2), (33, 3), (64, 3), (5, 3)]:
        for new in (1, 3):
            engine.generate([[65] * length], max_new_tokens=new)
            assert len(engine.programs) == programs, (length, new)
    spent = engine.programs.compile_seconds
    (completion,) = engine.generate([[65] * 20], max_new_tokens=2)
    assert completion.compile_seconds == 0 and engine.programs.compile_seconds == spent > 0


@by_name
@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_batches_of_any_number_of_prompts(engine_of, expected, strategy, count):
    """More prompts than rows, and rows without a prompt: each gives what it gives alone."""
    order = [index % len(PROMPTS) for index in range(count)]
    told = {}
    found = engine_of(strategy, 4).generate(
        [PROMPTS[index] for index in order],
        max_new_tokens=NEW,
        on_completion=lambda index, completion: told.update({index: completion}),
    )
    assert results(found) == results(expected[index] for index in order)
    assert [told[index] for index in range(count)] == found and len(told) == count


def test_no_prompts_no_completions(engine_of):
    assert engine_of(Autoregressive()).generate([]) == []


def test_text_prompts_are_encoded(engine_of):
    text, ids = engine_of(Autoregressive()).generate(["é!", "é!".encode()], max_new_tokens=2)
    assert text.token_ids == ids.token_ids and text.num_prompt_tokens == 3


@pytest.mark.parametrize(
    "prompt, new, length, words",
    [
        ("", 5, None, "the prompt is empty: it needs at least one token"),
        ([], 5, None, "the prompt is empty"),
        ([1], 0, None, "max_new_tokens 0 is below 1: use 1 or more"),
        ([1], -3, None, "max_new_tokens -3 is below 1"),
        ([5, 258], 5, None, r"token ids 5..258 .* vocabulary of 258: give ids in 0..257"),
        ([-1, 7], 5, None, r"token ids -1..7 .* vocabulary of 258"),
        (
            [1] * 2046,
            3,
            None,
            "a prompt of 2046 tokens and 3 new ones .* length of 2048: shorten the prompt, lower "
            "--max-new-tokens$",
        ),
        ([1] * 10, 7, 16, "10 tokens and 7 new ones .* length of 16: .* or raise --max-length$"),
    ],
)
def test_bad_prompts_are_refused(model, tokenizer, prompt, new, length, words):
    engine = Engine(model, tokenizer, max_length=length)
    asked = Request(prompt=prompt, max_new_tokens=new)
    for refuse in (
        lambda: encode_prompt(asked, tokenizer, model.config, length),
        lambda: engine.generate([[1], prompt], max_new_tokens=new),
        lambda: next(engine.stream(prompt, max_new_tokens=new)),
    ):
        with pytest.raises(ConfigError, match=words):
            refuse()
    assert len(engine.programs) == 0


@pytest.mark.parametrize("length", [2, 16, 512])
def test_max_length_is_reached(model, tokenizer, length):
    request = Request(prompt=[1] * (length - 1), max_new_tokens=1)
    assert encode_prompt(request, tokenizer, model.config, length) == request.prompt


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_length": 1}, r"max length 1 is out of range: use --max-length 2..2048"),
        ({"max_length": 2049}, r"max length 2049 is out of range: use --max-length 2..2048"),
        ({"batch_size": 0}, "batch size 0 is below 1: choose --batch-size 1 or more"),
    ],
)
def test_bad_settings_are_refused(model, tokenizer, options, words):
    with pytest.raises(ConfigError, match=words):
        Engine(model, tokenizer, **options)


def test_the_tokenizer_must_fit(tokenizer):
    smaller = nnx.eval_shape(lambda: Llama(LlamaConfig.tiny(vocab_size=190), rngs=nnx.Rngs(0)))
    with pytest.raises(TokenizerError, match="has 258 tokens, but the model's table has 190"):
        Engine(smaller, tokenizer)


def test_a_prompt_longer_than_the_largest_chunk(model, tokenizer):
    """Read in two goes, beside a short one: each new token is the plain forward's best."""
    prompts = [np.random.default_rng(0).integers(0, 256, length).tolist() for length in (700, 3)]
    engine = Engine(model, tokenizer, batch_size=2)
    for prompt, completion in zip(prompts, engine.generate(prompts, max_new_tokens=4), strict=True):
        for index, token in enumerate(completion.token_ids):
            so_far = prompt + completion.token_ids[:index]
            assert last_logits(model, so_far).argmax() == token, (len(prompt), index)


@pytest.mark.parametrize(
    "strategy, capacity",
    [
        (SelfSpeculative(1, 63), 512 + 64),  # a round writes as much as the slack
        *long(
            (Autoregressive(), 512 + 64),
            (EarlyExit(2), 512 + 64),
            (SelfSpeculative(1, 4), 512 + 64),
            (SelfSpeculative(1, 64), 512 + 128),
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_tokens_at_the_end_of_the_cache(model, tokenizer, strategy, capacity):
    """A row that ends in the last slot before the slack, where a round writes beyond its end."""
    prompt = np.random.default_rng(1).integers(0, 256, 500).tolist()
    engine = Engine(model, tokenizer, strategy)
    assert engine.runtime.capacity(512, strategy) == capacity >= 512 + strategy.slack
    (completion,) = engine.generate([prompt], max_new_tokens=12)
    assert completion.num_new_tokens == 12
    for index, token in enumerate(completion.token_ids):
        assert last_logits(model, prompt + completion.token_ids[:index]).argmax() == token, index


@pytest.mark.parametrize("strategy", [SelfSpeculative(1, 3), *long(EarlyExit(1))])
def test_weights_are_laid_out_once_as_the_programs_want_them(
    model, tokenizer, monkeypatch, strategy
):
    """On CPUs the compiler may choose layouts too; here it is let to, as on accelerators."""
    (expected,) = Engine(model, tokenizer, strategy).generate([[5, 6]], max_new_tokens=NEW)
    tune(monkeypatch, lays_out_weights=True)
    engine = Engine(model, tokenizer, strategy)
    (found,) = engine.generate([[5, 6]], max_new_tokens=NEW)
    assert found.token_ids == expected.token_ids
    layouts = [format_.layout for format_ in engine.programs._formats]
    assert [leaf.format.layout for leaf in jax.tree.leaves(engine.model)] == layouts
    engine.use_model(model)
    assert [leaf.format.layout for leaf in jax.tree.leaves(engine.model)] == layouts
    (again,) = engine.generate([[5, 6]], max_new_tokens=NEW)
    assert again.token_ids == expected.token_ids


@pytest.mark.long
@pytest.mark.parametrize("strategy", [SelfSpeculative(1, 3), Autoregressive()])
def test_reference_kernels_give_the_same_tokens(model, tokenizer, monkeypatch, strategy):
    """And choose no layouts, where the others do."""
    prompts = [[5, 6], [7] * 40]
    expected = Engine(model, tokenizer, strategy, batch_size=2).generate(prompts)
    tune(monkeypatch, lays_out_weights=True)
    engine = Engine(model, tokenizer, strategy, batch_size=2, kernels="reference")
    found = engine.generate(prompts)
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    for one, other in zip(jax.tree.leaves(engine.model), jax.tree.leaves(model), strict=True):
        assert one is other


def test_a_model_that_others_go_on_with_is_not_copied(model, tokenizer, monkeypatch):
    """Such as that of a training run, which samples now and then."""
    tune(monkeypatch, lays_out_weights=True)
    engine = Engine(model, tokenizer, lay_out=False)
    engine.generate([[5, 6]], max_new_tokens=2)
    for one, other in zip(jax.tree.leaves(engine.model), jax.tree.leaves(model), strict=True):
        assert one is other


def test_a_row_ends_after_its_new_tokens(config):
    requests = [
        Request(prompt=[1, 2, 3], max_new_tokens=9),
        Request(prompt=[4] * 8, max_new_tokens=7),
    ]
    options = dict(capacity=9, num_layers=2, dtype=np.float32)
    assert new_state(config, requests, **options).end_B.tolist() == [12, 15]


@pytest.mark.parametrize("length", [256, 257, 300, 319, 320])
def test_prompts_about_as_long_as_the_first_cache(model, tokenizer, length):
    """A chunk is never longer than the cache."""
    prompt = np.random.default_rng(2).integers(0, 256, length).tolist()
    (completion,) = Engine(model, tokenizer, max_length=400).generate([prompt], max_new_tokens=2)
    assert last_logits(model, prompt).argmax() == completion.token_ids[0]


def test_a_short_text_after_a_long_one_has_a_small_cache(model, tokenizer):
    engine, kept = Engine(model, tokenizer), Conversation()
    for prompt, capacity in (([1] * 400, 576), ([2, 3], 320), ([2, 3, 4], 320)):
        list(engine.stream(prompt, conversation=kept, max_new_tokens=2))
        assert kept._capacity == capacity
