"""Measure and draw predictions on validation images, during training and after it.

On a CUDA device this happens beside training. Knows no steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from PIL import Image

from model.evaluation.evaluate import Report, Sample, evaluate, from_probabilities
from model.predict import Predictor
from model.training.bar import ProgressBar
from model.training.best import BestWeights, rate_scores
from model.training.data import PairedDataset
from model.training.initial import InitialWeights
from model.training.length import RunLength
from model.training.plots import draw_comparison, draw_legend, make_contact_sheet
from model.training.progress import track
from model.training.recipe import Recipe
from model.training.run_folder import RunFolder
from model.training.trainer import Snapshot, Trainer
from model.transforms import to_mask
from model.unet import UNet

_SAMPLE_COUNT = 6
"""Validation images in samples.png."""
VALIDATE_BESIDE = {"cuda"}
"""Types of devices that validate while training continues."""


class Validator:
    """Validates the moving average of the weights, and saves the state.

    On a CUDA device this happens on a thread and a stream of its own while training continues.
    Otherwise both would compete for the same CPU.

    Args:
        device: that trains.
        validation: its images.
        length: of the run.
        run, bar: for the scores.
        best: updated by each validation.
    """

    def __init__(
        self,
        device: torch.device,
        recipe: Recipe,
        validation: PairedDataset,
        length: RunLength,
        run: RunFolder,
        bar: ProgressBar,
        best: BestWeights,
    ) -> None:
        self.best = best
        self.device = device
        self.recipe = recipe
        self.validation = validation
        self.length = length
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

    def validate_start(self, initial: InitialWeights) -> None:
        """Measure the weights that the run starts from, before its first step.

        Raises:
            WriteError: the run's folder cannot be written.
        """
        predictor = load_predictor(initial.weights, self.recipe, self.device)
        samples = self.validation.spread(self.recipe.run.validate_images)
        scores = measure(predictor, self.recipe, samples).summary()
        self.best.take_start(rate_scores(scores), initial)
        self.run.log_metrics(0, {**scores, "seconds": 0.0})
        self.bar.show_scores(0, scores, f", the start, {initial.checkpoint}")

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
        scores = measure(snapshot.predictor, self.recipe, samples).summary()
        is_late = self.length.progress_at(snapshot.step, snapshot.seconds) > 0.5
        score = rate_scores(scores)
        self.best.update(score, snapshot, is_late)
        self.run.log_metrics(snapshot.step, {**scores, "seconds": snapshot.seconds})
        note = "; the start is better" if score < self.best.start_score else ""
        self.bar.show_scores(snapshot.step, scores, note)
        # before the images, which take as long as the validation
        self.run.save_state({**snapshot.state, "best": self.best.to_state()})
        samples_picture = draw_samples(snapshot.predictor, self.validation)
        self.run.save_image("samples.png", samples_picture, snapshot.step)
        self.run.save_curves()


def save_state(snapshot: Snapshot, run: RunFolder, best: BestWeights) -> None:
    """Save a state whose weights are finite.

    Raises:
        TrainingDiverged: they are not.
    """
    snapshot.export_weights()
    run.save_state({**snapshot.state, "best": best.to_state()})


def load_predictor(
    weights: Mapping[str, torch.Tensor], recipe: Recipe, device: torch.device
) -> Predictor:
    """Make a predictor of weights without batch normalization."""
    network = UNet.from_config(recipe.network)
    network.load_state_dict(weights)
    network = network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Predictor(network, recipe.preprocess)


def measure(predictor: Predictor, recipe: Recipe, samples: PairedDataset) -> Report:
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


def draw_sample(predictor: Predictor, sample: Sample) -> Image.Image:
    preprocess = predictor.preprocess
    mask = to_mask(predictor(sample.image), preprocess)
    return draw_comparison(sample.image, sample.labels, mask, preprocess.palette)


def draw_samples(predictor: Predictor, validation: PairedDataset) -> Image.Image:
    """Draw predictions on validation images, evenly spread over the data set."""
    indices = range(0, len(validation), max(1, len(validation) // _SAMPLE_COUNT))[:_SAMPLE_COUNT]
    samples = (validation[index] for index in indices)
    entries = [(sample.id, draw_sample(predictor, sample)) for sample in samples]
    preprocess = predictor.preprocess
    if not preprocess.binary:
        entries.append(("classes", draw_legend(preprocess.classes, preprocess.palette)))
    return make_contact_sheet(entries)
