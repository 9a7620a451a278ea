"""Bring the public data sets into the layout of the shipped recipes.

    python docs/data/prepare.py nuclei kaggle-dsbowl-2018-dataset-fixes
    python docs/data/prepare.py person clothing-co-parsing

The second argument is a clone of the source; docs/train.md names both repositories and their
revisions. The result is data/nuclei or data/person below the current folder. `nuclei.csv` and
`person.csv` beside this file list the images and the split. Knows no network and no model.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.io import loadmat

HERE = Path(__file__).parent
LONG_SIDE = 384
"""Pixels of the longer side of a person image."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Prepare the data of a shipped recipe.")
    parser.add_argument("dataset", choices=("nuclei", "person"))
    parser.add_argument("source", type=Path, help="a clone of the source")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder (data)")
    args = parser.parse_args()
    prepare = prepare_nuclei if args.dataset == "nuclei" else prepare_person
    try:
        count = prepare(args.source, args.out / args.dataset)
    except FileNotFoundError as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    print(f"{args.out / args.dataset}: {count} images")
    return 0


def prepare_nuclei(source: Path, out: Path) -> int:
    """Write images/ID.png, labels/ID.png (uint16, one value per nucleus) and index.csv.

    An ID is the first 16 digits of the image's folder in `stage1_train`.

    Returns:
        The number of images.

    Raises:
        FileNotFoundError: an image of nuclei.csv is missing in the source.
    """
    folders = {folder.name[:16]: folder for folder in (source / "stage1_train").iterdir()}
    rows = _read_table(HERE / "nuclei.csv")
    for row in rows:
        name = row["id"]
        if name not in folders:
            raise FileNotFoundError(f"{source / 'stage1_train'} has no image {name}")
        (path,) = (folders[name] / "images").glob("*.png")
        _save(out / "images" / f"{name}.png", _without_equal_channels(path))
        masks = sorted((folders[name] / "masks").glob("*.png"))
        _save(out / "labels" / f"{name}.png", _label_map(masks))
    shutil.copy(HERE / "nuclei.csv", out / "index.csv")
    return len(rows)


def prepare_person(source: Path, out: Path) -> int:
    """Write images/ID.jpg, masks/ID.png (0 or 255) and val.txt; the longer side has 384 pixels.

    Returns:
        The number of images.

    Raises:
        FileNotFoundError: an image of person.csv is missing in the source.
    """
    rows = _read_table(HERE / "person.csv")
    for row in rows:
        name = row["id"]
        with Image.open(source / "photos" / f"{name}.jpg") as photo:
            scale = LONG_SIDE / max(photo.size)
            size = round(photo.width * scale), round(photo.height * scale)
            image = photo.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        annotation = loadmat(source / "annotations" / "pixel-level" / f"{name}.mat")["groundtruth"]
        mask = Image.fromarray((annotation > 0).astype(np.uint8) * 255)
        (out / "images").mkdir(parents=True, exist_ok=True)
        image.save(out / "images" / f"{name}.jpg", quality=95)
        _save(out / "masks" / f"{name}.png", mask.resize(size, Image.Resampling.NEAREST))
    validation = [row["id"] for row in rows if row["part"] == "validation"]
    (out / "val.txt").write_text("\n".join(validation) + "\n")
    return len(rows)


def _read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _without_equal_channels(path: Path) -> Image.Image:
    """The image without transparency; grey if its three channels are equal."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    pixels = np.asarray(image)
    is_grey = (pixels == pixels[:, :, :1]).all()
    return image.convert("L") if is_grey else image


def _label_map(masks: list[Path]) -> Image.Image:
    """(H, W) uint16: 0 is background, the n-th mask has the value n."""
    labels: npt.NDArray[Any] | None = None
    for number, path in enumerate(masks, start=1):
        with Image.open(path) as file:
            inside = np.asarray(file.convert("L")) > 0
        if labels is None:
            labels = np.zeros(inside.shape, np.uint16)
        labels[inside] = number
    if labels is None:
        raise FileNotFoundError("an image has no masks")
    return Image.fromarray(labels)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    sys.exit(main())
