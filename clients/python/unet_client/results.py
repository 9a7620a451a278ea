"""The result of a segmentation, and how it is read from a response.

A response is one output, or a zip with several outputs or pages. The zip names its files
`<name>.<ext>`, `<name>-<output>.<ext>` where outputs have the same extension, and
`<name>-page<N>...` where the pages of a file have results of their own.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import httpx

from unet_client.errors import SegmentationError
from unet_client.images import decode_image
from unet_client.query import list_outputs

if TYPE_CHECKING:
    import numpy.typing as npt

_DOCUMENTS = {
    "polygons": ".geojson",
    "coco": ".json",
    "rois": ".zip",
    "measurements": ".csv",
}
"""Outputs that are not pictures, and the suffixes of their files."""
_READERS = {"polygons": ".polygons()", "coco": ".coco()", "measurements": ".measurements()"}
_PAGES_HEADER = "x-image-pages"
"""Only a response to a single image has it: not one with a result for each page."""


class _Outputs:
    """Reads outputs in their own types."""

    outputs: Mapping[str, bytes]

    def image(self, output: str | None = None) -> npt.NDArray[Any]:
        """Decode a picture.

        Args:
            output: its name; needed only if there are several pictures.

        Returns:
            (H, W), or (H, W, 3 or 4) in color: uint8, or uint16 and float32 as the output has
            them. A stack of pages has one more axis in front.

        Raises:
            ValueError: the result has no such picture.
            ImportError: numpy or Pillow is not installed.
        """
        pictures = [name for name in self.outputs if name not in _DOCUMENTS]
        if output is None:
            if len(pictures) > 1:
                raise ValueError(f"name one of the images: {', '.join(pictures)}")
            if not pictures:
                readers = [_READERS.get(name, f".outputs[{name!r}]") for name in self.outputs]
                raise ValueError(f"the result is not an image; read it with {' or '.join(readers)}")
            (output,) = pictures
        elif output in _DOCUMENTS:
            raise ValueError(f"{output} is not an image")
        return decode_image(self._get(output))

    def polygons(self) -> dict[str, Any]:
        """Return the GeoJSON FeatureCollection, in pixels from the upper left corner.

        Raises:
            ValueError: polygons were not requested.
        """
        return self._parse("polygons")

    def coco(self) -> dict[str, Any]:
        """Return the COCO data set of the image.

        Raises:
            ValueError: coco was not requested.
        """
        return self._parse("coco")

    def measurements(self) -> str:
        """Return the CSV with a header and a line for each object.

        Raises:
            ValueError: measurements were not requested.
        """
        return self._get("measurements").decode()

    def _parse(self, output: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self._get(output))
        return document

    def _get(self, output: str) -> bytes:
        try:
            return self.outputs[output]
        except KeyError:
            raise ValueError(
                f'the result has {", ".join(self.outputs)}; request {output} with output="{output}"'
            ) from None


@dataclasses.dataclass(frozen=True)
class PageResult(_Outputs):
    """The outputs of one page.

    Attributes:
        number: of the page, from 0.
        outputs: contents of the files by output; empty if the page failed.
        error: why it failed.
    """

    number: int
    outputs: Mapping[str, bytes]
    error: SegmentationError | None = None

    def _get(self, output: str) -> bytes:
        if self.error is not None:
            raise self.error
        return super()._get(output)


@dataclasses.dataclass(frozen=True)
class SegmentationResult(_Outputs):
    """The response of the service to one image.

    Attributes:
        content: the body: the output itself, or a zip of several outputs or pages.
        headers: the HTTP headers; names are case-insensitive.
        outputs: contents of the files by output, for example `outputs["mask"]`. With `page="all"`
            and several pages: the stacks that `format="tiff"` gives.
        pages: with `page="all"`: the outputs of each page that are not part of a stack.
    """

    content: bytes
    headers: httpx.Headers
    outputs: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    pages: tuple[PageResult, ...] = ()

    @property
    def coverage(self) -> float:
        """Fraction of the image that is foreground, 0 to 1.

        Raises:
            ValueError: the pages have results of their own, which the service does not summarize.
        """
        return float(self._get_header("x-mask-coverage"))

    @property
    def confidence(self) -> float:
        """Mean probability of the chosen class over the pixels, 0 to 1. Errors as `coverage`."""
        return float(self._get_header("x-mask-confidence"))

    @property
    def objects(self) -> int | None:
        """Number of objects; None if no output separated them, or the pages have their own."""
        count = self.headers.get("x-mask-objects")
        return None if count is None else int(count)

    @property
    def page_count(self) -> int:
        """Number of pages of the file, or of frames of an animation."""
        return int(self.headers.get(_PAGES_HEADER, len(self.pages) or 1))

    def _get_header(self, name: str) -> str:
        try:
            value: str = self.headers[name]
        except KeyError:
            raise ValueError(
                f"the service did not send {name} for {self.page_count} pages"
            ) from None
        return value


def read_result(
    content: bytes, headers: httpx.Headers, query: Mapping[str, Any]
) -> SegmentationResult:
    """Read the response to a query for one image.

    Raises:
        SegmentationError: the response is not what was requested.
    """
    outputs = list_outputs(query)
    is_single = _PAGES_HEADER in headers
    is_zip = headers.get("content-type", "").startswith("application/zip")
    if not is_zip or (is_single and len(outputs) == 1):
        if len(outputs) > 1:
            raise SegmentationError(200, f"not a zip, but {len(outputs)} outputs were requested")
        found = {outputs[0]: content}
        pages: tuple[PageResult, ...] = ()
    else:
        found, pages = _read_zip(content, outputs, query, is_single=is_single)
    result = SegmentationResult(content, headers, found, pages)
    if query.get("page") == "all" and is_single and not _is_stack(result, query):
        return dataclasses.replace(result, pages=(PageResult(0, found),))
    return result


def _is_stack(result: SegmentationResult, query: Mapping[str, Any]) -> bool:
    return query.get("format") == "tiff" and result.page_count > 1


def _read_zip(
    content: bytes, outputs: Sequence[str], query: Mapping[str, Any], *, is_single: bool
) -> tuple[dict[str, bytes], tuple[PageResult, ...]]:
    """The outputs of the whole file, and those of each page."""
    endings = _find_endings(outputs, str(query.get("format") or "png"))
    whole: dict[str, bytes] = {}
    pages: dict[int, dict[str, bytes]] = {}
    errors: dict[int, SegmentationError] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for name in archive.namelist():
                data = archive.read(name)
                if name == "errors.json":
                    errors = _read_errors(data)
                    continue
                output = next(each for each, ending in endings.items() if name.endswith(ending))
                stacked = query.get("format") == "tiff" and output not in _DOCUMENTS
                if is_single or stacked:
                    whole[output] = data
                else:
                    page = _find_page(name.removesuffix(endings[output]))
                    pages.setdefault(page, {})[output] = data
    except (zipfile.BadZipFile, StopIteration, ValueError) as error:
        raise SegmentationError(200, "a zip that does not have the requested outputs") from error
    if is_single and whole.keys() != set(outputs):
        raise SegmentationError(200, "a zip that does not have the requested outputs")
    numbers = sorted(pages.keys() | errors.keys())
    return whole, tuple(
        PageResult(number, pages.get(number, {}), errors.get(number)) for number in numbers
    )


def _find_endings(outputs: Sequence[str], format: str) -> dict[str, str]:
    """How the name of each output's file ends."""
    suffixes = {output: _DOCUMENTS.get(output, f".{format}") for output in outputs}
    counts = Counter(suffixes.values())
    return {
        output: suffix if counts[suffix] == 1 else f"-{output}{suffix}"
        for output, suffix in suffixes.items()
    }


def _read_errors(data: bytes) -> dict[int, SegmentationError]:
    return {
        _find_page(name): SegmentationError(failure["status"], failure["detail"])
        for name, failure in json.loads(data).items()
    }


def _find_page(name: str) -> int:
    """The number that the service adds to the name of a page.

    Raises:
        ValueError: there is none.
    """
    match = re.search(r"-page(\d+)$", name)
    if match is None:
        raise ValueError(f"{name} has no number of a page")
    return int(match[1])
