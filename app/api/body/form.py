"""The parts of a multipart/form-data body (RFC 7578), parsed as they arrive.

Knows bytes; no requests. Every part is checked at the end of its headers, and nothing is kept that
the caller does not ask for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.body.names import decode_filename
from app.errors import InvalidRequest

FILE = "file"
"""Name of the parts that are files."""

_FILE_NAMES = {"filename", "filename*"}
"""Parameters of a Content-Disposition that are the name of a file."""
_MAX_CONTENT_TYPE = 1000
"""Characters of a Content-Type. Parsing its parameters takes quadratic time."""
_MAX_FILES = 1000
_MAX_PART_HEADERS = 16
_MAX_PART_HEADER_BYTES = 4096
_MAX_VALUE_BYTES = 1000

_PARAMETER = re.compile(rb';\s*([\w*-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;]*))', re.S)
_ESCAPED = re.compile(rb'\\(["\\])')
"""Escapes, as curl writes them. A backslash before anything else belongs to a Windows path."""


@dataclasses.dataclass(frozen=True)
class FilePart:
    """A file of a form.

    Attributes:
        name: as the client sent it; empty if it sent none.
        chunks: its bytes.
        is_field: the part has the name `file`, but no file name, as a field with a value has it.
    """

    name: str
    chunks: list[bytes]
    is_field: bool = False


class FormParser:
    """Collects the files and the fields of a form.

    Names are UTF-8 whatever charset a client declares.

    Args:
        content_type: of the body.
        fields: names of the parts that are values; others than these and `file` are errors.
        parameters: names that belong in the query of the request.

    Attributes:
        files: in the order of their parts.
        file_bytes: in all files.
        values: of the fields.

    Raises:
        InvalidRequest: the content type declares no boundary, or not a valid one.
    """

    def __init__(
        self, content_type: str, fields: Collection[str] = (), parameters: Collection[str] = ()
    ) -> None:
        self.files: list[FilePart] = []
        self.file_bytes = 0
        self.values: dict[str, bytes] = {}
        self._fields = fields
        self._parameters = parameters
        self._field = ""
        self._boundary = read_boundary(content_type)
        self._begun = self._complete = False
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        try:
            self._parser = MultipartParser(
                self._boundary,
                {
                    "on_part_begin": self._start_part,
                    "on_header_field": self._add_header,
                    "on_header_value": self._add_value,
                    "on_header_end": self._end_header,
                    "on_headers_finished": self._check_part,
                    "on_part_data": self._add_data,
                    "on_end": self._end_form,
                },
                max_header_count=_MAX_PART_HEADERS,
                max_header_size=_MAX_PART_HEADER_BYTES,
            )
        except FormParserError as error:
            raise InvalidRequest(f"the multipart body is malformed: {error}") from None

    def feed(self, data: bytes) -> None:
        """Parse the next bytes.

        Raises:
            InvalidRequest: malformed, or a part that is not expected.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            if not self._begun:
                raise self._not_multipart() from None
            raise InvalidRequest(f"the multipart body is malformed: {error}") from None

    def finish(self) -> None:
        """Check that the form is complete and has a file.

        Raises:
            InvalidRequest: it is not, or has none.
        """
        if self._complete and not self.files:
            raise InvalidRequest(f"the body has no part named {FILE!r}")
        if not self._complete:  # the parser accepts parts without an end
            raise InvalidRequest("the multipart body is incomplete: no closing boundary")

    def _not_multipart(self) -> InvalidRequest:
        boundary = self._boundary[:100].decode("utf-8", "replace")
        return InvalidRequest(
            f"Content-Type says multipart, but the body does not begin with --{boundary}, its "
            f"boundary; send the image as a part named {FILE!r}, or raw with Content-Type "
            "application/octet-stream"
        )

    def _start_part(self) -> None:
        self._begun = True
        self._disposition = b""
        self._field = ""

    def _add_header(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _add_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _check_part(self) -> None:
        """Start a file or a value. A part without a name is a file, because only files are sent."""
        parameters = parse_disposition(self._disposition)
        name = parameters.get("name", FILE.encode()).decode("utf-8", "replace")
        if name in self._fields:
            self._start_value(name)
        elif name == FILE:
            if len(self.files) == _MAX_FILES:
                raise InvalidRequest(f"too many files; at most {_MAX_FILES} are allowed")
            is_field = "name" in parameters and not parameters.keys() & _FILE_NAMES
            self.files.append(FilePart(decode_filename(parameters), [], is_field))
        elif name in self._parameters:
            raise InvalidRequest(
                f"{name} is a parameter of the query, not a field of the form; write it after the "
                f"path: ?{name}=VALUE"
            )
        else:
            accepted = f"send images as {FILE!r}"
            accepted += f"; fields are {', '.join(self._fields)}" if self._fields else ""
            raise InvalidRequest(f"unknown form field {name[:100]!r}; {accepted}")

    def _start_value(self, name: str) -> None:
        if name in self.values:
            raise InvalidRequest(f"{name} is given twice; send it once")
        self.values[name] = b""
        self._field = name

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if not self._field:
            self.files[-1].chunks.append(data[start:end])
            self.file_bytes += end - start
            return
        if len(self.values[self._field]) + end - start > _MAX_VALUE_BYTES:
            raise InvalidRequest(f"{self._field} has more than {_MAX_VALUE_BYTES} bytes")
        self.values[self._field] += data[start:end]

    def _end_form(self) -> None:
        self._complete = True


def read_boundary(content_type: str) -> bytes:
    """The boundary that a Content-Type declares.

    Raises:
        InvalidRequest: the header declares none, or is too long.
    """
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise InvalidRequest(f"Content-Type is longer than {_MAX_CONTENT_TYPE} characters")
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise InvalidRequest(
            "the multipart body is malformed: Content-Type has no boundary; leave this header to "
            "the library that makes the body"
        )
    return boundary


def parse_disposition(value: bytes) -> dict[str, bytes]:
    """The parameters of a Content-Disposition by name in lower case (RFC 6266, section 4.1).

    python-multipart ignores `filename*`, which RFC 7578 forbids and clients send.
    """
    parameters = {}
    for name, quoted, token in _PARAMETER.findall(value):
        unquoted = _ESCAPED.sub(rb"\1", quoted) if quoted else token.strip().strip(b'"')
        parameters[name.decode("ascii").lower()] = unquoted
    return parameters
