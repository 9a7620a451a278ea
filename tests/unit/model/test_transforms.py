"""From decoded image to network input, and from logits to the mask."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from model import transforms
from model.arrays import AnyArray
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


def test_8_bit_grey_becomes_three_equal_channels() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    pixels = prepare(grey, RANGE)
    assert pixels.shape == (16, 16, 3)
    assert all(np.array_equal(pixels[:, :, c], grey) for c in range(3))


def test_color_becomes_grey_for_a_model_with_one_channel() -> None:
    one = PreprocessConfig(mean=(0.5,), std=(0.25,))
    pixels = prepare(np.full((4, 4, 3), 90, np.uint8), one)
    assert pixels.shape == (4, 4, 1)
    assert (pixels == 90).all()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(700, 900), (500, 800, 3), (1, 7), (7, 1, 3)])
@pytest.mark.parametrize("percentiles", [(1, 99.8), (0.2, 99.8), (0, 100)])
def test_percentile_stretch_equals_numpy(
    depth: type[np.unsignedinteger[Any]], shape: tuple[int, ...], percentiles: tuple[float, float]
) -> None:
    image = np.random.default_rng(0).integers(5, 200, shape).astype(depth)
    low, high = np.percentile(image, percentiles, method="inverted_cdf").astype(np.float32)
    table = (np.arange(256, dtype=np.float32) - low) * (255.0 / max(high - low, 1.0)) + 0.5
    expected = np.clip(table, 0, 255).astype(np.uint8)[image]
    pixels = prepare(image, PreprocessConfig(intensity="percentile", percentiles=percentiles))
    assert (pixels == (expected if image.ndim == 3 else expected[:, :, None])).all()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_percentiles_stretch_the_image_to_its_own_range(
    depth: type[np.unsignedinteger[Any]],
) -> None:
    image = nuclei(200, 240)[0].astype(depth) + 3
    pixels = prepare(image, PERCENTILE)[:, :, 0]
    low, high = np.percentile(image, (1, 99.8), method="inverted_cdf").astype(float)
    expected = np.clip((image - low) / (high - low), 0, 1) * 255
    assert np.abs(pixels - expected).max() <= 0.51


@pytest.mark.parametrize("mode", ["native", "resize"])
@pytest.mark.parametrize("side", [1, 5, 50, 500])
def test_grey_image_stored_in_color_gives_the_pixels_of_the_grey_one(side: int, mode: Any) -> None:
    window: dict[str, Any] = {"window": ((32, 32),), "overlap": 0} if mode == "resize" else {}
    config = PreprocessConfig(intensity="percentile", mode=mode, **window)
    grey = np.random.default_rng(side).poisson(40, (side, side)).clip(0, 255).astype(np.uint8)
    color = np.repeat(grey[:, :, None], 3, axis=2)
    prepared = prepare(color, config)
    assert prepared.strides[2] == 0
    np.testing.assert_array_equal(prepared, prepare(grey, config))
    color[-1, -1, 2] ^= 1
    assert prepare(color, config).strides[2] == 1


def test_16_bits_give_the_same_pixels_as_8_bits() -> None:
    image = nuclei(120, 120)[0]
    # the same image in another unit and with an offset
    wide = image.astype(np.uint16) * 150 + 1000
    difference = prepare(wide, PERCENTILE).astype(int) - prepare(image, PERCENTILE)
    assert np.abs(difference).max() <= 1


def test_byte_order_does_not_matter() -> None:
    values = nuclei(60, 90)[0].astype(np.uint16) * 150 + 1000
    little, big = (
        to_array(Image.frombytes(mode, (90, 60), values.astype(order).tobytes()))
        for mode, order in (("I;16", "<u2"), ("I;16B", ">u2"))
    )
    assert np.array_equal(prepare(little, PERCENTILE), prepare(values, PERCENTILE))
    assert np.array_equal(prepare(big, PERCENTILE), prepare(values, PERCENTILE))


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(8, 8), (1, 1), (5, 3, 3)])
def test_constant_image_becomes_black(
    depth: type[np.unsignedinteger[Any]], shape: tuple[int, ...]
) -> None:
    for value in (0, 7, np.iinfo(depth).max):
        pixels = prepare(np.full(shape, value, depth), PERCENTILE)
        assert pixels.shape == (*shape[:2], 3)
        assert (pixels == 0).all()


def test_few_bright_pixels_stay_visible() -> None:
    image = np.zeros((100, 100), np.uint16)
    image[50, 50] = 60_000  # 0.01% of the pixels, outside the upper percentile
    assert prepare(image, PERCENTILE)[50, 50, 0] == 255


@pytest.mark.parametrize("hot", [3000, 65535])
@pytest.mark.parametrize("side", [64, 128])
def test_hot_pixels_of_16_bits_do_not_change_the_others(side: int, hot: int) -> None:
    """In a small image they are more than the upper percentile leaves out."""
    image = nuclei(side, side)[0].astype(np.uint16) * 4
    damaged = image.copy()
    places = np.random.default_rng(0).permutation(image.size)[:10]
    damaged.flat[places] = hot
    for percentiles in ((0.2, 99.8), (0, 100)):
        config = PreprocessConfig(intensity="percentile", percentiles=percentiles)
        plain, pixels = prepare(image, config), prepare(damaged, config)
        same = (damaged == image)[:, :, None] & np.ones(3, bool)
        assert np.abs(pixels.astype(int) - plain)[same].max() <= 8
        assert pixels[~same].mean() < plain.max() / 2


def test_lower_percentile_below_1_keeps_the_shades_of_few_dark_nuclei() -> None:
    smear = np.full((100, 100), 180, np.uint8)
    smear[:1, :40], smear[1:2, :60] = 60, 120  # nuclei and cytoplasm: 1% of the image
    at_one, at_a_fifth = (
        len(np.unique(prepare(smear, PreprocessConfig(intensity="percentile", percentiles=pair))))
        for pair in [(1.0, 99.8), (0.2, 99.8)]
    )
    assert (at_one, at_a_fifth) == (2, 3)


@pytest.mark.parametrize(
    "wrong", [(), (1,), (2, 1), (5, 5), (-1, 99), (1, 101), (float("nan"), 99)]
)
def test_percentiles_must_rise_within_0_and_100(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="percentiles"):
        PreprocessConfig(intensity="percentile", percentiles=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 4)), np.zeros((4,), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_other_types_and_shapes_are_rejected(wrong: AnyArray) -> None:
    with pytest.raises(ValueError, match="an image is uint8 or uint16"):
        prepare(wrong, RANGE)


def test_resize_is_antialiased_and_can_be_undone() -> None:
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
def test_probabilities_are_resized_as_pillow_does(size: tuple[int, int]) -> None:
    field = np.random.default_rng(0).random((2, 64, 48), dtype=np.float32)
    restored = resize_to_image(field, *size)
    for channel, expected in zip(restored, field, strict=True):
        resized = Image.fromarray(expected).resize(size[::-1], Image.Resampling.BILINEAR)
        assert np.abs(channel - np.asarray(resized)).max() < 1e-6


@pytest.mark.parametrize("size", [(1000, 700), (30, 20), (64, 48)])
def test_mask_and_confidence_equal_those_of_resized_probabilities(size: tuple[int, int]) -> None:
    field = np.random.default_rng(0).random((3, 64, 48), dtype=np.float32)
    for config in (RANGE, THREE_CLASSES):
        restored = resize_to_image(field, *size)
        mask, sure = mask_and_confidence(field, *size, config, 0.3)
        assert np.array_equal(mask, to_mask(restored, config, 0.3))
        assert sure == pytest.approx(confidence(restored, config), abs=1e-6)


@pytest.mark.parametrize("size", [(30, 40), (33, 191), (10, 100), (63, 47), (100, 70), (7, 3000)])
@pytest.mark.parametrize("sure", [0.0, 0.5, 1.0])
def test_resizing_keeps_constants(size: tuple[int, int], sure: float) -> None:
    field = np.full((1, 64, 48), sure, np.float32)
    assert (resize_to_image(field, *size) == sure).all()
    mask, certainty = mask_and_confidence(field, *size, RANGE, sure)
    assert (mask == 255).all()
    assert certainty == max(sure, 1 - sure)


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1), (2, 500_000)])
def test_very_long_images_need_no_extra_memory(size: tuple[int, int]) -> None:
    field = np.random.default_rng(0).random((1, 384, 256), dtype=np.float32)
    tracemalloc.start()
    mask_and_confidence(field, *size, RANGE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30_000_000  # the mask takes one


def test_resize_to_a_size_smaller_than_the_window() -> None:
    config = PreprocessConfig(mode="resize", window=((576, 864),), size=(572, 857))
    assert config.resized == (572, 857)
    assert prepare(np.zeros((1280, 1918, 3), np.uint8), config).shape == (572, 857, 3)


def test_normalize_subtracts_mean_and_divides_by_std() -> None:
    config = PreprocessConfig(mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    windows = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    result = normalize(windows, config)
    assert result.shape == (2, 3, 4, 6)
    expected = (windows[1, 2, 3].double() / 255 - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor(
        [0.5, 1.0, 2.0]
    )
    assert torch.allclose(result[1, :, 2, 3].double(), expected, atol=1e-6)


def test_binary_mask_is_255_from_the_threshold_up() -> None:
    field = np.array([[[0.2, 0.5, 0.7]]], np.float32)
    assert to_mask(field, RANGE).tolist() == [[0, 255, 255]]
    assert to_mask(field, RANGE, 0.6).tolist() == [[0, 0, 255]]
    assert to_mask(field, RANGE, 0.0).tolist() == [[255, 255, 255]]


def test_confidence_is_the_mean_probability_of_the_predicted_class() -> None:
    field = np.array([[[0.2, 0.5, 0.7]], [[0.9, 0.9, 0.9]]], np.float32)
    assert confidence(field, RANGE) == pytest.approx((0.8 + 0.5 + 0.7) / 3)
    classes = np.array([[[0.2, 0.5]], [[0.7, 0.3]], [[0.1, 0.2]]], np.float32)
    assert confidence(classes, THREE_CLASSES) == pytest.approx(0.6)


def test_several_classes_give_indices_and_probabilities_that_sum_to_1() -> None:
    config = THREE_CLASSES
    result = probabilities(torch.randn(1, 3, 4, 4), config)
    assert torch.allclose(result.sum(1), torch.ones(1, 4, 4))
    mask = to_mask(result[0].numpy(), config)
    assert np.array_equal(mask, result[0].argmax(0).numpy())


def test_module_does_not_import_torch() -> None:
    code = "import sys, model.transforms, model.windows; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_constants_are_copied_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy from the host makes it wait for the device, and cannot be captured in a graph."""
    monkeypatch.setattr(transforms, "_constants_by_device", {})
    copies: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            copies.extend(["copy"] * (func._schema.name == "aten::lift_fresh"))
            return func(*args, **(kwargs or {}))

    config = PreprocessConfig(mean=(0.1, 0.2, 0.3))
    windows = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    with Watch():
        for _ in range(3):
            result = normalize(windows, config)
    assert len(copies) == 2  # mean and standard deviation
    np.testing.assert_allclose(result[0, :, 0, 0], [3.6, 3.2, 2.8], rtol=1e-6)
