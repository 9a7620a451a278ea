"""The engine of ONNX graphs on a fake device: ONNX Runtime computes on the CPU and says CUDA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from app.engine.onnx_cuda import OnnxCudaEngine
from app.engine.openvino import OpenVinoEngine
from app.errors import EngineError, NonFiniteOutput, OutOfMemory
from model import transforms
from model.arrays import ByteArray
from model.checkpoint import GRAPH_TENSOR, Checkpoint
from model.config import GraphConfig, PreprocessConfig
from tests.fake_cuda import FakeCuda, FakeQueues, FakeStream, fake_cuda
from tests.onnx_networks import Net, export

onnxruntime = pytest.importorskip("onnxruntime")

CUDA = "CUDAExecutionProvider"
LARGE, SMALL = (64, 96), (64, 64)
UNIT = 1 / 65535


@dataclasses.dataclass
class Part:
    """Nodes of a graph that one provider computes."""

    ep_name: str
    operators: Sequence[str]

    def get_nodes(self) -> list[Any]:
        return [dataclasses.make_dataclass("Node", ["op_type"])(each) for each in self.operators]


class Runtime:
    """Sessions that compute on the CPU.

    Attributes:
        providers: what they say they use.
        parts: what they say each provider computes.
        asked: the providers that the engine asked for.
        error: raised by a run.
        batches: sizes of the batches that were run.
    """

    def __init__(self) -> None:
        self.providers = [CUDA, "CPUExecutionProvider"]
        self.parts = [Part(CUDA, ["Conv"]), Part("CPUExecutionProvider", ["Shape", "Gather"])]
        self.asked: Any = None
        self.error: Exception | None = None
        self.batches: list[int] = []
        self.real = onnxruntime.InferenceSession

    def __call__(self, content: bytes, options: Any, providers: Any) -> Any:
        runtime = self
        self.asked = providers
        session = self.real(content, options, providers=["CPUExecutionProvider"])
        run = session.run_with_iobinding

        def run_with_iobinding(binding: Any, run_options: Any) -> None:
            if runtime.error is not None:
                raise runtime.error
            run(binding, run_options)

        session.get_providers = lambda: runtime.providers
        session.get_provider_graph_assignment_info = lambda: runtime.parts
        session.run_with_iobinding = run_with_iobinding
        return session


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    runtime = Runtime()
    monkeypatch.setattr(onnxruntime, "InferenceSession", runtime)
    return runtime


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    transforms._constants_by_device.clear()  # as in a new process
    with fake_cuda(monkeypatch) as fake:
        yield fake


def checkpoint(network: nn.Module | None = None, **config: Any) -> Checkpoint:
    with _disable_current_modes():  # the fake device does not see the export
        content = export(network or Net(), output_names=["y"])
    architecture = GraphConfig(input="x", outputs=("y",), **config)
    preprocess = PreprocessConfig(window=(SMALL, LARGE), overlap=16)
    return Checkpoint(
        "theirs", architecture, preprocess, {GRAPH_TENSOR: np.frombuffer(content, np.uint8)}
    )


def build(source: Checkpoint, max_batch: int = 3) -> OnnxCudaEngine:
    queues = FakeQueues("cpu")
    return OnnxCudaEngine(source, device="cuda:1", max_batch=max_batch, queues=queues)


def draw(engine: OnnxCudaEngine, count: int) -> ByteArray:
    staged = engine.stage(LARGE, count)
    staged[:] = np.random.default_rng(0).integers(0, 256, staged.shape)
    return staged


NETWORKS: list[tuple[nn.Module, dict[str, Any]]] = [
    (Net(), {"activation": "sigmoid"}),
    (Net(ending=nn.Sigmoid()), {}),
    (Net(outputs=3), {"activation": "softmax", "out_channels": 3}),
    (Net(outputs=2), {"activation": "softmax", "foreground_only": True}),
    (Net(), {"activation": "sigmoid", "batch": "one"}),
    (Net(ending=nn.Flatten(0, 1)), {"activation": "sigmoid", "output_layout": "NHW"}),
    (Net(padding=0), {"activation": "sigmoid", "margin": 1}),
]


@pytest.mark.parametrize(("network", "config"), NETWORKS)
@pytest.mark.usefixtures("cuda", "runtime")
def test_probabilities_equal_those_of_the_cpu(network: nn.Module, config: dict[str, Any]) -> None:
    source = checkpoint(network, **config)
    engine = build(source)
    engine.warm()
    windows = draw(engine, 3)
    result = engine.collect(engine.submit(windows))
    assert result.dtype == np.uint16
    expected = OpenVinoEngine(source, threads=1, max_batch=3).collect(windows)
    assert result.shape == expected.shape
    assert np.abs(result * UNIT - expected).max() < 1e-4


@pytest.mark.usefixtures("cuda")
def test_cuda_alone_is_asked_for_on_the_stream_of_the_engine(runtime: Runtime) -> None:
    build(checkpoint())
    expected = {
        "device_id": "0", "user_compute_stream": str(FakeStream.cuda_stream), "use_tf32": "0",
    }  # fmt: skip
    assert runtime.asked == [(CUDA, expected)]


@pytest.mark.usefixtures("cuda")
def test_missing_provider_is_an_error(runtime: Runtime) -> None:
    runtime.providers = ["CPUExecutionProvider"]
    with pytest.raises(EngineError, match=r"cannot use CUDA here: install 'unet-server\[onnx\]'"):
        build(checkpoint())


@pytest.mark.usefixtures("cuda")
def test_operators_on_the_cpu_are_an_error(runtime: Runtime) -> None:
    runtime.parts.append(Part("CPUExecutionProvider", ["Conv", "Shape", "GridSample"]))
    with pytest.raises(EngineError, match="does not have on CUDA: Conv, GridSample"):
        build(checkpoint())


@pytest.mark.usefixtures("cuda")
def test_errors_of_the_runtime_are_mapped(runtime: Runtime) -> None:
    engine = build(checkpoint())
    state = onnxruntime.capi.onnxruntime_pybind11_state
    runtime.error = state.RuntimeException("Failed to allocate memory for requested buffer\nmore")
    with pytest.raises(OutOfMemory, match="Failed to allocate memory"):
        engine.submit(draw(engine, 2))
    runtime.error = state.Fail("the kernel failed\nmore")
    with pytest.raises(EngineError, match=r"ONNX Runtime: the kernel failed$"):
        engine.submit(draw(engine, 2))
    runtime.error = None
    engine.collect(engine.submit(draw(engine, 2)))


@pytest.mark.usefixtures("cuda", "runtime")
def test_values_that_are_not_finite_are_an_error() -> None:
    network = Net()
    nn.init.constant_(network.last.weight, torch.inf)
    engine = build(checkpoint(network))
    with pytest.raises(NonFiniteOutput):
        engine.collect(engine.submit(draw(engine, 1)))


@pytest.mark.usefixtures("runtime")
def test_two_batches_are_in_flight_without_races(cuda: FakeCuda) -> None:
    engine = build(checkpoint(activation="sigmoid"))
    engine.warm()
    first, second = engine.submit(draw(engine, 3)), engine.submit(draw(engine, 1))
    assert len(engine.collect(first)) == 3
    assert len(engine.collect(second)) == 1
    assert cuda.races == []
    engine.close()
