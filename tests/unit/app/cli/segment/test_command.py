"""`unet segment`: its results, its messages, and its end."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from app import cli
from app.api.schemas import SegmentQuery
from app.cli.segment import command, local, storage
from app.errors import CorruptImage, GoldenMaskMismatch, OutOfMemory
from app.inference.outputs import FileFormat, Options, Output
from app.inference.segmenter import Segmenter
from app.inference.service import Service
from tests.conftest import decode, encode, nuclei, write_tiny


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


@pytest.mark.parametrize("page", [[], ["--page", "all"]])
def test_empty_file_is_named_as_the_service_names_it(
    images: Path, page: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "3.png").write_bytes(b"")
    assert cli.main(["segment", "in/3.png", "-o", "out", *page]) == 1
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("unet: in/3.png: empty file (0 bytes); send JPEG, PNG, ")


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
    monkeypatch.setattr(storage, "write_atomically", fail)
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
    stack = np.stack([nuclei(60, 70, seed)[0] for seed in range(pages)])
    path.parent.mkdir(exist_ok=True)
    tifffile.imwrite(path, stack, photometric="minisblack")


ALL_OBJECTS = ("--threshold", "0.01")
"""The untrained network finds objects with it."""


def segment(*arguments: str) -> int:
    outputs = [
        word for output in arguments if output in list(Output) for word in ("--output", output)
    ]
    return cli.main(
        ["segment", *(each for each in arguments if each not in list(Output)), *outputs]
    )


def read_rows(path: str = "out/measurements.csv") -> list[dict[str, str]]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def inferences(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options of each image that the network ran for."""
    ran: list[Options] = []
    original = Segmenter.segment

    async def record(self: Segmenter, model: Any, data: bytes, options: Options, *rest: Any) -> Any:
        ran.append(options)
        return await original(self, model, data, options, *rest)

    monkeypatch.setattr(Segmenter, "segment", record)
    return ran


def test_every_flag_of_the_query_exists() -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = {action.dest.rpartition(".")[2] for action in parser._actions}
    assert SegmentQuery.model_fields.keys() <= flags


def test_several_outputs_come_from_one_inference_and_are_named_as_in_a_zip(
    images: Path, inferences: list[Options]
) -> None:
    assert segment("in/0.png", "-o", "out", *Output) == 0
    assert len(inferences) == 1
    pictures = [output for output in Output if output.is_picture]
    assert written() == sorted(
        [f"0-{output}.png" for output in pictures]
        + ["0.geojson", "0.json", "0.zip", "0.csv", "measurements.csv"]
    )
    assert json.loads(Path("out/0.json").read_text())["images"][0]["file_name"] == "0.png"


def test_flags_reach_the_outputs(images: Path, inferences: list[Options]) -> None:
    flags = "--format webp --min-area 7 --exclude-edges --pixel-size 0.5"
    more = "--background 10ff00 --channel 0 --threshold 0.25 --page 0"
    assert segment("in/0.png", "-o", "out", "cutout", *flags.split(), *more.split()) == 0
    assert inferences == [
        Options(
            (Output.CUTOUT,),
            threshold=0.25,
            page=0,
            channel=0,
            min_area=7,
            exclude_edges=True,
            pixel_size=0.5,
            background=(16, 255, 0),
            format=FileFormat.WEBP,
            name="0.png",
        )
    ]
    with Image.open("out/0.webp") as picture:
        assert picture.size == (70, 60)


def test_table_has_the_objects_of_all_images(images: Path) -> None:
    (images / "deep").mkdir()
    (images / "4.png").rename(images / "deep/4.png")
    Path(images / "3.png").write_bytes(encode(np.dstack([nuclei(60, 70, 3)[0]] * 3)))
    Path(images / "2.png").write_bytes(encode(np.zeros((60, 70), np.uint8)))
    assert segment("in", "-o", "out", "measurements", *ALL_OBJECTS) == 0
    rows = read_rows()
    assert list(dict.fromkeys(row["image"] for row in rows)) == [
        *("0.png", "1.png", "2.png", "3.png", "deep/4.png"),
    ]
    for row in rows:
        assert (row["mean_intensity_3"] != "") == (row["image"] == "3.png")
    single = [row for row in rows if row["image"] == "deep/4.png"]
    expected = read_rows("out/deep/4.csv")
    assert [{name: row[name] for name in expected[0]} for row in single] == expected


@pytest.mark.slow
def test_resumed_run_completes_the_table(
    images: Path, inferences: list[Options], capsys: pytest.CaptureFixture[str]
) -> None:
    assert segment("in/0.png", "-o", "out", "measurements", "mask", *ALL_OBJECTS) == 0
    first = read_rows()
    assert first
    (images / "3.png").write_bytes(b"not an image")
    Path("out/1.png").write_bytes(b"one of two")
    assert segment("in", "-o", "out", "measurements", "mask", *ALL_OBJECTS, "--skip-existing") == 1
    assert len(inferences) == 5
    assert capsys.readouterr().err.splitlines()[-1] == "3 written to out/, 1 skipped, 1 failed"
    rows = read_rows()
    assert rows[: len(first)] == first
    assert "3.png" not in {row["image"] for row in rows}
    assert segment("in", "-o", "out", "measurements", "mask", *ALL_OBJECTS, "--skip-existing") == 1
    assert read_rows() == rows


@pytest.mark.slow
def test_table_is_not_the_result_of_an_image(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "0.png").rename(images / "measurements.png")
    assert segment("in", "-o", "out", "measurements") == 2
    assert "in/measurements.png and the table of all images" in capsys.readouterr().err
    assert segment("in", "-o", "out", "measurements", "--keep-suffix", *ALL_OBJECTS) == 0
    assert len({row["image"] for row in read_rows()}) == 5


@pytest.mark.slow
def test_pages_have_results_of_their_own(images: Path, inferences: list[Options]) -> None:
    write_stack(images / "s.tif", 3)
    assert (
        segment(
            *("in/s.tif", "in/0.png", "-o", "out", "mask", "measurements", "--page", "all"),
            *ALL_OBJECTS,
        )
        == 0
    )
    pages = [f"s-page{page}.{suffix}" for page in range(3) for suffix in ("csv", "png")]
    assert written() == sorted(["0.csv", "0.png", "measurements.csv", *pages])
    assert len(inferences) == 4
    rows = read_rows()
    assert {(row["image"], row["page"]) for row in rows} == {
        ("s.tif", "0"), ("s.tif", "1"), ("s.tif", "2"), ("0.png", "0"),
    }  # fmt: skip


@pytest.mark.slow
def test_missing_pages_alone_are_segmented_again(
    images: Path, inferences: list[Options], capsys: pytest.CaptureFixture[str]
) -> None:
    write_stack(images / "s.tif", 3)
    arguments = ["in/s.tif", "-o", "out", "mask", "--page", "all", "--skip-existing"]
    assert segment(*arguments) == 0
    Path("out/s-page1.png").unlink()
    capsys.readouterr()
    assert segment(*arguments) == 0
    assert [options.page for options in inferences] == [0, 1, 2, 1]
    assert segment(*arguments) == 0
    assert capsys.readouterr().err == "1 written to out/\n0 written to out/, 1 skipped\n"


@pytest.mark.slow
def test_stack_becomes_one_tiff_with_documents_by_page(
    images: Path, inferences: list[Options]
) -> None:
    write_stack(images / "s.tif", 3)
    arguments = ["in/s.tif", "-o", "out", "mask", "instances", "polygons", "--page", "all"]
    assert segment(*arguments, "--format", "tiff") == 0
    assert len(inferences) == 3
    documents = [f"s-page{page}.geojson" for page in range(3)]
    assert written() == sorted(["s-mask.tiff", "s-instances.tiff", *documents])
    for name in ("mask", "instances"):
        assert tifffile.imread(f"out/s-{name}.tiff").shape == (3, 60, 70)
    assert segment(*arguments, "--format", "tiff", "--skip-existing") == 0
    assert len(inferences) == 3
    assert segment("in/s.tif", "-o", "one.tif", "--page", "all", "--format", "tiff") == 0
    assert tifffile.imread("one.tif").shape == (3, 60, 70)


@pytest.mark.slow
def test_page_never_replaces_the_result_of_another_image(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stack(images / "s.tif", 2)
    (images / "0.png").rename(images / "s-page1.png")
    arguments = ["in/s-page1.png", "in/s.tif", "-o", "out", "--page", "all"]
    assert segment(*arguments) == 1
    assert "out/s-page1.png is already the result of in/s-page1.png" in capsys.readouterr().err
    assert decode(Path("out/s-page1.png").read_bytes()).shape == (60, 70)
    assert segment("in/s.tif", "in/s-page1.png", "-o", "in", "--page", "all", "overlay") == 2
    assert "would replace the image" in capsys.readouterr().err
    image = (images / "1.png").rename(images / "s-page1-mask.png")
    before = image.read_bytes()
    arguments = ["in/s.tif", str(image), "-o", "in", "--page", "all", "mask", "overlay"]
    assert segment(*arguments) == 1
    assert "in/s.tif: its result would replace the image in/s-page1-mask.png" in (
        capsys.readouterr().err
    )
    assert image.read_bytes() == before


def test_failed_page_does_not_stop_the_others(
    images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stack(images / "s.tif", 3)
    original = Segmenter.segment

    async def fail_page(
        self: Segmenter, model: Any, data: bytes, options: Options, *rest: Any
    ) -> Any:
        if options.page == 1:
            raise CorruptImage("damaged")
        return await original(self, model, data, options, *rest)

    monkeypatch.setattr(Segmenter, "segment", fail_page)
    assert segment("in/s.tif", "-o", "out", "--page", "all") == 1
    assert written() == ["s-page0.png", "s-page2.png"]
    assert capsys.readouterr().err.splitlines()[0] == "unet: in/s.tif: page 1: damaged"
    assert segment("in/s.tif", "-o", "out", "--page", "all", "--format", "tiff") == 1
    assert written() == ["s-page0.png", "s-page2.png"]


def test_flags_that_do_not_fit_are_one_line_before_a_model_is_loaded(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "Service", None)
    for arguments, says in (
        (["mask", "mask"], "--output mask is given twice"),
        (["--format", "webp"], "--format webp is only available for overlay, cutout, preview"),
        (["polygons", "--format", "tiff"], "--format tiff is only available for pictures"),
        (["--background", "ffffff"], "--background ffffff is only available with --output cutout"),
        (["mask", "coco", "-o", "a.png"], "--out a.png is one file; 2 outputs need a folder"),
        (["mask", "-o", "a.tif"], "--out a.tif: the output is a .png file"),
        (["--server", "http://localhost:1", "--device", "cpu"], "--device does not apply"),
        (["--actors", "2"], "--actors needs --ray"),
        (["-o", "memory://masks"], "memory://masks is an address, which needs --ray"),
        (["--ray", "auto"], "--ray segments one folder"),
        (["--ray", "auto", "--server", "http://localhost:1"], "--ray and --server are two ways"),
    ):
        assert segment("in/0.png", *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
    for flag, value in (
        ("--percentiles", "3,1"),
        ("--percentiles", "1"),
        ("--percentiles", "nan,5"),
        ("--pixel-size", "0"),
        ("--pixel-size", "inf"),
        ("--background", "fff"),
        ("--min-area", "-1"),
        ("--page", "-1"),
        ("--page", "every"),
        ("--concurrency", "0"),
        ("--timeout", "0"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["segment", "in/0.png", f"{flag}={value}"])
        assert f"argument {flag}: {value!r} is not" in capsys.readouterr().err


def test_ray_that_is_not_installed_is_one_line(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "app.cli.segment.ray_driver", raising=False)
    assert segment(str(images), "--ray", "auto") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--ray needs pip install 'unet-server[ray]'" in line


def test_model_that_cannot_do_the_work_is_one_line(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("several").mkdir()
    write_tiny(tmp_path / "several/nuclei.safetensors", classes=3)
    monkeypatch.setenv("UNET_WEIGHTS_DIR", str(tmp_path / "several"))
    assert segment("in", "-o", "out", "instances") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("unet: error: --output instances is only available for binary models")


def test_a_channel_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    planes = np.stack([np.zeros((60, 70), np.uint8), nuclei(60, 70)[0]])
    tifffile.imwrite("a.tif", planes, imagej=True)
    assert cli.main(["segment", "a.tif", "-o", "a.png"]) == 1
    assert "has 2 channels; choose --channel 0 to --channel 1" in capsys.readouterr().err
    assert cli.main(["segment", "a.tif", "-o", "a.png", "--channel", "1"]) == 0
    for flag, value in (("--channel", "-1"), ("--page", "x")):
        with pytest.raises(SystemExit):
            cli.main(["segment", "a.tif", f"{flag}={value}"])
