"""``rtmdet-geo export``: trained weights to a model file."""

from __future__ import annotations

from pathlib import Path

import click

from rtmdet_geo.cli import options, report


@click.command()
@click.argument("weights", type=click.Path(path_type=Path))
@options.output_option("Model file to write, .onnx.")
@click.option("--half-weights", is_flag=True, help="Store weights as fp16: half the size; arithmetic stays fp32.")
@click.option(
    "--tile-size",
    type=click.IntRange(min=32),
    help="Fix the input to this side in px, a multiple of 32.  [default: any side]",
)
@click.option(
    "--score",
    "score_threshold",
    type=click.FloatRange(0, 1),
    help="Default score threshold that the file names.  [default: what the weights file names]",
)
@click.option(
    "--verify/--no-verify", default=True, show_default=True, help="Compare the file with torch; exit 3 if they differ."
)
@options.overwrite_option
@options.json_option
@options.verbosity_options
@click.pass_context
def export(
    ctx: click.Context,
    weights: Path,
    output: Path,
    half_weights: bool,
    tile_size: int | None,
    score_threshold: float | None,
    verify: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn WEIGHTS, a file or a name of published weights, into a model file for `detect` or `classify`.

    \b
    Example:
      rtmdet-geo export runs/mine/model.safetensors -o mine.onnx --half-weights

    The model card travels in the file; `rtmdet-geo models show mine.onnx` prints it. Published weights go by their name
    in `rtmdet-geo models list` and are fetched when they are not in the cache. Checkpoints of other programs (.pth) are
    taken to be made as the published ones were.
    """
    from rtmdet_geo.backends import require_package

    require_package("torch", extra="export")
    from rtmdet_geo.export import export_model

    stored = export_model(
        weights,
        output,
        score_threshold=score_threshold,
        half_weights=half_weights,
        tile_size=tile_size,
        verify=verify,
        overwrite=overwrite,
    )
    size_mb = output.stat().st_size / 1e6
    if as_json:
        report.echo_json(
            {
                "output": output,
                "bytes": output.stat().st_size,
                "verified": verify,
                "spec": stored.model_dump(mode="json"),
            }
        )
    elif report.verbosity(ctx) >= 0:
        checked = "equals torch" if verify else "not compared with torch"
        click.echo(f"{output}: {stored.name}, {size_mb:.1f} MB, {checked}")
