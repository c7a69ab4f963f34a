"""Fixtures shared by all tests: where golden numbers and real data lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Threads of a math library that wait by spinning stop one another where tests share the cores with other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: each has one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")

TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def oracle_dir() -> Path:
    """Folder of golden numbers: ``RTMDET_ORACLE`` or the committed copy."""
    folder = Path(os.environ.get("RTMDET_ORACLE", TESTS / "golden" / "oracle"))
    assert folder.is_dir(), f"RTMDET_ORACLE={folder} is no folder"
    return folder


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real scenes: ``RTMDET_DATA``. Unset: skip, or fail when ``RTMDET_REQUIRE_DATA=1``."""
    value = os.environ.get("RTMDET_DATA")
    if not value:
        if os.environ.get("RTMDET_REQUIRE_DATA") == "1":
            pytest.fail("RTMDET_REQUIRE_DATA=1 but RTMDET_DATA is not set")
        pytest.skip("set RTMDET_DATA to the folder of real scenes to run this test")
    folder = Path(value)
    assert folder.is_dir(), f"RTMDET_DATA={folder} is no folder"
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One torch thread for the test: quicker on small tensors, and sums are always in the same order."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
