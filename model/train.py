"""Training: pairs of images and masks in, a self-describing checkpoint out.

A run lives in a folder of its own and can be killed at any moment: the same command goes on from
the last state, and draws the same crops, because the crop of step s and place i depends on
(seed, s, i) alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.augment import AugmentConfig, augment
from model.config import PreprocessConfig, UNetConfig
from model.data import Pair, Sample, read_sample
from model.losses import foreground_and_border, segmentation_loss
from model.metrics import Overlap
from model.predict import Predictor
from model.transforms import prepare, to_mask
from model.unet import UNet


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """How the weights are moved."""

    batch: int = 8
    steps: int = 4000
    """Length of the schedule; with `minutes`, the end of the budget is the end of the schedule."""
    minutes: float | None = None
    learning_rate: float = 4e-4
    weight_decay: float = 1e-4
    warmup: int = 100
    """Steps until the full learning rate."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.998
    """Decay of the moving average of the weights that is validated and shipped."""
    seed: int = 0


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Endless random crops; the item at an index is always the same."""

    def __init__(
        self, samples: list[Sample], preprocess: PreprocessConfig, config: AugmentConfig, seed: int
    ) -> None:
        self.pairs = [(prepare(sample.image, preprocess), sample.labels) for sample in samples]
        self.config = config
        self.seed = seed

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((self.seed, index))
        image, labels = self.pairs[rng.integers(len(self.pairs))]
        return augment(image, labels, self.config, rng)


def initialise(network: UNet, foreground: float) -> None:
    """He initialisation (2015, eq. 10), and an output that starts at the foreground's share."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            # a 2×2 up-convolution with stride 2 adds up in_channels products a pixel, not 4 times that
            fan = module.in_channels * (9 if module.kernel_size == (3, 3) else 1)
            nn.init.normal_(module.weight, std=math.sqrt(2 / fan))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    nn.init.normal_(network.final_conv.weight, std=0.01)
    assert network.final_conv.bias is not None
    nn.init.constant_(network.final_conv.bias, math.log(foreground / (1 - foreground)))


def validate(predict: Predictor, samples: list[Sample]) -> dict[str, float]:
    """Mean over the images, and pooled, of Dice and IoU of the foreground."""
    counts = [
        Overlap.of(to_mask(predict(sample.image), predict.preprocess) > 0, sample.labels > 0)
        for sample in samples
    ]
    pooled = sum(counts[1:], start=counts[0])
    return {
        "dice": float(np.mean([count.dice for count in counts])),
        "iou": float(np.mean([count.iou for count in counts])),
        "pooled_dice": pooled.dice,
        "pooled_iou": pooled.iou,
    }


def train(
    training: list[Pair],
    validation: list[Pair],
    architecture: UNetConfig,
    preprocess: PreprocessConfig,
    augmentation: AugmentConfig,
    optim: OptimConfig,
    folder: Path,
    *,
    every: int = 250,
) -> UNet:
    """Train, validating every `every` steps; returns the network with the averaged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(optim.seed)
    samples = [read_sample(pair) for pair in training]
    held = [read_sample(pair) for pair in validation]
    share = float(np.mean([(sample.labels > 0).mean() for sample in samples]))
    network = UNet.from_config(architecture).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    initialise(network, share)
    average = UNet.from_config(architecture).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average.load_state_dict(network.state_dict())
    optimiser = torch.optim.AdamW(
        network.parameters(), optim.learning_rate, weight_decay=optim.weight_decay
    )
    step, spent = 0, 0.0
    state_file = folder / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        step, spent = state["step"], state["seconds"]

    def save() -> None:
        state = {
            "network": network.state_dict(),
            "average": average.state_dict(),
            "optimiser": optimiser.state_dict(),
            "step": step,
            "seconds": spent,
        }
        part = state_file.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, state_file)

    def log(record: Mapping[str, Any]) -> None:
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")

    crops = Crops(samples, preprocess, augmentation, optim.seed)
    order = range(step * optim.batch, optim.steps * optim.batch)
    loader = DataLoader(crops, batch_size=optim.batch, sampler=order)
    bar = tqdm(total=optim.steps, initial=step, unit="step", dynamic_ncols=True, mininterval=5)
    running, clock = 0.0, time.monotonic()
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    for pixels, labels in loader:
        if interrupted.is_set():
            break
        progress = step / optim.steps
        if optim.minutes is not None:
            progress = max(progress, spent / (60 * optim.minutes))
        if progress >= 1:
            break
        warm = min(1.0, (step + 1) / optim.warmup)
        rate = optim.learning_rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        inputs = pixels.to(device).permute(0, 3, 1, 2).float() / 255
        inputs = (inputs - inputs.new_tensor(preprocess.mean).view(1, -1, 1, 1)) / inputs.new_tensor(
            preprocess.std
        ).view(1, -1, 1, 1)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        target = foreground_and_border(labels.to(device))[:, : architecture.out_channels]
        loss = segmentation_loss(network(inputs), target)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), optim.clip)
        optimiser.step()
        decay = min(optim.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for slow, fast in zip(average.parameters(), network.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}")
        running = value if running == 0 else 0.98 * running + 0.02 * value
        step += 1
        now = time.monotonic()
        spent, clock = spent + now - clock, now
        bar.update()
        bar.set_postfix(loss=f"{running:.3f}", lr=f"{rate:.1e}")
        if step % 20 == 0:
            log({"step": step, "seconds": spent, "loss": running, "learning_rate": rate})
        if step % every == 0:
            scores = validate(Predictor(average, preprocess), held)
            log({"step": step, "seconds": spent, **scores})
            tqdm.write(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
            save()
            clock = time.monotonic()
    bar.close()
    signal.signal(signal.SIGINT, before)
    save()
    if interrupted.is_set():
        return average
    scores = validate(Predictor(average, preprocess), held)
    log({"step": step, "seconds": spent, **scores})
    tqdm.write(f"step {step}  " + "  ".join(f"{k} {v:.4f}" for k, v in scores.items()))
    return average
