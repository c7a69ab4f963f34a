"""Compilation of the kernels where numba may not write."""

from __future__ import annotations

import logging

from rtmdet_geo import jit


def test_no_writable_folder_at_all(monkeypatch, caplog):
    """Numba refuses cache=True then; the kernels still compile."""
    real = jit.njit

    def refusing(**options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return real(**options)

    monkeypatch.setattr(jit, "njit", refusing)
    with caplog.at_level(logging.DEBUG, logger="rtmdet_geo.jit"):
        doubled = jit.compiled(lambda number: 2 * number)
    assert doubled(4) == 8
    assert "not cached" in caplog.text
