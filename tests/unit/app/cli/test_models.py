"""`unet models`: which checkpoints it lists."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import cli


def test_models_are_those_that_would_be_served(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNET_WEIGHTS_DIR", str(tiny))
    assert cli.main(["models"]) == 0
    (listed,) = capsys.readouterr().out.splitlines()
    assert listed.startswith("nuclei ")
    for path in (tiny, tiny / "nuclei.safetensors"):
        assert cli.main(["models", str(path)]) == 0
        assert capsys.readouterr().out.splitlines() == [listed]


def test_models_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNET_WEIGHTS_DIR", raising=False)
    for arguments, says in (
        (["/no/such"], "/no/such does not exist"),
        ([str(tmp_path)], f"{tmp_path} holds no .safetensors files"),
        ([], f"UNET_WEIGHTS_DIR='weights': there is no folder {tmp_path}/weights; set UNET_W"),
    ):
        assert cli.main(["models", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
