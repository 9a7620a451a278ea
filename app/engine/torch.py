"""The torch engine: CUDA devices, and the reference in fp32 on a CPU.

Bytes cross the bus, and everything else happens on the device: normalisation, network, sigmoid.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from app.errors import DeviceLost, EngineError, OutOfMemory
from model.checkpoint import Checkpoint
from model.config import Shape
from model.transforms import normalise, probabilities
from model.unet import UNet

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TorchEngine:
    """See `app.engine.base.Engine`.

    Args:
        checkpoint: the model.
        device: "cpu" or "cuda:N".
        precision: "fp32", "bf16" or "fp16".
        max_batch: windows at once.
    """

    backend = "torch"

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str,
        precision: str,
        max_batch: int,
        reason: str = "",
    ) -> None:
        self.device = device
        self.precision = precision
        self.reason = reason
        self.shapes: tuple[Shape, ...] = checkpoint.preprocess.window
        self.max_batch = max_batch
        self._preprocess = checkpoint.preprocess
        self._channels = checkpoint.architecture.in_channels
        self._device = torch.device(device)
        self._dtype = _DTYPES[precision]
        network = UNet.from_config(checkpoint.architecture)
        network.load_state_dict(
            {name: torch.from_numpy(tensor).float() for name, tensor in checkpoint.state.items()}
        )
        self._network = network.eval().to(
            device=self._device,
            dtype=self._dtype,
            memory_format=torch.channels_last,  # type: ignore[call-overload]
        )

    def stage(self, shape: Shape, count: int) -> npt.NDArray[np.uint8]:
        if shape not in self.shapes or not 1 <= count <= self.max_batch:
            raise ValueError(f"{count} windows of {shape} for an engine of {self.shapes}")
        # Pinned, so that the copy to the device needs no second copy by the driver; torch keeps
        # freed pinned blocks for the next batch.
        buffer = torch.empty(
            (count, *shape, self._channels),
            dtype=torch.uint8,
            pin_memory=self._device.type == "cuda",
        )
        return buffer.numpy()

    @torch.inference_mode()
    def run(self, windows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        try:
            batch = torch.from_numpy(windows).to(self._device, non_blocking=True)
            inputs = normalise(batch, self._preprocess)
            inputs = inputs.to(dtype=self._dtype, memory_format=torch.channels_last)
            return probabilities(self._network(inputs), self._preprocess).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(str(error)) from error
        except RuntimeError as error:
            # After a sticky error (an illegal access, a lost device) every later call fails too.
            if self._device.type == "cuda" and not _answers(self._device):
                raise DeviceLost(f"{self.device}: {error}") from error
            raise EngineError(f"{self.device}: {error}") from error

    def warm(self) -> None:
        for shape in self.shapes:
            for count in {1, self.max_batch}:
                self.run(self.stage(shape, count))

    def close(self) -> None:
        del self._network
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def _answers(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
