"""docs/data/prepare.py brings the public data sets into the layout of the recipes."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy.io import savemat

from tests.conftest import ROOT


def load_script() -> Any:
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "docs/data/prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


prepare = load_script()


def read(path: Path) -> npt.NDArray[Any]:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for short tables of images, instead of those in docs/data."""
    folder = tmp_path / "tables"
    folder.mkdir()
    monkeypatch.setattr(prepare, "HERE", folder)
    return folder


def test_nuclei_masks_become_one_label_map(tmp_path: Path, tables: Path) -> None:
    (tables / "nuclei.csv").write_text("id,field\n0123456789abcdef,7\n")
    folder = tmp_path / "source/stage1_train" / ("0123456789abcdef" + 48 * "0")
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    opaque = np.full((3, 4), 255, np.uint8)
    masks = np.zeros((2, 3, 4), np.uint8)
    masks[0, 0, :2] = masks[1, 2, 1:] = 255
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    Image.fromarray(np.dstack([grey, grey, grey, opaque])).save(folder / "images/all.png")
    for name, mask in zip("ab", masks, strict=True):
        Image.fromarray(mask).save(folder / f"masks/{name}.png")

    assert prepare.prepare_nuclei(tmp_path / "source", tmp_path / "out") == 1

    image = read(tmp_path / "out/images/0123456789abcdef.png")
    assert image.shape == (3, 4)
    assert (image == grey).all()
    labels = read(tmp_path / "out/labels/0123456789abcdef.png")
    assert labels.tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 2, 2, 2]]
    rows = list(csv.DictReader((tmp_path / "out/index.csv").read_text().splitlines()))
    assert rows == [{"id": "0123456789abcdef", "field": "7"}]


def test_person_is_scaled_and_binarized(tmp_path: Path, tables: Path) -> None:
    (tables / "person.csv").write_text("id,part\n0001,training\n0004,validation\n")
    source = tmp_path / "source"
    (source / "photos").mkdir(parents=True)
    (source / "annotations/pixel-level").mkdir(parents=True)
    annotation = np.zeros((768, 512), np.uint8)
    annotation[:384] = 30
    for name in ("0001", "0004"):
        Image.new("RGB", (512, 768), "red").save(source / f"photos/{name}.jpg")
        savemat(source / f"annotations/pixel-level/{name}.mat", {"groundtruth": annotation})

    assert prepare.prepare_person(source, tmp_path / "out") == 2

    assert read(tmp_path / "out/images/0004.jpg").shape == (384, 256, 3)
    mask = read(tmp_path / "out/masks/0004.png")
    assert mask.shape == (384, 256)
    assert (mask[:192] == 255).all()
    assert not mask[192:].any()
    assert (tmp_path / "out/val.txt").read_text() == "0004\n"


def test_missing_image_is_named(tmp_path: Path, tables: Path) -> None:
    (tables / "nuclei.csv").write_text("id,field\n0123456789abcdef,7\n")
    (tmp_path / "stage1_train").mkdir()
    with pytest.raises(FileNotFoundError, match="0123456789abcdef"):
        prepare.prepare_nuclei(tmp_path, tmp_path / "out")
