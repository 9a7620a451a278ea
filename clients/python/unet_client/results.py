"""The result of a segmentation."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import httpx

from unet_client.images import decode_png

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclasses.dataclass(frozen=True)
class SegmentationResult:
    """The response of the service to one image.

    Attributes:
        content: the body: a PNG, or GeoJSON with `output="polygons"`.
        headers: the HTTP headers; names are case-insensitive.
    """

    content: bytes
    headers: httpx.Headers

    def image(self) -> npt.NDArray[Any]:
        """Decode the PNG: (H, W) uint8 for a mask, uint16 for 16-bit outputs.

        Raises:
            ValueError: the result is not an image.
            ImportError: numpy or Pillow is not installed.
        """
        if self._is_json:
            raise ValueError("the result is not an image; read it with .polygons()")
        return decode_png(self.content)

    def polygons(self) -> dict[str, Any]:
        """Return the GeoJSON FeatureCollection, in pixels from the upper left corner.

        Raises:
            ValueError: the result is not polygons.
        """
        if not self._is_json:
            raise ValueError('the result is an image; request polygons with output="polygons"')
        polygons: dict[str, Any] = json.loads(self.content)
        return polygons

    @property
    def coverage(self) -> float:
        """Fraction of the image that is foreground, 0 to 1."""
        return float(self.headers["x-mask-coverage"])

    @property
    def _is_json(self) -> bool:
        content_type: str = self.headers.get("content-type", "")
        return content_type.startswith("application/geo+json")
