"""What a run changes: network, average of weights and optimiser, one step after another.

Knows batches and a recipe; no folders, no files but the checkpoint to start from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.checkpoint import load_checkpoint
from model.config import UNetConfig
from model.convert.widen import narrow, widen
from model.errors import TrainingDiverged
from model.predict import Predictor, load_tensors
from model.training.batchnorm import fold, normalise_convolutions
from model.training.crops import Crops
from model.training.losses import segmentation_loss, targets
from model.training.recipe import OptimConfig, Recipe
from model.transforms import normalize
from model.unet import UNet

_ADOPTED = 32
"""Crops on whose statistics a network that is trained already takes on batch normalisation."""


def initialise(network: UNet, foreground: float) -> None:
    """He initialisation (2015, eq. 10), and an output that starts at the foreground's share."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # a 2×2 up-convolution with stride 2 adds in_channels products a pixel, not four times
            fan = module.in_channels * (9 if module.kernel_size == (3, 3) else 1)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    final = network.final_conv
    assert final.bias is not None
    nn.init.normal_(final.weight, std=0.01)
    if network.config.out_channels <= 2:
        nn.init.constant_(final.bias, math.log(foreground / (1 - foreground)))


class Trainer:
    """Network, average and optimiser of a run, and how one step changes them.

    Args:
        state: of `Trainer.state`, to go on from; it stands for all that the recipe would start
            from. None: the start.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        crops: Crops,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe = recipe
        self.device = device
        optim = recipe.optim
        torch.manual_seed(optim.seed)
        self.network = _on(device, UNet.from_config(recipe.network))
        seen = None
        if state is None and optim.init_from:
            self.network.load_state_dict(_started(Path(optim.init_from), recipe.network))
            seen = self._inputs(crops.pixels(_ADOPTED)) if optim.batch_norm else None
        elif state is None and optim.initialisation == "he":
            initialise(self.network, crops.foreground())
        if optim.batch_norm:
            normalise_convolutions(self.network, seen)
        self.average = copy.deepcopy(self.network)
        if optim.optimiser == "adam":
            self.optimiser: torch.optim.Optimizer = torch.optim.Adam(
                self.network.parameters(), optim.learning_rate
            )
        else:
            self.optimiser = torch.optim.AdamW(
                self.network.parameters(), optim.learning_rate, weight_decay=optim.weight_decay
            )
        wanted = recipe.run.autocast
        self.bf16 = wanted == "bf16" or (wanted == "auto" and device.type == "cuda")
        self.steps_done = 0
        self.seconds = 0.0
        if state is not None:
            self.load(state)

    @property
    def predictor(self) -> Predictor:
        """Of what is validated and shipped."""
        return Predictor(fold(self.average), self.recipe.preprocess)

    def step(self, pixels: Tensor, labels: Tensor, weights: Tensor, progress: float) -> float:
        """One batch.

        Args:
            pixels: (N, h, w, C) uint8, as `model.transforms.prepare` gives them.
            labels: (N, h, w) integers.
            weights: (N, h, w) float, of the cross-entropy at each pixel.
            progress: the share of the schedule that is over.

        Returns:
            Its loss.

        Raises:
            TrainingDiverged: the loss or its gradient is no number. The weights may be lost.
        """
        recipe, optim = self.recipe, self.recipe.optim
        rate = learning_rate(optim, self.steps_done, progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        inputs = self._inputs(pixels)
        labels = labels.to(self.device, non_blocking=True)
        weight = weights.to(self.device, non_blocking=True)[:, None]
        margin = recipe.network.margin
        wanted = targets(
            labels, recipe.preprocess, recipe.network.out_channels, recipe.loss.border_reach
        )
        if margin:  # an unpadded network answers for the inner part alone
            wanted = wanted[..., margin:-margin, margin:-margin]
            weight = weight[..., margin:-margin, margin:-margin]
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            logits = self.network(inputs)
        loss = segmentation_loss(
            logits.float(),
            wanted,
            weight,
            binary=recipe.preprocess.binary,
            dice_weight=recipe.loss.dice_weight,
        )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingDiverged(f"the loss is {value}")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), optim.grad_clip or math.inf)
        self.optimiser.step()
        self._follow(min(optim.ema, (1 + self.steps_done) / (10 + self.steps_done)))
        if not math.isfinite(norm):  # asked last: until here a GPU need not be waited for
            raise TrainingDiverged(f"the gradient's norm is {float(norm)}")
        self.steps_done += 1
        return value

    def _inputs(self, pixels: Tensor) -> Tensor:
        inputs = normalize(pixels.to(self.device, non_blocking=True), self.recipe.preprocess)
        return inputs.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        if not self.recipe.optim.ema:
            decay = 0.0
        fast = self.network.state_dict()
        for name, slow in self.average.state_dict().items():
            slow.lerp_(fast[name], 1 - decay)

    def shipped(self) -> dict[str, npt.NDArray[np.float16]]:
        """The average by state-dict name, folded and rounded to the 16 bits of a checkpoint.

        Raises:
            TrainingDiverged: it holds what is no number there.
        """
        tensors = {
            name: tensor.detach().half()
            for name, tensor in self.predictor.network.state_dict().items()
        }
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise TrainingDiverged(
                    f"{name} is NaN or too large for 16 bits after step {self.steps_done}"
                )
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}

    def state(self) -> dict[str, Any]:
        """All that a run goes on from.

        Raises:
            TrainingDiverged: see `shipped`; from there each way on would be as wrong. What is no
                number in the weights is none in their average either.
        """
        self.shipped()
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.steps_done,
            "seconds": self.seconds,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps_done, self.seconds = state["step"], state["seconds"]


def _started(path: Path, network: UNetConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint, widened to `network` if it is narrower, or narrowed to it."""
    checkpoint = load_checkpoint(path)
    wide = checkpoint.architecture.base_features > network.base_features
    return (narrow if wide else widen)(load_tensors(checkpoint), checkpoint.architecture, network)


def learning_rate(optim: OptimConfig, step: int, progress: float) -> float:
    """Linear warm-up, then constant, or half a cosine down to 1% (Loshchilov & Hutter 2017)."""
    rate = optim.learning_rate * min(1.0, (step + 1) / max(optim.warmup, 1))
    if optim.schedule == "cosine":
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return rate


def _on(device: torch.device, network: UNet) -> UNet:
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]
