"""The state that training changes: network, moving average and optimizer, one step at a time.

Knows batches and a recipe; no run folders, and no files except the checkpoint of the initial
weights.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from model.cuda import BF16_FROM
from model.errors import TrainingDiverged
from model.predict import Predictor
from model.training.batchnorm import add_batch_norm, fold_batch_norm
from model.training.crops import CropDataset
from model.training.initial import InitialWeights, load_initial_weights
from model.training.losses import label_weights, make_targets, segmentation_loss
from model.training.recipe import Recipe
from model.training.sections import OptimConfig
from model.transforms import normalize
from model.unet import UNet

logger = logging.getLogger(__name__)

_CALIBRATION_CROPS = 32
"""Crops whose statistics initialize batch normalization in a network that is already trained."""

_WARMUP_SHARE = 0.1
"""Most of the schedule that warm-up may take."""

READ_EVERY = {"cpu": 1, "cuda": 50}
"""Steps after which losses are read, by type of device. Reading one waits for the device, which
then has no work until the next step is launched."""

_OLD_STATE_KEYS = {"average": "ema", "optimiser": "optimizer"}
"""Keys of states that were saved by earlier versions -> present keys."""


class Snapshot:
    """The result of the steps so far.

    Args:
        predictor: with the moving average of the weights, batch normalization folded.
        state: everything that is needed to resume the run.
    """

    def __init__(self, predictor: Predictor, state: Mapping[str, Any]) -> None:
        self.predictor = predictor
        self.state = state

    @property
    def step(self) -> int:
        """Number of steps done."""
        return int(self.state["step"])

    @property
    def seconds(self) -> float:
        """Training time."""
        return float(self.state["seconds"])

    def export_weights(self) -> dict[str, npt.NDArray[np.float16]]:
        """Return the moving average as a plain state dict in fp16.

        It is not finite where a weight is not, so a state should be saved only after this check.

        Raises:
            TrainingDiverged: a weight is not finite in fp16.
        """
        tensors = {
            name: tensor.detach().half()
            for name, tensor in self.predictor.network.state_dict().items()
        }
        for name, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise TrainingDiverged(
                    f"{name} is NaN or too large for fp16 after step {self.step}"
                )
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


class Trainer:
    """Network, moving average of its weights, and optimizer of a run.

    Args:
        recipe: of the run.
        device: to train on.
        crops: of the training images; used to initialize a network.
        state: of a `Snapshot`, to resume a run. None: start as the recipe says.

    Attributes:
        network: in training; with batch normalization if the recipe says so.
        initial: weights of a checkpoint, with which the run starts here; None if it starts without
            one, or is resumed.
        ema: exponential moving average of the network's weights: validated and exported.
        steps_done: number of steps so far, over all starts of the run.
        read_every: after so many steps the caller should call `read_steps`.
        seconds: training time so far; the caller adds to it.

    Raises:
        CheckpointError: the checkpoint of the initial weights is invalid.
        ConfigError: it cannot be widened or narrowed to the recipe's network.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        crops: CropDataset,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.recipe = recipe
        self.device = device
        optim = recipe.optim
        torch.manual_seed(optim.seed)
        self.network = _move(UNet.from_config(recipe.network), device)
        self.read_every = READ_EVERY.get(device.type, 1)
        self._unread: list[tuple[Tensor, Tensor]] = []
        calibration_inputs = None
        self.initial: InitialWeights | None = None
        if state is None and optim.init_from:
            self.initial = load_initial_weights(Path(optim.init_from), recipe)
            lines = [f"initial weights of {self.initial.checkpoint}", *self.initial.changes]
            logger.warning("%s", "; ".join(lines))
            self.network.load_state_dict(self.initial.weights)
            if optim.batch_norm:
                calibration_inputs = self._to_inputs(crops.first_crops(_CALIBRATION_CROPS))
        elif state is None and optim.initialisation == "he":
            initialize_weights(self.network, crops.foreground_fraction())
        if optim.batch_norm:
            add_batch_norm(self.network, calibration_inputs)
        self.ema = copy.deepcopy(self.network)
        self._averages = list(self.ema.state_dict().values())
        self._averaged = list(self.network.state_dict().values())
        self._forward: Callable[[Tensor], Tensor] = self.network
        if recipe.run.compile:
            self._forward = torch.compile(self.network)
        self.optimizer = _make_optimizer(self.network, optim)
        autocast = recipe.run.autocast
        self.bf16 = autocast == "bf16" or (autocast == "auto" and has_bf16(device))
        self.steps_done = 0
        self.seconds = 0.0
        if state is not None:
            self.load_state(state)

    @property
    def predictor(self) -> Predictor:
        """A predictor with the moving average of the weights, batch normalization folded."""
        return Predictor(fold_batch_norm(self.ema), self.recipe.preprocess)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the last step."""
        return float(self.optimizer.param_groups[0]["lr"])

    def step(
        self,
        pixels: Tensor,
        labels: Tensor,
        weights: Tensor,
        progress: float,
        unseparated: Sequence[bool] | None = None,
    ) -> None:
        """Train on one batch. On CUDA the device may finish later.

        Args:
            pixels: (N, h, w, C) uint8, prepared by `model.transforms.prepare`.
            labels: (N, h, w) integers.
            weights: (N, h, w) float, of the cross-entropy at each pixel.
            progress: fraction of the schedule that has passed, 0..1.
            unseparated: for each crop, whether its labels join touching objects. The border channel
                of such a crop has no loss. None: every crop has one label per object, or the
                network has no border channel.
        """
        optim = self.recipe.optim
        rate = compute_learning_rate(optim, self.steps_done, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = self._compute_loss(pixels, labels, weights, unseparated)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), optim.grad_clip or math.inf)
        self.optimizer.step()
        self._update_ema()
        self._unread.append((loss.detach(), norm))
        self.steps_done += 1

    def read_steps(self) -> list[tuple[float, float]]:
        """Return loss and norm of the gradient of each step since the last call, oldest first.

        Where one is not finite, the weights are lost. Waits until the device has done the steps.
        """
        if not self._unread:
            return []
        figures = torch.stack([torch.stack(pair) for pair in self._unread]).tolist()
        self._unread.clear()
        return [(loss, norm) for loss, norm in figures]

    def _compute_loss(
        self,
        pixels: Tensor,
        labels: Tensor,
        weights: Tensor,
        unseparated: Sequence[bool] | None,
    ) -> Tensor:
        """Compute the loss of a batch; the arguments are those of `step`."""
        recipe = self.recipe
        inputs = self._to_inputs(pixels)
        labels = labels.to(self.device, non_blocking=True)
        weights = weights.to(self.device, non_blocking=True)[:, None]
        margin = recipe.network.margin
        valid = None
        if recipe.data.has_void:
            valid = (labels >= 0)[:, None]
        if recipe.data.has_void or recipe.loss.class_weights:
            classes = len(recipe.preprocess.classes)
            weights = weights * label_weights(labels, recipe.loss.class_weights, classes)[:, None]
            labels = labels.clamp(min=0)
        target = make_targets(
            labels, recipe.preprocess, recipe.network.out_channels, recipe.loss.border_reach
        )
        if margin:  # the output of an unpadded network is smaller than its input
            target = target[..., margin:-margin, margin:-margin]
            weights = weights[..., margin:-margin, margin:-margin]
            valid = None if valid is None else valid[..., margin:-margin, margin:-margin]
        if unseparated is not None and recipe.network.out_channels == 2:
            known, scale = self._mask_border(unseparated)
            weights = weights * scale
            valid = known if valid is None else valid * known
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            logits = self._forward(inputs)
        return segmentation_loss(
            logits.float(),
            target,
            weights,
            binary=recipe.preprocess.binary,
            dice_weight=recipe.loss.dice_weight,
            valid=valid,
        )

    def _mask_border(self, unseparated: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Return what leaves the border channel of some crops out of the loss.

        Returns:
            Two tensors (N, 2, 1, 1): 0 for that channel of these crops and 1 elsewhere; and the
            same, weighted up so that the channel's mean is over the other crops.
        """
        separated = ~np.array(unseparated)
        known = np.ones((len(separated), 2, 1, 1), np.float32)
        known[:, 1, 0, 0] = separated
        scale = known.copy()
        scale[:, 1] *= len(separated) / max(1, separated.sum())
        table = torch.from_numpy(np.stack([known, scale]))
        if self.device.type == "cuda":
            table = table.pin_memory().to(self.device, non_blocking=True)
        return table[0], table[1]

    def _to_inputs(self, pixels: Tensor) -> Tensor:
        """Convert pixels (N, h, w, C) uint8 to the network's input on the device."""
        pixels = pixels.to(self.device, non_blocking=True)
        inputs = normalize(pixels, self.recipe.preprocess)
        return inputs.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _update_ema(self) -> None:
        """Move the average towards the weights: ema = decay · ema + (1 - decay) · weights.

        The decay grows with the steps up to the recipe's, so that the initial weights fade quickly.
        """
        decay = min(self.recipe.optim.ema, (1 + self.steps_done) / (10 + self.steps_done))
        torch._foreach_lerp_(self._averages, self._averaged, 1 - decay)

    def snapshot(self, copied: bool = False) -> Snapshot:
        """Return weights and state of this step.

        Args:
            copied: the state is a copy, which later steps do not change.
        """
        state = {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.steps_done,
            "seconds": self.seconds,
        }
        return Snapshot(self.predictor, copy.deepcopy(state) if copied else state)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a `Snapshot`; keys of earlier versions are accepted."""
        state = {_OLD_STATE_KEYS.get(key, key): value for key, value in state.items()}
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps_done, self.seconds = state["step"], state["seconds"]


def initialize_weights(network: UNet, foreground: float) -> None:
    """Initialize a network before training: He et al. 2015, equation 10.

    Args:
        network: changed in place.
        foreground: fraction of foreground pixels, 0..1. A binary network predicts it at first.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # Kernels of the 2×2 up-convolution do not overlap: an output pixel sums in_channels.
            fan_in = module.in_channels * (9 if module.kernel_size == (3, 3) else 1)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan_in))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    final = network.final_conv
    assert final.bias is not None
    nn.init.normal_(final.weight, std=0.01)
    if network.config.out_channels <= 2:
        nn.init.constant_(final.bias, math.log(foreground / (1 - foreground)))


def compute_learning_rate(optim: OptimConfig, step: int, progress: float) -> float:
    """Compute the learning rate of a step.

    It rises linearly during warm-up, which takes at most a tenth of the schedule. Then it is
    constant, or follows half a cosine down to 1% (Loshchilov & Hutter 2017).

    Args:
        optim: of the recipe.
        step: counted from 0.
        progress: fraction of the schedule that has passed; above 1 counts as 1.
    """
    risen = max((step + 1) / max(optim.warmup, 1), progress / _WARMUP_SHARE)
    rate = optim.learning_rate * min(1.0, risen)
    if optim.schedule == "cosine":
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return rate


def _make_optimizer(network: UNet, optim: OptimConfig) -> torch.optim.Optimizer:
    parameters = network.parameters()
    if optim.optimiser == "adam":
        return torch.optim.Adam(parameters, optim.learning_rate, fused=True)
    return torch.optim.AdamW(
        parameters, optim.learning_rate, weight_decay=optim.weight_decay, fused=True
    )


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 faster than fp32; older cards only emulate it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= BF16_FROM


def _move(network: UNet, device: torch.device) -> UNet:
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]
