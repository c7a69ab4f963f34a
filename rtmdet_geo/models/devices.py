"""Which processor torch runs on."""

from __future__ import annotations

import torch

from rtmdet_geo.errors import ConfigError


def find_device(name: str) -> torch.device:
    """Return the device of that name: "auto" (cuda when there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigError: no such device is here.
    """
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if number else []), *(f"cuda:{index}" for index in range(number))]
    if name == "auto":
        return torch.device("cuda" if number else "cpu")
    if name not in known:
        raise ConfigError(f"device {name!r} is not here; choose one of auto, {', '.join(known)}")
    return torch.device(name)
