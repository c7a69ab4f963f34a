"""ONNX -> TensorRT engine: one tile size, batches of 1 to the largest, precision as the graph's types say.

The precision stands in the graph (:mod:`rtmdet_geo.export.half`). TensorRT 10 and 11 take it from there (strongly typed
networks); 8.6 is given leave to compute in fp16, and every layer is pinned to what the graph says. No TF32. A built
engine is checked before it is kept (:mod:`rtmdet_geo.backends.trt_check`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtmdet_geo.backends import cuda, trt_cache
from rtmdet_geo.backends.contract import GPU_BATCH_SIZE, check_model_file, fixed_side, refuse_classifier, rows_per_level
from rtmdet_geo.backends.trt_cache import OPTIMIZATION_LEVEL, Description, Order, Precision
from rtmdet_geo.backends.trt_check import check_layers, check_numbers
from rtmdet_geo.backends.trt_graph import read_graph, read_ports
from rtmdet_geo.backends.trt_load import Engine, Messages, load_tensorrt, messages, open_engine
from rtmdet_geo.backends.trt_run import Lane
from rtmdet_geo.backends.trt_watch import Progress, watched
from rtmdet_geo.cache import hold_lock
from rtmdet_geo.catalog import ENGINE_SUFFIX
from rtmdet_geo.errors import ConfigError, DeviceMemoryError, EngineError, ModelFileError, OutputError
from rtmdet_geo.outputs import check_folder
from rtmdet_geo.structures import ModelSpec

logger = logging.getLogger(__name__)

#: Device memory that one layer may use for itself, unless another number is asked for; half of a small device's.
_WORKSPACE_BYTES = 4 << 30
#: What TensorRT 8.6 says where a layer has no kernel, perhaps for the precision that it is pinned to.
_NO_KERNEL = re.compile("could not find any implementation|precision constraint", re.IGNORECASE)
#: Levels of hardware compatibility, the narrower first, by the name that TensorRT gives them.
_COMPATIBLE = ("SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS")


def build_engine(
    model_file: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    precision: str = "auto",
    max_batch: int = GPU_BATCH_SIZE,
    tile_size: int | None = None,
    device: str = "auto",
    compatible: bool = False,
    workspace_gib: float | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> ModelSpec:
    """Build an engine for a GPU of this machine, check it, and write it with its description (``.engine.json``).

    Args:
        model_file: ``.onnx`` that follows the model-file contract.
        out: ``.engine`` to write.
        precision: "fp16", "fp32", or "auto" (fp16).
        max_batch: most images at once.
        tile_size: side of the images in px; None is the model file's.
        device: "auto", "cuda" or "cuda:N".
        compatible: build for all GPUs of one generation; such an engine may be slower.
        workspace_gib: device memory that one layer may use for itself; None is 4, or half of what the device has.
        progress: called with phase, step and steps, where TensorRT says how far it is (10 and later).
        overwrite: replace existing files.

    Returns:
        The ModelSpec as stored, with ``precision`` and the ``differences`` from the model file in fp32.

    Raises:
        ConfigError: a number or name is wrong, or contradicts the model file.
        ModelFileError: the model file is missing, corrupt, foreign, or a classifier.
        OutputError: ``out`` exists or cannot be written.
        EngineError: there is no device, or TensorRT cannot build the engine, or it does not compute what it should; or
            the model file is int8.
        DeviceMemoryError: the device's memory is too small.
        MissingDependencyError: TensorRT, cuda-python or onnx is not installed.
    """
    trt, place = find_builder(out, device=device, overwrite=overwrite)
    order = make_order(model_file, place, precision=precision, max_batch=max_batch, tile_size=tile_size)
    if workspace_gib is not None:
        if not workspace_gib > 0:
            raise ConfigError(f"workspace_gib must be above 0, not {workspace_gib:g}")
        order = replace(order, workspace_bytes=int(workspace_gib * (1 << 30)))
    if compatible:
        order = replace(order, compatibility=_compatibility(trt, place))
    plan, description, _ = _build(trt, order, progress)
    trt_cache.write_engine(Path(out), plan, description)
    return description.spec


def find_builder(out: str | os.PathLike[str], *, device: str, overwrite: bool) -> tuple[Any, cuda.Device]:
    """Return the module ``tensorrt`` and the device, if ``out`` can be written; see :func:`build_engine` for errors."""
    target = Path(out)
    if target.suffix != ENGINE_SUFFIX:
        raise OutputError(f"{str(target)!r} must end in {ENGINE_SUFFIX}")
    check_folder(target, overwrite)
    check_folder(trt_cache.description_of(target), overwrite)
    trt = load_tensorrt()
    return trt, cuda.find_device(device)


def make_order(
    model_file: str | os.PathLike[str],
    device: cuda.Device,
    *,
    precision: str,
    max_batch: int,
    tile_size: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> Order:
    """Return what is to be built, checked against what the model file says of itself.

    See :func:`build_engine` for arguments and errors; ``image_size`` is height and width of images that are no squares.
    """
    path = Path(model_file)
    if not path.is_file():
        raise ModelFileError(f"model file {str(path)!r} is not there")
    inputs, outputs = read_ports(path)
    spec = check_model_file(path, inputs, outputs)
    refuse_classifier(spec, path)
    if max_batch < 1:
        raise ConfigError(f"max_batch must be at least 1, not {max_batch}")
    fixed = fixed_side(inputs[0])
    side = tile_size or fixed or spec.tile_size
    height, width = image_size or (side, side)
    if any(size < spec.stride_multiple or size % spec.stride_multiple for size in (height, width)):
        raise ConfigError(f"tile size {side} px must be a multiple of {spec.stride_multiple}")
    if fixed is not None and (height, width) != (fixed, fixed):
        raise ConfigError(f"{path.name!r} takes tiles of {fixed} px only, not {side}; leave the tile size out")
    batch = inputs[0].sizes[0]
    batches = (batch, batch) if isinstance(batch, int) else (1, max_batch)
    workspace = min(_WORKSPACE_BYTES, device.memory_bytes // 2)
    return Order(
        path,
        spec,
        choose_precision(spec, precision),
        (height, width),
        fixed is None,
        batches,
        workspace,
        "none",
        device,
    )


def check_precision(asked: str) -> None:
    """Refuse a precision that TensorRT is not asked for.

    Raises:
        ConfigError: it is such a one.
    """
    if asked not in ("auto", "fp16", "fp32"):
        raise ConfigError(f"TensorRT computes in fp16 or fp32, not in {asked}; choose auto, fp16 or fp32")


def choose_precision(spec: ModelSpec, asked: str) -> Precision:
    """Return an engine's precision.

    Raises:
        ConfigError: it is none of TensorRT's, or the model file is fp16 already and another one is asked for.
        EngineError: the model file is int8.
    """
    check_precision(asked)
    if spec.precision == "int8":
        raise EngineError(
            "int8 model files are for CPUs, TensorRT does not read their asymmetric ranges; take the fp32 file, or the "
            "backend onnxruntime"
        )
    if spec.precision == "fp16" and asked == "fp32":
        raise ConfigError("the model file is fp16 and stays so; leave the precision out, or take the fp32 file")
    return "fp32" if asked == "fp32" else "fp16"


def engine_from_cache(trt: Any, order: Order, progress: Progress | None = None) -> tuple[Engine, Description]:
    """Return an opened engine from the user's cache, built now if it is not there or does not fit.

    Processes that want the same engine build it once: the others wait, then open it. Where the cache cannot be written
    to, the engine serves all the same and is not kept.

    Raises:
        See :func:`build_engine`.
    """
    key = order.key(trt.__version__)
    path = trt_cache.place_of(order, key)
    cuda.use(order.device)
    seen = trt_cache.stamp_of(path)
    found = _open_cached(trt, path, order)
    if found is not None:
        return found
    with ExitStack() as stack:
        try:
            stack.enter_context(hold_lock(path.with_name(path.name + ".lock")))
        except OutputError as error:
            logger.warning("the engine cannot be kept: %s", error)
        if trt_cache.stamp_of(path) != seen:  # another process built it meanwhile
            found = _open_cached(trt, path, order)
            if found is not None:
                return found
        logger.warning(
            "an engine for %s and tiles of %d x %d px is built, which takes minutes; it is to be kept in %s",
            *(order.spec.name, *order.image_size, path),
        )
        plan, description, engine = _build(trt, order, progress)
        try:
            trt_cache.write_engine(path, plan, description)
        except OutputError as error:
            logger.warning("the engine is not kept: %s", error)
        return engine, description


def _open_cached(trt: Any, path: Path, order: Order) -> tuple[Engine, Description] | None:
    """Return an engine of the cache; None: it has to be built."""
    if trt_cache.stamp_of(path) is None:
        return None
    try:
        plan, description = trt_cache.read_engine(path, order.device, trt.__version__)
        return open_engine(trt, plan, description.spec), description
    except (ModelFileError, EngineError) as error:
        logger.warning("an engine of the cache is not what it should be and is built again: %s", error)
        return None


def _build(trt: Any, order: Order, progress: Progress | None) -> tuple[bytes, Description, Engine]:
    """Build and check an engine."""
    started = time.perf_counter()
    cuda.use(order.device)
    least, most = order.batches
    batch = most if least == most else None
    graph, half_nodes = read_graph(order.model_file, order.precision, order.image_size, batch)
    plan = _build_plan(trt, order, graph, half_nodes, progress)
    spec = _spec_of(order)
    engine = open_engine(trt, plan, spec)
    lane = Lane(engine, order.device, order.batches[1])
    try:
        layers = check_layers(lane.describe(), order.precision, half_nodes)
        differences = check_numbers(lane, order.model_file, spec, order.image_size)
    finally:
        lane.close()
    logger.info("%s: engine built and checked in %.0f s", order.spec.name, time.perf_counter() - started)
    description = Description(
        spec=spec.model_copy(update={"differences": differences}),
        key=order.key(trt.__version__),
        max_batch=order.batches[1],
        compatibility=order.compatibility,
        layers=layers,
        engine_sha256=hashlib.sha256(plan).hexdigest(),
    )
    return plan, description, engine


def _spec_of(order: Order) -> ModelSpec:
    """Return what the engine says of itself; of one for oblong images, the tile size is the longer side."""
    spec, side = order.spec, max(order.image_size)
    rows = rows_per_level(spec.object_kind, len(spec.classes), *order.image_size)
    return spec.model_copy(
        update={
            "precision": order.precision,
            "tile_size": side,
            "overlap": min(spec.overlap, side // 2),
            "max_detections": sum(number for number, _ in rows),
        }
    )


def _build_plan(
    trt: Any, order: Order, graph: bytes, half_nodes: Mapping[str, str], progress: Progress | None
) -> bytes:
    """Build: network, parser, configuration, profile, timing cache; the whole of TensorRT's side on this page."""
    log = messages(trt)
    log.take_errors()
    builder = log.make("Builder", trt.Builder, log.native)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, log, network, graph, order.model_file)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.workspace_bytes)
    config.builder_optimization_level = OPTIMIZATION_LEVEL
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the check of the precision reads it
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 is fp32
    if order.compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, order.compatibility.upper())
        config.hardware_compatibility_level = level
    if not _is_strongly_typed(trt):
        _pin_precision(trt, network, config, order.precision, half_nodes)
    least, most = order.batches
    if least < most:
        image = (len(order.spec.bands), *order.image_size)
        profile = builder.create_optimization_profile()
        profile.set_shape("images", (least, *image), (most, *image), (most, *image))
        if config.add_optimization_profile(profile) < 0:
            raise log.failure("TensorRT refuses the range of batch sizes")
    timings = _attach_timings(trt, config, order)

    def build() -> Any:
        with watched(trt, config, progress):
            return builder.build_serialized_network(network, config)

    plan = _serialize(trt, log, build, config, order)
    if timings is not None:
        _keep_timings(timings, trt_cache.timing_cache_of(order.device, trt.__version__))
    return plan


def _serialize(trt: Any, log: Messages, build: Callable[[], Any], config: Any, order: Order) -> bytes:
    """Have the engine built; 8.6 is asked twice where it has no kernels for all layers as they are pinned.

    What a second try gives is checked like any engine: a convolution in fp32 shows in its layers, what else is lost in
    its numbers.
    """
    what = f"TensorRT {trt.__version__} cannot build {order.model_file.name!r}"
    plan = build()
    if plan is None:
        failure = log.failure(what)
        has_pins = order.precision == "fp16" and not _is_strongly_typed(trt)
        if not has_pins or isinstance(failure, DeviceMemoryError) or not _NO_KERNEL.search(str(failure)):
            raise failure
        logger.warning("%s; it is asked again, with the layers' precisions as wishes", failure)
        config.clear_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
        plan = build()
    if plan is None:
        raise log.failure(what)
    return bytes(memoryview(plan))


def _network_flags(trt: Any) -> int:
    """Return the flags of a network whose types are the graph's, as far as this TensorRT needs to be told."""
    flags = trt.NetworkDefinitionCreationFlag
    if hasattr(flags, "STRONGLY_TYPED"):
        return 1 << int(flags.STRONGLY_TYPED)
    return 1 << int(flags.EXPLICIT_BATCH)


def _is_strongly_typed(trt: Any) -> bool:
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def _parse(trt: Any, log: Messages, network: Any, graph: bytes, path: Path) -> None:
    parser = trt.OnnxParser(network, log.native)
    if parser.parse(graph):
        return
    faults = [" ".join(str(parser.get_error(index)).split()) for index in range(parser.num_errors)]
    reasons = "; ".join(faults) or log.take_errors() or "it gives no reason"
    raise EngineError(f"TensorRT {trt.__version__} cannot read the graph of {str(path)!r}: {reasons}")


def _pin_precision(trt: Any, network: Any, config: Any, precision: Precision, half_nodes: Mapping[str, str]) -> None:
    """Let TensorRT 8.6 compute in the graph's types, and in no others."""
    if precision == "fp32":
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if half_nodes.get(layer.name) == "Conv":
            layer.precision = trt.DataType.HALF
        elif layer.name not in half_nodes and layer.type != trt.LayerType.CAST:  # a cast says itself what it makes
            _pin_single(trt, layer)


def _pin_single(trt: Any, layer: Any) -> None:
    """Pin a layer's fp32 outputs; those of the trunk are fp16, shapes and indices are whole numbers."""
    places = range(layer.num_outputs)
    outputs = [layer.get_output(place) for place in places]
    single = [place for place in places if outputs[place].dtype == trt.DataType.FLOAT]
    if not single or any(tensor.is_shape_tensor for tensor in outputs):
        return
    layer.precision = trt.DataType.FLOAT
    for place in single:
        layer.set_output_type(place, trt.DataType.FLOAT)


def _compatibility(trt: Any, device: cuda.Device) -> str:
    """Return the narrowest level of hardware compatibility that this TensorRT and GPU have.

    Raises:
        EngineError: they have none.
    """
    levels = [name for name in _COMPATIBLE if hasattr(trt.HardwareCompatibilityLevel, name)]
    if device.compute_capability < (8, 0):
        levels = [name for name in levels if name != "AMPERE_PLUS"]
    if not levels:
        raise EngineError(
            f"TensorRT {trt.__version__} builds no engine for other GPUs than {device.label!r} itself; build without "
            "compatible, on each sort of GPU"
        )
    return levels[0].lower()


def _attach_timings(trt: Any, config: Any, order: Order) -> Any:
    """Give the builder the timings of earlier builds; return the cache that takes the new ones, None: there is none."""
    stored = trt_cache.read_timings(trt_cache.timing_cache_of(order.device, trt.__version__))
    for data in (stored, b"") if stored else (b"",):
        timings = config.create_timing_cache(data)
        if timings is not None and config.set_timing_cache(timings, False):
            return timings
        logger.info("TensorRT does not take the timing cache (%d bytes)", len(data))
    return None


def _keep_timings(timings: Any, path: Path) -> None:
    """Keep what the builder has timed, for later builds."""
    data = timings.serialize()
    if data is None:
        logger.info("TensorRT gives no timing cache away")
        return
    trt_cache.write_timings(path, bytes(memoryview(data)))
