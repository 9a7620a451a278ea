"""`unet segment`: its results, its messages, and its end."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from app import cli
from app.cli import segment as local
from app.errors import GoldenMaskMismatch, OutOfMemory
from app.inference.service import Service
from tests.conftest import decode, encode, nuclei


@pytest.fixture(autouse=True)
def _here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNET_WEIGHTS_DIR", str(tiny))
    monkeypatch.setenv("UNET_THREADS", "1")


@pytest.fixture
def images() -> Path:
    folder = Path("in")
    folder.mkdir()
    for seed in range(5):
        (folder / f"{seed}.png").write_bytes(encode(nuclei(60, 70, seed)[0]))
    return folder


def written(folder: str = "out") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def test_failure_of_one_image_does_not_stop_the_others(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out/2.png/full").mkdir(parents=True)
    (images / "3.png").write_bytes(b"not an image")
    (images / "4.png").unlink()
    (images / "4.png").symlink_to("nowhere")
    assert cli.main(["segment", "in", "-o", "out"]) == 1
    assert written() == ["0.png", "1.png", "2.png", "2.png/full"]
    *failures, last = capsys.readouterr().err.splitlines()
    unwritten, no_image, unread = sorted(failures)
    assert unwritten == "unet: in/2.png: out/2.png cannot be written: Is a directory"
    assert no_image.startswith("unet: in/3.png: not a recognised image (12 bytes)")
    assert unread == "unet: in/4.png: No such file or directory"
    assert last == "2 written to out/, 3 failed"


def test_bug_is_raised_and_the_service_is_stopped(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_stop: list[tuple[int, float]] = []
    stop = Service.stop

    async def record_stop(self: Service) -> None:
        at_stop.append((self.batcher.statistics().reserved, self.batcher.elapsed()))
        await stop(self)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Service, "stop", record_stop)
    monkeypatch.setattr(local, "write_atomically", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["segment", str(images), "-o", "out"])
    assert at_stop == [(0, 0.0)]


@pytest.mark.parametrize("error", [OutOfMemory("no memory"), GoldenMaskMismatch("IoU 0.1")])
def test_model_that_cannot_be_used_is_one_line(
    error: Exception,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def fail(self: Service) -> None:
        raise error

    monkeypatch.setattr(Service, "start_without_probes", fail)
    assert cli.main(["segment", str(images), "-o", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unet: error: ")
    assert str(error) in line


def test_misspelt_variable_is_reported(
    images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("UNET_THREDS", "1")
    assert cli.main(["segment", "in/0.png", "-o", "out", "--weights-dir", "no/such"]) == 2
    assert "UNET_THREDS is ignored (did you mean UNET_THREADS?)" in caplog.text


def test_skip_existing_resumes_a_run(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["segment", "in/0.png", "-o", "out"]) == 0
    assert capsys.readouterr().err == "1 written to out/\n"
    Path("out/0.png").write_bytes(b"of before")
    for expected in ("4 written to out/, 1 skipped\n", "0 written to out/, 5 skipped\n"):
        assert cli.main(["segment", "in", "-o", "out", "--skip-existing"]) == 0
        assert capsys.readouterr().err == expected
        assert Path("out/0.png").read_bytes() == b"of before"
        assert len(written()) == 5


def test_one_image_is_written_to_one_file(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["segment", "in/0.png", "-o", "deep/mask.png"]) == 0
    assert decode(Path("deep/mask.png").read_bytes()).shape == (60, 70)
    assert capsys.readouterr().err == "1 written to deep/mask.png\n"
    for name in ("cells.json", "cells.geojson"):
        assert cli.main(["segment", "in/0.png", "-o", name, "--output", "polygons"]) == 0
        assert json.loads(Path(name).read_text())["type"] == "FeatureCollection"


def test_image_is_read_from_stdin_and_written_to_stdout(
    images: Path, capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = io.TextIOWrapper(io.BytesIO((images / "0.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", sent)
    assert cli.main(["segment", "-", "-o", "-"]) == 0
    out, err = capsysbinary.readouterr()
    assert decode(out).shape == (60, 70)
    assert err == b""


def test_mistake_is_one_line_before_a_model_is_loaded(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "Service", None)
    Path("note.txt").touch()
    for arguments, says in (
        (["no/such.png"], "no/such.png does not exist"),
        ([f"{'x' * 300}.png"], "cannot be read: File name too long"),
        (["in", "-o", "x" * 300], "cannot be written: File name too long"),
        (["in", "-o", "note.txt"], "note.txt is a file"),
        (["in", "-o", "mask.png"], "--out mask.png is one file"),
        (["in", "in/0.png", "-o", "in"], "would replace the image"),
        (
            ["in", "--weights-dir", "no/such"],
            f"folder {Path.cwd()}/no/such not found; set UNET_WEIGHTS",
        ),
    ):
        assert cli.main(["segment", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    assert not Path("masks").exists()


def write_stack(path: Path, pages: int) -> None:
    path.parent.mkdir(exist_ok=True)
    planes = np.stack([nuclei(60, 70, seed)[0] for seed in range(pages)])
    tifffile.imwrite(path, planes, photometric="minisblack")


def test_each_page_of_a_stack_has_a_mask_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    write_stack(Path("in/a.tif"), 3)
    Path("in/b.png").write_bytes(encode(nuclei(60, 70)[0]))
    assert cli.main(["segment", "in", "-o", "out"]) == 1
    assert "in/a.tif: the image has 3 pages: send page=0 to page=2" in capsys.readouterr().err
    assert written() == ["b.png"]
    assert cli.main(["segment", "in", "-o", "out", "--page", "all"]) == 0
    assert written() == ["a-page0.png", "a-page1.png", "a-page2.png", "b.png"]
    assert cli.main(["segment", "in/a.tif", "-o", "one.png", "--page", "2"]) == 0
    assert Path("one.png").read_bytes() == Path("out/a-page2.png").read_bytes()
    Path("out/a-page1.png").unlink()
    Path("out/b.png").write_bytes(b"kept")
    assert cli.main(["segment", "in", "-o", "out", "--page", "all", "--skip-existing"]) == 0
    assert written() == ["a-page0.png", "a-page1.png", "a-page2.png", "b.png"]
    assert Path("out/b.png").read_bytes() == b"kept"


def test_a_channel_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    planes = np.stack([np.zeros((60, 70), np.uint8), nuclei(60, 70)[0]])
    tifffile.imwrite("a.tif", planes, imagej=True)
    assert cli.main(["segment", "a.tif", "-o", "a.png"]) == 1
    assert "has 2 channels: send channel=0 to channel=1" in capsys.readouterr().err
    assert cli.main(["segment", "a.tif", "-o", "a.png", "--channel", "1"]) == 0
    for flag, value in (("--channel", "-1"), ("--page", "x")):
        with pytest.raises(SystemExit):
            cli.main(["segment", "a.tif", f"{flag}={value}"])
