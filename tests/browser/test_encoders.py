"""The files that the page makes, on label maps of every shape, against those of the service."""

from __future__ import annotations

import base64
import dataclasses
import json

import numpy as np
import pytest
import roifile
from playwright.sync_api import Page
from pycocotools import mask as coco_mask

from app.imaging.png import encode_grey16, encode_mask, encode_picture
from app.imaging.render import cutout, soften_edge
from app.imaging.rois import encode_rois
from model.coco import encode_coco
from model.objects import Objects
from model.polygons import encode_polygons
from tests.browser.conftest import unzip
from tests.conftest import decode
from tests.objects import make_objects

CLASSES = ("background", "nucleus", "debris")
ignore_decoder = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # of pycocotools
RUN = """async ([name, files, args]) => {
    const {TASKS} = await import('./static/tasks.js');
    const toBlob = (text) =>
        new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))]);
    const blobs = Object.fromEntries(
        Object.entries(files).map(([name, text]) => [name, toBlob(text)]));
    const fill = (arg) => arg === '*' ? blobs : arg in blobs ? blobs[arg] : arg;
    const made = await TASKS[name](...args.map(fill));
    let bytes = '';
    for (const byte of new Uint8Array(await made.arrayBuffer())) bytes += String.fromCharCode(byte);
    return btoa(bytes);
}"""


def run_task(page: Page, name: str, files: dict[str, bytes], *args: object) -> bytes:
    """Run a task of the page's worker. "*" among its arguments stands for all files by name, and
    the name of a file for that file."""
    texts = {each: base64.b64encode(content).decode() for each, content in files.items()}
    return base64.b64decode(page.evaluate(RUN, [name, texts, list(args)]))


def divide_classes(objects: Objects) -> Objects:
    """The objects with two classes in turn, and a score of its own each."""
    return dataclasses.replace(
        objects,
        classes=(1 + np.arange(objects.count) % 2).astype(np.uint8),
        scores=np.linspace(0.5, 1, objects.count).astype(np.float32),
    )


def draw_speckles() -> np.ndarray:
    """Objects with holes and several parts, which touch at corners and at the edge of the image."""
    return np.random.default_rng(0).integers(0, 5, (40, 60)).astype(np.int32)


def draw_blocks() -> np.ndarray:
    """Objects in the first and last pixel, and some that continue from one column to the next."""
    labels = np.zeros((6, 9), np.int32)
    labels[:, 0] = 1
    labels[:, 3:5] = 2
    labels[2:4, 6] = 3
    labels[-1, -1] = 4
    return labels


def draw_far() -> np.ndarray:
    """A square, a ring and a line beyond what ImageJ holds as 16-bit integers."""
    labels = np.zeros((12, 66_000), np.int32)
    labels[2:6, 65_000:65_004] = 1
    labels[2:8, 65_010:65_020] = 2
    labels[4:6, 65_013:65_016] = 0
    labels[8:, 100:60_000] = 3
    return labels


def draw_comb() -> np.ndarray:
    """One object with more corners than a ROI of the usual kind counts."""
    labels = np.zeros((3, 70_000), np.int32)
    labels[1] = 1
    labels[0, ::2] = 1
    return labels


LABELS = {"speckles": draw_speckles, "blocks": draw_blocks, "far": draw_far, "comb": draw_comb}


@ignore_decoder
@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("kept", ["all", "some"])
def test_rois_and_coco_are_those_of_the_service(page: Page, name: str, kept: str) -> None:
    objects = divide_classes(make_objects(LABELS[name]()))
    height, width = objects.labels.shape
    columns = {"area_px": objects.areas.astype(float)}
    polygons = encode_polygons(objects, CLASSES, ((0, 0, 0),) * 3, columns)
    keep = [kept == "all" or index % 2 == 0 for index in range(objects.count)]
    kept_ids = {index + 1 for index, each in enumerate(keep) if each}

    expected = unzip(encode_rois(objects, CLASSES, 4))
    zipped = run_task(page, "writeRois", {"p": polygons}, "p", keep, CLASSES[1:], 4)
    rois = unzip(zipped)
    assert {int(each.partition(".")[0]) for each in rois.namelist()} == kept_ids
    for entry in rois.namelist():
        assert rois.read(entry) == expected.read(entry)
        roi = roifile.ImagejRoi.frombytes(rois.read(entry))
        assert (roi.name, roi.position) == (entry.removesuffix(".roi"), 5)

    size = {"width": width, "height": height}
    args = ("p", size, keep, CLASSES[1:], "ä.png")
    found = json.loads(run_task(page, "writeCoco", {"p": polygons}, *args))
    document = json.loads(encode_coco(objects, CLASSES, "ä.png"))
    document["annotations"] = [each for each in document["annotations"] if each["id"] in kept_ids]
    assert found == document
    for each in found["annotations"]:
        mask = coco_mask.decode(each["segmentation"])
        assert (mask == (objects.labels == each["id"])).all()


@pytest.mark.parametrize("kept", ["all", "some"])
def test_cutout_is_that_of_the_service(page: Page, kept: str) -> None:
    rng = np.random.default_rng(1)
    height, width = 30, 2100  # wider than a tile
    rows, columns = np.indices((height, width))
    waves = np.sin(rows / 4) * np.sin(columns / 5) + rng.normal(0, 0.05, (height, width))
    probability = np.rint(65535 / (1 + np.exp(-3 * waves))).astype(np.uint16)
    threshold = 0.6
    margin = (probability / 65535 - threshold).astype(np.float32)
    labels = (np.where(margin >= 0, 1 + columns // 700, 0)).astype(np.int32)
    objects = make_objects(labels)
    polygons = encode_polygons(objects, CLASSES, ((0, 0, 0),) * 3, {})
    keep = [True, kept == "all", True]
    mask = np.where(np.isin(labels, [1, 2, 3] if kept == "all" else [1, 3]), 255, 0).astype(
        np.uint8
    )
    picture = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    files = {
        "mask": encode_mask(np.where(labels, 255, 0).astype(np.uint8)),
        "polygons": polygons,
        "probability": encode_grey16(probability),
        "picture": encode_picture(picture),
    }
    args = ("picture", "*", None if kept == "all" else keep, threshold)
    found = decode(run_task(page, "writeCutout", files, *args)).astype(int)
    expected = cutout(picture, soften_edge(mask, margin))
    assert (np.abs(found[..., 3] - expected[..., 3]) <= 1).all()
    assert len(np.unique(expected[..., 3])) > 100
    seen = found[..., 3] > 0
    assert (found[seen, :3] == expected[seen, :3]).all()
    assert not found[~seen].any()
