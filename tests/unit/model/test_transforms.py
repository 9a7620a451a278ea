import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from model.config import PreprocessConfig
from model.errors import ConfigError
from model.pixels import to_array
from model.transforms import (
    confidence,
    mask_and_confidence,
    normalize,
    prepare,
    probabilities,
    resize_to_image,
    to_mask,
)
from tests.conftest import nuclei

RANGE = PreprocessConfig()
PERCENTILE = PreprocessConfig(intensity="percentile")
THREE_CLASSES = PreprocessConfig(classes=("a", "b", "c"), palette=((0, 0, 0),) * 3)


def test_eight_bits_pass_unchanged_and_grey_becomes_three_channels():
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = prepare(grey, RANGE)
    assert pixels.shape == (16, 16, 3)
    assert all(np.array_equal(pixels[:, :, c], grey) for c in range(3))


def test_colour_becomes_grey_for_a_model_of_one_channel():
    one = PreprocessConfig(mean=(0.5,), std=(0.25,))
    pixels = prepare(np.full((4, 4, 3), 90, np.uint8), one)
    assert pixels.shape == (4, 4, 1)
    assert (pixels == 90).all()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(700, 900), (500, 800, 3), (1, 7), (7, 1, 3)])
@pytest.mark.parametrize("percentiles", [(1, 99.8), (0.2, 99.8), (0, 100)])
def test_tables_and_histograms_are_what_numpy_says(depth, shape, percentiles):
    image = np.random.default_rng(0).integers(5, 200, shape).astype(depth)
    low, high = np.percentile(image, percentiles, method="inverted_cdf").astype(np.float32)
    table = (np.arange(256, dtype=np.float32) - low) * (255.0 / max(high - low, 1.0)) + 0.5
    expected = np.clip(table, 0, 255).astype(np.uint8)[image]
    pixels = prepare(image, PreprocessConfig(intensity="percentile", percentiles=percentiles))
    assert (pixels == (expected if image.ndim == 3 else expected[:, :, None])).all()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_percentiles_spread_the_image_over_its_own_range(depth):
    image = nuclei(200, 240)[0].astype(depth) + 3
    pixels = prepare(image, PERCENTILE)[:, :, 0]
    low, high = np.percentile(image, (1, 99.8), method="inverted_cdf").astype(float)
    expected = np.clip((image - low) / (high - low), 0, 1) * 255
    assert np.abs(pixels - expected).max() <= 0.51


def test_sixteen_bits_give_what_eight_bits_give():
    image = nuclei(120, 120)[0]
    # the same picture in another unit and with an offset: the network must not see a difference
    wide = image.astype(np.uint16) * 150 + 1000
    difference = prepare(wide, PERCENTILE).astype(int) - prepare(image, PERCENTILE)
    assert np.abs(difference).max() <= 1


def test_the_order_of_bytes_does_not_matter():
    values = nuclei(60, 90)[0].astype(np.uint16) * 150 + 1000
    little, big = (
        to_array(Image.frombytes(mode, (90, 60), values.astype(order).tobytes()))
        for mode, order in (("I;16", "<u2"), ("I;16B", ">u2"))
    )
    assert np.array_equal(prepare(little, PERCENTILE), prepare(values, PERCENTILE))
    assert np.array_equal(prepare(big, PERCENTILE), prepare(values, PERCENTILE))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (5, 3, 3)])
def test_an_image_of_one_value_is_black(depth, shape):
    for value in (0, 7, np.iinfo(depth).max):
        pixels = prepare(np.full(shape, value, depth), PERCENTILE)
        assert pixels.shape == (*shape[:2], 3)
        assert (pixels == 0).all()


def test_a_few_bright_pixels_are_not_lost():
    image = np.zeros((100, 100), np.uint16)
    image[50, 50] = 60_000  # a tenth of a thousandth: beyond the upper percentile
    assert prepare(image, PERCENTILE)[50, 50, 0] == 255


def test_few_dark_nuclei_keep_their_shades_where_the_lower_percentile_is_low():
    smear = np.full((100, 100), 180, np.uint8)
    smear[:1, :40], smear[1:2, :60] = 60, 120  # nuclei and cytoplasm: a hundredth of the image
    of_one, of_a_fifth = (
        len(np.unique(prepare(smear, PreprocessConfig(intensity="percentile", percentiles=pair))))
        for pair in [(1.0, 99.8), (0.2, 99.8)]
    )
    assert (of_one, of_a_fifth) == (2, 3)


@pytest.mark.parametrize(
    "wrong", [(), (1,), (2, 1), (5, 5), (-1, 99), (1, 101), (float("nan"), 99)]
)
def test_percentiles_rise_from_0_to_100(wrong):
    with pytest.raises(ConfigError, match="percentiles"):
        PreprocessConfig(intensity="percentile", percentiles=wrong)


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4)), np.zeros((4,), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_what_is_no_image_is_named(wrong):
    with pytest.raises(ValueError, match="an image is uint8 or uint16"):
        prepare(wrong, RANGE)


def test_resize_is_antialiased_and_back_again():
    config = PreprocessConfig(mode="resize", window=((64, 48),), overlap=0)
    stripes = np.zeros((640, 480), np.uint8)
    stripes[::2] = 255
    pixels = prepare(stripes, config)
    assert pixels.shape == (64, 48, 3)
    assert np.abs(pixels.astype(int) - 127).max() <= 6  # without antialiasing: 0 or 255
    assert resize_to_image(np.ones((2, 64, 48), np.float32), 640, 480).shape == (2, 640, 480)


@pytest.mark.parametrize(
    "size",
    [(640, 480), (65, 49), (40, 30), (40, 300), (1, 1), (64, 48), (1, 5000), (3, 9000), (9000, 2)],
)
def test_probabilities_come_back_as_pillow_resizes_them(size):
    field = np.random.default_rng(0).random((2, 64, 48), dtype=np.float32)
    restored = resize_to_image(field, *size)
    for channel, expected in zip(restored, field, strict=True):
        resized = Image.fromarray(expected).resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.abs(channel - np.asarray(resized)).max() < 1e-6


@pytest.mark.parametrize("size", [(1000, 700), (30, 20), (64, 48)])
def test_a_decision_is_that_of_the_restored_probabilities(size):
    field = np.random.default_rng(0).random((3, 64, 48), dtype=np.float32)
    for config in (RANGE, THREE_CLASSES):
        restored = resize_to_image(field, *size)
        mask, sure = mask_and_confidence(field, *size, config, 0.3)
        assert np.array_equal(mask, to_mask(restored, config, 0.3))
        assert sure == pytest.approx(confidence(restored, config), abs=1e-6)


@pytest.mark.parametrize("size", [(30, 40), (33, 191), (10, 100), (63, 47), (100, 70), (7, 3000)])
@pytest.mark.parametrize("sure", [0.0, 0.5, 1.0])
def test_what_is_the_same_everywhere_stays_the_same(size, sure):
    field = np.full((1, 64, 48), sure, np.float32)
    assert (resize_to_image(field, *size) == sure).all()
    mask, confidence = mask_and_confidence(field, *size, RANGE, sure)
    assert (mask == 255).all()
    assert confidence == max(sure, 1 - sure)


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1), (2, 500_000)])
def test_flat_images_take_no_more_memory_than_others(size):
    field = np.random.default_rng(0).random((1, 384, 256), dtype=np.float32)
    tracemalloc.start()
    mask_and_confidence(field, *size, RANGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000  # of which the mask is one


def test_resize_to_a_size_within_the_window():
    config = PreprocessConfig(mode="resize", window=((576, 864),), size=(572, 857))
    assert config.resized == (572, 857)
    assert prepare(np.zeros((1280, 1918, 3), np.uint8), config).shape == (572, 857, 3)


def test_normalise_is_the_formula():
    config = PreprocessConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    windows = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    result = normalize(windows, config)
    assert result.shape == (2, 3, 4, 6)
    expected = (windows[1, 2, 3].double() / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor(
        [0.5, 1.0, 2.0]
    )
    assert torch.allclose(result[1, :, 2, 3].double(), expected, atol=1e-6)


def test_binary_masks_are_0_and_255_from_the_threshold_up():
    field = np.array([[[0.2, 0.5, 0.7]]], np.float32)
    assert to_mask(field, RANGE).tolist() == [[0, 255, 255]]
    assert to_mask(field, RANGE, 0.6).tolist() == [[0, 0, 255]]
    assert to_mask(field, RANGE, 0.0).tolist() == [[255, 255, 255]]


def test_confidence_is_the_mean_probability_of_what_was_decided():
    field = np.array([[[0.2, 0.5, 0.7]], [[0.9, 0.9, 0.9]]], np.float32)
    assert confidence(field, RANGE) == pytest.approx((0.8 + 0.5 + 0.7) / 3)
    classes = np.array([[[0.2, 0.5]], [[0.7, 0.3]], [[0.1, 0.2]]], np.float32)
    assert confidence(classes, THREE_CLASSES) == pytest.approx(0.6)


def test_several_classes_are_indices_and_their_probabilities_sum_to_one():
    config = THREE_CLASSES
    result = probabilities(torch.randn(1, 3, 4, 4), config)
    assert torch.allclose(result.sum(1), torch.ones(1, 4, 4))
    mask = to_mask(result[0].numpy(), config)
    assert np.array_equal(mask, result[0].argmax(0).numpy())


def test_the_module_does_not_import_torch():
    code = "import sys, model.transforms, model.windows; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
