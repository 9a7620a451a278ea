"""Ranges of activations: without the outermost values, and the widest over the images."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from torch import Tensor, nn

from model.arrays import AnyArray
from model.checkpoint import Checkpoint
from model.config import PreprocessConfig, UNetConfig
from model.convert.calibration import TAIL, Hook, measure_ranges, observe_layers
from model.predict import Predictor
from tests.conftest import drawn_weights, nuclei

IMAGES = [nuclei(128, 128, seed)[0] for seed in range(2)]


@pytest.fixture
def predictor() -> Predictor:
    """A network whose window is as large as the images, so that each is computed at once."""
    architecture = UNetConfig(3, 1, 4)
    preprocess = PreprocessConfig(window=((128, 128),), overlap=0)
    state = drawn_weights(architecture, 0)
    return Predictor.of(Checkpoint("drawn", architecture, preprocess, state))


def record_outputs(predictor: Predictor, image: AnyArray) -> dict[str, AnyArray]:
    outputs: dict[str, AnyArray] = {}

    def make_hook(name: str) -> Hook:
        def record(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output.numpy().ravel()

        return record

    observe_layers(predictor, [image], make_hook)
    return outputs


def test_every_layer_in_int8_has_a_range(predictor: Predictor) -> None:
    doubles = [f"{path}_conv.{level}" for path in ("down", "up") for level in range(4)]
    names = {f"{each}.{part}" for each in (*doubles, "middle_conv") for part in ("first", "second")}
    assert measure_ranges(predictor, IMAGES[:1]).keys() == names | {
        f"up_sample.{level}.up" for level in range(4)
    }


def test_range_leaves_out_the_outermost_values(predictor: Predictor) -> None:
    ranges = measure_ranges(predictor, IMAGES[:1])
    for name, values in record_outputs(predictor, IMAGES[0]).items():
        ordered = np.sort(values if name.endswith(".up") else np.maximum(values, 0))
        count = max(1, int(TAIL * len(ordered)))
        assert ranges[name] == pytest.approx((ordered[count - 1], ordered[-count]), rel=1e-3)
    assert ranges["down_conv.0.first"][1] < record_outputs(predictor, IMAGES[0])[
        "down_conv.0.first"
    ].max() * (1 - 1e-3)


def test_range_is_the_widest_over_the_images(predictor: Predictor) -> None:
    both = measure_ranges(predictor, IMAGES)
    each = [measure_ranges(predictor, [image]) for image in IMAGES]
    assert each[0] != each[1]
    for name, (low, high) in both.items():
        assert low == min(ranges[name][0] for ranges in each)
        assert high == max(ranges[name][1] for ranges in each)


def test_calibration_without_images_is_an_error(predictor: Predictor) -> None:
    with pytest.raises(ValueError, match="at least one image"):
        measure_ranges(predictor, [])


def test_network_is_not_observed_after_an_error(predictor: Predictor) -> None:
    seen: list[str] = []

    def make_hook(name: str) -> Hook:
        return lambda *_: seen.append(name)

    def fail() -> Iterator[AnyArray]:
        yield IMAGES[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        observe_layers(predictor, fail(), make_hook)
    assert seen
    seen.clear()
    predictor(IMAGES[0])
    assert not seen
