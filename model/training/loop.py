"""Train a network: pairs of images and masks in, a self-describing checkpoint out.

A run has a folder and may be killed at any moment. The same command resumes it from the last saved
state and draws the same crops. Knows the order of the work; `model.training.trainer` knows a step,
and `model.training.run_folder` the files.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from model.cuda import choose_device
from model.errors import TrainingDiverged, TrainingOutOfMemory, first_line
from model.training.bar import ProgressBar
from model.training.batches import load_batches
from model.training.best import BestWeights
from model.training.crops import CropDataset
from model.training.data import PairedDataset, open_dataset
from model.training.images import read_image
from model.training.length import RunLength, ValidationSchedule, choose_preview_interval
from model.training.progress import track
from model.training.recipe import Recipe
from model.training.result import build_report, choose_weights, export_checkpoint, summarize
from model.training.run_folder import RunFolder, open_run
from model.training.split import split_dataset
from model.training.survey import check_masks
from model.training.trainer import Trainer
from model.training.validation import Validator, draw_sample, draw_samples, save_state

logger = logging.getLogger(__name__)

_LOG_EVERY = 20
"""Steps between two records of the training loss."""


def train(recipe: Recipe, folder: Path, command: str = "", recipe_text: str = "") -> Path:
    """Train a network, or resume the run in `folder`.

    After Ctrl-C the current step is finished, and the run ends as if it were complete.

    Args:
        command: recorded in the run's folder and in the checkpoint.
        recipe_text: written to the run's folder as recipe.toml.

    Returns:
        The checkpoint, `folder`/NAME.safetensors: the moving average of the weights at the step
        that validated best, a golden pair, and a card with the scores on training and validation
        images. Initial weights that no step improves are shipped as they were.

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
            save_state(trainer.snapshot(), run, best)
        final, outcome = choose_weights(trainer, validation, best)
        report = build_report(trainer, final, outcome, training, validation, command)
        run.save_report(report)
        run.save_curves(trainer.steps_done)
        run.save_image("samples.png", draw_samples(final, validation), outcome.step)
        if not recipe.preprocess.binary:
            run.save_confusion(outcome.report.confusion, recipe.preprocess.classes, outcome.step)
        run.log_hyperparameters(recipe, report["validation"], outcome.step)
        path = export_checkpoint(trainer, final, golden, run, report)
        print("\n".join(summarize(trainer, length, ending, outcome, run)), flush=True)
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
        reason = first_line(error) if str(error) else "out of memory"
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
    preview_every = choose_preview_interval(recipe, len(crops.samples))
    log_every = max(_LOG_EVERY, trainer.read_every)
    images = recipe.optim.batch_size
    unread: list[Sequence[int]] = []
    counted = trainer.seconds  # by the progress bar
    clock = time.monotonic()
    with (
        ProgressBar(trainer, length) as bar,
        Validator(trainer.device, recipe, validation, length, run, bar, best) as validator,
    ):
        if trainer.initial is not None and trainer.initial.solve_task:
            validator.validate_start(trainer.initial)
            clock = time.monotonic()
        for pixels, labels, weights, indices in load_batches(trainer, crops, length):
            progress = length.progress(trainer)
            if progress >= 1:
                break
            if interrupted.is_set():
                ending = "stopped by Ctrl-C; the same command resumes it"
                break
            if 0 < recipe.optim.stop_after <= best.since:
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
                picture = draw_sample(trainer.predictor, sample)
                run.save_image(f"pictures/{step:07d}.png", picture)
            if validates:
                validator.validate(trainer)
            clock = time.monotonic()  # logging and validation are not training time
        if unread:
            _read_steps(trainer, crops, unread)
            trainer.seconds += time.monotonic() - clock
    return ending


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


def _log_step(trainer: Trainer, run: RunFolder, bar: ProgressBar) -> None:
    run.log_metrics(
        trainer.steps_done,
        {
            "loss": bar.loss,
            "learning_rate": trainer.learning_rate,
            "images_per_second": bar.speed,
            "seconds": trainer.seconds,
        },
    )
