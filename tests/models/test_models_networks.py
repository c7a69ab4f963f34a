"""Networks against the reference's names, shapes and numbers."""

from __future__ import annotations

import copy
import json

import pytest
import recipes
import torch

from rtmdet_geo.errors import UnknownModelError
from rtmdet_geo.models import (
    BUILDERS,
    CLASSIFIERS,
    RotatedOutputs,
    cspnext_test,
    get_classifier,
    get_model,
    rtmdet_ins_test,
    rtmdet_ins_tiny,
    rtmdet_r_test,
    rtmdet_r_tiny,
)
from rtmdet_geo.models.rtmdet import SIZES

pytestmark = pytest.mark.usefixtures("one_thread")


#: Name in the golden files up to the size, and ours.
FAMILIES = {"rtmdet": "rtmdet", "rtmdet-ins": "rtmdet_ins", "rotated_rtmdet": "rtmdet_r", "cspnext": "cspnext"}


def build(reference, **arguments):
    """Build our model of the reference's name."""
    family, size = reference.rsplit("_", 1)
    name = f"{FAMILIES[family]}_{size}"
    return (get_classifier if family == "cspnext" else get_model)(name, **arguments)


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
        if value.is_floating_point() and key not in golden["shared"]:  # counters are not listed as shared
            assert addresses.setdefault(value.data_ptr(), key) == key, f"{key} shares storage with another"


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_keys(oracle_dir, family):
    files = sorted(oracle_dir.glob(f"keys_{family}_*.json"))
    assert files
    for file in files:
        golden = json.loads(file.read_text())
        model = build(golden["model"])
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
    instances = json.loads((oracle_dir / "keys_rtmdet-ins_tiny.json").read_text())
    two_sets = rtmdet_ins_tiny()
    two_sets.bbox_head.reg_convs = copy.deepcopy(two_sets.bbox_head.cls_convs)
    with pytest.raises(AssertionError):
        check_keys(two_sets, instances)


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
    return named_outputs(outputs), seen


def named_outputs(outputs):
    """Return all outputs by the golden files' names: cls.0, ..., mask_feat, logits."""
    if isinstance(outputs, torch.Tensor):
        return {"logits": outputs}
    named = {}
    for field, values in zip(outputs._fields, outputs, strict=True):
        if isinstance(values, torch.Tensor):
            named["mask_feat" if field == "mask_features" else field] = values
        else:
            named |= {f"{field}.{level}": tensor for level, tensor in enumerate(values)}
    return named


LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in ("m", "l", "x")]


@pytest.mark.parametrize("size", ["tiny", "s", *LARGE])
@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_forward(oracle_dir, family, size):
    """Every golden forward of this size (there may be none of some sizes, but not none at all), eval and train."""
    everything = sorted(oracle_dir.glob(f"forward_{family}_*.json"))
    assert everything
    goldens = [json.loads(file.read_text()) for file in everything]
    for golden in goldens:
        if golden["model"] != f"{family}_{size}":
            continue
        model = build(golden["model"])
        load_recipe(model, golden["model"], oracle_dir)
        model.train(golden["mode"] == "train")
        outputs, seen = run_golden(model, golden)
        assert set(outputs) == set(golden["outputs"])
        for name, summary in golden["outputs"].items():
            assert recipes.check_summary(summary, outputs[name].numpy()) < 1e-4, name
        for name, summary in golden["intermediate"].items():
            assert recipes.check_summary(summary, seen[name].numpy()) < 1e-4, name
        state = model.state_dict()
        for name, summary in golden.get("running_stats_after", {}).items():
            assert recipes.check_summary(summary, state[name].numpy()) < 1e-4, name


def test_oracle_has_a_forward_in_training(oracle_dir):
    modes = [json.loads(file.read_text()) for file in oracle_dir.glob("forward_*.json")]
    trained = [golden for golden in modes if golden["mode"] == "train"]
    assert trained
    assert all(golden["running_stats_after"] for golden in trained)


@pytest.mark.parametrize("family", FAMILIES)
def test_oracle_forward_negative_control(oracle_dir, family):
    """A forward that is off fails: the class default of eps instead of the configurations'."""
    files = sorted(oracle_dir.glob(f"forward_{family}_*.json"), key=lambda file: "tiny" not in file.name)
    golden = json.loads(files[0].read_text())
    model = build(golden["model"]).train(golden["mode"] == "train")
    load_recipe(model, golden["model"], oracle_dir)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3
    outputs, _ = run_golden(model, golden)
    worst = max(recipes.check_summary(summary, outputs[name].numpy()) for name, summary in golden["outputs"].items())
    assert worst > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "rtmdet_test",
        "rtmdet_nano",
        "rtmdet_ins_test",
        "rtmdet_ins_nano",
        "rtmdet_r_test",
        "rtmdet_r_nano",
        "rtmdet_r_tiny",
    ],
)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = get_model(name, num_classes=3, in_channels=4)
    outputs = model(torch.randn(2, 4, 64, 96))
    channels = {"cls": 3, "reg": 4, "angle": 1, "kernel": 169}
    for field in set(channels) & set(outputs._fields):
        for tensor, stride in zip(getattr(outputs, field), (8, 16, 32), strict=True):
            assert tensor.shape == (2, channels[field], 64 // stride, 96 // stride)
    if model.kind == "mask":
        assert outputs.mask_features.shape == (2, 8, 8, 12)
    loss = sum(tensor.square().mean() for tensor in named_outputs(outputs).values())
    loss.backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not without
    assert all(torch.isfinite(value.grad).all() for value in model.parameters())


def test_classifier_takes_any_sides_and_learns():
    torch.manual_seed(0)
    model = cspnext_test(num_classes=7, in_channels=5)
    logits = model(torch.randn(2, 5, 50, 71))
    assert logits.shape == (2, 7)
    logits.square().mean().backward()
    assert all(value.grad is not None and value.grad.any() for value in model.parameters())
    assert (model.kind, model.num_classes, model.in_channels) == ("classification", 7, 5)
    for wrong in (torch.zeros(1, 3, 50, 71), torch.zeros(5, 50, 71)):
        with pytest.raises(ValueError, match="cspnext_test"):
            model(wrong)


def test_instances_share_one_set_of_modules():
    """One tower under two names: each batch moves its norms twice in training, and evaluation runs it once."""
    torch.manual_seed(0)
    model = rtmdet_ins_test(num_classes=2).train()
    norm = model.bbox_head.cls_convs[0][0].bn
    assert model.bbox_head.reg_convs[0][0].bn is norm
    model(torch.randn(2, 3, 64, 64))
    assert norm.num_batches_tracked.item() == 2
    assert model.bbox_head.kernel_convs[0][0].bn.num_batches_tracked.item() == 1
    calls = []
    model.eval().bbox_head.cls_convs[0][0].register_forward_hook(lambda *_: calls.append(1))
    with torch.inference_mode():
        outputs = model(torch.randn(2, 3, 64, 64))
    assert len(calls) == 1
    assert all(level.min() >= 0 for level in outputs.reg)
    assert len({layer[0].conv for layer in model.bbox_head.kernel_convs}) == 3


def test_exp_on_reg_of_every_size():
    assert {name for name, size in SIZES.items() if size.exp_on_reg} == {"m", "l", "x"}


@pytest.mark.parametrize("name", ["rtmdet_test", "rtmdet_ins_test", "rtmdet_r_test"])
def test_start_probability_and_distances(name):
    """From scratch: every class starts near 0.01 and every box about two strides wide."""
    torch.manual_seed(0)
    model = get_model(name, num_classes=2).train()
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
    sizes = ("test", "nano", "tiny", "s", "m", "l", "x")
    expected = {f"{family}_{size}" for family in ("rtmdet", "rtmdet_ins", "rtmdet_r") for size in sizes}
    assert set(BUILDERS) == expected - {"rtmdet_r_x"}  # never published
    assert set(CLASSIFIERS) == {f"cspnext_{size}" for size in ("test", "tiny", "s", "m", "l", "x")}
    kinds = {get_model(f"{family}_test").kind for family in ("rtmdet", "rtmdet_ins", "rtmdet_r")}
    assert kinds == {"horizontal", "mask", "rotated"}
    with pytest.raises(UnknownModelError, match=r"did you mean .*rtmdet_r_tiny"):
        get_model("rtmdet_r_tini")
    with pytest.raises(UnknownModelError, match="known: "):
        get_model("zzz")
    with pytest.raises(UnknownModelError, match=r"did you mean .*cspnext_tiny"):
        get_classifier("cspnext_tini")
    for builder in (rtmdet_r_test, cspnext_test):
        with pytest.raises(ValueError, match="at least 1"):
            builder(num_classes=0)
    with pytest.raises(TypeError):
        rtmdet_r_test(15)
    model = rtmdet_r_test(num_classes=2, in_channels=5)
    assert (model.num_classes, model.in_channels, model.strides) == (2, 5, (8, 16, 32))
    assert model.architecture == "rtmdet_r_test"
