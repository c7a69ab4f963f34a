"""Options that several verbs share, spelled as rasterio's rio where it has one.

======================= =========== ========== =========== ====== ========== =====
verb                    -o/--output -m/--model --overwrite --json --progress -v/-q
======================= =========== ========== =========== ====== ========== =====
detect                  x           x          x           x      x          x
classify                x           x          x           x      x          x
train                   x                      x           x      x          x
evaluate dota                                  x           x      x          x
evaluate hrsc                                  x           x      x          x
evaluate coco                                  x           x                 x
evaluate classification                        x           x                 x
evaluate layers         x                      x           x                 x
evaluate model                                 x           x      x          x
export                  x                      x           x                 x
data convert            x                      x           x      x          x
data stats                                     x           x      x          x
data show               x                      x           x      x          x
data split              x                      x           x      x          x
data merge              x                      x           x      x          x
data submission         x                      x           x      x          x
data check-submission                                      x                 x
data check                                                 x      x          x
data chips              x                      x           x      x          x
models download                                            x      x          x
models list                                                x                 x
models show                                                x                 x
engines                                                    x                 x
info                                                       x                 x
======================= =========== ========== =========== ====== ========== =====
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from rtmdet_geo.backends import BACKEND_NAMES, PRECISIONS
from rtmdet_geo.cli import report
from rtmdet_geo.errors import ConfigError, OutputError

Command = TypeVar("Command", bound=Callable[..., Any])


def verbosity_options(function: Command) -> Command:
    """Add ``-v`` and ``-q``; the values go to the context, not to the command."""

    def louder(ctx: click.Context, parameter: click.Parameter, value: int) -> None:
        report.add_verbosity(ctx, value)

    def quieter(ctx: click.Context, parameter: click.Parameter, value: int) -> None:
        report.add_verbosity(ctx, -value)

    function = click.option(
        "-q", "--quiet", count=True, expose_value=False, callback=quieter, help="Errors only: no warnings, no bar."
    )(function)
    return click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=louder,
        help="Say more; -vv says everything and shows tracebacks.",
    )(function)


model_option = click.option(
    "-m",
    "--model",
    metavar="NAME|PATH",
    help="Model by catalogue name or model file.  [default: the bundled model, see `rtmdet-geo models list`]",
)

overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what is already at the output's place.")

json_option = click.option("--json", "as_json", is_flag=True, help="Write a JSON object to stdout, nothing else.")


def _choose_progress(ctx: click.Context, parameter: click.Parameter, value: str) -> str:
    report.choose_progress(ctx, value)
    return value


progress_option = click.option(
    "--progress",
    "progress_mode",
    type=click.Choice(["auto", "bar", "none", "jsonl"]),
    default="auto",
    show_default=True,
    callback=_choose_progress,
    help="Bar on stderr (auto: only on a terminal), or JSON lines start/progress/error/done on stdout.",
)

backend_option = click.option(
    "--backend",
    type=click.Choice(BACKEND_NAMES),
    default="auto",
    show_default=True,
    help="Engine; auto is the best that is here: `rtmdet-geo engines` says which, and why.",
)

device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or auto: a GPU if the engine can use one."
)

_precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Of the arithmetic; auto: fp16 with tensorrt, else fp32 or what a model file was exported to.",
)

_compile_option = click.option(
    "--compile", "compiled", is_flag=True, help="torch only: compile the network first, which takes minutes."
)

threads_option = click.option(
    "--threads", type=click.IntRange(min=1), help="CPU threads of the engine.  [default: one per usable core]"
)


def engine_options(function: Command) -> Command:
    """Add what :func:`rtmdet_geo.backends.open_backend` is asked for: backend, device, precision, compiled, threads."""
    for option in (threads_option, _compile_option, _precision_option, device_option, backend_option):
        function = option(function)
    return function


def batch_size_option(what: str) -> Callable[[Command], Command]:
    """Return ``--batch-size``; ``what`` names that which is batched."""
    return click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help=f"{what} per engine call.  [default: the engine's: 1 on a CPU, 8 on a GPU]",
    )


def output_option(help_text: str, *, required: bool = True) -> Callable[[Command], Command]:
    """Return ``-o/--output PATH``."""
    return click.option(
        "-o", "--output", type=click.Path(path_type=Path, allow_dash=True), required=required, help=help_text
    )


def parse_bands(values: tuple[str, ...]) -> list[int | str] | None:
    """Turn ``-b`` words into 1-based band numbers or band names; none given is None."""
    return [int(value) if value.isdecimal() else value for value in values] or None


@contextmanager
def usage_errors() -> Iterator[None]:
    """Make a usage error, exit code 2, of what the library says of values that the command line alone shows.

    Raises:
        click.UsageError: they are outside their range, or do not go together.
    """
    try:
        yield
    except (ConfigError, OutputError) as error:
        raise click.UsageError(f"{error}.") from error


def check_stdout_owner(as_json: bool, progress_mode: str, output: Path | None = None) -> None:
    """Refuse two owners of stdout.

    Raises:
        click.UsageError: more than one of ``--json``, ``--progress jsonl`` and ``-o -``.
    """
    owners = [
        name
        for name, is_on in (
            ("--json", as_json),
            ("--progress jsonl", progress_mode == "jsonl"),
            ("-o -", output == Path("-")),
        )
        if is_on
    ]
    if len(owners) > 1:
        raise click.UsageError(f"{' and '.join(owners)} both write to stdout; choose one.")
