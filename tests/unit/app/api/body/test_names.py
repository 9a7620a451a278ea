"""Names of uploaded files: how clients encode them, and what makes them safe."""

from __future__ import annotations

import pytest

from app.api.body.form import parse_disposition
from app.api.body.names import (
    MAX_NAME_BYTES,
    cut_utf8,
    decode_filename,
    safe_name,
    safe_stem,
    strip_image_suffix,
)
from model.pixels import IMAGE_SUFFIXES


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        ('form-data; name="file"; filename="cell.png"', "cell.png"),
        ("form-data; name=file; filename=cell.png", "cell.png"),
        ('form-data; FileName = "cell.png" ; name="file"', "cell.png"),
        ('form-data; filename="a;b, c.png"', "a;b, c.png"),
        ('form-data; filename="Zellkörper_αβ.png"', "Zellkörper_αβ.png"),
        # Browsers (WHATWG), curl, and Windows paths of old browsers.
        ('form-data; filename="a%22b%0D%0A.png"', 'a"b\r\n.png'),
        ('form-data; filename="a\\"b.png"', 'a"b.png'),
        ('form-data; filename="C:\\images\\new.png"', "C:\\images\\new.png"),
        # RFC 7578, section 2; a percent sign that encodes nothing stays.
        ('form-data; filename="Zellk%C3%B6rper%20 1.png"', "Zellkörper  1.png"),
        ('form-data; filename="100%.png"', "100%.png"),
        ('form-data; filename="50%ff.png"', "50%ff.png"),
        # RFC 8187. It comes first, wherever it is.
        ("form-data; filename*=UTF-8''Zellk%C3%B6rper.png; filename=\"x.png\"", "Zellkörper.png"),
        ("form-data; filename=\"x.png\"; filename*=utf-8'de'Zellk%C3%B6rper.png", "Zellkörper.png"),
        ("form-data; filename*=iso-8859-1''Zellk%F6rper.png", "Zellkörper.png"),
        ("form-data; filename*=\"UTF-8''a%20b.png\"", "a b.png"),
        ("form-data; filename*=UTF-8''100%25.png", "100%.png"),
        ("form-data; filename*=UTF-8''%FF.png; filename=\"x.png\"", "x.png"),
        ("form-data; filename*=punycode''a.png; filename=\"x.png\"", "x.png"),
        ('form-data; filename*=a.png; filename="x.png"', "x.png"),
        ("form-data; filename=\"filename*=UTF-8''y.png\"", "filename*=UTF-8''y.png"),
        # RFC 2047.
        ('form-data; filename="=?UTF-8?B?WmVsbGvDtnJwZXIucG5n?="', "Zellkörper.png"),
        ('form-data; filename="=?utf-8?q?Zellk=C3=B6rper_1=2Epng?="', "Zellkörper 1.png"),
        ('form-data; filename="=?ISO-8859-1*de?Q?Zellk=F6rper?=.png"', "Zellkörper.png"),
        ('form-data; filename="=?utf-8?B?w6Q=?= =?utf-8?B?w7Y=?=.png"', "äö.png"),
        ('form-data; filename="=?utf-8?B?/w==?=.png"', "=?utf-8?B?/w==?=.png"),
        ('form-data; filename="=?punycode?B?YQ==?=.png"', "=?punycode?B?YQ==?=.png"),
        ('form-data; filename="=?.png"', "=?.png"),
        ('form-data; name="file"', ""),
        ('form-data; filename=""', ""),
        ("", ""),
    ],
)
def test_name_is_decoded_as_clients_encode_it(disposition: str, name: str) -> None:
    assert decode_filename(parse_disposition(disposition.encode())) == name


def test_bytes_that_are_not_utf_8_are_replaced() -> None:
    disposition = 'form-data; filename="Zellkörper.png"'.encode("latin-1")
    assert decode_filename(parse_disposition(disposition)) == "Zellk\ufffdrper.png"


@pytest.mark.parametrize(
    ("filename", "stem"),
    [
        ("cell.png", "cell"),
        ("cell.OME.TIFF", "cell"),
        ("cell.JPG", "cell"),
        ("../../etc/passwd", "passwd"),
        ("C:\\images\\cell 1.tif", "cell 1"),
        ("a/b/", "b"),
        ("..", ""),
        ("", ""),
        (".png", ""),
        (".hidden", "hidden"),
        ("scan.001", "scan.001"),
        ("img_1.5um", "img_1.5um"),
        ("img_1.5um.tif", "img_1.5um"),
        ("plate.A01.f2.tif", "plate.A01.f2"),
        ("a.png.tif", "a.png"),
        (
            "Screenshot 2026-01-02 at 3.04.05\u202fPM.png",
            "Screenshot 2026-01-02 at 3.04.05\u202fPM",
        ),
        ("zell\u0000\n.png", "zell__"),
        ("Zellkörper_αβ.png", "Zellkörper_αβ"),
        ("Zellko\u0308rper.png", "Zellk\u00f6rper"),
        ("कोशिका.png", "कोशिका"),
        ("細胞👩‍🔬🏴󠁧󠁢󠁥󠁮󠁧󠁿❤️.png", "細胞👩‍🔬🏴󠁧󠁢󠁥󠁮󠁧󠁿❤️"),
        ('quo"te<>|?*:.png', "quo_te______"),
        ("a'b&c,d;e%f#g~h.png", "a'b&c,d;e%f#g~h"),
        ("gpj.\u202egnp.exe", "gpj._gnp.exe"),
        ("a\ufeff\u200b\ufffd\u2028b.png", "a____b"),
        ("a\ud800b.png", "a_b"),
        ("trailing. . .", "trailing"),
        ("trailing. . .png", "trailing"),
        ("con.png", "_con"),
        ("NUL", "_NUL"),
        ("nul.2026.tif", "_nul.2026"),
        ("com1 .x.png", "_com1 .x"),
        ("LPT¹.png", "_LPT¹"),
        ("CONIN$.png", "_CONIN$"),
        ("console.png", "console"),
        ("com10.png", "com10"),
    ],
)
def test_stem_is_safe_as_a_file_name(filename: str, stem: str) -> None:
    assert safe_stem(filename) == stem


def test_name_keeps_its_suffix() -> None:
    assert safe_name("C:\\images\\cell 1.ome.tif") == "cell 1.ome.tif"


@pytest.mark.parametrize("character", ["x", "ö", "細", "👩"])
def test_long_name_is_cut_between_characters(character: str) -> None:
    stem = safe_stem(character * 500 + ".png")
    assert set(stem) == {character}
    assert MAX_NAME_BYTES - 4 < len(stem.encode()) <= MAX_NAME_BYTES


def test_name_that_is_cut_at_a_space_does_not_end_with_it() -> None:
    assert safe_stem("x" * (MAX_NAME_BYTES - 1) + " yz.png") == "x" * (MAX_NAME_BYTES - 1)


def test_text_is_cut_at_a_number_of_bytes() -> None:
    assert [cut_utf8("aö👩", size) for size in range(8)] == [
        "",
        "a",
        "a",
        "aö",
        "aö",
        "aö",
        "aö",
        "aö👩",
    ]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_suffix_of_every_image_that_is_read_is_removed(suffix: str) -> None:
    for name in (f"a.001{suffix}", f"a.001{suffix.upper()}", f"a.001.ome{suffix}"):
        assert strip_image_suffix(name) == "a.001"
