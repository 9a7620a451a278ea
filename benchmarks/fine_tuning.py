"""Compare fine-tuning `nuclei` with training from scratch: `python -m benchmarks.fine_tuning`.

By default the images are drawn here, of a kind that `nuclei` was not trained on: layers of whole
cells, parted by thin bright membranes, with gaps. Spots inside look like nuclei, but are only a
part of a cell. Twenty images are for training and ten for validation. --data has images of another
kind instead.

Both runs have the same network, data and recipe; they differ in their start, and in how long they
may train. The table has the scores of each validation by the time trained so far.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage, spatial

from model.arrays import ByteArray, FloatArray, Int32Array
from model.checkpoint import load_checkpoint
from model.evaluation.evaluate import evaluate, from_probabilities
from model.predict import Predictor
from model.training.best import rate_scores
from model.training.data import open_dataset
from model.training.loop import train
from model.training.recipe import Recipe
from model.training.split import split_dataset

SIZE = 256
TRAINING, VALIDATION = 20, 10
_RECIPE: dict[str, Any] = {
    "name": "cells",
    "preprocess": {
        "intensity": "percentile",
        "percentiles": [0.2, 99.8],
        "classes": ["background", "cell"],
    },
    "augment": {"crop": [160, 160], "zoom": [0.8, 1.25], "rotate": 180},
    "optim": {
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup": 20,
        "batch_norm": True,
        "ema": 0.99,
    },
    "run": {"device": "cpu"},
}


@dataclasses.dataclass(frozen=True)
class Task:
    """Images to train and validate on.

    Attributes:
        folder: has images/, masks/ and validation.txt.
        labels: of the masks: "instances", or "binary" where objects that touch have one label.
    """

    folder: Path
    labels: str

    @property
    def separates_objects(self) -> bool:
        """Whether the network has a channel for the borders between objects."""
        return self.labels == "instances"

    def make_recipe(self, **optim: Any) -> Recipe:
        """Return the recipe for these images."""
        data = {
            "images": str(self.folder / "images"),
            "masks": str(self.folder / "masks"),
            "labels": self.labels,
            "validation_list": str(self.folder / "validation.txt"),
        }
        channels = 2 if self.separates_objects else 1
        network = {"in_channels": 3, "out_channels": channels, "base_features": 32}
        optim = {**_RECIPE["optim"], **optim}
        return Recipe.merge({**_RECIPE, "network": network, "data": data, "optim": optim}, {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--minutes", type=float, default=5, help="of fine-tuning (5)")
    parser.add_argument("--scratch", type=float, default=30, help="minutes from scratch (30)")
    parser.add_argument(
        "--start", type=Path, default=Path("weights/nuclei.safetensors"), help="(nuclei)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="with images/, masks/ of nuclei (0: background) and validation.txt (default: drawn)",
    )
    parser.add_argument("--out", type=Path, help="folder of runs and drawn data (default: none)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores to FILE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = args.out or Path(scratch)
        task = Task(args.data, "binary") if args.data else draw_task(out / "drawn")
        untuned = measure(task, args.start)
        print(f"{args.start}, not trained on this: {format_scores(untuned)}", flush=True)
        tuned = run(task, out / "tuned", args.minutes, args.start)
        fresh = run(task, out / "fresh", args.scratch, None)
        for name, rows in (("fine-tuned", tuned), ("from scratch", fresh)):
            print(f"\n{name}")
            for row in rows:
                print(
                    f"  {row['seconds'] / 60:5.1f} min  step {row['step']:5}  {format_scores(row)}"
                )
    if args.json:
        figures = {"untuned": untuned, "fine-tuned": tuned, "from scratch": fresh}
        args.json.write_text(json.dumps(figures, indent=2))
    best, rival = rate_scores(tuned[-1]), rate_scores(fresh[-1])
    verdict = "better" if best > rival else "not better"
    print(
        f"\n{args.minutes:g} min of fine-tuning are {verdict} than {args.scratch:g} min from "
        f"scratch: {best:.4f} and {rival:.4f} (the score by which weights are chosen)"
    )
    return 0


def draw_task(folder: Path) -> Task:
    """Draw all images and their labels, and list those for validation."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(TRAINING + VALIDATION):
        image, labels = draw_cells(np.random.default_rng(index))
        Image.fromarray(image).save(folder / "images" / f"{index:02}.png")
        Image.fromarray(labels.astype(np.uint16)).save(folder / "masks" / f"{index:02}.png")
    validation = [f"{TRAINING + index:02}\n" for index in range(VALIDATION)]
    (folder / "validation.txt").write_text("".join(validation))
    return Task(folder, "instances")


def draw_cells(rng: np.random.Generator) -> tuple[ByteArray, Int32Array]:
    """Draw a layer of cells, some of which are missing.

    Returns:
        A grey image and its labels, both (SIZE, SIZE).
    """
    y, x = np.mgrid[:SIZE, :SIZE] + 4 * np.stack([_draw_field(rng, 9), _draw_field(rng, 9)])
    centres = rng.uniform(-20, SIZE + 20, (rng.integers(60, 120), 2))
    tree = spatial.KDTree(centres)
    distances, nearest = tree.query(np.stack([y, x], axis=-1), 2)
    gap = distances[..., 1] - distances[..., 0]  # 0 on the membranes
    present = rng.random(len(centres)) < 0.75
    inside = present[nearest[..., 0]] & (gap > 3)
    labels = np.where(inside, nearest[..., 0] + 1, 0).astype(np.int32)
    beside = present[nearest].any(axis=-1)
    empty = ~present[nearest[..., 0]]
    image = 0.4 + 0.06 * _draw_field(rng, 60) + 0.03 * _draw_field(rng, 2)
    image += rng.uniform(0.1, 0.25) * np.exp(-((gap / 3) ** 2)) * beside
    image -= rng.uniform(0.05, 0.12) * empty
    image += 0.02 * rng.normal(0, 1, len(centres))[nearest[..., 0]] * inside
    radii, tones = rng.uniform(2, 6, len(centres)), rng.normal(0, 0.1, len(centres))
    image += (tones * present)[nearest[..., 0]] * (distances[..., 0] < radii[nearest[..., 0]])
    image = ndimage.gaussian_filter(image, 0.8) + rng.normal(0, 0.03, image.shape)
    return (255 * image).clip(0, 255).astype(np.uint8), labels


def _draw_field(rng: np.random.Generator, sigma: float) -> FloatArray:
    """Return smooth noise with a standard deviation of 1, (SIZE, SIZE)."""
    field = ndimage.gaussian_filter(rng.normal(0, 1, (SIZE, SIZE)), sigma, mode="wrap")
    return np.asarray((field - field.mean()) / field.std(), np.float32)


def measure(task: Task, path: Path) -> dict[str, Any]:
    """Return the scores of a checkpoint on the validation images."""
    checkpoint = load_checkpoint(path)
    recipe = task.make_recipe(steps=1)
    dataset = open_dataset(recipe.data, checkpoint.preprocess)
    instances = task.separates_objects
    predict = from_probabilities(
        Predictor.of(checkpoint), checkpoint.preprocess, instances=instances
    )
    validation = split_dataset(dataset, recipe.data)[1]
    return evaluate(predict, validation, instances=instances).summary()


def run(task: Task, folder: Path, minutes: float, start: Path | None) -> list[dict[str, Any]]:
    """Train, and return the scores of each validation; the last are those of the checkpoint.

    Args:
        folder: of the run.
        start: a checkpoint; None for random weights.
    """
    recipe = task.make_recipe(minutes=minutes, init_from=str(start) if start else "")
    train(recipe, folder)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [record for record in map(json.loads, lines) if "dice" in record]
    report = json.loads((folder / "report.json").read_text())
    end = {"step": report["shipped_step"], "seconds": 3600 * report["hours"]}
    return [*rows, {**report["validation"], **end}]


def format_scores(row: dict[str, Any]) -> str:
    """Format the scores of a validation."""
    objects = f"  F1 of objects {row['f1_50']:.4f}" if "f1_50" in row else ""
    return f"Dice {row['dice']:.4f}{objects}"


if __name__ == "__main__":
    sys.exit(main())
