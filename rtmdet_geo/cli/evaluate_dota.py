"""``rtmdet-geo evaluate dota`` and ``evaluate hrsc``: result files of rotated objects against labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.evaluate import finish, prepare, protocol_option, report_options


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
@click.option(
    "--task",
    type=click.Choice(["1", "2"]),
    default="1",
    show_default=True,
    help="1: oriented objects, Task1_<class>.txt; 2: horizontal ones, Task2_<class>.txt.",
)
@click.option(
    "--classes",
    default="dota_v1.0",
    show_default=True,
    metavar="LIST",
    help="Classes: dota_v1.0, dota_v1.5 or dota_v2.0, a file with one name a line, or names with commas.",
)
@protocol_option
@click.option(
    "--difficult",
    type=click.Choice(["ignore", "count"]),
    help="Difficult objects are neither hit nor miss, or like others.  [default: ignore; mmrotate: count]",
)
@click.option(
    "--points",
    type=click.Choice(["11", "area"]),
    default="11",
    show_default=True,
    help="Whose figures come first: 11 recalls (VOC 2007) or the area under the curve (VOC 2010). Both are told.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Classes scored at a time.  [default: one per usable core]")
@options.progress_option
@report_options
@click.pass_context
def dota(
    ctx: click.Context,
    /,
    results: Path,
    labels: Path,
    task: str,
    classes: str,
    protocol: str,
    difficult: str | None,
    points: str,
    threads: int | None,
    progress_mode: str,
    **output: Any,
) -> None:
    """Score DOTA result files: the folder or zip RESULTS against the folder LABELS of labelTxt files.

    \b
    Example:
      rtmdet-geo evaluate dota results val/labelTxt
      rtmdet-geo evaluate dota results val/labelTxt --protocol mmrotate --csv ap.csv --plots plots --min-ap 0.7

    RESULTS has one file for each class, also where nothing was found; every label file is an image that was searched.
    AP50 to AP50_95 are means over classes, at IoU 0.5, 0.75 and from 0.5 to 0.95: of all, as the development kit has
    it, and with _present of those that are labelled at all.
    """
    if protocol == "devkit" and difficult == "count":
        raise click.UsageError("--protocol devkit ignores difficult objects; count them with --protocol mmrotate.")
    options.check_stdout_owner(output["as_json"], progress_mode)
    prepare(results, labels, *([classes] if Path(classes).is_file() else []), **output)
    from rtmdet_geo.evaluation.dota import evaluate_dota

    start = {"results": str(results), "labels": str(labels)}
    with report.signals_are_polled(), report.progress(ctx, progress_mode, "files and classes", start) as advance:
        result = evaluate_dota(
            results,
            labels,
            classes=classes,
            task=int(task),  # type: ignore[arg-type]
            protocol=protocol,  # type: ignore[arg-type]
            difficult=difficult,  # type: ignore[arg-type]
            points=points,  # type: ignore[arg-type]
            threads=threads,
            progress=advance,
            cancelled=report.cancel_requested.is_set,
        )
    finish(ctx, result, progress_mode=progress_mode, **output)


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
@click.option(
    "--points",
    type=click.Choice(["voc07", "voc12"]),
    default="voc07",
    show_default=True,
    help="Whose figures come first: 11 recalls (VOC07) or the area under the curve (VOC12). Both are told.",
)
@click.option(
    "--difficult",
    type=click.Choice(["ignore", "count"]),
    default="count",
    show_default=True,
    help="Difficult ships are neither hit nor miss, or like others, as in published figures.",
)
@options.progress_option
@report_options
@click.pass_context
def hrsc(
    ctx: click.Context,
    /,
    results: Path,
    labels: Path,
    points: str,
    difficult: str,
    progress_mode: str,
    **output: Any,
) -> None:
    """Score ships found in HRSC2016: RESULTS against the folder LABELS.

    \b
    Example:
      rtmdet-geo evaluate hrsc results/Task1_ship.txt Test/Annotations

    RESULTS is a file with a line `image score x1 y1 x2 y2 x3 y3 x4 y4` a ship, or the folder or zip of
    Task1_ship.txt. LABELS has HRSC2016's XML files, or text files with a line `cx cy w h angle` a ship; each is an
    image that was searched.
    """
    options.check_stdout_owner(output["as_json"], progress_mode)
    prepare(results, labels, **output)
    from rtmdet_geo.evaluation.hrsc import evaluate_hrsc

    start = {"results": str(results), "labels": str(labels)}
    with report.signals_are_polled(), report.progress(ctx, progress_mode, "label files", start) as advance:
        result = evaluate_hrsc(
            results,
            labels,
            points=points,  # type: ignore[arg-type]
            difficult=difficult,  # type: ignore[arg-type]
            progress=advance,
            cancelled=report.cancel_requested.is_set,
        )
    finish(ctx, result, progress_mode=progress_mode, **output)
