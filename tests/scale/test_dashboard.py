"""Every query of the dashboard returns data from a real Prometheus that scrapes loaded services."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, serving
from tests.scale.picture import draw_dashboard
from tests.scale.ports import free_port
from tests.scale.prometheus import FOLDER, Prometheus, scraping
from tests.scale.test_alerts import clients, faulty

DASHBOARD = json.loads((FOLDER / "grafana/dashboards/unet-server.json").read_text())
VARIABLES = {"$__rate_interval": "5s", "$__range": "30s", "$instance": ".*"}
ON_CUDA_ONLY = {"unet_gpu_memory_used_bytes"}
PICTURE = ROOT / "build/dashboard.png"
"""Left for people to look at."""


def find_queries() -> dict[str, str]:
    """The expression of every query, by panel and letter."""
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", [])
    }
    for annotation in DASHBOARD["annotations"]["list"]:
        found[f"annotation {annotation['name']}"] = annotation["expr"]
    return found


def fill_in(expression: str) -> str:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def has_data(prometheus: Prometheus, expression: str) -> bool:
    samples: list[dict[str, Any]] = prometheus.query(fill_in(expression))
    return any(math.isfinite(float(sample["value"][1])) for sample in samples)


def test_every_query_returns_data_from_loaded_services(tiny: Path, tmp_path: Path) -> None:
    healthy, short_of_memory = free_port(), free_port()
    flags = ("--max-batch=8", "--max-wait-ms=100")
    with (
        serving("--port", str(healthy), f"--weights-dir={tiny}"),
        faulty("memory", tiny, *flags, port=short_of_memory),
        scraping(tmp_path, healthy, short_of_memory) as prometheus,
        clients(healthy, 2),
        clients(short_of_memory, 8),
    ):
        queries = {
            name: expression
            for name, expression in find_queries().items()
            if not any(metric in expression for metric in ON_CUDA_ONLY)
        }
        assert len(queries) == len(find_queries()) - len(ON_CUDA_ONLY)
        empty = set(queries)

        def ask_again() -> bool:
            for name in list(empty):
                if has_data(prometheus, queries[name]):
                    empty.discard(name)
            return not empty

        try:
            prometheus.wait_for(ask_again, 60)
        except AssertionError as error:
            raise AssertionError(f"no data: {sorted(empty)}") from error
        PICTURE.parent.mkdir(exist_ok=True)
        draw_dashboard(DASHBOARD, prometheus.url, fill_in, 60, PICTURE)


def test_variable_lists_the_replicas(tiny: Path, tmp_path: Path) -> None:
    port = free_port()
    (variable,) = (v for v in DASHBOARD["templating"]["list"] if v["name"] == "instance")
    assert variable["query"]["query"] == 'label_values(unet_ready{job="unet"}, instance)'
    with (
        serving("--port", str(port), f"--weights-dir={tiny}"),
        scraping(tmp_path, port) as prometheus,
    ):
        prometheus.wait_for(lambda: prometheus.query('unet_ready{job="unet"}'))
        (sample,) = prometheus.query('unet_ready{job="unet"}')
        assert sample["metric"]["instance"] == f"127.0.0.1:{port}"
