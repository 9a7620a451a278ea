"""Segment an image in plain torch: the reference that every engine is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import numpy as np
import torch
from torch import Tensor

from model.arrays import AnyArray, ByteArray, FloatArray
from model.checkpoint import Checkpoint, Golden
from model.config import PreprocessConfig
from model.sliding_window import sliding_window_inference
from model.transforms import normalize, probabilities, to_mask
from model.unet import UNet

GOLDEN_SIDE = 256
"""Height and width of a golden image in pixels; mode "resize" keeps the whole image."""


def load_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint's network in fp32."""
    return {name: torch.from_numpy(array).float() for name, array in checkpoint.state.items()}


def build_network(checkpoint: Checkpoint) -> UNet:
    """Build a checkpoint's network in fp32 on the CPU."""
    network = UNet.from_config(checkpoint.architecture)
    network.load_state_dict(load_tensors(checkpoint))
    return network


class Predictor:
    """A function from a decoded image, (H, W[, 3]) uint8 or uint16, to probabilities (C, H, W).

    Args:
        network: on the device to use; each call runs it in evaluation mode.
        preprocess: of the checkpoint.
    """

    def __init__(self, network: UNet, preprocess: PreprocessConfig) -> None:
        self.network = network
        self.preprocess = preprocess

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: str | torch.device = "cpu") -> Self:
        """Create the predictor of a checkpoint, in fp32."""
        network = build_network(checkpoint)
        network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(network, checkpoint.preprocess)

    @torch.inference_mode()
    def __call__(self, image: AnyArray) -> FloatArray:
        device = next(self.network.parameters()).device

        def compute(window: ByteArray) -> FloatArray:
            batch = normalize(torch.from_numpy(window).to(device), self.preprocess)
            batch = batch.contiguous(memory_format=torch.channels_last)
            return probabilities(self.network(batch), self.preprocess).cpu().numpy()

        with _evaluation_mode(self.network):
            return sliding_window_inference(image, self.network.config, self.preprocess, compute)


def attach_golden(checkpoint: Checkpoint, image: AnyArray) -> Checkpoint:
    """Return the checkpoint with a golden pair: `image` and the reference's mask of it.

    In mode "native" the image is cropped to its centre. The mask is that of the weights as they are
    stored, in fp16 or fp32.
    """
    if checkpoint.preprocess.mode == "native":
        top, left = (max(0, (length - GOLDEN_SIDE) // 2) for length in image.shape[:2])
        image = np.ascontiguousarray(image[top : top + GOLDEN_SIDE, left : left + GOLDEN_SIDE])
    mask = to_mask(Predictor.of(checkpoint)(image), checkpoint.preprocess)
    return dataclasses.replace(checkpoint, golden=Golden(image, mask))


@contextmanager
def _evaluation_mode(network: UNet) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
