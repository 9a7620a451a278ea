"""`unet export`: change a checkpoint's width, calibrate it for int8, or export an OpenVINO graph.

`--base-features` widens or narrows the network without changing what it computes. `--calibrate`
records the ranges of activations in the reference network on training images, builds the int8
engine from them, and measures on validation images how far its masks differ from fp32. The ranges
and the measurements go into the checkpoint. By default the service uses int8 only where these
measurements validate it.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from app.engine.factory import build_engine, choose_engines
from app.engine.images import by_engine
from model.checkpoint import Checkpoint, load_checkpoint, record, save_checkpoint
from model.config import Calibration
from model.data import PairedDataset, open_dataset, split_dataset
from model.metrics import Overlap
from model.recipe import Recipe
from model.transforms import to_mask


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument(
        "--base-features",
        type=int,
        metavar="N",
        help="widen to N base features, or narrow a widened checkpoint; masks stay the same",
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="RECIPE", help="on the data of this recipe, for int8"
    )
    parser.add_argument(
        "--images", type=int, default=40, help="training images to look at (40)", metavar="N"
    )
    parser.add_argument("--out", type=Path, help="checkpoint to write (the same, in place)")
    parser.add_argument(
        "--openvino", type=Path, metavar="FILE.xml", help="write the fp32 graph for other programs"
    )


def main(args: argparse.Namespace) -> int:
    if not (args.base_features or args.calibrate or args.openvino):
        raise ValueError(
            "say what to export: --base-features N, --calibrate RECIPE, or --openvino FILE.xml"
        )
    checkpoint = load_checkpoint(args.checkpoint)
    if args.base_features:
        checkpoint = change_width(checkpoint, args.base_features)
    if args.calibrate:
        recipe = Recipe.read(args.calibrate)
        dataset = open_dataset(recipe.data, checkpoint.preprocess)
        training, validation = split_dataset(dataset, recipe.data)
        calibration = calibrate(checkpoint, training, validation, args.images)
        checkpoint = dataclasses.replace(checkpoint, calibration=calibration)
    if args.base_features or args.calibrate:
        path = args.out or args.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint = save_checkpoint(path, checkpoint)
        record(path)
        print(f"{path}: {checkpoint.id}", end="")
        if found := checkpoint.calibration:
            default = "int8" if found.proven else "fp32"
            print(f"; {found}; {default} is its default on a CPU", end="")
        print()
    if args.openvino:
        import openvino as ov

        from app.engine.openvino import build_graph

        graph = build_graph(checkpoint.architecture, checkpoint.preprocess, checkpoint.state)
        ov.save_model(graph, args.openvino)
        known = checkpoint.architecture
        lost = f" - {2 * known.margin}" if known.margin else ""
        print(
            f"{args.openvino}: image, uint8 (N, H, W, {known.in_channels}), to probabilities, "
            f"float32 (N, {known.out_channels}, H{lost}, W{lost})"
        )
    return 0


def change_width(checkpoint: Checkpoint, base_features: int) -> Checkpoint:
    """Widen or narrow a checkpoint, and attach a new golden pair of the same image.

    Raises:
        ConfigError: neither number of features is a multiple of the other, or the checkpoint would
            have to be narrowed and was not widened from `base_features`.
    """
    from model.predict import with_golden
    from model.widen import narrow_checkpoint, widen_checkpoint

    before = checkpoint.architecture.base_features
    if base_features == before:
        return checkpoint
    change = widen_checkpoint if base_features > before else narrow_checkpoint
    return with_golden(change(checkpoint, base_features), checkpoint.golden.image)


def calibrate(
    checkpoint: Checkpoint, training: PairedDataset, validation: PairedDataset, images: int = 40
) -> Calibration:
    """Ranges from training images; what int8 costs from validation images and the golden one.

    Args:
        images: of the training set, evenly spread over it.
    """
    from model.export import activation_ranges
    from model.predict import Predictor

    chosen = np.unique(np.linspace(0, len(training) - 1, images).astype(int))
    shown = tqdm(chosen, "ranges", unit="image", disable=not sys.stderr.isatty())
    ranges = activation_ranges(Predictor.of(checkpoint), (training[int(i)].image for i in shown))
    draft = dataclasses.replace(checkpoint, calibration=Calibration(ranges))
    exact, rounded = _masks_by(draft, "fp32"), _masks_by(draft, "int8")
    ious, losses = [], []
    unseen = range(len(validation))
    for index in tqdm(unseen, "proof", unit="image", disable=not sys.stderr.isatty()):
        sample = validation[index]
        masks = exact(sample.image), rounded(sample.image)
        if not any(mask.any() for mask in masks):
            continue  # that both see nothing is no proof
        ious.append(_iou(*masks, checkpoint))
        dice, other = (_dice(mask, sample.labels, checkpoint) for mask in masks)
        losses.append(dice - other)
    if not ious:
        return Calibration(ranges)
    golden = rounded(checkpoint.golden.image)
    return Calibration(
        ranges,
        images=len(ious),
        iou=round(float(np.mean(ious)), 5),
        dice_loss=round(float(np.mean(losses)), 5),
        golden_iou=round(Overlap.of_classes(golden, checkpoint.golden.mask).iou, 5),
    )


def _masks_by(
    checkpoint: Checkpoint, precision: str
) -> Callable[[npt.NDArray[Any]], npt.NDArray[np.uint8]]:
    (choice,) = choose_engines(device="cpu", engine="openvino", precision=precision)
    predict = by_engine(build_engine(choice, checkpoint), checkpoint)
    return lambda image: to_mask(predict(image), checkpoint.preprocess)


def _iou(mask: npt.NDArray[Any], other: npt.NDArray[Any], checkpoint: Checkpoint) -> float:
    classes = [c for c in _classes(checkpoint) if (mask == c).any() or (other == c).any()]
    return float(np.mean([Overlap.of(mask == c, other == c).iou for c in classes]))


def _dice(mask: npt.NDArray[Any], labels: npt.NDArray[Any], checkpoint: Checkpoint) -> float:
    if checkpoint.preprocess.binary:
        return Overlap.of(mask > 0, labels > 0).dice
    return float(np.mean([Overlap.of(mask == c, labels == c).dice for c in _classes(checkpoint)]))


def _classes(checkpoint: Checkpoint) -> list[int]:
    """The values of a mask that are not background."""
    preprocess = checkpoint.preprocess
    return [255] if preprocess.binary else list(range(1, len(preprocess.classes)))
