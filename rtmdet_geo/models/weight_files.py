"""Weight files: safetensors with a ModelSpec inside; strict loading of their tensors into a network.

A file stores every tensor once: names that share storage (the heads' convolutions) are listed in the metadata key
``shared`` and restored on loading. Matrices and kernels are stored as float16 by default; vectors (biases, batch-norm
statistics) stay float32, because variances may leave float16's range. The spec's ``weights_sha256`` is the hash of what
loading returns and is checked by it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rtmdet_geo.checkpoints import TRANSFER_HINT
from rtmdet_geo.errors import ChecksumError, WeightsError
from rtmdet_geo.models.transfer import is_transferable
from rtmdet_geo.outputs import staged_output
from rtmdet_geo.structures import ModelSpec

State = dict[str, Tensor]
#: Keys shown of each list in an error message.
_NUM_SHOWN = 5


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 over names, dtypes, shapes and values of a state_dict, in the order of names.

    Args:
        state: tensors of any device and dtype; aliased names count each.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_shared(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {aliased name: the first name of the same storage, offset and shape} of a state_dict."""
    first: dict[tuple[object, ...], str] = {}
    shared: dict[str, str] = {}
    for name, tensor in state.items():
        if tensor.numel() == 0:
            continue
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        canonical = first.setdefault(place, name)
        if canonical != name:
            shared[name] = canonical
    return shared


def save_weights(
    model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], spec: ModelSpec, *, half: bool = True
) -> ModelSpec:
    """Write weights and spec to a safetensors file, under a temporary name first.

    Args:
        model: a module, or its state_dict (aliases must share storage to be stored once).
        path: file to write; replaced if it exists.
        spec: what the file says of itself; ``weights_sha256`` is filled in.
        half: store tensors of two and more axes as float16.

    Returns:
        The spec as written.

    Raises:
        WeightsError: a value is not finite, or leaves the range of float16.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    state = model.state_dict() if isinstance(model, nn.Module) else dict(model)
    shared = find_shared(state)
    stored: State = {}
    for name, tensor in state.items():
        if name in shared:
            continue
        values = tensor.detach().cpu()
        if half and values.is_floating_point() and values.ndim >= 2:
            values = values.half()
        if values.is_floating_point() and not bool(torch.isfinite(values).all()):
            raise WeightsError(
                f"{name!r} holds values that are not finite as {values.dtype}; {str(path)!r} not written"
            )
        stored[name] = values.contiguous()
    spec = spec.model_copy(update={"weights_sha256": weights_sha256(_restore(stored, shared))})
    metadata = {"format": "pt", "model_spec": spec.model_dump_json(), "shared": json.dumps(shared)}
    with staged_output(path) as staged:
        save_file(stored, staged, metadata=metadata)
    return spec


def load_weights(path: str | os.PathLike[str]) -> tuple[State, ModelSpec]:
    """Read a file of :func:`save_weights`.

    Args:
        path: safetensors file.

    Returns:
        The state_dict (floating tensors as float32, on the CPU, aliases sharing storage) and the spec.

    Raises:
        WeightsError: the file is missing, truncated, not safetensors, or without a valid ModelSpec.
        ChecksumError: the tensors are not those that the spec was written for.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"cannot read weights {str(path)!r} ({error}); is it a complete safetensors file?"
        ) from error
    try:
        spec = ModelSpec.model_validate_json(metadata["model_spec"])
        shared = json.loads(metadata.get("shared", "{}"))
        state = _restore(stored, shared)
    except (KeyError, ValidationError, json.JSONDecodeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsError(
            f"{str(path)!r} holds no valid model_spec or shared list ({reason}); export it again"
        ) from error
    if spec.weights_sha256 and weights_sha256(state) != spec.weights_sha256:
        raise ChecksumError(f"weights in {str(path)!r} are not the ones its ModelSpec names; fetch or export it again")
    return state, spec


def _restore(stored: Mapping[str, Tensor], shared: Mapping[str, str]) -> State:
    """Return floating tensors as float32 and add the aliases."""
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    state.update({alias: state[canonical] for alias, canonical in shared.items()})
    return state


def _listed(title: str, names: list[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return f"{len(names)} {title}: {', '.join(names[:_NUM_SHOWN])}{more}"


def load_state(
    model: nn.Module, state: Mapping[str, Tensor], *, source: object = "state_dict", only: Collection[str] | None = None
) -> None:
    """Load a state_dict strictly, or change nothing.

    ``num_batches_tracked`` may be missing (old checkpoints lack it), and of names that are one tensor in the network
    one is enough. Tensors are converted to the model's dtype.

    Args:
        model: network whose keys decide.
        state: tensors by name.
        source: named in messages.
        only: names of the network that are loaded; None: all.

    Raises:
        WeightsError: keys are missing, unexpected, of another shape, or of one tensor with different values; the
            message lists them.
    """
    own = model.state_dict()
    own = own if only is None else {name: own[name] for name in own if name in only}
    shared = find_shared(own)
    present = {shared.get(name, name) for name in own if name in state}
    missing = [
        name for name in own if shared.get(name, name) not in present and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in own]
    reshaped = [name for name in own if name in state and state[name].shape != own[name].shape]
    differing = [
        f"{name} and {first}"
        for name, first in shared.items()
        if name in state and first in state and not _is_equal(state[name], state[first])
    ]
    shapes = [f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}" for name in reshaped]
    faults = [("missing", missing), ("unexpected", unexpected), ("wrongly shaped", shapes)]
    faults.append(("different though the network has one tensor for both", differing))
    if any(names for _, names in faults):
        details = "; ".join(_listed(title, names) for title, names in faults if names)
        architecture = getattr(model, "architecture", type(model).__name__)
        advice = "check architecture, number of classes and bands"
        if all(is_transferable(name, state[name].shape, own[name].shape) for name in reshaped):
            if reshaped and not (missing or unexpected or differing):
                advice = TRANSFER_HINT
        raise WeightsError(f"weights {str(source)!r} do not fit {architecture}: {details}; {advice}")
    model.load_state_dict(dict(state), strict=False)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)
