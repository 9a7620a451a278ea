"""`make kube-test` counts a check as failed when it should. Needs neither Helm nor a server."""

from __future__ import annotations

from typing import Any

import pytest

from tools.kube.__main__ import BROKEN_FIELD, Results, check_object
from tools.kube.chart import CHART, merge_values, read_values, values_files


def test_values_are_merged_as_helm_does() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    other = {"a": {"c": [3]}, "d": {"e": 2}}
    assert merge_values(base, other) == {"a": {"b": 1, "c": [3]}, "d": {"e": 2}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_gpu_values_are_merged_into_those_of_a_gpu_pod() -> None:
    values = read_values("ci/gpu-keda-values.yaml")
    assert values["device"] == "cuda"
    assert values["autoscaling"]["kind"] == "keda"
    assert values["autoscaling"]["hpa"] == {"metric": "load"}


def test_every_values_file_of_the_chart_is_rendered() -> None:
    found = {path.relative_to(CHART).as_posix() for path in CHART.rglob("*values*.yaml")}
    assert set(values_files()) == found
    assert len(found) >= 8


OBJECT = {"kind": "Service", "spec": {"type": "ClusterIP"}}


def reject_unknown_fields(item: dict[str, Any]) -> str:
    return f"{BROKEN_FIELD} is unknown" if BROKEN_FIELD in item["spec"] else ""


@pytest.mark.parametrize(
    ("check", "passed", "failed"),
    [
        (reject_unknown_fields, 2, 0),
        (lambda item: "", 1, 1),  # accepts everything
        (lambda item: "connection refused", 0, 2),  # rejects everything, for another reason
    ],
)
def test_check_must_accept_the_object_and_reject_a_broken_one(
    check: Any, passed: int, failed: int
) -> None:
    results = Results()
    check_object(results, "name", OBJECT, check, set())
    assert (results.passed, results.failed) == (passed, failed)


def test_one_object_of_each_kind_is_broken() -> None:
    results = Results()
    kinds: set[str] = set()
    for _ in range(3):
        check_object(results, "name", OBJECT, reject_unknown_fields, kinds)
    assert results.passed == 4
