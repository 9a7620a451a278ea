"""Training: pairs of images and masks in, a self-describing checkpoint out.

A run lives in a folder of its own and can be killed at any moment: the same command goes on from
the last state and draws the same crops, because the crop at a place of the sequence depends on
(seed, place) alone.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from model.batchnorm import fold, normalise_convolutions
from model.checkpoint import (
    Checkpoint,
    git_revision,
    load_checkpoint,
    record,
    save_checkpoint,
)
from model.config import UNetConfig
from model.crops import Crops
from model.data import PairedDataset, Sample, open_dataset, read_image, split_dataset
from model.evaluate import Report, evaluate, from_probabilities
from model.losses import segmentation_loss, targets
from model.pictures import compare, contact_sheet
from model.predict import Predictor, with_golden
from model.recipe import OptimConfig, Recipe, add_flags, given_flags
from model.run import Run, open_run
from model.transforms import normalise, to_mask
from model.unet import UNet
from model.widen import narrow, widen

_SMOOTHING = 0.98
"""Of the running mean of the loss that is shown."""
_LOG_EVERY = 20
_ADOPTED = 32
"""Crops on whose statistics a network that is trained already takes on batch normalisation."""


class TrainingDiverged(ValueError):
    """The loss is no number any more; the message names the step and its images."""


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
    """Network, average and optimiser of a run, and how one step changes them."""

    def __init__(self, recipe: Recipe, device: torch.device, crops: Crops) -> None:
        self.recipe = recipe
        self.device = device
        optim = recipe.optim
        torch.manual_seed(optim.seed)
        self.network = _on(device, UNet.from_config(recipe.network))
        if optim.start:
            self.network.load_state_dict(_started(Path(optim.start), recipe.network))
        elif optim.initialisation == "he":
            initialise(self.network, crops.foreground())
        if optim.batch_norm:
            seen = self._inputs(crops.pixels(_ADOPTED)) if optim.start else None
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

    @property
    def predictor(self) -> Predictor:
        """Of what is validated and shipped."""
        return Predictor(fold(self.average), self.recipe.preprocess)

    def step(self, pixels: Tensor, labels: Tensor, weights: Tensor, progress: float) -> float:
        """One batch; returns its loss. `progress` is the share of the schedule that is over."""
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
        if optim.clip:
            nn.utils.clip_grad_norm_(self.network.parameters(), optim.clip)
        self.optimiser.step()
        self._follow(min(optim.ema, (1 + self.steps_done) / (10 + self.steps_done)))
        self.steps_done += 1
        return value

    def _inputs(self, pixels: Tensor) -> Tensor:
        inputs = normalise(pixels.to(self.device, non_blocking=True), self.recipe.preprocess)
        return inputs.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        if not self.recipe.optim.ema:
            decay = 0.0
        fast = self.network.state_dict()
        for name, slow in self.average.state_dict().items():
            slow.lerp_(fast[name], 1 - decay)

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "step": self.steps_done,
            "seconds": self.seconds,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps_done, self.seconds = state["step"], state["seconds"]


def _started(path: Path, network: UNetConfig) -> dict[str, Tensor]:
    """The weights of a checkpoint, widened to `network` if it is narrower, or narrowed to it."""
    checkpoint = load_checkpoint(path)
    state = {name: torch.from_numpy(tensor).float() for name, tensor in checkpoint.state.items()}
    wide = checkpoint.architecture.base_features > network.base_features
    return (narrow if wide else widen)(state, checkpoint.architecture, network)


def learning_rate(optim: OptimConfig, step: int, progress: float) -> float:
    """Linear warm-up, then constant, or half a cosine down to 1% (Loshchilov & Hutter 2017)."""
    rate = optim.learning_rate * min(1.0, (step + 1) / max(optim.warmup, 1))
    if optim.schedule == "cosine":
        rate *= 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return rate


def train(recipe: Recipe, folder: Path, command: str = "") -> Path:
    """Train, or go on with the run in `folder`.

    Returns:
        The checkpoint, `folder`/NAME.safetensors: the average of the weights, its golden pair, and
        a card with the scores on training and validation images.

    Raises:
        DataError, ConfigError: the data or the recipe are not what they should be.
        TrainingDiverged: the loss is no number; the state before is kept.
        OSError: the folder cannot be written; what was there is intact.
    """
    device = _device(recipe.run.device)
    training, validation = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    with open_run(folder, recipe, command) as run, _interruptible() as interrupted:
        held = list(tqdm(validation, "reading", unit="image", leave=False, disable=_quiet()))
        crops = Crops(training, recipe)
        crops.preload(quiet=_quiet())
        trainer = Trainer(recipe, device, crops)
        if state := run.load_state(device):
            trainer.load(state)
        _fit(trainer, crops, held, run, interrupted)
        run.save_state(trainer.state())
        report = _report(trainer, training, held, command)
        run.report(report)
        run.draw()
        return _export(trainer, held, run, report)


def _fit(
    trainer: Trainer, crops: Crops, held: list[Sample], run: Run, interrupted: threading.Event
) -> None:
    recipe, optim = trainer.recipe, trainer.recipe.optim
    total = optim.steps or math.ceil(optim.epochs * len(crops.samples) / optim.batch) or None
    budget = 60 * optim.minutes or math.inf
    # `Sampler` would shuffle; the order is the places themselves, from where the run stands
    last = (total or 10**9) * optim.batch
    loader = DataLoader(
        crops,
        batch_size=optim.batch,
        sampler=range(trainer.steps_done * optim.batch, last),
        num_workers=recipe.run.workers,
        pin_memory=trainer.device.type == "cuda",
    )
    epoch = max(1, len(crops.samples) // optim.batch)
    pictured = max(1, epoch // recipe.run.pictures) if recipe.run.pictures else 0
    running: float | None = None
    clock = time.monotonic()
    with tqdm(
        total=total, initial=trainer.steps_done, unit="step", dynamic_ncols=True, disable=_quiet()
    ) as bar:
        for pixels, labels, weights, places in loader:
            progress = max(trainer.steps_done / (total or math.inf), trainer.seconds / budget)
            if interrupted.is_set() or progress >= 1:
                break
            try:
                loss = trainer.step(pixels, labels, weights, progress)
            except TrainingDiverged as error:
                names = ", ".join(crops.id(int(place)) for place in places)
                raise TrainingDiverged(
                    f"{error} at step {trainer.steps_done}, whose batch is {names}; the state "
                    f"before is in {run.folder}; try a lower --learning-rate"
                ) from None
            now = time.monotonic()
            took, clock = now - clock, now
            trainer.seconds += took
            step = trainer.steps_done
            running = loss if running is None else _SMOOTHING * running + (1 - _SMOOTHING) * loss
            speed = len(pixels) / took
            rate = trainer.optimiser.param_groups[0]["lr"]
            bar.update()
            bar.set_postfix_str(f"loss {running:.3f}, lr {rate:.1e}, {speed:.1f} images/s")
            if step % _LOG_EVERY == 0:
                run.log(
                    step,
                    {
                        "loss": running,
                        "learning_rate": rate,
                        "images_per_second": speed,
                        "seconds": trainer.seconds,
                    },
                )
            if pictured and step % pictured == 0:
                sample = held[step // pictured % len(held)]
                run.picture(f"pictures/{step:07d}.png", _picture(trainer, sample))
            if step % recipe.run.every == 0:
                scores = _validate(trainer, held).summary()
                run.log(step, {**scores, "seconds": trainer.seconds})
                run.save_state(trainer.state())  # before pictures, which take as long again
                run.picture("samples.png", _samples(trainer, held))
                run.draw()
                bar.write(
                    f"step {step}: validation Dice {scores['dice']:.4f}, IoU {scores['iou']:.4f}"
                )
                clock = time.monotonic()  # validation is not training time


def _validate(trainer: Trainer, samples: Sequence[Sample]) -> Report:
    instances = trainer.recipe.data.labels == "instances"
    predict = from_probabilities(trainer.predictor, trainer.recipe.preprocess, instances=instances)
    classes = len(trainer.recipe.preprocess.classes)
    return evaluate(predict, samples, classes=classes, instances=instances)


def _report(
    trainer: Trainer, training: PairedDataset, held: list[Sample], command: str
) -> dict[str, Any]:
    """Scores on the validation images, and on as many training images: the gap is over-fitting."""
    seen = [training[i] for i in np.linspace(0, len(training) - 1, len(held)).astype(int)]
    return {
        "validation": _validate(trainer, held).summary(),
        "training": _validate(trainer, seen).summary(),
        "images": {"training": len(training), "validation": len(held)},
        "steps": trainer.steps_done,
        "hours": round(trainer.seconds / 3600, 3),
        "hardware": _hardware(trainer.device),
        "command": command,
        "revision": git_revision(),
        "torch": torch.__version__,
        "recipe": trainer.recipe.to_json(),
    }


def _export(trainer: Trainer, held: list[Sample], run: Run, report: dict[str, Any]) -> Path:
    recipe = trainer.recipe
    state = {
        name: tensor.detach().half().cpu().numpy()
        for name, tensor in trainer.predictor.network.state_dict().items()
    }
    image = read_image(Path(recipe.data.golden)) if recipe.data.golden else held[0].image
    card = {
        "metrics": report["validation"],
        "training_metrics": report["training"],
        "data": recipe.data.source,
        "licence": recipe.data.licence,
        "training": {
            key: report[key]
            for key in ("command", "images", "steps", "hours", "hardware", "torch", "revision")
        },
    }
    path = run.folder / f"{recipe.name}.safetensors"
    draft = Checkpoint(recipe.name, recipe.network, recipe.preprocess, state, card=card)
    save_checkpoint(path, with_golden(draft, image))
    record(path)
    return path


def _picture(trainer: Trainer, sample: Sample) -> Any:
    mask = to_mask(trainer.predictor(sample.image), trainer.recipe.preprocess)
    return compare(sample.image, sample.labels, mask)


def _samples(trainer: Trainer, held: list[Sample], count: int = 6) -> Any:
    shown = held[:: max(1, len(held) // count)][:count]
    return contact_sheet([(sample.id, _picture(trainer, sample)) for sample in shown])


def _on(device: torch.device, network: UNet) -> UNet:
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[no-any-return, call-overload]


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: there is no CUDA device here")
    return torch.device(name)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"


def _quiet() -> bool:
    return not sys.stderr.isatty()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event: the step is finished, and what there is is written."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="a recipe, model/configs/nuclei.toml for one")
    parser.add_argument("--out", type=Path, help="folder of the run (runs/NAME); resumed if there")
    add_flags(parser)


def main(args: argparse.Namespace) -> int:
    logging.basicConfig(format="%(message)s")
    recipe = Recipe.read(args.config, given_flags(args))
    folder = args.out or Path("runs") / recipe.name
    path = train(recipe, folder, shlex.join(["unet", *sys.argv[1:]]))
    print(f"{path}  (the whole run: {folder}/report.json)")
    return 0
