"""Scores every exit of several models on the held-out data of the first one, a training run."""

import json
from dataclasses import asdict

from rich.progress import Progress

from lsjax.checkpoints import load, open_checkpoint
from lsjax.checkpoints.run import is_run, read_run_config
from lsjax.cli.flags.exits import Arguments
from lsjax.cli.notes import notes_console
from lsjax.cli.setup import check_output, choose_dtype, keep_compiled_programs
from lsjax.cli.show import exit_table, wide_console
from lsjax.config import check
from lsjax.data.pipeline import OnePass, packed_rows
from lsjax.data.tokenizer_files import load_tokenizer
from lsjax.evaluation import exits, installed, plots
from lsjax.io.files import cache_directory, writing
from lsjax.model.llama import stacked


def score_models(arguments: Arguments) -> None:
    """Scores the models, prints the table and draws the plot."""
    check(len(arguments.runs) >= 1, "--runs is empty: name the directory of a run")
    first, *others = arguments.runs
    output, names = arguments.output, [run.name for run in arguments.runs]
    check(is_run(first), f"{first} is not a training run: name a --workdir of train.py first")
    check(len(set(names)) == len(names), f"two runs have the same name ({names}): rename one")
    sources = [open_checkpoint(run) for run in arguments.runs]
    tokenizer = load_tokenizer(first).fitted(sources[0].config.vocab_size)
    for run in others:
        check(
            load_tokenizer(run).fingerprint == tokenizer.fingerprint,
            f"{run} and {first} have different tokenizers: compare runs with the same one",
        )
    if output is not None:
        check(output.suffix == ".png", f"--output {output} is not a .png file: name one")
        installed("matplotlib", "plots")
    for file in {output, arguments.json} - {None}:
        check_output(file)
    config, dtype = read_run_config(first), choose_dtype("auto")
    keep_compiled_programs()
    options = {"seq_len": config.seq_len, "split": "validation", "cache": cache_directory()}
    rows = packed_rows(config.data, tokenizer, **options)
    batches = list(OnePass(rows, batch_size=config.batch_size, max_batches=arguments.batches))
    scores: dict[str, exits.ExitScores] = {}
    notes = notes_console()
    with Progress(console=notes, transient=True, disable=not notes.is_terminal) as progress:
        for name, source in zip(names, sources, strict=True):
            model = stacked(load(source, dtype=dtype))
            tracked = progress.track(batches, description=name)
            settings = dict(micro_batches=config.micro_batches, kernels=config.kernels)
            scores[name] = exits.score_exits(model, tracked, **settings)
    console = wide_console()
    console.print(exit_table(f"{scores[names[0]].tokens:,} held-out tokens", scores))
    console.print(exits.AGREEMENT, style="dim")
    if arguments.json is not None:
        lines = [json.dumps({"run": name, **asdict(one)}) + "\n" for name, one in scores.items()]
        with writing(arguments.json):
            arguments.json.write_text("".join(lines), encoding="utf-8")
    if output is not None:
        losses = {name: plots.estimates(one.loss_E) for name, one in scores.items()}
        agreements = {name: plots.estimates(one.agreement_E) for name, one in scores.items()}
        plots.plot_exits(losses, agreements, output)
        notes.print(f"picture: {output}")
