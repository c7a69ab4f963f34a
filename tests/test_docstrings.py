"""Examples in docstrings give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import rtmdet_geo

MODULES = sorted(info.name for info in pkgutil.walk_packages(rtmdet_geo.__path__, "rtmdet_geo."))
FINDER = doctest.DocTestFinder(exclude_empty=True)


def examples(name: str) -> list[doctest.DocTest]:
    module = importlib.import_module(name)
    return [test for test in FINDER.find(module, name) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples(name):
    runner = doctest.DocTestRunner(verbose=False)
    for test in examples(name):
        assert runner.run(test).failed == 0, test.name


def test_there_are_examples():
    assert sum(len(examples(name)) for name in ("rtmdet_geo.tiles", "rtmdet_geo.preprocess", "rtmdet_geo.images")) >= 4
