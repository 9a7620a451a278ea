"""What a TIFF says of its pixels, so that the kinds that are not accepted can be named.

Knows bytes (TIFF 6.0, BigTIFF); no Pillow, no HTTP.
"""

from __future__ import annotations

import struct

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOUR = 256, 257, 258, 259, 262
_STRIPS, _CHANNELS, _PLANES, _TILES, _NUMBERS = 273, 277, 284, 324, 339
_TAGS = {_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _COLOUR}
_TAGS |= {_STRIPS, _CHANNELS, _PLANES, _TILES, _NUMBERS}

_INTEGERS = {1: "B", 3: "H", 4: "I", 16: "Q"}
"""A field's type -> what `struct` calls it."""

_KINDS = {
    1: "unsigned integers",
    2: "signed integers",
    3: "floats",
    4: "numbers of no known kind",
    5: "complex integers",
    6: "complex floats",
}
_MOST_BITS = 128
_MOST_ENTRIES = 0xFFFF  # as many as TIFF can count; BigTIFF could count for ever
_LOOK_AT = 16  # values of a field

_Tags = dict[int, tuple[int, ...]]


def kind(data: bytes) -> str | None:
    """Channels, bits, kind of number, layout: of the first image, as its tags have it.

    Returns:
        As "1 channel of 64-bit floats (photometric interpretation 1, compression 8)"; None where
        the bytes are no TIFF, or a broken one.
    """
    try:
        tags = _directory(data)
    except struct.error:  # it ends too early
        return None
    channels = tags.get(_CHANNELS, (1,))[0]
    bits = tags.get(_BITS, (1,))
    number = tags.get(_NUMBERS, (1,))[0]
    pixels = tags.get(_STRIPS) or tags.get(_TILES) or (len(data),)
    whole = (
        min(tags.get(_WIDTH, (0,))[0], tags.get(_HEIGHT, (0,))[0], channels, *bits) > 0
        and max(bits) <= _MOST_BITS
        and number in _KINDS
        and pixels[0] < len(data)
    )
    if not whole:
        return None
    size = "/".join(map(str, bits if len(set(bits)) > 1 else bits[:1]))
    order = "big-endian " if max(bits) > 8 and data.startswith(b"MM") else ""
    planes = ", plane by plane" if tags.get(_PLANES) == (2,) else ""
    return (
        f"{channels} channel{'s' * (channels > 1)} of {size}-bit {order}{_KINDS[number]}{planes} "
        f"(photometric interpretation {tags.get(_COLOUR, ('unknown',))[0]}, "
        f"compression {tags.get(_COMPRESSION, (1,))[0]})"
    )


def _directory(data: bytes) -> _Tags:
    """The first values of the first directory's fields that are of interest.

    Raises:
        struct.error: something is not where it is said to be.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        return {}
    (version,) = struct.unpack_from(f"{order}H", data, 2)
    if version not in (42, 43):
        return {}
    # BigTIFF has longer counts and offsets, and eight bytes before its first offset.
    count, word, start = ("H", "I", 4) if version == 42 else ("Q", "Q", 8)
    (at,) = struct.unpack_from(order + word, data, start)
    (entries,) = struct.unpack_from(order + count, data, at)
    if entries > _MOST_ENTRIES:
        return {}
    at += struct.calcsize(count)
    entry = struct.Struct(f"{order}HH{word}")
    room = struct.calcsize(word)
    tags: _Tags = {}
    for _ in range(entries):
        tag, type_, length = entry.unpack_from(data, at)
        at += entry.size
        if tag in _TAGS and tag not in tags and type_ in _INTEGERS and length:
            letter = _INTEGERS[type_]
            fits = length * struct.calcsize(f"={letter}") <= room
            place = at if fits else struct.unpack_from(order + word, data, at)[0]
            tags[tag] = struct.unpack_from(f"{order}{min(length, _LOOK_AT)}{letter}", data, place)
        at += room
    struct.unpack_from(order + word, data, at)  # the next directory's place, which ends this one
    return tags
