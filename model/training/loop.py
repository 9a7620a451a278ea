"""Train a network: pairs of images and masks in, a self-describing checkpoint out.

A run has a folder and may be killed at any moment. The same command resumes it from the last saved
state and draws the same crops. Knows the order of the work; `model.training.trainer` knows a step,
and `model.training.run_folder` the files.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from tqdm import tqdm

from model.arrays import AnyArray
from model.checkpoint import Checkpoint, git_revision, save_checkpoint, update_manifest
from model.cuda import choose_device
from model.errors import DataError, TrainingDiverged, TrainingOutOfMemory
from model.evaluation.evaluate import (
    Report,
    Sample,
    evaluate,
    format_classes,
    from_probabilities,
)
from model.predict import Predictor, attach_golden
from model.training.crops import CropDataset
from model.training.data import PairedDataset, open_dataset, read_image, split_dataset
from model.training.device_crops import Batch, DeviceCrops, ImagesDoNotFit
from model.training.plots import draw_comparison, draw_legend, make_contact_sheet
from model.training.progress import LineClock, has_terminal, track
from model.training.recipe import OptimConfig, Recipe
from model.training.run_folder import RunFolder, open_run, report_write_errors
from model.training.survey import check_masks
from model.training.trainer import Snapshot, Trainer
from model.transforms import to_mask
from model.unet import UNet

logger = logging.getLogger(__name__)

_SMOOTHING = 0.98
"""Decay of the running means of loss and seconds per step."""
_LOG_EVERY = 20
"""Steps between two records of the training loss."""
_VALIDATIONS = 10
"""Fewest validations of a run with as many steps."""
_MOST_STEPS = 400
"""Most steps between two validations, unless the recipe sets their number."""
_SAMPLE_COUNT = 6
"""Validation images in samples.png."""
VALIDATE_BESIDE = {"cuda"}
"""Types of devices that validate while training continues."""
_IMAGE_SHARE = 0.4
"""Share of a device's free memory that training images may take."""
_CARD_KEYS = (
    *("command", "images", "steps", "shipped_step", "hours", "hardware", "torch", "revision"),
)
"""Parts of a report that a card contains too."""
_ENDLESS = 10**9
"""Steps that no run reaches."""


def train(recipe: Recipe, folder: Path, command: str = "", recipe_text: str = "") -> Path:
    """Train a network, or resume the run in `folder`.

    After Ctrl-C the current step is finished, and the run ends as if it were complete.

    Args:
        command: recorded in the run's folder and in the checkpoint.
        recipe_text: written to the run's folder as recipe.toml.

    Returns:
        The checkpoint, `folder`/NAME.safetensors: the moving average of the weights at the step
        that validated best, a golden pair, and a card with the scores on training and validation
        images.

    Raises:
        DataError: the data set is invalid; see `open_dataset`, `split_dataset` and `CropDataset`.
        ConfigError: the recipe asks for a CUDA device that torch cannot use, differs from that
            of the run in `folder`, or contradicts itself; or another run has locked the folder.
        CheckpointError: the checkpoint of the initial weights, or a manifest in the folder, is
            damaged.
        TrainingOutOfMemory: a batch, or what it needs, does not fit into memory.
        TrainingDiverged: the loss, its gradient or the weights are not finite. The last saved state
            is kept.
        WriteError: the folder cannot be written. Its files are intact.
        KeyboardInterrupt: Ctrl-C while images are read, before the first step, after the last one,
            or a second time.
    """
    device = torch.device(choose_device(recipe.run.device))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # all crops have one shape, and windows have few
    dataset = open_dataset(recipe.data, recipe.preprocess)
    if warning := check_masks(dataset):
        logger.warning("%s", warning)
    training, validation = split_dataset(dataset, recipe.data)
    golden = read_image(Path(recipe.data.golden)) if recipe.data.golden else validation[0].image
    with open_run(folder, recipe, command) as run, _report_out_of_memory(recipe):
        if recipe_text:
            run.save_text("recipe.toml", recipe_text)
        _check_readable(validation)
        crops = CropDataset(training, recipe)
        crops.preload()
        state = run.load_state(device)
        trainer = Trainer(recipe, device, crops, state)
        best = BestWeights.load(state)
        length = RunLength.of(recipe.optim, len(training))
        if state and length.progress(trainer) >= 1:
            logger.warning(
                "%s is complete after %d steps; its files are written again (a larger --steps or "
                "--minutes continues it, another --out starts anew)",
                run.path,
                trainer.steps_done,
            )
        with _advise_on_divergence(run), catch_interrupt() as interrupted:
            ending = _train_loop(trainer, crops, validation, run, best, interrupted)
            if not trainer.steps_done:
                raise KeyboardInterrupt  # before the first step, so without a result
            _save_state(trainer.snapshot(), run, best)
        final, outcome = _choose_weights(trainer, validation, best)
        report = _build_report(trainer, final, outcome, training, validation, command)
        run.save_report(report)
        run.save_curves(trainer.steps_done)
        run.save_image("samples.png", _draw_samples(final, validation), outcome.step)
        if not recipe.preprocess.binary:
            run.save_confusion(outcome.report.confusion, recipe.preprocess.classes, outcome.step)
        run.log_hyperparameters(recipe, report["validation"], outcome.step)
        path = _export_checkpoint(trainer, final, golden, run, report)
        print("\n".join(_summarize(trainer, length, ending, outcome, run)), flush=True)
        return path


@contextmanager
def catch_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C in the block into an event, and the second into a KeyboardInterrupt.

    Outside the main thread, which alone receives signals, the event is never set.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted
        return

    def handle(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _report_out_of_memory(recipe: Recipe) -> Iterator[None]:
    """Convert out-of-memory errors of NumPy and torch into `TrainingOutOfMemory`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_typed = isinstance(error, MemoryError | torch.OutOfMemoryError)
        # on a CPU torch raises a plain RuntimeError
        if not is_typed and "can't allocate memory" not in str(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        raise TrainingOutOfMemory(
            f"{reason}; try a smaller --crop, --base-features, or --batch-size than "
            f"{recipe.optim.batch_size}"
        ) from error


@contextmanager
def _advise_on_divergence(run: RunFolder) -> Iterator[None]:
    """Add to a `TrainingDiverged` what the user can do.

    A run keeps its learning rate, so a lower one needs another folder once a state was saved.
    """
    try:
        yield
    except TrainingDiverged as error:
        advice = "try a lower --learning-rate"
        if run.has_state:
            advice = (
                f"the last state is kept in {run.path}; try another --out and a lower "
                "--learning-rate"
            )
        raise TrainingDiverged(f"{error}; {advice}") from None


def _check_readable(samples: PairedDataset) -> None:
    """Decode every sample once, so that an unreadable one is reported before training.

    Raises:
        DataError: see `PairedDataset`.
    """
    for _ in track(samples, len(samples), "reading"):
        pass


class BestWeights:
    """The weights that validated best so far.

    Only validations at the recipe's interval count, so that a run that is interrupted and resumed
    ends with the same ones.

    Attributes:
        step: at which they were validated; 0 before the first validation.
        score: of that validation; see `rate_scores`.
        weights: state dict of the network without batch normalization, on the CPU.
        since: number of validations since then.
    """

    def __init__(self) -> None:
        self.step = 0
        self.score = -math.inf
        self.weights: dict[str, torch.Tensor] = {}
        self.since = 0

    @classmethod
    def load(cls, state: Mapping[str, Any] | None) -> Self:
        """Restore them from a saved state; earlier versions saved none."""
        best = cls()
        for name, value in ((state or {}).get("best") or {}).items():
            setattr(best, name, value)
        best.weights = {name: tensor.cpu() for name, tensor in best.weights.items()}
        return best

    def to_state(self) -> dict[str, Any]:
        """Return everything that `load` needs."""
        return dict(vars(self))

    def update(self, score: float, snapshot: Snapshot) -> None:
        """Take the weights of a snapshot unless the score is lower. Of equal ones the later wins,
        but only a higher score counts as an improvement."""
        self.since = 0 if score > self.score else self.since + 1
        if score >= self.score:
            self.score, self.step = score, snapshot.step
            weights = snapshot.predictor.network.state_dict()
            self.weights = {name: each.detach().cpu().clone() for name, each in weights.items()}


def rate_scores(scores: Mapping[str, Any]) -> float:
    """Reduce the scores of a validation to the one by which weights are chosen.

    It is the mIoU of several classes, the Dice of a binary model, and the mean of Dice and F1 of
    the objects where they are separated. Each of several sources counts the same.
    """
    if "by_source" in scores:
        return float(np.mean([rate_scores(each) for each in scores["by_source"].values()]))
    if "miou" in scores:
        return float(scores["miou"])
    if "f1_50" in scores:
        return float(scores["dice"] + scores["f1_50"]) / 2
    return float(scores["dice"])


@dataclasses.dataclass(frozen=True)
class RunLength:
    """How long to train: up to `steps`, or `seconds` of training, whichever comes first.

    Seconds count over all starts of a run, but only steps: no reading, validation or report. Both
    may be infinite.
    """

    steps: float
    seconds: float

    @classmethod
    def of(cls, optim: OptimConfig, images: int) -> Self:
        """Compute the length that a recipe asks for, with `images` training images."""
        steps = optim.steps or math.ceil(optim.epochs * images / optim.batch_size)
        return cls(steps or math.inf, 60 * optim.minutes or math.inf)

    def seconds_share(self, trainer: Trainer) -> float:
        """Return the fraction of the time limit that has passed; 0 without one."""
        return trainer.seconds / self.seconds

    def progress(self, trainer: Trainer) -> float:
        """Return the fraction of the training that is done; 1 or more at the end."""
        return max(trainer.steps_done / self.steps, trainer.seconds / self.seconds)

    def describe_steps(self, trainer: Trainer) -> str:
        """Say how many steps are done, and of how many."""
        if math.isinf(self.steps):
            return f"{trainer.steps_done}"
        return f"{trainer.steps_done} of {int(self.steps)}"

    def seconds_left(self, trainer: Trainer, pace: float) -> float:
        """Estimate the remaining seconds of training at `pace` seconds per step."""
        steps = self.steps - trainer.steps_done
        return max(0.0, min(steps * pace, self.seconds - trainer.seconds))


class _ProgressBar:
    """A progress bar on a terminal, lines without one, and the running means that they show.

    Attributes:
        loss: running mean of the loss.
        speed: images per second in the last steps.
    """

    def __init__(self, trainer: Trainer, length: RunLength) -> None:
        self.trainer = trainer
        self.length = length
        self.loss = math.nan
        self.speed = math.nan
        self._pace = math.nan
        self._clock = LineClock()
        self._bar = tqdm(
            total=None if math.isinf(length.steps) else length.steps,
            initial=trainer.steps_done,
            unit="step",
            dynamic_ncols=True,
            disable=not has_terminal(),
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}, {rate_fmt}{postfix}]",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, losses: Sequence[float], images: int, seconds: float) -> None:
        """Show steps that are done.

        Args:
            losses: of these steps.
            images: in all of them.
            seconds: that they took together.
        """
        for loss in losses:
            self.loss = _smooth(self.loss, loss)
            self._pace = _smooth(self._pace, seconds / len(losses))
        self.speed = images / seconds
        left = tqdm.format_interval(self.length.seconds_left(self.trainer, self._pace))
        self._bar.update(len(losses))
        text = (
            f"loss {self.loss:.3f}, lr {self.trainer.learning_rate:.1e}, "
            f"{self.speed:.1f} images/s, {left} left"
        )
        self._bar.set_postfix_str(text)
        steps = self.length.describe_steps(self.trainer)
        self._clock.print(lambda: f"step {steps}: {text}")

    def show_scores(self, step: int, scores: dict[str, Any]) -> None:
        """Print a validation's scores above the bar."""
        self._bar.write(f"step {step}: validation {describe_scores(scores)}")
        sys.stdout.flush()


def describe_scores(scores: Mapping[str, Any]) -> str:
    """Name the most important scores of a validation."""
    if "miou" in scores:
        return f"mIoU {scores['miou']:.4f}, Dice {scores['dice']:.4f}"
    objects = f", F1 of objects {scores['f1_50']:.4f}" if "f1_50" in scores else ""
    sources = "".join(
        f", {name} {each['dice']:.4f}" for name, each in scores.get("by_source", {}).items()
    )
    return f"Dice {scores['dice']:.4f}, IoU {scores['iou']:.4f}{objects}{sources}"


def _smooth(mean: float, value: float) -> float:
    """Update a running mean, which is NaN before the first value."""
    return value if math.isnan(mean) else _SMOOTHING * mean + (1 - _SMOOTHING) * value


def _train_loop(
    trainer: Trainer,
    crops: CropDataset,
    validation: PairedDataset,
    run: RunFolder,
    best: BestWeights,
    interrupted: threading.Event,
) -> str:
    """Train until the end of the recipe's steps or minutes, or until `interrupted`.

    Returns:
        Why it ended early, or "".
    """
    recipe = trainer.recipe
    length = RunLength.of(recipe.optim, len(crops.samples))
    schedule = ValidationSchedule(recipe, length, length.progress(trainer))
    ending = ""
    preview_every = _preview_interval(recipe, len(crops.samples))
    log_every = max(_LOG_EVERY, trainer.read_every)
    images = recipe.optim.batch_size
    unread: list[Sequence[int]] = []
    counted = trainer.seconds  # by the progress bar
    clock = time.monotonic()
    with (
        _ProgressBar(trainer, length) as bar,
        _Validator(trainer.device, recipe, validation, run, bar, best) as validator,
    ):
        for pixels, labels, weights, indices in load_batches(trainer, crops, length):
            progress = length.progress(trainer)
            if progress >= 1:
                break
            if interrupted.is_set():
                ending = "stopped by Ctrl-C; the same command resumes it"
                break
            if progress >= 0.5 and 0 < recipe.optim.stop_after <= best.since:
                ending = f"stopped after {best.since} validations without a better score"
                break
            unseparated = crops.find_unseparated(indices)
            trainer.step(pixels, labels, weights, progress, unseparated)
            step = trainer.steps_done
            unread.append(indices)
            validates = schedule.is_due(step, length.seconds_share(trainer))
            losses = []
            if validates or len(unread) >= trainer.read_every:
                losses = _read_steps(trainer, crops, unread)
            trainer.seconds += time.monotonic() - clock
            if losses:
                bar.update(losses, images * len(losses), trainer.seconds - counted)
                counted = trainer.seconds
            if step % log_every == 0:
                _log_step(trainer, run, bar)
            if preview_every and step % preview_every == 0:
                sample = validation[step // preview_every % len(validation)]
                picture = _draw_sample(trainer.predictor, sample)
                run.save_image(f"pictures/{step:07d}.png", picture)
            if validates:
                validator.validate(trainer)
            clock = time.monotonic()  # logging and validation are not training time
        if unread:
            _read_steps(trainer, crops, unread)
            trainer.seconds += time.monotonic() - clock
    return ending


class ValidationSchedule:
    """Says after which steps to validate.

    These are the multiples of the recipe's interval: by default a tenth of the steps, at most 400.
    A run with a time limit is also validated at every tenth of it.

    Args:
        progress: of the run so far, 0..1.
    """

    def __init__(self, recipe: Recipe, length: RunLength, progress: float) -> None:
        tenth = _MOST_STEPS if math.isinf(length.steps) else int(length.steps) // _VALIDATIONS
        self.every = recipe.run.validate_every or max(1, min(_MOST_STEPS, tenth))
        self._passed = int(progress * _VALIDATIONS)

    def is_due(self, step: int, share: float) -> bool:
        """Whether to validate after `step` steps and this share of the time limit."""
        passed = int(share * _VALIDATIONS)
        due = step % self.every == 0 or passed > self._passed
        self._passed = max(self._passed, passed)
        return due


def _preview_interval(recipe: Recipe, images: int) -> int:
    """Return the number of steps between previews, or 0 for none."""
    previews = recipe.run.previews_per_epoch
    steps_per_epoch = max(1, images // recipe.optim.batch_size)
    return max(1, steps_per_epoch // previews) if previews else 0


def load_batches(trainer: Trainer, crops: CropDataset, length: RunLength) -> Iterator[Batch]:
    """Yield batches of crops in order, from the step at which the run stands.

    Raises:
        DataError: an image or a mask is invalid; see `PairedDataset`.
        TrainingOutOfMemory: the recipe demands the images on the device, and they do not fit.
    """
    size = trainer.recipe.optim.batch_size
    end = _ENDLESS if math.isinf(length.steps) else int(length.steps)
    if device_crops := _move_crops(crops, trainer.device):
        for step in range(trainer.steps_done, end):
            yield device_crops.batch(step * size, size)
        return
    loader = DataLoader(
        crops,
        batch_size=size,
        sampler=range(trainer.steps_done * size, end * size),  # crops are shuffled already
        num_workers=trainer.recipe.run.workers,
        pin_memory=trainer.device.type == "cuda",
        collate_fn=_collate,
        worker_init_fn=_ignore_sigint,
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        pixels, labels, weights, indices = batch
        yield pixels, labels, weights, indices.tolist()


def _move_crops(crops: CropDataset, device: torch.device) -> DeviceCrops | None:
    """Copy the training images to the device, or return None if the host makes the crops.

    Raises:
        DataError: an image or a mask is invalid; see `PairedDataset`.
        TrainingOutOfMemory: the recipe demands it, and the images do not fit.
    """
    place = crops.recipe.run.augment_on
    if place == "host" or (place == "auto" and device.type != "cuda"):
        return None
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    try:
        return DeviceCrops(crops, device, _IMAGE_SHARE * free)
    except ImagesDoNotFit as error:
        if place == "device":
            raise TrainingOutOfMemory(f"{error}; use --augment-on host") from None
        logger.warning("%s: crops are made on the host; give it --workers", error)
        return None


def _collate(batch: Any) -> Any:
    return batch if isinstance(batch, DataError) else default_collate(batch)


def _ignore_sigint(worker: int) -> None:
    """Ignore Ctrl-C in a worker: a terminal sends it to every process, and training handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _read_steps(trainer: Trainer, crops: CropDataset, batches: list[Sequence[int]]) -> list[float]:
    """Return the losses of the last steps, and clear `batches`, which has the crops of each.

    Raises:
        TrainingDiverged: a loss or a gradient is not finite; the message names the first such step
            and its images.
    """
    losses = []
    first = trainer.steps_done - len(batches)
    for offset, (indices, (loss, norm)) in enumerate(
        zip(batches, trainer.read_steps(), strict=True)
    ):
        problem = "" if math.isfinite(norm) else f"the gradient's norm is {norm}"
        problem = problem if math.isfinite(loss) else f"the loss is {loss}"
        if problem:
            images = ", ".join(crops.image_id(index) for index in indices)
            raise TrainingDiverged(f"{problem} at step {first + offset}, in the batch of {images}")
        losses.append(loss)
    batches.clear()
    return losses


def _log_step(trainer: Trainer, run: RunFolder, bar: _ProgressBar) -> None:
    run.log_metrics(
        trainer.steps_done,
        {
            "loss": bar.loss,
            "learning_rate": trainer.learning_rate,
            "images_per_second": bar.speed,
            "seconds": trainer.seconds,
        },
    )


class _Validator:
    """Validates the moving average of the weights, and saves the state.

    On a CUDA device this happens on a thread and a stream of its own while training continues.
    Otherwise both would compete for the same CPU.

    Args:
        device: that trains.
        validation: its images.
        run, bar: for the scores.
        best: updated by each validation.
    """

    def __init__(
        self,
        device: torch.device,
        recipe: Recipe,
        validation: PairedDataset,
        run: RunFolder,
        bar: _ProgressBar,
        best: BestWeights,
    ) -> None:
        self.best = best
        self.device = device
        self.recipe = recipe
        self.validation = validation
        self.run = run
        self.bar = bar
        self._pending: Future[None] | None = None
        self._thread = None
        if device.type in VALIDATE_BESIDE:
            self._thread = ThreadPoolExecutor(1, "validation")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for the last validation. Its error is raised unless the block raised one."""
        if self._thread is not None:
            self._thread.shutdown()
        if kind is None:
            self._wait()

    def validate(self, trainer: Trainer) -> None:
        """Measure the trainer's present weights; save scores, state and images.

        Raises:
            TrainingDiverged: a weight is not finite, now or in the validation before.
            WriteError: the run's folder cannot be written.
        """
        self._wait()
        if self._thread is None:
            self._validate(trainer.snapshot())
            return
        snapshot = trainer.snapshot(copied=True)
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.current_stream(self.device).record_event()
        self._pending = self._thread.submit(self._validate_beside, snapshot, ready)

    def _wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _validate_beside(self, snapshot: Snapshot, ready: torch.cuda.Event | None) -> None:
        if ready is None:
            self._validate(snapshot)
            return
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            stream.wait_event(ready)
            with torch.cuda.stream(stream):
                self._validate(snapshot)

    def _validate(self, snapshot: Snapshot) -> None:
        snapshot.export_weights()  # weights that are not finite are neither measured nor saved
        samples = self.validation.spread(self.recipe.run.validate_images)
        scores = _measure(snapshot.predictor, self.recipe, samples).summary()
        self.best.update(rate_scores(scores), snapshot)
        self.run.log_metrics(snapshot.step, {**scores, "seconds": snapshot.seconds})
        self.bar.show_scores(snapshot.step, scores)
        # before the images, which take as long as the validation
        self.run.save_state({**snapshot.state, "best": self.best.to_state()})
        samples_picture = _draw_samples(snapshot.predictor, self.validation)
        self.run.save_image("samples.png", samples_picture, snapshot.step)
        self.run.save_curves()


def _save_state(snapshot: Snapshot, run: RunFolder, best: BestWeights) -> None:
    """Save a state whose weights are finite.

    Raises:
        TrainingDiverged: they are not.
    """
    snapshot.export_weights()
    run.save_state({**snapshot.state, "best": best.to_state()})


def _measure(predictor: Predictor, recipe: Recipe, samples: PairedDataset) -> Report:
    """Evaluate a predictor."""
    instances = recipe.data.has_instances
    predict = from_probabilities(predictor, recipe.preprocess, instances=instances)
    return evaluate(
        predict,
        samples,
        classes=recipe.preprocess.classes,
        instances=instances,
        progress=lambda images: track(images, len(samples), "validating"),
    )


def _draw_sample(predictor: Predictor, sample: Sample) -> Image.Image:
    preprocess = predictor.preprocess
    mask = to_mask(predictor(sample.image), preprocess)
    return draw_comparison(sample.image, sample.labels, mask, preprocess.palette)


def _draw_samples(predictor: Predictor, validation: PairedDataset) -> Image.Image:
    """Draw predictions on validation images, evenly spread over the data set."""
    indices = range(0, len(validation), max(1, len(validation) // _SAMPLE_COUNT))[:_SAMPLE_COUNT]
    samples = (validation[index] for index in indices)
    entries = [(sample.id, _draw_sample(predictor, sample)) for sample in samples]
    preprocess = predictor.preprocess
    if not preprocess.binary:
        entries.append(("classes", draw_legend(preprocess.classes, preprocess.palette)))
    return make_contact_sheet(entries)


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """Which weights are shipped, and why.

    Attributes:
        step: of the shipped weights.
        report: of them on all validation images.
        scores: by step, of the last weights and, if they are others, of the best ones.
    """

    step: int
    report: Report
    scores: dict[int, dict[str, Any]]


def _choose_weights(
    trainer: Trainer, validation: PairedDataset, best: BestWeights
) -> tuple[Predictor, _Outcome]:
    """Measure the last weights and the best ones on all validation images; choose the better."""
    recipe, last = trainer.recipe, trainer.predictor
    report = _measure(last, recipe, validation)
    scores = {trainer.steps_done: report.summary()}
    if not best.weights or best.step == trainer.steps_done:
        return last, _Outcome(trainer.steps_done, report, scores)
    network = UNet.from_config(recipe.network)
    network.load_state_dict(best.weights)
    network = network.to(device=trainer.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    earlier = Predictor(network, recipe.preprocess)
    earlier_report = _measure(earlier, recipe, validation)
    scores[best.step] = earlier_report.summary()
    if rate_scores(scores[best.step]) > rate_scores(scores[trainer.steps_done]):
        return earlier, _Outcome(best.step, earlier_report, scores)
    return last, _Outcome(trainer.steps_done, report, scores)


def _summarize(
    trainer: Trainer, length: RunLength, ending: str, outcome: _Outcome, run: RunFolder
) -> list[str]:
    """Describe the result of a run in a few lines."""
    time_taken = tqdm.format_interval(trainer.seconds)
    first = f"trained    {length.describe_steps(trainer)} steps in {time_taken}"
    lines = ["", f"{first}, {ending}" if ending else first]
    for step in sorted(outcome.scores):
        name = "last" if step == trainer.steps_done else "best"
        shipped = "  <- in the checkpoint" if step == outcome.step else ""
        scores = describe_scores(outcome.scores[step])
        lines.append(f"{name}       step {step}: validation {scores}{shipped}")
    if not trainer.recipe.preprocess.binary:
        lines += ["", *format_classes(outcome.report.summary()["by_class"]), ""]
    lines.append(f"pictures   {run.path}/samples.png, {run.path}/curves.png")
    lines.append(
        f"serve      UNET_WEIGHTS_DIR={shlex.quote(str(run.path))} "
        f"UNET_MODEL={shlex.quote(trainer.recipe.name)} unet serve"
    )
    return lines


def _build_report(
    trainer: Trainer,
    predictor: Predictor,
    outcome: _Outcome,
    training: PairedDataset,
    validation: PairedDataset,
    command: str,
) -> dict[str, Any]:
    """Collect scores of validation images and of as many training images.

    Their gap shows over-fitting.
    """
    recipe = trainer.recipe
    trained_on = training.spread(len(validation))
    return {
        "validation": outcome.report.summary(),
        "training": _measure(predictor, recipe, trained_on).summary(),
        "images": {"training": len(training), "validation": len(validation)},
        "steps": trainer.steps_done,
        "shipped_step": outcome.step,
        "validation_by_step": {str(step): scores for step, scores in outcome.scores.items()},
        "hours": round(trainer.seconds / 3600, 3),
        "hardware": _describe_hardware(trainer.device),
        "command": command,
        "revision": git_revision(),
        "torch": torch.__version__,
        "recipe": recipe.to_json(),
    }


def _export_checkpoint(
    trainer: Trainer, predictor: Predictor, golden: AnyArray, run: RunFolder, report: dict[str, Any]
) -> Path:
    """Write the checkpoint and its entry in the manifest; return its path.

    Args:
        predictor: has the weights.
        golden: image of the golden pair.
        report: of `_build_report`; the card contains parts of it.
    """
    recipe = trainer.recipe
    card = {
        "metrics": report["validation"],
        "training_metrics": report["training"],
        "data": recipe.data.source,
        "licence": recipe.data.licence,
        "training": {
            key: report[key]
            for key in (
                "command",
                "images",
                "steps",
                "shipped_step",
                "hours",
                "hardware",
                "torch",
                "revision",
            )
        },
    }
    path = run.path / f"{recipe.name}.safetensors"
    weights = Snapshot(predictor, {"step": report["shipped_step"]}).export_weights()
    draft = Checkpoint(recipe.name, recipe.network, recipe.preprocess, weights, card=card)
    checkpoint = attach_golden(draft, golden)
    with report_write_errors(run.path):
        save_checkpoint(path, checkpoint)
        update_manifest(path)
    return path


def _describe_hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
