"""`unet evaluate`: its data, and the mistakes it reports before it measures."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app import cli
from model.checkpoint import load_checkpoint
from tests.conftest import nuclei, write_tiny
from tests.unit.clients.fake_server import FakeServer, Reply


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, of one class and of three, and two images with masks of two classes."""
    root = tmp_path_factory.mktemp("evaluate")
    write_tiny(root / "one.safetensors")
    write_tiny(root / "three.safetensors", classes=3)
    for part in ("images", "masks"):
        (root / part).mkdir()
    for seed in range(2):
        image, labels = nuclei(64, 64, seed)
        Image.fromarray(image).save(root / f"images/{seed}.png")
        Image.fromarray((labels % 3).astype(np.uint8)).save(root / f"masks/{seed}.png")
    return root


def evaluate(folder: Path, model: str, *more: str) -> int:
    data = ["--images", str(folder / "images"), "--masks", str(folder / "masks")]
    return cli.main(["evaluate", str(folder / f"{model}.safetensors"), *data, *more])


def test_masks_of_classes_are_the_default_for_several_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert evaluate(folder, "three", "--json", str(report)) == 0
    by_default = report.read_text()
    assert evaluate(folder, "three", "--labels", "classes", "--json", str(report)) == 0
    assert report.read_text() == by_default
    assert "dice" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        (
            "three",
            ["--labels", "binary"],
            "masks of binary cannot be used for a model with 3 classes",
        ),
        ("three", ["--labels", "instances"], "masks of instances cannot be used"),
        (
            "one",
            ["--labels", "classes"],
            "masks of classes cannot be used for a model with 2 classes",
        ),
        ("one", ["--config", "model/configs/nuclei.toml"], "leave out these flags"),
        ("one", ["--part", "training"], "--part needs --config"),
        ("one", ["--record", "--url", "http://localhost:1"], "--record needs a checkpoint"),
        ("one", ["--confusion", "a.csv"], "--confusion needs a model of several classes"),
        ("one", ["--json", "/no/such/report.json"], "/no/such is not a folder"),
        ("one", ["--sheet", "/no/such/sheet.png"], "/no/such is not a folder"),
        ("one", ["--device", "foo"], "--device foo: must be auto, cpu, cuda or cuda:N"),
        ("one", ["--device", "foo", "--engine", "auto"], "--device foo: must be"),
        ("one", ["--engine", "openvino", "--precision", "fp16"], "--precision fp16"),
        ("one", ["--url", "http://localhost:1"], "localhost:1"),
        ("one", ["--url", "http://localhost:abc"], "invalid server URL 'http://localhost:abc'"),
    ],
)
def test_mistake_is_one_line_before_anything_is_measured(
    folder: Path, model: str, more: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, model, *more) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert said.err.startswith("unet: error: ")
    assert said.err.count("\n") == 1
    assert not said.out


def test_key_of_the_service_is_read_from_the_environment(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNET_KEY", "schl\u00fcssel")
    assert evaluate(folder, "one", "--url", "http://localhost:1") == 2
    assert "the API key must be" in capsys.readouterr().err


def test_refused_key_names_the_flag(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeServer() as service:
        service.respond = lambda _: Reply(401, body=b'{"detail": "send it as X-API-Key: KEY"}')
        thread = threading.Thread(target=service.serve_forever, args=(0.01,))
        thread.start()
        assert evaluate(folder, "one", "--url", service.url) == 2
        service.shutdown()
        thread.join()
    said = "unet: error: 401: the API key is missing or wrong; set --key or UNET_KEY\n"
    assert capsys.readouterr().err == said


def test_report_names_the_precision_that_auto_chose(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(folder, "three", "--engine", "openvino") == 0
    assert " by openvino on cpu in fp32\n" in capsys.readouterr().out


def test_confusion_matrix_is_a_table_and_a_picture(folder: Path, tmp_path: Path) -> None:
    assert evaluate(folder, "three", "--confusion", str(tmp_path / "a.csv")) == 0
    rows = [line.split(",") for line in (tmp_path / "a.csv").read_text().splitlines()]
    assert len(rows) == len(rows[0]) == 4
    assert sum(int(count) for row in rows[1:] for count in row[1:]) == 2 * 64 * 64
    assert evaluate(folder, "three", "--confusion", str(tmp_path / "a.png")) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 200


def test_scores_are_recorded_in_the_card(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(shutil.copy(folder / "one.safetensors", tmp_path / "mine.safetensors"))
    data = ["--images", str(folder / "images"), "--masks", str(folder / "masks")]
    assert cli.main(["evaluate", str(before), *data, "--record"]) == 0
    checkpoint = load_checkpoint(before)  # matches the manifest
    assert checkpoint.id in capsys.readouterr().out
    metrics = checkpoint.card["metrics"]
    assert metrics["images"] == 2
    assert set(metrics["uncertainty"]) == {"median", "p95"}
    original = load_checkpoint(folder / "one.safetensors")
    assert {**original.card, "metrics": metrics} == checkpoint.card
    assert all((original.state[name] == each).all() for name, each in checkpoint.state.items())


def test_ignored_value_is_in_no_score(folder: Path, tmp_path: Path) -> None:
    assert evaluate(folder, "three", "--ignore", "0", "--confusion", str(tmp_path / "a.csv")) == 0
    rows = [line.split(",") for line in (tmp_path / "a.csv").read_text().splitlines()]
    assert [int(count) for count in rows[1][1:]] == [0, 0, 0]
    assert sum(int(count) for count in rows[2][1:]) > 0


def test_sheet_of_several_classes_has_their_colors(folder: Path, tmp_path: Path) -> None:
    """A wrong class is not a hit: the label's own color is in the picture."""
    assert evaluate(folder, "three", "--sheet", str(tmp_path / "a.png")) == 0
    pixels = np.asarray(Image.open(tmp_path / "a.png")).reshape(-1, 3)
    hits = (np.abs(pixels.astype(int) - (60, 190, 90)).max(axis=1) < 40).sum()
    assert hits == 0
