"""Estimates of how long windows will take, from how long windows took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

import pytest

from app.batching.estimates import MARGIN, Estimates, Measurements


class FakeDevice:
    """A device with measurements of its own."""

    def __init__(self, **seconds: float) -> None:
        self.failure: Exception | None = None
        self.measurements = Measurements()
        for key, value in seconds.items():
            self.measurements.record(key, value)


def test_nothing_is_estimated_before_the_first_batch() -> None:
    estimates = Estimates([FakeDevice()])
    assert FakeDevice().measurements.seconds("k") is None
    assert estimates.seconds("k") == 0
    assert estimates.estimate({"k": 1000}) == 0


def test_measurements_are_a_moving_average() -> None:
    measurements = FakeDevice(k=1.0).measurements
    assert measurements.seconds("k") == 1.0
    measurements.record("k", 2.0)
    assert measurements.seconds("k") == pytest.approx(1.2)
    for _ in range(50):
        measurements.record("k", 3.0)
    assert measurements.seconds("k") == pytest.approx(3.0, rel=0.01)


def test_a_key_that_was_never_measured_counts_as_the_mean() -> None:
    measurements = FakeDevice(small=1.0, large=3.0).measurements
    assert measurements.seconds("unknown") == measurements.seconds() == 2.0


def test_devices_work_in_parallel_and_failed_ones_do_not_count() -> None:
    devices = [FakeDevice(k=1.0), FakeDevice(k=3.0)]
    estimates = Estimates(devices)
    assert estimates.seconds("k") == pytest.approx(0.75)  # 1 + 1/3 windows per second
    devices[0].failure = RuntimeError("lost")
    assert estimates.seconds("k") == pytest.approx(3.0)


def test_an_estimate_adds_up_the_keys_with_a_margin() -> None:
    estimates = Estimates([FakeDevice(small=1.0, large=10.0)])
    assert estimates.estimate({"small": 3, "large": 2}) == pytest.approx(MARGIN * 23)
    assert estimates.estimate({}) == 0


def test_another_request_costs_at_most_as_many_windows_of_each_key() -> None:
    estimates = Estimates([FakeDevice(small=1.0, large=10.0)])
    pending: Counter[Hashable] = Counter({"large": 100})
    assert estimates.interleaved_cost(pending, 2) == pytest.approx(MARGIN * 20)
    assert estimates.interleaved_cost(pending, 500) == pytest.approx(MARGIN * 1000)
    both: Counter[Hashable] = Counter({"large": 10, "small": 10})
    assert estimates.interleaved_cost(both, 2) == pytest.approx(MARGIN * 22)
    assert estimates.interleaved_cost(Counter(), 2) == 0


def test_discount_lowers_a_measurement_until_the_next_one() -> None:
    device = FakeDevice(k=1.0, other=1.0)
    estimates = Estimates([device])
    for _ in range(20):
        estimates.discount({"k": 1}, 0.5, exclude=set())
    reduced = estimates.seconds("k")
    assert 0.4 < MARGIN * reduced < 0.5  # from there on the request would be admitted
    assert estimates.seconds("other") == 1.0
    device.measurements.record("k", 1.0)
    assert estimates.seconds("k") == 1.0


@pytest.mark.parametrize("remaining", [-1.0, 0.0, 2.0])
def test_discount_needs_the_windows_themselves_to_be_the_reason(remaining: float) -> None:
    """Not a deadline that has passed, nor other requests before this one."""
    estimates = Estimates([FakeDevice(k=1.0)])
    estimates.discount({"k": 1}, remaining, exclude=set())
    assert estimates.seconds("k") == 1.0


def test_discount_leaves_out_keys_that_are_being_measured() -> None:
    estimates = Estimates([FakeDevice(k=1.0, other=1.0)])
    estimates.discount({"k": 1, "other": 1}, 0.5, exclude={"k"})
    assert estimates.seconds("k") == 1.0
    assert estimates.seconds("other") < 1.0


def test_forgotten_keys_do_not_count_in_the_mean() -> None:
    device = FakeDevice(gone=9.0, stays=1.0)
    device.measurements.discount(["gone"])
    device.measurements.forget(lambda key: key == "gone")
    assert device.measurements.seconds() == device.measurements.seconds("gone") == 1.0
