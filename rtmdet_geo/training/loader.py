"""Batches ahead of time: threads prepare samples while the network is busy."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from rtmdet_geo.training.labelled import Sampler


class BatchLoader:
    """Prepares the next samples in threads (OpenCV and numba leave the interpreter lock).

    Args:
        sampler: draws samples.
        positions: of this process in the batch of every iteration.
        iterations: length of the training; nothing is prepared beyond it.
        workers: threads; 0 draws samples when they are asked for.
    """

    def __init__(self, sampler: Sampler, *, positions: range, iterations: int, workers: int) -> None:
        """Start the threads."""
        self.sampler, self.positions, self.iterations = sampler, positions, iterations
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="samples") if workers else None
        self._ahead: dict[tuple[int, int], Future[Any]] = {}

    def batch(self, iteration: int) -> list[Any]:
        """Return the samples of one iteration and begin with the next one.

        Raises:
            AnnotationError: an image does not decode; see :meth:`Sampler.draw`.
        """
        if self._pool is None:
            return [self.sampler.draw(iteration, position) for position in self.positions]
        for step in range(iteration, min(iteration + 2, self.iterations)):
            for position in self.positions:
                if (step, position) not in self._ahead:
                    self._ahead[step, position] = self._pool.submit(self.sampler.draw, step, position)
        return [self._ahead.pop((iteration, position)).result() for position in self.positions]

    def forget(self) -> None:
        """Give up samples drawn ahead, because the sampler has changed since."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Stop the threads; samples not yet begun are given up."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
