"""Reports on runs and models as they are, so that they can be compared."""

import shlex
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from lsjax.checkpoints import open_checkpoint
from lsjax.checkpoints.run import is_run, read_run_config
from lsjax.cli.flags.report import Arguments
from lsjax.cli.report_making import asked, make_report
from lsjax.config import AnyPath, EarlyExitConfig, LayerDropoutConfig, check
from lsjax.reporting.plan import BATCHES
from lsjax.reporting.record import REPORT, read_report

COMPARED_PROMPTS = 16  # of runs and models, if there is no report beside them


def as_reports(paths: Sequence[AnyPath], output: AnyPath, console: Console) -> list[AnyPath]:
    """Report directories of reports, runs and models. Reports on runs and models as they are get
    made in the output, on the held-out data of the first run, and with as many prompts and batches
    as the first report. Raises ConfigError if there is no run."""
    names = [path.name for path in paths]
    check(len(names) > 1, f"--compare has only {names[0]}: name at least two")
    check(len({*names}) == len(names), f"two of --compare have the same name ({names}): rename one")
    places = {path.resolve() for path in paths}
    taken = places & {output.resolve(), *((output / name).resolve() for name in names)}
    check(not taken, f"--output {output} would overwrite what is compared: name a new directory")
    config = next((read_run_config(path) for path in paths if is_run(path)), None)
    first = next((read_report(path) for path in paths if (path / REPORT).exists()), None)
    counts = (COMPARED_PROMPTS, BATCHES[-1])
    if first is not None:
        counts = tuple(first.alike[name] for name in ("number of prompts", "scored batches"))
    for path in paths:
        check(
            (path / REPORT).exists() or config is not None,
            f"{path} has no {REPORT}, and no run tells which text is held out: name reports, or a "
            "run among the models",
        )
    command = f"lsjax report --compare {shlex.join(map(str, paths))}"
    found = []
    for path in paths:
        if not (path / REPORT).exists():
            console.rule(path.name)
            data = replace(config.data, tokenizer=str(path))
            shape = open_checkpoint(path).config
            given = replace(
                config,
                model=shape,
                init_from=str(path),
                data=data,
                layer_dropout=LayerDropoutConfig(),
                early_exit=EarlyExitConfig(),  # whose exits a smaller model may lack
                evaluation=replace(config.evaluation, sample_tokens=0, exit_layer=None),
            )
            flags = Arguments(model=path, training=False, prompts=counts[0], fields=given)
            wanted, path = asked(flags, given, has_config=False), output / path.name
            make_report(wanted, path, console, command, num_batches=counts[1])
        found.append(path)
    return found
