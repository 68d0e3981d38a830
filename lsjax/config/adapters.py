"""Configuration of what is trained beside a frozen model: adapters, or exit blocks."""

from collections.abc import Sized
from dataclasses import dataclass
from typing import Literal

from lsjax.config.checked import Checked, bounded, check

LoraTarget = Literal["qkv", "out", "gate_up", "down"]
BlockStart = Literal["copy", "zero"]


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Checked, prefix="lora."):
    """LoRA (Hu et al., 2021): W + alpha / rank A B replaces W, and only A and B are trained.

    Queries, keys and values are one matrix, so they share an A; so do gate and up.
    """

    rank: int = bounded(0, low=0, hint="0 trains the full model")
    """Columns of A and rows of B; 0 trains the full model."""
    alpha: float = bounded(16.0, above=0)
    """Scale of A B, times the rank."""
    targets: tuple[LoraTarget, ...] = ("qkv", "out", "gate_up", "down")
    """Matrices of each layer that get an adapter."""

    def __post_init__(self):
        super().__post_init__()
        check(
            len(self.targets) > 0 and len(set(self.targets)) == len(self.targets),
            f"lora.targets {self.targets} must name at least one matrix, and each once",
        )

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class ExitBlocksConfig(Checked, prefix="exit_blocks."):
    """Exit blocks: small layers behind exits that are trained to say what the last exit says. The
    model itself is frozen, so its texts do not change."""

    exits: tuple[int, ...] = ()
    """Exits that get a block; none trains the model itself."""
    feed_forward: bool = True
    """Whether a block has a feed-forward part, as a layer has, or attention only."""
    start: BlockStart = "copy"
    """What a block begins as. copy: the layer above its exit. zero: random weights whose output is
    the exit's state."""
    acceptance_from: float = bounded(2 / 3, low=0, high=1)
    """Share of the run after which the loss is -log sum min(p, q) (arXiv 2602.23881). Before, it is
    KL(p || q). q is the block's distribution, and p the last exit's."""
    draft_vocab: int | None = bounded(None, low=1)
    """Number of tokens that the blocks learn to draft: the most frequent ones of the data. A step
    is then cheaper. Both distributions are those over these tokens, and positions with another
    token are left out. Decode with a --draft-vocab of this size or less."""
    keep_states: bool = False
    """Whether the model's states are computed once and kept in the cache, with the last exit's most
    probable tokens. Each later pass over the data then skips the model's layers. For small data:
    the run names the bytes that it adds to the cache."""

    def check_ids(self, draft_ids: Sized | None) -> None:
        """Raises ConfigError unless there are as many ids as the draft vocabulary has tokens."""
        given = None if draft_ids is None else len(draft_ids)
        check(
            given == self.draft_vocab,
            f"exit_blocks.draft_vocab is {self.draft_vocab}, but draft_ids has {given} ids",
        )

    def check_layers(self, num_layers: int, vocab_size: int) -> None:
        """Raises ConfigError for an exit that a model of L layers lacks, or that is named twice,
        and for a draft vocabulary that is not smaller than the model's."""
        check(
            (self.draft_vocab or 1) < vocab_size,
            f"exit_blocks.draft_vocab {self.draft_vocab} is not below the model's vocabulary of "
            f"{vocab_size}: choose a smaller one, or none",
        )
        wrong = next((exit for exit in self.exits if not 1 <= exit < num_layers), None)
        check(
            wrong is None,
            f"exit_blocks.exits has {wrong}, but blocks belong to exits 1..{num_layers - 1}",
        )
        unique = self.exits == tuple(sorted({*self.exits}))
        check(unique, f"exit_blocks.exits {self.exits} must ascend, and name each exit once")
