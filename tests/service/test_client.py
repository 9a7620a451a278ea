"""The Python client and the real service understand each other."""

from __future__ import annotations

import numpy as np

from app.client import Answer, Client, SegmentationFailed
from tests.conftest import Server, encode, nuclei


def test_pixels_in_outlines_out(server: Server) -> None:
    pixels = nuclei(120, 130)[0]
    with Client(server.url) as client:
        by_pixels, by_bytes = client.segment(pixels), client.segment(encode(pixels))
        np.testing.assert_array_equal(by_pixels.image(), by_bytes.image())
        outlines = client.segment(pixels, output="polygons")
    found = outlines.polygons()
    assert found["type"] == "FeatureCollection"
    assert len(found["features"]) == int(outlines.headers["x-mask-objects"]) > 0
    assert outlines.content.startswith(b"{")


def test_many_images_of_which_one_is_none(server: Server) -> None:
    images = [*(encode(nuclei(60, 60, seed)[0]) for seed in range(4)), b"not an image"]
    with Client(server.url) as client:
        outcomes = dict(client.segment_many(images))
    failed = outcomes.pop(b"not an image")
    assert isinstance(failed, SegmentationFailed)
    assert failed.status == 422
    assert len(outcomes) == 4
    assert all(isinstance(outcome, Answer) for outcome in outcomes.values())
