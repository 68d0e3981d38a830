"""Would `auto` choose well? Its choices on texts that a model wrote, at given costs of rounds.

    python scripts/simulate_auto.py --model smollm2 --spec-bench question.jsonl \\
        --blocks build/evidence/exit_blocks/run-7000 \\
        --topv2 topv2/test.tsv --output build/simulated \\
        --code build/evidence/quickstart/runs/layerskip-0/prompts.jsonl

A pass over each text gives the exit's drafts and their probabilities. The rounds are then played
with `choose`, `look_up` and `Learned`, as the compiled loop has them. So the result depends on no
clock: it is the same on a busy machine. After a wrong draft, the exit is taken to be as sure as on
the text itself. Prints the tokens in the time of an autoregressive one, without the exit and with.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jaxtyping import Array, Float
from proofs.mixed_prompts import Arguments as Prompts, kinds_of_prompts

import lsjax
from lsjax.cli.setup import keep_compiled_programs
from lsjax.data.chat import Dialogue
from lsjax.data.token_counts import read_counts
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.decoding.auto.choose import choose
from lsjax.decoding.auto.learned import (
    MOST_IDLE_TOKENS,
    Counts,
    Learned,
    by_level,
    idle_tokens,
)
from lsjax.decoding.auto.lookup import look_up
from lsjax.decoding.confidence import confidence_level
from lsjax.decoding.draft import top_probability
from lsjax.model.protocol import draft_state, run_layers
from lsjax.reporting.markdown import table

KINDS = ("questions", "requests", "code")
LENGTHS = lsjax.Adaptive().lengths
LONGEST = LENGTHS[-1]
# Seconds of rounds with 0, 2, 6 and 15 drafts, without an exit. 1: an autoregressive token.
VERIFIED = {
    "a CPU with AMX": (1.0, 1.9, 2.2, 2.5),
    "in between": (1.0, 1.4, 1.7, 2.2),
    "an accelerator": (1.0, 1.1, 1.2, 1.4),
}
DRAFT, WRITES = 0.08, 0.006  # of a draft, and of the block's keys and values
HEAD = 0.05  # of the block and the head alone


@dataclass(frozen=True)
class Arguments(Prompts):
    """What to simulate."""

    model: str = "smollm2"
    """The model."""
    blocks: Path = Path("build/evidence/exit_blocks/run-7000")
    """Run of its exit blocks."""
    exit_layer: int = 2
    """Exit that drafts."""
    draft_vocab: int = 4_096
    """Tokens that it drafts: the most frequent ones in the run's data."""
    prompts: int = 12
    """Prompts of each kind."""
    new_tokens: int = 96
    """New tokens of each."""
    right: float = 0.0
    """Least share of right drafts. Wrong ones become right at random, as sure as right ones are."""


class Text(NamedTuple):
    """A text, and what the exit drafts for each of its tokens. S: tokens of the longest text, and
    room for a draft."""

    tokens_S: np.ndarray
    begin: np.ndarray  # of the new tokens
    end: np.ndarray
    top_S: np.ndarray  # the draft's probability
    right_S: np.ndarray  # whether the draft is the token


def main(arguments: Arguments) -> None:
    """Prints a table."""
    keep_compiled_programs()
    model, vocabulary = opened(arguments)
    texts, kinds = recorded(arguments, model, vocabulary)
    texts = improved(texts, arguments.right)
    new_n = texts.end - texts.begin - 1  # the first one is of no round
    ends = zip(texts.begin, texts.end, strict=True)
    right_n = np.array(
        [right_S[slice(*at)].mean() for right_S, at in zip(texts.right_S, ends, strict=True)]
    )
    rows = [("costs", "kind", "right drafts", "without the exit", "with it", "with over without")]
    for name, verified in VERIFIED.items():
        without_n, with_n = (
            simulated(texts, costs(verified, strategy.exits), strategy, model)
            for strategy in (
                lsjax.Adaptive(()),
                lsjax.Adaptive((arguments.exit_layer,), vocabulary),
            )
        )
        for kind in (*KINDS, "all"):
            own = np.array([kind in (one, "all") for one in kinds])
            tokens, without, with_ = (n[own].sum() for n in (new_n, without_n, with_n))
            right = np.average(right_n[own], weights=new_n[own] + 1)
            speeds = tokens / without, tokens / with_, without / with_
            rows.append((name, kind, f"{right:.2f}", *(f"{speed:.3f}" for speed in speeds)))
    print("\n".join(table(rows)))


def opened(arguments: Arguments) -> tuple[lsjax.Llama, lsjax.DraftVocabulary]:
    """The model with its blocks, and their draft vocabulary."""
    model = lsjax.load(arguments.model, exit_blocks=arguments.blocks)
    tokenizer = load_tokenizer(arguments.model)
    counts = read_counts(arguments.blocks / "token_counts.json", tokenizer)
    given = counts, arguments.draft_vocab, model.vocab_size
    return model, lsjax.DraftVocabulary.most_frequent(*given)


def recorded(
    arguments: Arguments, model: lsjax.Llama, vocabulary: lsjax.DraftVocabulary
) -> tuple[Text, list[str]]:
    """The model's own texts, stacked, and the kind of each."""
    tokenizer = load_tokenizer(arguments.model)
    ids_W = np.asarray(vocabulary.ids_W)
    asked, dialogue = kinds_of_prompts(arguments), Dialogue(tokenizer)
    prompts = [(kind, dialogue.prompt(text.strip())[1]) for kind in KINDS for text in asked[kind]]
    ids = [ids for _, ids in prompts]
    engine = lsjax.Engine(model, tokenizer, batch_size=len(ids))
    answers = engine.generate(ids, max_new_tokens=arguments.new_tokens)
    whole = [[*a, *b.token_ids] for a, b in zip(ids, answers, strict=True)]
    room, exit_layer = max(map(len, whole)) + LONGEST + 1, arguments.exit_layer

    @jax.jit
    def drafts(model, tokens_1S):
        positions_1S = jnp.arange(room)[None]
        cache = model.new_cache(1, room, model.num_layers)
        x_1SD = model.embed(tokens_1S, positions_1S)
        x_1SD, cache = run_layers(model, x_1SD, 0, exit_layer, positions_1S, cache)
        x_1SD, _ = draft_state(model, exit_layer, x_1SD, positions_1S, cache)
        logits_1SW = model.unembed(x_1SD, model.head_rows(ids_W))
        return jnp.asarray(ids_W)[logits_1SW.argmax(-1)[0]], top_probability(logits_1SW)[0]

    texts = []
    for prompt, text in zip(ids, whole, strict=True):
        tokens_S = np.pad(np.array(text, np.int32), (0, room - len(text)))
        # The draft after token t is for token t + 1.
        draft_S, top_S = (np.roll(array, 1) for array in drafts(engine.model, tokens_S[None]))
        ends = np.int32(len(prompt)), np.int32(len(text))
        texts.append(Text(tokens_S, *ends, top_S, draft_S == tokens_S))
    return Text(*map(np.stack, zip(*texts, strict=True))), [kind for kind, _ in prompts]


def improved(texts: Text, right: float) -> Text:
    """Texts with at least that share of right drafts."""
    random, shape = np.random.default_rng(0), texts.right_S.shape
    slots = np.arange(shape[1])
    is_new_S = (slots >= texts.begin[:, None]) & (slots < texts.end[:, None])
    own = texts.right_S[is_new_S].mean()
    chosen_S = ~texts.right_S & (random.random(shape) < (right - own) / (1 - own))
    sure_S = random.choice(texts.top_S[texts.right_S & is_new_S], shape)
    return texts._replace(
        right_S=texts.right_S | chosen_S, top_S=np.where(chosen_S, sure_S, texts.top_S)
    )


def costs(verified: tuple[float, ...], exits: tuple[int, ...]) -> np.ndarray:
    """Seconds [Q, J] of rounds: without the exit, and with it."""
    own = [round_ + HEAD + DRAFT * number for round_, number in zip(verified, LENGTHS, strict=True)]
    return np.array([verified, own][: 1 + len(exits)], np.float32)


def simulated(
    texts: Text, seconds_QJ: np.ndarray, strategy: lsjax.Adaptive, model: lsjax.Llama
) -> np.ndarray:
    """Time of each text. A text begins with the lesson of the last one."""
    exits, every = strategy.exits, strategy.scored_every(model)
    play = jax.jit(partial(played, jnp.asarray(seconds_QJ), exits, model.num_layers, every))
    start, found = strategy.first_guess(1), []
    for number in range(len(texts.end)):
        learned, time = play(Text(*(array[number] for array in texts)), start)
        start = strategy.first_guess(1, learned.lesson(0)) if exits else start
        found.append(float(time))
    return np.array(found)


def played(
    seconds_QJ: Float[Array, "Q J"],
    exits: tuple[int, ...],
    num_layers: int,
    every: int,
    text: Text,
    start: Learned,
) -> tuple[Learned, Float[Array, ""]]:
    """What was learned in the rounds of one text, and their time. every: rounds between scores."""
    columns = jnp.arange(LONGEST + 1)

    def of_exit(choice, limit, top_T, right_T):
        """Drafts that count, those that are right, and the top probabilities that were computed."""
        least_T = choice.confidence.least_T[:LONGEST]
        levels_T, chances_ZT = confidence_level(top_T[:LONGEST]), choice.confidence.chances_ZT
        sure_T = jnp.cumprod(chances_ZT[levels_T, columns[:LONGEST]])
        before_T = jnp.pad(sure_T, (1, 0), constant_values=1)[:LONGEST]
        stands_T = (sure_T >= least_T) & (columns[:LONGEST] < limit)
        counted_T = jnp.cumprod(stands_T)
        tried_T = jnp.pad(counted_T, (1, 0), constant_values=1)[:LONGEST] * (before_T >= least_T)
        right = jnp.cumprod(counted_T * right_T[:LONGEST]).sum()
        computed_T = jnp.pad(tried_T * (columns[:LONGEST] < limit), (0, 1))
        return counted_T.sum(), right, computed_T > 0

    def round_(carry):
        length, learned, time = carry
        matched_B, proposal_BT = look_up(text.tokens_S[None], length[None], LONGEST)
        state = SimpleNamespace(
            learned=learned,
            sampling=None,
            running_B=jnp.array([True]),
            end_B=text.end[None],
            length_B=length[None],
        )
        choice = choose(exits, LENGTHS, num_layers, state, matched_B, seconds_QJ)
        ahead_T, top_T, right_T = (
            lax.dynamic_slice(array_S, (length,), (LONGEST + 1,))
            for array_S in (text.tokens_S, text.top_S, text.right_S)
        )
        limit = jnp.minimum(text.end - length - 1, choice.num_draft_tokens)
        looked_T = (proposal_BT[0] == ahead_T[:LONGEST]) & (columns[:LONGEST] < limit)
        drafted, accepted, is_exit = limit, jnp.cumprod(looked_T).sum(), choice.exit_layer > 0
        seen = Counts(learned.passed_BEZ, learned.tried_BEZ)
        far_apart = idle_tokens(learned.idle_B[0]) == MOST_IDLE_TOKENS
        due = far_apart | (learned.rounds_B[0] % every == every - 1)
        if exits:
            own, right, computed_T = of_exit(choice, limit, top_T, right_T)
            drafted = jnp.where(is_exit, own, drafted)
            accepted = jnp.where(is_exit, right, accepted)
            new_T = columns <= accepted
            counted_T = jnp.where(is_exit, computed_T & new_T, new_T & due)
            levels = by_level(top_T[None], counted_T[None], right_T[None].astype(jnp.float32))
            seen = Counts(*(n_BZ[:, None] for n_BZ in levels))
            unused = jnp.where(is_exit, jnp.maximum(computed_T.sum() - drafted, 0), 0)
            time += WRITES + HEAD * due + jnp.where(drafted > 0, DRAFT * unused, 0)
        index = jnp.argmax(jnp.array(LENGTHS) >= drafted)
        time += seconds_QJ[is_exit.astype(int), index]
        shorter = jnp.array(LENGTHS)[index] - drafted
        time -= jnp.where(is_exit, DRAFT * shorter, 0)
        verified = SimpleNamespace(tokens_BT=ahead_T[None], accepted_B=accepted[None], seen=seen)
        learned = learned.after(verified, matched_B, proposal_BT, choice.is_idle)
        # Tokens without a choice.
        length, wait = length + accepted + 1, learned.wait_B[0]
        time += jnp.clip(text.end - length, 0, wait) * seconds_QJ[0, 0]
        return length + wait, learned, time

    first = text.begin + 1, start, jnp.float32(0)
    _, learned, time = lax.while_loop(lambda carry: carry[0] < text.end, round_, first)
    return learned, time


if __name__ == "__main__":
    main(tyro.cli(Arguments))
