"""From any weights to a network and its ModelSpec, also where the file does not say what it is for.

Our own files do. Published files are known by their name. Of other checkpoints, such as one's own from OpenMMLab's
programs, the network follows from the tensors' names and shapes; channels and statistics are taken to be those of the
published recipes, which is said in a warning.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from rtmdet_geo.catalog import CATALOG, find_published, known_spec
from rtmdet_geo.checkpoints import CHECKPOINTS
from rtmdet_geo.errors import WeightsError
from rtmdet_geo.models.classifier import CLASSIFIERS
from rtmdet_geo.models.foreign import ForeignCheckpoint, fit_names, read_foreign
from rtmdet_geo.models.rtmdet import BUILDERS, SIZES
from rtmdet_geo.models.weights import build_from_weights, load_state, weights_sha256
from rtmdet_geo.structures import ModelSpec
from rtmdet_geo.variants import VARIANTS

logger = logging.getLogger(__name__)

#: Family, a layer that it has and those further down have not, and a layer with one row per class.
_FAMILIES = (
    ("rtmdet_r", "rtm_ang.0.weight", "rtm_cls.0.weight"),
    ("rtmdet_ins", "rtm_kernel.0.weight", "rtm_cls.0.weight"),
    ("rtmdet", "rtm_cls.0.weight", "rtm_cls.0.weight"),
    ("cspnext", "head.fc.weight", "head.fc.weight"),
)
_STEM = "stem.0.conv.weight"


def load_network(weights: str | os.PathLike[str]) -> tuple[Any, ModelSpec]:
    """Build the network that weights are for, with these weights, in evaluation mode.

    Args:
        weights: what :func:`rtmdet_geo.models.weights.build_from_weights` takes, or path of another program's
            checkpoint (.pth, .pt, .ckpt, .bin, .safetensors).

    Returns:
        An ``RTMDet`` or ``CSPNeXtClassifier``, and its spec.

    Raises:
        UnknownModelError: neither a file nor a known name.
        WeightsError: the file is missing or damaged, fits none of our networks, or takes other channels than three.
        DownloadError, ChecksumError, OutputError: see :func:`rtmdet_geo.cache.download`.
    """
    text, path = os.fspath(weights), Path(weights)
    if text in CHECKPOINTS or text in CATALOG or not path.is_file():
        return build_from_weights(text)
    published = find_published(path)
    if published is not None and path.parent.resolve() == published.path.parent.resolve():
        return build_from_weights(published.name)  # the cache's: converted once
    if published is None and known_spec(path) is not None:
        return build_from_weights(text)
    foreign = read_foreign(path)
    spec = published.spec() if published is not None else guess_spec(foreign, path)
    builder: Any = {**BUILDERS, **CLASSIFIERS}[spec.architecture]
    network = builder(num_classes=len(spec.classes), in_channels=len(spec.bands))
    names = fit_names(foreign.state, network.state_dict())
    load_state(network, {names[name]: value for name, value in foreign.state.items()}, source=path)
    return network.eval(), spec.model_copy(update={"weights_sha256": weights_sha256(network.state_dict())})


def guess_spec(foreign: ForeignCheckpoint, path: Path) -> ModelSpec:
    """Return what a checkpoint is for, by its tensors' names and shapes; a warning says what is assumed.

    Args:
        foreign: what the file holds.
        path: of the file, for its name.

    Raises:
        WeightsError: no network of ours has such tensors, or they take other channels than three.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in foreign.state.items()}

    def shape_of(suffix: str) -> tuple[int, ...] | None:
        return next((shape for name, shape in shapes.items() if name.endswith(suffix) and len(shape) > 1), None)

    stem = shape_of(_STEM)
    widths = {int(64 * size.widen) // 2: word for word, size in SIZES.items()}
    for family, mark, classes_layer in _FAMILIES:
        class_shape = shape_of(classes_layer)
        if stem is None or class_shape is None or shape_of(mark) is None:
            continue
        architecture = f"{family}_{widths.get(stem[0], '')}"
        if architecture in VARIANTS:
            return _assumed_spec(architecture, class_shape[0], stem[1], foreign.classes, path)
    raise WeightsError(
        f"{str(path)!r} holds no RTMDet and no CSPNeXt of a known size; convert_checkpoint with a ModelSpec says more"
    )


def _assumed_spec(
    architecture: str, num_classes: int, num_channels: int, names: tuple[str, ...], path: Path
) -> ModelSpec:
    """Return the spec of a checkpoint that was made as the published ones of its task were."""
    task = VARIANTS[architecture].task
    similar = [item for item in CHECKPOINTS.values() if item.task == task]
    spec = next((item for item in similar if item.variant == architecture), similar[0]).spec()
    if num_channels != len(spec.bands):
        raise WeightsError(
            f"{str(path)!r} takes {num_channels} channels, of which it says neither names nor statistics; write them "
            "into a file of our own: convert_checkpoint with a ModelSpec"
        )
    is_named = len(names) == num_classes
    classes = names if is_named else tuple(f"class {number}" for number in range(num_classes))
    logger.warning(
        "%s does not say what it is for; taken for %s of %s, channels %s and statistics as in the published recipes",
        path,
        architecture,
        f"classes {', '.join(classes[:5])}{', ...' if num_classes > 5 else ''}"
        if is_named
        else f"{num_classes} classes",
        ", ".join(spec.bands),
    )
    return spec.model_copy(
        update={
            "name": path.stem,
            "architecture": architecture,
            "classes": classes,
            "training_data": "",
            "metrics": {},
            "limits": "channels and statistics are assumed; thresholds are not tuned",
            "licence": "",
            "attribution": "",
        }
    )
