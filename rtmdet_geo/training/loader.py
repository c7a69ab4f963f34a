"""Batches ahead of time: threads prepare samples while the network is busy."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from rtmdet_geo.training.crops import CropSampler
from rtmdet_geo.training.labelled import Sample


class BatchLoader:
    """Prepares the next batches in threads while the network is busy (OpenCV and numba leave the interpreter lock)."""

    def __init__(self, sampler: CropSampler, *, batch_size: int, workers: int) -> None:
        """``workers`` threads; 0 draws crops when they are asked for."""
        self.sampler, self.batch_size = sampler, batch_size
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="crops") if workers else None
        self._ahead: dict[tuple[int, int], Future[Sample]] = {}

    def batch(self, iteration: int) -> list[Sample]:
        """Return the samples of one iteration and begin with the next one."""
        if self._pool is None:
            return [self.sampler.draw(iteration, position) for position in range(self.batch_size)]
        for step in (iteration, iteration + 1):
            for position in range(self.batch_size):
                if (step, position) not in self._ahead:
                    self._ahead[step, position] = self._pool.submit(self.sampler.draw, step, position)
        return [self._ahead.pop((iteration, position)).result() for position in range(self.batch_size)]

    def forget(self) -> None:
        """Give up crops drawn ahead, because the sampler has changed since."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()

    def close(self) -> None:
        """Stop the threads; crops not yet begun are given up."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
