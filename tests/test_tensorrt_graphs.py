"""What the builder gets, through a real parser and a real builder: TensorRT for RTX builds ahead without a GPU.

It shares both with TensorRT 10 and later, strong types included, so it proves that the graphs are read and typed as
they are meant. It needs `pip install tensorrt-rtx`; without it these tests are skipped.
"""

from __future__ import annotations

import os
import signal
import types
from pathlib import Path

import pytest

from rtmdet_geo.backends import cuda, trt_build, trt_cache
from rtmdet_geo.backends.trt_graph import read_graph
from rtmdet_geo.cache import CACHE_VARIABLE
from rtmdet_geo.catalog import CATALOG

pytestmark = [pytest.mark.tensorrt, pytest.mark.filterwarnings("default")]
GPU = cuda.Device(0, "NVIDIA X", (8, 6), 46, 8 << 30, 4 << 20)


@pytest.fixture
def trt(monkeypatch, tmp_path):
    """TensorRT for RTX with a builder for GPUs that are not here; ``networks`` are those that it built."""
    real = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))

    class Builder:
        def __init__(self, logger):
            self.real = real.Builder(logger)
            self.create_network = self.real.create_network
            self.create_optimization_profile = self.real.create_optimization_profile

        def create_builder_config(self):
            config = self.real.create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(real.ComputeCapability.SM86, 0)
            return config

        def build_serialized_network(self, network, config):
            module.networks.append(network)
            return self.real.build_serialized_network(network, config)

    module = types.ModuleType("tensorrt")
    vars(module).update(vars(real) | {"Builder": Builder, "networks": []})
    return module


def build(trt, order, progress=None):
    """Return the plan, and the nodes in fp16."""
    least, most = order.batches
    graph, half_nodes = read_graph(order.model_file, order.precision, order.tile_size, most if least == most else None)
    return trt_build._build_plan(trt, order, graph, half_nodes, progress), half_nodes


def make_order(model: str, precision: str, batch: int) -> trt_cache.Order:
    return trt_build.make_order(CATALOG[model].path, GPU, precision=precision, max_batch=batch)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("model", ["sen2ships_r", "banepa_ins"])
def test_bundled_models_are_read_and_built(trt, model, precision, batch):
    told: list[tuple[str, int, int]] = []
    plan, half_nodes = build(trt, make_order(model, precision, batch), lambda *step: told.append(step))
    assert len(plan) > 1_000_000 and told
    (network,) = trt.networks
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    convolutions = [layer for layer in layers if layer.type == trt.LayerType.CONVOLUTION]
    assert len(convolutions) > 80
    wanted = trt.DataType.HALF if precision == "fp16" else trt.DataType.FLOAT
    assert {layer.get_output(0).dtype for layer in convolutions} == {wanted}
    for layer in layers:  # by their names layers are pinned where types are not strong
        types_ = {layer.get_output(place).dtype for place in range(layer.num_outputs)}
        in_half = layer.name in half_nodes
        assert in_half == (trt.DataType.HALF in types_) or layer.type == trt.LayerType.CAST, layer.name
    outputs = [network.get_output(place) for place in range(network.num_outputs)]
    assert {output.dtype for output in outputs} == {trt.DataType.FLOAT}
    assert {output.shape[0] for output in outputs} == {1 if batch == 1 else -1}


def test_a_signal_ends_a_build(trt):
    """The binding swallows what handlers raise; the monitor's answer is what ends it."""
    steps: list[tuple[str, int, int]] = []

    def interrupt(*step: object) -> None:
        steps.append(step)
        if len(steps) == 50:
            os.kill(os.getpid(), signal.SIGINT)

    order = make_order("sen2ships_r", "fp16", 1)
    with pytest.raises(KeyboardInterrupt):
        build(trt, order, interrupt)
    interrupted = len(steps)
    build(trt, order, lambda *step: steps.append(step))
    assert interrupted < len(steps) - interrupted  # it did not go on to the end


def test_what_the_parser_does_not_know_is_named(trt, tmp_path):
    import onnx

    graph = onnx.load(CATALOG["sen2ships_r"].path)
    graph.graph.node[0].op_type = "Nonsense"
    graph.graph.node[0].domain = "nowhere"
    order = make_order("sen2ships_r", "fp32", 1)
    with pytest.raises(trt_build.EngineError, match=r"cannot read the graph of .*sen2ships_r\.onnx.*Nonsense"):
        trt_build._build_plan(trt, order, graph.SerializeToString(), {}, None)
    assert not list(Path(tmp_path).glob("**/*.engine"))
