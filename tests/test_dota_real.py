"""DOTA's own images: labels split by both tools, fed back as detections and merged, score as by the official rules."""

from __future__ import annotations

import numpy as np
import pytest
from dota_official import official_ap
from test_dota_merge import official_merge, rows_of

from rtmdet_geo.annotations.dota import read_dota_objects
from rtmdet_geo.annotations.dota_results import write_results
from rtmdet_geo.dota.merge import merge_results
from rtmdet_geo.dota.split import split_dota
from rtmdet_geo.evaluation.dota import evaluate_dota


@pytest.fixture
def real(data_dir):
    folder = data_dir / "dota_full"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing")
    return folder


def detections_of(folder, classes, generator=None):
    """Return result lines by class from the labels of patches: as they are, or moved, left out and added to."""
    lines = {name: [] for name in classes}
    for path in sorted(folder.iterdir()):
        for line in path.read_text().splitlines():
            *corners, name, difficult = line.split()
            numbers = np.array(corners, float)
            score = 0.3 if difficult == "2" else 0.9
            if generator is not None:
                if generator.random() < 0.1:
                    continue
                numbers = (numbers.reshape(4, 2) + generator.normal(0, 2, 2)).ravel()
                if generator.random() < 0.1:
                    numbers += 40
            score += generator.uniform(-0.2, 0.1) if generator is not None else 0.001 * len(lines[name]) / 100
            lines[name].append(f"{path.stem} {score!r} " + " ".join(map(str, numbers.tolist())))
    return lines


def labelled(folder):
    objects = {path.stem: read_dota_objects(path) for path in sorted(folder.iterdir())}
    return objects, sorted({name for part in objects.values() for name in part.class_names})


@pytest.mark.parametrize("tool", ["devkit", "bboxtoolkit"])
@pytest.mark.parametrize("is_noised", [False, True])
def test_real_labels_split_and_merged_equal_the_official_rules(real, tmp_path, tool, is_noised):
    objects, classes = labelled(real / "labelTxt")
    split_dota(real / "images", real / "labelTxt", tmp_path / "patches", tool=tool)
    folder = tmp_path / "patches" / ("labelTxt" if tool == "devkit" else "annfiles")
    lines = detections_of(folder, classes, np.random.default_rng(7) if is_noised else None)
    write_results(tmp_path / "found", {name: rows_of(rows) for name, rows in lines.items()}, 1, classes)
    # the devkit's loop takes BboxToolkit's names once the size is written as the rate 1
    merge_results(tmp_path / "found", tmp_path / "merged", tool=tool)
    report = evaluate_dota(tmp_path / "merged", real / "labelTxt", classes=classes)
    assert len(report.rows) == len(classes) > 1
    for row in report.rows:
        official = official_merge([line.replace("__1024__", "__1__", 1) for line in lines[row["class"]]])
        found = [(image, score, corners.ravel()) for image, score, corners in official]
        if tool == "bboxtoolkit":  # two decimals are all that is written, which makes many scores the same
            found = [
                (image, round(score, 2), [float(f"{value:.2f}") for value in corners])
                for image, score, corners in found
            ]
        truth = {}
        for image, part in objects.items():
            own = np.array(part.class_names) == row["class"]
            truth[image] = (part.corners[own], np.array(part.difficult)[own] != "0")
        for key, threshold in (("AP50", 0.5), ("AP75", 0.75)):
            expected = official_ap(found, truth, threshold)
            assert row[f"{key}_11"] == pytest.approx(expected, abs=1e-9), row["class"]
        if not is_noised:
            assert row["AP50_11"] > 0.9
        else:
            assert 0.3 < row["AP50_11"] < 1
