"""Arrays -> WebP: colours nearly, opacity exactly."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from app.imaging.webp import encode_webp
from tests.conftest import FIXTURES, decode

PHOTO = np.asarray(Image.open(FIXTURES / "astronaut.jpg"))


@pytest.mark.parametrize("image", [PHOTO, PHOTO[:, :, 0]], ids=["colour", "grey"])
def test_colours_come_back_nearly(image: np.ndarray) -> None:
    decoded = decode(encode_webp(image))
    shown = image if image.ndim == 3 else np.repeat(image[:, :, None], 3, axis=2)
    assert decoded.shape == shown.shape
    assert np.abs(decoded.astype(int) - shown).mean() < 4


def test_opacity_comes_back_exactly() -> None:
    alpha = np.random.default_rng(0).integers(0, 256, PHOTO.shape[:2], np.uint8)
    decoded = decode(encode_webp(np.dstack([PHOTO, alpha])))
    np.testing.assert_array_equal(decoded[:, :, 3], alpha)
