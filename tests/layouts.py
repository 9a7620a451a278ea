"""Drawn data sets in the layouts of ISBI 2012, CamVid and Carvana.

`python -m tests.layouts FOLDER` writes all three, in sizes for a try by hand. Each image can be
learned, and none can be segmented by a threshold. Needs NumPy, SciPy, Pillow and tifffile.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy import ndimage, spatial

SCENE_CLASSES = {
    "Void": (0, 0, 0),
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Road": (128, 64, 128),
    "Tree": (128, 128, 0),
    "Car": (64, 0, 128),
}
"""Name -> color in the masks of CamVid."""
_SCENE_TONES = np.array(
    [(90, 80, 80), (190, 205, 230), (140, 120, 110), (95, 95, 100), (70, 105, 60), (150, 60, 60)]
)
"""Color of each class in the images."""


def write_isbi(folder: Path, side: int, pages: int, test_pages: int) -> None:
    """Write train-volume.tif, train-labels.tif and test-volume.tif: stacks of cells.

    In the labels the insides of the cells are 255, and the membranes between them 0.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = [draw_membranes(side, seed) for seed in range(pages + test_pages)]
    images, labels = (np.stack(each) for each in zip(*fields, strict=True))
    tifffile.imwrite(folder / "train-volume.tif", images[:pages])
    tifffile.imwrite(folder / "train-labels.tif", labels[:pages])
    tifffile.imwrite(folder / "test-volume.tif", images[pages:])


def write_camvid(folder: Path, height: int, width: int, count: int) -> None:
    """Write images, masks with a color for each class, and the names of the colors."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    colors = np.array(list(SCENE_CLASSES.values()), np.uint8)
    for index in range(count):
        image, classes = draw_scene(height, width, index)
        name = f"0001TP_{index:06}"
        Image.fromarray(image).save(folder / "images" / f"{name}.png")
        Image.fromarray(colors[classes]).save(folder / "labels" / f"{name}_L.png")
    lines = [f"{r} {g} {b}\t\t{name}\n" for name, (r, g, b) in SCENE_CLASSES.items()]
    (folder / "label_colors.txt").write_text("".join(lines))


def write_carvana(folder: Path, height: int, width: int, cars: int, views: int) -> None:
    """Write photographs CAR_VIEW.jpg with CAR_VIEW_mask.gif, or .png for every other car."""
    for name in ("train", "train_masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for car in range(cars):
        for view in range(views):
            image, mask = draw_car(height, width, car, view)
            name = f"{car * 7919 + 0xCDF0:012x}_{view + 1:02}"
            suffix = "png" if car % 2 else "gif"
            Image.fromarray(image).save(folder / "train" / f"{name}.jpg", quality=92)
            Image.fromarray(mask).save(folder / "train_masks" / f"{name}_mask.{suffix}")


def draw_membranes(side: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw cells with dark membranes and, as distractors, dark spots inside.

    Returns:
        Image and labels, both (side, side) uint8.
    """
    rng = np.random.default_rng(seed)
    bend = np.stack([_draw_field(rng, side, side, 8) for _ in range(2)])
    y, x = np.mgrid[:side, :side] + 4 * bend
    centres = rng.uniform(-30, side + 30, ((side + 60) ** 2 // 700, 2))
    distances, _ = spatial.KDTree(centres).query(np.stack([y, x], axis=-1), 2)
    gap = distances[..., 1] - distances[..., 0]
    labels = np.where(gap > 3, 255, 0).astype(np.uint8)
    image = 170 + 12 * _draw_field(rng, side, side, 20) + 12 * _draw_field(rng, side, side, 1.5)
    image -= 90 * np.exp(-((gap / 2.5) ** 2))
    image -= 80 * ((distances[..., 0] < rng.uniform(2, 5)) & (gap > 6))
    image += rng.normal(0, 14, image.shape)
    return image.clip(0, 255).astype(np.uint8), labels


def draw_scene(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a street: sky, buildings, trees, a road with cars, and a part without a label.

    Returns:
        Image (H, W, 3) uint8, and indices into `SCENE_CLASSES`, (H, W).
    """
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / height
    ratio = width / height
    horizon = rng.uniform(0.5, 0.6)
    classes = np.full((height, width), 1)
    for left in np.arange(0, ratio, 0.3):
        top = rng.uniform(0.15, 0.45)
        classes[(x >= left) & (x < left + rng.uniform(0.15, 0.3)) & (y > top)] = 2
    for _ in range(3):
        centre = rng.uniform(0, ratio), horizon - rng.uniform(0.05, 0.15)
        edge = rng.uniform(0.08, 0.16) * (1 + 0.15 * _draw_field(rng, height, width, 3))
        classes[np.hypot(x - centre[0], y - centre[1]) < edge] = 4
    classes[y > horizon + 0.02 * _draw_field(rng, 1, width, width / 4)] = 3
    for _ in range(rng.integers(1, 4)):
        centre = rng.uniform(0.1, ratio - 0.1), rng.uniform(horizon + 0.05, 0.85)
        size = 0.1 + 0.25 * (centre[1] - horizon)
        box = (abs(x - centre[0]) < size) & (abs(y - centre[1]) < 0.5 * size)
        classes[box] = 5
    classes[y > 0.96] = 0
    light = rng.uniform(0.8, 1.2) + 0.08 * _draw_field(rng, height, width, height / 4)
    image = _SCENE_TONES[classes] * light[:, :, None] * rng.uniform(0.93, 1.07, 3)
    image += 10 * _draw_field(rng, height, width, 1)[:, :, None] * (classes > 1)[:, :, None]
    image += 25 * _draw_field(rng, height, width, 2)[:, :, None] * (classes == 4)[:, :, None]
    image += rng.normal(0, 6, image.shape)
    return image.clip(0, 255).astype(np.uint8), classes


def draw_car(height: int, width: int, car: int, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a car in a studio with lights, a floor and a shadow.

    Returns:
        Image (H, W, 3) uint8, and mask (H, W) uint8, 0 or 255.
    """
    rng = np.random.default_rng(car)
    paint, length, roof = rng.uniform(30, 230, 3), rng.uniform(0.5, 0.6), rng.uniform(0.14, 0.2)
    rng = np.random.default_rng((car, view))
    y, x = np.mgrid[:height, :width] / height
    ratio = width / height
    centre, floor = ratio / 2 + rng.uniform(-0.1, 0.1), rng.uniform(0.68, 0.74)
    u = (x - centre) / (length * rng.uniform(0.85, 1.1))  # -1..1 along the car
    body = (abs(u) < 1) & (y < floor - 0.05) & (y > floor - 0.26 + 0.06 * abs(u) ** 3)
    cabin = (abs(u + 0.1) < 0.62) & (y <= floor - 0.2)
    cabin &= y > floor - 0.24 - roof * (1 - (abs(u + 0.1) / 0.62) ** 4)
    wheels = np.zeros_like(body)
    for place in (-0.62, 0.62):
        wheels |= np.hypot((u - place) * length, y - floor + 0.06) < 0.075
    windows = cabin & (abs(u + 0.1) < 0.5) & (y > floor - 0.22 - 0.8 * roof) & (y < floor - 0.22)
    mask = body | cabin | wheels
    image = np.repeat((205 - 60 * (y > floor - 0.12))[:, :, None], 3, axis=2).astype(float)
    image += 25 * np.exp(-(((x - ratio * rng.uniform(0.2, 0.8)) / 0.2) ** 2))[:, :, None]
    shadow = np.exp(-(((y - floor - 0.03) / 0.04) ** 2)) * (abs(u) < 1.1)
    image *= 1 - 0.6 * shadow[:, :, None]
    image[body | cabin] = paint
    image[windows] = (60, 70, 80)
    image[wheels] = (35, 35, 38)
    image *= 1 + 0.04 * _draw_field(rng, height, width, height / 10)[:, :, None]
    image = ndimage.gaussian_filter(image, (0.7, 0.7, 0)) + rng.normal(0, 5, image.shape)
    return image.clip(0, 255).astype(np.uint8), np.where(mask, 255, 0).astype(np.uint8)


def _draw_field(rng: np.random.Generator, height: int, width: int, sigma: float) -> np.ndarray:
    """Return smooth noise with a standard deviation of 1, (height, width)."""
    field = ndimage.gaussian_filter(rng.normal(0, 1, (height, width)), sigma, mode="wrap")
    deviation: float = field.std()
    return np.asarray((field - field.mean()) / deviation)


def main(folder: Path) -> None:
    write_isbi(folder / "isbi", 512, 30, 5)
    write_camvid(folder / "camvid", 360, 480, 60)
    write_carvana(folder / "carvana", 640, 959, 16, 4)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
