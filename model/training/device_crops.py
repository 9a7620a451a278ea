"""Batches of crops, made on the device that holds all training images.

A host that makes crops one at a time cannot keep a fast device busy. Here the host draws only the
random numbers, the same ones for the same index as `model.training.crops`, and the device gathers,
interpolates and varies the pixels of a whole batch. The noise comes from the device's own
generator; everything else equals the crops of the host but for rounding. Nothing here waits for the
device.

Knows tensors; no network, no files.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from model.arrays import AnyArray, FloatArray, Int32Array
from model.training.augment import DARKEST, Intensities, Placement, draw_crop
from model.training.crops import CropDataset
from model.training.losses import MAX_BATCH_LABEL, batch_border_weights

Batch = tuple[Tensor, Tensor, Tensor, Sequence[int]]
"""Pixels (N, h, w, C) uint8, labels (N, h, w) integers, weights (N, h, w) float32, and the index of
each crop."""


class ImagesDoNotFit(Exception):
    """The training images cannot be held on a device."""


class DeviceCrops:
    """All training images of a `CropDataset` on a device, and batches of crops of them.

    Args:
        crops: says which image each index takes; its images are prepared once.
        device: to hold the images.
        most_bytes: that the images may take on the device.

    Raises:
        DataError: an image or a mask is invalid; see `PairedDataset`.
        ImagesDoNotFit: the images take more than `most_bytes`.
    """

    def __init__(self, crops: CropDataset, device: torch.device, most_bytes: float) -> None:
        self.crops = crops
        self.device = device
        self._sizes: list[tuple[int, int]] = []
        pixels, labels = [], []
        for index in range(len(crops.samples)):
            image, image_labels = crops.prepared_pair(index)
            most_bytes -= image.nbytes + 2 * image_labels.size
            if most_bytes < 0:
                raise ImagesDoNotFit("the training images take too much memory")
            height, width, channels = image.shape
            self._sizes.append((height, width))
            pixels.append(torch.from_numpy(image).view(-1, channels).to(device))
            labels.append(torch.from_numpy(_shrink_labels(image_labels)).view(-1).to(device))
        self._pixels, self._labels = torch.cat(pixels), torch.cat(labels)
        areas = [height * width for height, width in self._sizes]
        self._starts = np.concatenate([[0], np.cumsum(areas)])[:-1]

    def batch(self, first: int, count: int) -> Batch:
        """Make the crops with the indices `first` to `first + count - 1`."""
        indices = range(first, first + count)
        images = [self.crops.image_index(index) for index in indices]
        if self.crops.whole_images:
            pixels, labels = self._copy_whole(images)
        else:
            pixels, labels = self._cut(indices, images)
        loss = self.crops.recipe.loss
        if self.crops.has_border_weights:
            weights = batch_border_weights(labels, loss.border_weight, loss.border_sigma)
        else:
            weights = torch.ones(labels.shape, device=self.device)
        return pixels, labels, weights, indices

    def _copy_whole(self, images: list[int]) -> tuple[Tensor, Tensor]:
        (size,) = {self._sizes[image] for image in images}
        rows = self._starts[images][:, None] + np.arange(size[0] * size[1])
        index = self._upload(rows)
        return self._pixels[index].view(len(images), *size, -1), self._labels[index].view(-1, *size)

    def _cut(self, indices: Sequence[int], images: list[int]) -> tuple[Tensor, Tensor]:
        recipe = self.crops.recipe
        seed, channels = recipe.optim.seed, self._pixels.shape[1]
        draws = [
            draw_crop(
                self._sizes[image], channels, recipe.augment, np.random.default_rng((seed, index))
            )
            for index, image in zip(indices, images, strict=True)
        ]
        placements, intensities = zip(*draws, strict=True)
        table = [(self._starts[image], *self._sizes[image]) for image in images]
        starts, heights, widths = self._upload(np.array(table, np.int64)).T[:, :, None, None]
        y, x = self._coordinates(placements)
        y, x = _reflect(y, heights.float()), _reflect(x, widths.float())
        values = _interpolate(self._pixels, starts, widths, heights, y, x)
        labels = self._labels[starts + y.round().long() * widths + x.round().long()]
        noise = torch.Generator(self.device).manual_seed(_mix(seed, indices[0]))
        return self._vary(values, intensities, noise), labels

    def _coordinates(self, placements: Sequence[Placement]) -> tuple[Tensor, Tensor]:
        """Compute where the crops' pixels are in their sources: y and x, both (N, h, w)."""
        height, width = crop = self.crops.recipe.augment.crop
        table = self._upload(
            np.array([(p.mirror, p.cos, p.sin, *p.centre) for p in placements], np.float32)
        )
        mirror, cos, sin, centre_x, centre_y = table.T[:, :, None, None]
        y = torch.arange(height, device=self.device)[:, None] - (height - 1) / 2
        x = (torch.arange(width, device=self.device) - (width - 1) / 2) * mirror
        if self.crops.recipe.augment.elastic:
            none = np.zeros((2, 3, 3), np.float32)
            coarse = np.stack([none if p.elastic is None else p.elastic for p in placements])
            fine = F.interpolate(self._upload(coarse), crop, mode="bicubic", align_corners=True)
            x, y = x + fine[:, 0], y + fine[:, 1]
        return sin * x + cos * y + centre_y, cos * x - sin * y + centre_x

    def _vary(
        self, values: Tensor, intensities: Sequence[Intensities], noise: torch.Generator
    ) -> Tensor:
        """Vary values (N, h, w, C) in 0..255; see `model.training.augment`. Returns uint8."""
        rows = [(i.gamma, i.offset, float(i.blur), i.noise, float(i.invert)) for i in intensities]
        table = self._upload(np.array(rows, np.float32))
        gamma, offset, blur, strength, invert = table.T[:, :, None, None, None]
        gains = self._upload(np.array([i.gains for i in intensities], np.float32))
        colors = self._vary_colors(values / 255, intensities)
        varied = colors.pow(gamma) * gains[:, None, None] + offset
        config = self.crops.recipe.augment
        if config.blur:
            soft = F.avg_pool2d(varied.permute(0, 3, 1, 2), 3, 1, 1, count_include_pad=False)
            varied = torch.where(blur > 0, soft.permute(0, 2, 3, 1), varied)
        if config.noise:
            varied += strength * torch.randn(varied.shape, device=self.device, generator=noise)
        if config.invert:
            varied = torch.where(invert > 0, 1 - varied, varied)
        pixels: Tensor = (varied * 255).round().clamp(0, 255).byte()
        return pixels

    def _vary_colors(self, values: Tensor, intensities: Sequence[Intensities]) -> Tensor:
        """Change stains and hues of crops (N, h, w, C) in 0..1."""
        stains, mixes = [i.stain for i in intensities], [i.mix for i in intensities]
        if stains[0] is not None:  # then all have one
            densities = -torch.log(values + DARKEST)
            values = torch.exp(-self._multiply(densities, stains)) - DARKEST
        if mixes[0] is not None:
            values = self._multiply(values, mixes)
        if stains[0] is not None or mixes[0] is not None:
            values = values.clamp(0, 1)
        return values

    def _multiply(self, values: Tensor, matrices: Sequence[FloatArray | None]) -> Tensor:
        """Multiply the colors (N, h, w, 3) of each crop by its matrix (3, 3)."""
        table = self._upload(np.stack([each for each in matrices if each is not None]))
        count, height, width, channels = values.shape
        return (values.view(count, -1, channels) @ table).view(count, height, width, -1)

    def _upload(self, array: AnyArray) -> Tensor:
        """Copy an array to the device without waiting for it."""
        tensor = torch.from_numpy(array)
        if self.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


def _shrink_labels(labels: Int32Array) -> npt.NDArray[np.int16]:
    """Convert labels to int16. Where one does not fit, all above 0 are numbered anew.

    Raises:
        ImagesDoNotFit: there are too many objects in one image.
    """
    if labels.max(initial=0) > MAX_BATCH_LABEL:
        values, numbers = np.unique(np.maximum(labels, 0), return_inverse=True)
        if len(values) > MAX_BATCH_LABEL:
            raise ImagesDoNotFit(f"an image has {len(values)} objects")
        numbered = numbers.reshape(labels.shape) + np.int32(values[0] != 0)
        labels = np.where(labels < 0, labels, numbered)
    return labels.astype(np.int16)


def _reflect(coordinates: Tensor, length: Tensor) -> Tensor:
    """Reflect coordinates of an axis into 0..length - 1, as `grid_sample` does.

    The reflection is at the edge of the outermost pixels, so these are repeated.
    """
    folded = (coordinates + 0.5).remainder(2 * length)
    reflected = torch.minimum(folded, 2 * length - folded) - 0.5
    return torch.minimum(reflected.clamp(min=0), length - 1)


def _interpolate(
    pixels: Tensor, starts: Tensor, widths: Tensor, heights: Tensor, y: Tensor, x: Tensor
) -> Tensor:
    """Interpolate bilinearly at coordinates y and x (N, h, w) of packed images.

    Args:
        pixels: (all pixels, C) uint8, image after image.
        starts, widths, heights: of each crop's image, (N, 1, 1) int64.

    Returns:
        (N, h, w, C) float32 in 0..255.
    """
    top, left = y.floor(), x.floor()
    down, right = (y - top)[..., None], (x - left)[..., None]
    rows, columns = top.long(), left.long()
    upper = starts + rows * widths
    lower = starts + torch.minimum(rows + 1, heights - 1) * widths
    after = torch.minimum(columns + 1, widths - 1)
    above = torch.lerp(pixels[upper + columns].float(), pixels[upper + after].float(), right)
    below = torch.lerp(pixels[lower + columns].float(), pixels[lower + after].float(), right)
    return torch.lerp(above, below, down)


def _mix(seed: int, first: int) -> int:
    """Derive the seed of a batch's noise from the run's seed and the batch's first index."""
    state = np.random.SeedSequence((seed, first, 2)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
