"""``rtmdet-geo evaluate``: how good results are, by the protocols of published figures; what all its verbs share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.group import EXIT_VERDICT_NO, LazyGroup

if TYPE_CHECKING:
    from rtmdet_geo.evaluation.report import EvaluationReport

Command = TypeVar("Command", bound=Callable[..., Any])


@click.group(
    cls=LazyGroup,
    commands_at={
        "dota": "rtmdet_geo.cli.evaluate_dota:dota",
        "hrsc": "rtmdet_geo.cli.evaluate_dota:hrsc",
        "coco": "rtmdet_geo.cli.evaluate_coco:coco",
        "classification": "rtmdet_geo.cli.evaluate_coco:classification",
        "layers": "rtmdet_geo.cli.evaluate_layers:layers",
        "model": "rtmdet_geo.cli.evaluate_model:model",
    },
)
def evaluate() -> None:
    """Say how good results are, by the protocols that published figures follow.

    \b
    Example:
      rtmdet-geo evaluate dota results val/labelTxt

    Every verb prints a table and its figures, the one that counts first. --json, --csv and --plots give the same to
    programs, to tables and as pictures; --min-ap makes it a test. Exit codes: 0 done, 1 error, 2 wrong command line,
    3 the first figure is below --min-ap.
    """


protocol_option = click.option(
    "--protocol",
    type=click.Choice(["devkit", "mmrotate"]),
    default="devkit",
    show_default=True,
    help="Rules for DOTA: those of its development kit, or of MMRotate.",
)


def report_options(command: Command) -> Command:
    """Add the options of every verb that ends with a report; their values go to :func:`prepare` and :func:`finish`."""
    command = options.verbosity_options(command)
    command = options.json_option(command)
    command = options.overwrite_option(command)
    for option in (
        click.option(
            "--min-ap",
            type=click.FloatRange(0, 1),
            help="Exit with 3 if the first figure is below this, or is no number.",
        ),
        click.option(
            "--plots",
            type=click.Path(path_type=Path),
            help="Folder for pictures: precision over recall, confusion of classes, scores of hits and false alarms.",
        ),
        click.option("--csv", type=click.Path(path_type=Path), help="File for the table as CSV."),
    ):
        command = option(command)
    return command


def prepare(*sources: str | Path, csv: Path | None, plots: Path | None, overwrite: bool, **_: Any) -> None:
    """Refuse before the work what could not be written after it; takes what :func:`report_options` gives.

    Args:
        sources: files and folders that are read.
        csv: to write.
        plots: to write.
        overwrite: whether they may be there already.

    Raises:
        OutputError: a file is there already or is one of the sources, or its folder is not there.
        MissingDependencyError: plots need matplotlib.
    """
    from rtmdet_geo.evaluation.report import check_report_outputs

    check_report_outputs(csv=csv, plots=plots, overwrite=overwrite, sources=sources)


def finish(
    ctx: click.Context,
    result: EvaluationReport,
    *,
    as_json: bool,
    csv: Path | None,
    plots: Path | None,
    min_ap: float | None,
    overwrite: bool,
    progress_mode: str = "auto",
) -> None:
    """Write and print a report, and exit with 3 if its first figure is below ``--min-ap``.

    The arguments are the values of :func:`report_options`, and of ``--progress`` where a verb has it.
    """
    from rtmdet_geo.evaluation.report import report_json, report_text, write_report

    write_report(result, csv=csv, plots=plots, overwrite=overwrite)
    name, value = next(iter(result.figures.items()))
    is_met = min_ap is None or value >= min_ap  # nan is not
    summary = report_json(result) | ({} if min_ap is None else {"min_ap": min_ap, "is_met": is_met})
    if as_json:
        report.echo_json(summary)
    elif progress_mode == "jsonl":
        report.emit_event(ctx, {"event": "done", **summary})
    else:
        click.echo(report_text(result))
    if not is_met:
        report.echo(ctx, f"rtmdet-geo: {name} {value:.4f} is below --min-ap {min_ap:g}")
        ctx.exit(EXIT_VERDICT_NO)
