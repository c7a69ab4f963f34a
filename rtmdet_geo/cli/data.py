"""``rtmdet-geo data``: from scenes and labels to what training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.group import EXIT_VERDICT_NO, LazyGroup


@click.group(
    cls=LazyGroup,
    commands_at={
        "convert": "rtmdet_geo.cli.data_convert:convert",
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
            bands=options.parse_bands(bands),
            scene_gsd_m=gsd,
            nodata=nodata,
            keep_empty=keep_empty,
            overwrite=overwrite,
            progress=advance,
            **settings,
        )
    if as_json:
        report.echo_json(summary)
    elif progress_mode == "jsonl":
        report.emit_event(ctx, {"event": "done", **summary})
    elif report.verbosity(ctx) >= 0:
        click.echo(
            f"{summary['out']}: {summary['num_chips']} chips of {summary['num_scenes']} scenes, "
            f"{summary['num_boxes']} objects"
        )


#: Formats whose images and labels lie apart.
_WITH_LABELS = ("coco", "dota", "hrsc", "yolo_obb", "rbox", "voc")


@data.command()
@click.argument("recipe", required=False, metavar="[RECIPE]")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a value of the recipe; repeat.")
@click.option(
    "--data",
    "folder",
    type=click.Path(path_type=Path),
    help="Folder of the data.  [default: the recipe's data.root, or data.chips]",
)
@click.option(
    "--format",
    "label_format",
    type=click.Choice([*_WITH_LABELS, "chips", "folders"]),
    help="Check a folder instead of a recipe's data: format of its labels.",
)
@click.option("--images", type=click.Path(path_type=Path), help="Folder of images, of chips, or of folders of images.")
@click.option("-l", "--labels", type=click.Path(path_type=Path), help="Folder of label files, or the file (coco).")
@click.option("--ids", type=click.Path(path_type=Path), help="Text file with one image name a line: only these.")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Class of the model, in label order; repeat.")
@click.option(
    "--hrsc-level", type=click.IntRange(1, 3), default=1, show_default=True, help="Level of HRSC2016's classes."
)
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
    recipe: str | None,
    overrides: tuple[str, ...],
    folder: Path | None,
    label_format: str | None,
    images: Path | None,
    labels: Path | None,
    ids: Path | None,
    classes: tuple[str, ...],
    hrsc_level: int,
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
    if (recipe is None) == (label_format is None):
        raise click.UsageError("Give a RECIPE, or --format and --images.")
    from rtmdet_geo.dataset_check import Source, check_dataset, recipe_parts

    parts: dict[str, Source]
    drops_unknown = False
    if recipe is not None:
        if images or labels or ids or classes:
            raise click.UsageError("--images, --labels, --ids and --class go with --format, not with a RECIPE.")
        from rtmdet_geo.config import load_recipe

        loaded = load_recipe(recipe, overrides).with_data(folder)
        parts, drops_unknown = recipe_parts(loaded), loaded.data.unknown_classes == "drop"
    else:
        if overrides or folder:
            raise click.UsageError("--set and --data go with a RECIPE, not with --format.")
        parts = {"data": _source(str(label_format), images, labels, ids, classes or None, hrsc_level)}
    with report.progress(ctx, progress_mode, "images", {"recipe": recipe, "parts": list(parts)}) as advance:
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


def _source(
    label_format: str,
    images: Path | None,
    labels: Path | None,
    ids: Path | None,
    classes: tuple[str, ...] | None,
    hrsc_level: int,
) -> Any:
    """Return what ``--format`` and the options beside it name."""
    from rtmdet_geo.annotations.folders import FoldersSource
    from rtmdet_geo.annotations.parts import PartSource
    from rtmdet_geo.dataset_check import ChipsSource

    if images is None:
        raise click.UsageError(f"--format {label_format} needs --images.")
    if label_format in _WITH_LABELS:
        if labels is None:
            raise click.UsageError(f"--format {label_format} needs --labels.")
        kind = "horizontal" if label_format == "coco" else "rotated"
        return PartSource(label_format, images, labels, ids, classes, kind, hrsc_level)  # type: ignore[arg-type]
    if labels:
        raise click.UsageError(f"--format {label_format} takes no --labels.")
    if label_format == "folders":
        return FoldersSource(images, ids, classes)
    if ids:
        raise click.UsageError("--format chips takes no --ids.")
    return ChipsSource(images, classes)


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
