"""Rendering: every output from one decision, and several at once."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tifffile
from PIL import Image

import model.objects
from app.errors import InvalidRequest
from app.inference.outputs import FileFormat, Options, Output, Rendered
from app.inference.rendering import Decision, render, render_output
from model.arrays import AnyArray
from model.config import PreprocessConfig
from model.instances import separate_parts
from model.transforms import mask_and_confidence
from tests.conftest import ROOT, decode, nuclei
from tests.objects import draw_discs

HEIGHT, WIDTH = 90, 120
IMAGE, LABELS = nuclei(HEIGHT, WIDTH)
SEVERAL = PreprocessConfig(
    classes=("background", "cell", "debris"), palette=((0, 0, 0), (255, 0, 0), (0, 255, 0))
)
PERCENTILE = PreprocessConfig(intensity="percentile", percentiles=(1, 99))
MEDIA_TYPES = {
    Output.POLYGONS: ("application/geo+json", ".geojson"),
    Output.COCO: ("application/json", ".json"),
    Output.ROIS: ("application/zip", ".zip"),
    Output.MEASUREMENTS: ("text/csv", ".csv"),
}
SHOWN = (Output.OVERLAY, Output.CUTOUT, Output.PREVIEW)
OF_OBJECTS = (Output.INSTANCES, *MEDIA_TYPES)


def binary(*outputs: Output, **options: object) -> Decision:
    """Objects with a probability of 0.9 before a background of 0.1."""
    foreground = np.where(LABELS > 0, 0.9, 0.1).astype(np.float32)
    return decide(foreground[None], PreprocessConfig(), *outputs, **options)


def several(*outputs: Output, **options: object) -> Decision:
    """The left half of the objects is of class 1, the right half of class 2."""
    found = np.where(LABELS > 0, 1 + (np.arange(WIDTH) >= WIDTH // 2), 0)
    probabilities = np.full((3, HEIGHT, WIDTH), 0.1, np.float32)
    np.put_along_axis(probabilities, found[None], 0.8, axis=0)
    return decide(probabilities, SEVERAL, *outputs, **options)


def decide(
    probabilities: AnyArray,
    preprocess: PreprocessConfig,
    *outputs: Output,
    image: AnyArray = IMAGE,
    pixel_size: float | None = None,
    **options: object,
) -> Decision:
    mask, confidence = mask_and_confidence(probabilities, *probabilities.shape[1:], preprocess)
    return Decision(
        probabilities,
        mask,
        confidence,
        preprocess.threshold,
        preprocess,
        Options(outputs or (Output.MASK,), **options),  # type: ignore[arg-type]
        image,
        pixel_size,
    )


def pixels(rendered: Rendered) -> AnyArray:
    assert (rendered.media_type, rendered.suffix) == ("image/png", ".png")
    return decode(rendered.content)


def read_tiff(rendered: Rendered) -> AnyArray:
    assert (rendered.media_type, rendered.suffix) == ("image/tiff", ".tiff")
    return tifffile.imread(io.BytesIO(rendered.content))


def read_csv(rendered: Rendered) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(rendered.content.decode())))


@pytest.mark.parametrize("output", Output)
def test_every_output_has_a_renderer_and_a_media_type(output: Output) -> None:
    rendered = render_output(binary(), output)
    assert rendered.content
    expected = MEDIA_TYPES.get(output, ("image/png", ".png"))
    assert (rendered.media_type, rendered.suffix) == expected
    if output is not Output.INSTANCES:  # binary models only
        assert render_output(several(), output).content


def test_binary_mask_is_0_and_255() -> None:
    mask = pixels(render_output(binary(), Output.MASK))
    np.testing.assert_array_equal(mask, np.where(LABELS > 0, 255, 0))


def test_mask_of_several_classes_holds_indices() -> None:
    decision = several()
    mask = pixels(render_output(decision, Output.MASK))
    assert set(np.unique(mask)) == {0, 1, 2}
    np.testing.assert_array_equal(mask, decision.mask)


@pytest.mark.parametrize("decision", [binary(), several()], ids=["binary", "several"])
def test_probability_is_of_not_being_background(decision: Decision) -> None:
    values = pixels(render_output(decision, Output.PROBABILITY))
    assert values.dtype == np.uint16
    np.testing.assert_allclose(values[LABELS > 0], 0.9 * 65535, atol=1)
    assert values[LABELS == 0].max() <= 0.21 * 65535


def test_all_outputs_of_objects_show_the_same_objects() -> None:
    decision = binary()
    labels = pixels(render_output(decision, Output.INSTANCES))
    assert labels.dtype == np.uint16
    areas = np.bincount(labels.ravel())[1:].tolist()
    assert decision.objects.count == len(areas) == labels.max() > 1
    features = json.loads(render_output(decision, Output.POLYGONS).content)["features"]
    assert [feature["properties"]["area"] for feature in features] == areas
    coco = json.loads(render_output(decision, Output.COCO).content)
    assert [annotation["area"] for annotation in coco["annotations"]] == areas
    rows = read_csv(render_output(decision, Output.MEASUREMENTS))
    assert [int(row["area_px"]) for row in rows] == areas
    with zipfile.ZipFile(io.BytesIO(render_output(decision, Output.ROIS).content)) as archive:
        assert len(archive.namelist()) == len(areas)


def test_objects_of_several_classes_are_connected_parts() -> None:
    decision = several()
    collection = json.loads(render_output(decision, Output.POLYGONS).content)
    properties = [feature["properties"] for feature in collection["features"]]
    assert {(each["class"], *each["classification"]["color"]) for each in properties} == {
        ("cell", 255, 0, 0),
        ("debris", 0, 255, 0),
    }
    assert {each["objectType"] for each in properties} == {"annotation"}
    assert decision.objects.count == len(properties)
    rows = read_csv(render_output(decision, Output.MEASUREMENTS))
    assert {row["class"] for row in rows} == {"cell", "debris"}


def test_overlay_and_cutout_show_the_image() -> None:
    overlay = pixels(render_output(binary(), Output.OVERLAY))
    cutout = pixels(render_output(binary(), Output.CUTOUT))
    outside = LABELS == 0
    np.testing.assert_array_equal(overlay[outside], np.repeat(IMAGE[outside], 3).reshape(-1, 3))
    np.testing.assert_array_equal(cutout[..., 1], IMAGE)
    assert (overlay[~outside] != IMAGE[~outside][:, None]).any()
    assert cutout[~outside][:, 3].min() > cutout[outside][:, 3].max()


def test_a_cutout_is_opaque_in_a_photograph_of_moderate_probabilities() -> None:
    y, x = np.mgrid[:100, :100]
    distance = 40 - np.hypot(x - 50, y - 50)
    noise = np.random.default_rng(0).uniform(-0.15, 0.15, distance.shape)
    probability = np.clip(np.clip(0.5 + distance / 20, 0, 0.8) + noise, 0, 1)
    probability[distance > 3] = np.maximum(probability[distance > 3], 0.51)
    probability[distance < -3] = np.minimum(probability[distance < -3], 0.49)
    decision = decide(
        probability.astype(np.float32)[None],
        PreprocessConfig(),
        image=np.zeros((100, 100, 3), np.uint8),
    )
    alpha = pixels(render_output(decision, Output.CUTOUT))[..., 3]
    assert (alpha[distance > 6] == 255).all()
    assert (alpha[distance < -6] == 0).all()


def test_a_cutout_may_have_a_background() -> None:
    cutout = pixels(render_output(binary(background=(255, 0, 9)), Output.CUTOUT))
    assert cutout.shape == (HEIGHT, WIDTH, 3)
    corners = cutout[LABELS == 0]
    assert (corners == (255, 0, 9)).all(axis=1).mean() > 0.9


def test_a_preview_is_what_the_model_sees() -> None:
    wide = IMAGE.astype(np.uint16) * 3 + 500
    wide[0, 0] = 65535  # hot
    foreground = np.zeros((1, HEIGHT, WIDTH), np.float32)
    for config in (PERCENTILE, PreprocessConfig()):
        preview = pixels(render_output(decide(foreground, config, image=wide), Output.PREVIEW))
        assert preview.dtype == np.uint8
        assert preview.std() > 30  # not hidden by the hot pixel
    full = PreprocessConfig()
    same = pixels(render_output(decide(foreground, full, image=IMAGE), Output.PREVIEW))
    np.testing.assert_array_equal(same, IMAGE)
    spread = pixels(render_output(decide(foreground, PERCENTILE, image=IMAGE), Output.PREVIEW))
    assert spread.max() == 255 > IMAGE.max()
    colour = np.dstack([IMAGE] * 3)
    shown = pixels(render_output(decide(foreground, PERCENTILE, image=colour), Output.PREVIEW))
    assert shown.shape == colour.shape


@pytest.mark.parametrize("output", [Output.OVERLAY, Output.CUTOUT])
def test_a_hot_pixel_does_not_darken_what_is_shown(output: Output) -> None:
    wide = IMAGE.astype(np.uint16) * 3 + 500
    wide[0, 0] = 65535
    shown = pixels(render_output(dataclasses.replace(binary(), image=wide), output))
    assert shown[..., 1].std() > 15


def test_tiffs_hold_exact_values_and_the_pixel_size() -> None:
    decision = binary(format=FileFormat.TIFF, pixel_size=0.5)
    decision = dataclasses.replace(decision, pixel_size=0.5)
    mask = read_tiff(render_output(decision, Output.MASK))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, decision.mask)
    probability = read_tiff(render_output(decision, Output.PROBABILITY))
    assert probability.dtype == np.float32
    np.testing.assert_array_equal(probability, decision.foreground)
    instances = render_output(decision, Output.INSTANCES)
    assert read_tiff(instances).dtype == np.uint16
    np.testing.assert_array_equal(read_tiff(instances), decision.objects.labels)
    with tifffile.TiffFile(io.BytesIO(instances.content)) as file:
        assert file.pages.first.get_resolution("micrometer") == (2, 2)
    for output in SHOWN:
        assert read_tiff(render_output(decision, output)).shape[:2] == (HEIGHT, WIDTH)
    assert render_output(decision, Output.COCO).suffix == ".json"


def test_pictures_may_be_webp() -> None:
    for output in SHOWN:
        rendered = render_output(binary(format=FileFormat.WEBP), output)
        assert (rendered.media_type, rendered.suffix) == ("image/webp", ".webp")
        assert Image.open(io.BytesIO(rendered.content)).size == (WIDTH, HEIGHT)


def test_a_webp_of_a_long_image_is_rejected() -> None:
    long = np.zeros((1, 1, 16384), np.float32)
    image = np.zeros((1, 16384), np.uint8)
    decision = decide(long, PreprocessConfig(), image=image, format=FileFormat.WEBP)
    with pytest.raises(InvalidRequest, match="16383: use format=png"):
        render_output(decision, Output.OVERLAY)


@pytest.mark.slow
def test_more_than_65535_objects_need_a_tiff() -> None:
    labels = draw_discs(1024, 4) > 0  # 65,536 objects of 4 pixels
    probabilities = np.stack([labels, np.zeros_like(labels)]).astype(np.float32)
    image = np.zeros(labels.shape, np.uint8)

    def with_format(format: FileFormat) -> Decision:
        return decide(probabilities, PreprocessConfig(), image=image, min_area=1, format=format)

    with pytest.raises(InvalidRequest, match=r"65536 objects; .*use format=tiff"):
        render_output(with_format(FileFormat.PNG), Output.INSTANCES)
    tiff = read_tiff(render_output(with_format(FileFormat.TIFF), Output.INSTANCES))
    assert (tiff.dtype, tiff.max()) == (np.uint32, 65536)
    decision = with_format(FileFormat.PNG)
    assert len(read_csv(render_output(decision, Output.MEASUREMENTS))) == 65536


@pytest.mark.parametrize("make", [binary, several])
def test_removed_objects_are_in_no_output(make: object) -> None:
    assert callable(make)
    whole = make()
    smallest = int(np.sort(whole.objects.areas)[1])
    outputs = tuple(
        output for output in Output if whole.preprocess.binary or output is not Output.INSTANCES
    )
    filtered = make(*outputs, min_area=smallest, exclude_edges=True)
    result = render(filtered)
    mask = pixels(result.rendered[Output.MASK]) > 0
    assert 0 < mask.sum() < (whole.mask > 0).sum()
    assert result.coverage == mask.mean()
    assert result.objects == filtered.objects.count < whole.objects.count
    np.testing.assert_array_equal(mask, filtered.objects.labels > 0)
    edge = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
    assert not edge.any()
    removed = (whole.mask > 0) & ~mask
    for output in (Output.OVERLAY, Output.CUTOUT):
        shown = pixels(result.rendered[output])[removed]
        if output is Output.CUTOUT:
            assert (shown[:, 3] < 128).all()
        else:
            np.testing.assert_array_equal(shown[:, 0], IMAGE[removed])
    for output in (Output.PROBABILITY, Output.PREVIEW):
        assert result.rendered[output] == render_output(whole, output)
    features = json.loads(result.rendered[Output.POLYGONS].content)["features"]
    rows = read_csv(result.rendered[Output.MEASUREMENTS])
    coco = json.loads(result.rendered[Output.COCO].content)["annotations"]
    assert len(features) == len(rows) == len(coco) == result.objects


def test_measurements_are_in_micrometres_where_the_pixel_size_is_known() -> None:
    in_pixels = read_csv(render_output(binary(), Output.MEASUREMENTS))
    decision = dataclasses.replace(binary(), pixel_size=0.5)
    rows = read_csv(render_output(decision, Output.MEASUREMENTS))
    assert float(rows[0]["area_um2"]) == int(in_pixels[0]["area_px"]) / 4
    features = json.loads(render_output(decision, Output.POLYGONS).content)["features"]
    measured = features[0]["properties"]["measurements"]
    assert measured["area_um2"] == float(rows[0]["area_um2"])
    assert features[0]["properties"]["area"] == int(in_pixels[0]["area_px"])


def test_several_outputs_equal_each_output_alone() -> None:
    outputs = tuple(Output)
    together = render(binary(*outputs))
    assert tuple(together.rendered) == outputs
    for output in outputs:
        alone = render(binary(output))
        assert together.rendered[output] == alone.rendered[output]
        assert (together.coverage, together.confidence) == (alone.coverage, alone.confidence)
    assert together.size == sum(len(each.content) for each in together.rendered.values())


def test_outputs_of_objects_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: object) -> object:
        calls.append(args)
        return separate_parts(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(model.objects, "separate_parts", counted)
    result = render(binary(*OF_OBJECTS))
    assert result.objects is not None
    assert len(calls) == 1


def test_statistics_are_of_the_mask() -> None:
    result = render(binary())
    assert (result.width, result.height) == (WIDTH, HEIGHT)
    assert result.coverage == (LABELS > 0).mean()
    assert result.confidence == pytest.approx(0.9)
    assert result.objects is None


@pytest.mark.slow  # a process of its own
def test_outputs_import_no_library_that_was_not_preloaded() -> None:
    code = """
import sys
import numpy as np
from app.inference.outputs import FileFormat, Options, Output
from app.inference.rendering import Decision, preload_object_modules, render_output
from model.config import PreprocessConfig

libraries = {"scipy", "tifffile", "roifile", "pycocotools", "model"}
def imported():
    return {name for name in sys.modules if name.count(".") < 2 and name.split(".")[0] in libraries}

assert "scipy" not in sys.modules
preload_object_modules()
before = imported()
probabilities = np.zeros((1, 20, 20), np.float32)
probabilities[0, 5:15, 5:15] = 1
mask = (probabilities[0] > 0.5).view(np.uint8) * np.uint8(255)
for format in (FileFormat.PNG, FileFormat.TIFF):
    options = Options(tuple(Output), format=format)
    decision = Decision(probabilities, mask, 1.0, 0.5, PreprocessConfig(), options, mask)
    for output in Output:
        render_output(decision, output)
sys.exit(", ".join(imported() - before) or 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
