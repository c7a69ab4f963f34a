"""A build of TensorRT, seen from outside: how far it is, and the user's wish to end it."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rtmdet_geo.errors import Cancelled

logger = logging.getLogger(__name__)

#: Called with a phase of the build, the step that is done, and the steps of the phase.
Progress = Callable[[str, int, int], None]


@contextmanager
def watched(trt: Any, config: Any, progress: Progress | None) -> Iterator[None]:
    """Forward TensorRT's progress while a block builds, and end the build when a signal comes.

    Only TensorRT 10 and later tell and listen; 8.6 ends when it is done.

    Args:
        trt: the module.
        config: of the build.
        progress: see :data:`Progress`; what it raises ends the build, and is raised after it.

    Raises:
        Cancelled: a signal ended the build, and its handler did not raise anything itself.
    """
    with _signals_held_back() as signals:
        monitor = _make_monitor(trt, progress, signals) if hasattr(trt, "IProgressMonitor") else None
        if monitor is not None:
            config.progress_monitor = monitor
        yield
    if monitor is not None and monitor.error is not None:
        raise monitor.error
    if monitor is not None and signals:
        raise Cancelled("the build of the engine was interrupted; nothing is kept of it")


@contextmanager
def _signals_held_back() -> Iterator[list[int]]:
    """Hold signals back while a block runs, and give them to their handlers after it; yields those that came.

    While TensorRT works, Python handles signals inside of TensorRT's callbacks, which swallow what a handler raises.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)
        logger.warning("the build ends as soon as TensorRT lets it; the same signal again ends the program at once")

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in held:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _make_monitor(trt: Any, progress: Progress | None, signals: list[int]) -> Any:
    """Return TensorRT's monitor that calls ``progress`` and ends the build once a signal came."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            logger.info("TensorRT: %s (%d steps)", phase_name, num_steps)
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps.get(phase_name, 0))

        def _tell(self, phase: str, step: int) -> bool:
            """Call ``progress``; False: the build is to end."""
            if self.error is None and progress is not None:
                try:
                    progress(phase, step, self.steps.get(phase, 0))
                except BaseException as error:
                    self.error = error
            return self.error is None and not signals

    return Monitor()
