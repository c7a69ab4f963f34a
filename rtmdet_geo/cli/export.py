"""``rtmdet-geo export``: weights, or a model file, to a model file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from rtmdet_geo.cli import options, report

if TYPE_CHECKING:
    from rtmdet_geo.structures import FilePrecision, ModelSpec


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@options.output_option("Model file to write, .onnx.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="What convolutions compute in: fp16 is for engines on GPUs, int8 for CPUs.",
)
@click.option("--half-weights", is_flag=True, help="Store fp32 weights as fp16: half the size, the same arithmetic.")
@click.option(
    "--tile-size",
    type=click.IntRange(min=32),
    help="Fix the input to this side in px, a multiple of 32.  [default: any side]",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Fix the number of tiles at once.  [default: any]")
@click.option(
    "--score",
    "score_threshold",
    type=click.FloatRange(0, 1),
    help="Default score threshold that the file names.  [default: what MODEL names]",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare the file with MODEL on the same tiles; exit 3 if they differ.",
)
@click.option(
    "--verify-on",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="FILE_OR_FOLDER",
    help="Scene, picture or folder to take tiles from; repeatable.  [default: tiles of the package]",
)
@options.overwrite_option
@options.json_option
@options.verbosity_options
@click.pass_context
def export(
    ctx: click.Context,
    model: Path,
    output: Path,
    precision: FilePrecision,
    half_weights: bool,
    tile_size: int | None,
    batch_size: int | None,
    score_threshold: float | None,
    verify: bool,
    verify_on: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn MODEL into a model file for `detect` or `classify`.

    \b
    Example:
      rtmdet-geo export runs/mine/model.safetensors -o mine.onnx --half-weights

    MODEL is a weights file, a name of published weights, or a fp32 model file (.onnx), which needs no torch. The model
    card travels in the file; `rtmdet-geo models show mine.onnx` prints it, with the differences that were measured.
    Published weights go by their name in `rtmdet-geo models list` and are fetched when they are not in the cache.
    Checkpoints of other programs (.pth) are taken to be made as the published ones were. int8 files are calibrated on
    the tiles that they are compared on.
    """
    from rtmdet_geo.export import export_model, is_model_file

    stored = export_model(
        model,
        output,
        score_threshold=score_threshold,
        precision=precision,
        half_weights=half_weights,
        tile_size=tile_size,
        batch_size=batch_size,
        verify=verify,
        verify_on=verify_on,
        overwrite=overwrite,
    )
    if as_json:
        report.echo_json(
            {
                "output": output,
                "bytes": output.stat().st_size,
                "verified": verify,
                "compared_with": ("model file" if is_model_file(model) else "torch") if verify else None,
                "spec": stored.model_dump(mode="json"),
            }
        )
    elif report.verbosity(ctx) >= 0:
        reference = str(model) if is_model_file(model) else "torch"
        checked = f"compared with {reference}: {_in_words(stored)}" if verify else f"not compared with {reference}"
        click.echo(f"{output}: {stored.name}, {stored.precision}, {output.stat().st_size / 1e6:.1f} MB, {checked}")


def _in_words(spec: ModelSpec) -> str:
    """Say measured differences in one line."""
    found = spec.differences
    words = [f"boxes within {found['boxes_px']:g} px"] if "boxes_px" in found else []
    words.append(f"scores within {found['scores']:g}")
    if "matched" in found:
        words.append(f"{found['matched']:.0f} detections matched, {found['unmatched']:.0f} not")
    return ", ".join(words)
