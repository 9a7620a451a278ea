"""Which images `unet segment` segments, and where the results go."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.errors import CommandError
from app.cli.segment.sources import STANDARD, plan_targets

PNG = (".png",)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def plan(*paths: str, out: str = "out", keep_suffix: bool = False) -> dict[str, str]:
    images = [Path(path) for path in paths]
    targets = plan_targets(images, Path(out), PNG, keep_suffix=keep_suffix)
    return {str(target.locate(".png")): str(target.image) for target in targets}


def touch(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def error_of(*paths: str, out: str = "out", keep_suffix: bool = False) -> str:
    with pytest.raises(CommandError) as error:
        plan(*paths, out=out, keep_suffix=keep_suffix)
    (line,) = str(error.value).splitlines()
    assert not Path("out").exists()
    return line


def test_keep_suffix_separates_images_with_equal_names() -> None:
    touch("in/a.png", "in/a.jpg")
    assert "--keep-suffix" in error_of("in")
    assert plan("in", keep_suffix=True) == {
        "out/a.jpg.png": "in/a.jpg",
        "out/a.png.png": "in/a.png",
    }


def test_colliding_folders_get_subfolders() -> None:
    touch("x/1.png", "x/deep/2.png", "y/1.png", "z/2.png", "u/x/1.png", "3.png")
    assert set(plan("x", "z")) == {"out/1.png", "out/deep/2.png", "out/2.png"}
    assert plan("x", "y", "3.png") == {
        "out/x/1.png": "x/1.png",
        "out/x/deep/2.png": "x/deep/2.png",
        "out/y/1.png": "y/1.png",
        "out/3.png": "3.png",
    }
    for paths in (("x", "u/x"), ("x/1.png", "y/1.png")):
        assert "would both become" in (line := error_of(*paths))
        assert "give each its own --out" in line


def test_image_given_twice_is_segmented_once() -> None:
    touch("in/a.png", "in/b/c.png")
    here = str(Path.cwd())
    masks = {"out/a.png": "in/a.png", "out/b/c.png": "in/b/c.png"}
    assert plan("in", "in/a.png", f"{here}/in/a.png", "in/../in/a.png", "in/b", "in") == masks
    Path("in/link.png").symlink_to("a.png")
    assert set(plan("in")) == {*masks, "out/link.png"}


def test_only_image_suffixes_are_replaced() -> None:
    touch("scan.001", "scan.002", "b.v2.TIF", "c.ome.tif")
    assert set(plan("scan.001", "scan.002", "b.v2.TIF", "c.ome.tif")) == {
        "out/scan.001.png",
        "out/scan.002.png",
        "out/b.v2.png",
        "out/c.png",
    }


def test_folder_with_an_image_suffix_is_searched() -> None:
    touch("in/scan.tif/a.png", "in/.hidden/b.png")
    assert plan("in") == {"out/scan.tif/a.png": "in/scan.tif/a.png"}


def test_missing_path_is_named() -> None:
    touch("a.png")
    assert error_of("a.png", "no/such.png") == "no/such.png does not exist"
    Path("empty").mkdir()
    assert error_of("empty") == "no images in empty"


def test_one_image_can_name_its_output_file() -> None:
    touch("in/a.jpg", "in/b.jpg", "note.txt", "there.png")
    assert plan("in/a.jpg", out="new/mask.png") == {"new/mask.png": "in/a.jpg"}
    assert plan("in/a.jpg", out="there.png") == {"there.png": "in/a.jpg"}
    Path("folder.png").mkdir()
    assert plan("in/a.jpg", out="folder.png") == {"folder.png/a.png": "in/a.jpg"}
    for out in ("mask.png", "there.png", "-"):
        assert error_of("in", out=out) == f"--out {out} is one file; 2 images need a folder"
    assert error_of("in/a.jpg", out="mask.tif") == "--out mask.tif: the output is a .png file"
    for images in ("in", "in/a.jpg"):
        assert "note.txt is a file" in error_of(images, out="note.txt")
        assert "note.txt is a file" in error_of(images, out="note.txt/deeper")


def test_several_outputs_need_a_folder() -> None:
    touch("a.jpg")
    endings = ("-mask.png", "-overlay.png", ".csv")
    (target,) = plan_targets([Path("a.jpg")], Path("out"), endings)
    assert [str(target.locate(ending)) for ending in endings] == [
        "out/a-mask.png",
        "out/a-overlay.png",
        "out/a.csv",
    ]
    with pytest.raises(CommandError, match="is one file; 3 outputs need a folder"):
        plan_targets([Path("a.jpg")], Path("mask.png"), endings)


def test_page_is_part_of_the_name() -> None:
    touch("a.tif")
    (target,) = plan_targets([Path("a.tif")], Path("out"), ("-mask.png", ".csv"))
    assert str(target.locate("-mask.png", 12)) == "out/a-page12-mask.png"
    (target,) = plan_targets([Path("a.tif")], Path("x/b.png"), PNG)
    assert str(target.locate(".png", 0)) == "x/b-page0.png"


def test_images_are_named_as_in_the_results() -> None:
    touch("x/deep/1.png", "y/deep/1.png", "z/2.png")
    for paths, names in (
        (["x", "z"], {"deep/1.png", "2.png"}),
        (["x", "y"], {"x/deep/1.png", "y/deep/1.png"}),
    ):
        targets = plan_targets([Path(path) for path in paths], Path("out"), PNG)
        assert {target.name for target in targets} == names


def test_any_output_that_would_replace_an_image_is_found() -> None:
    touch("in/a.png", "in/a-mask.png")
    with pytest.raises(CommandError, match=r"in/a\.png would replace the image in/a-mask\.png"):
        plan_targets([Path("in")], Path("in"), (".csv", "-mask.png"))


def test_output_never_replaces_an_image() -> None:
    touch("in/a.png", "in/b/a.png")
    for paths, out in ((["in/a.png"], "in/a.png"), (["in"], "in"), (["in", "in/b"], "in/b")):
        assert "would replace the image" in error_of(*paths, out=out)


def test_stdin_and_stdout_are_planned() -> None:
    touch("a.jpg")
    assert plan("-", out="-") == {"-": "-"}
    assert plan("-") == {"out/stdin.png": "-"}
    assert plan("-", out="mask.png") == {"mask.png": "-"}
    assert plan("a.jpg", out="-") == {"-": "a.jpg"}
    assert Path("-") == STANDARD
