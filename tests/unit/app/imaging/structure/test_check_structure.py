"""Files of every format that are fine. The tests of each format have those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.imaging.structure import check_structure
from tests.conftest import FIXTURES, ROOT


def test_empty_file_is_left_to_the_decoder() -> None:
    check_structure(b"")


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in (FIXTURES, ROOT / "app/static/samples")
        for path in sorted(folder.rglob("*.*"))
        if path.suffix not in ("", ".txt", ".md")
    ],
    ids=lambda path: path.name,
)
def test_fixture_passes(path: Path) -> None:
    check_structure(path.read_bytes())
