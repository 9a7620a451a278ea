"""Training: pairs of images and masks in, a self-describing checkpoint out.

A run lives in a folder of its own and can be killed at any moment: the same command goes on from
the last state and draws the same crops, because the crop at a place of the sequence depends on
(seed, place) alone.
"""

from __future__ import annotations

import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from model.arrays import AnyArray
from model.checkpoint import Checkpoint, git_revision, record, save_checkpoint
from model.errors import DataError, TrainingDiverged, TrainingOutOfMemory
from model.evaluation.evaluate import Report, Sample, evaluate, from_probabilities
from model.predict import attach_golden
from model.training.crops import Crops
from model.training.data import PairedDataset, open_dataset, read_image, split_dataset
from model.training.plots import compare, contact_sheet
from model.training.recipe import Recipe
from model.training.run_folder import Run, open_run
from model.training.trainer import Trainer
from model.transforms import to_mask

_SMOOTHING = 0.98
"""Of the running mean of the loss that is shown."""
_LOG_EVERY = 20
_SHOWN = 6
"""Validation images in `samples.png`."""


def train(recipe: Recipe, folder: Path, command: str = "") -> Path:
    """Train, or go on with the run in `folder`.

    Returns:
        The checkpoint, `folder`/NAME.safetensors: the average of the weights, its golden pair, and
        a card with the scores on training and validation images.

    Raises:
        DataError, ConfigError: the data or the recipe are not what they should be.
        CheckpointError: the one to start from is none, or a manifest in the folder is damaged.
        ValueError: the recipe asks for a CUDA device, and there is none.
        TrainingOutOfMemory: a batch, or what it needs beside it, does not fit.
        TrainingDiverged: the loss, its gradient or the weights are no numbers; the state before is
            kept.
        KeyboardInterrupt: while images are read, before the first step, or behind the last one.
        OSError: a file of the recipe cannot be read, or the folder not be written; what was there
            is intact.
    """
    device = _device(recipe.run.device)
    training, validation = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    golden = read_image(Path(recipe.data.golden)) if recipe.data.golden else validation[0].image
    with open_run(folder, recipe, command) as run, _named_lack_of_memory(recipe):
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


@contextmanager
def _named_lack_of_memory(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # NumPy's; a device's; and the one of torch on a CPU, which has no type of its own
        lacking = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not lacking and "can't allocate memory" not in str(error):
            raise
        first = str(error).splitlines()[0] if str(error) else "out of memory"
        raise TrainingOutOfMemory(
            f"{first}; try a smaller --crop, --base-features, or --batch-size than "
            f"{recipe.optim.batch_size}"
        ) from error


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
    total = optim.steps or math.ceil(optim.epochs * len(crops.samples) / optim.batch_size) or None
    # of training alone, over all starts of the run: reading, validation and report come on top
    budget = 60 * optim.minutes or math.inf
    # `Sampler` would shuffle; the order is the places themselves, from where the run stands
    last = (total or 10**9) * optim.batch_size
    loader = DataLoader(
        crops,
        batch_size=optim.batch_size,
        sampler=range(trainer.steps_done * optim.batch_size, last),
        num_workers=recipe.run.workers,
        pin_memory=trainer.device.type == "cuda",
        collate_fn=_collated,
        worker_init_fn=_uninterrupted,
    )
    epoch = max(1, len(crops.samples) // optim.batch_size)
    pictured = (
        max(1, epoch // recipe.run.previews_per_epoch) if recipe.run.previews_per_epoch else 0
    )
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
            if step % recipe.run.validate_every == 0:
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


def _export(trainer: Trainer, golden: AnyArray, run: Run, report: dict[str, Any]) -> Path:
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
    save_checkpoint(path, attach_golden(draft, golden))
    record(path)
    return path


def _picture(trainer: Trainer, sample: Sample) -> Any:
    mask = to_mask(trainer.predictor(sample.image), trainer.recipe.preprocess)
    return compare(sample.image, sample.labels, mask)


def _samples(trainer: Trainer, held: PairedDataset) -> Any:
    places = range(0, len(held), max(1, len(held) // _SHOWN))[:_SHOWN]
    shown = (held[place] for place in places)
    return contact_sheet([(sample.id, _picture(trainer, sample)) for sample in shown])


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
