"""The query of POST /segment as pydantic reads it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from app.api.schemas import SegmentQuery
from app.api.validation import describe_validation_error
from app.inference.outputs import FileFormat, Options, Output


def read(**values: Any) -> SegmentQuery:
    return SegmentQuery.model_validate(values)


def test_nothing_asks_for_the_mask() -> None:
    assert read().options == Options()


def test_every_parameter_reaches_the_options() -> None:
    query = read(
        model="person",
        threshold="0.4",
        output=["mask", "polygons"],
        page="3",
        channel="2",
        format="tiff",
        min_area="12",
        exclude_edges="true",
        percentiles="1,99.5",
        pixel_size="0.65",
        background="#FF8000",
    )
    assert query.model == "person"
    assert query.options == Options(
        outputs=(Output.MASK, Output.POLYGONS),
        threshold=0.4,
        page=3,
        channel=2,
        format=FileFormat.TIFF,
        min_area=12,
        exclude_edges=True,
        percentiles=(1.0, 99.5),
        pixel_size=0.65,
        background=(255, 128, 0),
    )


def test_all_pages_are_not_a_page() -> None:
    assert read(page="all").page == "all"
    assert read(page="all").options.page is None


@pytest.mark.parametrize(
    ("name", "value", "detail"),
    [
        ("output", ["hologram"], "'coco', 'rois', 'measurements' or 'preview', not 'hologram'"),
        ("output", ["mask,polygons"], "not 'mask,polygons'"),
        ("output", ["mask", "polygons", "mask"], "mask is given twice"),
        ("output", ["mask"] * 5000, "at most 10 items"),
        ("output", ["?"] * 5000, "not '?'"),
        *(
            ("page", value, "must be the number of a page, from 0, or 'all'")
            for value in ("-1", "1.5", "ALL", "", "1,2", "\u0661", "9" * 5000)
        ),
        ("channel", "-1", "greater than or equal to 0"),
        ("channel", "red", "valid integer"),
        ("format", "jpeg", "'png', 'tiff' or 'webp', not 'jpeg'"),
        ("min_area", "-1", "greater than or equal to 0"),
        ("exclude_edges", "perhaps", "valid boolean"),
        *(
            ("percentiles", value, "must be LOW,HIGH with 0 <= LOW < HIGH <= 100")
            for value in (
                "1",
                "1,2,3",
                "a,b",
                "99,1",
                "5,5",
                "-1,50",
                "1,101",
                "nan,nan",
                "1;99",
                "",
            )
        ),
        ("pixel_size", "0", "greater than 0"),
        ("pixel_size", "inf", "finite number"),
        *(
            ("background", value, "must be RRGGBB in hexadecimal")
            for value in ("fff", "red", "##ffffff", "ffffffff", "", "0x1234")
        ),
    ],
)
def test_invalid_value_is_named_with_what_is_right(name: str, value: Any, detail: str) -> None:
    with pytest.raises(ValidationError) as raised:
        read(**{name: value})
    described = describe_validation_error(raised.value.errors()[0])
    assert described.startswith(name)
    assert detail in described
    assert len(described) < 400
