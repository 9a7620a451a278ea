"""Rendering: every output from one decision, and several at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

import model.instances
from app.inference.outputs import (
    Decision,
    Options,
    Output,
    Rendered,
    Segmentation,
    render,
    render_output,
)
from model.arrays import AnyArray, FloatArray, UInt16Array
from model.config import PreprocessConfig
from model.transforms import mask_and_confidence
from tests.conftest import decode, nuclei

HEIGHT, WIDTH = 90, 120
IMAGE, LABELS = nuclei(HEIGHT, WIDTH)
SEVERAL = PreprocessConfig(
    classes=("background", "cell", "debris"), palette=((0, 0, 0), (255, 0, 0), (0, 255, 0))
)


def binary() -> Decision:
    """Objects with a probability of 0.9 before a background of 0.1."""
    foreground = np.where(LABELS > 0, 0.9, 0.1).astype(np.float32)
    return decide(foreground[None], PreprocessConfig())


def several() -> Decision:
    """The left half of the objects is of class 1, the right half of class 2."""
    found = np.where(LABELS > 0, 1 + (np.arange(WIDTH) >= WIDTH // 2), 0)
    probabilities = np.full((3, HEIGHT, WIDTH), 0.1, np.float32)
    np.put_along_axis(probabilities, found[None], 0.8, axis=0)
    return decide(probabilities, SEVERAL)


def decide(probabilities: AnyArray, preprocess: PreprocessConfig) -> Decision:
    mask, confidence = mask_and_confidence(probabilities, HEIGHT, WIDTH, preprocess)
    return Decision(probabilities, mask, confidence, preprocess.threshold, preprocess, IMAGE)


def pixels(rendered: Rendered) -> AnyArray:
    assert rendered.media_type == "image/png"
    return decode(rendered.content)


@pytest.mark.parametrize("output", Output)
def test_every_output_has_a_renderer(output: Output) -> None:
    assert render_output(binary(), output).content
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


def test_instances_are_labels_and_polygons_outline_the_same_objects() -> None:
    decision = binary()
    labels = pixels(render_output(decision, Output.INSTANCES))
    assert labels.dtype == np.uint16
    polygons = render_output(decision, Output.POLYGONS)
    assert polygons.media_type == "application/geo+json"
    features = json.loads(polygons.content)["features"]
    areas = [feature["properties"]["area"] for feature in features]
    assert areas == np.bincount(labels.ravel())[1:].tolist()
    assert decision.count_objects() == len(areas) == labels.max() > 1


def test_polygons_of_several_classes_outline_connected_parts() -> None:
    decision = several()
    collection = json.loads(render_output(decision, Output.POLYGONS).content)
    assert collection["type"] == "FeatureCollection"
    names = {feature["properties"]["classification"]["name"] for feature in collection["features"]}
    assert names == {"cell", "debris"}
    assert decision.count_objects() == len(collection["features"])


def test_overlay_and_cutout_show_the_image() -> None:
    overlay = pixels(render_output(binary(), Output.OVERLAY))
    cutout = pixels(render_output(binary(), Output.CUTOUT))
    outside = LABELS == 0
    for shown in (overlay, cutout):
        np.testing.assert_array_equal(
            shown[outside][:, :3], np.repeat(IMAGE[outside], 3).reshape(-1, 3)
        )
    assert (overlay[~outside] != IMAGE[~outside][:, None]).any()
    assert cutout[~outside][:, 3].min() > cutout[outside][:, 3].max()


def test_several_outputs_equal_each_output_alone() -> None:
    outputs = tuple(Output)
    together = render(binary(), Options(outputs))
    assert tuple(together.rendered) == outputs
    for output in outputs:
        alone = render(binary(), Options((output,)))
        assert together.rendered[output] == alone.rendered[output]
        assert (together.coverage, together.confidence) == (alone.coverage, alone.confidence)
    assert together.size == sum(len(each.content) for each in together.rendered.values())


def test_instances_and_polygons_share_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    label_instances = model.instances.label_instances

    def counted(probabilities: FloatArray, threshold: float) -> UInt16Array:
        calls.append(threshold)
        return label_instances(probabilities, threshold)

    monkeypatch.setattr(model.instances, "label_instances", counted)
    result = render(binary(), Options((Output.INSTANCES, Output.POLYGONS)))
    assert result.objects is not None
    assert calls == [0.5]


def test_statistics_are_of_the_mask() -> None:
    result = render(binary(), Options())
    assert (result.width, result.height) == (WIDTH, HEIGHT)
    assert result.coverage == (LABELS > 0).mean()
    assert result.confidence == pytest.approx(0.9)
    assert result.objects is None


def test_options_need_what_any_output_needs() -> None:
    assert not Options().needs_image
    assert not Options((Output.MASK, Output.OVERLAY)).needs_full_probabilities
    both = Options((Output.MASK, Output.CUTOUT))
    assert both.needs_image
    assert both.needs_full_probabilities
    assert not both.needs_instances
    assert Options((Output.MASK, Output.POLYGONS)).needs_instances


def test_size_counts_every_output() -> None:
    rendered = {
        Output.MASK: Rendered(b"12", "x/y", ".x"),
        Output.CUTOUT: Rendered(b"345", "x/y", ".x"),
    }
    assert Segmentation(rendered, 1, 1, 0, 1).size == 5
