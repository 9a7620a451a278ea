"""Plans of folders: the same results as `sources.py` plans, one subfolder at a time."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.cli.errors import CommandError
from app.cli.segment.folder import Folder, plan_folder
from app.cli.segment.results import TABLE_NAME, Work
from app.cli.segment.sources import plan_targets
from app.cli.segment.storage import AnyPath, parse_location
from app.inference.outputs import Options, Output


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def work(*outputs: Output, all_pages: bool = False, skip_existing: bool = False) -> Work:
    return Work(Options(outputs or (Output.MASK,)), all_pages, skip_existing)


def plan(source: AnyPath, out: AnyPath, of: Work, table: str | None = None) -> dict[str, bool]:
    """Name -> done."""
    planned = plan_folder(Folder(source, out), of, table)
    return {image.name: image.done for image in planned}


NAMES = (
    "in/b.png",
    "in/a/x.ome.tif",
    "in/a/deep/scan.001.png",
    "in/A.JPG",
    "in/.hidden.png",
    "in/.git/y.png",
    "in/notes.txt",
)


@pytest.mark.parametrize("out", ["out", "in/masks", "."])
def test_images_and_results_are_those_of_a_plan_in_memory(out: str) -> None:
    touch(*NAMES, "in/masks/old.png")
    if out != "in/masks":
        Path("in/masks/old.png").unlink()
    targets = plan_targets([Path("in")], Path(out), [".png"])
    folder = Folder(Path("in"), Path(out))
    planned = [folder.target(name) for name in plan(Path("in"), Path(out), work())]
    assert sorted(planned, key=lambda target: target.name) == sorted(
        targets, key=lambda target: target.name
    )
    assert len(planned) == 4


def test_names_that_are_not_utf_8_are_planned() -> None:
    name = os.fsdecode(b"\xff.png")
    touch(f"in/{name}")
    assert plan(Path("in"), Path("out"), work()) == {name: False}


def test_addresses_are_planned_like_paths() -> None:
    source, out = parse_location("memory://plan/in"), parse_location("memory://plan/out")
    for name in NAMES:
        (source.parent / name).fs.pipe_file((source.parent / name).path, b"")
    assert plan(source, out, work()).keys() == {
        "b.png",
        "A.JPG",
        "a/x.ome.tif",
        "a/deep/scan.001.png",
    }
    target = Folder(source, out).target("a/x.ome.tif")
    assert str(target.locate(".png")) == "memory://plan/out/a/x.png"
    assert str(target.image) == "memory://plan/in/a/x.ome.tif"


def test_only_images_with_all_results_are_done() -> None:
    outputs = (Output.MASK, Output.POLYGONS)
    touch("in/a.png", "in/b.png", "out/a.png", "out/a.geojson", "out/b.png")
    resumed = work(*outputs, skip_existing=True)
    assert plan(Path("in"), Path("out"), resumed) == {"a.png": True, "b.png": False}
    again = work(*outputs)
    assert plan(Path("in"), Path("out"), again) == {"a.png": False, "b.png": False}


def test_a_file_of_several_pages_is_not_done_before_its_pages_are_counted() -> None:
    touch("in/a.tif", "out/a.png")
    resumed = work(all_pages=True, skip_existing=True)
    assert plan(Path("in"), Path("out"), resumed) == {"a.tif": False}


def test_two_images_with_the_same_result_are_a_mistake() -> None:
    touch("in/x/a.png", "in/x/a.jpg", "in/y/a.png")
    with pytest.raises(CommandError, match=r"both become x/a\.png; use --keep-suffix"):
        plan(Path("in"), Path("out"), work())


def test_an_image_that_is_named_like_a_page_of_another_is_a_mistake() -> None:
    touch("in/a.tif", "in/a-page0.png", "in/b-page1.png")
    assert len(plan(Path("in"), Path("out"), work())) == 3
    with pytest.raises(CommandError, match=r"a-page0\.png may be those of a page of a\.tif"):
        plan(Path("in"), Path("out"), work(all_pages=True))


@pytest.mark.parametrize(
    ("out", "names"), [("in", ["in/a.png"]), (".", ["in/in/a.png", "in/a.png"])]
)
def test_results_never_replace_images(out: str, names: list[str]) -> None:
    touch(*names)
    with pytest.raises(CommandError, match=r"would replace the image .*a\.png"):
        plan(Path("in"), Path(out), work())


def test_results_in_a_folder_of_the_images_are_replaced() -> None:
    touch("in/a.png", "in/out/a.png")
    assert plan(Path("in"), Path("in/out"), work()) == {"a.png": False}


def test_the_table_never_replaces_a_result() -> None:
    touch("in/measurements.png", "in/x/measurements.png")
    with pytest.raises(CommandError, match=r"would both become measurements\.csv"):
        plan(Path("in"), Path("out"), work(Output.MEASUREMENTS), TABLE_NAME)


def test_a_missing_folder_is_a_mistake() -> None:
    with pytest.raises(CommandError, match="nowhere cannot be read: No such file"):
        plan(Path("nowhere"), Path("out"), work())
    with pytest.raises(CommandError, match="nowhere cannot be read"):
        plan(parse_location("memory://nowhere"), Path("out"), work())
