"""``rtmdet-geo evaluate model``: a model over labelled images, scored by the labels' own protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rtmdet_geo.cli import options, report
from rtmdet_geo.cli.data_split import rates_option
from rtmdet_geo.cli.evaluate import finish, prepare, protocol_option, report_options


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("images", type=click.Path(path_type=Path))
@click.argument("labels", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "label_format",
    type=click.Choice(["dota", "hrsc", "rbox", "coco"]),
    default="dota",
    show_default=True,
    help="Of LABELS: folder of DOTA's text, HRSC2016's XML or text of rotated boxes (ships), or COCO's file.",
)
@protocol_option
@rates_option
@options.batch_size_option("dota: patches")
@click.option(
    "--results", type=click.Path(path_type=Path), help="Keep what is found: folder of result files; coco: .json file."
)
@options.engine_options
@options.progress_option
@report_options
@click.pass_context
def model(
    ctx: click.Context,
    /,
    model: str,
    images: Path,
    labels: Path,
    label_format: str,
    protocol: str,
    rates: tuple[float, ...],
    batch_size: int | None,
    results: Path | None,
    backend: str,
    device: str,
    precision: str,
    compiled: bool,
    threads: int | None,
    progress_mode: str,
    **output: Any,
) -> None:
    """Run MODEL (name or file) over IMAGES and score what it finds against LABELS.

    \b
    Example:
      rtmdet-geo evaluate model rtmdet_r_tiny_dota val/images val/labelTxt
      rtmdet-geo evaluate model rtmdet_tiny_coco val2017 instances_val2017.json --format coco --min-ap 0.4

    Images are shown, and results kept, as the published tests do: DOTA in patches, others whole. The protocol is that
    of `evaluate dota`, `hrsc` or `coco`. Images without labels are left out.
    """
    options.check_stdout_owner(output["as_json"], progress_mode)
    prepare(images, labels, *([model] if Path(model).is_file() else []), **output)
    from rtmdet_geo.images import load_model
    from rtmdet_geo.model_evaluation import evaluate_model

    start = {"model": model, "images": str(images), "labels": str(labels)}
    with report.signals_are_polled(), report.progress(ctx, progress_mode, "images", start) as advance:
        result = evaluate_model(
            load_model(model, backend=backend, device=device, precision=precision, compiled=compiled, threads=threads),
            images,
            labels,
            label_format=label_format,  # type: ignore[arg-type]
            protocol=protocol,  # type: ignore[arg-type]
            rates=rates,
            batch_size=batch_size,
            results=results,
            overwrite=output["overwrite"],
            progress=advance,
            cancelled=report.cancel_requested.is_set,
        )
    finish(ctx, result, progress_mode=progress_mode, **output)
