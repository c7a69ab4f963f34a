"""Networks against the reference's names, shapes and numbers."""

from __future__ import annotations

import json

import pytest
import recipes
import torch

from rtmdet_geo.errors import UnknownModelError
from rtmdet_geo.models import BUILDERS, RotatedOutputs, get_model, rtmdet_r_test, rtmdet_r_tiny
from rtmdet_geo.models.rtmdet import SIZES

pytestmark = pytest.mark.usefixtures("one_thread")


def load_recipe(model, reference, oracle_dir):
    state = {key: torch.from_numpy(value) for key, value in recipes.weights(reference, oracle_dir).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)


def check_keys(model, golden):
    state = model.state_dict()
    ours = {(key, tuple(value.shape), str(value.dtype).removeprefix("torch.")) for key, value in state.items()}
    assert ours == {(key, tuple(shape), dtype) for key, shape, dtype in golden["keys"]}
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == golden["params"]
    for alias, canonical in golden["shared"].items():
        assert state[alias].data_ptr() == state[canonical].data_ptr(), alias
    addresses = {}
    for key, value in state.items():
        if value.numel() and key not in golden["shared"]:
            assert addresses.setdefault(value.data_ptr(), key) == key, f"{key} shares storage with another"


def test_oracle_keys(oracle_dir):
    files = sorted(oracle_dir.glob("keys_rotated_rtmdet_*.json"))
    assert files
    for file in files:
        golden = json.loads(file.read_text())
        model = get_model("rtmdet_r_" + golden["model"].rsplit("_", 1)[1])
        check_keys(model, golden)
        norms = {(m.eps, m.momentum) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)}
        assert norms == {tuple(pair) for pair in golden["bn_eps_momentum"]}


def test_oracle_keys_negative_control(oracle_dir):
    golden = json.loads((oracle_dir / "keys_rotated_rtmdet_tiny.json").read_text())
    with pytest.raises(AssertionError):
        check_keys(rtmdet_r_tiny(num_classes=14), golden)
    unshared = rtmdet_r_tiny()
    layer = unshared.bbox_head.cls_convs[2][1]
    layer.conv.weight = torch.nn.Parameter(layer.conv.weight.clone())
    layer_0 = unshared.bbox_head.cls_convs[0][1]
    layer_0.conv = torch.nn.Conv2d(96, 96, 3, padding=1, bias=False)
    with pytest.raises(AssertionError):
        check_keys(unshared, golden)


def run_golden(model, golden):
    """Return all outputs and hooked intermediates by name."""
    seen = {}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, path=path: seen.update({path: out}))
        for path in golden["intermediate"]
    ]
    with torch.inference_mode():
        outputs = model(torch.from_numpy(recipes.realise(golden["input"])))
    for hook in hooks:
        hook.remove()
    named = {
        f"{field}.{level}": tensor for field in outputs._fields for level, tensor in enumerate(getattr(outputs, field))
    }
    return named, seen


@pytest.mark.parametrize("size", ["tiny", "s", "m", "l"])
def test_oracle_forward(oracle_dir, size):
    """Every golden forward of this size (there may be none of some sizes, but not none at all)."""
    everything = sorted(oracle_dir.glob("forward_rotated_rtmdet_*.json"))
    assert everything
    files = [file for file in everything if json.loads(file.read_text())["model"].endswith(f"_{size}")]
    for file in files:
        golden = json.loads(file.read_text())
        model = get_model(f"rtmdet_r_{size}")
        load_recipe(model, golden["model"], oracle_dir)
        model.train(golden["mode"] == "train")
        outputs, seen = run_golden(model, golden)
        assert set(outputs) == set(golden["outputs"])
        for name, summary in golden["outputs"].items():
            assert recipes.check_summary(summary, outputs[name].numpy()) < 1e-4, name
        for name, summary in golden["intermediate"].items():
            assert recipes.check_summary(summary, seen[name].numpy()) < 1e-4, name


def test_oracle_forward_negative_control(oracle_dir):
    golden = json.loads(max(oracle_dir.glob("forward_rotated_rtmdet_*.json")).read_text())
    model = get_model("rtmdet_r_" + golden["model"].rsplit("_", 1)[1]).eval()
    load_recipe(model, golden["model"], oracle_dir)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
    outputs, _ = run_golden(model, golden)
    worst = max(recipes.check_summary(summary, outputs[name].numpy()) for name, summary in golden["outputs"].items())
    assert worst > 1e-4


@pytest.mark.parametrize("name", ["rtmdet_r_test", "rtmdet_r_nano", "rtmdet_r_tiny"])
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = get_model(name, num_classes=3, in_channels=4)
    outputs = model(torch.randn(2, 4, 64, 96))
    for level, stride in enumerate((8, 16, 32)):
        assert outputs.cls[level].shape == (2, 3, 64 // stride, 96 // stride)
        assert outputs.reg[level].shape == (2, 4, 64 // stride, 96 // stride)
        assert outputs.angle[level].shape == (2, 1, 64 // stride, 96 // stride)
    loss = sum(tensor.square().mean() for field in outputs for tensor in field)
    loss.backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not without
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_exp_on_reg_of_every_size():
    assert {name for name, size in SIZES.items() if size.exp_on_reg} == {"m", "l", "x"}


def test_start_probability_and_distances():
    """From scratch: every class starts near 0.01 and every box about two strides wide."""
    torch.manual_seed(0)
    model = rtmdet_r_test(num_classes=2).train()
    outputs = model(torch.randn(1, 3, 128, 128))
    for level, stride in enumerate(model.strides):
        assert outputs.cls[level].sigmoid().mean().item() == pytest.approx(0.01, abs=0.004)
        assert outputs.reg[level].mean().item() == pytest.approx(stride, rel=0.2)
        assert outputs.reg[level].min() > 0


def test_channels_last_and_autocast_agree():
    torch.manual_seed(0)
    model = rtmdet_r_test().eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        plain = model(images)
        last = model.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(images)
    for field in RotatedOutputs._fields:
        for one, two, three in zip(getattr(plain, field), getattr(last, field), getattr(mixed, field), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
            assert three.dtype == torch.float32
            torch.testing.assert_close(one, three, rtol=0.05, atol=0.2)


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (torch.zeros(1, 3, 64, 65), ValueError, "multiples of 32"),
        (torch.zeros(1, 3, 33, 64), ValueError, "multiples of 32"),
        (torch.zeros(1, 4, 64, 64), ValueError, "3 channels, got 4"),
        (torch.zeros(3, 64, 64), ValueError, "(N, C, H, W)"),
        (torch.zeros(0, 3, 64, 64), ValueError, "(N, C, H, W)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), TypeError, "uint8"),
    ],
)
def test_odd_inputs_are_refused(images, error, words):
    with pytest.raises(error) as caught:
        rtmdet_r_test()(images)
    assert words in str(caught.value)


def test_builders_and_near_names():
    assert set(BUILDERS) == {f"rtmdet_r_{size}" for size in ("test", "nano", "tiny", "s", "m", "l")}
    with pytest.raises(UnknownModelError, match=r"did you mean .*rtmdet_r_tiny"):
        get_model("rtmdet_r_tini")
    with pytest.raises(UnknownModelError, match="known: "):
        get_model("zzz")
    with pytest.raises(ValueError, match="at least 1"):
        rtmdet_r_test(num_classes=0)
    with pytest.raises(TypeError):
        rtmdet_r_test(15)
    model = rtmdet_r_test(num_classes=2, in_channels=5)
    assert (model.num_classes, model.in_channels, model.strides) == (2, 5, (8, 16, 32))
    assert model.architecture == "rtmdet_r_test"
