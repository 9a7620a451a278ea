"""Batches of crops in order, made on the device or by the workers of the host.

Knows crops and devices; no networks.
"""

from __future__ import annotations

import logging
import math
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate

from model.errors import DataError, TrainingOutOfMemory
from model.training.crops import CropDataset
from model.training.device_crops import Batch, DeviceCrops, ImagesDoNotFit
from model.training.length import RunLength
from model.training.trainer import Trainer

logger = logging.getLogger(__name__)

_IMAGE_SHARE = 0.4
"""Share of a device's free memory that training images may take."""
_ENDLESS = 10**9
"""Steps that no run reaches."""


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
