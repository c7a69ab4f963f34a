"""``rtmdet-geo data merge``: DOTA result files over patches become those over images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.data_split import tool_option

task_option = click.option(
    "--task",
    type=click.Choice(["1", "2"]),
    default="1",
    show_default=True,
    help="1: oriented boxes, Task1_<class>.txt; 2: horizontal ones, Task2_<class>.txt.",
)


def classes_options(default: str) -> Callable[[options.Command], options.Command]:
    """Return ``--classes`` and ``--class``; ``default`` says what is taken without them."""

    def add(function: options.Command) -> options.Command:
        function = click.option(
            "--class", "class_names", multiple=True, metavar="NAME", help="Class of other data; repeat."
        )(function)
        return click.option(
            "--classes",
            "class_list",
            type=click.Choice(["dota_v1.0", "dota_v1.5", "dota_v2.0"]),
            help=f"Classes that there have to be files for.  [default: {default}]",
        )(function)

    return add


def chosen_classes(class_list: str | None, class_names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the classes that were asked for, None where none were.

    Raises:
        click.UsageError: a list and names.
    """
    if class_list is not None and class_names:
        raise click.UsageError("--classes names a list and --class a class of other data; choose one.")
    if class_list is None:
        return class_names or None
    from rtmdet_geo.class_names import KNOWN

    return KNOWN[class_list]


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@options.output_option("Folder to make, or .zip file to submit.")
@task_option
@tool_option("as the names say")
@click.option(
    "--iou",
    "iou_threshold",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Detections of one class that overlap more than this are one object.",
)
@classes_options("those there are")
@options.overwrite_option
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def merge(
    ctx: click.Context,
    results: Path,
    output: Path,
    task: str,
    tool: str | None,
    iou_threshold: float,
    class_list: str | None,
    class_names: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    progress_mode: str,
) -> None:
    """Merge RESULTS, a folder of result files whose images are patches, into result files over whole images.

    \b
    Example:
      rtmdet-geo data merge patch_results -o results
      rtmdet-geo data merge patch_results -o task1.zip --classes dota_v1.0

    Patches are named as `data split` names them. Each detection is moved to its image; with devkit also divided by the
    rate. Then the best of those that overlap stays.
    """
    options.check_stdout_owner(as_json, progress_mode)
    from rtmdet_geo.dota.merge import merge_results

    with report.progress(ctx, progress_mode, "classes", {"results": str(results), "out": str(output)}) as advance:
        summary = merge_results(
            results,
            output,
            task=1 if task == "1" else 2,
            tool=tool,  # type: ignore[arg-type]
            iou_threshold=iou_threshold,
            classes=chosen_classes(class_list, class_names),
            overwrite=overwrite,
            progress=advance,
        )
    text = (
        f"{summary['out']}: {summary['after']} of {summary['before']} detections left, in {summary['images']} "
        f"images and {summary['classes']} classes"
    )
    report.echo_summary(ctx, summary, text, as_json=as_json, progress_mode=progress_mode)
