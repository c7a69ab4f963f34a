"""``rtmdet-geo classify``: what images show, or what each cell of a grid over a scene shows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from rtmdet_geo.cli import options, report

if TYPE_CHECKING:
    from rtmdet_geo.backends.classify import Classifier
    from rtmdet_geo.classify import Classification

#: Options of the grid, which is only made with ``-o``.
_GRID_OPTIONS = ("chip_size", "overlap", "score_threshold", "gsd", "dst_crs", "driver", "batch_size", "overwrite")


@click.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option(
    "-m",
    "--model",
    metavar="NAME|PATH",
    help="Classifier: published weights by name, see `rtmdet-geo models list`, a model file or a weights file.",
)
@options.output_option(
    "Vector file to write (.gpkg, .fgb, .parquet, .geojson, .geojsonl, .shp, .shp.zip or .csv): IMAGE is then a scene, "
    "and each cell of a grid over it is classified. '-' writes GeoJSON features (EPSG:4326), one a line, to stdout.",
    required=False,
)
@click.option(
    "--top-k", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to tell, most probable first."
)
@click.option(
    "-b",
    "--bidx",
    "bands",
    multiple=True,
    metavar="NUMBER|NAME",
    help="Band of the image for the model's next channel, counted from 1 or by name; repeat.  [default: by name]",
)
@click.option("--nodata", type=float, help="Value of pixels without data.  [default: what the image says]")
@click.option(
    "--chip-size",
    type=click.IntRange(min=1),
    help="With -o: side in px of what the model sees at once.  [default: the model's]",
)
@click.option(
    "--overlap",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="With -o: px that neighbouring chips share; cells are smaller than chips by as much.",
)
@click.option(
    "--score",
    "score_threshold",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="With -o: leave out cells whose best class is less probable.",
)
@click.option(
    "--gsd",
    type=click.FloatRange(min=0, min_open=True),
    help="With -o: ground sample distance of the scene in metres per pixel.  [default: from its georeference]",
)
@click.option("--dst-crs", metavar="CRS", help="With -o: CRS of the output, such as EPSG:4326.  [default: the scene's]")
@click.option(
    "-f",
    "--driver",
    metavar="NAME",
    help="With -o: GPKG, FlatGeobuf, Parquet, GeoJSON, GeoJSONSeq, 'ESRI Shapefile' or CSV.  "
    "[default: by the output's ending]",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="With -o: chips per engine call."
)
@options.overwrite_option
@options.backend_option
@options.threads_option
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, or auto: cuda for weights where there is one; model files run on the CPU.",
)
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def classify(
    ctx: click.Context,
    /,
    images: tuple[str, ...],
    model: str | None,
    output: Path | None,
    top_k: int,
    bands: tuple[str, ...],
    nodata: float | None,
    backend: str,
    threads: int | None,
    device: str,
    as_json: bool,
    progress_mode: str,
    **grid: Any,
) -> None:
    """Name what images show, or with -o what each cell of a grid over a scene shows.

    \b
    Example:
      rtmdet-geo classify photo.jpg -m cspnext_tiny_imagenet
      rtmdet-geo classify scene.tif -m landcover.onnx -o cells.gpkg --chip-size 64

    An image is resized and its centre cut out, as the published classifiers were tested; a scene is cut into chips that
    are seen whole. The classes go to stdout, unless -o, --json or --progress jsonl owns it.
    """
    options.check_stdout_owner(as_json, progress_mode, output)
    if model is None:
        raise click.UsageError(f"Missing option '-m' / '--model': no classifier comes with the package. {_published()}")
    shared: dict[str, Any] = {"bands": options.parse_bands(bands), "nodata": nodata, "top_k": top_k}
    engine: dict[str, Any] = {"backend": backend, "threads": threads, "device": device}
    if output is not None:
        if len(images) > 1:
            raise click.UsageError(f"-o takes one scene, not {len(images)} images.")
        _classify_scene(ctx, images[0], output, model, as_json, progress_mode, **shared, **engine, **grid)
        return
    for name in _GRID_OPTIONS:
        if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-').removesuffix('-threshold')} needs -o PATH.")

    from rtmdet_geo.backends.classify import open_classifier
    from rtmdet_geo.classify import classify_file

    with report.progress(ctx, progress_mode, "classify", {"images": list(images), "model": model}) as advance:
        classifier = open_classifier(model, **engine)
        found = []
        for number, path in enumerate(images, 1):
            found.append(classify_file(classifier, path, **shared))
            if not as_json and progress_mode != "jsonl":
                click.echo(_format_image(path, found[-1]))
            advance(number, len(images))
    if as_json:
        report.echo_json(_image_facts(classifier, images, found))
    elif progress_mode == "jsonl":
        report.emit_event(ctx, {"event": "done", **_image_facts(classifier, images, found)})


def _classify_scene(
    ctx: click.Context,
    scene: str,
    output: Path,
    model: str,
    as_json: bool,
    progress_mode: str,
    **settings: Any,
) -> None:
    from rtmdet_geo.classify import classify_scene, describe_cells

    to_stdout = output == Path("-")
    start = {"scene": scene, "output": str(output), "model": model}
    with report.progress(ctx, progress_mode, "classify", start) as advance:
        result = classify_scene(
            scene,
            None if to_stdout else output,
            model=model,
            progress=advance,
            cancelled=report.cancel_requested.is_set,
            **settings,
        )
    text = describe_cells(result)
    report.echo_layer(ctx, result, text, to_stdout=to_stdout, as_json=as_json, progress_mode=progress_mode)


def _published() -> str:
    from rtmdet_geo.checkpoints import CHECKPOINTS

    names = [checkpoint.name for checkpoint in CHECKPOINTS.values() if checkpoint.task == "classification"]
    return f"Give a model file or published weights: {', '.join(names)}."


def _format_image(path: str, found: Classification) -> str:
    """Return the path and, one a line, the classes with their probabilities."""
    lines = [f"  {score:.4f}  {name}" for name, score in zip(found.class_names, found.scores, strict=True)]
    return "\n".join([path, *lines])


def _image_facts(classifier: Classifier, images: tuple[str, ...], found: list[Classification]) -> dict[str, Any]:
    """Return what ``--json`` writes."""
    from rtmdet_geo.run_record import model_record

    return {
        "model": model_record(classifier.spec, classifier.path),
        "images": [
            {
                "image": path,
                "classes": [
                    {"class_id": label, "class_name": name, "score": score}
                    for label, name, score in zip(one.labels, one.class_names, one.scores, strict=True)
                ],
            }
            for path, one in zip(images, found, strict=True)
        ],
    }
