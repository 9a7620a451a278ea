"""Segment an image in plain torch: the reference that every engine is compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor

from model.arrays import AnyArray, ByteArray, FloatArray
from model.checkpoint import Checkpoint
from model.config import PreprocessConfig
from model.golden import make_golden
from model.sliding_window import sliding_window_inference
from model.transforms import normalize, probabilities
from model.unet import UNet


def load_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint's network in fp32."""
    return {name: torch.from_numpy(array).float() for name, array in checkpoint.state.items()}


def build_network(checkpoint: Checkpoint) -> UNet:
    """Build a checkpoint's network in fp32 on the CPU."""
    network = UNet.from_config(checkpoint.unet)
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

    The mask is that of the weights as they are stored, in fp16 or fp32.
    """
    golden = make_golden(image, checkpoint.preprocess, Predictor.of(checkpoint))
    return dataclasses.replace(checkpoint, golden=golden)


@contextmanager
def _evaluation_mode(network: UNet) -> Iterator[None]:
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
