"""data check: every fault that is planted is found and counted, sound data have none, the exit code says so."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from label_folders import coco_box, coco_folder, dota_folder, write_image, write_text
from PIL import Image

from rtmdet_geo.annotations.findings import MEANINGS, SEVERITIES, Findings
from rtmdet_geo.annotations.folders import FoldersSource
from rtmdet_geo.annotations.parts import PartSource, read_part
from rtmdet_geo.boxes import boxes_to_polygons
from rtmdet_geo.cli import cli
from rtmdet_geo.config import parse_recipe
from rtmdet_geo.dataset_check import ChipsSource, check_dataset, recipe_parts
from rtmdet_geo.errors import AnnotationError, Cancelled, DatasetNotFoundError

SHIP = "10 10 30 10 30 20 10 20 ship 0\n"


def dota(root, **more):
    return PartSource("dota", root / "images", root / "labels", classes=("ship",), **more)


def kinds(summary):
    """Counts by kind."""
    return {fault["kind"]: fault["count"] for fault in summary["faults"]}


def check(*words):
    return CliRunner().invoke(cli, ["data", "check", *map(str, words)], prog_name="rtmdet-geo")


def test_sound_data_have_no_faults(tmp_path):
    root = dota_folder(tmp_path, a=SHIP + "1 1 5 1 5 3 1 3 ship 1", b="")
    steps = []
    summary = check_dataset({"train": dota(root)}, progress=lambda done, total: steps.append((done, total)))
    part = {"images": 2, "images_without_objects": 1, "objects": 2, "classes": {"ship": 2}}
    assert summary == {"errors": 0, "warnings": 0, "faults": [], "parts": {"train": part}}
    assert steps == [(1, 2), (2, 2)]


def plant(root):
    """Put one fault or two of every kind into a data set of two parts."""
    dota_folder(
        root / "train",
        a=SHIP + "1 1 5 1 5 3 1 3 whale 0\n" + SHIP,  # unknown class; double object
        b="5 5 5 5 5 5 5 5 ship 0\n50 10 60 10 60 20 50 20 ship 0\n-5 10 9 10 9 20 -5 20 ship 0",
        c="1 2 3",
        broken=SHIP,
        half=SHIP,
        deep=SHIP,
        lost=SHIP,
        lost2=SHIP,
        twice=SHIP,
        turned=SHIP,
    )
    images = root / "train" / "images"
    write_text(images / "broken.png", "no image")
    half = images / "half.png"
    half.write_bytes(half.read_bytes()[:-400])
    Image.fromarray(np.full((30, 40), 999, np.uint16)).save(images / "deep.png")
    for name in ("lost", "lost2"):
        (images / f"{name}.png").unlink()
    shutil.copy(images / "a.png", images / "twice.png")
    write_image(images / "unlabelled.png", 77)
    write_image(images / "b.bmp", 78)
    (images / "turned.png").unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = np.random.default_rng(5).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(images / "turned.jpg", exif=exif)
    dota_folder(root / "val", v=SHIP)
    shutil.copy(images / "a.png", root / "val" / "images" / "v.png")
    return {"train": dota(root / "train"), "val": dota(root / "val")}


def test_every_planted_fault_is_found_once(tmp_path):
    parts = plant(tmp_path)
    summary = check_dataset(parts)
    assert kinds(summary) == {
        "broken image": 3,
        "malformed labels": 1,
        "labels without image": 2,
        "ambiguous image": 1,
        "unknown class": 1,
        "zero area": 1,
        "outside": 1,
        "double object": 1,
        "double image": 2,
        "partly outside": 1,
        "image without labels": 1,
        "turned image": 1,
    }
    assert summary["errors"] == 13 and summary["warnings"] == 3
    by_kind = {fault["kind"]: fault for fault in summary["faults"]}
    labels = tmp_path / "train" / "labels"

    def example(kind, number=0):
        return by_kind[kind]["examples"][number]

    assert (
        example("unknown class")["place"] == f"{labels / 'a.txt'}:2" and "'whale'" in example("unknown class")["text"]
    )
    assert example("double object")["place"] == f"{labels / 'a.txt'}:3"
    assert example("double object")["text"].endswith(f"has the box of {labels / 'a.txt'}:1")
    assert example("zero area")["place"].endswith("b.txt:1") and example("outside")["place"].endswith("b.txt:2")
    assert example("partly outside")["place"].endswith("b.txt:3")
    assert example("malformed labels")["place"].endswith("c.txt:1") and "3 words" in example("malformed labels")["text"]
    assert {entry["place"].rpartition("/")[2] for entry in by_kind["broken image"]["examples"]} == {
        "broken.png",
        "deep.png",
        "half.png",
    }
    assert example("double image")["place"].endswith("train/images/twice.png")
    assert example("double image", 1)["part"] == "val" and "a.png' in train" in example("double image", 1)["text"]
    assert example("turned image")["place"].endswith("turned.jpg")
    assert summary["parts"]["val"]["objects"] == 1


def test_examples_are_limited_and_all_is_counted(tmp_path):
    root = dota_folder(tmp_path, a="5 5 5 5 5 5 5 5 ship 0\n" * 9)
    (fault, doubles) = check_dataset({"train": dota(root)}, examples=2)["faults"][:2]
    assert (fault["kind"], fault["count"], len(fault["examples"])) == ("zero area", 9, 2)
    assert (doubles["kind"], doubles["count"]) == ("double object", 8)


def test_dropping_unknown_classes_by_wish_is_no_error(tmp_path):
    root = dota_folder(tmp_path, a=SHIP + SHIP.replace("ship", "buoy"))
    assert check_dataset({"train": dota(root)})["errors"] == 1
    summary = check_dataset({"train": dota(root)}, drop_unknown_classes=True)
    assert (summary["errors"], summary["warnings"]) == (0, 1) and summary["faults"][0]["severity"] == "warning"


def test_blank_images_are_no_doubles(tmp_path):
    root = dota_folder(tmp_path, a=SHIP, b=SHIP)
    for name in "ab":
        Image.new("RGB", (40, 30)).save(root / "images" / f"{name}.png")
    assert check_dataset({"train": dota(root)})["faults"] == []


def test_coco_faults_are_all_listed(tmp_path):
    annotations = [
        coco_box(1, 1, [1, 2, 30, 9]),
        coco_box(2, 9, [1, 2, 3, 4]),
        coco_box(3, 1, [1, 2, 3, 4], category=99),
        coco_box(4, 1, [1, 2, -3, 4]),
        coco_box(5, 2, [39, 1, 90, 9]),
        coco_box(6, 2, [-9, -9, 90, 90], iscrowd=1),
        coco_box(7, 2, [1, 1, 0, 9]),
    ]
    root = coco_folder(tmp_path, annotations)
    write_image(root / "images" / "unnamed.png", 9)
    source = PartSource("coco", root / "images", root / "all.json", classes=("ship", "buoy"), kind="horizontal")
    summary = check_dataset({"train": source})
    assert kinds(summary) == {
        "malformed labels": 3,
        "zero area": 1,
        "partly outside": 1,
        "image without labels": 1,
        "absent class": 1,
    }
    texts = [entry["text"] for entry in summary["faults"][0]["examples"]]
    assert texts[0].startswith("annotation 2: image_id 9") and texts[2].endswith("sides of -3 x 4 px")
    assert summary["faults"][1]["examples"][0]["place"] == f"{root / 'all.json'}, annotation 7"


def test_other_image_sizes(tmp_path):
    root = coco_folder(tmp_path, [])
    write_image(root / "images" / "2.png", 2, size=(30, 40))
    summary = check_dataset({"train": PartSource("coco", root / "images", root / "all.json")})
    assert kinds(summary) == {"other image size": 1}
    assert "it is 30 x 40 px" in summary["faults"][0]["examples"][0]["text"]


@pytest.fixture
def chips(tmp_path):
    """A folder of three chips of 16 px, and a function that changes its index."""
    entries = []
    for number in range(3):
        np.save(
            tmp_path / f"{number}.npy", np.random.default_rng(number).integers(0, 255, (3, 16, 16)).astype(np.uint8)
        )
        entry = {"file": f"{number}.npy", "scene": "port", "x": 0, "y": 0, "width": 16, "height": 16}
        entries.append(entry | {"boxes": [[8, 8, 6, 4, 0]], "labels": [0], "ignore": [False]})

    def change(edit):
        index = {"classes": ["ship"], "chips": json.loads(json.dumps(entries))}
        edit(index)
        write_text(tmp_path / "chips.json", json.dumps(index))
        return check_dataset({"chips": ChipsSource(tmp_path, ("ship",))})

    change.folder = tmp_path
    return change


def test_chips(chips):
    assert chips(lambda index: None)["faults"] == []
    assert kinds(chips(lambda index: index.update(classes=["boat"]))) == {"unknown class": 3, "absent class": 1}
    assert kinds(chips(lambda index: index["chips"][1].pop("boxes"))) == {"malformed labels": 1}
    assert kinds(chips(lambda index: index["chips"][1].update(labels=[4]))) == {"malformed labels": 1}
    assert kinds(chips(lambda index: index["chips"][1].update(labels=[0, 0]))) == {"malformed labels": 1}
    assert kinds(chips(lambda index: index["chips"][1]["boxes"][0].__setitem__(3, 0))) == {"malformed labels": 1}
    assert kinds(chips(lambda index: index["chips"][1].update(file="gone.npy"))) == {"labels without image": 1}
    assert kinds(chips(lambda index: index["chips"][1].update(width=99))) == {"broken image": 1}
    summary = chips(lambda index: index["chips"][2].update(boxes=[[15, 8, 6, 4, 0]]))
    assert kinds(summary) == {"partly outside": 1}
    assert summary["faults"][0]["examples"][0]["place"].endswith("chips.json, 2.npy object 1")
    cut = chips(lambda index: index["chips"][2].update(boxes=[[15, 8, 6, 4, 0]], ignore=[True]))
    assert cut["faults"] == []  # what a chip cuts is ignored, and sticks out by nature
    shutil.copy(chips.folder / "0.npy", chips.folder / "1.npy")
    (chips.folder / "2.npy").write_bytes(b"short")
    assert kinds(chips(lambda index: None)) == {"broken image": 1, "double image": 1}
    write_text(chips.folder / "chips.json", "{}")
    with pytest.raises(AnnotationError, match="not an index of chips"):
        check_dataset({"chips": ChipsSource(chips.folder)})
    with pytest.raises(DatasetNotFoundError, match=r"chips\.json is missing"):
        check_dataset({"chips": ChipsSource(chips.folder / "none")})


def test_folders_of_classes(tmp_path):
    for number, name in enumerate(("cat/1.png", "cat/deep/2.png", "dog/3.jpg")):
        write_image(tmp_path / name, number)
    write_text(tmp_path / "dog" / "4.jpg", "no image")
    summary = check_dataset({"train": FoldersSource(tmp_path)})
    assert kinds(summary) == {"broken image": 1}
    assert summary["parts"]["train"]["classes"] == {"cat": 2, "dog": 2}
    with pytest.raises(DatasetNotFoundError, match="no images in folders of classes"):
        check_dataset({"train": FoldersSource(tmp_path / "cat" / "deep")})
    with pytest.raises(DatasetNotFoundError, match="is missing"):
        check_dataset({"train": FoldersSource(tmp_path / "none")})


def test_folders_of_unknown_classes(tmp_path):
    """What training refuses or leaves out, the check reports; what training passes over, it passes over."""
    names = ("bright/1.png", "bright/2.png", "dark/3.png", "dark/4.png", ".git/5.png", "bright/.thumbs/6.png")
    for number, name in enumerate((*names, "stray.png")):
        write_image(tmp_path / "train" / name, number)
    write_text(tmp_path / "train/dark/4.png", "no image")
    values = {
        "name": "toy",
        "model": {"name": "cspnext_tiny", "classes": ["bright", "dim"]},
        "data": {"format": "folders", "root": str(tmp_path), "train_images": "train"},
        "augment": {"sampling": "classification"},
    }

    def found(drop=False, **data):
        recipe = parse_recipe(values | {"data": values["data"] | data})
        return check_dataset(recipe_parts(recipe), drop_unknown_classes=drop)

    summary = found()
    others = {"absent class": 1, "image without labels": 1}
    assert kinds(summary) == others | {"unknown class": 1, "broken image": 1}
    by_kind = {fault["kind"]: fault["examples"][0] for fault in summary["faults"]}
    assert by_kind["unknown class"]["place"] == str(tmp_path / "train" / "dark")
    assert by_kind["unknown class"]["text"].startswith("'dark' is no class of the model; the folder has 2 images")
    assert by_kind["image without labels"]["place"].endswith("stray.png")
    assert summary["parts"]["train"] == {
        "images": 4, "images_without_objects": 0, "objects": 2, "classes": {"bright": 2}
    }  # fmt: skip
    dropped = found(drop=True)
    assert kinds(dropped) == others | {"unknown class": 1} and dropped["errors"] == 0
    assert dropped["parts"]["train"]["images"] == 2
    write_text(tmp_path / "few.txt", "bright/1\nbright/9.png\n")
    few = found(drop=True, train_ids="few.txt")
    assert kinds(few) == others | {"unknown class": 1, "labels without image": 1}
    assert few["parts"]["train"]["images"] == 1 and few["faults"][0]["examples"][0]["text"].startswith("'bright/9.png'")
    write_text(tmp_path / "classes.txt", "dark dim\n")
    assert kinds(found()) == {"image without labels": 1, "broken image": 1}
    result = check("--format", "folders", "--images", tmp_path / "train", "--class", "bright")
    assert result.exit_code == 3 and "unknown class" in result.stdout and "dark: 'dim' is no class" in result.stdout
    listed = check("--format", "folders", "--images", tmp_path / "train", "--ids", tmp_path / "few.txt", "--json")
    assert json.loads(listed.stdout)["parts"]["data"]["images"] == 1


def test_parts_of_recipes(tmp_path):
    def parts(model, **data):
        values = {"name": "toy", "model": {"name": model, "classes": ["ship"]}, "data": data}
        if data["format"] == "folders":
            values["augment"] = {"sampling": "classification"}
        return recipe_parts(parse_recipe(values).with_data(tmp_path if data.get("root") is None else None))

    assert parts("rtmdet_r_tiny", format="chips", chips="elsewhere") == {"chips": ChipsSource(tmp_path, ("ship",))}
    labelled = parts("rtmdet_tiny", format="dota", train_images="i", train_labels="l", val_images="v", val_labels="w")
    assert labelled["train"] == PartSource("dota", tmp_path / "i", tmp_path / "l", None, ("ship",), "horizontal")
    assert labelled["val"].images == tmp_path / "v"
    assert parts("cspnext_tiny", format="folders", root=str(tmp_path), train_images="i") == {
        "train": FoldersSource(tmp_path / "i", None, ("ship",))
    }
    assert parts("cspnext_tiny", format="folders", train_images="i", train_ids="few.txt", val_images="v") == {
        "train": FoldersSource(tmp_path / "i", tmp_path / "few.txt", ("ship",)),
        "val": FoldersSource(tmp_path / "v", None, ("ship",)),
    }


def test_the_check_can_be_cancelled(tmp_path):
    root = dota_folder(tmp_path, a=SHIP, b=SHIP)
    with pytest.raises(Cancelled, match="after 1 of 2 images"):
        check_dataset({"train": dota(root)}, cancelled=lambda: True)


def test_findings():
    assert set(SEVERITIES) == set(MEANINGS)
    findings = Findings(limit=1)
    for number in range(3):
        findings.add("outside", f"a:{number}", "far away")
    kind, number, example = findings.first({"outside", "zero area"})
    assert (kind, number, str(example)) == ("outside", 3, "a:0: far away") and len(findings.examples["outside"]) == 1
    assert findings.first({"zero area"}) is None


# ---------------------------------------------------------------- the command


def test_command_exits_with_3_and_lists_faults(tmp_path):
    plant(tmp_path)
    words = ("--format", "dota", "--images", tmp_path / "train/images", "--labels", tmp_path / "train/labels")
    result = check(*words, "--class", "ship")
    assert result.exit_code == 3
    lines = result.stdout.splitlines()
    assert lines[0] == "data: 5 images (0 without objects), 6 objects: 6 ship"
    assert any(line.startswith("error: 3 x broken image: it does not decode") for line in lines)
    assert any(line.startswith("  ") and "a.txt:2: 'whale'" in line for line in lines)
    assert lines[-1] == "12 errors, 3 warnings"
    quiet = check(*words, "--class", "ship", "-q")
    assert quiet.exit_code == 3 and "warning" not in quiet.stdout and "data:" not in quiet.stdout
    one = check(*words, "--examples", 1)
    assert "  and 2 more" in one.stdout and "unknown class" not in one.stdout
    as_json = check(*words, "--class", "ship", "--json")
    assert as_json.exit_code == 3 and json.loads(as_json.stdout)["errors"] == 12
    events = [json.loads(line) for line in check(*words, "--progress", "jsonl").stdout.splitlines()]
    assert events[0]["event"] == "start" and events[-1]["event"] == "done" and events[-1]["errors"] == 11


def test_command_checks_a_recipe(tmp_path):
    root = dota_folder(tmp_path / "data", a=SHIP)
    data = {"format": "dota", "root": "nowhere", "train_images": "images", "train_labels": "labels"}
    recipe = {"name": "toy", "model": {"name": "rtmdet_r_tiny", "classes": ["ship"]}, "data": data}
    path = write_text(tmp_path / "toy.yaml", yaml.safe_dump(recipe))
    result = check(path, "--data", root)
    assert result.exit_code == 0 and result.stdout.splitlines()[-1] == "0 errors, 0 warnings"
    assert result.stdout.startswith("train: 1 images (0 without objects), 1 objects: 1 ship")
    assert check(path, "--data", root, "-q").stdout == ""
    unknown = check(path, "--data", root, "--set", "model.classes=[buoy]", "--set", "data.unknown_classes=drop")
    assert unknown.exit_code == 0 and "warning: 1 x unknown class" in unknown.stdout
    assert check(path, "--data", root, "--set", "model.classes=[buoy]").exit_code == 3
    missing = check(path)
    assert missing.exit_code == 1 and "nowhere/images' is missing" in missing.stderr and missing.stdout == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "Give a RECIPE"),
        (("sen2ships_r", "--format", "dota"), "Give a RECIPE"),
        (("sen2ships_r", "--images", "x"), "go with --format"),
        (("--format", "dota"), "needs --images"),
        (("--format", "dota", "--images", "x"), "needs --labels"),
        (("--format", "chips", "--images", "x", "--labels", "y"), "chips takes no --labels"),
        (("--format", "chips", "--images", "x", "--ids", "y"), "chips takes no --ids"),
        (("--format", "folders", "--images", "x", "--labels", "y"), "folders takes no --labels"),
        (("--format", "chips", "--images", "x", "--set", "a=b"), "go with a RECIPE"),
        (("--format", "chips", "--images", "x", "--json", "--progress", "jsonl"), "both write to stdout"),
    ],
)
def test_usage(words, message):
    result = check(*words)
    assert result.exit_code == 2 and message in result.stderr


def test_command_on_chips_and_folders(chips):
    chips(lambda index: None)
    assert check("--format", "chips", "--images", chips.folder).exit_code == 0
    write_image(chips.folder / "images" / "cat" / "1.png", 1)
    assert "1 cat" in check("--format", "folders", "--images", chips.folder / "images").stdout


def test_real_data_have_no_errors(data_dir):
    for name, source in {
        "rbox": PartSource("rbox", data_dir / "ssdd_tiny/images", data_dir / "ssdd_tiny/train"),
        "dota": PartSource("dota", data_dir / "ssdd_tiny/images", data_dir / "ssdd_tiny/train", classes=("ship",)),
        "hrsc": PartSource("hrsc", data_dir / "hrsc_xml_sample", data_dir / "hrsc_xml_sample", classes=("ship",)),
        "yolo_obb": PartSource("yolo_obb", data_dir / "dota8/images/train", data_dir / "dota8/labels/train"),
    }.items():
        summary = check_dataset({"train": source})
        assert (summary["errors"] > 0) == (name == "rbox"), (
            name
        )  # DOTA files read as another format: every line is wrong


def test_folders_that_do_not_belong_together(tmp_path):
    root = dota_folder(tmp_path, a=SHIP)
    write_text(root / "others/b.txt", SHIP)
    yolo = PartSource("yolo_obb", root / "images", root / "others")
    for source in (PartSource("dota", root / "images", root / "others"), yolo):
        with pytest.raises(DatasetNotFoundError, match=r"images' \(such as 'a\.png'\).*others' \(such as 'b\.txt'\)"):
            check_dataset({"data": source})
    coco = coco_folder(tmp_path / "coco", [coco_box(1, 1, [1, 2, 3, 4])])
    result = check("--format", "coco", "--images", root / "images", "-l", coco / "all.json")
    assert result.exit_code == 1 and "such as 'a.png'" in result.stderr and "'1.png'" in result.stderr


def test_class_list_beside_yolo_labels(tmp_path):
    root = dota_folder(tmp_path, a="1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n")
    write_text(root / "labels/classes.txt", "plane\nship\nbuoy\n")
    words = ("--format", "yolo_obb", "--images", root / "images", "-l", root / "labels")
    found = json.loads(check(*words, "--json").stdout)
    assert found["parts"]["data"]["classes"] == {"plane": 0, "ship": 1, "buoy": 0}
    assert kinds(found) == {"absent class": 2}
    turned = json.loads(check(*words, "--json", "--class", "ship", "--class", "plane").stdout)
    assert turned["parts"]["data"]["classes"] == {"ship": 1, "plane": 0}
    other = check(*words, "--class", "vessel", "--class", "boat")  # which would otherwise be a boat
    assert other.exit_code == 3 and "unknown class" in other.stdout and "'ship' of" in other.stdout


def test_partly_outside_is_judged_by_the_outline(tmp_path):
    # A triangle whose least rectangle lies on the long side and sticks out by 6 px at the top; one that sticks out.
    triangle = [(0, 0), (20, 4), (34, 20)]
    inside = " ".join(f"{x / 40} {y / 30}" for x, y in triangle)
    outside = " ".join(f"{x / 40 - 0.1} {y / 30}" for x, y in triangle)
    root = dota_folder(tmp_path, a=f"0 {inside}\n", b=f"0 {outside}\n")
    source = PartSource("yolo_obb", root / "images", root / "labels", classes=("ship",))
    boxes = [file.labels.boxes for file in read_part(source, Findings())]
    assert boxes_to_polygons(boxes[0]).min() < -4
    summary = check_dataset({"data": source})
    assert kinds(summary) == {"partly outside": 1}
    assert summary["faults"][0]["examples"][0]["place"].endswith("b.txt:1")


def test_angles_in_degrees_are_an_error(tmp_path):
    root = dota_folder(tmp_path, a="20 15 10 5 65.498 ship 0\n", b="20 15 10 5 6.2832 ship 0\n")
    summary = check_dataset({"data": PartSource("rbox", root / "images", root / "labels")})
    assert kinds(summary) == {"malformed labels": 1}
    (example,) = summary["faults"][0]["examples"]
    assert example["place"] == f"{root / 'labels/a.txt'}:1" and "any,deg,cw" in example["text"]
