"""Weights into networks: published, bundled, other programs' checkpoints; strictly, or a transfer by request.

The files themselves are :mod:`rtmdet_geo.models.weight_files`', whose functions are offered here as well.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rtmdet_geo.catalog import CATALOG, SPEC_KEY, read_metadata
from rtmdet_geo.checkpoints import CHECKPOINTS, TRANSFER_HINT, Checkpoint, download_checkpoint, find_checkpoint
from rtmdet_geo.errors import ConfigError, ModelFileError, OutputError, UnknownModelError, WeightsError
from rtmdet_geo.models.blocks import ConvModule
from rtmdet_geo.models.classifier import CLASSIFIERS
from rtmdet_geo.models.foreign import fit_names, read_foreign
from rtmdet_geo.models.rtmdet import BUILDERS
from rtmdet_geo.models.transfer import FIRST_CONVOLUTION, LoadReport, choose_parts, is_class_layer, transfer_state
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
    classes: Sequence[str] | None = None,
    source_bands: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> LoadReport:
    """Load weights into a network: strictly, unless parts or a transfer are asked for.

    One line of the log says what was loaded; it is a warning if anything was not, or is doubtful.

    Args:
        model: network of :mod:`rtmdet_geo.models`; unchanged if anything fails.
        weights: name of published weights (downloaded and converted once) or of a bundled model, or path of a
            safetensors file or of another program's checkpoint (see :mod:`rtmdet_geo.models.foreign`).
        parts: parts of the network to load, such as ("backbone",) from a classifier, or ("backbone", "neck"); strict
            within them, the rest of the file is ignored. None: the whole network.
        transfer: fit to another number of classes (the layers that depend on it keep the network's own values) and of
            bands (see :func:`rtmdet_geo.models.transfer.adapt_bands`).
        bands: names of the network's channels in order. With ``transfer`` kernels of bands are matched by name;
            without, weights that are known to be for other bands are refused. Published detectors take blue, green,
            red in this order.
        classes: names of the network's classes in order; told if the weights name others.
        source_bands: names of the channels that the weights are for, if the file does not say them.
        progress: called with (bytes here, bytes in all) during a download.
        cancelled: True stops a download.

    Returns:
        What was loaded, what was not.

    Raises:
        UnknownModelError: ``weights`` is neither a file nor a known name.
        WeightsError: the file is missing or damaged, or does not fit; missing, unexpected and wrongly shaped keys are
            listed.
        ConfigError: ``parts``, ``bands`` or ``source_bands`` contradict the network or the file.
        DownloadError, ChecksumError, OutputError, Cancelled: see :func:`rtmdet_geo.cache.download`.

    Example:
        >>> from rtmdet_geo.models import rtmdet_r_nano
        >>> model = rtmdet_r_nano(num_classes=3, in_channels=4)
        >>> load_checkpoint(model, "sen2ships_r", transfer=True).reinitialised[0]
        'bbox_head.rtm_cls.0.weight'
    """
    parts = [parts] if isinstance(parts, str) else parts
    source = os.fspath(weights)
    _check_before_reading(model, source, parts, transfer, bands)
    state, spec, source_classes = _read_any(weights, progress, cancelled)
    own = model.state_dict()
    names = fit_names(state, own)
    state = {names[name]: value for name, value in state.items()}
    chosen, ignored = list(own), []
    if parts is not None:
        kept, chosen = choose_parts(list(state), list(own), parts)
        ignored = sorted(set(state) - set(kept))
        state = {name: state[name] for name in kept}
    reinitialised: list[str] = []
    adapted: list[str] = []
    remarks: list[str] = []
    if FIRST_CONVOLUTION in chosen:
        bands, source_bands, remarks = _settle_bands(source, spec, bands, source_bands, transfer)
    if transfer:
        targets = {name: own[name] for name in chosen}
        state, reinitialised, adapted = transfer_state(state, targets, bands=bands, source_bands=source_bands)
    load_state(model, state, source=source, only=chosen)
    if not reinitialised and any(is_class_layer(name) for name in chosen):
        remarks += _compare_classes(source_classes, classes)
    changed = {*reinitialised, *adapted}
    report = LoadReport(
        source,
        tuple(name for name in state if name not in changed),
        tuple(reinitialised),
        tuple(adapted),
        tuple(ignored),
        tuple(name for name in own if name not in set(chosen)),
        tuple(remarks),
    )
    logger.log(logging.INFO if report.is_exact else logging.WARNING, "%s", report.describe())
    return report


def _check_before_reading(
    model: nn.Module, source: str, parts: Sequence[str] | None, transfer: bool, bands: Sequence[str] | None
) -> None:
    """Refuse what cannot fit before anything is downloaded."""
    if bands is not None and len(bands) != int(model.in_channels):
        raise ConfigError(f"the network has {model.in_channels} channels, got bands={list(bands)!r}")
    if source in CHECKPOINTS:
        architecture = getattr(model, "architecture", type(model).__name__)
        there = bands if bands is not None else int(model.in_channels)
        reason = CHECKPOINTS[source].misfit(architecture, int(model.num_classes), there, parts=parts, transfer=transfer)
        if reason:
            raise WeightsError(reason)


def _settle_bands(
    source: str,
    spec: ModelSpec | None,
    bands: Sequence[str] | None,
    source_bands: Sequence[str] | None,
    transfer: bool,
) -> tuple[Sequence[str] | None, Sequence[str] | None, list[str]]:
    """Return the bands to match by name and those of the weights, or twice None: by number; and remarks."""
    if spec is not None and source_bands is not None and tuple(source_bands) != spec.bands:
        raise ConfigError(
            f"{source!r} says that it is for bands {', '.join(spec.bands)}, not {', '.join(source_bands)}; leave "
            "source_bands= (model.weights_bands in a recipe) out"
        )
    there = spec.bands if spec is not None else source_bands
    if bands is None:
        return None, None, []
    if there is None:
        return None, None, ["its bands are not stated: source_bands= (model.weights_bands in a recipe) names them"]
    if not transfer and len(bands) == len(there) and tuple(bands) != tuple(there):  # another number: by their shapes
        raise WeightsError(
            f"{source!r} is for bands {', '.join(there)}, the network for {', '.join(bands)}; {TRANSFER_HINT}"
        )
    return bands, there, []


def _compare_classes(there: Sequence[str], here: Sequence[str] | None) -> list[str]:
    """Return a remark if both name their classes and the names differ."""
    for number, (one, other) in enumerate(zip(there, here or (), strict=False)):
        if one != other:
            return [f"class {number} was {one!r} and is {other!r}: its layers are kept"]
    return []


def _read_any(
    weights: str | os.PathLike[str],
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[State, ModelSpec | None, tuple[str, ...]]:
    """Return the tensors of a name or path, the spec if one is known, and the class names if they are."""
    source = os.fspath(weights)
    if source in CHECKPOINTS or source in CATALOG:
        if source in CHECKPOINTS:
            state, spec = _read_published(CHECKPOINTS[source], progress, cancelled)
        else:
            state, spec = load_weights(CATALOG[source].weights_path)
        return state, spec, spec.classes
    path = Path(weights)
    if not path.is_file() and not path.suffix and len(path.parts) == 1:
        _check_name(source)
    if path.suffix.lower() == ".onnx":
        raise WeightsError(f"{source!r} is a model file; weights are in .safetensors files, or those of other programs")
    if path.suffix.lower() == ".safetensors" and _has_spec(path):
        state, spec = load_weights(path)
        return state, spec, spec.classes
    foreign = read_foreign(path)
    return foreign.state, None, foreign.classes


def _check_name(name: str) -> None:
    """Refuse what is neither a file nor a name, and say what is near: bundled models, then published weights."""
    near = difflib.get_close_matches(name, CATALOG, n=1, cutoff=0.7)
    if near:
        raise UnknownModelError(f"no weights are named {name!r} and no file has that path; did you mean {near[0]!r}?")
    find_checkpoint(name)


def _has_spec(path: Path) -> bool:
    """Say whether a safetensors file is ours; a damaged one is, so that its error is told."""
    try:
        return SPEC_KEY in read_metadata(path)
    except ModelFileError:
        return True


def _read_published(
    checkpoint: Checkpoint,
    progress: Callable[[int, int], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> tuple[State, ModelSpec]:
    """Return published weights from the cache; the first time they are downloaded and converted.

    The spec is the catalogue's: a converted file may have been written by an older version.
    """
    converted = checkpoint.converted_path
    if converted.is_file():
        try:
            state, stored = load_weights(converted)
        except WeightsError as error:
            logger.warning("%s; it is made again", error)
        else:
            return state, checkpoint.spec().model_copy(update={"weights_sha256": stored.weights_sha256})
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
    state, spec, _ = _read_any(weights)
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
