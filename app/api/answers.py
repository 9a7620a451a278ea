"""The results of a request's images -> headers and body of its response.

One output of one image is a file by itself. Everything else is a zip, or JSON for clients that
prefer it.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from app.api.body.names import cut_utf8
from app.api.json_text import EncodedValue, encode_json
from app.api.problems import classify_error
from app.errors import ServiceError
from app.inference.outputs import Output, Rendered, Segmentation, distinguish_files

Result = Segmentation | ServiceError
"""The outcome for one image."""

JSON = "application/json"
ZIP = "application/zip"

COPIES_IN_ZIP = 2
"""Memory for an output and the response it is copied into, in multiples of the output's size."""
COPIES_IN_JSON = 4
"""The same for JSON: the output, its base64, and the document that is joined from it."""

_ERRORS = "errors"
_MAX_NAME_BYTES = 255
_JSON_TYPES = re.compile(r"application/([a-z.]+\+)?json")
_FILE_TYPES = frozenset(
    ("image/*", "image/png", "image/tiff", "image/webp", "application/geo+json", "text/csv", ZIP)
)
"""Media types of responses besides JSON."""
_COMPRESSED = (".png", ".tiff", ".webp", ".zip")


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result for one image, and its name in the response.

    Attributes:
        page: of a file with several, if the client asked for all.
    """

    name: str
    result: Result
    page: int | None = None


def prefers_json(accept: Sequence[str]) -> bool:
    """Whether a client prefers JSON to a file (RFC 9110, section 12.5.1).

    It does if it accepts JSON with a higher quality than any kind of file, and with at least that
    of `*/*`.

    Args:
        accept: the values of its Accept headers.
    """
    if not accept:
        return False
    quality = {JSON: 0.0, "file": 0.0, "*/*": 0.0}
    for item in ",".join(accept).lower().split(","):
        media_type, *parameters = (part.strip() for part in item.split(";"))
        given = next((part[2:] for part in parameters if part.startswith("q=")), "1")
        if media_type in _FILE_TYPES:
            media_type = "file"
        if media_type in quality and re.fullmatch(r"[01](\.\d*)?", given):
            quality[media_type] = max(quality[media_type], float(given))
    return quality[JSON] > quality["file"] and quality[JSON] >= quality["*/*"]


def only_output(answers: Sequence[Answer]) -> Rendered | None:
    """The output, if the response consists of one; None if it needs a zip."""
    if len(answers) != 1 or isinstance(answers[0].result, ServiceError):
        return None
    rendered = list(answers[0].result.rendered.values())
    return rendered[0] if len(rendered) == 1 else None


def mask_headers(result: Segmentation) -> dict[str, str]:
    """The headers that describe the result for a single image."""
    headers = {
        "X-Mask-Coverage": f"{result.coverage:.6f}",
        "X-Mask-Confidence": f"{result.confidence:.6f}",
        "X-Image-Pages": str(result.pages),
        "Server-Timing": ", ".join(
            f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in result.seconds.items()
        ),
    }
    if result.objects is not None:
        headers["X-Mask-Objects"] = str(result.objects)
    return headers


def write_json(head: Mapping[str, Any], answers: Sequence[Answer]) -> bytes:
    """A document with the statistics of each image and its outputs, by their names.

    Outputs that are JSON or text are included as such, others in base64.

    Args:
        head: the first members of the document.
    """
    images = [_describe_image(answer) for answer in answers]
    return encode_json({**head, "images": images})


def write_zip(answers: Sequence[Answer]) -> bytes:
    """Each output as a file, and `errors.json` with the images that failed.

    A file is called `<name>.<ext>`, or `<name>-<output>.<ext>` where several outputs of an image
    have the same extension.
    """
    failures = {}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for answer in answers:
            if isinstance(answer.result, ServiceError):
                failures[answer.name] = _describe_failure(answer.result)
                continue
            for name, rendered in _name_outputs(answer.name, answer.result.rendered):
                compressed = rendered.suffix in _COMPRESSED
                method = zipfile.ZIP_STORED if compressed else zipfile.ZIP_DEFLATED
                archive.writestr(name, rendered.content, method)
        if failures:
            archive.writestr(f"{_ERRORS}.json", json.dumps(failures, indent=2))
    return buffer.getvalue()


def unique_names(names: Iterable[str]) -> list[str]:
    """Number equal names, so that no output overwrites another. An empty one becomes `image`."""
    unique: list[str] = []
    used = {_ERRORS}
    numbers: Counter[str] = Counter()  # the last one that each name was given
    for given in names:
        stem = name = given or "image"
        while name.lower() in used:
            numbers[stem.lower()] += 1
            name = f"{stem}-{numbers[stem.lower()] + 1}"
        used.add(name.lower())
        unique.append(name)
    return unique


def _name_outputs(name: str, rendered: Mapping[Output, Rendered]) -> Iterator[tuple[str, Rendered]]:
    endings = distinguish_files({output: each.suffix for output, each in rendered.items()})
    for output, each in rendered.items():
        end = endings[output]
        yield cut_utf8(name, _MAX_NAME_BYTES - len(end)) + end, each


def _describe_image(answer: Answer) -> dict[str, Any]:
    described: dict[str, Any] = {"name": answer.name}
    if answer.page is not None:
        described["page"] = answer.page
    result = answer.result
    if isinstance(result, ServiceError):
        return described | {"error": _describe_failure(result)}
    described |= {
        "width": result.width,
        "height": result.height,
        "pages": result.pages,
        "coverage": result.coverage,
        "confidence": result.confidence,
        "milliseconds": {
            stage: round(seconds * 1000, 1) for stage, seconds in result.seconds.items()
        },
    }
    if result.objects is not None:
        described["objects"] = result.objects
    return described | {
        str(output): _inline(rendered) for output, rendered in result.rendered.items()
    }


def _inline(rendered: Rendered) -> EncodedValue:
    """An output as a value in JSON."""
    if _JSON_TYPES.fullmatch(rendered.media_type):
        return EncodedValue(rendered.content)
    if rendered.media_type.startswith("text/"):
        return EncodedValue(json.dumps(rendered.content.decode()).encode())
    return EncodedValue(b'"%b"' % base64.b64encode(rendered.content))


def _describe_failure(error: ServiceError) -> dict[str, Any]:
    status, detail = classify_error(error)
    return {"status": status, "detail": detail}
