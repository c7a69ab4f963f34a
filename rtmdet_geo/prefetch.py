"""One stage of the pipeline in a thread of its own, a few items ahead of the one that takes them.

What a stage does while it waits (a read, an engine's run, numba kernels) leaves the interpreter to the others, so the
stages of a scene take the time of the slowest instead of that of all.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

#: Seconds between two calls of what is to be done while nothing comes.
WAIT_SECONDS = 0.05
_END = object()


class Prefetch(Generic[Item]):
    """Iterates in a thread, and gives the items in order; a context manager that ends the thread.

    What the iterable raises is raised where its item would have come. Iterate once, in one thread.

    Args:
        source: what is iterated; of generators, the clean-up runs in the thread, too.
        size: items that may be ready before they are asked for, at least 1.
        waiting: called now and then, in the thread that takes the items, while none is ready; may raise.
        name: of the thread.
    """

    def __init__(
        self, source: Iterable[Item], *, size: int = 1, waiting: Callable[[], None] | None = None, name: str = "ahead"
    ) -> None:
        """Start the thread."""
        self._ready: queue.Queue[tuple[object, BaseException | None]] = queue.Queue(size)
        self._stop = threading.Event()
        self._waiting = waiting
        self._thread = threading.Thread(target=self._work, args=(source,), name=name, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See :meth:`close`."""
        self.close()

    def __iter__(self) -> Iterator[Item]:
        """Yield the items.

        Raises:
            BaseException: what the iterable, or ``waiting``, raised.
        """
        while not self._stop.is_set():
            try:
                item, error = self._ready.get(timeout=WAIT_SECONDS)
            except queue.Empty:
                if self._waiting is not None:
                    self._waiting()
                continue
            if error is not None:
                raise error
            if item is _END:
                return
            yield item  # type: ignore[misc]

    def stop(self) -> None:
        """Tell the thread to end after the item at hand; what was ready is dropped, iterating ends."""
        self._stop.set()

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        self.stop()
        self._thread.join()

    def _work(self, source: Iterable[Item]) -> None:
        error: BaseException | None = None
        try:
            try:
                for item in source:
                    if not self._put((item, None)):
                        break
            finally:
                close = getattr(source, "close", None)
                if close is not None:
                    close()
        except BaseException as problem:  # whatever it is, it belongs to the thread that asked
            error = problem
        self._put((_END, error))

    def _put(self, entry: tuple[object, BaseException | None]) -> bool:
        """Hand an item over as soon as there is room; False: nobody wants it any more."""
        while not self._stop.is_set():
            try:
                self._ready.put(entry, timeout=WAIT_SECONDS)
                return True
            except queue.Full:
                continue
        return False
