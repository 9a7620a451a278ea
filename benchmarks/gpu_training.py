"""Measure training on a device, then train on nuclei: `python -m benchmarks.gpu_training`.

First the rate of steps with crops from the host and with crops from the device; then one training,
whose scores show that the steps do what they should, and whose masks are compared between the
precisions of the engine; last the rate of the compiled network, because compiling takes a minute.

Needs torch, NumPy, SciPy and this project. Without `data/nuclei` (docs/train.md) it draws
images. `--device cpu --quick` tries the program itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from benchmarks.gpu_engine import compare_masks
from benchmarks.gpu_timing import synchronize
from benchmarks.results import Results
from model.checkpoint import load_checkpoint
from model.training.batches import load_batches
from model.training.crops import CropDataset
from model.training.data import open_dataset
from model.training.length import RunLength
from model.training.loop import train
from model.training.recipe import Recipe
from model.training.split import split_dataset
from model.training.trainer import Trainer
from tests.drawing import nuclei

RECIPE = Path("model/configs/nuclei.toml")
_COMPARED_IMAGES = 12


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N or cpu (cuda:0)")
    parser.add_argument("--data", type=Path, default=Path("data/nuclei"), help="(data/nuclei)")
    parser.add_argument("--minutes", type=float, default=1.0, help="of the training (1)")
    parser.add_argument("--base-features", type=int, default=32, help="of the training (32)")
    parser.add_argument("--out", type=Path, help="folder for the trained checkpoint")
    parser.add_argument("--quick", action="store_true", help="a small network and short times")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args()
    results = Results(args.json)
    with tempfile.TemporaryDirectory() as scratch:
        measure(args, Path(scratch), results)
    return results.exit_status


def measure(args: argparse.Namespace, scratch: Path, results: Results) -> None:
    """Run all parts.

    Args:
        args: of the command line.
        scratch: folder for drawn images and for the run.
    """
    data = args.data
    if args.quick or not data.exists():
        data = scratch / "data"
        draw_data(data, *((8, 112) if args.quick else (200, 400)))
    results.add("data", {"drawn": data != args.data, "images": len(list(data.glob("images/*")))})
    flags = data_flags(data) | {"device": args.device, "golden": ""}
    flags |= {"minutes": str(args.minutes), "steps": "0", "validate_every": "500"}
    flags |= (
        {"crop": "[48,48]", "batch_size": "4"}
        if args.quick
        else {"crop": "[192,192]", "batch_size": "64"}
    )
    speed = flags | {"base_features": "4" if args.quick else "64"}
    seconds = 0.5 if args.quick else 6.0
    workers = str(min(8, os.cpu_count() or 1))
    results.attempt(
        "host",
        lambda: measure_steps(
            speed | {"augment_on": "host", "workers": workers}, seconds, "host", results
        ),
    )
    results.attempt(
        "device",
        lambda: measure_steps(speed | {"augment_on": "device"}, seconds, "device", results),
    )
    width = {"base_features": "4" if args.quick else str(args.base_features)}
    results.attempt("training", lambda: _train(flags | width, scratch / "run", args, results))
    if not args.device.startswith("cpu"):
        compiled = speed | {"augment_on": "device", "compile": "true"}
        results.attempt("compiled", lambda: measure_steps(compiled, seconds, "compiled", results))


def draw_data(folder: Path, count: int, side: int) -> None:
    """Draw fields of nuclei with their labels into images/ and labels/."""
    for index in range(count):
        image, labels = nuclei(side, side, seed=index)
        for name, array in (("images", image), ("labels", labels)):
            (folder / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / name / f"{index:04d}.png")


def data_flags(data: Path) -> dict[str, str]:
    """Return the recipe's values for a data set in the layout of docs/train.md."""
    index = data / "index.csv"
    return {
        "sources": "[]",
        "labels": "instances",
        "group_column": "field",
        "images": str(data / "images"),
        "masks": str(data / "labels"),
        "groups": str(index) if index.exists() else "",
    }


def measure_steps(flags: dict[str, str], seconds: float, name: str, results: Results) -> None:
    """Measure steps per second of a recipe, without validation."""
    recipe = Recipe.read(RECIPE, flags)
    device = torch.device(recipe.run.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    training, _ = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    crops = CropDataset(training, recipe)
    crops.preload()
    trainer = Trainer(recipe, device, crops)
    start = time.perf_counter()
    batches = load_batches(trainer, crops, RunLength.of(recipe.optim, len(training)))

    figures: list[tuple[float, float]] = []

    def step() -> None:
        pixels, labels, weights, _ = next(batches)
        trainer.step(pixels, labels, weights, 0.5)
        if trainer.steps_done % trainer.read_every == 0:
            figures.extend(trainer.read_steps())

    for _ in range(3):
        step()
    synchronize(device)
    begun, before = time.perf_counter(), trainer.steps_done
    while time.perf_counter() < begun + seconds:
        step()
    synchronize(device)
    rate = (trainer.steps_done - before) / (time.perf_counter() - begun)
    figures.extend(trainer.read_steps())
    pixels = rate * recipe.optim.batch_size * recipe.augment.crop[0] * recipe.augment.crop[1]
    row = {
        "crops_from": name,
        "base_features": recipe.network.base_features,
        "batch": recipe.optim.batch_size,
        "crop": list(recipe.augment.crop),
        "seconds_until_steps": begun - start,
        "steps_per_second": rate,
        "megapixels_per_second": pixels / 1e6,
        "last_loss": figures[-1][0],
    }
    if device.type == "cuda":
        row["memory_mib"] = torch.cuda.max_memory_allocated(device) >> 20
    results.append("steps", row)
    batches.close()


def _train(flags: dict[str, str], folder: Path, args: argparse.Namespace, results: Results) -> None:
    recipe = Recipe.read(RECIPE, flags)
    start = time.perf_counter()
    path = train(recipe, folder)
    report = json.loads((folder / "report.json").read_text())
    scores = {name: report[name] for name in ("validation", "training", "steps", "hardware")}
    results.add("trained", scores | {"seconds_in_all": time.perf_counter() - start})
    if args.out:
        shutil.copy(path, args.out / path.name)
    _, validation = split_dataset(open_dataset(recipe.data, recipe.preprocess), recipe.data)
    images = [sample.image for sample in validation[:_COMPARED_IMAGES]]
    compare_masks(load_checkpoint(path), images, torch.device(recipe.run.device), results)


if __name__ == "__main__":
    sys.exit(main())
