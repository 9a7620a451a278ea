"""`unet models`: which checkpoints it lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from app import cli


def test_listed_models_are_the_served_ones(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNET_WEIGHTS_DIR", str(tiny))
    assert cli.main(["models"]) == 0
    (listed,) = capsys.readouterr().out.splitlines()
    assert listed.startswith("nuclei ")
    for arguments in (
        [str(tiny)],
        [str(tiny / "nuclei.safetensors")],
        ["--weights-dir", str(tiny)],
    ):
        assert cli.main(["models", *arguments]) == 0
        assert capsys.readouterr().out.splitlines() == [listed]


def test_missing_models_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNET_WEIGHTS_DIR", raising=False)
    for arguments, says in (
        (["/no/such"], "/no/such does not exist"),
        (["x" * 300], "cannot be read: File name too long"),
        ([str(tmp_path)], f"{tmp_path} holds no .safetensors files"),
        ([], f"UNET_WEIGHTS_DIR='weights': folder {tmp_path}/weights not found; set UNET_W"),
    ):
        assert cli.main(["models", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_damaged_checkpoint_is_listed_with_status_1(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "good.safetensors").write_bytes((tiny / "nuclei.safetensors").read_bytes())
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert cli.main(["models", str(tmp_path)]) == 1
    bad, good = capsys.readouterr().out.splitlines()
    assert bad.startswith("bad          damaged: ")
    assert good.startswith("good ")
    assert cli.main(["models", str(tmp_path), "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["name"], second["name"]) == ("bad", "good")
    assert second["architecture"]["in_channels"] == 3
