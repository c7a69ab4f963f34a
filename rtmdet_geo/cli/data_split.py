"""``rtmdet-geo data split``: DOTA images and labels cut into patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from rtmdet_geo.cli import options, report


def parse_rates(ctx: click.Context, parameter: click.Parameter, value: str) -> tuple[float, ...]:
    """Turn ``0.5,1,1.5`` into numbers.

    Raises:
        click.BadParameter: it is no such list.
    """
    try:
        rates = tuple(float(word) for word in value.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{value!r} is no list of numbers such as 0.5,1,1.5.") from error
    if not all(0.01 <= rate <= 100 for rate in rates):
        raise click.BadParameter(f"{value!r}: rates are from 0.01 to 100.")
    return rates


def tool_option(default: str) -> Callable[[options.Command], options.Command]:
    """Return ``--tool``; ``default`` says what is taken without it."""
    return click.option(
        "--tool",
        type=click.Choice(["devkit", "bboxtoolkit"]),
        help="Whose rules and names: DOTA_devkit's image__rate__x___y, or BboxToolkit's (MMRotate's) "
        f"image__size__x___y.  [default: {default}]",
    )


rates_option = click.option(
    "--rates",
    metavar="LIST",
    default="1",
    show_default=True,
    callback=parse_rates,
    help="Scales at which images are cut, such as 0.5,1,1.5; at 0.5 a patch shows twice the ground.",
)

resume_option = click.option("--resume", is_flag=True, help="Go on from OUT.partial, which a stopped run has left.")


def check_resume(resume: bool, overwrite: bool) -> None:
    """Refuse to go on and to begin anew at once.

    Raises:
        click.UsageError: both were asked for.
    """
    if resume and overwrite:
        raise click.UsageError("--resume goes on and --overwrite begins anew; choose one.")


@click.command()
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "-l",
    "--labels",
    type=click.Path(path_type=Path),
    help="Folder of labelTxt files, one for each image.  [default: none, as for a test set]",
)
@options.output_option("Folder to make: images/, labelTxt/ (bboxtoolkit: annfiles/) and settings.json.")
@tool_option("devkit")
@click.option(
    "--size",
    type=click.IntRange(min=1),
    default=1024,
    show_default=True,
    help="Side of patches in px; bboxtoolkit divides it by the rate.",
)
@click.option(
    "--gap",
    type=click.IntRange(min=0),
    default=200,
    show_default=True,
    help="Px that neighbouring patches share; bboxtoolkit divides it by the rate.",
)
@rates_option
@click.option(
    "--iof",
    "iof_threshold",
    type=click.FloatRange(0, 1),
    default=0.7,
    show_default=True,
    help="Share of an object that has to be inside: with less, devkit marks it difficult, bboxtoolkit leaves it out.",
)
@click.option(
    "--image-share",
    "image_threshold",
    type=click.FloatRange(0, 1),
    help="bboxtoolkit: windows with no more image than this share are left out.  [default: 0.6]",
)
@click.option(
    "--pad/--no-pad",
    default=True,
    show_default=True,
    help="Fill up patches that reach beyond the image, black or (bboxtoolkit) grey.",
)
@click.option(
    "--format",
    "image_format",
    type=click.Choice(["png", "jpg", "tif", "bmp"]),
    default="png",
    show_default=True,
    help="Of the patches; jpg changes their pixels.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes.  [default: one per usable core]")
@resume_option
@options.overwrite_option
@options.json_option
@options.progress_option
@options.verbosity_options
@click.pass_context
def split(
    ctx: click.Context,
    images: Path,
    labels: Path | None,
    output: Path,
    tool: str | None,
    size: int,
    gap: int,
    rates: tuple[float, ...],
    iof_threshold: float,
    image_threshold: float | None,
    pad: bool,
    image_format: str,
    workers: int | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    progress_mode: str,
) -> None:
    """Cut DOTA IMAGES and their labels into patches for training or testing.

    \b
    Example:
      rtmdet-geo data split trainval/images -l trainval/labelTxt -o dota_ss/trainval --tool bboxtoolkit
      rtmdet-geo data split test/images -o dota_ms/test --rates 0.5,1,1.5 --gap 500

    Windows, cut objects and file names are those of the tool, to the digit. Each process holds one image in memory. A
    stopped run leaves OUT.partial, and --resume does only what is not finished.
    """
    options.check_stdout_owner(as_json, progress_mode)
    check_resume(resume, overwrite)
    if image_threshold is not None and tool != "bboxtoolkit":
        raise click.UsageError("--image-share goes with --tool bboxtoolkit.")
    from rtmdet_geo.dota.rules import SplitRules
    from rtmdet_geo.dota.split import split_dota

    share = 0.6 if image_threshold is None else image_threshold
    with options.usage_errors():
        rules = SplitRules(tool or "devkit", size, gap, rates, iof_threshold, share, pad)  # type: ignore[arg-type]
    start = {"images": str(images), "out": str(output)}
    with report.signals_are_polled(), report.progress(ctx, progress_mode, "images", start) as advance:
        summary = split_dota(
            images,
            labels,
            output,
            **asdict(rules),
            image_format=image_format,  # type: ignore[arg-type]
            workers=workers,
            resume=resume,
            overwrite=overwrite,
            progress=advance,
            cancelled=report.cancel_requested.is_set,
        )
    reused = f", {summary['reused']} of an earlier run" if summary["reused"] else ""
    objects = f", {summary['objects']} objects ({summary['difficult']} difficult)" if labels is not None else ""
    text = f"{summary['out']}: {summary['tiles']} patches of {summary['images']} images{reused}{objects}"
    report.echo_summary(ctx, summary, text, as_json=as_json, progress_mode=progress_mode)
