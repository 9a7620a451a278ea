"""`unet segment --server` with the real service: the same files as without it."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from app import cli
from app.inference.outputs import Output
from tests.conftest import Server, encode, nuclei, serving


@pytest.fixture(scope="module")
def tiny_server(tiny: Path) -> Iterator[Server]:
    with serving(UNET_WEIGHTS_DIR=str(tiny), UNET_API_KEYS="secret", UNET_THREADS="1") as running:
        yield running


@pytest.fixture(autouse=True)
def _here(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNET_WEIGHTS_DIR", str(tiny))
    monkeypatch.setenv("UNET_THREADS", "1")
    Path("in/deep").mkdir(parents=True)
    for name in ("a.png", "deep/Zelle ä.001.png"):
        Path("in", name).write_bytes(encode(nuclei(60, 70, len(name))[0]))
    stack = np.stack([nuclei(60, 70, seed)[0] for seed in range(3)])
    axes = {"axes": "ZYX"}
    tifffile.imwrite("in/stack.ome.tif", stack, photometric="minisblack", metadata=axes)


def read_files(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def unzip(content: bytes) -> bytes | dict[str, bytes]:
    """The files of a zip, without the time of its making; other content as it is."""
    if not content.startswith(b"PK"):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def outputs(*names: str) -> list[str]:
    return [word for name in names for word in ("--output", name)]


def count_requests(running: Server) -> int:
    """Number of requests for masks in the log, once it stops growing."""
    count = -1
    while count != (now := sum("POST /segment" in line for line in running.lines)):
        count = now
        time.sleep(0.2)
    return count


TIFF = ("--format", "tiff")


@pytest.mark.parametrize(
    "flags",
    [
        [*outputs("mask"), "--page", "all"],
        [*outputs("mask", "instances", "measurements", "coco", "rois"), "--page", "all"],
        [*outputs("mask", "overlay", "rois", "measurements"), "--page", "all", *TIFF],
        [*outputs("instances"), "--page", "all", *TIFF],
        [*outputs(*Output), "--page", "0", "--min-area", "5", "--pixel-size", "0.5"],
    ],
    ids=["one output", "several outputs", "stacks and documents", "stacks", "every output"],
)
def test_results_are_those_without_a_server(
    tiny_server: Server, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--threshold", "0.01"]
    images = ["in"] if "all" in flags else ["in/stack.ome.tif"]
    service = ["--server", tiny_server.url, "--key", "secret"]
    assert cli.main(["segment", *images, "-o", "here", *flags]) == 0
    assert cli.main(["segment", *images, "-o", "there", *flags, *service]) == 0
    here, there = read_files("here"), read_files("there")
    assert here.keys() == there.keys()
    assert any(name.startswith("deep/Zelle ä.001") for name in here) == (images == ["in"])
    for name, content in here.items():
        assert unzip(there[name]) == unzip(content), name
    capsys.readouterr()
    assert cli.main(["segment", *images, "-o", "there", *flags, *service, "--skip-existing"]) == 0
    count = 3 if images == ["in"] else 1
    assert capsys.readouterr().err == f"0 written to there/, {count} skipped\n"
    assert read_files("there") == there


def test_only_incomplete_results_are_requested_again(
    tiny_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["segment", "in", "-o", "out", "--page", "all", "--server", tiny_server.url]
    assert cli.main([*arguments, "--key", "secret"]) == 0
    Path("out/stack-page1.png").unlink()
    before = count_requests(tiny_server)
    capsys.readouterr()
    assert cli.main([*arguments, "--key", "secret", "--skip-existing"]) == 0
    assert capsys.readouterr().err == "1 written to out/, 2 skipped\n"
    assert Path("out/stack-page1.png").is_file()
    assert count_requests(tiny_server) - before == 1


def test_mistakes_are_one_line(tiny_server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["segment", "in/a.png", "-o", "out", "--server", tiny_server.url]
    assert cli.main(arguments) == 2
    assert "401" in capsys.readouterr().err
    assert cli.main([*arguments, "--key", "secret", "--percentiles", "1,99"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unet: error: --percentiles 1,99 is only available for models")
    assert cli.main(["segment", "in/stack.ome.tif", *arguments[2:], "--key", "secret"]) == 1
    assert "the image has 3 pages; choose --page 0 to --page 2" in capsys.readouterr().err
    piped = ["in/stack.ome.tif", "-o", "-", *arguments[4:], "--key", "secret", "--page", "all"]
    assert cli.main(["segment", *piped]) == 1
    assert "their results need a folder" in capsys.readouterr().err
