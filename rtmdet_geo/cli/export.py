"""``rtmdet-geo export``: weights, or a model file, to a model file or a TensorRT engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rtmdet_geo.cli import options, report

if TYPE_CHECKING:
    from rtmdet_geo.structures import FilePrecision


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@options.output_option("Model file to write, .onnx; or .engine, for TensorRT on this machine's GPU.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    help="What convolutions compute in: fp16 is for GPUs, int8 for CPUs.  [default: fp32; of a .engine fp16]",
)
@click.option("--half-weights", is_flag=True, help="Store fp32 weights as fp16: half the size, the same arithmetic.")
@click.option(
    "--tile-size",
    type=click.IntRange(min=32),
    help="Fix the input to this side in px, a multiple of 32.  [default: any side; of a .engine MODEL's tile size]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Fix the number of tiles at once; of a .engine the most.  [default: any; of a .engine 8]",
)
@click.option("--device", default="auto", show_default=True, help=".engine: the GPU to build for, cuda or cuda:N.")
@click.option(
    "--compatible", is_flag=True, help=".engine: for other GPUs of the same generation as well; perhaps slower."
)
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
    precision: FilePrecision | None,
    half_weights: bool,
    tile_size: int | None,
    batch_size: int | None,
    device: str,
    compatible: bool,
    score_threshold: float | None,
    verify: bool,
    verify_on: tuple[Path, ...],
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn MODEL into a model file for `detect` or `classify`, or into a TensorRT engine.

    \b
    Example:
      rtmdet-geo export runs/mine/model.safetensors -o mine.onnx --half-weights
      rtmdet-geo export mine.onnx -o mine_fp16.onnx --precision fp16

    MODEL is a weights file, a name of published or bundled weights, or a fp32 model file (.onnx), which needs no torch.
    The model card travels in the file; `rtmdet-geo models show mine.onnx` prints it, with the differences that were
    measured. Published weights go by their name in `rtmdet-geo models list` and are fetched when they are not in the
    cache. Checkpoints of other programs (.pth) are taken to be made as the published ones were. int8 files are
    calibrated on the tiles that they are compared on.

    A .engine is built on the machine that is to run it, which takes minutes, and is always compared; its card lies
    beside it (.engine.json). `detect` builds and keeps one by itself where TensorRT and a GPU are.
    """
    from rtmdet_geo.catalog import ENGINE_SUFFIX
    from rtmdet_geo.cli.models import describe_differences
    from rtmdet_geo.export import export_engine, export_model, is_model_file, stored_file

    common: dict[str, Any] = {
        "score_threshold": score_threshold,
        "tile_size": tile_size,
        "batch_size": batch_size,
        "overwrite": overwrite,
    }
    is_file = is_model_file(str(stored_file(model, half_weights=half_weights)))
    reference = str(model) if is_file else "torch"
    if output.suffix.lower() == ENGINE_SUFFIX:
        _refuse(ctx, "verify", "verify_on", "half_weights", why="not for a .engine, which is always compared;")
        with report.progress(ctx, "auto", f"building {output.name}", {}) as advance:
            stored = export_engine(
                model,
                output,
                precision=precision,
                device=device,
                compatible=compatible,
                progress=lambda _, step, steps: advance(step, steps),
                **common,
            )
        reference = f"{model} in fp32"
    else:
        _refuse(ctx, "device", "compatible", why="for a .engine only;")
        if not verify:
            _refuse(ctx, "verify_on", why="--no-verify compares nothing;")
        stored = export_model(
            model,
            output,
            precision=precision or "fp32",
            half_weights=half_weights,
            verify=verify,
            verify_on=verify_on,
            **common,
        )
    size = output.stat().st_size
    if as_json:
        spec = stored.model_dump(mode="json")
        against = reference if verify else None
        report.echo_json({"output": output, "bytes": size, "verified": verify, "compared_with": against, "spec": spec})
    elif report.verbosity(ctx) >= 0:
        checked = (
            f"compared with {reference}: {describe_differences(stored)}" if verify else f"not compared with {reference}"
        )
        click.echo(f"{output}: {stored.name}, {stored.precision}, {size / 1e6:.1f} MB, {checked}")


def _refuse(ctx: click.Context, *names: str, why: str) -> None:
    """Refuse options that do not go with the output's ending.

    Raises:
        click.UsageError: one was given.
    """
    for name in names:
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')}: {why} leave it out.")
