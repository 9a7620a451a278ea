"""The parameters of POST /segment, and how they are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypedDict

Output: TypeAlias = Literal[
    "mask",
    "probability",
    "instances",
    "overlay",
    "cutout",
    "polygons",
    "coco",
    "rois",
    "measurements",
    "preview",
]
"""Names of the outputs that the service can return of an image."""


class SegmentQuery(TypedDict, total=False):
    """The keyword arguments of `segment`. One that is None or left out has the service's default.

    Attributes:
        model: name of a model of the service.
        output: one output or several; all come from one inference.
        threshold: probability from which a pixel is foreground, 0..1.
        page: of a file with several, from 0, or "all".
        channel: of an image that is neither grey nor color, from 0.
        format: of outputs that are pictures; "webp" for overlay, cutout and preview alone.
        min_area: in pixels; smaller objects are removed.
        exclude_edges: remove objects that touch the edge of the image.
        percentiles: (low, high) of the image's values that become black and white, 0..100.
        pixel_size: in micrometres.
        background: behind a cutout: (red, green, blue), 0..255, or "RRGGBB".
    """

    model: str | None
    output: Output | Sequence[Output]
    threshold: float | None
    page: int | Literal["all"] | None
    channel: int | None
    format: Literal["png", "tiff", "webp"]
    min_area: int
    exclude_edges: bool
    percentiles: tuple[float, float] | None
    pixel_size: float | None
    background: tuple[int, int, int] | str | None


def encode_query(query: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the values of each parameter of a query string.

    Parameters that this version does not know are sent as they are.

    Raises:
        ValueError: percentiles or a background do not have the right number of values.
    """
    given = {name: value for name, value in query.items() if value is not None}
    if "percentiles" in given:
        given["percentiles"] = _encode_percentiles(given["percentiles"])
    if "background" in given:
        given["background"] = _encode_color(given["background"])
    return {name: [_encode_value(each) for each in _list(value)] for name, value in given.items()}


def list_outputs(query: Mapping[str, Any]) -> list[str]:
    """Return the outputs that a query asks for."""
    return [str(output) for output in _list(query.get("output") or "mask")]


def _list(value: Any) -> list[Any]:
    return [value] if isinstance(value, str) or not isinstance(value, Sequence) else list(value)


def _encode_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _encode_percentiles(value: tuple[float, float] | str) -> str:
    if isinstance(value, str):
        return value
    if len(value) != 2:
        raise ValueError(f"percentiles must be (low, high), got {value}")
    return ",".join(map(str, value))


def _encode_color(value: Sequence[int] | str) -> str:
    if isinstance(value, str):
        return value
    if len(value) != 3 or not all(0 <= channel <= 255 for channel in value):
        raise ValueError(f"background must be (red, green, blue), 0..255 each, got {value}")
    return bytes(value).hex()
