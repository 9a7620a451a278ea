"""`unet bench` on a tiny network: what it writes, not how fast anything is."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from app.cli import main
from app.cli.bench import roofs
from app.cli.bench.engines import batches
from app.cli.bench.serving import running
from app.cli.bench.stages import drawn
from app.cli.bench.timing import timed
from app.cli.errors import CommandError
from model.config import UNetConfig
from model.convert.flops import count_flops


@pytest.fixture(autouse=True)
def low_roofs(monkeypatch):
    """Small matrices: what a roof is does not matter here, and large ones take seconds."""
    monkeypatch.setattr(roofs, "_CHAINS", {128: 2})


def test_every_figure_is_there(tiny, tmp_path, capsys):
    out = tmp_path / "bench.json"
    command = ["bench", "--weights-dir", str(tiny), "--precision", "fp32", "--json", str(out)]
    assert main([*command, "--seconds", "0.05", "--clients", "2", "3"]) == 0
    report = json.loads(out.read_text())

    assert report["machine"]["cores"] >= 1
    assert report["machine"]["versions"]["numpy"] == np.__version__
    (engine,) = report["engines"]
    assert len(engine["roof_flops_per_second"]) == 2
    assert [run["window"] for run in engine["runs"]] == [[64, 64], [128, 128]]
    for run in engine["runs"]:
        work = count_flops(UNetConfig(base_features=4), *run["window"])
        assert run["flops_per_second"] == pytest.approx(run["images_per_second"] * work)
        assert run["of_the_roof"] == pytest.approx(
            run["flops_per_second"] / np.mean(engine["roof_flops_per_second"])
        )
    assert min(report["stages"]["milliseconds_of_one_core"].values()) > 0
    service = report["service"]
    assert service["image"]["width"] == service["window"][1] == 128
    for run, clients in zip(service["runs"], (2, 3), strict=True):
        assert list(run["statuses"]) == ["200"]
        assert run["statuses"]["200"] >= clients
        assert run["p50_seconds"] <= run["p99_seconds"]
    assert len(service["start_seconds"]) == 2
    if sys.platform == "linux":
        resident = service["resident_bytes"]
        assert 0 < resident["ready"] <= resident["peak"]

    shown = capsys.readouterr().out
    assert "of the roof" in shown
    assert "over HTTP" in shown


def test_without_http_no_service_is_started(tiny, capsys):
    assert main(["bench", "--weights-dir", str(tiny), "--seconds", "0.01", "--no-http"]) == 0
    assert "over HTTP" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nothing.safetensors"], "cannot be read"),
        (["--seconds", "0"], "must be above 0"),
        (["--precision", "int8"], "has no calibration"),
        (["--precision", "fp16"], "is not to be had with openvino"),
    ],
)
def test_a_wrong_wish_is_one_line(tiny, capsys, flags, said):
    assert main(["bench", *flags, "--weights-dir", str(tiny)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("backend", "precision"), [("openvino", "int8"), ("torch", "fp32")])
def test_roofs(backend, precision):
    assert roofs.roof(backend, "cpu", precision, 1, 0.01) > 0


def test_batches_double_up_to_the_largest():
    assert [batches(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def test_a_median_after_a_burn_in():
    readings = iter(range(100))
    calls = []
    took = timed(lambda: calls.append(None), 0, clock=lambda: float(next(readings)))
    assert took == 1.0  # the clock goes on by one from one reading to the next
    assert len(calls) == 4


def test_a_drawn_image_is_dark_with_bright_spots():
    image = drawn(100, 300)
    assert image.shape == (100, 300)
    assert np.median(image) < 20 < 60 < image.max()


def test_a_service_that_ends_says_why():
    command = [sys.executable, "-c", "raise SystemExit('no weights here')"]
    with pytest.raises(CommandError, match="no weights here"), running(command, "at (.*)", "/"):
        pass
