"""Alerts and dashboard agree with the metrics, with each other and with the manual."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Metric

from app.inference.service import Service
from app.settings import Settings
from tests.conftest import ROOT
from tests.unit.test_docs import anchors

FOLDER = ROOT / "deploy/observability"
MANUAL = ROOT / "docs/operate.md"
GROUPS = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/unet-server.json").read_text())
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]

NAME = re.compile(r"\b(?:unet|process)_\w+|\bunet:\w+(?::\w+)?")


ROW = re.compile(r"^\| `((?:unet|process)_\w+)` \| (\w+)(?:: ([\w, ]+))? \|", re.MULTILINE)
"""A metric in the manual: its name, type and labels."""


@pytest.fixture(scope="module")
def families(tiny: Path) -> list[Metric]:
    """All metrics of a service."""
    service = Service(Settings(weights_dir=tiny, threads=1, image_workers=1))
    return list(service.metrics.registry.collect())


def test_manual_lists_every_metric_with_its_type_and_labels(families: list[Metric]) -> None:
    listed = {name: (kind, labels) for name, kind, labels in ROW.findall(MANUAL.read_text())}
    names = {
        family.name + ("_total" if family.type == "counter" else ""): family for family in families
    }
    assert listed.keys() == names.keys()
    for name, family in names.items():
        kind, labels = listed[name]
        assert kind == family.type, name
        found = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert not family.samples or found == set(re.findall(r"\w+", labels)), name


@pytest.fixture(scope="module")
def known(families: list[Metric]) -> set[str]:
    """Names of all series, and of those that the rules record."""
    names = {rule["record"] for rule in RULES if "record" in rule}
    for family in families:
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
        names |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return names


def test_rules_and_dashboard_use_only_series_that_exist(known: set[str]) -> None:
    for expression in [rule["expr"] for rule in RULES] + QUERIES:
        used = set(NAME.findall(expression))
        assert used or "up{" in expression
        assert used <= known, expression


def test_every_query_is_limited_to_the_job() -> None:
    for expression in [rule["expr"] for rule in RULES] + QUERIES:
        selectors = len(re.findall(r"\b(?:(?:unet|process)_\w+|up)\b(?!:)", expression))
        assert expression.count('job="unet"') == selectors, expression


@pytest.mark.parametrize("name", ALERTS)
def test_alert_has_a_severity_a_summary_and_a_runbook(name: str) -> None:
    rule = ALERTS[name]
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"]["summary"]
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert ROOT / page == MANUAL
    assert anchor == name.lower()
    assert anchor in anchors(MANUAL)


def test_every_runbook_belongs_to_an_alert() -> None:
    runbooks = re.findall(r"^### (Unet\w+)$", MANUAL.read_text(), re.MULTILINE)
    assert sorted(runbooks) == sorted(ALERTS)


def test_every_alert_fires_in_the_test_of_the_rules() -> None:
    groups = yaml.safe_load((ROOT / "tests/scale/alerts_test.yml").read_text())["tests"]
    cases = [case for group in groups for case in group["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == ALERTS.keys()
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} >= {
        name for name, rule in ALERTS.items() if "for" in rule
    }


def test_prometheus_scrapes_the_job_of_the_rules_and_loads_them() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert [job["job_name"] for job in config["scrape_configs"]] == ["unet"]
    assert [FOLDER / name for name in config["rule_files"]] == [FOLDER / "alerts.yml"]


def test_prometheus_scrapes_the_services_of_compose_that_may_run() -> None:
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    (listed,), (looked_up,) = job["static_configs"], job["dns_sd_configs"]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    ours = {name: service for name, service in services.items() if "build" in service}
    assert {target.partition(":")[0] for target in listed["targets"]} == {
        name for name, service in ours.items() if "profiles" not in service
    }
    assert set(looked_up["names"]) == {
        name for name, service in ours.items() if "profiles" in service
    }
    published = {port.rpartition(":")[2] for service in ours.values() for port in service["ports"]}
    ports = {target.partition(":")[2] for target in listed["targets"]} | {str(looked_up["port"])}
    assert ports == published
    (naming,) = job["relabel_configs"]
    assert naming["replacement"] == f"$1:{looked_up['port']}"  # as that of a listed target


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    for one, other in combinations((panel["gridPos"] for panel in PANELS), 2):
        apart_in_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_in_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_in_x or apart_in_y
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


def test_annotation_has_its_query_where_old_and_new_versions_of_grafana_look() -> None:
    (annotation,) = DASHBOARD["annotations"]["list"]
    assert annotation["target"]["expr"] == annotation["expr"]
    assert annotation["expr"].count('job="unet"') == 1


def test_every_panel_asks_the_data_source_that_is_chosen() -> None:
    sources = {
        json.dumps(target["datasource"]) for panel in PANELS for target in panel.get("targets", [])
    }
    assert sources == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}
