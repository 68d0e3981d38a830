"""Pictures of a report, as SVG files."""

from lsjax.config import AnyPath
from lsjax.evaluation.plots import figure, plot_exits, plot_losses
from lsjax.evaluation.speed_plots import plot_acceptance, plot_speeds
from lsjax.reporting.figures import NAMES, accepted, agreements, losses, speeds
from lsjax.reporting.record import Report

EXITS, ACCEPTANCE, SPEEDS, TRAINING = (
    f"{name}.svg" for name in ("exits", "acceptance", "speeds", "training")
)


def draw(report: Report, directory: AnyPath) -> list[str]:
    """Draws the pictures that the report has figures for; returns the names of their files."""
    drawn, kinds = [EXITS], [kind for kind in NAMES if report.of(kind)]
    main = report.of(report.main)
    plot_exits(
        {NAMES[kind]: losses(report, kind) for kind in kinds},
        {NAMES[kind]: agreements(report, kind) for kind in kinds},
        directory / EXITS,
        trained=main[0].exits,
    )
    counts = accepted(report)
    if counts is not None and counts.drafted_EJ.any():
        drawn.append(ACCEPTANCE)
        plot_acceptance(counts, directory / ACCEPTANCE)
    rows = [one.figures for one in speeds(report)]
    if rows:
        drawn.append(SPEEDS)
        plot_speeds(rows, directory / SPEEDS)
    if any(one.training for one in report.models):
        drawn.append(TRAINING)
        draw_training(report, directory / TRAINING)
    return drawn


def draw_training(report: Report, file: AnyPath) -> None:
    """Losses and held-out agreement along the training of seed 0, in a row for each kind."""
    kinds = [kind for kind in NAMES if any(one.training for one in report.of(kind))]
    exits = report.of(report.main)[0].exits
    with figure(len(kinds), 2, (10, 3.4 * len(kinds)), file, "") as rows:
        for kind, (loss_axes, agreement_axes) in zip(kinds, rows, strict=True):
            metrics = report.of(kind)[0].training
            steps = [row for row in metrics if row["kind"] == "step"]
            evaluations = [row for row in metrics if row["kind"] == "evaluation"]
            plot_losses(loss_axes, agreement_axes, steps, evaluations, exits)
            loss_axes.set_title(f"loss by exit, {NAMES[kind]}", fontsize="medium")
            agreement_axes.set_title(f"held-out agreement, {NAMES[kind]}", fontsize="medium")
            for axes in (loss_axes, agreement_axes):
                axes.set_xlim(0, steps[-1]["step"] * 1.02)
        ends = [end for row in rows for end in row[0].get_ylim()]
        for row in rows:  # one scale for all kinds
            if row[0].get_yscale() == "linear":
                row[0].set_ylim(min(ends), max(ends))
