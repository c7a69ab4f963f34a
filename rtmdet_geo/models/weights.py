"""Weights into networks: published, bundled, other programs' checkpoints; strictly, or a transfer by request.

The files themselves are :mod:`rtmdet_geo.models.weight_files`', whose functions are offered here as well.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtmdet_geo.catalog import CATALOG, SPEC_KEY, read_metadata
from rtmdet_geo.checkpoints import CHECKPOINTS, Checkpoint, download_checkpoint, find_checkpoint
from rtmdet_geo.errors import ConfigError, ModelFileError, OutputError, WeightsError
from rtmdet_geo.models.blocks import ConvModule
from rtmdet_geo.models.classifier import CLASSIFIERS
from rtmdet_geo.models.foreign import fit_names, read_foreign
from rtmdet_geo.models.rtmdet import BUILDERS
from rtmdet_geo.models.transfer import LoadReport, choose_parts, transfer_state
from rtmdet_geo.models.weight_files import State, find_shared, load_state, load_weights, save_weights, weights_sha256
from rtmdet_geo.structures import ModelSpec

__all__ = [
    "LoadReport",
    "build_from_weights",
    "convert_checkpoint",
    "find_shared",
    "fuse_batch_norm",
    "load_checkpoint",
    "load_into",
    "load_state",
    "load_weights",
    "save_weights",
    "weights_sha256",
]

logger = logging.getLogger(__name__)


def load_into(model: nn.Module, weights: str | os.PathLike[str]) -> None:
    """Load weights strictly into a network: what builders do with ``weights=``.

    Args:
        model: network of :mod:`rtmdet_geo.models`.
        weights: see :func:`load_checkpoint`.

    Raises:
        See :func:`load_checkpoint`.
    """
    load_checkpoint(model, weights)


def load_checkpoint(
    model: nn.Module,
    weights: str | os.PathLike[str],
    *,
    parts: Sequence[str] | None = None,
    transfer: bool = False,
    bands: Sequence[str] | None = None,
    source_bands: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> LoadReport:
    """Load weights into a network: strictly, unless parts or a transfer are asked for.

    Args:
        model: network of :mod:`rtmdet_geo.models`; unchanged if anything fails.
        weights: name of published weights (downloaded and converted once) or of a bundled model, or path of a
            safetensors file or of another program's checkpoint (see :mod:`rtmdet_geo.models.foreign`).
        parts: parts of the network to load, such as ("backbone",) from a classifier, or ("backbone", "neck"); strict
            within them, the rest of the file is ignored. None: the whole network.
        transfer: fit to another number of classes (the layers that depend on it keep the network's own values) and of
            bands (see :func:`rtmdet_geo.models.transfer.adapt_bands`). What is not loaded is logged as a warning.
        bands: names of the network's channels, for ``transfer``: kernels of bands are matched by name. Published
            detectors take blue, green, red in this order.
        source_bands: names of the channels that the weights are for, if the file does not say them.
        progress: called with (bytes here, bytes in all) during a download.
        cancelled: True stops a download.

    Returns:
        What was loaded, what was not.

    Raises:
        UnknownModelError: ``weights`` is neither a file nor a known name.
        WeightsError: the file is missing or damaged, or does not fit; missing, unexpected and wrongly shaped keys are
            listed.
        ConfigError: ``parts`` or ``bands`` do not fit the network.
        DownloadError, ChecksumError, OutputError, Cancelled: see :func:`rtmdet_geo.cache.download`.

    Example:
        >>> from rtmdet_geo.models import rtmdet_r_nano
        >>> model = rtmdet_r_nano(num_classes=3, in_channels=4)
        >>> load_checkpoint(model, "sen2ships_r", transfer=True).reinitialised[0]
        'bbox_head.rtm_cls.0.weight'
    """
    if bands is not None and not transfer:
        raise ConfigError("bands= fits weights to other bands, which is a transfer: say transfer=True as well")
    source = os.fspath(weights)
    if source in CHECKPOINTS and parts is None:
        _check_published(model, CHECKPOINTS[source], transfer)
    state, spec = _read_any(weights, progress, cancelled)
    own = model.state_dict()
    names = fit_names(state, own)
    state = {names[name]: value for name, value in state.items()}
    chosen, ignored = list(own), []
    if parts is not None:
        kept, chosen = choose_parts(list(state), list(own), [parts] if isinstance(parts, str) else parts)
        ignored = sorted(set(state) - set(kept))
        state = {name: state[name] for name in kept}
    reinitialised: list[str] = []
    adapted: list[str] = []
    if transfer:
        there = source_bands if source_bands is not None else spec.bands if spec is not None else None
        targets = {name: own[name] for name in chosen}
        state, reinitialised, adapted = transfer_state(state, targets, bands=bands, source_bands=there)
    load_state(model, state, source=source, only=chosen)
    if reinitialised:
        logger.warning("%s: other classes; re-initialised, not loaded: %s", source, ", ".join(reinitialised))
    if adapted:
        logger.warning("%s: other bands; fitted: %s", source, ", ".join(adapted))
    loaded = tuple(name for name in state if name not in {*reinitialised, *adapted})
    logger.info("%s: %d tensors loaded, %d of the file ignored", source, len(loaded), len(ignored))
    return LoadReport(source, loaded, tuple(reinitialised), tuple(adapted), tuple(ignored))


def _read_any(
    weights: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[State, ModelSpec | None]:
    """Return the tensors of a name or path, and the spec if one is known."""
    source = os.fspath(weights)
    if source in CHECKPOINTS:
        return _read_published(CHECKPOINTS[source], progress, cancelled)
    if source in CATALOG:
        return load_weights(CATALOG[source].weights_path)
    path = Path(weights)
    if not path.is_file() and not path.suffix and len(path.parts) == 1:
        find_checkpoint(source)  # raises with near names
    if path.suffix.lower() == ".safetensors" and _has_spec(path):
        return load_weights(path)
    return read_foreign(path).state, None


def _has_spec(path: Path) -> bool:
    """Say whether a safetensors file is ours; a damaged one is, so that its error is told."""
    try:
        return SPEC_KEY in read_metadata(path)
    except ModelFileError:
        return True


def _check_published(model: nn.Module, checkpoint: Checkpoint, transfer: bool) -> None:
    """Refuse weights that cannot fit before they are downloaded."""
    architecture = getattr(model, "architecture", "")
    if architecture != checkpoint.variant:
        fitting = [item.name for item in CHECKPOINTS.values() if item.variant == architecture]
        hint = f"published for it: {', '.join(fitting)}" if fitting else "none are published for it"
        raise WeightsError(
            f"{checkpoint.name!r} are weights of {checkpoint.variant}, not of {architecture or type(model).__name__}; "
            f"{hint}; load_checkpoint(..., parts=('backbone',)) takes a part of them"
        )
    there = len(checkpoint.classes), len(checkpoint.bands)
    here = int(model.num_classes), int(model.in_channels)
    if there != here and not transfer:
        raise WeightsError(
            f"{checkpoint.name!r} has (classes, bands) {there}, the network {here}; "
            "load_checkpoint(..., transfer=True) fits them to other classes and bands"
        )


def _read_published(
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[State, ModelSpec]:
    """Return published weights from the cache; the first time they are downloaded and converted."""
    converted = checkpoint.converted_path
    if converted.is_file():
        try:
            return load_weights(converted)
        except WeightsError as error:
            logger.warning("%s; it is made again", error)
    if not checkpoint.path.is_file():
        logger.info("fetching %s", checkpoint.url)
    original = download_checkpoint(checkpoint.name, progress=progress, cancelled=cancelled)
    try:
        convert_checkpoint(original, converted, checkpoint.spec())
    except (OutputError, WeightsError) as error:  # a cache that somebody else filled; a file of the backbone alone
        logger.info("not converted: %s; %s is read as it is", error, original)
        return read_foreign(original).state, checkpoint.spec()
    return load_weights(converted)


def convert_checkpoint(
    source: str | os.PathLike[str], path: str | os.PathLike[str], spec: ModelSpec, *, half: bool = False
) -> ModelSpec:
    """Write another program's checkpoint as safetensors with its ModelSpec, after loading it strictly into its network.

    Args:
        source: file that :func:`rtmdet_geo.models.foreign.read_foreign` reads.
        path: file to write.
        spec: architecture, classes and bands must fit the weights.
        half: see :func:`save_weights`.

    Returns:
        The spec as written.

    Raises:
        WeightsError: the file is damaged or does not fit.
        OutputError: ``path`` cannot be written.
    """
    foreign = read_foreign(source)
    if foreign.classes and foreign.classes != spec.classes:
        logger.warning("%s names classes %s..., the spec %s...", source, foreign.classes[:3], spec.classes[:3])
    model = _build(spec, source)
    own = model.state_dict()
    names = fit_names(foreign.state, own)
    load_state(model, {names[name]: value for name, value in foreign.state.items()}, source=source)
    return save_weights(model, path, spec, half=half)


def _build(spec: ModelSpec, source: object) -> nn.Module:
    """Return the network that a spec describes, not initialised for anything."""
    builder: Callable[..., nn.Module] | None = {**BUILDERS, **CLASSIFIERS}.get(spec.architecture)
    if builder is None:
        known = ", ".join((*BUILDERS, *CLASSIFIERS))
        raise WeightsError(f"{str(source)!r} names architecture {spec.architecture!r}; known: {known}")
    return builder(num_classes=len(spec.classes), in_channels=len(spec.bands))


def build_from_weights(weights: str | os.PathLike[str]) -> tuple[Any, ModelSpec]:
    """Build the network that weights are for, with these weights, in evaluation mode.

    Args:
        weights: path of one of our safetensors files, or name of published weights or of a bundled model.

    Returns:
        An ``RTMDet`` or ``CSPNeXtClassifier``, and its spec.

    Raises:
        UnknownModelError: neither a file nor a known name.
        WeightsError: see :func:`load_weights` and :func:`load_state`; also if the file has no spec, or one that names
            no builder.
        DownloadError, ChecksumError, OutputError: see :func:`rtmdet_geo.cache.download`.
    """
    state, spec = _read_any(weights)
    if spec is None:
        raise WeightsError(
            f"{os.fspath(weights)!r} does not say what it is for; build the network and use load_checkpoint, or "
            "convert_checkpoint with a ModelSpec"
        )
    model = _build(spec, weights)
    load_state(model, state, source=weights)
    return model.eval(), spec


def fuse_batch_norm(model: nn.Module) -> nn.Module:
    """Return a float32 copy in evaluation mode, batch norms folded into their convolutions; for export.

    With gamma, beta, mean, var of the batch norm: weight * gamma / sqrt(var + eps) and bias beta - mean * gamma /
    sqrt(var + eps), computed in float64. Convolutions shared over levels become separate ones. The copy's keys are no
    longer OpenMMLab's.
    """
    fused = copy.deepcopy(model).float().eval()
    for module in fused.modules():
        if not isinstance(module, ConvModule) or not isinstance(module.bn, nn.BatchNorm2d):
            continue
        conv, norm = module.conv, module.bn
        if norm.running_mean is None or norm.running_var is None:
            raise WeightsError("cannot fuse a batch norm without running statistics; train or load the model first")
        scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
        new = nn.Conv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            conv.stride,  # type: ignore[arg-type]
            padding=conv.padding,  # type: ignore[arg-type]
            groups=conv.groups,
            device=conv.weight.device,
        )
        with torch.no_grad():
            new.weight.copy_((conv.weight.double() * scale.view(-1, 1, 1, 1)).float())
            if new.bias is not None:
                new.bias.copy_((norm.bias.double() - norm.running_mean.double() * scale).float())
        module.conv, module.bn = new, nn.Identity()
    return fused.requires_grad_(False).eval()
