"""The simulated autoscaler follows the algorithm of Kubernetes, with the limits of the chart."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tools import autoscaling
from tools.autoscaling import (
    METRICS,
    Autoscaler,
    Pods,
    Reading,
    make_large_requests,
    make_ramp,
    simulate,
)

RATES = [100.0, 500.0, 1000.0]
"""Windows per second: the conclusions do not depend on the card."""


@pytest.mark.parametrize("rate", RATES)
def test_cpu_usage_adds_no_gpu_pods_for_images_of_many_windows(rate: float) -> None:
    outcome = simulate(METRICS["cpu"], Pods(rate=rate, windows=12), make_ramp())
    assert outcome.most_pods == 1
    assert outcome.rejected > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("rate", RATES)
def test_load_rejects_nothing_with_the_fewest_pods(rate: float) -> None:
    pods = Pods(rate=rate, windows=12)
    load = simulate(METRICS["load and cpu"], pods, make_ramp())
    waiting = simulate(METRICS["waiting"], pods, make_ramp())
    busy = simulate(METRICS["busy"], pods, make_ramp())
    assert load.rejected == 0
    assert waiting.mean_pods > 1.5 * load.mean_pods
    assert load.p95_s < busy.p95_s / 2


def test_load_alone_misses_pods_whose_cpus_are_the_limit() -> None:
    pods = Pods(rate=984, windows=1)
    assert pods.capacity < pods.rate / 2  # decoding takes longer than the network
    assert simulate(METRICS["load"], pods, make_ramp()).rejected > 0.3
    assert simulate(METRICS["load and cpu"], pods, make_ramp()).rejected < 0.02


@pytest.mark.parametrize("rate", RATES)
def test_one_large_request_adds_no_pods_by_load(rate: float) -> None:
    seconds = 1800
    pods = Pods(rate=rate, windows=12)
    large = make_large_requests(seconds, windows=4 * rate)
    assert simulate(METRICS["load and cpu"], pods, [0.4] * seconds, large).most_pods == 1
    assert simulate(METRICS["waiting"], pods, [0.4] * seconds, large).most_pods > 1


def decide(needed: list[float], size: int = 4, maximum: int = 20) -> list[int]:
    """The number of pods after each decision, with a metric that asks for `needed` pods."""
    answers = iter(needed)
    scaler = Autoscaler(lambda now, pods: next(answers), Pods(maximum=maximum))
    sizes = []
    for step in range(len(needed)):
        size = scaler.decide(step * autoscaling.PERIOD_S, size, Reading(size, 0, 0, 0))
        sizes.append(size)
    return sizes


def test_small_deviations_are_ignored() -> None:
    assert decide([4.3, 3.7]) == [4, 4]


def test_pods_double_at_most_in_each_period() -> None:
    assert decide([20, 20, 20, 20, 20]) == [8, 8, 16, 16, 20]
    assert decide([20], maximum=6) == [6]


def test_pods_are_removed_one_by_one_after_five_low_minutes() -> None:
    sizes = decide([4, *[1.0] * 40])
    first = next(step for step, size in enumerate(sizes) if size < 4)
    assert first * autoscaling.PERIOD_S == autoscaling.STABILIZATION_S
    removed = [step for step in range(1, len(sizes)) if sizes[step] < sizes[step - 1]]
    steps = autoscaling.SCALE_DOWN_PERIOD_S // autoscaling.PERIOD_S
    assert {later - earlier for earlier, later in itertools.pairwise(removed)} == {steps}
    assert sizes[-1] == 1


def test_limits_are_those_of_the_chart() -> None:
    template = (ROOT / "deploy/helm/unet-server/templates/_helpers.tpl").read_text()
    (block,) = re.findall(r'define "unet.scalingBehavior" -}}\n(.*?){{- end', template, re.DOTALL)
    behavior: Any = yaml.safe_load(block)
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behavior["scaleUp"]["policies"] == [
        {"type": "Percent", "value": 100, "periodSeconds": autoscaling.SCALE_UP_PERIOD_S},
        {"type": "Pods", "value": 2, "periodSeconds": autoscaling.SCALE_UP_PERIOD_S},
    ]
    assert behavior["scaleDown"] == {
        "stabilizationWindowSeconds": autoscaling.STABILIZATION_S,
        "policies": [
            {"type": "Pods", "value": 1, "periodSeconds": autoscaling.SCALE_DOWN_PERIOD_S}
        ],
    }


def test_targets_are_those_of_the_chart() -> None:
    values = yaml.safe_load((ROOT / "deploy/helm/unet-server/values.yaml").read_text())
    assert values["autoscaling"]["targetLoad"] == autoscaling.TARGET
    assert values["autoscaling"]["targetCpuPercent"] == 100 * autoscaling.CPU_TARGET
