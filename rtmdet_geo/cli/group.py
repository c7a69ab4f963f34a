"""The command group: loads verbs when they are asked for and turns every failure into one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import signal
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any, NoReturn

import click

from rtmdet_geo import __version__
from rtmdet_geo.cli import report
from rtmdet_geo.errors import Cancelled, ExportMismatchError, RTMDetGeoError

EXIT_ERROR = 1
EXIT_VERDICT_NO = 3
EXIT_CANCELLED = 130


class LazyGroup(click.Group):
    """A group that imports the module of a subcommand only when that subcommand (or the help text) is wanted.

    Args:
        commands_at: subcommand name -> ``module:attribute``.
    """

    def __init__(self, *args: Any, commands_at: Mapping[str, str] | None = None, **kwargs: Any) -> None:
        """Remember where the subcommands are."""
        super().__init__(*args, **kwargs)
        self._commands_at = dict(commands_at or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all subcommands in the order in which they were given."""
        return [*self._commands_at, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one subcommand."""
        if cmd_name not in self._commands_at:
            return super().get_command(ctx, cmd_name)
        module_name, _, attribute = self._commands_at[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module_name), attribute)
        return command


class ReportingGroup(LazyGroup):
    """The top group: errors become ``rtmdet-geo: error: ...`` and an exit code; a traceback only with ``-vv``."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the subcommand."""
        with report.reporting(ctx):
            try:
                return super().invoke(ctx)
            except (click.exceptions.Exit, click.ClickException, click.Abort):
                raise
            except (Cancelled, KeyboardInterrupt) as error:
                report.forget_progress(ctx)
                message = str(error) or "nothing was written under the final name"
                event = {"event": "error", "code": EXIT_CANCELLED, "message": f"cancelled; {message}"}
                report.emit_event(ctx, event | {"partial": getattr(error, "partial", None)})
                report.echo(ctx, f"rtmdet-geo: cancelled; {message}")
                ctx.exit(EXIT_CANCELLED)
            except Exception as error:
                _fail(ctx, error)


def _fail(ctx: click.Context, error: Exception) -> NoReturn:
    """Say in one line what went wrong and exit."""
    if isinstance(error, OSError) and error.errno == errno.EPIPE and not isinstance(error, RTMDetGeoError):
        raise error  # click ends quietly when the reader of a pipe has gone
    message, code = describe(error)
    report.forget_progress(ctx)
    hint = message.rpartition("; ")[2] if "; " in message else None  # messages end with what to do next
    report.emit_event(ctx, {"event": "error", "code": code, "message": message, "hint": hint})
    if report.verbosity(ctx) >= 2:
        import traceback

        report.echo(ctx, "".join(traceback.format_exception(error)).rstrip())
    report.echo(ctx, f"rtmdet-geo: error: {message}")
    ctx.exit(code)


def describe(error: Exception) -> tuple[str, int]:
    """Return the one-line message and the exit code of an exception."""
    text = " ".join(str(error).split())
    if notes := getattr(error, "__notes__", None):
        text = "; ".join([text, *notes])
    if isinstance(error, ExportMismatchError):
        return text, EXIT_VERDICT_NO
    if isinstance(error, RTMDetGeoError):
        return text, EXIT_ERROR
    if isinstance(error, MemoryError):
        return "out of memory; use a smaller --batch-size or --tile-size", EXIT_ERROR
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename!r}" if error.filename else ""
        return f"no space left on the disk{where}; free some and run again", EXIT_ERROR
    if isinstance(error, OSError) and error.strerror:
        where = f" {error.filename!r}" if error.filename else ""
        return f"{error.strerror}:{where}; check the path and its permissions", EXIT_ERROR
    return f"unexpected {type(error).__name__}: {text}; run again with -vv and report the traceback", EXIT_ERROR


@click.group(
    cls=ReportingGroup,
    commands_at={
        "detect": "rtmdet_geo.cli.detect:detect",
        "classify": "rtmdet_geo.cli.classify:classify",
        "train": "rtmdet_geo.cli.train:train",
        "evaluate": "rtmdet_geo.cli.evaluate:evaluate",
        "export": "rtmdet_geo.cli.export:export",
        "data": "rtmdet_geo.cli.data:data",
        "models": "rtmdet_geo.cli.models:models",
        "engines": "rtmdet_geo.cli.engines:engines",
        "info": "rtmdet_geo.cli.info:info",
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="rtmdet-geo")
def cli() -> None:
    """RTMDet for satellite scenes: pixels go in, georeferenced polygons come out.

    \b
    Example:
      rtmdet-geo detect scene.tif -o ships.gpkg

    Data go to stdout, everything else to stderr. Exit codes: 0 done (nothing found is done), 1 error, 2 wrong
    command line, 3 ran but the verdict is no, 130 cancelled.
    """


def main(args: list[str] | None = None) -> None:
    """Run the command and exit; the entry point ``rtmdet-geo``.

    Args:
        args: the words after ``rtmdet-geo``; None takes ``sys.argv[1:]``.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        cli.main(args, prog_name="rtmdet-geo")
    except KeyboardInterrupt:  # before or after a verb ran
        click.echo("rtmdet-geo: cancelled", err=True)
        sys.exit(EXIT_CANCELLED)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """SIGINT and SIGTERM alike: remember the wish and stop now.

    The flag is what ``cancelled()`` answers, in case that the exception is swallowed by a callback in foreign code.
    """
    report.take_signal(number)
