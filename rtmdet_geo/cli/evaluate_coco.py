"""``rtmdet-geo evaluate coco`` and ``evaluate classification``: what was found in photographs against labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rtmdet_geo.cli.evaluate import finish, prepare, report_options


@click.command()
@click.argument("results", type=click.Path(path_type=Path))
@click.argument("annotations", type=click.Path(path_type=Path))
@click.option(
    "--measure",
    type=click.Choice(["boxes", "masks"]),
    help="Whose overlap counts.  [default: boxes where RESULTS has them, else masks]",
)
@report_options
@click.pass_context
def coco(ctx: click.Context, /, results: Path, annotations: Path, measure: str | None, **output: Any) -> None:
    """Score a COCO result file: the twelve figures of COCO, and AP by class.

    \b
    Example:
      rtmdet-geo evaluate coco results.bbox.json instances_val2017.json
      rtmdet-geo evaluate coco results.segm.json instances_val2017.json --measure masks --json

    RESULTS is a JSON list of image_id, category_id, score and bbox (x, y, width, height in px) or segmentation (run
    lengths), ANNOTATIONS the label file. Needs rtmdet-geo[eval].
    """
    prepare(results, annotations, **output)
    from rtmdet_geo.evaluation.coco_files import evaluate_coco_results

    finish(ctx, evaluate_coco_results(results, annotations, measure=measure), **output)  # type: ignore[arg-type]


@click.command()
@click.argument("predictions", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
@report_options
@click.pass_context
def classification(ctx: click.Context, /, predictions: Path, labels: Path, **output: Any) -> None:
    """Score a classifier: the share of images whose class is its first guess, or among the first five.

    \b
    Example:
      rtmdet-geo evaluate classification predictions.csv val
      rtmdet-geo evaluate classification predictions.csv labels.csv --min-ap 0.9

    PREDICTIONS is a CSV file with a header, a row an image: `image` and a score for each class, in columns named by the
    classes; or `image` and the names of classes, the most probable first. LABELS is a folder with a folder of images
    for each class, whose images are called `class/file.jpg`, or a CSV file `image,class` with a header.
    """
    prepare(predictions, labels, **output)
    from rtmdet_geo.evaluation.classification_files import evaluate_classification

    finish(ctx, evaluate_classification(predictions, labels), **output)
