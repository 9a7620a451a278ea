"""Training images as an endless sequence of crops, the same one at the same place of every run.

Knows how pairs become crops; nothing of the network's weights, of steps or of runs.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from model.arrays import ByteArray, Int32Array
from model.errors import ConfigError, DataError
from model.training.augment import augment
from model.training.data import PairedDataset, read_scores
from model.training.losses import border_weights
from model.training.recipe import Recipe
from model.transforms import prepare
from model.windows import WindowPlan, plan_windows

_LEAST_LEFT = 0.02
"""The least Dice to be gained on an image that `data.difficulty_report` assumes, so that perfect
images are still drawn."""


class Crops(Dataset[tuple[Tensor, Tensor, Tensor, int]]):
    """Crops without end. The item at a place is always the same; each epoch sees every image once,
    or as often as `data.balance` and `data.difficulty_report` say.

    Items: pixels (h, w, C) uint8, labels (h, w) int32, weights (h, w) float32 of the paper's
    eq. 1, and the place itself.

    Raises:
        ConfigError: whole images are wanted, which do not fit into one window.
        DataError: see `read_scores`; or an image without its score.
    """

    def __init__(self, samples: PairedDataset, recipe: Recipe) -> None:
        self.samples = samples
        self.recipe = recipe
        self._kept: dict[int, tuple[ByteArray, Int32Array]] = {}
        self._order: tuple[int, npt.NDArray[np.intp]] = (-1, np.empty(0, np.intp))
        self._whole = None if recipe.augment.crop else _whole(recipe)
        self._shares = _shares(samples, recipe)

    def preload(self, quiet: bool = True) -> None:
        """Prepare images until the cache is full: workers that are forked later share them."""
        room = self.recipe.run.cache_mb * 1_000_000
        indices = tqdm(
            range(len(self.samples)), "reading", unit="image", leave=False, disable=quiet
        )
        for index in indices:
            pair = self._prepared(index)
            room -= pair[0].nbytes + pair[1].nbytes
            if room < 0:
                break
            self._kept[index] = pair

    def foreground(self) -> float:
        """Share of the pixels that are not background, over up to 100 images."""
        shares = [(self._pair(i)[1] > 0).mean() for i in range(min(100, len(self.samples)))]
        return float(np.clip(np.mean(shares), 0.01, 0.99))

    def pixels(self, count: int) -> Tensor:
        """(count, h, w, C) uint8: the first crops."""
        return torch.stack([self[place][0] for place in range(count)])

    def id(self, place: int) -> str:
        return self.samples.ids[self._image(place)]

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor, Tensor, int]:
        recipe = self.recipe
        image, labels = self._pair(self._image(place))
        if self._whole is None:
            rng = np.random.default_rng((recipe.optim.seed, place))
            image, labels = augment(image, labels, recipe.augment, rng)
        if recipe.data.labels == "instances" and recipe.loss.border_weight:
            loss = recipe.loss
            weights = border_weights(labels, loss.border_weight, loss.border_sigma)
        else:
            weights = np.ones(labels.shape, np.float32)
        return (
            torch.from_numpy(np.ascontiguousarray(image)),
            torch.from_numpy(np.ascontiguousarray(labels)),
            torch.from_numpy(weights),
            place,
        )

    def __getitems__(
        self, places: list[int]
    ) -> list[tuple[Tensor, Tensor, Tensor, int]] | DataError:
        """What a DataLoader asks for: the items of a batch, or what is wrong with one.

        An error that is raised in a worker comes out of it under its whole traceback.
        """
        try:
            return [self[place] for place in places]
        except DataError as error:
            return error

    def _image(self, place: int) -> int:
        epoch, position = divmod(place, len(self.samples))
        if self._order[0] != epoch:
            rng = np.random.default_rng((self.recipe.optim.seed, epoch, 1))
            # Systematic sampling: one random offset, then equal steps along the summed shares.
            steps = (np.arange(len(self._shares)) + rng.random()) / len(self._shares)
            drawn = np.searchsorted(np.cumsum(self._shares), steps)
            self._order = (epoch, rng.permutation(np.minimum(drawn, len(self._shares) - 1)))
        return int(self._order[1][position])

    def _pair(self, index: int) -> tuple[ByteArray, Int32Array]:
        return self._kept.get(index) or self._prepared(index)

    def _prepared(self, index: int) -> tuple[ByteArray, Int32Array]:
        sample, preprocess = self.samples[index], self.recipe.preprocess
        image = prepare(sample.image, preprocess)
        labels = _nearest(sample.labels, *image.shape[:2])
        if self._whole is not None:
            image, labels = _padded(image, labels, self._whole)
        # torch warns of arrays that Pillow handed out read-only
        return np.require(image, requirements=("C", "W")), np.require(
            labels, requirements=("C", "W")
        )


def _shares(samples: PairedDataset, recipe: Recipe) -> npt.NDArray[np.float64]:
    """How often each image is drawn, of all draws."""
    groups = Counter(pair.group for pair in samples.pairs)
    weights = np.array([groups[pair.group] ** -recipe.data.balance for pair in samples.pairs])
    if recipe.data.difficulty_report:
        scores = read_scores(Path(recipe.data.difficulty_report))
        if unscored := [id for id in samples.ids if id not in scores]:
            raise DataError(
                f"{recipe.data.difficulty_report} has no score of {unscored[0]} "
                f"({len(unscored)} of {len(samples)} have none)"
            )
        weights *= [max(1 - scores[id], _LEAST_LEFT) for id in samples.ids]
    shares: npt.NDArray[np.float64] = weights / weights.sum()
    return shares


def _nearest(labels: Int32Array, height: int, width: int) -> Int32Array:
    """Labels at another size; each pixel is one that was there, so that labels stay labels."""
    if labels.shape == (height, width):
        return labels
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(int)
    resized: Int32Array = labels[rows[:, None], columns]
    return resized


def _whole(recipe: Recipe) -> WindowPlan:
    """The one window that every image becomes in mode "resize", as the service plans it."""
    network, preprocess = recipe.network, recipe.preprocess
    height, width = preprocess.resized
    plan = plan_windows(height, width, network, preprocess)
    if plan.count != 1:
        window = preprocess.window[0]
        inner = [side - 2 * network.margin for side in window]
        raise ConfigError(
            f"crop [] (whole images) needs a size of {inner[0]}x{inner[1]} at most, not "
            f"{height}x{width}: so much of its window {window[0]}x{window[1]} does an unpadded "
            "network answer for"
        )
    return plan


def _padded(image: ByteArray, labels: Int32Array, plan: WindowPlan) -> tuple[ByteArray, Int32Array]:
    """The whole image as the service's own plan cuts it, and its labels the same way.

    Args:
        image, labels: (H, W, C) and (H, W).
        plan: of one window (h, w), which begins `plan.margin` above and left of the image.

    Returns:
        (h, w, C) and (h, w), both reflected beyond the image.
    """
    (window,) = plan.windows
    pixels = np.empty((*window.shape, image.shape[2]), np.uint8)
    plan.cut(image, window, out=pixels)
    padding = [
        (plan.margin, side - plan.margin - length)
        for side, length in zip(window.shape, labels.shape, strict=True)
    ]
    return pixels, np.pad(labels, padding, mode="reflect")
