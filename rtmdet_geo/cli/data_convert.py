"""``rtmdet-geo data convert``: label files of one format to another."""

from __future__ import annotations

from pathlib import Path

import click

from rtmdet_geo.cli import options, report

#: As :data:`rtmdet_geo.annotations.label_sets.FORMATS`, which is not imported for the help text.
_FORMATS = ("coco", "dota", "hrsc", "yolo_obb", "rbox", "voc", "rolabelimg", "gis")


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@options.output_option("Folder to make, or file: coco .json, gis .gpkg or .geojson.")
@click.option("--from", "from_format", type=click.Choice(_FORMATS), required=True, help="Format of SOURCE.")
@click.option("--to", "to_format", type=click.Choice(_FORMATS), required=True, help="Format to write.")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder of the images, for their sizes; gis: of the georeferenced images. They are not copied.",
)
@click.option(
    "--classes",
    metavar="LIST",
    help="Classes in label order: a file with one a line, names with commas, or a public list such as dota_v1.0. "
    "[default: the source's own]",
)
@click.option(
    "--kind",
    type=click.Choice(["rotated", "horizontal", "mask"]),
    help="What to write: rotated boxes or quadrilaterals, enclosing boxes, outlines.  [default: the most that fits]",
)
@click.option(
    "--from-angle",
    metavar="WORDS",
    help="Angles of an rbox SOURCE: any|oc|oc451|le90|le135, rad|deg, cw|ccw, with commas.  [default: any,rad,cw]",
)
@click.option(
    "--to-angle", metavar="WORDS", help="Angles of an rbox output, in the same words.  [default: le90,rad,cw]"
)
@click.option(
    "--corner-order",
    type=click.Choice(["any", "head", "top-left"]),
    default="any",
    show_default=True,
    help="Corners: as they are; clockwise from the first; clockwise from the top left.",
)
@click.option(
    "--hrsc-level", type=click.IntRange(1, 3), default=1, show_default=True, help="Level of HRSC2016's classes."
)
@click.option("--counts-from-one", is_flag=True, help="Boxes of a voc SOURCE name pixels from 1 on, as Pascal VOC's.")
@click.option("--class-column", metavar="NAME", help="Column of a gis SOURCE that names the class.  [class_name]")
@click.option("--layer", metavar="NAME", help="Layer of a gis SOURCE, where the file holds several.")
@click.option("--dst-crs", metavar="CRS", help="CRS of a gis output, such as EPSG:32630.  [default: the images']")
@options.overwrite_option
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def convert(
    ctx: click.Context,
    source: Path,
    output: Path,
    from_format: str,
    to_format: str,
    images: Path | None,
    classes: str | None,
    kind: str | None,
    from_angle: str | None,
    to_angle: str | None,
    corner_order: str,
    hrsc_level: int,
    counts_from_one: bool,
    class_column: str | None,
    layer: str | None,
    dst_crs: str | None,
    overwrite: bool,
    as_json: bool,
    progress_mode: str,
) -> None:
    """Convert SOURCE - a folder of label files, one file, a COCO json or a layer - to another format.

    \b
    Example:
      rtmdet-geo data convert labelTxt -o train.json --from dota --to coco --images images
      rtmdet-geo data convert ships.gpkg -o labels --from gis --to yolo_obb --images scenes

    Coordinates keep all their digits. What the new format cannot hold - marks of difficult objects and crowds,
    outlines - is counted in a warning and in the summary. Formats: coco (json), dota (labelTxt), hrsc (XML), yolo_obb
    (text with shares; classes.txt beside it), rbox (text: cx cy w h angle class difficult), voc (XML, enclosing boxes;
    also of labelImg), rolabelimg (XML, rotated boxes; also of labelImg2), gis (GeoPackage or GeoJSON over
    georeferenced images).
    """
    options.check_stdout_owner(as_json, progress_mode)
    only_with(from_angle, "--from-angle", "--from rbox", from_format == "rbox")
    only_with(to_angle, "--to-angle", "--to rbox", to_format == "rbox")
    only_with(counts_from_one, "--counts-from-one", "--from voc", from_format == "voc")
    only_with(class_column, "--class-column", "--from gis", from_format == "gis")
    only_with(layer, "--layer", "--from gis", from_format == "gis")
    only_with(dst_crs, "--dst-crs", "--to gis", to_format == "gis")

    from rtmdet_geo.annotations.angles import parse_angle
    from rtmdet_geo.annotations.convert import check_request, convert_labels
    from rtmdet_geo.annotations.label_sets import find_classes

    with options.usage_errors():
        angles = [None if words is None else parse_angle(words) for words in (from_angle, to_angle)]
        check_request(output, to_format, kind, images)  # type: ignore[arg-type]
    with report.progress(ctx, progress_mode, "labels", {"source": str(source), "out": str(output)}) as advance:
        summary = convert_labels(
            source,
            output,
            from_format=from_format,  # type: ignore[arg-type]
            to_format=to_format,  # type: ignore[arg-type]
            images=images,
            classes=None if classes is None else find_classes(classes),
            kind=kind,  # type: ignore[arg-type]
            from_angle=angles[0],
            to_angle=angles[1],
            corner_order=corner_order,  # type: ignore[arg-type]
            hrsc_level=hrsc_level,  # type: ignore[arg-type]
            counts_from_one=counts_from_one,
            class_column=class_column,
            layer=layer,
            dst_crs=dst_crs,
            overwrite=overwrite,
            progress=advance,
        )
    counts = ", ".join(f"{number} {name}" for name, number in summary["num_by_class"].items() if number)
    text = f"{summary['out']}: {summary['num_images']} images, {summary['num_objects']} objects" + (
        f": {counts}" if counts else ""
    )
    report.echo_summary(ctx, summary, text, as_json=as_json, progress_mode=progress_mode)


def only_with(value: object, option: str, partner: str, is_given: bool) -> None:
    """Refuse an option that would do nothing.

    Raises:
        click.UsageError: it was given without its partner.
    """
    if value and not is_given:
        raise click.UsageError(f"{option} goes with {partner}.")
