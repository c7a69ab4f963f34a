"""``rtmdet-geo data``: from scenes and labels to what training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.data_source import SourceOptions, source_options
from rtmdet_geo.cli.group import EXIT_VERDICT_NO, LazyGroup


@click.group(
    cls=LazyGroup,
    commands_at={
        "convert": "rtmdet_geo.cli.data_convert:convert",
        "stats": "rtmdet_geo.cli.data_stats:stats",
        "show": "rtmdet_geo.cli.data_show:show",
        "split": "rtmdet_geo.cli.data_split:split",
        "merge": "rtmdet_geo.cli.data_merge:merge",
        "submission": "rtmdet_geo.cli.data_submission:submission",
        "check-submission": "rtmdet_geo.cli.data_submission:check_submission",
    },
)
def data() -> None:
    """Prepare and check training data.

    \b
    Example:
      rtmdet-geo data chips port.tif --labels ships.gpkg -o chips/port
      rtmdet-geo data check --format chips --images chips/port
    """


@data.command()
@click.argument("scenes", nargs=-1, required=True, metavar="SCENE...")
@click.option(
    "-l",
    "--labels",
    type=click.Path(path_type=Path),
    required=True,
    help="COCO .json (images matched to scenes by file name) or a vector layer of polygons in any CRS.",
)
@options.output_option("Folder to make.")
@click.option(
    "--recipe",
    metavar="NAME|PATH",
    help="Recipe whose bands, stretch, resolution and classes the chips shall have; the options below go before it.",
)
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Class name, in label order; repeat.")
@click.option("--class-column", metavar="NAME", help="Column of the vector layer that names the class.")
@click.option("--layer", metavar="NAME", help="The vector layer, where the file holds several.")
@click.option(
    "--chip-size", type=click.IntRange(min=0), default=1024, show_default=True, help="Side in px; 0: whole scenes."
)
@click.option("--overlap", type=click.IntRange(min=0), default=200, show_default=True, help="Overlap of chips in px.")
@click.option(
    "--chip-gsd",
    type=click.FloatRange(min=0, min_open=True),
    help="Metres per pixel of the chips.  [default: the recipe's, else the scene's own]",
)
@click.option(
    "--gsd",
    type=click.FloatRange(min=0, min_open=True),
    help="Ground sample distance of the scenes in metres per pixel.  [default: from their georeference]",
)
@click.option(
    "-b",
    "--bidx",
    "bands",
    multiple=True,
    metavar="NUMBER|NAME",
    help="Band for the next channel; repeat.  [default: by name]",
)
@click.option("--nodata", type=float, help="Value of pixels without data.  [default: what the scene says]")
@click.option("--keep-empty/--drop-empty", default=True, show_default=True, help="Write chips without objects.")
@options.overwrite_option
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def chips(
    ctx: click.Context,
    scenes: tuple[str, ...],
    labels: Path,
    output: Path,
    recipe: str | None,
    classes: tuple[str, ...],
    class_column: str | None,
    layer: str | None,
    chip_size: int,
    overlap: int,
    chip_gsd: float | None,
    gsd: float | None,
    bands: tuple[str, ...],
    nodata: float | None,
    keep_empty: bool,
    overwrite: bool,
    as_json: bool,
    progress_mode: str,
) -> None:
    """Cut SCENEs and their labels into chips for `train`: .npy images and one chips.json.

    \b
    Example:
      rtmdet-geo data chips port.tif --labels ships.gpkg -o chips/port --recipe sen2ships_r
    """
    options.check_stdout_owner(as_json, progress_mode)
    settings: dict[str, Any] = {}
    if recipe is not None:
        from rtmdet_geo.config import load_recipe

        model = load_recipe(recipe).model
        settings = {
            "model_bands": model.bands,
            "optional_bands": model.optional_bands,
            "stretch": model.stretch,
            "gsd_m": model.gsd_m,
            "classes": model.classes,
        }
    if classes:
        settings["classes"] = classes
    if chip_gsd is not None:
        settings["gsd_m"] = chip_gsd

    from rtmdet_geo.gis_labels import cut_chips

    with report.progress(ctx, progress_mode, "chips", {"scenes": scenes, "out": str(output)}) as advance:
        summary = cut_chips(
            scenes,
            labels,
            output,
            chip_size=chip_size,
            overlap=overlap,
            class_column=class_column,
            layer=layer,
            bands=options.parse_bands(bands),
            scene_gsd_m=gsd,
            nodata=nodata,
            keep_empty=keep_empty,
            overwrite=overwrite,
            progress=advance,
            **settings,
        )
    text = (
        f"{summary['out']}: {summary['num_chips']} chips of {summary['num_scenes']} scenes, "
        f"{summary['num_boxes']} objects"
    )
    report.echo_summary(ctx, summary, text, as_json=as_json, progress_mode=progress_mode)


@data.command()
@source_options
@click.option(
    "--examples", type=click.IntRange(min=1), default=5, show_default=True, help="Faults of each kind to show."
)
@click.option("--threads", type=click.IntRange(min=1), default=8, show_default=True, help="Threads that decode.")
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def check(
    ctx: click.Context,
    source: SourceOptions,
    examples: int,
    threads: int,
    as_json: bool,
    progress_mode: str,
) -> None:
    """Look for faults in labels and images: all of RECIPE's data, or a folder's. Exits with 3 if there are errors.

    \b
    Example:
      rtmdet-geo data check dota_r --data /data/dota
      rtmdet-geo data check --format dota --images train/images --labels train/labelTxt

    Errors are broken images, malformed labels, labels without image, unknown classes, boxes without area or outside
    the image, the same object or file twice. Warnings are boxes partly outside, images without labels, classes without
    objects, EXIF orientations.
    """
    options.check_stdout_owner(as_json, progress_mode)
    from rtmdet_geo.dataset_check import check_dataset

    parts, drops_unknown = source.parts()
    with report.progress(ctx, progress_mode, "images", {"recipe": source.recipe, "parts": list(parts)}) as advance:
        summary = check_dataset(
            parts, drop_unknown_classes=drops_unknown, examples=examples, threads=threads, progress=advance
        )
    if as_json:
        report.echo_json(summary)
    elif progress_mode == "jsonl":
        report.emit_event(ctx, {"event": "done", **summary})
    else:
        _echo_check(summary, is_quiet=report.verbosity(ctx) < 0)
    if summary["errors"]:
        ctx.exit(EXIT_VERDICT_NO)


def _echo_check(summary: dict[str, Any], *, is_quiet: bool) -> None:
    """Print parts, faults and the verdict; quietly: errors only."""
    for name, part in summary["parts"].items() if not is_quiet else ():
        counts = ", ".join(f"{number} {label}" for label, number in part["classes"].items() if number)
        empty = part["images_without_objects"]
        click.echo(f"{name}: {part['images']} images ({empty} without objects), {part['objects']} objects: {counts}")
    for fault in summary["faults"]:
        if is_quiet and fault["severity"] != "error":
            continue
        click.echo(f"{fault['severity']}: {fault['count']} x {fault['kind']}: {fault['meaning']}")
        for example in fault["examples"]:
            click.echo(f"  {example['place']}: {example['text']}")
        if fault["count"] > len(fault["examples"]):
            click.echo(f"  and {fault['count'] - len(fault['examples'])} more")
    if not is_quiet:
        click.echo(f"{summary['errors']} errors, {summary['warnings']} warnings")
