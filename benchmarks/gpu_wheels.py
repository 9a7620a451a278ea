"""Shrink wheels that travel to a borrowed GPU: `python -m benchmarks.gpu_wheels FOLDER`.

The wheel of imagecodecs has every codec, 28 MB. The proof reads PNG and JPEG, for which 3 MB are
enough: imagecodecs loads each codec when it is first used. NumPy is deleted: the image has it.
"""

from __future__ import annotations

import re
import sys
import zipfile
from pathlib import Path

_KEPT = re.compile(
    r".*\.py|.*dist-info/.*|imagecodecs/_(shared|shared_cython|imcd|png|jpeg8|zlib)\..*"
    r"|imagecodecs\.libs/lib(png|jpeg|z|deflate)[^a-zA-Z].*"
)


def shrink(wheel: Path) -> None:
    """Replace a wheel of imagecodecs by one with the codecs of PNG and JPEG alone."""
    part = wheel.with_suffix(".part")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for item in source.infolist():
            if _KEPT.fullmatch(item.filename):
                target.writestr(item, source.read(item))
    part.replace(wheel)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for found in sorted(folder.glob("imagecodecs-*.whl")):
        shrink(found)
    for found in folder.glob("numpy-*.whl"):
        found.unlink()
