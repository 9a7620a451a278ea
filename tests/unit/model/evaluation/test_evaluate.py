"""Scores of a predictor: per image, averaged and pooled, per class and per object."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from model.arrays import AnyArray, FloatArray
from model.config import PreprocessConfig
from model.evaluation.evaluate import PredictedMasks, Sample, evaluate, from_probabilities
from model.evaluation.metrics import VOID
from model.training.plots import make_worst_sheet
from tests.conftest import nuclei


@pytest.fixture
def samples() -> list[Sample]:
    """Twelve fields of nuclei."""
    fields = [nuclei(96, 80, seed=seed) for seed in range(12)]
    return [
        Sample(str(i), image, labels.astype(np.int32)) for i, (image, labels) in enumerate(fields)
    ]


def test_perfect_predictor_scores_1(samples: list[Sample]) -> None:
    labels_of = {sample.image.tobytes(): sample.labels for sample in samples}

    def predict(image: AnyArray) -> PredictedMasks:
        labels = labels_of[image.tobytes()]
        return PredictedMasks(((labels > 0) * 255).astype(np.uint8), labels)

    summary = evaluate(predict, samples, instances=True).summary()
    for name in ("dice", "iou", "pooled_dice", "boundary_f1", "f1_50", "ap_50", "ap"):
        assert summary[name] == 1
    assert summary["found"] == summary["true"] > 12
    assert summary["images"] == 12


def test_empty_masks_score_0(samples: list[Sample]) -> None:
    def predict(image: AnyArray) -> PredictedMasks:
        return PredictedMasks(np.zeros(image.shape, np.uint8), np.zeros(image.shape, np.uint16))

    summary = evaluate(predict, samples, instances=True).summary()
    assert summary["dice"] == summary["ap_50"] == summary["found"] == 0


def test_mean_weighs_images_and_pooled_score_weighs_pixels() -> None:
    big, small = np.ones((40, 40), np.int32), np.zeros((40, 40), np.int32)
    small[:2, :2] = 1
    samples = [Sample("big", np.zeros((40, 40), np.uint8), big)]
    samples += [Sample("small", np.ones((40, 40), np.uint8), small)]
    report = evaluate(lambda image: PredictedMasks((image == 0).astype(np.uint8)), samples)
    assert report.summary()["dice"] == 0.5
    assert report.summary()["pooled_dice"] == pytest.approx(2 * 1600 / (1600 + 1604))
    assert [score.id for score in report.worst(1)] == ["small"]


def test_each_class_is_measured() -> None:
    labels = np.repeat(np.arange(3), 16).reshape(6, 8).astype(np.int32)
    sample = Sample("a", np.zeros((6, 8), np.uint8), labels)
    wrong = np.where(labels == 2, 1, labels).astype(np.uint8)
    report = evaluate(lambda image: PredictedMasks(wrong), [sample], classes=("a", "b", "c"))
    summary = report.summary()
    assert {name: scores["iou"] for name, scores in summary["by_class"].items()} == {
        "a": 1,
        "b": 0.5,
        "c": 0,
    }
    assert summary["miou"] == pytest.approx(0.5)
    assert summary["dice"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert summary["pixel_accuracy"] == pytest.approx(2 / 3)
    assert summary["by_class"]["c"]["boundary_f1"] == 0
    assert report.confusion.tolist() == [[16, 0, 0], [0, 16, 0], [0, 16, 0]]


def test_absent_class_is_in_no_mean() -> None:
    labels = np.zeros((6, 8), np.int32)
    labels[:, 4:] = 1
    sample = Sample("a", np.zeros((6, 8), np.uint8), labels)
    wrong = np.zeros((6, 8), np.uint8)
    report = evaluate(lambda image: PredictedMasks(wrong), [sample], classes=("a", "b", "c"))
    summary = report.summary()
    assert summary["miou"] == 0.25
    assert summary["dice"] == summary["pooled_dice"] == pytest.approx(1 / 3)
    assert summary["by_class"]["c"]["iou"] is None
    (line,) = [line for line in report.table().splitlines() if line.startswith("c ")]
    assert line.split() == ["c", "-", "-", "-", "-", "-", "0"]


def test_pixels_without_a_label_are_in_no_score() -> None:
    true = np.zeros((20, 20), np.int32)
    true[5:15, 5:15] = 1
    predicted = (true > 0).astype(np.uint8)
    true[:, :10] = VOID
    predicted[:4, :6] = 1  # false pixels, but without a label
    sample = Sample("a", np.zeros((20, 20), np.uint8), true)
    for classes in (("a", "b"), ("a", "b", "c")):
        summary = evaluate(
            lambda image: PredictedMasks(predicted), [sample], classes=classes
        ).summary()
        assert summary["dice"] == summary["boundary_f1"] == 1


def test_keys_of_a_report_stay_the_same(samples: list[Sample]) -> None:
    """Scripts read them from report.json and `unet evaluate --json`."""

    def predict(image: AnyArray) -> PredictedMasks:
        return PredictedMasks(image, np.zeros(image.shape, np.uint16))

    report: dict[str, Any] = evaluate(predict, samples, instances=True).to_json()
    assert list(report) == ["summary", "images"]
    assert list(report["summary"]) == [
        "images", "dice", "iou", "pooled_dice", "pooled_iou", "boundary_f1", "f1_50", "ap_50", "ap",
        "ap_by_iou", "mean_f1_50", "mean_ap_50", "found", "true",
    ]  # fmt: skip
    assert list(report["images"][0]) == [
        "id", "dice", "iou", "boundary_f1", "f1_50", "ap_50", "ap", "found", "true",
    ]  # fmt: skip


def test_probabilities_become_masks_and_objects(samples: list[Sample]) -> None:
    preprocess = PreprocessConfig(threshold=0.3)

    def compute(image: AnyArray) -> FloatArray:
        return np.stack([np.full(image.shape, 0.5), np.zeros(image.shape)]).astype(np.float32)

    prediction = from_probabilities(compute, preprocess, instances=True)(samples[0].image)
    assert (prediction.mask == 255).all()
    assert prediction.instances is not None
    assert prediction.instances.max() == 1


def test_uncertainty_is_the_expected_error_per_pixel_of_the_mask() -> None:
    probabilities = np.zeros((1, 10, 10), np.float32)
    probabilities[0, :2] = 0.9  # 20 pixels of foreground, each wrong with a probability of 0.1
    probabilities[0, 2:4] = 0.3  # 20 of background, each wrong with 0.3
    samples = [
        Sample(str(index), np.full((10, 10), index, np.uint8), np.zeros((10, 10), np.int32))
        for index in range(3)
    ]
    predict = from_probabilities(
        lambda image: probabilities * (image[0, 0] > 0), PreprocessConfig(threshold=0.5)
    )
    report = evaluate(predict, samples)
    assert report.images[0].uncertainty is None  # nothing was found
    assert report.images[1].uncertainty == pytest.approx((20 * 0.1 + 20 * 0.3) / 20)
    assert report.summary()["uncertainty"] == pytest.approx({"median": 0.4, "p95": 0.4})
    assert "uncertainty" in report.images[1].to_json()
    assert "uncertainty" not in report.images[0].to_json()


def test_worst_sheet_shows_ten_images(samples: list[Sample]) -> None:
    def predict(image: AnyArray) -> PredictedMasks:
        return PredictedMasks(((image > 60) * 255).astype(np.uint8))

    report = evaluate(predict, samples)
    sheet = make_worst_sheet(report, predict, samples)
    assert isinstance(sheet, Image.Image)
    assert sheet.height > 5 * 250
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100


def test_table_has_one_line_per_score(samples: list[Sample]) -> None:
    report = evaluate(lambda image: PredictedMasks(image), samples)
    names = [line.split()[0] for line in report.table().splitlines()]
    assert names == list(report.summary())


def test_empty_data_set_is_an_error() -> None:
    with pytest.raises(ValueError, match="is empty"):
        evaluate(lambda image: PredictedMasks(image), [])


def test_mask_of_another_size_is_an_error(samples: list[Sample]) -> None:
    with pytest.raises(ValueError, match=r"the mask has shape \(95, 80\), the labels \(96, 80\)"):
        evaluate(lambda image: PredictedMasks(image[:-1]), samples)
