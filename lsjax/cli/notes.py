"""What programs note beside their results: a console for it, and a line of figures about texts."""

import statistics
from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from lsjax.decoding.completion import Completion
from lsjax.evaluation.scores import repeated_share
from lsjax.terminal import SafeConsole


def summary(completions: Sequence[Completion], wall_seconds: float) -> str:
    """One line with tokens, speed, acceptance of drafts, and reasons for ending."""
    tokens = sum(c.num_new_tokens for c in completions)
    later = tokens - len(completions)
    drafted = sum(c.drafted for c in completions)
    parts = [f"{tokens} new token{'s' * (tokens != 1)}"]
    if later and wall_seconds > 0:
        parts[0] += f" at {later / wall_seconds:.1f} tokens/s"
    if drafted:
        accepted = sum(c.accepted for c in completions)
        parts.append(f"{accepted} of {drafted} drafts accepted ({accepted / drafted:.0%})")
        rounds = sum(c.rounds for c in completions)
        parts.append(f"{later / rounds:.2f} tokens per round")
    chosen, given = Counter(), Counter()  # rounds and tokens of each source of drafts
    for completion in completions:
        for name, one in (completion.sources or {}).items():
            chosen[name] += one["rounds"]
            given[name] += one["tokens"]
    sources = [
        f"{name}: {times / chosen.total():.0%} of rounds, {given[name] / times:.2f} tokens each"
        for name, times in chosen.most_common()
    ]
    parts += [", ".join(sources)] if sources else []
    parts.append(f"{repeated(completions):.0%} of 4-grams are repeated")
    reasons = Counter(c.finish_reason for c in completions)
    parts.append(", ".join(f"{n} ended by {reason}" for reason, n in sorted(reasons.items())))
    return "; ".join(parts)


def repeated(completions: Sequence[Completion]) -> float:
    """Mean share of the texts' 4-grams that they contain earlier."""
    return statistics.fmean(repeated_share(one.token_ids) for one in completions)


def notes_console() -> Console:
    """A console on stderr, for notes that are not part of the result."""
    return SafeConsole(stderr=True, soft_wrap=True, style="dim")
