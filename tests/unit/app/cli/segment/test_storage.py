"""Files at paths and at addresses behave alike."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from app.cli.errors import CommandError
from app.cli.segment import storage
from app.cli.segment.storage import AnyPath, Entry, locate_inside, parse_location

PLACES = ["path", "file", "memory"]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> AnyPath:
    """An empty folder on the disk, at an address on the disk, and in an object store."""
    address = {
        "path": str(tmp_path),
        "file": f"file://{tmp_path}",
        "memory": f"memory://{uuid.uuid4().hex}",
    }
    return parse_location(address[request.param])


def test_written_files_are_read_and_listed(place: AnyPath) -> None:
    file = place / "deep" / "a.bin"
    storage.write(file, b"old")
    storage.write(file, b"content")
    assert storage.read(file, 7) == b"content"
    assert storage.list_folder(place / "deep") == [Entry("a.bin", False)]  # no part is left
    assert storage.list_folder(place) == [Entry("deep", True)]
    assert storage.list_names(place / "deep") == {"a.bin"}
    assert storage.list_names(place / "nowhere") == set()
    storage.remove(file)
    storage.remove(file)
    assert not file.exists()


def test_a_file_that_is_too_large_is_an_error(place: AnyPath) -> None:
    storage.write(place / "a.bin", b"content")
    with pytest.raises((CommandError, OSError), match="more than 6 bytes"):
        storage.read(place / "a.bin", 6)


def test_a_missing_file_is_an_error(place: AnyPath) -> None:
    with pytest.raises((CommandError, OSError)):
        storage.read(place / "nowhere", 10)


def test_text_replaces_a_file_when_it_is_complete(place: AnyPath) -> None:
    storage.write(place / "table.csv", b"old")
    with storage.replacing(place / "table.csv") as text:
        text.write("a,b\nä,ö\n")
        assert storage.read(place / "table.csv", 100) == b"old"
    assert storage.read(place / "table.csv", 100).decode() == "a,b\nä,ö\n"
    with pytest.raises(RuntimeError), storage.replacing(place / "table.csv") as text:
        raise RuntimeError
    assert storage.read(place / "table.csv", 100).decode() == "a,b\nä,ö\n"
    assert storage.list_names(place) == {"table.csv"}


def test_a_link_to_a_folder_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    assert sorted(storage.list_folder(tmp_path)) == [Entry("a.png", False), Entry("b.png", False)]
    entries = storage.list_folder(parse_location(f"file://{tmp_path}"))
    assert not any(entry.is_folder for entry in entries)


def test_folders_inside_each_other_are_found_whatever_their_addresses(tmp_path: Path) -> None:
    path, address = tmp_path / "a", parse_location(f"file://{tmp_path}")
    assert locate_inside(path, tmp_path) == "a"
    assert locate_inside(path, address) == "a"
    assert locate_inside(tmp_path, address) == ""
    assert locate_inside(tmp_path, path) is None
    assert locate_inside(tmp_path / "ab", path) is None
    memory = parse_location(f"memory://{os.fspath(tmp_path).lstrip('/')}")
    assert locate_inside(memory / "a/b", memory) == "a/b"
    assert locate_inside(memory, tmp_path) is None


def test_an_address_without_its_plugin_is_a_mistake() -> None:
    with pytest.raises(CommandError, match="nonsense://bucket"):
        parse_location("nonsense://bucket")
