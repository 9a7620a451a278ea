"""What images of other formats begin with, so that they can be told from no image at all.

Knows bytes; no Pillow, no HTTP. The formats that are accepted are Pillow's to find, and cameras'
raw files that are TIFFs are TIFFs here too; which of those is not accepted is named in
`app/tiff.py`.
"""

from __future__ import annotations

import re
import struct

_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (b"\xff\xd8\xff\xf7", "JPEG-LS"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"8BPS", "PSD"),
    (b"gimp xcf", "XCF"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "PostScript"),
    (b"AT&TFORM", "DjVu"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"icns", "ICNS"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"\x8aMNG\r\n\x1a\n", "MNG"),
    (b"\x8bJNG\r\n\x1a\n", "JNG"),
    (b"\xd7\xcd\xc6\x9a\0\0", "WMF"),
    (b"/* XPM */", "XPM"),
    (b"\x59\xa6\x6a\x95", "Sun raster"),
    (b"FUJIFILMCCD-RAW", "camera raw (RAF)"),
    (b"IIRO", "camera raw (ORF)"),
    (b"IIRS", "camera raw (ORF)"),
    (b"MMOR", "camera raw (ORF)"),
    (b"IIU\0", "camera raw (RW2)"),
    (b"FOVb", "camera raw (X3F)"),
    (b"ZISRAWFILE\0", "CZI"),
    (b"\xda\xce\xbe\x0a", "ND2"),
    (b"SIMPLE  =", "FITS"),
    (b"NRRD000", "NRRD"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
)

_BRANDS: tuple[tuple[frozenset[bytes], str], ...] = (
    (frozenset({b"avif", b"avis"}), "AVIF"),
    (frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}), "HEIC"),
    (frozenset({b"mif1", b"mif2", b"msf1", b"miaf"}), "HEIF"),
    (frozenset({b"crx "}), "camera raw (CR3)"),
)
"""Of the ISO base media file format, ISO/IEC 14496-12; `mif1` is said by AVIF and HEIC too."""

_LATER: tuple[tuple[int, bytes, str], ...] = (
    (128, b"DICM", "DICOM"),
    (208, b"MAP ", "MRC"),
    (344, b"n+1\0", "NIfTI"),
    (344, b"ni1\0", "NIfTI"),
)

_PORTABLE = re.compile(rb"P([1-6]\s+[#\d]|[Ff]\n\d|7\n(#|WIDTH))")
_XML = (b"<?xml", b"<!--", b"<!DOCTYPE svg")
_LOOK_AT = 4096


def known(data: bytes) -> str | None:
    """The name of the format these bytes are surely of, or None; accepted formats have none."""
    head = data[:_LOOK_AT]
    for mark, name in _BEGINNINGS:
        if head.startswith(mark):
            return name
    for offset, mark, name in _LATER:
        if head.startswith(mark, offset):
            return name
    if head[4:8] == b"ftyp":
        return _by_brand(head)
    if _PORTABLE.match(head):
        return "Netpbm (PPM, PGM, PBM)"
    if _is_icon(head):
        return "ICO"
    if data[-18:] == b"TRUEVISION-XFILE.\0":
        return "TGA"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<svg") or (text.startswith(_XML) and b"<svg" in text):
        return "SVG"
    return None


def _by_brand(head: bytes) -> str | None:
    """The first box is its length, `ftyp`, the major brand, its version, and further brands."""
    length = int.from_bytes(head[:4], "big")
    brands = {head[8:12], *(head[at : at + 4] for at in range(16, min(length, len(head)), 4))}
    return next((name for group, name in _BRANDS if brands & group), None)


def _is_icon(head: bytes) -> bool:
    """Icons and cursors: zero, kind, count; then a first entry whose fourth byte is zero."""
    if len(head) < 22:
        return False
    zero, kind, count = struct.unpack_from("<HHH", head)
    return zero == 0 and kind in (1, 2) and count > 0 and head[9] == 0
