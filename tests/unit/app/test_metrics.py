"""The names of the metrics, and which series exist before anything has happened."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from app.inference.service import Service
from app.metrics import Metrics
from app.settings import Settings
from tests.conftest import ROOT

ROW = re.compile(
    r"^\| `(\w+)` \| (counter|gauge|histogram)(?:: ([\w, ]+))? \| \S.* \|$", re.MULTILINE
)

ON_CUDA_ONLY = "unet_gpu_memory_used_bytes"


@pytest.fixture
def service(tiny: Path) -> Service:
    return Service(Settings(weights_dir=tiny, threads=1, image_workers=1))


def count_everything(metrics: Metrics) -> None:
    """Give a series to every metric that has none from the start."""
    metrics.count_request("/segment", 200, 0.1)
    metrics.images.labels("nuclei").inc()
    metrics.pixels.labels("nuclei").inc()
    metrics.batch_capped("cpu", "nuclei 64x64", 1)
    metrics.model_info.labels("nuclei", "nuclei@1", "openvino", "cpu", "int8").set(1)


def describe(service: Service) -> dict[str, tuple[str, str]]:
    """The type and the labels of every metric, by its name in the text format."""
    count_everything(service.metrics)
    found = {}
    for family in service.metrics.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label: None for sample in family.samples for label in sample.labels}
        labels.pop("le", None)  # of the buckets
        found[name] = family.type, ", ".join(labels)
    return found


def test_table_of_the_manual_lists_exactly_the_metrics_of_the_service(service: Service) -> None:
    text = (ROOT / "docs/operate.md").read_text()
    rows = {name: (kind, labels) for name, kind, labels in ROW.findall(text)}
    assert rows.pop(ON_CUDA_ONLY) == ("gauge", "device")
    shown = describe(service)
    assert shown.pop(ON_CUDA_ONLY) == ("gauge", "")  # without a series here
    assert rows == shown


def test_names_have_base_units_and_the_prefix(service: Service) -> None:
    for name in describe(service):
        assert re.fullmatch(r"(unet|process)_[a-z_]+", name)
        assert not re.search(r"_(ms|milliseconds|minutes|mb|megabytes|percent)(_|$)", name)


def test_events_that_have_not_happened_are_shown_as_zero(service: Service) -> None:
    """Prometheus would miss the first increase of a series that begins with it."""
    text = service.metrics.format_text().decode()
    for series in (
        'unet_rejected_total{reason="queue_full"} 0.0',
        'unet_rejected_total{reason="deadline"} 0.0',
        'unet_dropped_windows_total{reason="expired"} 0.0',
        'unet_reloads_total{result="rejected"} 0.0',
        'unet_batch_failures_total{device="cpu",error="OutOfMemory"} 0.0',
        'unet_image_worker_kills_total{reason="crash"} 0.0',
        'unet_stage_seconds_count{stage="encode"} 0.0',
    ):
        assert series in text.splitlines()


def test_no_series_with_the_time_of_its_creation() -> None:
    assert b"_created" not in Metrics().format_text()


def test_live_follows_the_liveness_probe(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> Any:
        return service.metrics.registry.get_sample_value("unet_live")

    assert read() == 1
    monkeypatch.setattr(service, "liveness_error", lambda: "the engine is hung")
    assert read() == 0
