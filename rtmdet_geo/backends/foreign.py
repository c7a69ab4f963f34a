"""What can be said of an ONNX file of another program, which has no ModelSpec."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rtmdet_geo.backends import require_package
from rtmdet_geo.backends.contract import missing_parts
from rtmdet_geo.backends.onnxrt import open_session, ports_of
from rtmdet_geo.cores import usable_cores


def describe_foreign(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what onnxruntime sees in an ONNX file, and what it lacks of the model-file contract.

    Args:
        path: ``.onnx`` file.

    Returns:
        ``path``, ``bytes``; ``producer``, ``domain``, ``description``, ``graph`` (texts, empty where the file says
        nothing); ``inputs`` and ``outputs`` (name, type, shape: numbers, names or None); ``metadata``
        (text by key); ``lacks`` (parts of the contract, in words).

    Raises:
        ModelFileError: there is no such file, or it is no readable ONNX file.
        MissingDependencyError: onnxruntime is not installed.
    """
    file = Path(path)
    session = open_session(require_package("onnxruntime"), file, usable_cores())
    about = session.get_modelmeta()
    inputs, outputs = ports_of(session.get_inputs()), ports_of(session.get_outputs())
    metadata = dict(about.custom_metadata_map)
    return {
        "path": file,
        "bytes": file.stat().st_size,
        "producer": about.producer_name,
        "domain": about.domain,
        "graph": about.graph_name,
        "description": about.description,
        "inputs": [port._asdict() for port in inputs],
        "outputs": [port._asdict() for port in outputs],
        "metadata": metadata,
        "lacks": missing_parts(inputs, outputs, None),
    }
