"""The counter rejects a part that is more than allowed, however it was counted."""

from __future__ import annotations

import pytest

from app.errors import ImageTooLarge
from app.imaging.structure.counter import PartCounter


def test_parts_are_counted_up_to_their_bounds() -> None:
    count = PartCounter("XYZ", {"frames": 3, "bytes of metadata": 10})
    count.add("frames")
    count.add("frames", 2)
    count.add("bytes of metadata", 10)
    assert count.remaining("frames") == 0
    with pytest.raises(ImageTooLarge, match=r"^the XYZ has more than 3 frames$"):
        count.add("frames")


def test_part_that_is_counted_anew_starts_at_its_amount() -> None:
    count = PartCounter("XYZ", {"entries": 3})
    for amount in (3, 2):
        count.set("entries", amount)
    assert count.remaining("entries") == 1
    with pytest.raises(ImageTooLarge, match="more than 3 entries"):
        count.set("entries", 4)
