"""lm-evaluation-harness over an engine, on local tasks and without a network."""

import json
import math
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"  # read on import
pytest.importorskip("lm_eval")

import datasets
from lm_eval.api.instance import Instance

from lsjax.config import ConfigError
from lsjax.data.chat import ChatTemplateError
from lsjax.data.tokenizer_backends import ByteTokenizer
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.strategy import Autoregressive, EarlyExit
from lsjax.evaluation import lm_eval
from lsjax.evaluation.exits import score_texts
from lsjax.evaluation.lm_eval import EngineLM, evaluate, find_tasks

TASKS = Path(__file__).parent / "tasks"
NAMES = ["tiny_choice", "tiny_generation", "tiny_rolling"]
SPECULATIVE = SelfSpeculative(3, 4)


@pytest.fixture(scope="module")
def engine(model):
    """With a tokenizer that begins every text with <s>, and two rows."""
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    tokenizer = ByteTokenizer(add_bos=True, chat_template=template)
    return Engine(model, tokenizer, batch_size=2)


@pytest.fixture
def lm(engine):
    engine.use(Autoregressive())
    return EngineLM(engine, name="tiny")


@pytest.fixture(scope="module")
def run(engine, tmp_path_factory):
    """Runs all tasks with a strategy, on one EngineLM."""
    shared = EngineLM(engine, name="tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(TASKS)  # where their data is
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        found = find_tasks(["tiny_*"], TASKS)
        assert sorted(found["tasks"]) == NAMES

        def run(strategy, output=None, **options):
            engine.use(strategy)
            return evaluate(shared, output, **found, **options)

        yield run


@pytest.fixture(scope="module")
def results(run):
    """By strategy."""
    return {one.name: run(one) for one in (SPECULATIVE, EarlyExit(2), Autoregressive())}


def ask(kind, *arguments) -> list[Instance]:
    return [
        Instance(kind, {}, given, 0, metadata=("task", number, 1))
        for number, given in enumerate(arguments)
    ]


def texts_of(results) -> list[str]:
    return [sample["resps"][0][0] for sample in results["samples"]["tiny_generation"]]


@pytest.mark.parametrize("name, exit_layer", [("self_speculative", 4), ("early_exit", 2)])
def test_figures_are_those_of_the_scores(results, model, name, exit_layer):
    """The whole model scores under self-speculation, the exit under early exit."""

    def log_prob(context: str, text: str) -> float:
        tokens = [256, *context.encode(), *text.encode()]
        text = (tokens, len(text))
        ((found, _),) = score_texts(model, [text], exit_layer=exit_layer, batch_size=2)
        return found

    samples, figures = results[name]["samples"], results[name]["results"]
    right, total, letters = 0, 0.0, 0
    for sample in samples["tiny_choice"]:
        text, choices = sample["doc"]["text"], sample["doc"]["choices"]
        log_probs = [log_prob(text, choice) for choice in choices]
        assert [one[0][0] for one in sample["resps"]] == pytest.approx(log_probs, rel=1e-5)
        right += log_probs.index(max(log_probs)) == sample["doc"]["label"]
        total += log_prob("", text)
        letters += len(text)
    assert figures["tiny_choice"]["acc,none"] == pytest.approx(right / 5)
    assert figures["tiny_rolling"]["bits_per_byte,none"] == pytest.approx(
        -total / letters / math.log(2), rel=1e-5
    )


def test_the_results_say_who_answered(results):
    speculative, early = results["self_speculative"], results["early_exit"]
    assert speculative["config"]["model"] == "tiny, self speculative, exit 3, 4 drafts"
    assert speculative["config"]["num_draft_tokens"] == 4
    assert speculative["config"]["loglikelihood_layers"] == 4
    assert early["config"]["strategy"] == "early_exit" and early["config"]["exit_layer"] == 2
    assert early["config"]["loglikelihood_layers"] == 2


def test_self_speculation_scores_what_autoregressive_decoding_does(results):
    found = results["autoregressive"]
    assert texts_of(found) == texts_of(results["self_speculative"])
    assert texts_of(found) != texts_of(results["early_exit"])
    same = ["tiny_choice", "tiny_rolling"]
    assert [found["results"][n] for n in same] == [
        results["self_speculative"]["results"][n] for n in same
    ]
    assert found["config"]["model"] == "tiny, autoregressive"


def test_generation_settings_can_be_changed_and_documents_limited(run, engine, tmp_path):
    """lm_eval saves its results in a folder of the strategy."""
    found = run(Autoregressive(), tmp_path, limit=2, gen_kwargs="max_gen_toks=3,until=zzz")
    assert [len(engine.tokenizer.encode(text, add_bos=False)) <= 3 for text in texts_of(found)]
    assert found["n-samples"]["tiny_choice"]["effective"] == 2
    (folder,) = tmp_path.iterdir()
    assert folder.name == "tiny_autoregressive"
    (file,) = folder.glob("results_*.json")
    saved = json.loads(file.read_text())
    assert saved["config"]["strategy"] == "autoregressive"
    assert saved["results"].keys() == {*NAMES}
    assert len(list(folder.glob("samples_*.jsonl"))) == 3


def test_sampling_without_a_temperature_draws(lm):
    """At 1, as transformers does; greedy texts would all be the same."""
    sampled = lm._request("a", {"until": [], "do_sample": True}, seed=3).sampling
    assert (sampled.temperature, sampled.seed) == (1.0, 3)
    assert lm._request("a", {"until": []}, seed=3).sampling.temperature == 0


@pytest.mark.parametrize(
    "settings", [{"temperature": "abc"}, {"max_gen_toks": "abc"}, {"top_p": "high"}, {"top_k": 2.5}]
)
def test_settings_that_are_no_numbers(lm, settings):
    with pytest.raises(ConfigError):
        lm._request("a", {"until": [], "do_sample": True, **settings}, seed=0)


def test_greedy_flags(lm, engine):
    """A continuation that the model would say itself, and one that it would not."""
    for letter in "abcdefghijklmnopqrstuvwxyz":
        (completion,) = engine.generate([f"say {letter}"], max_new_tokens=12)
        if completion.token_ids[0] < 128:
            break
    said = chr(completion.token_ids[0])
    other = "x" if said != "x" else "y"
    pairs = [(f"say {letter}", said), (f"say {letter}", other), ("say", f" {letter}{said}")]
    found = lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in found] == [True, False, False]
    assert found[0][0] > found[1][0]


def test_trailing_spaces_go_with_the_continuation_and_empty_contexts_begin_with_bos(lm, model):
    pairs = [("a ", "b"), ("", "ab"), (" ", "b"), ("a", "")]
    found = lm.loglikelihood(ask("loglikelihood", *pairs), disable_tqdm=True)
    texts = [([97, 32, 98], 2), ([97, 98], 2), ([32, 98], 2), ([97], 0)]
    texts = [([256, *tokens], n) for tokens, n in texts]
    wanted = score_texts(model, texts, exit_layer=4, batch_size=2)
    assert [log_prob for log_prob, _ in found] == pytest.approx(
        [log_prob for log_prob, _ in wanted]
    )


def test_until_strings_cut_the_text(lm, engine):
    """The same place in every strategy, whatever their order."""
    (whole,) = engine.generate(["say x"], max_new_tokens=12)
    late, early = whole.text[6:8], whole.text[3:5]
    assert late and early
    settings = {"until": [late, early, ""], "max_gen_toks": 12}
    for strategy in (Autoregressive(), SPECULATIVE):
        engine.use(strategy)
        (text,) = lm.generate_until(ask("generate_until", ("say x", settings)), disable_tqdm=True)
        assert text == whole.text[: min(whole.text.find(late), whole.text.find(early))]


@pytest.fixture
def requests_of(lm, monkeypatch):
    """The engine's requests that settings turn into; nothing is decoded."""
    asked = []

    def generate(requests, on_completion):
        asked.extend(requests)
        raise InterruptedError

    monkeypatch.setattr(lm.engine, "generate", generate)

    def of(*arguments):
        with pytest.raises(InterruptedError):
            lm.generate_until(ask("generate_until", *arguments), disable_tqdm=True)
        return asked

    return of


def test_settings_become_requests(requests_of, lm):
    sampled = {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    penalties = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "num_beams": 1}
    lm.seed = 5
    greedy, drawn, also = requests_of(
        ("hi", {"until": "\n", "do_sample": False, "temperature": 0.7}),
        ("", {"until": ["</s>", "Q:", "<s>"], "max_gen_toks": 7, **sampled, **penalties}),
        ("hi" * 400, {"temperature": 0.5, "max_new_tokens": 500}),
    )
    assert list(greedy.prompt) == [256, *b"hi"] and greedy.stop == ("\n",)
    assert greedy.max_new_tokens == 256 and greedy.sampling.temperature == 0
    # A special token is no text: it ends a text as a token.
    assert drawn.stop == ("Q:",) and drawn.stop_ids == (257, 256)
    assert list(drawn.prompt) == [256] and drawn.max_new_tokens == 7
    s = drawn.sampling
    assert (s.temperature, s.top_k, s.top_p, s.min_p, s.seed) == (0.7, 5, 0.9, 0.1, 6)
    assert (s.repetition_penalty, s.no_repeat_ngram) == (1.5, 3)
    # The end of a context that is too long, and a seed of its own for each text.
    assert list(also.prompt) == [*b"hi"] * 6 and also.stop == ()
    assert (also.sampling.temperature, also.sampling.seed) == (0.5, 7)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_beams": 4}, "the task requests 4 beams"),
        ({"typical_p": 0.5, "best_of": 2}, "the task sets best_of, typical_p, which the engine"),
        ({"max_gen_toks": 512}, "the task requests 512 new tokens, .* max_gen_toks in 1..511"),
        ({"max_gen_toks": 0}, "the task requests 0 new tokens"),
    ],
)
def test_settings_that_the_engine_does_not_know(lm, settings, words):
    with pytest.raises(ConfigError, match=words):
        lm.generate_until(ask("generate_until", ("hi", settings)), disable_tqdm=True)


def test_chats_begin_once(lm, model, tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    text = lm.apply_chat_template(messages)
    assert text == "<s>user: hi\n" and lm.tok_encode(text) == [256, *b"user: hi\n"]
    assert lm.tok_encode("user") == [256, *b"user"]
    assert lm.tok_encode("user", add_special_tokens=False) == [*b"user"]
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert lm.tokenizer_name == lm.tokenizer.fingerprint
    with pytest.raises(ChatTemplateError, match="no chat template"):
        EngineLM(Engine(model, tokenizer)).apply_chat_template(messages)


def test_unknown_tasks(monkeypatch):
    """A directory's tasks are looked through, or lm_eval's own: not here, which takes seconds."""
    managers = []
    real = lm_eval.TaskManager

    def manager(include_path, include_defaults):
        managers.append((include_path, include_defaults))
        return real(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(lm_eval, "TaskManager", manager)
    with pytest.raises(ConfigError, match="no task is called nothing"):
        find_tasks(["tiny_choice", "nothing"], TASKS)
    with pytest.raises(ConfigError, match="no task is called tiny_choice"):
        find_tasks(["tiny_choice"])
    assert managers == [(str(TASKS), False), (None, True)]
