"""Draw the pictures of the documentation.

    python -m docs.pictures.draw [RUN_FOLDER ...]

Run it from the root of the repository: otherwise Python imports the installed `app` and `model`,
which may belong to another copy. Uses the shipped weights and images that may be published:
StarDist's examples (BSD-3-Clause) and scikit-image's (see its notes on each). A training curve is
drawn for each run folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image

from app.imaging.render import overlay
from model.checkpoint import load_checkpoint
from model.instances import label_instances
from model.predict import Predictor
from model.training.images import read_image
from model.training.plots import draw_comparison, draw_curves, make_contact_sheet
from model.transforms import prepare, to_mask

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
GAP = 8


def main() -> None:
    draw_fluorescence()
    draw_contact_sheet()
    for folder in map(Path, sys.argv[1:]):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        draw_curves([json.loads(line) for line in lines], HERE / f"{folder.name}-curves.png")


def draw_fluorescence() -> None:
    """Image, mask, overlay and instances side by side, for the README."""
    checkpoint = load_checkpoint(ROOT / "weights" / "nuclei.safetensors")
    image = read_image(ROOT / "tests/fixtures/img2d.tif")[:384, :384]
    probabilities = Predictor.of(checkpoint)(image)
    mask = to_mask(probabilities, checkpoint.preprocess)
    shown = prepare(image, checkpoint.preprocess)
    colors = np.random.default_rng(3).integers(70, 256, (65536, 3)).astype(np.uint8)
    colors[0] = 0
    panels = [shown, np.stack([mask] * 3, 2), overlay(shown, mask)]
    panels.append(colors[label_instances(probabilities, checkpoint.preprocess.threshold)])
    strip = Image.new("RGB", (len(panels) * (384 + GAP) - GAP, 384), "white")
    for index, panel in enumerate(panels):
        strip.paste(Image.fromarray(panel), (index * (384 + GAP), 0))
    strip.save(HERE / "fluorescence.png", optimize=True)


def draw_contact_sheet() -> None:
    """Both models on images that neither was trained on; only the first image has a truth."""
    entries = []
    for name, images in (
        (
            "nuclei",
            {
                "StarDist: example, with its truth": read_image(ROOT / "tests/fixtures/img2d.tif"),
                "StarDist: tissue (H&E)": read_image(ROOT / "app/static/samples/histology.jpg"),
                "scikit-image: ihc": skimage.data.immunohistochemistry(),
                "scikit-image: coins (not nuclei)": skimage.data.coins(),
            },
        ),
        (
            "person",
            {
                "scikit-image: astronaut": skimage.data.astronaut(),
                "scikit-image: camera": skimage.data.camera(),
                "scikit-image: cat (not a person)": skimage.data.chelsea(),
                "scikit-image: coffee (not a person)": skimage.data.coffee(),
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
            entries.append((f"{name}: {caption}", draw_comparison(image, truth, mask)))
    make_contact_sheet(entries).save(HERE / "contact-sheet.jpg", quality=88)


if __name__ == "__main__":
    main()
