"""Which directories of a TIFF are pages, and which planes are channels."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from model.pixels import SelectionError
from model.tiff.pages import count_pages
from model.tiff.reader import TiffReader
from tests.conftest import set_tag

RNG = np.random.default_rng(0)
SIZE = (32, 48)
GREY = RNG.integers(0, 256, SIZE, np.uint8)
SMALL = GREY[::2, ::2].copy()


def stack(*shape: int) -> np.ndarray:
    """Planes that differ, of (*shape, H, W)."""
    values = RNG.integers(0, 65536, (*shape, *SIZE))
    return values.astype(np.uint16)


def written(values: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **{"photometric": "minisblack"} | options)
    return buffer.getvalue()


def in_turn(*pages: tuple[np.ndarray, dict[str, Any]]) -> bytes:
    """Directories one after the other, each with options of its own.

    The option `kind` is a value of NewSubfileType, some of which tifffile refuses to write.
    """
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        for values, options in pages:
            plain = {"photometric": "minisblack", "metadata": None, "subfiletype": 1}
            used = {key: value for key, value in options.items() if key != "kind"}
            writer.write(values, **plain | used)
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        written = [each for page in file.pages for each in (page, *(page.pages or ()))]
        for page, (_, options) in zip(written, pages, strict=True):
            struct.pack_into("<I", data, page.tags[254].valueoffset, options.get("kind", 0))
    return bytes(data)


def read(data: bytes, page: int | None = None, channel: int | None = None) -> np.ndarray:
    image = TiffReader(data).select(page, channel)
    pixels = image.read()
    layout = image.layout()
    assert pixels.shape[:2] == (layout.height, layout.width)
    return pixels


def assert_pages(data: bytes, expected: Sequence[np.ndarray]) -> None:
    assert TiffReader(data).pages == len(expected)
    for page, pixels in enumerate(expected):
        assert (read(data, page) == pixels).all()


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "jpeg2000"])
@pytest.mark.parametrize("options", [{}, {"metadata": None}, {"bigtiff": True}], ids=str)
def test_each_plane_of_a_stack_is_a_page(options: dict[str, Any], compression: str | None) -> None:
    values = stack(4)
    assert_pages(written(values, compression=compression, **options), values)


@pytest.mark.parametrize("axes", ["TYX", "ZYX", "TZYX"])
@pytest.mark.parametrize("format", ["ome", "imagej"])
def test_time_and_depth_are_pages(format: str, axes: str) -> None:
    values = stack(*((3,), (2, 3))[len(axes) - 3])
    data = written(values, **{format: True}, metadata={"axes": axes})
    assert_pages(data, values.reshape(-1, *SIZE))


@pytest.mark.parametrize("format", ["ome", "imagej"])
def test_channels_are_chosen_within_a_page(format: str) -> None:
    values = stack(3, 4, 2)  # T, Z, C
    data = written(values, **{format: True}, metadata={"axes": "TZCYX"})
    reader = TiffReader(data)
    assert reader.pages == 12
    for page in range(12):
        with pytest.raises(SelectionError, match="2 channels"):
            reader.select(page)
        for channel in range(2):
            image = reader.select(page, channel)
            assert image.channels == 2
            assert (image.read() == values[page // 4, page % 4, channel]).all()


def test_axes_of_a_shaped_file_and_of_another_order() -> None:
    values = stack(3, 2)  # C, Z
    data = written(values, metadata={"axes": "CZYX"})
    assert TiffReader(data).pages == 2
    for page in range(2):
        for channel in range(3):
            assert (read(data, page, channel) == values[channel, page]).all()


def test_three_separate_channels_are_colors_only_if_they_are_named_so() -> None:
    values = stack(3)
    for axes in ({"ome": True}, {"imagej": True}):
        with pytest.raises(SelectionError, match="3 channels"):
            read(written(values, metadata={"axes": "CYX"}, **axes))
    rgb = np.moveaxis(values, 0, 2)
    named = {"axes": "CYX", "Channel": {"Name": ["Red", "Green", "Blue"]}}
    colored = {"axes": "CYX", "Channel": {"Color": [-16776961, 16711935, 65535]}}
    labelled = {"axes": "CYX", "Labels": ["Red", "Green", "Blue"]}
    for options in (
        {"ome": True, "metadata": named},
        {"ome": True, "metadata": colored},
        {"imagej": True, "metadata": labelled},
    ):
        data = written(values, **options)
        assert (read(data) == rgb).all()
        assert (read(data, channel=1) == values[1]).all()


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("count", [2, 4, 5])
def test_samples_of_unknown_meaning_are_channels(count: int, planar: str) -> None:
    values = stack(count)
    shaped = values if planar == "separate" else np.moveaxis(values, 0, 2)
    for options in ({"metadata": None}, {}, {"ome": True}):
        data = written(shaped, planarconfig=planar, **options)
        with pytest.raises(SelectionError, match=f"{count} channels") as caught:
            read(data)
        assert caught.value.choices == f"channel=0 to channel={count - 1} for one of them"
        for channel in range(count):
            assert (read(data, channel=channel) == values[channel]).all()
        with pytest.raises(SelectionError, match=f"channel={count}: "):
            read(data, channel=count)


def test_grey_with_alpha_is_one_channel() -> None:
    values = np.dstack([GREY, np.full(SIZE, 255, np.uint8)])
    for kind in ("unassalpha", "assocalpha"):
        data = written(values, planarconfig="contig", extrasamples=[kind])
        assert (read(data) == GREY).all()
        assert TiffReader(data).select().channels == 1


def test_alpha_is_not_among_the_channels_to_choose_from() -> None:
    values = np.moveaxis(stack(3), 0, 2)
    values[:, :, 2] = 65535
    data = written(values, planarconfig="contig", extrasamples=["unspecified", "unassalpha"])
    assert TiffReader(data).select(channel=0).channels == 2
    assert (read(data, channel=1) == values[:, :, 1]).all()


@pytest.mark.parametrize("axes", ["ZYX", "CYX"])
def test_planes_that_one_directory_describes(axes: str) -> None:
    """As ImageJ writes stacks of more than 4 GB."""
    values = stack(5)
    whole = written(values, imagej=True, metadata={"axes": axes})
    with tifffile.TiffFile(io.BytesIO(whole)) as file:
        first = file.pages.first
        tags = struct.unpack_from(file.byteorder + "H", whole, first.offset)[0]
        pointer = first.offset + 2 + 12 * tags
    one = whole[:pointer] + bytes(4) + whole[pointer + 4 :]
    with tifffile.TiffFile(io.BytesIO(one)) as file:
        assert len(file.pages) == 1
    for data in (one, written(values, truncate=True, metadata={"axes": axes})):
        for index in range(5):
            chosen = (index, None) if axes == "ZYX" else (0, index)
            assert (read(data, *chosen) == values[index]).all()


def test_a_stack_in_one_directory_that_was_cut_off_has_to_be_chosen_from() -> None:
    values = stack(5)
    whole = written(values, imagej=True, truncate=True, metadata={"axes": "ZYX"})
    cut = whole[: len(whole) - 2 * values[0].nbytes]
    with pytest.raises(SelectionError, match="cut off: only its first page") as caught:
        read(cut)
    assert caught.value.choices == "page=0 for it"
    assert (read(cut, 0) == values[0]).all()


def test_a_single_plane_keeps_its_description() -> None:
    """Programs that save one plane of a stack keep what its metadata say about the others."""
    description = "ImageJ=1.53t\nimages=50\nslices=50\n"
    assert (read(written(GREY, description=description, metadata=None)) == GREY).all()


REDUCED = {"kind": 1}
MASK = {"kind": 4}
SIDES: dict[str, tuple[tuple[np.ndarray, dict[str, Any]], ...]] = {
    "thumbnail first": ((SMALL, REDUCED), (GREY, {})),
    "thumbnail last": ((GREY, {}), (SMALL, REDUCED)),
    "thumbnail between": ((GREY, {}), (SMALL, REDUCED), (SMALL[::2, ::2].copy(), REDUCED)),
    "mask first": ((GREY // 255, MASK), (GREY, {})),
    "mask last": ((GREY, {}), (GREY // 255, MASK)),
    "reduced mask": ((GREY, {}), (SMALL, {"kind": 5})),
    "old tag of reduced images": ((GREY, {}), (SMALL, {"extratags": [(255, 3, 1, 2, True)]})),
    "pyramid in SubIFDs": ((GREY, {"subifds": 2}), (SMALL, REDUCED), (SMALL[::2], REDUCED)),
    "SubIFDs without flags": ((GREY, {"subifds": 1}), (SMALL, {})),
    "full image in the SubIFD of a thumbnail": ((SMALL, REDUCED | {"subifds": 1}), (GREY, {})),
}


@pytest.mark.parametrize("kind", SIDES)
def test_reduced_images_and_masks_are_not_pages(kind: str) -> None:
    assert_pages(in_turn(*SIDES[kind]), [GREY])


def test_levels_of_a_tiled_pyramid_are_not_pages_without_a_flag_either() -> None:
    tall = RNG.integers(0, 256, (256, 512), np.uint8)
    tiled = {"tile": (64, 64)}
    levels = [(tall[::step, ::step].copy(), tiled) for step in (1, 2, 4)]
    assert_pages(in_turn(*levels), [tall])
    flat = [(values, {}) for values, _ in levels]
    assert TiffReader(in_turn(*flat)).pages == 3


def test_a_file_of_nothing_but_a_reduced_image_has_a_page() -> None:
    assert_pages(in_turn((GREY, REDUCED)), [GREY])
    assert_pages(in_turn((GREY, MASK)), [GREY])


def test_pages_may_differ_in_everything() -> None:
    deep = stack(1)[0][:, ::2]
    rgb = RNG.integers(0, 256, (9, 8, 3), np.uint8)
    data = in_turn(
        (GREY, {"compression": "lzw"}), (deep, {}), (rgb, {"photometric": "rgb", "tile": (16, 16)})
    )
    assert_pages(data, [GREY, deep, rgb])


def test_planes_of_a_volume_are_pages() -> None:
    values = RNG.integers(0, 256, (20, 32, 48), np.uint8)
    for options in ({}, {"compression": "zlib"}):
        data = written(values, volumetric=True, tile=(16, 16, 16), **options)
        assert_pages(data, values)


def test_a_loop_of_directories_ends() -> None:
    buffer = io.BytesIO()
    images = [Image.fromarray(GREY // (index + 1)) for index in range(3)]
    images[0].save(buffer, "TIFF", save_all=True, append_images=images[1:])
    data = bytearray(buffer.getvalue())
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        offsets = [page.offset for page in file.pages]
    for back_to in range(3):
        tags = struct.unpack_from("<H", data, offsets[2])[0]
        struct.pack_into("<I", data, offsets[2] + 2 + 12 * tags, offsets[back_to])
        assert TiffReader(bytes(data)).pages == 3


def test_damaged_metadata_leave_every_directory_a_page() -> None:
    values = stack(4)
    for options, text in (
        ({"ome": True}, b"<?xml version"),
        ({"ome": True}, b"SizeZ="),
        ({"ome": True}, b"DimensionOrder="),
        ({"imagej": True}, b"channels=4"),
        ({}, b'{"shape": [4'),
    ):
        data = written(values, **options)
        at = data.index(text) if text in data else data.index(b"Size")
        broken = data[:at] + b"?" * len(text) + data[at + len(text) :]
        reader = TiffReader(broken)
        chosen = [(page, None) for page in range(4)]
        if reader.pages == 1:
            chosen = [(0, channel) for channel in range(4)]
        planes = [reader.select(*each).read() for each in chosen]
        assert len(planes) == 4
        for plane, expected in zip(planes, values, strict=True):
            assert (plane == expected).all()


def test_metadata_name_no_other_file_that_is_opened(tmp_path: Path) -> None:
    """An OME-TIFF may refer to other files. They could be any files of the machine."""
    other = tmp_path / "other.ome.tif"
    tifffile.imwrite(other, stack(2), ome=True)
    with tifffile.TiffFile(other) as file:
        xml = file.ome_metadata
    assert xml is not None
    uuid = '<UUID FileName="other.ome.tif">urn:uuid:1</UUID>'
    referring = xml.replace("<TiffData ", f'<TiffData IFD="0">{uuid}</TiffData><TiffData ', 1)
    path = tmp_path / "image.ome.tif"
    tifffile.imwrite(path, GREY, description=referring, metadata=None)
    assert count_pages(path) == 1
    assert_pages(path.read_bytes(), [GREY])


def test_pages_of_a_file_are_counted_without_reading_it_all(tmp_path: Path) -> None:
    path = tmp_path / "stack.tif"
    path.write_bytes(written(stack(7)))
    assert count_pages(path) == 7


def test_a_missing_page_is_named() -> None:
    data = written(stack(3))
    with pytest.raises(SelectionError, match=r"^the image has 3 pages$") as caught:
        read(data)
    assert caught.value.choices == "page=0 to page=2 for one of them, or page=all"
    with pytest.raises(SelectionError, match=r"^page=3: the image has 3 pages, page=0 to page=2$"):
        read(data, 3)


def test_an_absurd_depth_is_damage() -> None:
    data = written(GREY[None, :, :], volumetric=True, tile=(16, 16, 16), metadata=None)
    for depth in (0, 10**9):
        with pytest.raises(ValueError, match=r"."):
            read(set_tag(data, 32997, depth))
