"""The names and the content of uploaded files."""

from __future__ import annotations

import pytest

from app.api.routers.segment import unique_names
from app.api.uploads import Upload, check_not_empty, safe_stem
from app.errors import InvalidRequest


@pytest.mark.parametrize(
    ("filename", "stem"),
    [
        ("cell.png", "cell"),
        ("../../etc/passwd", "passwd"),
        ("C:\\images\\cell 1.tif", "cell 1"),
        ("a/b/", "b"),
        ("..", ""),
        ("", ""),
        (".hidden", "hidden"),
        ("zell\u0000\n.png", "zell__"),
        ("Zellkörper_αβ.png", "Zellkörper_αβ"),
        ("x" * 500 + ".png", "x" * 120),
        ('quo"te.png', "quo_te"),
    ],
)
def test_stem_is_safe_as_a_file_name(filename: str, stem: str) -> None:
    assert safe_stem(filename) == stem


def test_equal_names_are_numbered() -> None:
    uploads = [Upload(name, b"") for name in ("a", "A", "a", "", "", "errors", "a-2")]
    names = unique_names(uploads)
    assert len({name.lower() for name in names}) == len(uploads)
    assert names[0] == "a"
    assert "errors" not in names


def test_empty_file_is_invalid() -> None:
    with pytest.raises(InvalidRequest, match="empty file"):
        check_not_empty(Upload("a", b""))
    check_not_empty(Upload("a", b"."))
