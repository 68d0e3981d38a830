"""Speed of tokenizing: lsjax in several processes, in one, and the tokenizer alone on all cores.

    python benchmarks/tokenizing.py --tokenizer models/SmolLM2-135M-Instruct.Q4_1.gguf

The text is the standard library's source (data.source python_source). The three take turns. The
last one only encodes texts that are in memory already.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tyro

from lsjax.config import DataConfig
from lsjax.data.sources import document_source
from lsjax.data.token_rows import token_rows
from lsjax.data.tokenizer_files import load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Speed of tokenizing."""

    tokenizer: Path
    """Directory, tokenizer.json or .gguf with a `tokenizers` pipeline."""
    workers: int = os.cpu_count() or 1
    """Processes."""
    repeats: int = 5
    """Number of turns."""


def main(arguments: Arguments) -> None:
    """Measures and prints."""
    tokenizer = load_tokenizer(arguments.tokenizer)
    texts = [document.text for document in document_source(DataConfig()).documents()]
    size = sum(len(text.encode()) for text in texts)

    def make(workers: int) -> Callable[[], object]:
        def run() -> None:
            with tempfile.TemporaryDirectory() as folder:
                options = dict(seq_len=2048, cache=Path(folder), workers=workers)
                token_rows(DataConfig(), tokenizer, **options)

        return run

    def encode() -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        tokenizer._backend.encode_batch_fast(texts, add_special_tokens=False)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # for the process of `make(1)`

    many = f"{arguments.workers} processes"
    turns = {"one process": make(1), many: make(arguments.workers), "encode_batch_fast": encode}
    encode()
    rates: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(arguments.repeats):
        for name, run in turns.items():
            begin = time.perf_counter()
            run()
            rates[name].append(size / (time.perf_counter() - begin) / 1e6)
    for name, own in rates.items():
        print(f"{name}: {statistics.median(own):.2f} MB/s, {min(own):.2f} to {max(own):.2f}")
    for other in ("one process", "encode_batch_fast"):
        ratios = [one / two for one, two in zip(rates[many], rates[other], strict=True)]
        print(f"{many} beside {other}: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
