"""How the growth of memory is judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tools.prove.soak import Sample, judge_slope


def draw_samples(minutes: float, count: int, growth: float, noise: float) -> list[Sample]:
    """Return the memory of a service that grows by `growth` MB per minute, with its noise in MB."""
    rng = np.random.default_rng(0)
    times = np.linspace(0, minutes, count)
    megabytes = 300 + growth * times + rng.normal(0, noise, count)
    return [Sample(float(at), int(1e6 * each)) for at, each in zip(times, megabytes, strict=True)]


@pytest.mark.parametrize(
    ("samples", "passed"),
    [
        pytest.param(draw_samples(12, 60, 0.5, 1), True, id="below the bound"),
        pytest.param(draw_samples(12, 60, 1.2, 1), False, id="above it, in a long run"),
        pytest.param(draw_samples(1.2, 8, 3, 10), True, id="above it, in a run that is too short"),
        pytest.param(draw_samples(1.2, 8, 100, 10), False, id="far above it, in a short run"),
    ],
)
def test_growth_fails_only_where_the_samples_show_it(
    samples: Sequence[Sample], passed: bool
) -> None:
    assert judge_slope("slope", samples).passed is passed


def test_the_figure_has_its_interval_and_the_bound_says_how_it_is_judged() -> None:
    long, short = draw_samples(12, 60, 0.5, 1), draw_samples(1.2, 8, 3, 10)
    assert judge_slope("slope", long).figure.startswith("0.5")
    assert "95%:" in judge_slope("slope", long).figure
    assert judge_slope("slope", long).bound == "at most 1 MB per minute"
    assert judge_slope("slope", short).bound == "at most 1 MB per minute, within the interval"
