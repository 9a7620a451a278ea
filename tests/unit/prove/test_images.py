"""The images that `make prove` damages: valid to begin with, and damaged the same way each time."""

from __future__ import annotations

import zlib

import pytest

from app.errors import ServiceError
from app.imaging.decode import decode, inspect
from tools.prove.images import Mutator, build_corpus, correct_checksums, png_chunk

CORPUS = build_corpus(1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WebP", "BMP", "GIF"])
def test_corpus_has_valid_images_of_each_format(kind: str) -> None:
    names = [name for name in CORPUS if name.partition(",")[0] == kind]
    assert len(names) >= 3
    decoded = 0
    for name in names:
        try:
            header = inspect(CORPUS[name], max_pixels=10**6)
            decoded += decode(CORPUS[name], header).size > 0
        except ServiceError:
            assert kind == "TIFF", name  # some compressions may not be accepted
    assert decoded >= 3


def test_corpus_and_mutations_are_repeatable() -> None:
    assert build_corpus(1) == CORPUS
    first, second = Mutator(CORPUS, 5), Mutator(CORPUS, 5)
    for image in list(CORPUS.values())[:20]:
        assert first.mutate(image) == second.mutate(image)


def test_mutations_change_most_images() -> None:
    mutator, image = Mutator(CORPUS, 3), CORPUS["PNG, colour"]
    changed = sum(mutator.mutate(image) != image for _ in range(200))
    assert changed > 180


def test_checksums_of_a_png_are_corrected() -> None:
    right = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", bytes(13)) + png_chunk(b"IEND", b"")
    wrong = bytearray(right)
    wrong[20] ^= 1
    corrected = correct_checksums(bytes(wrong))
    assert corrected[29:33] == zlib.crc32(corrected[12:29]).to_bytes(4, "big")
    assert correct_checksums(right) == right
