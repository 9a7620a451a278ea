"""The engine of ONNX graphs on a CUDA device: ONNX Runtime between the copies of the torch engine.

Windows travel as in `app.engine.cuda`, on the same streams. Only the network is another one, and it
is not captured as a CUDA graph. ONNX Runtime would compute on the CPU what its CUDA provider cannot
do, or everything if that provider cannot be loaded; both are errors here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from app.engine.cuda import CudaEngine
from app.engine.cuda_queues import CudaQueues
from app.errors import EngineError
from model.arrays import Shape
from model.checkpoint import GRAPH_TENSOR, Checkpoint
from model.config import GraphConfig
from model.errors import first_line
from model.transforms import normalize

_PROVIDER = "CUDAExecutionProvider"
_SHAPE_OPERATORS = {
    "Add", "Cast", "Ceil", "Concat", "Constant", "Div", "Equal", "Floor", "Gather", "Identity",
    "Max", "Min", "Mod", "Mul", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Split",
    "Squeeze", "Sub", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that compute the sizes of tensors, which ONNX Runtime does on the CPU on purpose."""


_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
}
_NUMPY_TYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.float64: np.float64}


@dataclasses.dataclass(frozen=True)
class _Output:
    """An output of a graph.

    Attributes:
        channels: their number, 1 if the output does not have their axis.
    """

    name: str
    channels: int
    dtype: torch.dtype


class OnnxCudaEngine(CudaEngine):
    """See `app.engine.base.Engine`; computes in fp32.

    Args:
        checkpoint: the model, an ONNX graph.
        device: "cuda:N".
        max_batch: most windows in a batch.
        queues: of the device; None are the real ones.

    Raises:
        OutOfMemory, EngineError: the device cannot hold the model, or ONNX Runtime cannot use it.
    """

    _network: Callable[[Tensor], Tensor]  # type: ignore[assignment]

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        max_batch: int,
        queues: CudaQueues | None = None,
    ) -> None:
        super().__init__(
            checkpoint, device=device, precision="fp32", max_batch=max_batch, queues=queues
        )

    def _build_network(self, checkpoint: Checkpoint, precision: str) -> Any:
        return OnnxNetwork(checkpoint, self._queues)

    def warm_steps(self) -> Iterator[Callable[[], None]]:
        for shape in sorted(self.shapes, key=math.prod, reverse=True):
            for size in sorted({1, self.max_batch}, reverse=True):
                yield functools.partial(self._compute_black, shape, size)

    def _compute_black(self, shape: Shape, size: int) -> None:
        black = self.stage(shape, size)
        black[:] = 0
        self.collect(self.submit(black))


class OnnxNetwork:
    """A graph on one device, from the bytes of windows to probabilities.

    Args:
        checkpoint: the model.
        queues: of the device; the graph runs on its computing stream.

    Raises:
        EngineError: ONNX Runtime has no CUDA, or has operators of the graph on the CPU alone.
        RuntimeError: as torch raises it.
    """

    def __init__(self, checkpoint: Checkpoint, queues: CudaQueues) -> None:
        assert isinstance(checkpoint.architecture, GraphConfig)
        self._config = checkpoint.architecture
        self._preprocess = checkpoint.preprocess
        self._device = queues.device
        content = checkpoint.state[GRAPH_TENSOR].tobytes()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        provider = {
            "device_id": str(self._device.index or 0),
            "user_compute_stream": str(queues.compute.cuda_stream),
            "use_tf32": "0",
        }
        with _torch_errors():
            self._session = onnxruntime.InferenceSession(
                content, options, providers=[(_PROVIDER, provider)]
            )
        self._session.disable_fallback()
        _check_providers(self._session, checkpoint.name)
        self._run_options = onnxruntime.RunOptions()
        # The engine waits for its own events.
        self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        (source,) = self._session.get_inputs()
        self._input_type = _TYPES[source.type]
        found = {each.name: each for each in self._session.get_outputs()}
        layout = self._config.output_layout
        self._outputs = [_read_output(found[name], layout) for name in self._config.outputs]

    def __call__(self, windows: Tensor) -> Tensor:
        """Compute (n, h, w, C) uint8 -> (n, channels, h', w') float32 in 0..1, on the device."""
        inputs = normalize(windows, self._preprocess)
        if self._config.batch == "one":
            return torch.cat([self._compute(inputs[i : i + 1]) for i in range(len(inputs))])
        return self._compute(inputs)

    def _compute(self, inputs: Tensor) -> Tensor:
        config = self._config
        outputs = [_to_nchw(each, config.output_layout) for each in self._run(inputs)]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        if config.activation == "sigmoid":
            y = y.sigmoid()
        elif config.activation == "softmax":
            y = y.softmax(dim=1)
        return y[:, 1:2].contiguous() if config.foreground_only else y

    def _run(self, inputs: Tensor) -> list[Tensor]:
        """Run the graph on (n, C, h, w), and return its outputs as they are, on the device."""
        count, _, height, width = inputs.shape
        lost = 2 * self._config.margin
        axes = {"N": count, "H": height - lost, "W": width - lost}
        if self._config.layout == "NHWC":
            inputs = inputs.permute(0, 2, 3, 1)
        inputs = inputs.to(self._input_type).contiguous()
        outputs = [
            inputs.new_empty(
                [axes.get(axis, each.channels) for axis in self._config.output_layout],
                dtype=each.dtype,
            )
            for each in self._outputs
        ]
        binding = self._session.io_binding()
        with _torch_errors():
            self._bind(binding.bind_input, self._config.input, inputs)
            for each, output in zip(self._outputs, outputs, strict=True):
                self._bind(binding.bind_output, each.name, output)
            self._session.run_with_iobinding(binding, self._run_options)
        return outputs

    def _bind(self, bind: Callable[..., None], name: str, tensor: Tensor) -> None:
        """Let ONNX Runtime read or write the memory of a tensor."""
        bind(
            name,
            self._device.type,
            self._device.index or 0,
            _NUMPY_TYPES[tensor.dtype],
            tuple(tensor.shape),
            tensor.data_ptr(),
        )


def _read_output(found: Any, layout: str) -> _Output:
    """Read type and channels of an output of a session.

    Raises:
        EngineError: the graph does not say how many channels it has.
    """
    channels = found.shape[layout.index("C")] if "C" in layout else 1
    if not isinstance(channels, int):
        raise EngineError(f"the graph does not say how many channels output {found.name!r} has")
    return _Output(found.name, channels, _TYPES[found.type])


def _to_nchw(y: Tensor, layout: str) -> Tensor:
    if layout == "NHWC":
        y = y.permute(0, 3, 1, 2).contiguous()
    elif layout == "NHW":
        y = y[:, None]
    return y.float()


def _check_providers(session: Any, name: str) -> None:
    """Check that a session computes on CUDA.

    Raises:
        EngineError: the CUDA provider is missing, or does not have all operators.
    """
    if _PROVIDER not in session.get_providers():
        raise EngineError(
            f"{name} is an ONNX graph, and ONNX Runtime cannot use CUDA here: install "
            "'unet-server[onnx]', which has onnxruntime-gpu, and remove onnxruntime"
        )
    elsewhere = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != _PROVIDER
        for node in part.get_nodes()
    }
    missing = sorted(elsewhere - _SHAPE_OPERATORS)
    if missing:
        raise EngineError(
            f"{name} has operators that ONNX Runtime does not have on CUDA: {', '.join(missing)}"
        )


@contextlib.contextmanager
def _torch_errors() -> Iterator[None]:
    """Raise errors of ONNX Runtime as torch raises its own, which `CudaQueues.errors` expects."""
    try:
        yield
    except RuntimeError:
        raise
    except Exception as error:  # its classes have no common base
        text = first_line(error)
        if "allocate memory" in text or "OUT_OF_MEMORY" in text:
            text = f"out of memory: {text}"
        raise RuntimeError(f"ONNX Runtime: {text}") from error
