"""A stand-in for TensorRT 8.6, 10.0, 10.16 or 11.4, strict by a manifest of the real bindings.

It proves the calls, not the numbers: its "builder" keeps the ONNX graph, and its "engine" runs that in onnxruntime on
the CPU, so results of a whole scene are true, while speed, real kernels and TensorRT's own rounding are beyond it.

Every attribute, argument and enumeration member that the version at hand does not have (``golden/tensorrt_api.json``,
written by ``tensorrt_manifest.py`` from the real packages) raises, and so do calls that TensorRT forbids or that would
crash it: a Runtime before a device was looked for, an address that is not allocated, a graph launched after the
context's shape changed.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import hashlib
import json
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
from fake_cuda import MANIFEST, FakeCuda

VERSIONS = tuple(MANIFEST["tensorrt"])
_ONNX_TYPES = {1: "FLOAT", 2: "UINT8", 3: "INT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "HALF"}
_LAYERS = {"Conv": "CONVOLUTION", "Cast": "CAST", "TopK": "TOPK", "Constant": "CONSTANT", "Shape": "SHAPE"}
_PLAN = b"a plan of the stand-in\n"
_SESSIONS: dict[str, Any] = {}


class Strict:
    """A view of an object that has only what the version's manifest says its class has."""

    def __init__(self, trt: FakeTensorRT, kind: str, real: Any) -> None:
        """Wrap ``real``."""
        object.__setattr__(self, "_trt", trt)
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_real", real)

    def __getattr__(self, name: str) -> Any:
        """Return a property, or a method whose arguments are compared with the real one's."""
        signatures = self._trt.member(self._kind, name)
        value = getattr(self._real, name)
        if signatures is None:
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            _check_arguments(f"{self._kind}.{name}", signatures, arguments, named)
            return value(*arguments, **named)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a property."""
        assert self._trt.member(self._kind, name) is None, f"{self._kind}.{name} is a method"
        setattr(self._real, name, value)


class HostMemory(bytes):
    """Bytes that TensorRT gives out; the binding's object has the buffer protocol."""


def _check_arguments(what: str, signatures: list[list[str]], arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Compare a call with the overloads of the real function, whose optional parameters end in "="."""
    for names in signatures:
        plain = [name.rstrip("=") for name in names]
        given = {*plain[: len(arguments)], *named}
        required = {name for name in names if not name.endswith("=")}
        fits = len(arguments) <= len(plain) and set(named) <= set(plain[len(arguments) :])
        if fits and required <= given:
            return
    raise AssertionError(f"{what} takes {signatures}, got {len(arguments)} arguments and {sorted(named)}")


class FakeTensorRT(types.ModuleType):
    """The module; see above.

    Args:
        version: key of the manifest.
        cuda: the machine.

    Attributes:
        builds: engines built so far.
        contexts: living ones.
        log_build: called with the model's bytes at each build.
        build_errors: what a build logs; not empty: it fails.
        lacks_kernels: layers cannot be computed as they are pinned (8.6).
        ignore_half: engines are fp32 whatever was asked for, said only by the inspector.
        hide_types: inspectors show no types of tensors ("N/A due to dynamic shapes").
        opaque: inspectors show one large layer instead of convolutions.
        drift_px: added to the x of every box.
        spoil: outputs that become NaN.
        context_bytes: of device memory per image of the largest batch.
        refuse: name of a method -> it returns False, None, or what stands here.
        steps: of each phase of a build, told to progress monitors.
    """

    def __init__(self, version: str, cuda: FakeCuda) -> None:
        super().__init__("tensorrt")
        self.__version__ = version
        self.cuda = cuda
        self._api = MANIFEST["tensorrt"][version]
        self.builds = 0
        self.contexts = weakref.WeakSet()
        self.log_build: Callable[[bytes], None] = lambda graph: None
        self.build_errors: list[str] = []
        self.ignore_half = self.hide_types = self.opaque = self.lacks_kernels = False
        self.drift_px = 0.0
        self.spoil: tuple[str, ...] = ()
        self.context_bytes = 1 << 20
        self.refuse: dict[str, Any] = {}
        self.steps = 3
        self.timings_seen: list[bytes] = []
        for name, values in self._api["enumerations"].items():
            setattr(self, name, enum.IntEnum(name, values))
        self.ILogger = self._base("ILogger", Severity=self.Severity)
        if "IProgressMonitor" in self._api["classes"]:
            self.IProgressMonitor = self._base("IProgressMonitor")
        del self.Severity

    def __getattr__(self, name: str) -> Any:
        """Return one of the classes that are made by calling them."""
        makers = {"Builder": _Builder, "OnnxParser": _Parser, "Runtime": _Runtime}
        if name not in makers:
            raise AttributeError(f"TensorRT {self.__version__} has no {name}")

        def make(*arguments: Any, **named: Any) -> Strict:
            _check_arguments(name, self._api["classes"][name]["__init__"], arguments, named)
            self.check_device(name)
            return Strict(self, name, makers[name](self, *arguments, **named))

        return make

    def member(self, kind: str, name: str) -> list[list[str]] | None:
        """Return a member's signatures; None: it is a property.

        Raises:
            AttributeError: this version has no such member.
        """
        members = self._api["classes"].get(kind, {})
        if name not in members:
            raise AttributeError(f"{kind}.{name} is not in TensorRT {self.__version__}, or not in the manifest")
        return members[name]

    def check_device(self, what: str) -> None:
        """Fail where the lean library would crash."""
        assert self.cuda.has_driver and self.cuda.gpus, f"{what} without a driver: a crash"
        assert "cudaGetDeviceCount" in self.cuda.calls, f"{what} before a device was looked for"

    def _base(self, name: str, **extra: Any) -> type:
        """Return a class to be derived from, whose methods take what the real ones take."""
        members = self._api["classes"][name]

        def init(instance: Any) -> None:
            instance.is_ready = True

        return type(name, (), {"__init__": init, "is_ready": False, "members": members, **extra})


class _Builder:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        assert isinstance(logger, trt.ILogger) and logger.is_ready
        self.trt, self.logger = trt, logger

    def create_network(self, flags: int = 0) -> Strict:
        known = sum(1 << int(flag) for flag in self.trt.NetworkDefinitionCreationFlag)
        assert flags & ~known == 0, f"TensorRT {self.trt.__version__} has no network flags {flags:b}"
        if not hasattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
            assert flags & 1 << int(self.trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
        network = _Network(self.trt)
        strong = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network.is_typed = strong is not None and (flags >> int(strong)) & 1 == 1
        return Strict(self.trt, "INetworkDefinition", network)

    def create_builder_config(self) -> Strict:
        return Strict(self.trt, "IBuilderConfig", _Config(self.trt))

    def create_optimization_profile(self) -> Strict:
        return Strict(self.trt, "IOptimizationProfile", _Profile())

    def build_serialized_network(self, network: Strict, config: Strict) -> HostMemory | None:
        trt, net, settings = self.trt, network._real, config._real
        trt.builds += 1
        with contextlib.suppress(KeyboardInterrupt):  # the binding swallows what a signal raises in it
            trt.log_build(net.model.SerializeToString())
        severity = trt.ILogger.Severity
        self.logger.log(severity.INFO, "building")
        if settings.progress_monitor is not None and not _tell(settings.progress_monitor, trt.steps):
            return None
        if trt.build_errors:
            for text in trt.build_errors:
                self.logger.log(severity.ERROR, text)
            return None
        if trt.lacks_kernels and trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS in settings.flags:
            for text in (
                "Error Code 10: Internal Error (Could not find any implementation for node /Mul.)",
                "no engine",
            ):
                self.logger.log(severity.ERROR, text)
            return None
        types_ = net.check_precision(settings)
        stated = tuple(size.dim_value for size in net.model.graph.input[0].type.tensor_type.shape.dim)
        assert (stated[0] == 0) == bool(settings.profiles), "a range of sizes for an input that has one, or none"
        shapes = settings.profiles[0].shapes["images"] if settings.profiles else (stated,) * 3
        gpu = trt.cuda.gpus[trt.cuda.device]
        plan = {
            "version": trt.__version__,
            "gpu": gpu.name,
            "capability": list(gpu.capability),
            "compatibility": settings.hardware_compatibility_level.name,
            "verbosity": settings.profiling_verbosity.name,
            "shapes": [list(shape) for shape in shapes],
            "types": types_,
            "model": base64.b64encode(net.model.SerializeToString()).decode(),
        }
        if settings.timings is not None:
            settings.timings.data += b"timings of one build;"
        body = json.dumps(plan).encode()
        return HostMemory(_PLAN + hashlib.sha256(body).digest() + body)


def _tell(monitor: Any, steps: int) -> bool:
    """Report a build's progress as TensorRT does, nested; False: the monitor wants it to end."""
    assert monitor.is_ready, "IProgressMonitor.__init__ was not called"
    monitor.phase_start("Building", None, 2)
    monitor.phase_start("Timing", "Building", steps)
    goes_on = all(monitor.step_complete("Timing", step) for step in range(steps))
    monitor.phase_finish("Timing")
    monitor.phase_finish("Building")
    return goes_on


class _Config:
    progress_monitor: Any = None
    builder_optimization_level: int | None = None

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        self.flags = {trt.BuilderFlag.TF32}
        self.hardware_compatibility_level = trt.HardwareCompatibilityLevel.NONE
        self.profiling_verbosity = trt.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.profiles: list[_Profile] = []
        self.timings: _TimingCache | None = None
        self.workspace = 0

    def set_flag(self, flag: Any) -> None:
        self.flags.add(self.trt.BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self.flags.discard(self.trt.BuilderFlag(flag))

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool is self.trt.MemoryPoolType.WORKSPACE and isinstance(pool_size, int) and pool_size > 0
        self.workspace = pool_size

    def add_optimization_profile(self, profile: Strict) -> int:
        self.profiles.append(profile._real)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> Strict | None:
        self.trt.timings_seen.append(bytes(serialized_timing_cache))
        if "create_timing_cache" in self.trt.refuse and serialized_timing_cache:
            return self.trt.refuse["create_timing_cache"]
        return Strict(self.trt, "ITimingCache", _TimingCache(serialized_timing_cache))

    def set_timing_cache(self, cache: Strict, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        self.timings = cache._real
        return True


class _TimingCache:
    def __init__(self, data: bytes) -> None:
        self.data = bytes(data)

    def serialize(self) -> HostMemory:
        return HostMemory(self.data)


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[tuple[int, ...], ...]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        shapes = (tuple(min), tuple(opt), tuple(max))
        assert all(a <= b <= c for a, b, c in zip(*shapes, strict=True))
        self.shapes[input] = shapes


class _Network:
    """Layers of the graph; of weakly typed ones each has the precision that it was pinned to."""

    is_typed = False

    def __init__(self, trt: FakeTensorRT) -> None:
        self.trt = trt
        self.model: Any = None
        self.layers: list[_Layer] = []

    def read(self, model: Any) -> None:
        self.model = model
        inferred = onnx.shape_inference.infer_shapes(model).graph
        types_ = {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.output)}
        for node in model.graph.node:
            outputs = [_ONNX_TYPES.get(types_.get(name, 0), "FLOAT") for name in node.output if name]
            self.layers.append(_Layer(self.trt, node.name, node.op_type, outputs))

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Strict:
        return Strict(self.trt, "ILayer", self.layers[index])

    def check_precision(self, config: _Config) -> list[tuple[str, str]]:
        """Return name and precision of each convolution, as such a builder would choose them.

        Raises:
            AssertionError: a layer that is fp32 in the graph may be computed in something else.
        """
        flag = self.trt.BuilderFlag
        assert flag.TF32 not in config.flags, "fp32 layers may be computed in TF32"
        assert config.builder_optimization_level == 3 and config.workspace > 0
        convolutions = [layer for layer in self.layers if layer.operator == "Conv"]
        if self.is_typed:
            named = {layer.name: layer.types[0] for layer in convolutions}
        elif getattr(flag, "FP16", None) not in config.flags:
            named = dict.fromkeys((layer.name for layer in convolutions), "FLOAT")
        else:
            pins = flag.PREFER_PRECISION_CONSTRAINTS if self.trt.lacks_kernels else flag.OBEY_PRECISION_CONSTRAINTS
            assert pins in config.flags, "precisions are wishes only"
            for layer in self.layers:
                single = [place for place, name in enumerate(layer.types) if name == "FLOAT"]
                if single and layer.operator != "Cast":
                    assert layer.precision == self.trt.DataType.FLOAT, f"{layer.name} may be computed in fp16"
                    assert set(layer.pinned) == set(single), f"outputs of {layer.name} may be fp16"
                assert all(layer.types[place] == "FLOAT" for place in layer.pinned)
            named = {layer.name: (layer.precision or self.trt.DataType.FLOAT).name for layer in convolutions}
        if self.trt.ignore_half:
            named = dict.fromkeys(named, "FLOAT")
        return list(named.items())


class _Layer:
    precision: Any = None

    def __init__(self, trt: FakeTensorRT, name: str, operator: str, types_: list[str]) -> None:
        self.trt, self.name, self.operator, self.types = trt, name, operator, types_
        self.type = trt.LayerType[_LAYERS.get(operator, "ELEMENTWISE")]
        self.num_outputs = len(types_)
        self.pinned: dict[int, Any] = {}

    def get_output(self, index: int) -> Strict:
        name = self.types[index]
        known = self.trt.DataType.__members__
        dtype = known[name if name in known else "INT32"]  # 8.6 has no 64-bit numbers
        return Strict(self.trt, "ITensor", types.SimpleNamespace(dtype=dtype, is_shape_tensor=False))

    def set_output_type(self, index: int, dtype: Any) -> None:
        self.pinned[index] = dtype


class _Parser:
    def __init__(self, trt: FakeTensorRT, network: Strict, logger: Any) -> None:
        self.trt, self.network = trt, network._real
        self.errors: list[str] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> Strict:
        text = self.errors[index]
        return Strict(self.trt, "ParserError", types.SimpleNamespace(desc=lambda: text))

    def parse(self, model: bytes, path: str | None = None) -> bool:
        proto = onnx.load_from_string(model)
        constants = {tensor.name for tensor in proto.graph.initializer}
        constants |= {node.output[0] for node in proto.graph.node if node.op_type == "Constant"}
        for node in proto.graph.node:
            if node.domain not in ("", "ai.onnx"):
                self.errors.append(f"no importer for {node.op_type}")
            if node.op_type == "TopK":
                assert node.input[1] in constants, "k of TopK is not constant"
        sizes = proto.graph.input[0].type.tensor_type.shape.dim
        assert all(size.HasField("dim_value") for size in sizes[1:]), "images of no fixed size"
        assert max(entry.version for entry in proto.opset_import) <= 17
        self.network.read(proto)
        return not self.errors


class _Runtime:
    def __init__(self, trt: FakeTensorRT, logger: Any) -> None:
        assert isinstance(logger, trt.ILogger) and logger.is_ready
        self.trt, self.logger = trt, logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> Strict | None:
        trt = self.trt
        head, body = serialized_engine[: len(_PLAN)], serialized_engine[len(_PLAN) + 32 :]
        assert head == _PLAN and hashlib.sha256(body).digest() == serialized_engine[len(_PLAN) :][:32], (
            "a damaged plan reaches TensorRT, which may crash"
        )
        plan = json.loads(body)
        gpu = trt.cuda.gpus[trt.cuda.device]
        if plan["version"] != trt.__version__ or "deserialize_cuda_engine" in trt.refuse:
            self.logger.log(trt.ILogger.Severity.ERROR, "Version tag does not match")
            return None
        same = plan["gpu"] == gpu.name or plan["compatibility"] != "NONE"
        assert same and plan["capability"] == list(gpu.capability), "a plan for another GPU reaches TensorRT"
        return Strict(trt, "ICudaEngine", _Engine(trt, plan, self.logger))


class _Engine:
    def __init__(self, trt: FakeTensorRT, plan: dict[str, Any], logger: Any) -> None:
        self.trt, self.plan, self.logger = trt, plan, logger
        self.device = trt.cuda.device
        self.model = base64.b64decode(plan["model"])
        graph = onnx.load_from_string(self.model).graph
        self.inputs = [value.name for value in graph.input]
        self.ports = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output)}
        self.lock = trt.cuda.lock

    @property
    def num_io_tensors(self) -> int:
        return len(self.ports)

    def get_tensor_name(self, index: int) -> str:
        return list(self.ports)[index]

    def get_tensor_mode(self, name: str) -> Any:
        return self.trt.TensorIOMode.INPUT if name in self.inputs else self.trt.TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.trt.DataType[_ONNX_TYPES[self.ports[name].elem_type]]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [size.dim_value if size.HasField("dim_value") else -1 for size in self.ports[name].shape.dim]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert profile_index == 0 and name in self.inputs and -1 in self.get_tensor_shape(name)
        return self.plan["shapes"]

    def create_execution_context(self) -> Strict | None:
        cuda = self.trt.cuda
        assert cuda.device == self.device, "a context on another device than the engine's"
        needed = self.trt.context_bytes * self.plan["shapes"][2][0]
        if "create_execution_context" in self.trt.refuse:
            return self.trt.refuse["create_execution_context"]
        if cuda.used_bytes() + needed > cuda.gpus[self.device].memory:
            self.logger.log(self.trt.ILogger.Severity.ERROR, f"Requested amount of GPU memory ({needed}) not available")
            return None
        return Strict(self.trt, "IExecutionContext", _Context(self, needed))

    def create_engine_inspector(self) -> Strict:
        return Strict(self.trt, "EngineInspector", _Inspector(self))


class _Inspector:
    execution_context: Any = None

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine

    def get_engine_information(self, format: Any) -> str:
        trt = self.engine.trt
        assert format is trt.LayerInformationFormat.JSON
        convolutions = self.engine.plan["types"]
        if self.engine.plan["verbosity"] != "DETAILED":
            return json.dumps({"Layers": [name for name, _ in convolutions]})
        if trt.opaque:
            tensor = {"Name": "t", "Format/Datatype": "Row major linear FP16 format"}
            return json.dumps({"Layers": [{"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Inputs": [tensor]}]})
        is_new = trt.__version__.startswith("11")
        layers = []
        for name, dtype in convolutions:
            text = {"HALF": "Row major linear FP16 format", "FLOAT": "Row major linear FP32 format"}[dtype]
            if trt.hide_types or self.execution_context is None:
                text = "N/A due to dynamic shapes"
            tensor = {"Name": f"{name}_in", "Location": "Device", "Dimensions": [2, 8, 32, 32]}
            if is_new:
                tensor |= {"Format": "Row major linear", "DataType": {"HALF": "Half", "FLOAT": "Float"}[dtype]}
            else:
                tensor |= {"Format/Datatype": text}
            layers.append(
                {
                    "Name": f"{name} + PWN(PWN({name}/Sigmoid), {name}/Mul)",
                    "LayerType": "CaskConvolution",
                    "Inputs": [tensor],
                    "Outputs": [tensor],
                    "ParameterType": "Convolution",
                    "Weights": {"Type": {"HALF": "Half", "FLOAT": "Float"}[dtype], "Count": 128},
                }
            )
        return json.dumps({"Layers": layers, "Bindings": []})


class _Context:
    def __init__(self, engine: _Engine, num_bytes: int) -> None:
        self.engine, self.trt = engine, engine.trt
        cuda = self.trt.cuda
        cuda.reserved += num_bytes
        weakref.finalize(self, _release, cuda, num_bytes)
        self.trt.contexts.add(self)
        self.shape: tuple[int, ...] | None = None
        self.shape_number = 0
        self.addresses: dict[str, int] = {}
        self.is_warm = False

    def set_input_shape(self, name: str, shape: Any) -> bool:
        if "set_input_shape" in self.trt.refuse:
            return self.trt.refuse["set_input_shape"]
        least, _, most = self.engine.plan["shapes"]
        assert name == "images"
        if not all(low <= size <= high for low, size, high in zip(least, shape, most, strict=True)):
            self.engine.logger.log(self.trt.ILogger.Severity.ERROR, f"{list(shape)} is out of the profile's range")
            return False
        self.shape, self.is_warm = tuple(shape), False
        self.shape_number += 1
        return True

    def infer_shapes(self) -> list[str]:
        return [] if self.shape is not None else ["images"]

    def get_tensor_shape(self, name: str) -> list[int]:
        assert self.shape is not None
        return [self.shape[0] if size == -1 else size for size in self.engine.get_tensor_shape(name)]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert name in self.engine.ports
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda, shape, number = self.trt.cuda, self.shape, self.shape_number
        assert isinstance(stream_handle, int) and shape is not None and set(self.addresses) == set(self.engine.ports)
        if "execute_async_v3" in self.trt.refuse:
            return self.trt.refuse["execute_async_v3"]
        with cuda.lock:
            is_captured = cuda.is_capturing(stream_handle)
            assert self.is_warm or not is_captured, "captured before a run at this shape"
            self.is_warm = True
            addresses, context = dict(self.addresses), self

            def run() -> None:
                assert not is_captured or context.shape_number == number, "the context's shape changed: graph void"
                context.compute(addresses, shape)

            cuda.give(stream_handle, run)
        return True

    def compute(self, addresses: dict[str, int], shape: tuple[int, ...]) -> None:
        """Run the graph in onnxruntime, from device memory to device memory."""
        cuda = self.trt.cuda
        images = cuda.view(addresses["images"], int(np.prod(shape))).reshape(shape).copy()
        names = [name for name in self.engine.ports if name != "images"]
        for name, values in zip(names, _session(self.engine.model).run(names, {"images": images}), strict=True):
            if name == "boxes":
                values[..., 0] += self.trt.drift_px
            if name in self.trt.spoil:
                values[..., 0] = np.nan
            cuda.view(addresses[name], values.nbytes)[:] = np.ascontiguousarray(values).view(np.uint8).ravel()


def _release(cuda: FakeCuda, num_bytes: int) -> None:
    cuda.reserved -= num_bytes


def _session(model: bytes) -> Any:
    digest = hashlib.sha256(model).hexdigest()
    if digest not in _SESSIONS:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        _SESSIONS[digest] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return _SESSIONS[digest]


def install(monkeypatch: Any, version: str, cuda: FakeCuda | None = None) -> FakeTensorRT:
    """Put the stand-ins in the place of both packages; return TensorRT's, which has the machine as ``cuda``."""
    from rtmdet_geo.backends import cuda as wrapper

    machine = cuda or FakeCuda()
    trt = FakeTensorRT(version, machine)
    bindings = types.ModuleType("cuda.bindings")
    package = types.ModuleType("cuda")
    package.bindings, bindings.runtime = bindings, machine  # type: ignore[attr-defined]
    for name, module in (
        ("tensorrt", trt),
        ("cuda", package),
        ("cuda.bindings", bindings),
        ("cuda.bindings.runtime", machine),
    ):
        monkeypatch.setitem(__import__("sys").modules, name, module)
    monkeypatch.setattr(wrapper, "runtime", lambda: machine)
    return trt
