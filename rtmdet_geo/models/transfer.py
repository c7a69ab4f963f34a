"""What of one network's weights another can use: parts, other classes, other bands; by request, and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rtmdet_geo.errors import ConfigError

State = dict[str, Tensor]

#: The only weight that depends on the bands.
FIRST_CONVOLUTION = "backbone.stem.0.conv.weight"


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading did.

    Attributes:
        source: file or name that the weights came from.
        loaded: names whose values are the file's.
        reinitialised: names that kept the network's own values, because the classes differ.
        adapted: names whose values were made from the file's for other bands.
        ignored: names of the file outside the parts that were asked for.
        untouched: names of the network outside these parts; they kept its own values too.
        remarks: what the names of bands and classes make doubtful, in words.
    """

    source: str
    loaded: tuple[str, ...]
    reinitialised: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def is_exact(self) -> bool:
        """Whether the whole network has the file's values, and nothing is doubtful."""
        return not (self.reinitialised or self.adapted or self.untouched or self.remarks)

    def describe(self) -> str:
        """Return one line that names what was loaded and what was not.

        Example:
            >>> LoadReport("a.pth", ("backbone.x",), reinitialised=("head.fc.bias",), untouched=("neck.y",)).describe()
            'a.pth: 1 tensors loaded; other classes, re-initialised: head.fc.bias; not asked for, re-initialised: neck'
        """
        parts = dict.fromkeys(name.partition(".")[0] for name in self.untouched)
        lists = (
            ("other classes, re-initialised", self.reinitialised),
            ("other bands, fitted", self.adapted),
            ("not asked for, re-initialised", tuple(parts)),
        )
        told = [f"{title}: {', '.join(names)}" for title, names in lists if names]
        return "; ".join((f"{self.source}: {len(self.loaded)} tensors loaded", *told, *self.remarks))


def is_class_layer(name: str) -> bool:
    """Say whether a weight has one row for each class: the last layers for classes of detectors and classifiers."""
    return ".rtm_cls." in name or name.startswith("head.fc.")


def is_transferable(name: str, shape: Sequence[int], own_shape: Sequence[int]) -> bool:
    """Say whether a weight of another shape has that shape because of the number of classes or bands only."""
    shape, own_shape = tuple(shape), tuple(own_shape)
    if len(shape) != len(own_shape):
        return False
    if name == FIRST_CONVOLUTION:
        return shape[0] == own_shape[0] and shape[2:] == own_shape[2:]
    return is_class_layer(name) and shape[1:] == own_shape[1:]


def choose_parts(names: Sequence[str], own: Sequence[str], parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which names of a file, and which of the network, belong to parts such as "backbone" and "neck".

    Raises:
        ConfigError: the network has no such part.
    """
    prefixes = tuple(f"{part}." for part in parts)
    for part, prefix in zip(parts, prefixes, strict=True):
        if not any(name.startswith(prefix) for name in own):
            known = dict.fromkeys(name.partition(".")[0] for name in own)
            raise ConfigError(f"the network has no part {part!r}; its parts: {', '.join(known)}")
    return [name for name in names if name.startswith(prefixes)], [name for name in own if name.startswith(prefixes)]


def transfer_state(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    *,
    bands: Sequence[str] | None = None,
    source_bands: Sequence[str] | None = None,
) -> tuple[State, list[str], list[str]]:
    """Fit weights to a network with other classes or bands.

    Layers with a row per class keep the network's own values if the number of classes differs. The first convolution
    is fitted by :func:`adapt_bands`. Every other difference is left for strict loading to refuse.

    Args:
        state: weights by name.
        own: of the network.
        bands: names of the network's channels; None: only their number counts.
        source_bands: names of the channels that the weights are for.

    Returns:
        The fitted weights; names that keep the network's own values; names that were made for other bands.

    Raises:
        ConfigError: ``bands`` or ``source_bands`` do not fit the shapes, or the latter are not known.
    """
    fitted, reinitialised, adapted = dict(state), [], []
    for name, own_value in own.items():
        value = state.get(name)
        if value is None:
            continue
        if name == FIRST_CONVOLUTION and is_transferable(name, value.shape, own_value.shape):
            new = adapt_bands(value, own_value.shape[1], bands=bands, source_bands=source_bands)
            if new.shape != value.shape or not torch.equal(new, value):
                fitted[name] = new
                adapted.append(name)
        elif value.shape != own_value.shape and is_transferable(name, value.shape, own_value.shape):
            fitted[name] = own_value
            reinitialised.append(name)
    return fitted, reinitialised, adapted


def adapt_bands(
    weight: Tensor, num_bands: int, *, bands: Sequence[str] | None = None, source_bands: Sequence[str] | None = None
) -> Tensor:
    """Return a first convolution for other bands.

    With names a band that the source knows keeps its kernel, and any other gets the mean kernel; without names every
    band gets the mean kernel if the number of bands differs, and nothing changes if it does not. If any kernel is a
    mean, all are multiplied by (bands there / bands here), so that the layer's output keeps its size. Images must be
    normalised band by band as the source's were.

    Args:
        weight: (out, bands there, height, width).
        num_bands: bands here.
        bands: their names.
        source_bands: names of the bands there.

    Returns:
        (out, num_bands, height, width).

    Raises:
        ConfigError: the names do not fit the shapes, or ``source_bands`` are not known.
    """
    num_source = weight.shape[1]
    if bands is None and num_bands == num_source:
        return weight
    mean = weight.mean(dim=1, keepdim=True)
    if bands is None:
        return mean.expand(-1, num_bands, -1, -1) * (num_source / num_bands)
    if source_bands is None:
        raise ConfigError(
            "the file does not name its bands; say them with source_bands= (model.weights_bands in a recipe), such as "
            "('blue', 'green', 'red')"
        )
    if len(bands) != num_bands or len(source_bands) != num_source:
        raise ConfigError(
            f"the network has {num_bands} bands and the weights {num_source}; "
            f"got {list(bands)!r} and {list(source_bands)!r}"
        )
    kernels = [weight[:, [source_bands.index(band)]] if band in source_bands else mean for band in bands]
    is_exact = set(bands) <= set(source_bands)
    return torch.cat(kernels, dim=1) * (1.0 if is_exact else num_source / num_bands)
