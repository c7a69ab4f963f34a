"""Weight files: round trip, strictness, damage; batch-norm fusion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rtmdet_geo.errors import ChecksumError, RTMDetGeoError, WeightsError
from rtmdet_geo.models import rtmdet_r_nano, rtmdet_r_test
from rtmdet_geo.models.weights import (
    build_from_weights,
    find_shared,
    fuse_batch_norm,
    load_state,
    load_weights,
    save_weights,
    weights_sha256,
)
from rtmdet_geo.structures import ModelSpec

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(builder=rtmdet_r_test, **arguments):
    """A model whose batch norms have seen images and whose weights are spread."""
    torch.manual_seed(0)
    model = builder(**{"num_classes": 2, **arguments})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.5)
        for module in model.bbox_head.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(10)
        for _ in range(30):
            model(torch.randn(2, model.in_channels, 64, 64))
    return model.eval()


def spec_of(model, **changes):
    channels = model.in_channels
    return ModelSpec(
        name="test",
        architecture=model.architecture,
        classes=tuple(f"class{i}" for i in range(model.num_classes)),
        bands=("red", "green", "blue", "nir")[:channels],
        mean=(100.0,) * channels,
        std=(50.0,) * channels,
        **changes,
    )


def flat(outputs):
    return torch.cat([tensor.flatten() for field in outputs for tensor in field])


@pytest.mark.parametrize("half", [True, False])
def test_round_trip(tmp_path, half):
    model = trained(in_channels=4)
    path = tmp_path / "model.safetensors"
    written = save_weights(model, path, spec_of(model), half=half)
    again, spec = build_from_weights(path)
    assert spec == written
    assert spec.weights_sha256 == weights_sha256(again.state_dict())
    assert not again.training
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]  # nothing temporary left
    ours, theirs = model.state_dict(), again.state_dict()
    assert find_shared(ours) == find_shared(theirs)
    for key, value in ours.items():
        if half and value.ndim >= 2:
            assert torch.equal(theirs[key], value.half().float())
        else:
            assert torch.equal(theirs[key], value)
    images = torch.randn(1, 4, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(flat(model(images)), flat(again(images)), rtol=0.02, atol=0.02 if half else 0)
    rewritten = save_weights(again, tmp_path / "again.safetensors", spec, half=half)
    assert rewritten == spec  # a second round trip changes nothing
    built = rtmdet_r_test(num_classes=2, in_channels=4, weights=path)
    assert weights_sha256(built.state_dict()) == spec.weights_sha256


def test_shared_tensors_are_stored_once(tmp_path):
    model = trained()
    path = tmp_path / "model.safetensors"
    save_weights(model, path, spec_of(model))
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
    assert "bbox_head.cls_convs.0.0.conv.weight" in names
    assert "bbox_head.cls_convs.1.0.conv.weight" not in names
    state, _ = load_weights(path)
    assert set(state) == set(model.state_dict())
    assert path.stat().st_size < 2.4 * sum(p.numel() for p in model.parameters()) + 200_000


def test_damaged_files_are_refused(tmp_path):
    model = trained()
    good = tmp_path / "good.safetensors"
    spec = save_weights(model, good, spec_of(model))
    content = good.read_bytes()
    damaged = {
        "empty": b"",
        "truncated": content[: len(content) // 2],
        "header": b"\xff" * 64 + content[64:],
        "text": b"not weights at all",
    }
    for name, data in damaged.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(data)
        with pytest.raises(WeightsError, match="cannot read weights") as caught:
            load_weights(path)
        assert "\n" not in str(caught.value), name
    with pytest.raises(WeightsError, match="cannot read weights"):
        load_weights(tmp_path / "missing.safetensors")
    flipped = bytearray(content)
    flipped[-9] ^= 0x10
    (tmp_path / "flipped.safetensors").write_bytes(flipped)
    with pytest.raises(ChecksumError, match="not the ones"):
        load_weights(tmp_path / "flipped.safetensors")
    bare = tmp_path / "bare.safetensors"
    save_file({"a": torch.zeros(1)}, bare)
    with pytest.raises(WeightsError, match="model_spec"):
        load_weights(bare)
    save_file({"a": torch.zeros(1)}, bare, metadata={"model_spec": '{"name": "x"}'})
    with pytest.raises(WeightsError, match="model_spec"):
        load_weights(bare)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    save_file(state, bare, metadata={"model_spec": spec.model_dump_json(), "shared": '{"b": "nowhere"}'})
    with pytest.raises(WeightsError, match="shared"):
        load_weights(bare)


def test_values_beyond_float16_are_refused_and_nothing_is_written(tmp_path):
    model = trained()
    with torch.no_grad():
        model.bbox_head.rtm_cls[0].weight[0, 0] = 1e6
    with pytest.raises(WeightsError, match="rtm_cls"):
        save_weights(model, tmp_path / "model.safetensors", spec_of(model))
    assert not list(tmp_path.iterdir())
    save_weights(model, tmp_path / "model.safetensors", spec_of(model), half=False)


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"old")

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr("rtmdet_geo.models.weight_files.save_file", fail)
    model = rtmdet_r_test()
    with pytest.raises(OSError, match="disk full"):
        save_weights(model, path, spec_of(model))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_load_state_lists_every_kind_of_fault():
    model = rtmdet_r_test(num_classes=2)
    before = weights_sha256(model.state_dict())
    state = dict(rtmdet_r_test(num_classes=3).state_dict())
    del state["backbone.stem.0.conv.weight"]
    state["head.fc.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        load_state(model, state, source="here.safetensors")
    message = str(caught.value)
    assert "1 missing: backbone.stem.0.conv.weight" in message
    assert "1 unexpected: head.fc.weight" in message
    assert "6 wrongly shaped: bbox_head.rtm_cls.0.weight (3, 32, 1, 1) for (2, 32, 1, 1)" in message
    assert "and 1 more" in message
    assert "here.safetensors" in message
    assert "\n" not in message
    assert weights_sha256(model.state_dict()) == before
    assert isinstance(caught.value, OSError)
    assert isinstance(caught.value, RTMDetGeoError)


def test_load_state_without_batch_counters():
    model, other = rtmdet_r_test(), trained(num_classes=15)
    state = {key: value for key, value in other.state_dict().items() if not key.endswith("num_batches_tracked")}
    load_state(model, state)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(flat(model.eval()(images)), flat(other(images)))


def test_wrong_architecture_is_refused(tmp_path):
    model = trained()
    path = tmp_path / "model.safetensors"
    save_weights(model, path, spec_of(model).model_copy(update={"architecture": "rtmdet_q"}))
    with pytest.raises(WeightsError, match="rtmdet_q"):
        build_from_weights(path)
    with pytest.raises(WeightsError, match="wrongly shaped"):
        rtmdet_r_nano(num_classes=2, weights=path)


def test_sha256_sees_values_names_and_shapes():
    state = {"a": torch.arange(6.0), "b": torch.tensor(0)}
    base = weights_sha256(state)
    assert base == weights_sha256(dict(reversed(state.items())))
    assert base != weights_sha256({"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0)})
    assert base != weights_sha256({"c": torch.arange(6.0), "b": torch.tensor(0)})
    changed = torch.arange(6.0)
    changed[3] = float(np.nextafter(np.float32(3), np.float32(4)))
    assert base != weights_sha256({"a": changed, "b": torch.tensor(0)})


def test_fused_model_equals_unfused():
    model = trained()
    before = weights_sha256(model.state_dict())
    fused = fuse_batch_norm(model)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert not find_shared(fused.state_dict())
    assert weights_sha256(model.state_dict()) == before
    images = torch.randn(2, 3, 64, 96)
    with torch.inference_mode():
        ours, theirs = flat(fused(images)), flat(model(images))
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
