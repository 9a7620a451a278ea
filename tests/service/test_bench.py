"""`unet bench` on a tiny network: which figures it reports, not how fast anything is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from app.cli import main
from app.cli.bench import peaks
from app.cli.bench.engines import batch_sizes
from app.cli.bench.serving import running
from app.cli.bench.stages import draw_image
from app.cli.bench.timing import measure_seconds
from app.cli.errors import CommandError
from model.config import UNetConfig
from model.convert.flops import count_flops


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the peak does not matter here, and large matrices take seconds."""
    monkeypatch.setattr(peaks, "CHAIN_LENGTHS", {128: 2})


def test_the_report_has_every_figure(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    command = ["bench", "--weights-dir", str(tiny), "--precision", "fp32", "--json", str(out)]
    assert main([*command, "--seconds", "0.05", "--clients", "2", "3"]) == 0
    report = json.loads(out.read_text())

    assert report["machine"]["cores"] >= 1
    assert report["machine"]["versions"]["numpy"] == np.__version__
    (engine,) = report["engines"]
    assert len(engine["peak_flops_per_second"]) == 2
    assert [run["window"] for run in engine["runs"]] == [[64, 64], [128, 128]]
    for run in engine["runs"]:
        work = count_flops(UNetConfig(base_features=4), *run["window"])
        assert run["flops_per_second"] == pytest.approx(run["images_per_second"] * work)
        assert run["roofline_fraction"] == pytest.approx(
            run["flops_per_second"] / np.mean(engine["peak_flops_per_second"])
        )
    assert min(report["stages"]["milliseconds_of_one_core"].values()) > 0
    service = report["service"]
    assert service["image"]["width"] == service["window"][1] == 128
    for run, clients in zip(service["runs"], (2, 3), strict=True):
        assert list(run["statuses"]) == ["200"]
        assert run["statuses"]["200"] >= clients
        assert run["p50_seconds"] <= run["p99_seconds"]
        assert run["engine_fraction"] == pytest.approx(
            run["images_per_second"] / np.mean(service["engine_images_per_second"])
        )
    assert len(service["start_seconds"]) == 2
    if sys.platform == "linux":
        resident = service["resident_bytes"]
        assert 0 < resident["ready"] <= resident["peak"]

    output = capsys.readouterr().out
    assert "of peak" in output
    assert "over HTTP" in output


def test_no_http_starts_no_service(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--weights-dir", str(tiny), "--seconds", "0.01", "--no-http"]) == 0
    assert "over HTTP" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing.safetensors"], "cannot be read"),
        (["--seconds", "0"], "must be above 0"),
        (["--precision", "int8"], "has no calibration"),
        (["--precision", "fp16"], "is not supported by openvino"),
    ],
)
def test_a_wrong_argument_is_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["bench", *flags, "--weights-dir", str(tiny)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("backend", "precision"), [("openvino", "int8"), ("torch", "fp32")])
def test_the_peak_is_measured_with_each_backend(backend: str, precision: str) -> None:
    assert peaks.measure_peak(backend, "cpu", precision, 1, 0.01) > 0


def test_batch_sizes_double_up_to_the_largest() -> None:
    assert [batch_sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_measured_seconds_are_a_median_after_a_burn_in() -> None:
    readings = iter(range(100))
    calls = []
    seconds = measure_seconds(lambda: calls.append(None), 0, clock=lambda: float(next(readings)))
    assert seconds == 1.0  # each reading of this clock is one more than the last
    assert len(calls) == 4


def test_the_synthetic_image_is_dark_with_bright_spots() -> None:
    image = draw_image(100, 300)
    assert image.shape == (100, 300)
    assert np.median(image) < 20 < 60 < image.max()


def test_a_server_that_exits_is_reported_with_its_last_line() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no weights here')"]
    with pytest.raises(CommandError, match="no weights here"), running(command, "at (.*)", "/"):
        pass
