"""The processes of a distributed training, as ``torchrun`` starts them; one alone is the usual case."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from rtmdet_geo.errors import ConfigError
from rtmdet_geo.models.devices import find_device

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        device: where this process computes.
        rank: number of this process, from 0; 0 writes all files.
        world: number of processes.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        distributed.all_reduce(total)
        return total / self.world

    def gather(self, item: T) -> list[T]:
        """Return the items of all processes in order of their ranks; any object that pickles."""
        if self.world == 1:
            return [item]
        items: list[Any] = [None] * self.world
        distributed.all_gather_object(items, item)
        return items

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give all processes the first one's tensors, in place."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, 0)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, or be alone.

    Args:
        device: as :func:`rtmdet_geo.models.devices.find_device` takes it; with several processes "auto" and "cuda" mean
            one GPU each, by ``LOCAL_RANK``.

    Yields:
        This process among the others. The group is left again at the end if it was not there before.

    Raises:
        ConfigError: no such device, or one GPU named for several processes.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Processes(find_device(device))
        return
    found = find_device(device)
    if found.type == "cuda":
        if found.index is not None:
            raise ConfigError(f"device {device!r} is one GPU, but {world} processes train: take --device cuda")
        found = find_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(found)
    was_there = distributed.is_initialized()
    if not was_there:
        distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield Processes(found, distributed.get_rank(), distributed.get_world_size())
    finally:
        if not was_there:
            distributed.destroy_process_group()
