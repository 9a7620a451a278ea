"""Count the parts of a file up to their bounds, for the checks of all formats. Knows no format.

| formats | part | bound |
|---|---|---|
| JPEG, PNG, WebP, JPEG 2000, AVIF, HEIC | bytes of metadata | 16 MiB |
"""

from __future__ import annotations

from collections.abc import Mapping

from app.errors import ImageTooLarge

METADATA_BYTES = 16 << 20
SEARCHED_BYTES = 1 << 20
"""A search holds Python's lock, so it is done in pieces: 1 MiB takes up to 8 ms."""


class PartCounter:
    """Counts the parts of one file.

    Args:
        format: name of the file's format, for the error.
        bounds: part -> the largest number that is allowed.
    """

    def __init__(self, format: str, bounds: Mapping[str, int]) -> None:
        self._format = format
        self._bounds = bounds
        self._counts = dict.fromkeys(bounds, 0)

    def add(self, part: str, amount: int = 1) -> None:
        """Count `amount` more of a part.

        Raises:
            ImageTooLarge: more than allowed.
        """
        self.set(part, self._counts[part] + amount)

    def set(self, part: str, amount: int) -> None:
        """Count a part anew. Its bound is that of one directory, list or side.

        Raises:
            ImageTooLarge: more than allowed.
        """
        self._counts[part] = amount
        bound = self._bounds[part]
        if amount > bound:
            raise ImageTooLarge(f"the {self._format} has more than {bound} {part}")

    def remaining(self, part: str) -> int:
        """Return how many more of a part are allowed."""
        return self._bounds[part] - self._counts[part]
