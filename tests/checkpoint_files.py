"""Checkpoint files as OpenMMLab's programs write them, made with stand-ins of their classes."""

from __future__ import annotations

import datetime
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Stand-ins live in these modules while a file is written, and are gone when it is read.
MODULES = ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer", "mmengine.config")


@contextmanager
def openmmlab() -> Iterator[tuple[type, type]]:
    """Yield (HistoryBuffer, ConfigDict) of a pretended mmengine that can be pickled meanwhile."""

    class HistoryBuffer:
        def __init__(self, log_history: list[float]) -> None:
            self.max_length = 1_000_000
            self._log_history = np.array(log_history)
            self._count_history = np.ones(len(log_history), np.int64)

    class ConfigDict(dict):
        def __setstate__(self, state: object) -> None:
            raise AssertionError("a checkpoint ran a method")

        def __reduce_ex__(self, protocol: Any) -> Any:
            return (ConfigDict, (dict(self),), {"_origin": "config"}, None, iter(self.items()))

    for name in MODULES:
        sys.modules[name] = types.ModuleType(name)
    places = {HistoryBuffer: "mmengine.logging.history_buffer", ConfigDict: "mmengine.config"}
    for made, place in places.items():
        made.__module__, made.__qualname__ = place, made.__name__
        setattr(sys.modules[place], made.__name__, made)
    try:
        yield HistoryBuffer, ConfigDict
    finally:
        for name in MODULES:
            del sys.modules[name]


def write_openmmlab(
    path: Path,
    state: Mapping[str, Tensor],
    *,
    classes: tuple[str, ...] = (),
    averaged: Mapping[str, Tensor] | None = None,
    legacy: bool = False,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint with the structure of mmengine's.

    Args:
        path: file to write.
        state: what ``state_dict`` holds.
        classes: for ``meta``.
        averaged: what ``ema_state_dict`` holds, below ``module.``, with its counter.
        legacy: torch's format before 1.6.
        extra: further entries.
    """
    with openmmlab() as (HistoryBuffer, ConfigDict):
        ordered = OrderedDict(state)
        ordered._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
        content: dict[str, Any] = {
            "meta": {
                "cfg": ConfigDict(model=ConfigDict(type="RTMDet"), lr=np.float64(0.004)),
                "dataset_meta": {"CLASSES": classes, "PALETTE": [(220, 20, 60), np.array([1, 2, 3])]},
                "epoch": np.int64(300),
                "time": datetime.datetime(2022, 9, 2, 11, 24, 14),
                "seed": np.float32(1.5),
                "versions": {1, 2},
                "device": torch.device("cpu"),
                "dtype": torch.float32,
                "size": torch.Size([1, 2]),
            },
            "state_dict": ordered,
            "message_hub": {"log_scalars": {"train/loss": HistoryBuffer([1.0, 0.5])}, "resumed_keys": {"x": True}},
            "optimizer": {"state": {0: {"step": 7, "exp_avg": torch.ones(3)}}, "param_groups": [{"params": [0]}]},
            **(extra or {}),
        }
        if averaged is not None:
            steps = {"steps": torch.tensor(5)}
            content["ema_state_dict"] = OrderedDict(
                **steps, **{f"module.{name}": value for name, value in averaged.items()}
            )
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path
