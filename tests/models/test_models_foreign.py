"""Checkpoints of other programs: what is read, and that nothing in them ever runs."""

from __future__ import annotations

import collections
import contextlib
import copyreg
import io
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from checkpoint_files import MODULES, write_openmmlab
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rtmdet_geo.errors import WeightsError
from rtmdet_geo.models.foreign import fit_names, read_foreign
from rtmdet_geo.models.inert_pickle import Name, Placeholder, TensorReference, load_inert

pytestmark = pytest.mark.usefixtures("one_thread")


def small_state() -> OrderedDict[str, torch.Tensor]:
    """Tensors of many dtypes and layouts under names like a network's; two names are one tensor."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4, 3, generator=generator)
    base = torch.randn(6, 5, generator=generator)
    return OrderedDict(
        {
            "backbone.a.weight": shared,
            "bbox_head.b.weight": shared,
            "neck.transposed": base.t(),
            "neck.part": base[1:3, ::2],
            "neck.half": torch.randn(3, generator=generator).half(),
            "neck.bfloat16": torch.randn(3, generator=generator).bfloat16(),
            "neck.double": torch.randn(2, generator=generator).double(),
            "neck.flag": torch.tensor([True, False]),
            "neck.empty": torch.empty(0, 4),
            "neck.empty_count": torch.empty(0, dtype=torch.int64),
            "neck.num_batches_tracked": torch.tensor(7),
            "neck.parameter": torch.nn.Parameter(torch.ones(2)),
        }
    )


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("legacy", [False, True])
def test_file_of_mmengine(tmp_path, legacy):
    path = write_openmmlab(tmp_path / "a.pth", small_state(), classes=("plane", "ship"), legacy=legacy)
    found = read_foreign(path)
    assert_equal(found.state, small_state())
    assert found.state["backbone.a.weight"].data_ptr() == found.state["bbox_head.b.weight"].data_ptr()
    assert (found.key, found.classes) == ("state_dict", ("plane", "ship"))
    assert not set(MODULES) & set(sys.modules)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol(tmp_path, legacy, protocol):
    path = tmp_path / "a.pth"
    torch.save(
        {"model": small_state(), "x": {1.5, b"y"}},
        path,
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=not legacy,
    )
    assert_equal(read_foreign(path).state, small_state())


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (lambda state: state, ""),
        (lambda state: {"state_dict": state}, "state_dict"),
        (lambda state: {"model": state, "epoch": 3}, "model"),
        (lambda state: {"model": {"state_dict": state}}, "model.state_dict"),
        (lambda state: {"ema_state_dict": state}, "ema_state_dict"),
        (lambda state: {"state_dict_ema": state, "state_dict": other(state)}, "state_dict_ema"),
        (lambda state: {"ema": {"module": state, "updates": 5}, "model": other(state)}, "ema.module"),
        (lambda state: {"network": other(state), "ema": state}, "ema"),
        (lambda state: {"ema_state_dict": state, "state_dict": other(state)}, "ema_state_dict"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module._orig_mod.", "module.module."])
def test_where_programs_keep_weights(tmp_path, content, key, prefix):
    state = {f"{prefix}{name}": value for name, value in small_state().items()}
    torch.save(content(state), tmp_path / "a.pth")
    found = read_foreign(tmp_path / "a.pth")
    assert found.key == key
    assert_equal(found.state, small_state())


def other(state):
    return {name: torch.zeros_like(value) for name, value in state.items()}


def test_mmengine_swaps_averaged_and_plain_weights(tmp_path):
    """Its ``state_dict`` holds the averages when both are there; the counter ``steps`` tells its files."""
    path = write_openmmlab(tmp_path / "a.pth", small_state(), averaged=other(small_state()))
    found = read_foreign(path)
    assert found.key == "state_dict"
    assert_equal(found.state, small_state())


def test_counters_and_preprocessors_are_no_weights(tmp_path):
    extras = {
        "n_averaged": torch.tensor(3),
        "data_preprocessor.mean": torch.ones(3, 1, 1),
        "ema_backbone_a_weight": torch.zeros(4, 3),
    }
    torch.save({**small_state(), **extras}, tmp_path / "a.pth")
    assert_equal(read_foreign(tmp_path / "a.pth").state, small_state())


def test_foreign_safetensors(tmp_path):
    save_file({"module.backbone.a": torch.ones(2)}, tmp_path / "a.safetensors")
    assert_equal(read_foreign(tmp_path / "a.safetensors").state, {"backbone.a": torch.ones(2)})


def test_names_that_differ_by_a_prefix():
    own = ["backbone.stem.0.weight", "bbox_head.rtm_cls.0.bias", "head.fc.weight"]
    assert fit_names(["stem.0.weight", "head.rtm_cls.0.bias", "fc.weight"], own) == {
        "stem.0.weight": "backbone.stem.0.weight",
        "head.rtm_cls.0.bias": "bbox_head.rtm_cls.0.bias",
        "fc.weight": "head.fc.weight",
    }
    assert fit_names(own, own) == {name: name for name in own}
    assert fit_names(["stem.0.weight", "backbone.stem.0.weight"], own)["stem.0.weight"] == "stem.0.weight"  # taken
    twice = fit_names(["head.rtm_cls.0.bias", "rtm_cls.0.bias"], own)
    assert sorted(twice.values()) == ["bbox_head.rtm_cls.0.bias", "rtm_cls.0.bias"]  # the second stays unexpected


# ---------------------------------------------------------------- nothing runs


class Evil:
    """Pickles as a call."""

    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce__(self) -> object:
        return self.reduced


def calls(marker: Path) -> dict[str, object]:
    """Objects that touch ``marker`` when they are unpickled."""
    command, code = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    touch = Evil(os.system, (command,))
    inner = pickle.dumps(Evil(os.system, (command,)))
    saved = io.BytesIO()
    torch.save(touch, saved)
    return {
        "os.system": touch,
        "builtins.eval": Evil(eval, (code,)),
        "builtins.exec": Evil(exec, (code,)),
        "pathlib": Evil(Path.touch, (marker,)),
        "nested": Evil(getattr, (Evil(__import__, ("os",)), "system")),
        "call of a result": Evil(map, (os.system, [command]), None, None),
        "list of it": Evil(list, (Evil(map, (os.system, [command])),)),
        "pickle in a pickle": Evil(pickle.loads, (inner,)),
        "torch storage with a file": Evil(torch.storage._load_from_bytes, (saved.getvalue(),)),
        "torch.load": Evil(torch.load, (str(marker.with_suffix(".evil")),)),
        "torch.hub": Evil(torch.hub.load, (str(marker.parent), "evil"), None, None),
        "state": Evil(copyreg._reconstructor, (collections.UserDict, object, None), {"data": touch}),
        "in a dictionary": OrderedDict([(b"key", touch)]),
        "key of a dictionary": {("tuple", 1): touch},
        "ordered dictionary of it": Evil(OrderedDict, ([[1, touch]],)),
        "attribute": Evil(setattr, (collections.UserDict, "evil", 5)),
        "tensor hook": Evil(torch._utils._rebuild_parameter, (torch.ones(1), True, OrderedDict([(0, touch)]))),
        "tensor subclass": Evil(torch._tensor._rebuild_from_type_v2, (os.system, torch.Tensor, (command,), {})),
        "parameter with state": Evil(
            torch._utils._rebuild_parameter_with_state, (torch.ones(1), True, OrderedDict(), {"x": touch})
        ),
    }


#: Objects that touch nothing even in Python's own unpickler (harmless here, or only with a network).
QUIET = {"nested", "call of a result", "attribute", "torch.hub", "torch.load"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", calls(Path("x")))
def test_malicious_objects_do_nothing(tmp_path, name, legacy):
    marker = tmp_path / "marker"
    path = tmp_path / "a.pth"
    evil = calls(marker)[name]
    torch.save({"state_dict": small_state(), "meta": evil}, path, _use_new_zipfile_serialization=not legacy)
    modules = set(sys.modules)
    assert_equal(read_foreign(path).state, small_state())
    assert not marker.exists() and not hasattr(collections.UserDict, "evil")
    assert set(sys.modules) - modules == set()
    if name not in QUIET:  # negative control: the file would have done it
        with contextlib.suppress(AttributeError):
            torch.load(path, weights_only=False)
        assert marker.exists()


def test_malicious_weights_are_refused(tmp_path):
    """In the place of the weights themselves."""
    for number, evil in enumerate(calls(tmp_path / "marker").values()):
        path = tmp_path / f"{number}.pth"
        torch.save({"state_dict": evil}, path)
        with pytest.raises(WeightsError, match="no state_dict"):
            read_foreign(path)
    torch.save(Evil(os.system, (f"touch {tmp_path / 'marker'}",)), path)
    with pytest.raises(WeightsError, match="system, saved whole"):
        read_foreign(path)
    assert not (tmp_path / "marker").exists()


def test_hand_written_opcodes_do_nothing(tmp_path):
    """Every opcode that can make or change an object."""
    command = f"touch {tmp_path / 'marker'}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    system = b"cposix\nsystem\n"
    programs = {
        "GLOBAL REDUCE": system + b"(" + text + b"tR.",
        "STACK_GLOBAL REDUCE": b"\x8c\x05posix\x8c\x06system\x93" + text + b"\x85R.",
        "INST": b"(" + text + b"iposix\nsystem\n.",
        "OBJ": b"(" + system + text + b"o.",
        "NEWOBJ": system + text + b"\x85\x81.",
        "NEWOBJ_EX": system + text + b"\x85}\x92.",
        "BUILD": system + b")\x81}" + text + b"Nsb.",
        "BUILD with slots": b"ccollections\nOrderedDict\n" + b"N}" + text + b"Ns\x86b.",
        "APPENDS": system + b")R(" + text + b"e.",
        "SETITEMS": system + b")R(" + text + b"Nu.",
        "ADDITEMS": system + b")R(" + text + b"\x90.",
        "REDUCE of a result": b"cbuiltins\ngetattr\n(cos\nsystem\nX\x08\x00\x00\x00__call__tR" + text + b"\x85R.",
        "PERSID": b"Pposix.system\n.",
        "BINPERSID": system + text + b"\x86Q.",
    }
    for name, program in programs.items():
        value = load_inert(io.BytesIO(b"\x80\x04" + program))
        assert isinstance(value, Placeholder | Name), name
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02\x82\x01.",  # EXT1: the extension registry
        b"\x80\x05\x97.",  # NEXT_BUFFER
        b"\x80\x02R.",  # nothing on the stack
        b"\x80\x02(R.",
        b"\x80\x02]s.",
        b"\x80\x02e.",
        b"\x80\x02}(K\x01u.",  # a key without value
        b"\x80\x02h\x05.",  # never memorised
        b"\x80\x02K\x01K\x02R.",  # arguments that are no tuple
        b"\x80\x02N",  # no end
        b"",
        b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # says that 2**63 - 1 bytes follow
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)))tR.",  # a tensor without storage
        b"ccollections\nOrderedDict\nK\x05\x85R.",
    ],
)
def test_broken_pickles(program):
    with pytest.raises(WeightsError):
        load_inert(io.BytesIO(program))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda values: (
        st.lists(values)
        | st.tuples(values, values)
        | st.dictionaries(st.text() | st.integers(), values)
        | st.sets(st.text() | st.integers())
    ),
)


@settings(max_examples=60, deadline=None)
@given(value=PLAIN, protocol=st.sampled_from([2, 3, 4, 5]))
def test_plain_values_as_pickle_reads_them(value, protocol):
    expected = pickle.loads(pickle.dumps(value, protocol))
    found = load_inert(io.BytesIO(pickle.dumps(value, protocol)))
    if protocol >= 4 or "set" not in repr(type(value)):  # before 4 a set is a call of builtins.set: a placeholder
        assert found == expected or protocol < 4


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_pickles_never_crash(data):
    try:
        load_inert(io.BytesIO(data))
    except WeightsError as error:
        assert "\n" not in str(error)


def test_deep_and_shared_structures_are_no_trap():
    """Nested a hundred thousand deep; tuples that would take 2**60 steps to hash."""
    load_inert(io.BytesIO(b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b"."))
    doubled = b"\x80\x02)" + b"2\x86" * 60
    assert isinstance(next(iter(load_inert(io.BytesIO(b"}".join([b"\x80\x02", doubled[2:]]) + b"Ns.")))), Placeholder)
    started = time.monotonic()
    for number in range(1, 10):  # tuples in tuples, each the same one ninety times: 90**number keys, were they hashed
        wide = b"".join(b"q" + bytes([level]) + b"0(" + (b"h" + bytes([level])) * 90 + b"t" for level in range(number))
        assert len(load_inert(io.BytesIO(b"\x80\x02}N" + wide + b"Ns."))) == 1
    assert time.monotonic() - started < 4
    nested = b"ctorch._tensor\n_rebuild_from_type_v2\n" * 5000 + b"N" + b"N\x86\x86" * 10
    with pytest.raises(WeightsError):
        load_inert(io.BytesIO(b"\x80\x02" + nested))


# ---------------------------------------------------------------- damage


def rewrite(source: Path, target: Path, change, compression=zipfile.ZIP_STORED) -> Path:
    """Copy a zip archive; ``change(name, content)`` returns new content, or None to leave the entry out."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            content = change(entry.filename, old.read(entry))
            if content is not None:
                new.writestr(entry.filename, content)
    return target


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.pth"
    torch.save({"state_dict": small_state()}, path)
    return path


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda name, content: content if not name.endswith("data/0") else None, "storage '0' is missing"),
        (lambda name, content: content[:-4] if name.endswith("data/0") else content, "reaches beyond"),
        (lambda name, content: content if not name.endswith("data.pkl") else None, "no data.pkl"),
        (lambda name, content: b"big" if name.endswith("byteorder") else content, "endian"),
        (lambda name, content: content[:100] if name.endswith("data.pkl") else content, "pickle"),
    ],
)
def test_archives_that_lack_something(tmp_path, good, change, reason):
    path = rewrite(good, tmp_path / "bad.pth", change)
    with pytest.raises(WeightsError, match=reason) as caught:
        read_foreign(path)
    assert repr(str(path)) in str(caught.value) and "\n" not in str(caught.value)


def test_compressed_archives_are_refused(tmp_path, good):
    with pytest.raises(WeightsError, match="compressed"):
        read_foreign(rewrite(good, tmp_path / "bomb.pth", lambda name, content: content, zipfile.ZIP_DEFLATED))


def test_keys_of_a_file_without_weights_are_told_in_short(tmp_path):
    torch.save({"epoch": 3, 5: 1, "long" * 1000: 0, **{f"key{number}": 0 for number in range(999)}}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=r"no state_dict but keys 'epoch', 'longlong") as caught:
        read_foreign(tmp_path / "a.pth")
    assert len(str(caught.value)) < 600


def test_programs_and_whole_models_are_refused(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "whole.pth")
    with pytest.raises(WeightsError, match="Sequential, saved whole"):
        read_foreign(tmp_path / "whole.pth")
    path = tmp_path / "script.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("script/data.pkl", b"N.")
        archive.writestr("script/constants.pkl", b"N.")
    with pytest.raises(WeightsError, match="TorchScript"):
        read_foreign(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "pickle"),
        (b"<html>404</html>", "pickle|checkpoint"),
        (b"PK\x03\x04 not really", "File is not a zip file"),
        (pickle.dumps({"state_dict": {}}), "no checkpoint of torch"),
    ],
)
def test_other_files(tmp_path, content, reason):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=reason):
        read_foreign(tmp_path / "a.pth")


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match=r"cannot read weights .*No such file"):
        read_foreign(tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="cannot read weights"):
        read_foreign(tmp_path)


def forged(tmp_path: Path, **changes: object) -> Path:
    """A file whose one tensor states impossible sizes."""
    numbers = {"offset": 0, "shape": (2, 3), "stride": (3, 1), **changes}

    class Forged:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (storage, *numbers.values(), False, OrderedDict()))

    storage = torch.arange(6.0).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=storage, dtype=torch.float32, _internal=True)
    torch.save({"a.b": torch.ones(1), "a.c": Forged()}, tmp_path / "forged.pth")
    return tmp_path / "forged.pth"


def test_forged_control(tmp_path):
    assert torch.equal(read_foreign(forged(tmp_path)).state["a.c"], torch.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": 1 << 70},
        {"shape": (3, 3)},
        {"shape": (1 << 40, 3), "stride": (0, 1)},  # a terabyte of repeated numbers
        {"shape": (2, 4), "stride": (0, 1)},
        {"stride": (4, 1)},
        {"stride": (-3, 1)},
        {"shape": (2, 3, 1)},
        {"shape": (2.0, 3)},
        {"shape": (1 << 62, 0), "stride": (1, 1)},
    ],
)
def test_tensors_stay_within_their_numbers(tmp_path, changes):
    with pytest.raises(WeightsError):
        read_foreign(forged(tmp_path, **changes))


@pytest.mark.parametrize("legacy", [False, True])
def test_truncated_anywhere(tmp_path, legacy):
    torch.save({"state_dict": small_state()}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / "a.pth").read_bytes()
    for length in range(0, len(content) - 1, max(len(content) // 60, 1)):
        (tmp_path / "b.pth").write_bytes(content[:length])
        with pytest.raises(WeightsError) as caught:
            read_foreign(tmp_path / "b.pth")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_flipped_anywhere(tmp_path, legacy):
    """A damaged byte gives an error of ours or other numbers, never another exception."""
    torch.save({"state_dict": small_state()}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    content = (tmp_path / "a.pth").read_bytes()
    chance = random.Random(0)
    for _ in range(200):
        damaged = bytearray(content)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        (tmp_path / "b.pth").write_bytes(damaged)
        try:
            read_foreign(tmp_path / "b.pth")
        except WeightsError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_not_wanted_takes_no_memory(tmp_path, legacy):
    """An optimizer's numbers, often twice the weights', are never read."""
    path = tmp_path / "a.pth"
    content = {"optimizer": {"exp_avg": torch.zeros(8_000_000)}, "state_dict": small_state()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    tracemalloc.start()
    found = read_foreign(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_equal(found.state, small_state())
    assert path.stat().st_size > 32e6 and peak < 2e6


def test_references_are_parsed_before_any_number_is_read(good):
    with zipfile.ZipFile(good) as archive:
        root = load_inert(io.BytesIO(archive.read("good/data.pkl")))
    reference = root["state_dict"]["neck.part"]
    assert isinstance(reference, TensorReference)
    assert (reference.dtype, reference.shape, reference.stride) == ("float32", (2, 3), (5, 2))
