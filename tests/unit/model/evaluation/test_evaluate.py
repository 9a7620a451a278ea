import numpy as np
import pytest
from PIL import Image

from model.config import PreprocessConfig
from model.evaluation.evaluate import Prediction, evaluate, from_probabilities
from model.training.data import Sample
from model.training.plots import worst_sheet
from tests.conftest import nuclei


@pytest.fixture
def samples():
    drawn = [nuclei(96, 80, seed=seed) for seed in range(12)]
    return [
        Sample(str(i), image, labels.astype(np.int32)) for i, (image, labels) in enumerate(drawn)
    ]


def test_a_perfect_predictor_scores_one_everywhere(samples):
    answers = {sample.image.tobytes(): sample.labels for sample in samples}

    def perfect(image):
        labels = answers[image.tobytes()]
        return Prediction(((labels > 0) * 255).astype(np.uint8), labels)

    summary = evaluate(perfect, samples, instances=True).summary()
    for name in ("dice", "iou", "pooled_dice", "boundary_f1", "f1_50", "ap_50", "ap"):
        assert summary[name] == 1
    assert summary["found"] == summary["true"] > 12
    assert summary["images"] == 12


def test_a_predictor_of_nothing_scores_nothing(samples):
    def nothing(image):
        return Prediction(np.zeros(image.shape, np.uint8), np.zeros(image.shape, np.uint16))

    summary = evaluate(nothing, samples, instances=True).summary()
    assert summary["dice"] == summary["ap_50"] == summary["found"] == 0


def test_mean_and_pooled_figures_differ_as_they_should():
    big, small = np.ones((40, 40), np.int32), np.zeros((40, 40), np.int32)
    small[:2, :2] = 1
    pair = [Sample("big", np.zeros((40, 40), np.uint8), big)]
    pair += [Sample("small", np.ones((40, 40), np.uint8), small)]
    report = evaluate(lambda image: Prediction((image == 0).astype(np.uint8)), pair)
    assert report.summary()["dice"] == 0.5
    assert report.summary()["pooled_dice"] == pytest.approx(2 * 1600 / (1600 + 1604))
    assert [score.id for score in report.worst(1)] == ["small"]


def test_each_class_is_measured():
    labels = np.repeat(np.arange(3), 16).reshape(6, 8).astype(np.int32)
    sample = Sample("a", np.zeros((6, 8), np.uint8), labels)
    wrong = np.where(labels == 2, 1, labels).astype(np.uint8)
    summary = evaluate(lambda image: Prediction(wrong), [sample], classes=3).summary()
    assert summary["dice_by_class"] == [pytest.approx(2 / 3), 0]
    assert summary["dice"] == pytest.approx(1 / 3)


def test_probabilities_become_masks_and_objects(samples):
    preprocess = PreprocessConfig(threshold=0.3)

    def half(image):
        return np.stack([np.full(image.shape, 0.5), np.zeros(image.shape)]).astype(np.float32)

    prediction = from_probabilities(half, preprocess, instances=True)(samples[0].image)
    assert (prediction.mask == 255).all()
    assert prediction.instances is not None
    assert prediction.instances.max() == 1


def test_the_contact_sheet_shows_the_worst(samples):
    def threshold(image):
        return Prediction(((image > 60) * 255).astype(np.uint8))

    report = evaluate(threshold, samples)
    sheet = worst_sheet(report, threshold, samples)
    assert isinstance(sheet, Image.Image)
    assert sheet.height > 5 * 250
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 100
    assert "dice" in report.table()


def test_an_empty_data_set_and_a_mask_of_another_size_are_errors(samples):
    with pytest.raises(ValueError, match="is empty"):
        evaluate(lambda image: Prediction(image), [])
    with pytest.raises(ValueError, match="against a truth"):
        evaluate(lambda image: Prediction(image[:-1]), samples)
