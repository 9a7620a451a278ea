"""The filter of objects: its unit, and that the saved mask is the shown one."""

from __future__ import annotations

from pathlib import Path

import tifffile
from playwright.sync_api import Page, Route

from tests.browser.conftest import (
    choose_files,
    choose_outputs,
    outputs_of,
    read_table,
    render_output,
    save_file,
    saved_view,
    send_outputs,
    square_mask,
    unzip,
    wait_done,
    wait_drawn,
)
from tests.conftest import decode, encode, nuclei


def test_area_filter_keeps_the_unit_in_which_it_was_typed(page: Page, tmp_path: Path) -> None:
    """The same pixels in a file with a pixel size, and in one without."""
    path = tmp_path / "sized.tif"
    pixels, metadata = nuclei(120, 200)[0], {"unit": "um", "axes": "YX"}
    tifffile.imwrite(path, pixels, imagej=True, resolution=(4.0, 4.0), metadata=metadata)
    choose_files(page, ("plain.png", encode(pixels)), ("sized.tif", path.read_bytes()))
    wait_done(page, 2)
    page.click("#strip [title='plain.png']")
    wait_drawn(page)
    count, counts = page.inner_text("#strip .count >> nth=0"), page.locator("#strip .count")
    page.fill("#min-area", "150")
    kept = page.inner_text("#strip .count >> nth=0")
    assert 0 < int(kept) < int(count)
    assert counts.all_inner_texts() == [kept, kept]
    page.click("#strip [title='sized.tif']")
    wait_drawn(page)
    assert page.inner_text("#area-unit") == "px"
    rows = read_table(unzip(save_file(page, "#download-all")[1]))
    assert [row["min_area"] for row in rows] == ["150 px", "150 px"]

    page.click("#filter-reset")
    assert page.inner_text("#area-unit") == "µm²"
    assert not page.is_visible("#filter-note")
    page.fill("#min-area", str(150 / 16))
    assert counts.all_inner_texts() == [count, kept]
    assert not page.is_visible("#filter-note")
    page.click("#strip [title='plain.png']")
    wait_drawn(page)
    assert page.inner_text("#area-unit") == "µm²"
    assert page.is_visible("#filter-note")
    rows = read_table(unzip(save_file(page, "#download-all")[1]))
    assert [row["min_area"] for row in rows] == ["", "9.375 um2"]


def test_saved_mask_is_the_shown_one_where_the_filter_removes_nothing(page: Page) -> None:
    """The mask has pixels that belong to no object."""
    mask = square_mask()
    uncertain = mask.copy()
    uncertain[:4, :4] = 255

    def serve(route: Route) -> None:
        contents = {each: render_output(each, mask) for each in outputs_of(route)}
        send_outputs(route, contents | {"mask": encode(uncertain)})

    page.route("**/segment*", serve)
    choose_files(page, ("cells.png", encode(mask)))
    wait_done(page)
    for least in ("0.5", "0.95"):  # the score of the object is 0.9
        page.fill("#min-score", least)
        seen = saved_view(page, "mask")[..., 0]
        choose_outputs(page, "mask")
        assert (decode(save_file(page)[1]) == seen).all()
        assert seen.any() == (least == "0.5")
