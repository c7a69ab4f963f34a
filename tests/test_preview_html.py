"""The page: its data are the features', no name becomes markup, it is whole or absent, and it works in a browser."""

from __future__ import annotations

import base64
import html.parser
import json
import os
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import geopandas
import numpy as np
import pyproj
import pytest
from affine import Affine
from chromium import Chromium
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from synthetic import TRANSFORM, BlobBackend, draw_ships, write_scene

from rtmdet_geo import detect as pipeline
from rtmdet_geo import preview_html
from rtmdet_geo.annotations.outlines import trace_mask
from rtmdet_geo.errors import OutputError
from rtmdet_geo.polygons import outlines_to_polygons
from rtmdet_geo.preview import check_preview, class_colour
from rtmdet_geo.preview_html import PREVIEW_ENDINGS, fill_page, write_html_preview, write_preview
from rtmdet_geo.stitch import as_outlines
from rtmdet_geo.structures import Detections
from rtmdet_geo.vector import build_features
from rtmdet_geo.vector_formats import plain_cells

NASTY = "</script><img src=x onerror=alert(1)><!--<script>&lt;\u2028'\"{{data}}"
SUMMARY = {
    "scene": "/home/someone/private.tif",
    "width": 800,
    "height": 400,
    "crs": "EPSG:32630",
    "model": {"name": "ships", "path": "/home/someone/m.onnx", "licence": "CC BY 4.0", "attribution": "Sen2Ships"},
    "parameters": {"score_threshold": 0.3},
}


class PageScene:
    """A scene in memory: 800 x 400 source px of 10 m, seen at half the resolution."""

    width, height, scale_x, scale_y = 400, 200, 2.0, 2.0
    transform = Affine(10, 0, 600_000, 0, -10, 3_700_000)

    def __init__(self, scene_id: str = "port", crs: str | None = "EPSG:32630") -> None:
        self.scene_id, self.crs = scene_id, crs

    def read(self, x: int, y: int, width: int, height: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        return np.full((3, height, width), 60, np.uint8), np.ones((height, width), bool)


def found(boxes: list[list[float]], scores: list[float], labels: list[int], masks: Any = None) -> Detections:
    return Detections(
        np.array(boxes, np.float64).reshape(-1, 5),
        np.array(scores, np.float32),
        np.array(labels, int),
        "scene",
        masks=masks,
    )


def features_of(
    detections: Detections, scene: PageScene, classes: list[str], sensor: str | None = "S2"
) -> geopandas.GeoDataFrame:
    number, (a, b, c, d, e, f) = len(detections), scene.transform[:6]
    return build_features(
        detections.boxes,
        detections.scores,
        detections.labels,
        np.ones(number, int),
        np.zeros(number, bool),
        transform=Affine(2 * a, 2 * b, c, 2 * d, 2 * e, f),
        crs=scene.crs,
        classes=classes,
        gsd_m=10,
        scene_id=scene.scene_id,
        sensor=sensor,
    )


THREE = found(
    [[100, 50, 40, 10, 0], [300, 150, 60, 12, np.pi / 2], [200, 100, 20, 8, 0.3]], [0.91, 0.62, 0.35], [0, 1, 0]
)


def write_three(path: Path, classes: list[str] | None = None, scene: PageScene | None = None) -> geopandas.GeoDataFrame:
    classes, scene = classes or ["ship", "wake", "buoy"], scene or PageScene()
    features = features_of(THREE, scene, classes)
    write_html_preview(scene, THREE, features, path, classes=classes, summary=SUMMARY)
    return features


class Reader(html.parser.HTMLParser):
    """Collects what a browser would see of a page: tags, texts of scripts by id, the title."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        self._inside = dict(attributes).get("id") or tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


def read_page(path: Path) -> tuple[Reader, dict[str, Any]]:
    reader = Reader(path.read_text(encoding="utf-8"))
    return reader, json.loads(reader.texts["data"])


def rows_of(attributes: dict[str, dict[str, Any]], number: int) -> list[dict[str, Any]]:
    return [
        {name: column["all"] if "all" in column else column["each"][row] for name, column in attributes.items()}
        for row in range(number)
    ]


def test_data_of_the_page_are_the_features(tmp_path: Path) -> None:
    features = write_three(tmp_path / "ships.html")
    assert os.listdir(tmp_path) == ["ships.html"]
    _, data = read_page(tmp_path / "ships.html")
    names = [name for name in features.columns if name != "geometry"]
    cells = {name: plain_cells(features[name]) for name in names}
    assert rows_of(data["attributes"], 3) == [{name: cells[name][row] for name in names} for row in range(3)]
    assert data["attributes"]["sensor"] == {"all": "S2"} and data["attributes"]["model"] == {"all": None}
    corners = np.reshape(data["rings"][0][0], (4, 2))
    assert sorted(corners.tolist()) == [[80, 45], [80, 55], [120, 45], [120, 55]]
    assert [entry["name"] for entry in data["classes"]] == ["ship", "wake", "buoy"]
    assert data["classes"][1]["colour"] == "#" + "".join(f"{value:02x}" for value in class_colour(1))
    assert data["facts"] == ["3 detections", "model ships", "scores from 0.3", "800 x 400 px", "EPSG:32630"]
    assert data["attribution"] == "Sen2Ships. Licence of the model: CC BY 4.0"
    kind, _, text = data["image"].partition(",")
    assert kind == "data:image/jpeg;base64"
    image = cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (200, 400, 3)
    assert "/home/someone" not in (tmp_path / "ships.html").read_text()  # a page is passed on


def test_page_loads_nothing(tmp_path: Path) -> None:
    write_three(tmp_path / "ships.html")
    reader, _ = read_page(tmp_path / "ships.html")
    assert [value for name, value in reader.attributes if name in ("src", "href")] == ["data:,"]
    policy = next(value for name, value in reader.attributes if name == "content" and "default-src" in (value or ""))
    assert "default-src 'none'" in policy and "http" not in policy
    template = (Path(preview_html.__file__).parent / "assets" / "preview.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|eval\(", template)


def test_names_never_become_markup(tmp_path: Path) -> None:
    write_three(tmp_path / "plain.html")
    plain, _ = read_page(tmp_path / "plain.html")
    write_three(tmp_path / "nasty.html", [NASTY, "wake", "buoy"], PageScene(NASTY))
    nasty, data = read_page(tmp_path / "nasty.html")
    assert nasty.tags == plain.tags
    assert data["classes"][0]["name"] == NASTY == data["attributes"]["class_name"]["each"][0] == data["scene_id"]
    assert nasty.texts["title"].startswith(NASTY)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet=st.one_of(st.sampled_from("<>&/!-{}'\"\ud800\u2028" + string.ascii_letters), st.characters()))
)
def test_any_text_comes_back_and_adds_no_tag(text: str) -> None:
    page = fill_page(text, {"a": text})
    page.encode("utf-8")
    reader = Reader(page)
    assert json.loads(reader.texts["data"]) == {"a": text}
    assert reader.tags == Reader(fill_page("", {})).tags


def test_masks_have_their_outlines_with_holes(tmp_path: Path) -> None:
    mask = np.zeros((200, 400), bool)
    mask[50:90, 100:180] = True
    mask[60:80, 120:150] = False
    masks = as_outlines([trace_mask(mask)])
    detections = found([[140, 70, 80, 40, 0]], [0.8], [0], masks)
    features = features_of(detections, PageScene(), ["roof"])
    write_html_preview(
        PageScene(), detections, features, tmp_path / "roofs.html", classes=["roof"], summary={}, max_size=400
    )
    _, data = read_page(tmp_path / "roofs.html")
    rings = [np.reshape(ring, (-1, 2)) for ring in data["rings"][0]]
    extents = sorted((*ring.min(axis=0), *ring.max(axis=0)) for ring in rings)
    assert extents == [(100, 50, 180, 90), (120, 60, 150, 80)]
    polygon = outlines_to_polygons(masks)[0]
    assert polygon.area == 40 * 80 - 20 * 30
    assert data["facts"] == ["1 detection"] and data["attribution"] == ""


def test_grid_has_the_places_of_the_scene(tmp_path: Path) -> None:
    write_three(tmp_path / "a.html")
    grid = np.array(read_page(tmp_path / "a.html")[1]["lonlat"])
    to_lonlat = pyproj.Transformer.from_crs("EPSG:32630", "EPSG:4326", always_xy=True)
    assert np.allclose(grid[0, 0], to_lonlat.transform(600_000, 3_700_000), atol=1e-7)
    assert np.allclose(grid[-1, -1], to_lonlat.transform(608_000, 3_696_000), atol=1e-7)
    assert np.allclose(grid[-1, 0], to_lonlat.transform(600_000, 3_696_000), atol=1e-7)
    write_three(tmp_path / "b.html", scene=PageScene(crs=None))
    assert read_page(tmp_path / "b.html")[1]["lonlat"] is None


def test_grid_stays_in_one_piece_at_the_antimeridian(tmp_path: Path) -> None:
    scene = PageScene(crs="EPSG:4326")
    scene.transform = Affine(0.001, 0, 179.8, 0, -0.001, 10)
    grid = np.array(preview_html._lonlat_grid(scene))
    assert np.allclose(grid[0, [0, -1], 0], [179.8, 180.6])


def test_old_page_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ships.html"
    path.write_text("old")
    features = features_of(THREE, PageScene(), ["ship", "wake"])
    with pytest.raises(OutputError, match="overwrite"):
        write_html_preview(
            PageScene(), THREE, features, path, classes=["ship", "wake"], summary=SUMMARY, overwrite=False
        )

    def no_space(*arguments: Any, **more: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", no_space)
    with pytest.raises(OutputError, match=r"No space left.*disk full"):
        write_html_preview(PageScene(), THREE, features, path, classes=["ship", "wake"], summary=SUMMARY)
    assert os.listdir(tmp_path) == ["ships.html"] and path.read_text() == "old"


def test_wrong_arguments_are_refused(tmp_path: Path) -> None:
    classes, features = ["ship", "wake"], features_of(THREE, PageScene(), ["ship", "wake"])
    with pytest.raises(ValueError, match="3 features are not those of the 2 detections"):
        write_html_preview(
            PageScene(), THREE.select(np.array([0, 1])), features, tmp_path / "a.html", classes=classes, summary={}
        )
    with pytest.raises(ValueError, match="not those of"):
        write_html_preview(
            PageScene(), THREE.select(np.array([1, 0, 2])), features, tmp_path / "a.html", classes=classes, summary={}
        )
    with pytest.raises(ValueError, match="at least 1 px"):
        write_html_preview(PageScene(), THREE, features, tmp_path / "a.html", classes=classes, summary={}, max_size=0)
    with pytest.raises(OutputError, match=r"must be a \.html file"):
        write_html_preview(PageScene(), THREE, features, tmp_path / "a.png", classes=classes, summary={})
    assert os.listdir(tmp_path) == []


def test_ending_chooses(tmp_path: Path) -> None:
    features = features_of(THREE, PageScene(), ["ship", "wake"])
    for name in ("a.png", "b.HTML"):
        check_preview(tmp_path / name, endings=PREVIEW_ENDINGS)
        write_preview(
            PageScene(), THREE, features, tmp_path / name, classes=["ship", "wake"], summary=SUMMARY, overwrite=False
        )
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "b.HTML").read_bytes().startswith(b"<!doctype html>")
    with pytest.raises(OutputError, match=r"\.png or \.html file"):
        check_preview(tmp_path / "c.jpg", endings=PREVIEW_ENDINGS)
    with pytest.raises(OutputError, match=r"must be a \.png file"):
        check_preview(tmp_path / "c.html")  # contact sheets are pictures


def test_detection_writes_the_page_of_what_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = BlobBackend()
    monkeypatch.setattr(pipeline, "open_backend", lambda path, **options: backend)
    monkeypatch.setattr(pipeline, "find_model", lambda model: Path(__file__))
    scene = write_scene(tmp_path / "port.tif", draw_ships(500, 400))
    lengths = pipeline.detect_scene(scene)["length_m"]
    features = pipeline.detect_scene(
        scene, preview=tmp_path / "ships.html", min_length_m=float(np.median(lengths)), dst_crs="EPSG:4326"
    )
    assert 0 < len(features) < len(lengths)
    _, data = read_page(tmp_path / "ships.html")
    assert [row["length_m"] for row in rows_of(data["attributes"], len(features))] == features["length_m"].tolist()
    x, y = np.array([np.mean(np.reshape(rings[0], (-1, 2)), axis=0) for rings in data["rings"]]).T
    centres = features.to_crs("EPSG:32630").geometry.centroid
    assert np.allclose(centres.x, TRANSFORM.c + 10 * x * data["scale"][0], atol=0.5)
    assert np.allclose(centres.y, TRANSFORM.f - 10 * y * data["scale"][1], atol=0.5)
    with pytest.raises(OutputError, match="overwrite"):
        pipeline.detect_scene(scene, preview=tmp_path / "ships.html")
    with pytest.raises(OutputError, match=r"\.png or \.html"):
        pipeline.detect_scene(scene, preview=tmp_path / "ships.svg")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


COUNT = "document.getElementById('count').textContent"
IS_OPEN = "!document.getElementById('popup').hidden"
TABLE = (
    "Object.fromEntries([...document.querySelectorAll('#attributes tr')]"
    ".map(row => [...row.cells].map(cell => cell.textContent)))"
)
BORDER = "(b => [b.left, b.top, b.width, b.height])(document.getElementById('picture').getBoundingClientRect())"


def at(browser: Chromium, x: float, y: float) -> tuple[float, float]:
    """Return CSS px of the window of a point in scene px, while the whole scene of 400 x 200 px is shown."""
    left, top, width, height = browser.run(BORDER)
    zoom = min(width / 400, height / 200)
    return left + (width - 400 * zoom) / 2 + x * zoom, top + (height - 200 * zoom) / 2 + y * zoom


def set_score(browser: Chromium, value: float) -> None:
    browser.run(
        f"(s => {{ s.value = {value}; s.dispatchEvent(new Event('input')); }})(document.getElementById('score'))"
    )


def test_slider_and_boxes_change_the_count(browser: Chromium, tmp_path: Path) -> None:
    write_three(tmp_path / "ships.html")
    browser.open(tmp_path / "ships.html")
    assert browser.run(COUNT) == "3 detections"
    assert browser.run("document.title") == "port: detections"
    for score, count in ((0.62, "2 detections"), (0.63, "1 detection"), (0.92, "0 detections"), (0.35, "3 detections")):
        set_score(browser, score)
        assert browser.run(COUNT) == count
    browser.run("document.querySelector('input[data-label=\"0\"]').click()")
    assert browser.run(COUNT) == "1 detection"
    assert browser.run("document.querySelectorAll('#classes input').length") == 2  # none for a class not found
    assert browser.faults == []


def test_click_opens_the_attributes(browser: Chromium, tmp_path: Path) -> None:
    features = write_three(tmp_path / "ships.html")
    browser.open(tmp_path / "ships.html")
    browser.click(*at(browser, 300, 130))  # inside the upright one
    assert browser.run(IS_OPEN)
    table = browser.run(TABLE)
    assert list(table) == [name for name in features.columns if name != "geometry"]
    assert (table["id"], table["class_name"], table["score"], table["scene_id"]) == ("2", "wake", "0.62", "port")
    assert float(table["length_m"]) == pytest.approx(features["length_m"][1], rel=1e-6)
    assert browser.run("document.getElementById('popup').className") == "left"  # the object is on the right
    assert table["azimuth_deg"] != "\u2013" and table["acquired_at"] == "\u2013"
    browser.key("Escape")
    assert not browser.run(IS_OPEN)
    browser.click(*at(browser, 260, 150))  # water
    assert not browser.run(IS_OPEN)
    set_score(browser, 0.7)
    browser.click(*at(browser, 300, 130))  # hidden now
    assert not browser.run(IS_OPEN)
    assert browser.faults == []


def test_outlines_are_drawn_where_they_are(browser: Chromium, tmp_path: Path) -> None:
    write_three(tmp_path / "ships.html")
    browser.open(tmp_path / "ships.html")
    left, top, _, _ = browser.run(BORDER)

    def colour(x: float, y: float) -> list[int]:
        column, row = (round(value) for value in np.subtract(at(browser, x, y), (left, top)))
        pixels = f"document.getElementById('picture').getContext('2d').getImageData({column}, {row}, 1, 1).data"
        return browser.run(f"[...{pixels}].slice(0, 3)")

    def distance(x: float, y: float, label: int) -> float:
        return float(np.abs(np.subtract(colour(x, y), class_colour(label))).max())

    assert distance(100, 45, 0) < 60 and distance(294, 150, 1) < 60
    assert distance(100, 50, 0) > 60  # inside is the scene
    set_score(browser, 0.9)
    browser.settle()
    assert distance(294, 150, 1) > 60 and distance(100, 45, 0) < 60


def test_zoom_and_pan_by_wheel_drag_keys_and_touch(browser: Chromium, tmp_path: Path) -> None:
    write_three(tmp_path / "ships.html")
    browser.open(tmp_path / "ships.html")

    def place() -> list[float]:
        return [float(part[:-3]) for part in browser.run("document.getElementById('place').textContent").split(", ")]

    x, y = at(browser, 100, 50)
    to_lonlat = pyproj.Transformer.from_crs("EPSG:32630", "EPSG:4326", always_xy=True)
    lon, lat = to_lonlat.transform(600_000 + 100 * 20, 3_700_000 - 50 * 20)
    browser.mouse("Moved", x, y)
    assert browser.run("document.getElementById('place').textContent").endswith("\u00b0 W")
    assert place() == pytest.approx([lat, -lon], abs=2e-4)
    browser.mouse("Wheel", x, y, deltaX=0, deltaY=-300)
    browser.settle()
    browser.mouse("Moved", x, y)
    assert place() == pytest.approx([lat, -lon], abs=2e-4)  # the scene stays under the cursor
    before = place()
    browser.mouse("Moved", x + 60, y)
    wide = place()[1] - before[1]
    browser.mouse("Pressed", x + 60, y, button="left", buttons=1)
    browser.mouse("Moved", x + 120, y, button="left", buttons=1)
    browser.mouse("Released", x + 120, y, button="left", buttons=0)
    assert place() == pytest.approx([before[0], before[1] + wide], abs=1e-4)  # dragged along
    assert not browser.run(IS_OPEN)
    browser.run("document.getElementById('picture').focus()")
    browser.key("0", "0")
    browser.mouse("Moved", x, y)
    assert place() == pytest.approx([lat, -lon], abs=2e-4)
    browser.key("+", "+")
    browser.key("ArrowRight")
    browser.mouse("Moved", x, y)
    assert place()[1] != pytest.approx(-lon, abs=1e-3)
    browser.key("n", "n")
    assert browser.run(TABLE)["id"] == "1"
    browser.key("p", "p")
    assert browser.run(TABLE)["id"] == "3"
    browser.key("0", "0")
    fingers = [[(x - 20, y), (x + 20, y)], [(x - 60, y), (x + 60, y)]]
    for kind, points in zip(("touchStart", "touchMove", "touchEnd"), (*fingers, []), strict=True):
        touches = [{"x": px, "y": py, "id": number} for number, (px, py) in enumerate(points)]
        browser.send("Input.dispatchTouchEvent", type=kind, touchPoints=touches)
    browser.settle()
    browser.mouse("Moved", x, y)
    middle = place()
    browser.mouse("Moved", x + 60, y)
    assert middle == pytest.approx([lat, -lon], abs=1e-3)
    zoomed = (place()[1] - middle[1]) / wide * np.exp(-300 / 400)
    assert abs(zoomed) == pytest.approx(1 / 3, rel=0.15)  # three times as large as the whole scene
    assert browser.faults == []


def test_nasty_names_are_harmless_in_the_browser(browser: Chromium, tmp_path: Path) -> None:
    write_three(tmp_path / "nasty.html", [NASTY, "wake", "buoy"], PageScene(NASTY))
    browser.open(tmp_path / "nasty.html")
    browser.click(*at(browser, 100, 50))
    assert browser.run(TABLE)["class_name"] == NASTY
    assert browser.run("document.querySelector('#classes .name').textContent") == NASTY
    assert browser.run("document.images.length") == 0
    assert browser.faults == []


def test_no_detection_and_many(browser: Chromium, tmp_path: Path) -> None:
    none = Detections.empty("scene")
    write_html_preview(
        PageScene(), none, features_of(none, PageScene(), ["ship"]), tmp_path / "0.html", classes=["ship"], summary={}
    )
    browser.open(tmp_path / "0.html")
    assert browser.run(COUNT) == "0 detections" and browser.run("document.getElementById('score').disabled")
    browser.click(*at(browser, 100, 50))
    browser.run("document.getElementById('picture').focus()")
    browser.key("n", "n")
    assert not browser.run(IS_OPEN) and browser.faults == []
    rng = np.random.default_rng(0)
    number = 20_000
    boxes = np.column_stack([rng.uniform(0, (400, 200), (number, 2)), np.full((number, 2), (3, 1)), np.zeros(number)])
    many = found(boxes.tolist(), np.linspace(0.9, 0.3, number).tolist(), rng.integers(0, 2, number).tolist())
    features = features_of(many, PageScene(), ["ship", "wake"])
    write_html_preview(PageScene(), many, features, tmp_path / "n.html", classes=["ship", "wake"], summary={})
    browser.open(tmp_path / "n.html")
    assert browser.run(COUNT) == "20,000 detections"
    assert browser.run("document.getElementsByTagName('*').length") < 150  # outlines are no elements
    set_score(browser, 0.6)
    assert browser.run(COUNT) == f"{int((many.scores >= np.float32(0.6)).sum()):,} detections"
    browser.click(*at(browser, *boxes[0, :2]))
    assert browser.run(IS_OPEN) and browser.faults == []


def test_faults_of_a_page_are_seen(browser: Chromium, tmp_path: Path) -> None:
    page = "<body data-ready=yes><script>console.error('no'); new Image().src = 'http://127.0.0.1:9/a.png'</script>"
    (tmp_path / "bad.html").write_text(page)
    browser.open(tmp_path / "bad.html")
    browser.settle()
    assert len(browser.faults) >= 2
