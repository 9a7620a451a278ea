"""Which images `unet segment` takes, and where it puts their masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.sources import STANDARD, plan_outputs

PNG = (".png",)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def place(*paths: str, out: str = "out", keep_suffix: bool = False) -> dict[str, str]:
    masks = plan_outputs([Path(path) for path in paths], Path(out), PNG, keep_suffix=keep_suffix)
    return {str(mask): str(image) for mask, image in masks.items()}


def touch(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def refused(*paths: str, out: str = "out", keep_suffix: bool = False) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        place(*paths, out=out, keep_suffix=keep_suffix)
    (line,) = str(error.value).splitlines()
    assert not Path("out").exists()
    return line


def test_images_of_one_name_and_two_suffixes_can_be_told_apart() -> None:
    touch("in/a.png", "in/a.jpg")
    assert "--keep-suffix" in refused("in")
    assert place("in", keep_suffix=True) == {
        "out/a.jpg.png": "in/a.jpg",
        "out/a.png.png": "in/a.png",
    }


def test_folders_keep_their_names_where_those_of_their_masks_would_clash() -> None:
    touch("x/1.png", "x/deep/2.png", "y/1.png", "z/2.png", "u/x/1.png", "3.png")
    assert set(place("x", "z")) == {"out/1.png", "out/deep/2.png", "out/2.png"}
    assert place("x", "y", "3.png") == {
        "out/x/1.png": "x/1.png",
        "out/x/deep/2.png": "x/deep/2.png",
        "out/y/1.png": "y/1.png",
        "out/3.png": "3.png",
    }
    for paths in (("x", "u/x"), ("x/1.png", "y/1.png")):
        assert "would both become" in (line := refused(*paths))
        assert "an --out of its own" in line


def test_an_image_given_twice_is_done_once() -> None:
    touch("in/a.png", "in/b/c.png")
    here = str(Path.cwd())
    masks = {"out/a.png": "in/a.png", "out/b/c.png": "in/b/c.png"}
    assert place("in", "in/a.png", f"{here}/in/a.png", "in/../in/a.png", "in/b", "in") == masks
    Path("in/link.png").symlink_to("a.png")  # by a name of its own
    assert set(place("in")) == {*masks, "out/link.png"}


def test_only_suffixes_of_images_are_taken_off() -> None:
    touch("scan.001", "scan.002", "b.v2.TIF")
    assert set(place("scan.001", "scan.002", "b.v2.TIF")) == {
        "out/scan.001.png",
        "out/scan.002.png",
        "out/b.v2.png",
    }


def test_a_folder_is_no_image_whatever_its_name() -> None:
    touch("in/scan.tif/a.png", "in/.hidden/b.png")
    assert place("in") == {"out/scan.tif/a.png": "in/scan.tif/a.png"}


def test_what_is_not_there_is_named_once() -> None:
    touch("a.png")
    assert refused("a.png", "no/such.png") == "no/such.png does not exist"
    Path("empty").mkdir()
    assert refused("empty") == "no images in empty"


def test_one_image_may_name_its_mask() -> None:
    touch("in/a.jpg", "in/b.jpg", "note.txt", "there.png")
    assert place("in/a.jpg", out="new/mask.png") == {"new/mask.png": "in/a.jpg"}
    assert place("in/a.jpg", out="there.png") == {"there.png": "in/a.jpg"}
    Path("folder.png").mkdir()
    assert place("in/a.jpg", out="folder.png") == {"folder.png/a.png": "in/a.jpg"}
    for out in ("mask.png", "there.png", "-"):
        assert refused("in", out=out) == f"--out {out} is one file; 2 images need a folder"
    assert refused("in/a.jpg", out="mask.tif") == "--out mask.tif: what is written is a .png file"
    for images in ("in", "in/a.jpg"):
        assert "note.txt is a file" in refused(images, out="note.txt")
        assert "note.txt is a file" in refused(images, out="note.txt/deeper")


def test_no_image_is_replaced_by_a_mask() -> None:
    touch("in/a.png", "in/b/a.png")
    for paths, out in ((["in/a.png"], "in/a.png"), (["in"], "in"), (["in", "in/b"], "in/b")):
        assert "would replace the image" in refused(*paths, out=out)


def test_standard_input_and_output() -> None:
    touch("a.jpg")
    assert place("-", out="-") == {"-": "-"}
    assert place("-") == {"out/stdin.png": "-"}
    assert place("-", out="mask.png") == {"mask.png": "-"}
    assert place("a.jpg", out="-") == {"-": "a.jpg"}
    assert Path("-") == STANDARD
