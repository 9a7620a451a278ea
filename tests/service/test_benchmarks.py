"""The programs of `benchmarks/`: that they count correctly, not how fast anything is."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from app.cli.bench.load import KeepAliveClient, closed_loop, format_statuses
from app.cli.bench.serving import serving
from app.cli.bench.stages import draw_image, encode_jpeg
from benchmarks import cost, load
from benchmarks.litserve_compare import BOUNDARY, encode_form
from benchmarks.networks import write_untrained_checkpoint, write_wide_checkpoint
from model.checkpoint import load_checkpoint
from model.predict import Predictor


@contextmanager
def stub_server(statuses: list[int], seconds: float = 0.0) -> Iterator[str]:
    """Run a server that handles one request at a time, and repeats the last status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(seconds)
            self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.HTTPServer):
        request_queue_size = 200

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_open_loop_latency_counts_from_when_the_request_was_due(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(load, "MAX_IN_FLIGHT", 2)  # others are sent late, and that counts
    each, seconds = 0.02, 0.3
    with stub_server([200], each) as url:
        run = load.open_loop(url, b"", 200, seconds, "4 × capacity")
    assert run.statuses["200"] == len(run.latencies) > 20
    # One after the other: the last is complete when all are, and was due before the end.
    assert max(run.latencies) >= len(run.latencies) * each - seconds
    assert run.throughput <= 1 / each


def test_a_closed_loop_counts_statuses_without_the_warm_up() -> None:
    with stub_server([200, 200, 429, 200]) as url:
        run = closed_loop(url, b"", 1, 0.3)
    assert run.statuses["429"] == 1
    assert run.statuses["200"] == len(run.latencies) > 1


def test_statuses_are_formatted_in_order() -> None:
    assert format_statuses({"429": 3, "200": 12, "504": 0}) == "12 × 200, 3 × 429"


def test_a_refused_connection_is_counted_by_its_name() -> None:
    with stub_server([200]) as url:
        pass
    status, retry_after = KeepAliveClient(url).post(b"")
    assert (status, retry_after) == ("ConnectionRefusedError", 0.0)


def test_a_load_report_becomes_a_table_and_a_chart(tmp_path: Path) -> None:
    run = {"offered_per_second": None, "images_per_second": 2.0, "statuses": {}}
    run |= dict.fromkeys(load.PERCENTILES, 0.5)
    closed = {"engine_images_per_second": [4.0, 4.0], "capacity": 2.0}
    report = {
        "machine": {"cpu": "C", "cores": 2, "isa": []},
        "model": "m",
        "engine": "e",
        "image": "i",
        "window": "w",
        "peak_resident_bytes": None,
        "closed": closed
        | {"runs": [run | {"name": f"{clients} clients"} for clients in load.CLIENTS]},
        "open": {"runs": [run | {"name": "2 × capacity", "offered_per_second": 9.0}]},
    }
    assert "**0.500**" in load.format_table(report)
    pytest.importorskip("matplotlib")
    load.draw_chart(report, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_cost_is_measured_by_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "narrow.safetensors"
    report = cost.measure(path, write_untrained_checkpoint(path, 2), [0.2, 0.05])
    assert [run["megapixels"] for run in report["runs"]] == pytest.approx([0.05, 0.2], rel=0.02)
    assert all(run["windows"] >= 1 and run["seconds"] > 0 for run in report["runs"])
    assert np.isfinite(report["exponent"])
    cost.print_summary(report)
    assert "to the power of" in capsys.readouterr().out


def test_the_compared_network_computes_the_same_as_its_source(tiny: Path, tmp_path: Path) -> None:
    source = load_checkpoint(tiny / "nuclei.safetensors")
    wide = write_wide_checkpoint(
        tmp_path / "wide.safetensors", tiny / "nuclei.safetensors", 8, (64, 64)
    )
    assert wide.architecture.base_features == 2 * source.architecture.base_features
    image = draw_image(64, 64)
    expected, found = (Predictor.of(checkpoint)(image) for checkpoint in (source, wide))
    assert np.abs(expected - found).max() < 1e-3


def test_the_form_for_litserve_is_valid_multipart(tiny: Path) -> None:
    with serving(tiny / "nuclei.safetensors", "--precision=fp32") as service:
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        client = KeepAliveClient(service.url, kind=kind)
        assert client.post(encode_form(encode_jpeg(draw_image(64, 64)))) == ("200", 0.0)
        client.close()
