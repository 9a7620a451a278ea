"""The steps that image workers run, called in the process of the test."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from app.imaging.workers.shared import BlockCache, StoredArray, pack, unpack
from app.inference.outputs import Options, Output
from app.inference.steps import EncodedImage, decode_and_prepare, inspect_image
from model.config import PreprocessConfig
from tests.conftest import encode, nuclei

GREY = nuclei(60, 80)[0]


@pytest.mark.parametrize("mode", ["native", "resize"])
@pytest.mark.parametrize("needs_image", [False, True])
def test_decoded_image_is_kept_only_if_an_output_shows_it(
    mode: Literal["native", "resize"], needs_image: bool
) -> None:
    preprocess = PreprocessConfig(mode=mode, window=((64, 48),), overlap=0)
    cache = BlockCache()
    with cache.borrow() as source, cache.borrow() as pixels, cache.borrow() as image:
        encoded = encode(GREY)
        source.write(encoded)
        data = EncodedImage(source, len(encoded))
        header = inspect_image(data, 10**6)
        assert (header["height"], header["width"]) == GREY.shape
        result = decode_and_prepare(
            data, header, preprocess, pixels, image if needs_image else None
        )
        expected = (64, 48, 1) if mode == "resize" else (60, 80, 1)  # grey keeps one channel
        assert result["pixels"] == expected
        assert ("image" in result) == needs_image
        if needs_image:
            np.testing.assert_array_equal(StoredArray(image, *result["image"]).load(), GREY)
    cache.close()


def test_options_and_preprocessing_of_many_calls_are_pickled_once() -> None:
    """Pickling them takes longer than sending them."""
    sent = Options((Output.COCO,), threshold=0.25), PreprocessConfig(intensity="percentile")
    equal = Options((Output.COCO,), threshold=0.25), PreprocessConfig(intensity="percentile")
    other = Options((Output.COCO,), threshold=0.75), PreprocessConfig()
    received = [unpack(*pack(each)) for each in (sent, equal, other)]
    assert received == [sent, equal, other]
    for first, second in zip(received[0], received[1], strict=True):
        assert first is second
