"""How the command talks: logs, warnings and bars on stderr, data and JSON lines on stdout."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import click

from rtmdet_geo.errors import RTMDetGeoWarning

if TYPE_CHECKING:
    from rich.progress import Progress

logger = logging.getLogger("rtmdet_geo")

ProgressCallable = Callable[[int, int], None]
#: Set by SIGINT and SIGTERM; the library asks for it through its ``cancelled`` callables.
cancel_requested = threading.Event()

#: True while signals only set the flag, see :func:`signals_are_polled`.
_is_polled = threading.Event()

_VERBOSITY = "rtmdet_geo.verbosity"
_EVENTS = "rtmdet_geo.jsonl"
_BAR = "rtmdet_geo.bar"


class _ClickHandler(logging.Handler):
    """Writes records to the stderr of the moment (tests swap it)."""

    def __init__(self, ctx: click.Context) -> None:
        super().__init__()
        self._ctx = ctx
        self._with_names = logging.Formatter("%(levelname)s %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line like those of warnings and errors; with ``-v`` it says whose it is."""
        if verbosity(self._ctx) > 0:
            return self._with_names.format(record)
        return f"rtmdet-geo: {record.levelname.lower()}: {super().format(record)}"

    def emit(self, record: logging.LogRecord) -> None:
        echo(self._ctx, self.format(record))


@contextmanager
def reporting(ctx: click.Context) -> Iterator[None]:
    """Send the package's logs and warnings to stderr while a command runs: a warning is one line, each said once."""
    handler = _ClickHandler(ctx)
    old_level, old_propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    said: set[str] = set()

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, RTMDetGeoWarning):
            logger.debug("%s:%d: %s: %s", filename, lineno, category.__name__, message)
        elif str(message) not in said and verbosity(ctx) >= 0:
            said.add(str(message))
            echo(ctx, f"rtmdet-geo: warning: {' '.join(str(message).split())}")

    cancel_requested.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("always", RTMDetGeoWarning)
        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(old_level)
            logger.propagate = old_propagate


@contextmanager
def signals_are_polled() -> Iterator[None]:
    """Let the first SIGINT or SIGTERM only set ``cancel_requested``, for work that saves itself when it is asked.

    A second SIGINT interrupts at once; SIGTERM may come twice from a scheduler and what it started.
    """
    _is_polled.set()
    try:
        yield
    finally:
        _is_polled.clear()


def take_signal(number: int = signal.SIGINT) -> None:
    """Remember the wish to stop; interrupt unless the work polls.

    Raises:
        KeyboardInterrupt: the work does not poll, or this is a SIGINT after a first signal.
    """
    is_first = not cancel_requested.is_set()
    cancel_requested.set()
    if not _is_polled.is_set() or (number == signal.SIGINT and not is_first):
        raise KeyboardInterrupt


def watch_stdin() -> None:
    """Take a line ``cancel`` on stdin for the wish to stop; its end means nothing."""

    def watch() -> None:
        for line in sys.stdin:
            if line.strip() == "cancel":
                cancel_requested.set()

    threading.Thread(target=watch, name="stdin", daemon=True).start()


def verbosity(ctx: click.Context) -> int:
    """Return the number of ``-v`` less the number of ``-q``."""
    return int(ctx.meta.get(_VERBOSITY, 0))


def add_verbosity(ctx: click.Context, amount: int) -> None:
    """Change the verbosity: below 0 errors only, 0 warnings, 1 information, 2 everything and tracebacks."""
    ctx.meta[_VERBOSITY] = verbosity(ctx) + amount
    levels = {0: logging.WARNING, 1: logging.INFO}
    logger.setLevel(logging.ERROR if verbosity(ctx) < 0 else levels.get(verbosity(ctx), logging.DEBUG))


def echo(ctx: click.Context, text: str) -> None:
    """Write one line to stderr, above the bar if there is one."""
    bar: Progress | None = ctx.meta.get(_BAR)
    if bar is not None:
        bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
    else:
        click.echo(text, err=True)


def echo_json(value: Any) -> None:
    """Write one JSON document as one line to stdout; what is no number in JSON (nan, inf) becomes null."""
    click.echo(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False))


def echo_layer(
    ctx: click.Context, layer: Any, text: str, *, to_stdout: bool, as_json: bool, progress_mode: str
) -> None:
    """Write what a verb that makes a layer owes to stdout: GeoJSON features, its summary as JSON or event, or a line.

    Args:
        ctx: of the command.
        layer: GeoDataFrame with its summary in ``attrs["summary"]``.
        text: the summary in one line.
        to_stdout: ``-o -`` was given.
        as_json: ``--json`` was given.
        progress_mode: value of ``--progress``.
    """
    if to_stdout:
        from rtmdet_geo.vector import geojson_features

        for line in geojson_features(layer):
            click.echo(line)
    else:
        echo_summary(ctx, layer.attrs["summary"], text, as_json=as_json, progress_mode=progress_mode)


def echo_summary(
    ctx: click.Context, summary: Mapping[str, Any], text: str, *, as_json: bool, progress_mode: str
) -> None:
    """Write what a verb did to stdout: as JSON, as an event, or in one line unless it shall be quiet.

    Args:
        ctx: of the command.
        summary: what the verb's function returned.
        text: the same in one line.
        as_json: ``--json`` was given.
        progress_mode: value of ``--progress``.
    """
    if as_json:
        echo_json(summary)
    elif progress_mode == "jsonl":
        emit_event(ctx, {"event": "done", **summary})
    elif verbosity(ctx) >= 0:
        click.echo(text)


def choose_progress(ctx: click.Context, mode: str) -> None:
    """Let ``--progress jsonl`` own stdout from the first moment on, so that early failures are events too."""
    ctx.meta[_EVENTS] = mode == "jsonl"


def emit_event(ctx: click.Context, event: dict[str, Any]) -> None:
    """Write an event to stdout if ``--progress jsonl`` is on."""
    if ctx.meta.get(_EVENTS):
        echo_json(event)


def forget_progress(ctx: click.Context) -> None:
    """Lines go straight to stderr again."""
    ctx.meta.pop(_BAR, None)


@contextmanager
def progress(
    ctx: click.Context, mode: str, description: str, start: dict[str, Any], *, in_bytes: bool = False
) -> Iterator[ProgressCallable]:
    """Yield the callable that a library function gets as ``progress``.

    Args:
        ctx: the command's context.
        mode: "auto" (a bar if stderr is a terminal and -q was not given), "bar", "none" or "jsonl".
        description: text beside the bar.
        start: fields of the ``start`` event of jsonl, which is written at once. The caller emits ``done``.
        in_bytes: the bar counts bytes; a total of 0 is unknown.
    """
    with ExitStack() as stack:
        bar = None
        if mode == "jsonl":
            emit_event(ctx, {"event": "start", **start})
        elif mode == "bar" or (mode == "auto" and sys.stderr.isatty() and verbosity(ctx) >= 0):
            bar = stack.enter_context(_open_bar(in_bytes))
            ctx.meta[_BAR] = bar
            stack.callback(forget_progress, ctx)
            task = bar.add_task(description, total=None)

        def advance(done: int, total: int) -> None:
            emit_event(ctx, {"event": "progress", "done": done, "total": total})
            if bar is not None:
                bar.update(task, completed=done, total=total or None)

        yield advance


def _open_bar(in_bytes: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if in_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        transient=True,
    )


def _plain(value: Any) -> Any:
    """Turn numpy numbers, paths, tuples and nan into what JSON has."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if value - value == 0 else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
