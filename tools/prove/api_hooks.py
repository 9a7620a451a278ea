"""Bodies for schemathesis, which knows no images: it imports this module."""

from __future__ import annotations

import random

import schemathesis
from hypothesis import strategies

from tools.prove.images import Mutator, build_corpus

_CORPUS = build_corpus(0)


def _damage(image: bytes, seed: int) -> bytes:
    return Mutator(_CORPUS, seed).mutate(image) if random.Random(seed).random() < 0.5 else image


_IMAGES = strategies.builds(
    _damage, strategies.sampled_from(sorted(_CORPUS.values())), strategies.integers(0, 1 << 32)
)
for _kind in ("image/*", "application/octet-stream"):
    schemathesis.openapi.media_type(_kind, _IMAGES)
