"""How numba compiles the package's kernels: without the interpreter lock, cached on disk, never parallel.

``parallel=True`` is out: numba's default threading layer aborts the process when several Python threads call it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

logger = logging.getLogger(__name__)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def compiled(function: _Function) -> _Function:
    """Compile on first call; keep the machine code in __pycache__, else in the user's cache folder, else not at all."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return cast(_Function, njit(cache=True, **options)(function))
    except RuntimeError as error:  # numba found no folder to write to: read-only installation and home
        logger.debug("compiled code of %s is not cached: %s", function.__name__, error)
        return cast(_Function, njit(**options)(function))
