"""Names of files, as clients send them."""

from __future__ import annotations

import pytest

from app.api.routers.segment import _names
from app.api.uploads import Upload, _safe_stem


@pytest.mark.parametrize(
    ("sent", "stem"),
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
def test_a_client_cannot_choose_more_than_a_name(sent: str, stem: str) -> None:
    assert _safe_stem(sent) == stem


def test_equal_names_are_numbered_and_none_is_lost() -> None:
    uploads = [Upload(name, b"") for name in ("a", "A", "a", "", "", "errors", "a-2")]
    names = _names(uploads)
    assert len({name.lower() for name in names}) == len(uploads)
    assert names[0] == "a"
    assert "errors" not in names
