"""Stage a: every strategy gives the tokens of autoregressive decoding.

Two models: random weights, whose drafts are often refused, and the same with an identity tail,
whose drafts are all right. In float32 a difference is a failure if the two best logits lie further
apart than rounding explains. In bfloat16 the margins of the differences are noted.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np

from accelerator_stages.inputs import Numbers, random_model, random_prompts
from accelerator_stages.report import Report, Row, card
from lsjax.cli.setup import choose_dtype
from lsjax.config import LlamaConfig
from lsjax.decoding.autoregressive import Autoregressive, EarlyExit
from lsjax.decoding.completion import Completion
from lsjax.decoding.draft_vocabulary import DraftVocabulary
from lsjax.decoding.engine import Engine
from lsjax.decoding.self_speculative import SelfSpeculative
from lsjax.decoding.state import Strategy
from lsjax.evaluation.exactness import FLOAT32_MARGIN, first_difference, identity_tail
from lsjax.model.llama import stacked

ROWS = 4  # of the batch: fewer than there are prompts, so that a row is given another


@dataclass(frozen=True)
class Cell:
    """What is compared with autoregressive decoding of one row. An early exit gives its tokens only
    with the identity tail."""

    name: str
    strategy: Strategy
    rows: int = 1
    is_stacked: bool = False


def cells(config: LlamaConfig, part: str, tiny: bool) -> list[Cell]:
    """All of them; of tiny models a few, as each of them takes seconds to compile."""
    layers, half = config.num_layers, config.num_layers // 2
    vocabulary = DraftVocabulary(np.arange(config.vocab_size // 4, dtype=np.int32))
    shared = SelfSpeculative(half, 5, shared_exits=(layers - 1,), shared_lengths=(2,))
    first = Cell("a quarter of the layers, 4 drafts", SelfSpeculative(max(1, layers // 4), 4))
    several = Cell("half, 5 drafts, of several", shared)
    batch = Cell(f"half, 4 drafts, {ROWS} rows", SelfSpeculative(half, 4), rows=ROWS)
    if tiny:
        return [first, several, batch] if part == "float32" else [first]
    return [
        first,
        several,
        batch,
        Cell(f"autoregressive, {ROWS} rows", Autoregressive(), rows=ROWS),
        Cell("all but one, 8 drafts", SelfSpeculative(layers - 1, 8)),
        Cell("no drafts", SelfSpeculative(half, 0)),
        Cell("half, 4 drafts of a vocabulary", SelfSpeculative(half, 4, vocabulary)),
        Cell("half, 4 drafts by confidence", SelfSpeculative(half, 4, draft_confidence=0.2)),
        Cell("half, 4 drafts, stacked", SelfSpeculative(half, 4), is_stacked=True),
        Cell("early exit", EarlyExit(half)),
    ]


def run(part: str, report: Report, tiny: bool) -> None:
    """Compares in one dtype, which is the part."""
    dtype = choose_dtype(part)
    config = LlamaConfig.tiny(num_layers=2)
    if not tiny:  # an untied head: a tied one repeats the last token
        config = LlamaConfig.llama3_2_1b(num_layers=8, vocab_size=4096, tie_embeddings=False)
    # Lengths that are read in chunks of one size, so that there is one program for it.
    lengths = [5, 24, 17, 32, 30, 9] if tiny else [300, 410, 290, 520, 333, 700]
    prompts = random_prompts(config, lengths)
    report.start(card(), new_tokens=(new := 12 if tiny else 48), prompts=len(prompts))
    model, quarter = random_model(config, dtype), max(1, config.num_layers // 4)
    models = {"random": model, "identity tail": identity_tail(model, quarter)}
    engines: dict[tuple[int, bool], Engine] = {}

    def texts(cell: Cell, name: str) -> list[Completion]:
        form = stacked(models[name]) if cell.is_stacked else models[name]
        key = cell.rows, cell.is_stacked
        if key not in engines:
            engines[key] = Engine(form, Numbers(config.vocab_size), batch_size=cell.rows)
        engines[key].use_model(form)
        engines[key].use(cell.strategy)
        return engines[key].generate(prompts, max_new_tokens=new)

    def compared(cell: Cell, name: str, expected: list[Completion]) -> Row:
        found = texts(cell, name)
        triples = zip(prompts, expected, found, strict=True)
        pairs = [
            first_difference(models[name], prompt, one.token_ids, other.token_ids)
            for prompt, one, other in triples
        ]
        differences = [pair for pair in pairs if pair is not None]
        wide = sum(not one.margin <= FLOAT32_MARGIN for one in differences)
        if wide and dtype == "float32":
            report.fail(cell.name, f"{wide} texts differ by a margin above {FLOAT32_MARGIN:.0e}")
        drafted = sum(one.drafted for one in found)
        return {
            "texts": len(found),
            "differ": len(differences),
            "widest margin": max((float(one.margin) for one in differences), default=None),
            "roundings": max((float(one.roundings) for one in differences), default=None),
            "accepted": sum(one.accepted for one in found) / drafted if drafted else None,
        }

    for name in models:
        report.say(f"autoregressive, {name}")
        expected = texts(Cell("autoregressive", Autoregressive()), name)
        for cell in cells(config, part, tiny):
            if name == "identity tail" or not isinstance(cell.strategy, EarlyExit):
                report.measure(f"{cell.name}, {name}", partial(compared, cell, name, expected))
