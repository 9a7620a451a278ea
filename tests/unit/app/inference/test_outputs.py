"""The needs of outputs, and options that fit together."""

from __future__ import annotations

import pytest

from app.errors import InvalidRequest
from app.inference.outputs import FileFormat, Options, Output, Rendered, Segmentation
from model.config import PreprocessConfig

PERCENTILE = PreprocessConfig(intensity="percentile")
SEVERAL = PreprocessConfig(
    classes=("background", "cell", "debris"), palette=((0, 0, 0), (255, 0, 0), (0, 255, 0))
)


def test_options_need_what_any_output_needs() -> None:
    assert not Options().needs_image
    assert not Options((Output.MASK, Output.OVERLAY)).needs_full_probabilities
    both = Options((Output.MASK, Output.CUTOUT))
    assert both.needs_image
    assert both.needs_full_probabilities
    assert not both.needs_objects
    assert Options((Output.MASK, Output.POLYGONS)).needs_objects


@pytest.mark.parametrize("options", [Options(min_area=1), Options(exclude_edges=True)])
def test_removing_objects_needs_them_separated(options: Options) -> None:
    assert options.needs_objects
    assert options.needs_full_probabilities
    assert not options.needs_image


def test_size_counts_every_output() -> None:
    rendered = {
        Output.MASK: Rendered(b"12", "x/y", ".x"),
        Output.CUTOUT: Rendered(b"345", "x/y", ".x"),
    }
    assert Segmentation(rendered, 1, 1, 0, 1).size == 5


@pytest.mark.parametrize(
    "options",
    [
        Options(tuple(Output), 0.5, percentiles=(0, 100), min_area=9, pixel_size=0.1),
        Options((Output.CUTOUT,), background=(1, 2, 3), format=FileFormat.WEBP),
        Options((Output.CUTOUT, Output.MEASUREMENTS), format=FileFormat.WEBP),
        Options((Output.INSTANCES, Output.ROIS), format=FileFormat.TIFF),
    ],
)
def test_options_that_fit_are_accepted(options: Options) -> None:
    options.check(PERCENTILE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(min_area=-1), "min_area=-1 must be at least 0 pixels"),
        (Options(pixel_size=0), "pixel_size=0 must be more than 0"),
        (Options(pixel_size=float("inf")), "pixel_size=inf must be more than 0"),
        (Options(percentiles=(5, 5)), "percentiles=5,5 must be LOW,HIGH"),
        (Options(percentiles=(90, 10)), "LOW < HIGH"),
        (Options(percentiles=(0, 101)), "LOW < HIGH"),
        (Options(percentiles=(float("nan"), 50)), "LOW < HIGH"),
        (Options(background=(0, 0, 0)), "output=cutout"),
        (Options(format=FileFormat.WEBP), "overlay, cutout, preview, not for mask"),
        (Options((Output.COCO,), format=FileFormat.TIFF), "pictures, not for coco"),
    ],
)
def test_options_that_do_not_fit_are_rejected(options: Options, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        options.check(PERCENTILE)


def test_percentiles_need_a_model_that_uses_them() -> None:
    with pytest.raises(InvalidRequest, match="full range"):
        Options(percentiles=(1, 99)).check(PreprocessConfig())


def test_models_of_several_classes_have_neither_instances_nor_a_threshold() -> None:
    for options in (Options((Output.INSTANCES,)), Options(threshold=0.5)):
        with pytest.raises(InvalidRequest, match="3 classes"):
            options.check(SEVERAL)
    for output in (Output.POLYGONS, Output.COCO, Output.ROIS, Output.MEASUREMENTS):
        Options((output,), min_area=5).check(SEVERAL)
