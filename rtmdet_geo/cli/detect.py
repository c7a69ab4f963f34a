"""``rtmdet-geo detect``: one scene in, one vector layer out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from rtmdet_geo.cli import options, report


def _parse_scores(
    ctx: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> float | dict[str, float] | None:
    """Turn 0.3 and ship=0.5 into one score, or scores by class of which "*" is all others."""
    scores: dict[str, float] = {}
    for value in values:
        name, _, number = value.rpartition("=")
        name = name or "*"
        try:
            score = float(number)
        except ValueError:
            raise click.BadParameter(f"{value!r} is no score; give 0.4, or ship=0.4 for one class.") from None
        if not 0 <= score <= 1:
            raise click.BadParameter(f"{value!r} is not in the range 0<=x<=1.")
        if name in scores:
            raise click.BadParameter(f"{value!r} is a second score for {'all classes' if name == '*' else name}.")
        scores[name] = score
    return scores["*"] if list(scores) == ["*"] else scores or None


def _parse_bounds(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[float, float, float, float] | None:
    """Read four numbers as rio does: with commas or spaces between them, in brackets or not."""
    if value is None:
        return None
    try:
        west, south, east, north = (float(word) for word in re.split(r"[,\s]+", value.strip(" []")))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not four numbers: west,south,east,north.") from None
    return west, south, east, north


@click.command()
@click.argument("scenes", metavar="SCENE...", nargs=-1, required=True)
@options.output_option(
    "Vector file to write: .gpkg, .fgb, .parquet, .geojson, .geojsonl, .shp, .shp.zip, .csv, .coco.json or .txt "
    "(DOTA). '-' writes GeoJSON features (EPSG:4326) to stdout, one a line, as soon as they are final.",
    required=False,
)
@options.model_option
@click.option(
    "-b",
    "--bidx",
    "bands",
    multiple=True,
    metavar="NUMBER|NAME",
    help="Band of the scene for the model's next channel, counted from 1 or by name; repeat.  [default: by name]",
)
@click.option(
    "--score",
    "score_threshold",
    multiple=True,
    metavar="[CLASS=]SCORE",
    callback=_parse_scores,
    help="Keep detections with at least this score, 0 to 1: of all classes, or of one; repeat.  [default: the model's]",
)
@click.option(
    "--iou",
    "iou_threshold",
    type=click.FloatRange(0, 1),
    help="Detections of one class that overlap this much are one object.  [default: the model's]",
)
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Keep this class; repeat.  [default: all]")
@click.option(
    "--bounds",
    metavar="W,S,E,N",
    callback=_parse_bounds,
    help="Look here only, in the scene's CRS: objects with their centre inside are kept.  [default: the whole scene]",
)
@click.option(
    "--geographic/--projected", help="Bounds are longitudes and latitudes, or in the scene's CRS.  [default: projected]"
)
@click.option(
    "--aoi",
    type=click.Path(path_type=Path),
    help="Look inside the polygons of this file only, in any CRS: objects with their centre inside are kept.",
)
@click.option(
    "--min-length", "min_length_m", type=click.FloatRange(min=0), help="Keep objects of so many metres or more."
)
@click.option(
    "--max-length", "max_length_m", type=click.FloatRange(min=0), help="Keep objects of so many metres or less."
)
@click.option(
    "--gsd",
    type=click.FloatRange(min=0, min_open=True),
    help="Ground sample distance of the scene in metres per pixel.  [default: from its georeference]",
)
@click.option("--nodata", type=float, help="Value of pixels without data.  [default: what the scene says]")
@click.option(
    "--stretch",
    metavar="KIND[:NUMBERS][:joint]",
    help="Values that become 0..255: model, percentile:2,98, minmax, sigma:2, fixed:0,3000 (as in the file) or none; "
    ":joint for all bands alike.  [default: model]",
)
@click.option(
    "--stretch-from",
    type=click.Path(path_type=Path),
    help="Stretch as the run did whose output (.gpkg, .fgb, .parquet, .geojson) or --json summary this is.",
)
@click.option("--dst-crs", metavar="CRS", help="CRS of the output, such as EPSG:4326.  [default: the scene's]")
@click.option(
    "-f",
    "--driver",
    metavar="NAME",
    help="GPKG, FlatGeobuf, Parquet, GeoJSON, GeoJSONSeq, 'ESRI Shapefile' or CSV.  [default: by the output's ending]",
)
@options.overwrite_option
@click.option(
    "--resume", is_flag=True, help="Go on with a run of the same command that was stopped or killed; none is no error."
)
@click.option(
    "--preview",
    type=click.Path(path_type=Path),
    help="The scene, made small, with the detections: a picture (.png), or a page to look through (.html).",
)
@click.option(
    "--tile-size",
    type=click.IntRange(min=32),
    help="Side of a tile in px of the model's resolution.  [default: the model's]",
)
@click.option(
    "--overlap",
    type=click.IntRange(min=0),
    help="Overlap of neighbouring tiles in px, longest object at least.  [default: the model's]",
)
@click.option("--mosaic", is_flag=True, help="All SCENEs are one, side by side; a folder of rasters is one anyway.")
@options.batch_size_option("Tiles")
@options.engine_options
@click.option(
    "--merge",
    type=click.Choice(["nms", "soft-nms", "wbf"]),
    default="nms",
    show_default=True,
    help="Boxes of several tiles that overlap: the best stays, the others' scores decay, or they are averaged.",
)
@click.option(
    "--pyramid",
    type=click.IntRange(0, 8),
    default=0,
    show_default=True,
    metavar="LEVELS",
    help="Look from further away as well, at 2, 4, ... times the resolution's pixels: boxes longer than --overlap.",
)
@click.option("--class-agnostic", is_flag=True, help="Objects of different classes in one place are one, too.")
@click.option(
    "--max-overlap",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.7,
    show_default=True,
    help="Masks: two of a class that share this much of the smaller one are one object; 1 goes by boxes (--iou) alone.",
)
@click.option(
    "--simplify",
    "simplify_px",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Masks: px of the model's resolution by which an edge may move to leave few corners; 0 keeps pixel edges.",
)
@click.option(
    "--tta",
    type=click.Choice(["none", "flips", "scales", "all"]),
    default="none",
    show_default=True,
    help="Test-time augmentation: look at every tile mirrored (4 views), at 3 sizes, or both (12 views).",
)
@click.option("--multi-label", is_flag=True, help="Let one place have several classes (for evaluation).")
@options.json_option
@options.progress_option
@click.option("--stdin-cancel", is_flag=True, help="Stop, as Ctrl-C does, when a line 'cancel' comes on stdin.")
@options.verbosity_options
@click.pass_context
def detect(
    ctx: click.Context,
    /,
    scenes: tuple[str, ...],
    output: Path | None,
    model: str | None,
    bands: tuple[str, ...],
    classes: tuple[str, ...],
    preview: Path | None,
    mosaic: bool,
    as_json: bool,
    progress_mode: str,
    stdin_cancel: bool,
    **settings: Any,
) -> None:
    """Detect objects in SCENE, any raster that GDAL opens, and write them as georeferenced polygons.

    \b
    Example:
      rtmdet-geo detect scene.tif -o ships.gpkg --preview ships.png

    The result in one line goes to stdout, unless --json, --progress jsonl or '-o -' owns it. Finding nothing is no
    error: the layer is then empty. Ctrl-C leaves nothing under the output's name: what was found until then goes to
    scene.partial.gpkg, and --resume goes on from there. '-o -' writes each object as soon as it is final.
    """
    if len(scenes) > 1 and not mosaic:
        raise click.UsageError(
            "These are several scenes: give them one at a time, or --mosaic if they are parts of one."
        )
    scene = scenes[0] if len(scenes) == 1 else scenes
    options.check_stdout_owner(as_json, progress_mode, output)
    if output is None and preview is None and not as_json and progress_mode != "jsonl":
        raise click.UsageError("Nothing would come out: give -o PATH, --preview PATH or --json.")
    to_stdout = output == Path("-")

    from rtmdet_geo.catalog import find_model, known_spec
    from rtmdet_geo.detect import describe_run, detect_scene

    model_path = find_model(model)
    start: dict[str, Any] = {"scene": scene, "output": str(output) if output else None, "model": str(model_path)}
    if progress_mode == "jsonl":
        start["device"] = settings["device"]
        if (spec := known_spec(model_path)) is not None:
            start |= {"model_name": spec.name, "classes": list(spec.classes)}
    if stdin_cancel:
        report.watch_stdin()

    def echo_lines(features: Any) -> None:
        from rtmdet_geo.vector import geojson_features

        for line in geojson_features(features):
            click.echo(line)

    with report.signals_are_polled(), report.progress(ctx, progress_mode, "detect", start) as advance:
        result = detect_scene(
            scene,
            None if to_stdout else output,
            model=model_path,
            bands=options.parse_bands(bands),
            classes=list(classes) or None,
            preview=preview,
            collect=False,
            each=echo_lines if to_stdout else None,
            progress=advance,
            cancelled=report.cancel_requested.is_set,
            **settings,
        )
    if not to_stdout:
        summary = result.attrs["summary"]
        report.echo_summary(ctx, summary, describe_run(result), as_json=as_json, progress_mode=progress_mode)
