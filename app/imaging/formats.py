"""First bytes of images of other formats, so that the error can name the format.

Knows bytes; no Pillow and no HTTP. Formats that are accepted are recognised by their readers, and
camera raw files that are TIFFs count as TIFFs.
"""

from __future__ import annotations

import re
import struct

from model.readers import AVIF_BRANDS, HEIC_BRANDS, read_brands

_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"8BPS", "PSD"),
    (b"%PDF-", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"FUJIFILMCCD-RAW", "camera raw (RAF)"),
    (b"IIRO", "camera raw (ORF)"),
    (b"IIU\0", "camera raw (RW2)"),
    (b"ZISRAWFILE\0", "CZI"),
    (b"\xda\xce\xbe\x0a", "ND2"),
    (b"SIMPLE  =", "FITS"),
    (b"NRRD000", "NRRD"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an OLE file (OIB, ZVI)"),
    (b"\x93NUMPY", "NumPy"),
    (b"qoif", "QOI"),
    (b"gimp xcf ", "XCF"),
    (b"DDS ", "DDS"),
    (b"icns", "ICNS"),
    (b"\x1a\x45\xdf\xa3", "video (Matroska, WebM)"),
    (b"PK\3\4", "ZIP"),
)

_SIGNATURES_LATER: tuple[tuple[int, bytes, str], ...] = (
    (8, b"AVI LIST", "video (AVI)"),
    (128, b"DICM", "DICOM"),
    (208, b"MAP ", "MRC"),
    (344, b"n+1\0", "NIfTI"),
    (344, b"ni1\0", "NIfTI"),
)
"""Offset, bytes there, name."""

_BRANDS: tuple[tuple[frozenset[bytes], str], ...] = (
    (frozenset({b"mif1", b"mif2", b"msf1", b"miaf"}), "HEIF"),
    (frozenset({b"crx "}), "camera raw (CR3)"),
    (
        frozenset({b"isom", b"iso2", b"iso4", b"iso5", b"iso6", b"mp41", b"mp42", b"avc1"})
        | {b"qt  ", b"M4V ", b"dash", b"3gp4", b"3gp5"},
        "video (MP4, QuickTime)",
    ),
)
"""Brands of the ISO base media file format (ISO/IEC 14496-12); the first that matches counts."""

_NETPBM = re.compile(rb"P([1-6]\s+[#\d]|[Ff]\n\d|7\n(#|WIDTH))")
_XML = (b"<?xml", b"<!--", b"<!DOCTYPE svg")
_HEAD_BYTES = 4096


def name_format(data: bytes) -> str | None:
    """Name the format of these bytes where it is certain; None for accepted formats, too."""
    head = data[:_HEAD_BYTES]
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    for offset, signature, name in _SIGNATURES_LATER:
        if head.startswith(signature, offset):
            return name
    if brands := read_brands(head):
        if brands & (AVIF_BRANDS | HEIC_BRANDS):
            return None
        return next((name for group, name in _BRANDS if brands & group), None)
    if _NETPBM.match(head):
        return "Netpbm (PPM, PGM, PBM)"
    if _is_icon(head):
        return "ICO"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"<svg") or (text.startswith(_XML) and b"<svg" in text):
        return "SVG"
    return None


def _is_icon(head: bytes) -> bool:
    """Icons and cursors: zero, kind, count; then a first entry whose fourth byte is zero."""
    if len(head) < 22:
        return False
    zero, kind, count = struct.unpack_from("<HHH", head)
    return zero == 0 and kind in (1, 2) and count > 0 and head[9] == 0
