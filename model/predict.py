"""An image through the network, in plain torch: the reference every engine is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from model.checkpoint import Checkpoint, Golden
from model.config import PreprocessConfig
from model.transforms import normalise, prepare, probabilities, restore, to_mask
from model.unet import UNet
from model.windows import Stitcher, plan_windows

GOLDEN_SIDE = 256
"""Pixels of a golden image's sides, unless the whole image is needed (mode "resize")."""


class Predictor:
    """Callable: decoded image (H, W[, 3]) uint8 or uint16 -> probabilities (C, H, W) float32.

    Args:
        network: on the device to use; put into evaluation mode for each call and back.
        preprocess: of the checkpoint.
    """

    def __init__(self, network: UNet, preprocess: PreprocessConfig) -> None:
        self.network = network
        self.preprocess = preprocess

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: str | torch.device = "cpu") -> Self:
        """The predictor of a checkpoint, in fp32."""
        network = UNet.from_config(checkpoint.architecture)
        network.load_state_dict(
            {name: torch.from_numpy(tensor).float() for name, tensor in checkpoint.state.items()}
        )
        network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(network, checkpoint.preprocess)

    @torch.inference_mode()
    def __call__(self, image: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        device = next(self.network.parameters()).device
        pixels = prepare(image, self.preprocess)
        plan = plan_windows(pixels.shape[0], pixels.shape[1], self.network.config, self.preprocess)
        stitcher = Stitcher(plan, self.network.config.out_channels)
        with _evaluating(self.network):
            for window in plan.windows:
                buffer = np.empty((*window.shape, pixels.shape[2]), np.uint8)
                plan.cut(pixels, window, out=buffer)
                batch = normalise(torch.from_numpy(buffer)[None].to(device), self.preprocess)
                batch = batch.contiguous(memory_format=torch.channels_last)
                output = probabilities(self.network(batch), self.preprocess)
                stitcher.add(window, output[0].cpu().numpy())
        return restore(stitcher.result(), *image.shape[:2])


def with_golden(checkpoint: Checkpoint, image: npt.NDArray[Any]) -> Checkpoint:
    """The checkpoint with a golden pair: `image` (its middle, mode "native") and the mask of it.

    The weights are taken as they are stored, rounded to fp16 if they are.
    """
    if checkpoint.preprocess.mode == "native":
        top, left = (max(0, (length - GOLDEN_SIDE) // 2) for length in image.shape[:2])
        image = np.ascontiguousarray(image[top : top + GOLDEN_SIDE, left : left + GOLDEN_SIDE])
    mask = to_mask(Predictor.of(checkpoint)(image), checkpoint.preprocess)
    return dataclasses.replace(checkpoint, golden=Golden(image, mask))


@contextmanager
def _evaluating(network: UNet) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
