"""Loading into networks: other programs' files, parts, other classes, other bands. Never silent, never half."""

from __future__ import annotations

import logging

import pytest
import torch
from checkpoint_files import write_openmmlab

from rtmdet_geo.errors import ConfigError, UnknownModelError, WeightsError
from rtmdet_geo.models import (
    cspnext_test,
    rtmdet_ins_test,
    rtmdet_nano,
    rtmdet_r_nano,
    rtmdet_r_test,
    rtmdet_test,
)
from rtmdet_geo.models.transfer import FIRST_CONVOLUTION, adapt_bands
from rtmdet_geo.models.weights import (
    build_from_weights,
    find_shared,
    load_checkpoint,
    load_into,
    load_state,
    weights_sha256,
)

pytestmark = pytest.mark.usefixtures("one_thread")
EVERY_TEST_BUILDER = [rtmdet_test, rtmdet_ins_test, rtmdet_r_test, cspnext_test]


def random_state(builder, **arguments):
    """Values unlike any initialisation, aliases kept; clones, as a file without shared storage has them."""
    model = builder(**arguments)
    generator = torch.Generator().manual_seed(1)
    own = model.state_dict()
    shared = find_shared(own)
    state = {}
    for name, value in own.items():
        if name in shared:
            state[name] = state[shared[name]].clone()
        elif value.is_floating_point():
            state[name] = torch.randn(value.shape, generator=generator)
        else:
            state[name] = torch.tensor(9)
    return state


def same(model, state) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("builder", EVERY_TEST_BUILDER)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_builders_take_foreign_files(tmp_path, builder, prefix):
    state = random_state(builder)
    path = write_openmmlab(tmp_path / "a.pth", {f"{prefix}{name}": value for name, value in state.items()})
    assert same(builder(weights=path), state)
    assert same(builder(weights=str(path)), state)


def test_bare_and_renamed_parts(tmp_path):
    state = random_state(rtmdet_test)
    renamed = {name.replace("bbox_head.", "head.").removeprefix("backbone."): value for name, value in state.items()}
    torch.save(renamed, tmp_path / "a.pth")
    assert same(rtmdet_test(weights=tmp_path / "a.pth"), state)
    state = random_state(cspnext_test)
    bare = {name.removeprefix("backbone.").removeprefix("head."): value for name, value in state.items()}
    torch.save(bare, tmp_path / "b.pth")
    assert same(cspnext_test(weights=tmp_path / "b.pth"), state)


def test_aliases_need_to_be_there_once_and_to_agree():
    """The head's convolutions are one tensor under three names, its towers for instances one module under two."""
    for builder in (rtmdet_test, rtmdet_ins_test, rtmdet_r_test):
        state = random_state(builder)
        shared = find_shared(builder().state_dict())
        assert shared
        model = builder()
        load_state(model, {name: value for name, value in state.items() if name not in shared})
        assert same(model, state)
        alias = next(iter(shared))
        with pytest.raises(WeightsError, match=f"1 different though .*: {alias} and {shared[alias]}"):
            load_state(builder(), {**state, alias: state[alias] + 1})
        missing = {name: value for name, value in state.items() if shared.get(name, name) != shared[alias]}
        with pytest.raises(WeightsError, match="missing"):
            load_state(builder(), missing)


def test_mismatch_lists_keys_and_changes_nothing(tmp_path):
    state = random_state(rtmdet_test)
    del state["neck.out_convs.0.bn.weight"]
    state["neck.surplus"] = torch.ones(1)
    state["backbone.stem.1.conv.weight"] = torch.ones(2, 2)
    path = write_openmmlab(tmp_path / "a.pth", state)
    model = rtmdet_test()
    before = weights_sha256(model.state_dict())
    for transfer in (False, True):
        with pytest.raises(WeightsError) as caught:
            load_checkpoint(model, path, transfer=transfer)
        message = str(caught.value)
        assert "1 missing: neck.out_convs.0.bn.weight" in message and "1 unexpected: neck.surplus" in message
        assert "1 wrongly shaped: backbone.stem.1.conv.weight (2, 2) for (4, 4, 3, 3)" in message
        assert weights_sha256(model.state_dict()) == before


def test_names_and_paths_that_do_not_exist(tmp_path):
    with pytest.raises(UnknownModelError, match="did you mean 'rtmdet_tiny_coco'"):
        load_into(rtmdet_test(), "rtmdet_tiny")
    with pytest.raises(WeightsError, match="No such file"):
        load_into(rtmdet_test(), tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="No such file"):
        load_into(rtmdet_test(), "none.safetensors")


# ---------------------------------------------------------------- parts


def test_backbone_of_a_classifier(tmp_path):
    """What pretraining on ImageNet leaves: everything else keeps its initial values."""
    state = random_state(cspnext_test)
    path = write_openmmlab(tmp_path / "cspnext.pth", state)
    model = rtmdet_r_test(num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"unexpected: head\.fc"):
        load_into(model, path)
    report = load_checkpoint(model, path, parts=("backbone",))
    assert report.ignored == ("head.fc.bias", "head.fc.weight")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name] if name.startswith("backbone.") else before[name])
    assert set(report.loaded) == {name for name in state if name.startswith("backbone.")}


def test_bare_backbone_file_and_one_part_as_text(tmp_path):
    state = random_state(cspnext_test)
    bare = {name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")}
    torch.save({"model": bare}, tmp_path / "a.pth")
    model = rtmdet_test()
    assert len(load_checkpoint(model, tmp_path / "a.pth", parts="backbone").loaded) == len(bare)
    assert torch.equal(model.state_dict()[FIRST_CONVOLUTION], state[FIRST_CONVOLUTION])


def test_backbone_and_neck_of_another_task(tmp_path):
    """The published recipe of rotated RTMDet-l from COCO weights: the head starts anew."""
    state = random_state(rtmdet_test)
    path = write_openmmlab(tmp_path / "coco.pth", state)
    model = rtmdet_r_test()
    report = load_checkpoint(model, path, parts=("backbone", "neck"))
    assert all(name.startswith("bbox_head.") for name in report.ignored) and report.ignored
    assert torch.equal(model.state_dict()["neck.out_convs.0.bn.weight"], state["neck.out_convs.0.bn.weight"])


def test_parts_are_strict(tmp_path):
    state = random_state(cspnext_test)
    del state["backbone.stem.0.bn.bias"]
    path = write_openmmlab(tmp_path / "a.pth", state)
    with pytest.raises(WeightsError, match=r"1 missing: backbone.stem.0.bn.bias"):
        load_checkpoint(rtmdet_test(), path, parts=("backbone",))
    with pytest.raises(WeightsError, match="missing"):
        load_checkpoint(rtmdet_test(), path, parts=("neck",))
    with pytest.raises(ConfigError, match="parts: backbone, neck, bbox_head"):
        load_checkpoint(rtmdet_test(), path, parts=("body",))
    with pytest.raises(WeightsError, match="wrongly shaped"):
        load_checkpoint(rtmdet_nano(), path, parts=("backbone",))


# ---------------------------------------------------------------- transfer


@pytest.mark.parametrize("builder", EVERY_TEST_BUILDER)
def test_other_classes(tmp_path, builder, caplog):
    state = random_state(builder, num_classes=4)
    path = write_openmmlab(tmp_path / "a.pth", state)
    with pytest.raises(WeightsError, match="transfer=True"):
        builder(num_classes=2, weights=path)
    model = builder(num_classes=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, path, transfer=True)
    assert report.reinitialised and not report.adapted
    assert all("rtm_cls" in name or "head.fc" in name for name in report.reinitialised)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] if name in report.reinitialised else state[name])
    assert "re-initialised" in caplog.text and all(name in caplog.text for name in report.reinitialised)


def test_transfer_of_what_fits_changes_nothing(tmp_path, caplog):
    state = random_state(rtmdet_test)
    path = write_openmmlab(tmp_path / "a.pth", state)
    model = rtmdet_test()
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, path, transfer=True)
    assert same(model, state) and not report.reinitialised and not report.adapted and not caplog.text


def test_other_bands(tmp_path, caplog):
    state = random_state(rtmdet_r_test)
    path = write_openmmlab(tmp_path / "a.pth", state)
    with pytest.raises(WeightsError, match="transfer=True"):
        rtmdet_r_test(in_channels=4, weights=path)
    model = rtmdet_r_test(in_channels=4)
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, path, transfer=True)
    assert report.adapted == (FIRST_CONVOLUTION,) and "bands" in caplog.text and FIRST_CONVOLUTION in caplog.text
    images = torch.randn(1, 1, 32, 32)
    with torch.inference_mode():
        here = torch.nn.functional.conv2d(images.expand(-1, 4, -1, -1), model.backbone.stem[0].conv.weight)
        there = torch.nn.functional.conv2d(images.expand(-1, 3, -1, -1), state[FIRST_CONVOLUTION])
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)  # grey images give what they gave


def test_bands_by_name(tmp_path):
    state = random_state(rtmdet_r_test)
    path = write_openmmlab(tmp_path / "a.pth", state)
    model = rtmdet_r_test(in_channels=3)
    order = {"bands": ("red", "green", "blue"), "source_bands": ("blue", "green", "red")}
    report = load_checkpoint(model, path, transfer=True, **order)
    assert report.adapted == (FIRST_CONVOLUTION,)
    assert torch.equal(model.state_dict()[FIRST_CONVOLUTION], state[FIRST_CONVOLUTION].flip(1))
    before = weights_sha256(model.state_dict())
    with pytest.raises(
        WeightsError, match=r"is for bands blue, green, red, the network for red, green, blue; transfer"
    ):
        load_checkpoint(model, path, **order)
    with pytest.raises(ConfigError, match="the network has 3 channels"):
        load_checkpoint(model, path, transfer=True, bands=("red",), source_bands=("blue", "green", "red"))
    assert weights_sha256(model.state_dict()) == before
    same_order = {"bands": ("blue", "green", "red"), "source_bands": ("blue", "green", "red")}
    assert load_checkpoint(model, path, **same_order).is_exact and same(model, state)


def test_bands_that_a_file_does_not_name(tmp_path, caplog):
    """Taken as they come if there are as many, every one the mean if not; said either way."""
    state = random_state(rtmdet_r_test)
    path = write_openmmlab(tmp_path / "a.pth", state)
    for transfer in (False, True):
        model = rtmdet_r_test()
        report = load_checkpoint(model, path, transfer=transfer, bands=("red", "green", "blue"))
        assert same(model, state) and not report.adapted and "bands are not stated" in report.remarks[0]
    model = rtmdet_r_test(in_channels=4)
    report = load_checkpoint(model, path, transfer=True, bands=("red", "green", "blue", "nir"))
    assert report.adapted == (FIRST_CONVOLUTION,) and report.remarks
    mean = state[FIRST_CONVOLUTION].mean(dim=1, keepdim=True) * 0.75
    torch.testing.assert_close(model.state_dict()[FIRST_CONVOLUTION], mean.expand(-1, 4, -1, -1))
    assert caplog.text.count("bands are not stated: source_bands= (model.weights_bands in a recipe)") == 3


def test_bands_that_contradict_the_file():
    model = rtmdet_r_nano(num_classes=1, in_channels=4)
    with pytest.raises(ConfigError, match="says that it is for bands red, green, blue, nir"):
        load_checkpoint(model, "sen2ships_r", transfer=True, source_bands=("blue", "green", "red", "nir"))
    swapped = ("blue", "green", "red", "nir")
    with pytest.raises(WeightsError, match="'sen2ships_r' is for bands red, green, blue, nir, the network for blue"):
        load_checkpoint(model, "sen2ships_r", bands=swapped)
    assert load_checkpoint(model, "sen2ships_r", bands=("red", "green", "blue", "nir")).is_exact


def test_other_names_of_as_many_classes_are_told(tmp_path, caplog):
    path = write_openmmlab(tmp_path / "a.pth", random_state(rtmdet_test, num_classes=2), classes=("car", "ship"))
    for transfer in (False, True):
        report = load_checkpoint(rtmdet_test(num_classes=2), path, transfer=transfer, classes=("car", "boat"))
        assert report.remarks == ("class 1 was 'ship' and is 'boat': its layers are kept",)
    assert report.remarks[0] in caplog.text
    assert load_checkpoint(rtmdet_test(num_classes=2), path, classes=("car", "ship")).is_exact
    assert not load_checkpoint(rtmdet_test(), path, parts="backbone", classes=("car", "boat")).remarks


def test_one_line_names_what_was_not_loaded(tmp_path, caplog):
    path = write_openmmlab(tmp_path / "a.pth", random_state(cspnext_test, num_classes=7))
    bands = {"bands": ("red", "nir"), "source_bands": ("red", "green", "blue")}
    report = load_checkpoint(rtmdet_test(in_channels=2), path, parts=["backbone"], transfer=True, **bands)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert (
        line
        == report.describe()
        == (
            f"{path}: {len(report.loaded)} tensors loaded; other bands, fitted: {FIRST_CONVOLUTION}; "
            "not asked for, re-initialised: neck, bbox_head"
        )
    )


def test_adapt_bands_by_hand():
    weight = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 3, 1, 1)

    def kernels(*arguments, **keywords):
        return adapt_bands(weight, *arguments, **keywords).flatten().tolist()

    bgr = ("blue", "green", "red")
    assert kernels(3) == [1, 2, 6]
    assert kernels(1) == [9] and kernels(6) == [1.5] * 6
    assert kernels(2, bands=("red", "green"), source_bands=bgr) == [6, 2]
    assert kernels(4, bands=("red", "green", "blue", "nir"), source_bands=bgr) == pytest.approx([4.5, 1.5, 0.75, 2.25])


def test_bundled_weights_know_their_bands():
    """Four bands red, green, blue, nir there; one here."""
    model = rtmdet_r_nano(num_classes=1, in_channels=1)
    report = load_checkpoint(model, "sen2ships_r", transfer=True, bands=("nir",))
    network, spec = build_from_weights("sen2ships_r")
    nir = spec.bands.index("nir")
    theirs = network.state_dict()[FIRST_CONVOLUTION][:, [nir]]
    assert torch.equal(model.state_dict()[FIRST_CONVOLUTION], theirs) and report.adapted == (FIRST_CONVOLUTION,)


def test_everything_at_once(tmp_path, caplog):
    """Backbone of a classifier of photographs into a detector of four bands."""
    path = write_openmmlab(tmp_path / "a.pth", random_state(cspnext_test, num_classes=7))
    model = rtmdet_r_test(num_classes=1, in_channels=4)
    report = load_checkpoint(
        model,
        path,
        parts=("backbone",),
        transfer=True,
        bands=("red", "green", "blue", "nir"),
        source_bands=("red", "green", "blue"),
    )
    assert report.adapted == (FIRST_CONVOLUTION,) and not report.reinitialised and report.ignored
