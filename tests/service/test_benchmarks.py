"""The programs of `benchmarks/`: that they count right, not how fast anything is."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from app.cli.bench.load import Caller, closed_loop
from app.cli.bench.serving import serving
from app.cli.bench.stages import drawn, encoded
from benchmarks import cost, load
from benchmarks.litserve_compare import _BOUNDARY, form
from benchmarks.networks import untrained, write_wide_checkpoint
from model.checkpoint import load_checkpoint
from model.predict import Predictor


@contextmanager
def stub(statuses: list[int], seconds: float = 0.0) -> Iterator[str]:
    """A server that answers one request at a time; the last status for good."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(seconds)
            self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    class Server(http.server.HTTPServer):
        request_queue_size = 200

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_open_loop_latency_counts_from_when_its_request_was_due(monkeypatch):
    monkeypatch.setattr(load, "MOST_AT_ONCE", 2)  # the others are sent late, and that counts
    took, seconds = 0.02, 0.3
    with stub([200], took) as url:
        run = load.open_loop(url, b"", 200, seconds, "4 × capacity")
    assert run.statuses["200"] == len(run.latencies) > 20
    # one after the other: the last is done when all are, and was due before the end
    assert max(run.latencies) >= len(run.latencies) * took - seconds
    assert run.throughput <= 1 / took


def test_a_closed_loop_tells_what_it_was_answered():
    with stub([200, 200, 429, 200]) as url:  # the first is each client's own warm-up
        run = closed_loop(url, b"", 1, 0.3)
    assert run.statuses["429"] == 1
    assert run.statuses["200"] == len(run.latencies) > 1


def test_a_service_that_is_not_there_is_counted_and_not_raised():
    with stub([200]) as url:
        pass
    status, retry = Caller(url).post(b"")
    assert (status, retry) == ("ConnectionRefusedError", 0.0)


def test_load_as_a_table_and_a_picture(tmp_path):
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
    assert "**0.500**" in load.table(report)
    pytest.importorskip("matplotlib")
    load.draw(report, tmp_path / "load.png")
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_cost_by_size(tmp_path, capsys):
    path = tmp_path / "narrow.safetensors"
    report = cost.measure(path, untrained(path, 2), [0.2, 0.05])
    assert [run["megapixels"] for run in report["runs"]] == pytest.approx([0.05, 0.2], rel=0.02)
    assert all(run["windows"] >= 1 and run["seconds"] > 0 for run in report["runs"])
    assert np.isfinite(report["exponent"])
    cost.show(report)
    assert "to the power of" in capsys.readouterr().out


def test_the_network_that_is_compared_is_the_one_it_was_made_of(tiny, tmp_path):
    source = load_checkpoint(tiny / "nuclei.safetensors")
    wide = write_wide_checkpoint(
        tmp_path / "wide.safetensors", tiny / "nuclei.safetensors", 8, (64, 64)
    )
    assert wide.architecture.base_features == 2 * source.architecture.base_features
    image = drawn(64, 64)
    theirs, ours = (Predictor.of(checkpoint)(image) for checkpoint in (source, wide))
    assert np.abs(theirs - ours).max() < 1e-3


def test_the_form_that_litserve_gets_is_one(tiny):
    with serving(tiny / "nuclei.safetensors", "--precision=fp32") as service:
        kind = f"multipart/form-data; boundary={_BOUNDARY}"
        image = form(encoded(drawn(64, 64)))
        caller = Caller(service.url, kind=kind)
        assert caller.post(image) == ("200", 0.0)
        caller.close()
