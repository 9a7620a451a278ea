"""Training images as an endless, reproducible sequence of crops.

The crop at an index depends on the recipe's seed and the index alone, so a resumed run draws the
crops that an uninterrupted run would have drawn. Knows how pairs become crops; no weights, no
steps, no run folders.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from model.arrays import ByteArray, Int32Array
from model.errors import ConfigError, DataError
from model.training.augment import augment
from model.training.data import PairedDataset
from model.training.losses import border_weights
from model.training.progress import track
from model.training.recipe import Recipe
from model.training.sections import ImagesConfig
from model.training.tables import read_scores
from model.transforms import prepare
from model.windows import WindowPlan, plan_windows

_MIN_DIFFICULTY = 0.02
"""Least 1 - Dice that `data.difficulty_report` assumes, so that perfect images are still drawn."""
_FOREGROUND_IMAGES = 100
"""Images over which `CropDataset.foreground_fraction` averages."""

Crop = tuple[Tensor, Tensor, Tensor, int]
"""An item of `CropDataset`."""


class CropDataset(Dataset[Crop]):
    """An endless sequence of crops, in which the crop at an index is always the same.

    Each epoch draws every image once, or as often as `data.balance` and `data.difficulty_report`
    demand.

    Items: pixels (h, w, C) uint8, labels (h, w) int32, weights (h, w) float32 of the paper's
    equation 1, and the index itself.

    Args:
        samples: the training images.
        recipe: sections data, preprocess, augment, loss, network and the seed.

    Raises:
        ConfigError: the recipe asks for whole images, and they do not fit into one window.
        DataError: the difficulty report is invalid (see `read_scores`), or lacks an image.
    """

    def __init__(self, samples: PairedDataset, recipe: Recipe) -> None:
        self.samples = samples
        self.recipe = recipe
        self._cache: dict[int, tuple[ByteArray, Int32Array]] = {}
        self._epoch = -1
        self._epoch_order = np.empty(0, np.intp)
        self._plan = None if recipe.augment.crop else _plan_whole_image(recipe)
        self._probabilities = _sampling_probabilities(samples, recipe)

    @property
    def whole_images(self) -> bool:
        """Whether a crop is a whole image, not varied."""
        return self._plan is not None

    @property
    def has_border_weights(self) -> bool:
        """Whether pixels between objects weigh more (paper, equation 2)."""
        return self.recipe.data.has_instances and self.recipe.loss.border_weight > 0

    def find_unseparated(self, indices: Sequence[int]) -> list[bool] | None:
        """Say which crops come from masks that do not separate objects, or None if none does.

        Only the masks of some sources have one value per object.
        """
        found = [not self.samples.has_objects(self.image_index(index)) for index in indices]
        return found if self.recipe.data.has_instances and any(found) else None

    def preload(self) -> None:
        """Prepare images on all cores until the cache is full. Workers that are forked later share
        them.

        Raises:
            DataError: an image or a mask is invalid; see `PairedDataset`.
        """
        free = self.recipe.run.cache_mb * 1_000_000
        count = len(self.samples)
        pool = ThreadPoolExecutor(os.cpu_count(), "reading")
        try:
            pairs = track(pool.map(self._prepare_pair, range(count)), count, "reading")
            for image_index, pair in enumerate(pairs):
                free -= pair[0].nbytes + pair[1].nbytes
                if free < 0:
                    break
                self._cache[image_index] = pair
        finally:
            pool.shutdown(cancel_futures=True)

    def foreground_fraction(self) -> float:
        """Return the fraction of pixels that are foreground, over up to 100 images.

        Limited to 0.01..0.99.
        """
        count = min(_FOREGROUND_IMAGES, len(self.samples))
        fractions = [(self.prepared_pair(index)[1] > 0).mean() for index in range(count)]
        return float(np.clip(np.mean(fractions), 0.01, 0.99))

    def first_crops(self, count: int) -> Tensor:
        """Return the pixels of the first crops, (count, h, w, C) uint8."""
        return torch.stack([self[index][0] for index in range(count)])

    def image_index(self, index: int) -> int:
        """Return the index in `samples` of the image from which the crop at `index` is taken."""
        epoch, position = divmod(index, len(self.samples))
        if self._epoch != epoch:
            self._epoch, self._epoch_order = epoch, self._draw_order(epoch)
        return int(self._epoch_order[position])

    def prepared_pair(self, image_index: int) -> tuple[ByteArray, Int32Array]:
        """Return an image of `samples`, prepared, (H, W, C) uint8, and its labels (H, W).

        Raises:
            DataError: an image or a mask is invalid; see `PairedDataset`.
        """
        return self._cache.get(image_index) or self._prepare_pair(image_index)

    def image_id(self, index: int) -> str:
        """Return the id of the image from which the crop at `index` is taken."""
        return self.samples.ids[self.image_index(index)]

    def __getitem__(self, index: int) -> Crop:
        recipe = self.recipe
        image, labels = self.prepared_pair(self.image_index(index))
        if self._plan is None:
            rng = np.random.default_rng((recipe.optim.seed, index))
            image, labels = augment(image, labels, recipe.augment, rng)
        if self.has_border_weights:
            loss = recipe.loss
            weights = border_weights(labels, loss.border_weight, loss.border_sigma)
        else:
            weights = np.ones(labels.shape, np.float32)
        return (
            torch.from_numpy(np.ascontiguousarray(image)),
            torch.from_numpy(np.ascontiguousarray(labels)),
            torch.from_numpy(weights),
            index,
        )

    def __getitems__(self, indices: list[int]) -> list[Crop] | DataError:
        """Return a batch for a `DataLoader`; a `DataError` is returned, not raised.

        The loader would replace the message of an exception that a worker process raises with the
        worker's traceback.
        """
        try:
            return [self[index] for index in indices]
        except DataError as error:
            return error

    def _draw_order(self, epoch: int) -> npt.NDArray[np.intp]:
        """Draw the image indices of an epoch by systematic sampling, then shuffle them.

        Systematic sampling starts at one random offset and takes equal steps along the cumulated
        probabilities. With equal probabilities it draws every image exactly once.
        """
        count = len(self._probabilities)
        rng = np.random.default_rng((self.recipe.optim.seed, epoch, 1))
        steps = (np.arange(count) + rng.random()) / count
        drawn = np.searchsorted(np.cumsum(self._probabilities), steps)
        return rng.permutation(np.minimum(drawn, count - 1))

    def _prepare_pair(self, image_index: int) -> tuple[ByteArray, Int32Array]:
        sample, preprocess = self.samples[image_index], self.recipe.preprocess
        image = prepare(sample.image, preprocess)
        labels = _resize_labels(sample.labels, *image.shape[:2])
        if self._plan is not None:
            image, labels = _pad_to_window(image, labels, self._plan)
        # writable copies where needed: torch warns about the read-only arrays that Pillow returns
        return np.require(image, requirements=("C", "W")), np.require(
            labels, requirements=("C", "W")
        )


def _sampling_probabilities(samples: PairedDataset, recipe: Recipe) -> npt.NDArray[np.float64]:
    """Compute the probability of drawing each image; they sum to 1."""
    if not recipe.data.sources:
        return _weigh_images(samples, recipe.data)
    probabilities = np.zeros(len(samples))
    names = np.array([pair.source for pair in samples.pairs])
    total = sum(source.share for source in recipe.data.sources)
    for source in recipe.data.sources:
        here = names == source.name
        share = source.share / total if total else here.mean()
        probabilities[here] = share * _weigh_images(samples.select_source(source.name), source)
    return probabilities


def _weigh_images(samples: PairedDataset, config: ImagesConfig) -> npt.NDArray[np.float64]:
    """Compute the probability of drawing each image of a source; they sum to 1."""
    groups = Counter(pair.group for pair in samples.pairs)
    weights = np.array([groups[pair.group] ** -config.balance for pair in samples.pairs])
    if config.difficulty_report:
        scores = read_scores(Path(config.difficulty_report))
        unscored = [id for id in samples.ids if id not in scores]
        if unscored:
            raise DataError(
                f"{config.difficulty_report} has no score for {unscored[0]} "
                f"({len(unscored)} of {len(samples)} images have none)"
            )
        weights *= [max(1 - scores[id], _MIN_DIFFICULTY) for id in samples.ids]
    probabilities: npt.NDArray[np.float64] = weights / weights.sum()
    return probabilities


def _resize_labels(labels: Int32Array, height: int, width: int) -> Int32Array:
    """Resize labels (H, W) by nearest-neighbour interpolation, which creates no new labels."""
    if labels.shape == (height, width):
        return labels
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    resized: Int32Array = labels[rows[:, None], columns]
    return resized


def _plan_whole_image(recipe: Recipe) -> WindowPlan:
    """Plan the single window of an image in mode "resize", as the service does.

    Raises:
        ConfigError: the image needs several windows.
    """
    network, preprocess = recipe.network, recipe.preprocess
    height, width = preprocess.resized
    plan = plan_windows(height, width, network, preprocess)
    if plan.count != 1:
        window = preprocess.window[0]
        inner = [side - 2 * network.margin for side in window]
        raise ConfigError(
            f"crop [] (whole images) needs a size of at most {inner[0]}x{inner[1]}, not "
            f"{height}x{width}: an unpadded network computes only that much of its window "
            f"{window[0]}x{window[1]}"
        )
    return plan


def _pad_to_window(
    image: ByteArray, labels: Int32Array, plan: WindowPlan
) -> tuple[ByteArray, Int32Array]:
    """Pad a whole image and its labels to the plan's only window, by reflection.

    Args:
        image: (H, W, C).
        labels: (H, W).
        plan: has one window (h, w), which starts `plan.margin` pixels above and left of the image.

    Returns:
        (h, w, C) and (h, w).
    """
    (window,) = plan.windows
    pixels = np.empty((*window.shape, image.shape[2]), np.uint8)
    plan.cut(image, window, out=pixels)
    padding = [
        (plan.margin, side - plan.margin - length)
        for side, length in zip(window.shape, labels.shape, strict=True)
    ]
    return pixels, np.pad(labels, padding, mode="reflect")
