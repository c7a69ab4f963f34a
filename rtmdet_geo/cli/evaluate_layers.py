"""``rtmdet-geo evaluate layers``: a predicted layer against a labelled one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from rtmdet_geo.cli.evaluate import finish, prepare, report_options

#: Endings of the formats that hold hits and misses of any geometry and keep the names of their columns.
_ENDINGS = (".gpkg", ".geojson", ".json")


@click.command()
@click.argument("predicted", type=click.Path(path_type=Path))
@click.argument("labelled", type=click.Path(path_type=Path))
@click.option(
    "--match",
    type=click.Choice(["iou", "distance"]),
    help="What makes a hit: overlap, or nearness of centroids.  [default: distance with --distance-m, else iou]",
)
@click.option(
    "--iou",
    type=click.FloatRange(0, 1, min_open=True),
    help="IoU on the ground from which on a prediction is a hit.  [default: 0.5]",
)
@click.option(
    "--distance-m",
    type=click.FloatRange(min=0, min_open=True),
    help="Distance of the centroids in metres up to which a prediction is a hit.",
)
@click.option(
    "--shape",
    type=click.Choice(["auto", "rectangle", "outline"]),
    default="auto",
    show_default=True,
    help="IoU of the smallest rectangles or of the polygons as they are; auto: rectangles if all predictions have four "
    "corners.",
)
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Count this class only; repeat.")
@click.option(
    "--class-column", metavar="NAME", help="Column of the class names.  [default: class_name, if both layers have it]"
)
@click.option("--labelled-class-column", metavar="NAME", help="That of LABELLED, where it has another name.")
@click.option("--any-class", is_flag=True, help="Compare places only.")
@click.option("--score-column", metavar="NAME", help="Column of the scores.  [default: score, if there is one]")
@click.option("--score", type=float, help="Leave out predictions below.  [default: take the whole layer]")
@click.option(
    "--aoi", type=click.Path(path_type=Path), help="Layer of polygons: count objects whose centroid lies inside."
)
@click.option(
    "--length-band",
    "length_bands_m",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    metavar="METRES",
    help="Border between bands of length that get a row each; repeat, rising.",
)
@click.option("--predicted-layer", metavar="NAME", help="Layer of PREDICTED, where the file has several.")
@click.option("--labelled-layer", metavar="NAME", help="Layer of LABELLED.")
@click.option(
    "-o",
    "--output",
    "matched",
    type=click.Path(path_type=Path),
    help="GeoPackage or GeoJSON of what became of each object: column outcome is hit, false alarm or missed.",
)
@report_options
@click.pass_context
def layers(
    ctx: click.Context,
    /,
    predicted: Path,
    labelled: Path,
    match: str | None,
    iou: float | None,
    distance_m: float | None,
    matched: Path | None,
    overwrite: bool,
    classes: tuple[str, ...],
    **settings: Any,
) -> None:
    """Score the vector layer PREDICTED by the vector layer LABELLED, in whatever CRSs they are.

    \b
    Example:
      rtmdet-geo evaluate layers ships.gpkg labels.geojson -o matched.gpkg
      rtmdet-geo evaluate layers ships.gpkg labels.geojson --distance-m 20 --length-band 50 --length-band 100

    Everything is measured on the ground, in metres. AP50 (or AP 20 m) is the mean over classes; precision, recall and
    F1 are those of the layer as it is; best_f1 is reached from best_score on. Of the hits: distance of the centroids
    (mean, median, 90th percentile), azimuth error mod 180 of labels at least 1.5 times as long as wide, errors of
    length and width.
    """
    _check(match, iou, distance_m, classes, settings)
    output = {name: settings.pop(name) for name in ("as_json", "csv", "plots", "min_ap")} | {"overwrite": overwrite}
    _check_places(matched, output["csv"])
    area = [settings["aoi"]] if settings["aoi"] else []
    prepare(predicted, labelled, *area, **output)
    from rtmdet_geo.evaluation.gis import evaluate_layers

    result = evaluate_layers(
        predicted,
        labelled,
        match=match or ("iou" if distance_m is None else "distance"),  # type: ignore[arg-type]
        iou=0.5 if iou is None else iou,
        distance_m=distance_m,
        classes=classes or None,
        output=matched,
        overwrite=overwrite,
        **settings,
    )
    finish(ctx, result, **output)


def _check(
    match: str | None,
    iou: float | None,
    distance_m: float | None,
    classes: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: that is so.
    """
    if match == "distance" and distance_m is None:
        raise click.UsageError("--match distance needs --distance-m, such as 20.")
    if match == "iou" and distance_m is not None:
        raise click.UsageError("--distance-m goes with --match distance.")
    if iou is not None and distance_m is not None:
        raise click.UsageError("--iou and --distance-m are two rules for a hit; give one of them.")
    if settings["any_class"] and (classes or settings["class_column"] or settings["labelled_class_column"]):
        raise click.UsageError("--any-class goes with neither --class nor --class-column.")
    bands = settings["length_bands_m"]
    if any(low >= high for low, high in pairwise(bands)):
        raise click.UsageError("--length-band must rise from one to the next.")


def _check_places(matched: Path | None, csv: Path | None) -> None:
    """Refuse outputs that cannot be.

    Raises:
        click.UsageError: the layer's ending names no format, or both are one file.
    """
    if matched is not None and matched.suffix.lower() not in _ENDINGS:
        raise click.UsageError(f"-o {matched} must end with {', '.join(_ENDINGS)}.")
    if matched is not None and matched == csv:
        raise click.UsageError("-o and --csv name the same file.")
