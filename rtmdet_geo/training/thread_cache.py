"""A cache that threads share: what several of them ask for at once is made once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ThreadCache(Generic[T]):
    """Keeps what was asked for last, within a budget.

    What weighs more than the whole budget is not kept, and a budget of 0 keeps nothing. Threads that ask for the same
    thing at the same time wait for one of them to make it.

    Args:
        budget: what all things kept weigh together at most; those in use elsewhere stay in memory beyond that.
        weigh: weight of a thing.
    """

    def __init__(self, budget: int, weigh: Callable[[T], int]) -> None:
        """Keep nothing yet."""
        self.budget, self._weigh = budget, weigh
        self._kept: OrderedDict[Any, T] = OrderedDict()  # what was asked for last is last
        self._making: dict[Any, Future[T]] = {}
        self._weight = 0
        self._lock = threading.Lock()

    @property
    def weight(self) -> int:
        """Of all that is kept now."""
        return self._weight

    def __len__(self) -> int:
        """Return the number of things kept now."""
        return len(self._kept)

    def get(self, key: Any, make: Callable[[], T]) -> T:
        """Return the thing of a key, made now if it is not kept.

        Args:
            key: hashable name of the thing.
            make: makes it; what it raises goes to every thread that waits for it, and whoever asks next tries again.
        """
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            is_first = key not in self._making
            promise = self._making.setdefault(key, Future())
        if not is_first:
            return promise.result()
        try:
            made = make()
        except BaseException as error:  # whatever it is, those who wait must hear of it
            with self._lock:
                del self._making[key]
            promise.set_exception(error)
            raise
        with self._lock:
            del self._making[key]
            self._keep(key, made)
        promise.set_result(made)
        return made

    def _keep(self, key: Any, made: T) -> None:
        """Make room for a thing and keep it."""
        weight = self._weigh(made)
        if weight > self.budget:
            return
        while self._weight + weight > self.budget:
            _, oldest = self._kept.popitem(last=False)
            self._weight -= self._weigh(oldest)
        self._kept[key] = made
        self._weight += weight
