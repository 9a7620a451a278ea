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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
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
from model.data import (
    DataError,
    PairedDataset,
    Sample,
    open_dataset,
    read_image,
    split_dataset,
)
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
    """The loss, its gradient or the weights are no numbers any more; the message names the step,
    its images, and what is left."""


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
        if state is None and optim.start:
            self.network.load_state_dict(_started(Path(optim.start), recipe.network))
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
        """One batch; returns its loss. `progress` is the share of the schedule that is over.

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
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), optim.clip or math.inf)
        self.optimiser.step()
        self._follow(min(optim.ema, (1 + self.steps_done) / (10 + self.steps_done)))
        if not math.isfinite(norm):  # asked last: until here a GPU need not be waited for
            raise TrainingDiverged(f"the gradient's norm is {float(norm)}")
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
        TrainingDiverged: the loss, its gradient or the weights are no numbers; the state before is
            kept.
        KeyboardInterrupt: while images are read, before the first step, or behind the last one.
        OSError: the folder cannot be written; what was there is intact.
    """
    device = _device(recipe.run.device)
    training, validation = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    golden = read_image(Path(recipe.data.golden)) if recipe.data.golden else validation[0].image
    with open_run(folder, recipe, command) as run:
        _prove(validation)
        crops = Crops(training, recipe)
        crops.preload(quiet=_quiet())
        trainer = Trainer(recipe, device, crops, run.load_state(device))
        try:
            with _interruptible() as interrupted:
                _fit(trainer, crops, validation, run, interrupted)
                if not trainer.steps_done:
                    raise KeyboardInterrupt  # in front of the first step: there is nothing to write
                run.save_state(trainer.state())
        except TrainingDiverged as error:
            # Not the same run at another rate: what a folder holds is what its recipe says.
            left = f"the state before is in {folder}; give another --out and"
            raise TrainingDiverged(
                f"{error}; {left if run.has_state else 'try'} a lower --learning-rate"
            ) from None
        report = _report(trainer, training, validation, command)
        run.report(report)
        run.draw()
        return _export(trainer, golden, run, report)


def _prove(samples: PairedDataset) -> None:
    """Read each once and keep none: what cannot be read is named now, not hours later.

    Raises:
        DataError: see `PairedDataset`.
    """
    for _ in tqdm(samples, "reading", unit="image", leave=False, disable=_quiet()):
        pass


def _fit(
    trainer: Trainer, crops: Crops, held: PairedDataset, run: Run, interrupted: threading.Event
) -> None:
    recipe, optim = trainer.recipe, trainer.recipe.optim
    total = optim.steps or math.ceil(optim.epochs * len(crops.samples) / optim.batch) or None
    # of training alone, over all starts of the run: reading, validation and report come on top
    budget = 60 * optim.minutes or math.inf
    # `Sampler` would shuffle; the order is the places themselves, from where the run stands
    last = (total or 10**9) * optim.batch
    loader = DataLoader(
        crops,
        batch_size=optim.batch,
        sampler=range(trainer.steps_done * optim.batch, last),
        num_workers=recipe.run.workers,
        pin_memory=trainer.device.type == "cuda",
        collate_fn=_collated,
        worker_init_fn=_uninterrupted,
    )
    epoch = max(1, len(crops.samples) // optim.batch)
    pictured = max(1, epoch // recipe.run.pictures) if recipe.run.pictures else 0
    running: float | None = None
    pace: float | None = None
    clock = time.monotonic()
    with tqdm(
        total=total,
        initial=trainer.steps_done,
        unit="step",
        dynamic_ncols=True,
        disable=_quiet(),
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
    ) as bar:
        for batch in loader:
            if isinstance(batch, DataError):
                raise batch
            pixels, labels, weights, places = batch
            progress = max(trainer.steps_done / (total or math.inf), trainer.seconds / budget)
            if interrupted.is_set() or progress >= 1:
                break
            try:
                loss = trainer.step(pixels, labels, weights, progress)
            except TrainingDiverged as error:
                names = ", ".join(crops.id(int(place)) for place in places)
                raise TrainingDiverged(
                    f"{error} at step {trainer.steps_done}, whose batch is {names}"
                ) from None
            now = time.monotonic()
            took, clock = now - clock, now
            trainer.seconds += took
            step = trainer.steps_done
            running, pace = _smoothed(running, loss), _smoothed(pace, took)
            speed = len(pixels) / took
            rate = trainer.optimiser.param_groups[0]["lr"]
            bar.update()
            left = tqdm.format_interval(_seconds_left(trainer, total, budget, pace))
            bar.set_postfix_str(
                f"loss {running:.3f}, lr {rate:.1e}, {speed:.1f} images/s, {left} left"
            )
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
                picture = _picture(trainer, held[step // pictured % len(held)])
                run.picture(f"pictures/{step:07d}.png", picture)
            if step % recipe.run.every == 0:
                state = trainer.state()  # first: weights that are none are not worth measuring
                scores = _validate(trainer, held).summary()
                run.log(step, {**scores, "seconds": trainer.seconds})
                run.save_state(state)  # before pictures, which take as long again
                run.picture("samples.png", _samples(trainer, held))
                run.draw()
                bar.write(
                    f"step {step}: validation Dice {scores['dice']:.4f}, IoU {scores['iou']:.4f}"
                )
            clock = time.monotonic()  # what is written meanwhile is not training time


def _smoothed(mean: float | None, value: float) -> float:
    return value if mean is None else _SMOOTHING * mean + (1 - _SMOOTHING) * value


def _seconds_left(trainer: Trainer, total: int | None, budget: float, pace: float) -> float:
    """Of training: to the last of `total` steps at `pace` seconds each, or until the budget of
    seconds is spent, whichever comes first."""
    steps = math.inf if total is None else total - trainer.steps_done
    return max(0.0, min(steps * pace, budget - trainer.seconds))


def _collated(batch: Any) -> Any:
    return batch if isinstance(batch, DataError) else default_collate(batch)


def _uninterrupted(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; what to do about it is the training's to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _validate(trainer: Trainer, samples: Iterable[Sample]) -> Report:
    instances = trainer.recipe.data.labels == "instances"
    predict = from_probabilities(trainer.predictor, trainer.recipe.preprocess, instances=instances)
    classes = len(trainer.recipe.preprocess.classes)
    return evaluate(predict, samples, classes=classes, instances=instances)


def _report(
    trainer: Trainer, training: PairedDataset, held: PairedDataset, command: str
) -> dict[str, Any]:
    """Scores on the validation images, and on as many training images: the gap is over-fitting."""
    places = np.linspace(0, len(training) - 1, len(held)).astype(int)
    seen = (training[place] for place in places)  # one at a time: there may be very many
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


def _export(trainer: Trainer, golden: npt.NDArray[Any], run: Run, report: dict[str, Any]) -> Path:
    recipe = trainer.recipe
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
    draft = Checkpoint(recipe.name, recipe.network, recipe.preprocess, trainer.shipped(), card=card)
    save_checkpoint(path, with_golden(draft, golden))
    record(path)
    return path


def _picture(trainer: Trainer, sample: Sample) -> Any:
    mask = to_mask(trainer.predictor(sample.image), trainer.recipe.preprocess)
    return compare(sample.image, sample.labels, mask)


def _samples(trainer: Trainer, held: PairedDataset, count: int = 6) -> Any:
    places = range(0, len(held), max(1, len(held) // count))[:count]
    shown = (held[place] for place in places)
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
    """Ctrl-C sets the event: the step is finished, and what there is is written. A second one is
    not that patient: KeyboardInterrupt, as everywhere outside."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def interrupt(*_: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, interrupt)
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
