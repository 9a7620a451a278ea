"""The Helm chart fits the service, without Helm: `make kube-test` renders and applies it."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import jsonschema
import pytest
import yaml

from app.settings import Settings
from tests.conftest import ROOT
from tools.kube.chart import CHART, SNAPSHOTS, hash_chart, merge_values, read_values, values_files

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = read_values("values.yaml")
OF_OTHER_VALUES = {
    "host", "port", "device", "drain_s", "weights_dir", "reload", "api_keys", "api_keys_file",
}  # fmt: skip
"""Settings that the chart derives from other values, or that the image sets."""
POD_FIELDS = {"resources", "podSecurityContext", "securityContext"}
"""Values whose keys are those of a pod; the schema does not list all of them."""


def validate(values: dict[str, Any]) -> None:
    """As Helm does: with the default values below them."""
    jsonschema.Draft7Validator(SCHEMA).validate(merge_values(VALUES, values))


def test_schema_is_valid() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", values_files())
def test_values_fit_the_schema(name: str) -> None:
    validate(read_values(name))


def keys(values: dict[str, Any], schema: dict[str, Any], prefix: str = "") -> tuple[set[str], ...]:
    """The keys of the values and those of the schema, with those of nested objects."""
    ours = {prefix + key for key in values}
    theirs = {prefix + key for key in schema["properties"]}
    for key, value in values.items():
        nested = schema["properties"].get(key, {})
        if key not in POD_FIELDS and "properties" in nested:
            inner, outer = keys(value, nested, f"{prefix}{key}.")
            ours, theirs = ours | inner, theirs | outer
    return ours, theirs


def test_schema_has_the_keys_of_the_default_values() -> None:
    ours, theirs = keys(VALUES, SCHEMA)
    assert theirs - {"global"} == ours  # Helm adds global


def test_schema_knows_every_setting_of_the_service() -> None:
    listed = SCHEMA["properties"]["settings"]["propertyNames"]["enum"]
    expected = sorted(name.upper() for name in Settings.model_fields.keys() - OF_OTHER_VALUES)
    assert listed == expected


@pytest.mark.parametrize(
    "values",
    [
        {"replica": 3},
        {"settings": {"MAX_BATHC": 4}},
        {"settings": {"API_KEYS": "one"}},  # a secret does not belong into values
        {"autoscaling": {"kind": "cpu"}},
        {"device": "gpu"},
        {"image": {"digest": "sha256:1"}},
        {"kserve": {"storageUri": "s3://bucket/folder"}},
        {"kserve": {"enabled": True, "storageUri": "s3://b"}, "weights": {"volume": {"nfs": {}}}},
    ],
)
def test_schema_rejects_mistakes(values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        validate(values)


@pytest.mark.parametrize("name", values_files())
def test_settings_in_values_are_valid(name: str) -> None:
    given = {key.lower(): value for key, value in read_values(name).get("settings", {}).items()}
    Settings.model_validate({"weights_dir": ROOT, **given})


def test_defaults_of_the_templates_are_those_of_the_service() -> None:
    ingress = (CHART / "templates/ingress.yaml").read_text()
    for name in ("max_upload_mb", "max_request_timeout_s"):
        default = Settings.model_fields[name].default
        assert f'"name" "{name.upper()}" "default" "{default}"' in ingress
    assert VALUES["drainSeconds"] == Settings.model_fields["drain_s"].default


def test_chart_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == project["version"]


@pytest.mark.parametrize("path", SNAPSHOTS)
def test_manifests_are_rendered_from_the_current_chart(path: str) -> None:
    assert f"Chart: {hash_chart()}\n" in (ROOT / path).read_text(), "run `make kube-render`"


def test_inference_service_has_the_container_of_the_deployment() -> None:
    texts = [(ROOT / path).read_text() for path in SNAPSHOTS]
    found = [item for text in texts for item in yaml.safe_load_all(text)]
    (deployment, *_) = [item for item in found if item["kind"] == "Deployment"]
    (service,) = [item for item in found if item["kind"] == "InferenceService"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (predictor,) = service["spec"]["predictor"]["containers"]
    assert predictor == {**container, "name": "kserve-container"}


def test_selectors_match_the_labels_that_kserve_gives_to_pods_and_service() -> None:
    text = (ROOT / "deploy/kserve/inference-service.yaml").read_text()
    found = {item["kind"]: item["spec"] for item in yaml.safe_load_all(text)}
    labels = found["InferenceService"]["predictor"]["labels"]
    assert found["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["podSelector"]["matchLabels"] == labels
