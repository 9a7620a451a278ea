"""Draw the pictures of these pages: python docs/pictures/draw.py [RUN_FOLDER ...]

From the shipped weights, and from images whose publication is allowed: StarDist's example images
(BSD-3-Clause) and scikit-image's (see its notes on each). Folders of training runs give the curves.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from app.imaging.decode import overlay
from model.checkpoint import load_checkpoint
from model.instances import label_instances
from model.predict import Predictor
from model.training.data import read_image
from model.training.plots import compare, contact_sheet, draw_curves
from model.transforms import prepare, to_mask

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GAP = 8


def main() -> None:
    fluorescence()
    sheet()
    for folder in map(Path, sys.argv[1:]):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        draw_curves([json.loads(line) for line in lines], HERE / f"{folder.name}-curves.png")


def fluorescence() -> None:
    """The README's: image, mask, overlay, instances, side by side."""
    checkpoint = load_checkpoint(ROOT / "weights" / "nuclei.safetensors")
    image = read_image(ROOT / "tests/fixtures/img2d.tif")[:384, :384]
    probabilities = Predictor.of(checkpoint)(image)
    mask = to_mask(probabilities, checkpoint.preprocess)
    shown = prepare(image, checkpoint.preprocess)
    colours = np.random.default_rng(3).integers(70, 256, (65536, 3)).astype(np.uint8)
    colours[0] = 0
    panels = [shown, np.stack([mask] * 3, 2), overlay(shown, mask)]
    panels.append(colours[label_instances(probabilities, checkpoint.preprocess.threshold)])
    strip = Image.new("RGB", (len(panels) * (384 + GAP) - GAP, 384), "white")
    for index, panel in enumerate(panels):
        strip.paste(Image.fromarray(panel), (index * (384 + GAP), 0))
    strip.save(HERE / "fluorescence.png", optimize=True)


def sheet() -> None:
    """Both models on images that neither was trained on. There is a truth for the first alone."""
    entries = []
    for name, images in (
        (
            "nuclei",
            {
                "StarDist's example, with its truth": read_image(ROOT / "tests/fixtures/img2d.tif"),
                "StarDist's tissue (H&E)": read_image(ROOT / "app/static/samples/histology.jpg"),
                "scikit-image: ihc": skimage.data.immunohistochemistry(),
                "scikit-image: coins, which are no nuclei": skimage.data.coins(),
            },
        ),
        (
            "person",
            {
                "scikit-image: astronaut": skimage.data.astronaut(),
                "scikit-image: camera": skimage.data.camera(),
                "scikit-image: cat, which is no person": skimage.data.chelsea(),
                "scikit-image: coffee, which is no person": skimage.data.coffee(),
            },
        ),
    ):
        checkpoint = load_checkpoint(ROOT / "weights" / f"{name}.safetensors")
        predict = Predictor.of(checkpoint)
        for caption, image in images.items():
            mask = to_mask(predict(image), checkpoint.preprocess)
            truth = mask
            if "truth" in caption:
                truth = np.asarray(Image.open(ROOT / "tests/fixtures/mask2d.tif"))
            entries.append((f"{name}: {caption}", compare(image, truth, mask)))
    contact_sheet(entries).save(HERE / "contact-sheet.jpg", quality=88)


if __name__ == "__main__":
    main()
