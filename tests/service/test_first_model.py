"""From folders as people have them to a served mask, in three commands: train, serve, POST."""

from __future__ import annotations

import io
import shlex
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import tifffile
import torch

from app import cli
from tests import layouts
from tests.conftest import Server, decode, encode, serving

SHORT = ["--base-features", "8", "--batch-size", "2", "--stop-after", "0"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread: small networks lose much with two on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(folders: list[Path], run: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Train on folders, and return what was printed."""
    arguments = ["train", *map(str, folders), "--out", str(run), *SHORT, *flags]
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def read_environment(printed: str) -> dict[str, str]:
    """The variables in the command that the end of a run prints."""
    (line,) = (line for line in printed.splitlines() if line.startswith("serve "))
    parts = shlex.split(line.removeprefix("serve"))
    assert parts[-2:] == ["unet", "serve"]
    return dict(word.split("=", 1) for word in parts[:-2])


def segment(server: Server, image: bytes, **query: str) -> bytes:
    response = httpx.post(f"{server.url}/segment", content=image, params=query, timeout=60)
    assert response.status_code == 200, response.text
    return response.content


def compute_iou(found: np.ndarray, true: np.ndarray) -> float:
    return float((found & true).sum() / (found | true).sum())


@pytest.mark.slow
def test_stacks_as_of_isbi_become_a_served_stack_of_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "isbi", tmp_path / "run"
    layouts.write_isbi(data, 128, pages=16, test_pages=2)
    printed = train([data], run, capsys, "--steps", "100")
    assert (
        "16 pages of one file with masks, such as train-volume.tif with train-labels.tif" in printed
    )
    assert "1 without a mask are left out, such as test-volume.tif" in printed
    fields = [layouts.draw_membranes(128, seed) for seed in (100, 101)]
    with serving(**read_environment(printed)) as server:
        stack = io.BytesIO()
        tifffile.imwrite(stack, np.stack([image for image, _ in fields]))
        masks = tifffile.imread(
            io.BytesIO(segment(server, stack.getvalue(), page="all", format="tiff"))
        )
    assert masks.shape == (2, 128, 128)
    for mask, (_, labels) in zip(masks, fields, strict=True):
        # all pixels as membranes have an IoU of 0.2
        assert compute_iou(mask == 0, labels == 0) > 0.6


@pytest.mark.slow
def test_colored_masks_as_of_camvid_become_a_served_mask_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "camvid", tmp_path / "run"
    layouts.write_camvid(data, 96, 128, 24)
    folders = [data / "images", data / "labels"]
    printed = train(folders, run, capsys, "--steps", "150")
    assert "0001TP_000000.png with 0001TP_000000_L.png" in printed
    assert "the color named Void has no label" in printed
    image, classes = layouts.draw_scene(96, 128, seed=100)
    with serving(**read_environment(printed)) as server:
        (model,) = httpx.get(f"{server.url}/models").json()["models"]
        mask = decode(segment(server, encode(image)))
    names = [name for name in layouts.SCENE_CLASSES if name != "Void"]
    assert sorted(model["classes"]) == sorted(names)
    labeled = classes != 0
    scores = []
    for name in names:
        true = classes == list(layouts.SCENE_CLASSES).index(name)
        found = (mask == model["classes"].index(name)) & labeled
        scores.append(compute_iou(found, true))
    # one class everywhere has a mean of less than 0.1
    assert np.mean(scores) > 0.6, dict(zip(names, scores, strict=True))


@pytest.mark.slow
def test_photographs_as_of_carvana_become_a_served_mask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = tmp_path / "carvana", tmp_path / "run"
    layouts.write_carvana(data, 96, 144, cars=6, views=4)
    folders = [data / "train", data / "train_masks"]
    printed = train(folders, run, capsys, "--steps", "100")
    assert "00000000cdf0_01.jpg with 00000000cdf0_01_mask.gif" in printed
    assert "names that are equal up to the last _ stay together (6 groups)" in printed
    image, true = layouts.draw_car(96, 144, car=100, view=0)
    with serving("--weights-dir", str(run)) as server:  # its only model
        mask = decode(segment(server, encode(image, "JPEG", quality=92)))
    # the whole image as a car has an IoU of 0.2
    assert compute_iou(mask == 255, true == 255) > 0.75
