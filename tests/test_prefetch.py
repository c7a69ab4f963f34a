"""Stages in threads: order, errors, ends; and that the tile loop reads ahead of its engine."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from engines import Engine

from rtmdet_geo.errors import Cancelled, ModelFileError
from rtmdet_geo.prefetch import Prefetch
from rtmdet_geo.structures import Detections
from rtmdet_geo.tile_loop import TileSettings, run_tiles
from rtmdet_geo.tiles import TileGrid

#: Seconds after which a test gives up waiting for another thread.
LONG = 20


def test_order_and_end():
    with Prefetch(range(100), size=3) as ahead:
        assert list(ahead) == list(range(100))
    assert not ahead._thread.is_alive()
    with Prefetch([]) as ahead:
        assert list(ahead) == []


def test_none_is_an_item():
    with Prefetch([None, None]) as ahead:
        assert list(ahead) == [None, None]


def test_error_comes_where_its_item_would():
    def items():
        yield 1
        yield 2
        raise ModelFileError("damaged")

    seen = []
    with pytest.raises(ModelFileError, match="damaged"), Prefetch(items(), size=5) as ahead:
        for item in ahead:
            seen.append(item)
    assert seen == [1, 2] and not ahead._thread.is_alive()


def test_at_most_so_many_ahead():
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield number

    with Prefetch(items(), size=2) as ahead:
        taken = iter(ahead)
        next(taken)
        time.sleep(0.1)
        assert len(made) <= 1 + 2 + 1  # taken, ready, at hand
    assert len(made) < 10


def test_leaving_early_closes_the_source():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with Prefetch(items()) as ahead:
        next(iter(ahead))
    assert closed.is_set() and not ahead._thread.is_alive()


def test_a_source_that_fails_to_close_says_so():
    """Nobody would wait for ever for an end that never comes."""

    class Source:
        def __iter__(self):
            return iter([1])

        def close(self):
            raise ModelFileError("cannot be closed")

    with pytest.raises(ModelFileError, match="cannot be closed"), Prefetch(Source(), waiting=tired()) as ahead:
        list(ahead)


def tired():
    """Return what gives up waiting in the end."""
    end = time.monotonic() + LONG

    def waiting() -> None:
        assert time.monotonic() < end, "nothing comes"

    return waiting


def test_waiting_is_called_in_the_callers_thread_and_may_raise():
    release = threading.Event()
    threads = []

    def items():
        release.wait(LONG)
        yield 1

    def waiting():
        threads.append(threading.current_thread())
        if len(threads) == 2:
            release.set()
            raise Cancelled("enough")

    with pytest.raises(Cancelled), Prefetch(items(), waiting=waiting) as ahead:
        list(ahead)
    assert set(threads) == {threading.current_thread()}


class MemoryScene:
    """Tiles that are in memory; ``number`` of them were read."""

    path = "memory"

    def __init__(self, columns: int, empty: tuple[int, ...] = ()) -> None:
        """Remember the tiles without data."""
        self.width, self.height = 64 * columns, 64
        self.empty = empty
        self.number = 0
        self.enough = threading.Event()
        self.wanted = 0

    def read(self, x: int, y: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """Return grey pixels with the tile's number, and which are valid."""
        index = x // 64
        self.number += 1
        if self.number >= self.wanted:
            self.enough.set()
        valid = np.full((height, width), index not in self.empty)
        return np.full((3, height, width), index, np.uint8), valid


class Counting(Engine):
    """Finds one ship a tile, with the tile's number as score / 100."""

    def find(self, image):
        return Detections([[32, 32, 20, 8, 0]], [image[0, 0, 0] / 100], [0], "tile", "rotated")


def run(scene, engine, **settings):
    grid = TileGrid(scene.width, scene.height, 64, 0)
    return run_tiles(
        scene, grid, engine, TileSettings.of(engine, score_threshold=0, tile_size=64, overlap=0), **settings
    )


def test_tiles_are_read_while_the_engine_runs():
    scene = MemoryScene(6)
    scene.wanted = 3

    class Slow(Counting):
        def find(self, image):
            assert scene.enough.wait(LONG), "nothing was read meanwhile"
            return super().find(image)

    results = run(scene, Slow())
    assert [round(float(part.detections.scores[0]) * 100) for part in results.parts] == list(range(6))


@pytest.mark.parametrize("empty", [(), (0, 1), (2, 3), (5,), tuple(range(6))])
def test_empty_tiles_are_counted_in_order(empty):
    scene, calls = MemoryScene(6, empty), []
    engine = Counting()
    results = run(scene, engine, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(number, 6) for number in range(7)]
    assert results.num_empty_tiles == len(empty) and sum(map(len, engine.batches)) == 6 - len(empty)
    found = [round(float(part.detections.boxes[0, 0])) for part in results.parts]
    assert found == [64 * index + 32 for index in range(6) if index not in empty]


def test_a_failing_engine_ends_every_thread():
    class Failing(Counting):
        def find(self, image):
            if image[0, 0, 0] == 2:
                raise ModelFileError("no numbers")
            return super().find(image)

    scene = MemoryScene(500)
    with pytest.raises(ModelFileError, match="no numbers"):
        run(scene, Failing())
    assert scene.number < 20
    assert not [thread.name for thread in threading.enumerate() if thread.name in ("tiles", "engine")]


def test_a_scene_that_cannot_be_read_says_so():
    class Torn(MemoryScene):
        def read(self, x, y, width, height):
            if x == 128:
                raise OSError("torn")
            return super().read(x, y, width, height)

    with pytest.raises(OSError, match="torn"):
        run(Torn(6), Counting())


def test_cancelled_is_asked_in_the_callers_thread_while_nothing_comes():
    asked, release = [], threading.Event()

    class Stuck(Counting):
        def find(self, image):
            release.wait(LONG)
            return super().find(image)

    def cancelled():
        asked.append(threading.current_thread())
        if len(asked) > 2:
            release.set()
        return len(asked) > 2

    with pytest.raises(Cancelled, match="stopped after 0 of 6 tiles"):
        run(MemoryScene(6), Stuck(), cancelled=cancelled)
    assert set(asked) == {threading.current_thread()}
