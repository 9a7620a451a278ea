"""What the manifests and the compose file take for granted of the service and its image."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from app.settings import PREFIX, Settings
from tests.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
DRAIN_S = Settings.model_fields["drain_s"].default
MANIFESTS = sorted((ROOT / "deploy/kubernetes/cpu").glob("*.yaml"))


def manifest(name: str) -> Any:
    return yaml.safe_load((ROOT / f"deploy/kubernetes/{name}.yaml").read_text())


@pytest.fixture
def pod() -> Any:
    return manifest("cpu/deployment")["spec"]["template"]["spec"]


@pytest.fixture
def container(pod: Any) -> Any:
    (container,) = pod["containers"]
    return container


def image_environment() -> dict[str, str]:
    return dict(re.findall(r"\b(UNET_\w+)=(\S+)", DOCKERFILE))


def test_probes_ask_for_what_each_is_there_for(container):
    paths = {
        kind: container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}
    (port,) = container["ports"]
    assert str(port["containerPort"]) == image_environment()["UNET_PORT"]
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in paths} == {port["name"]}
    assert manifest("cpu/service")["spec"]["ports"][0]["targetPort"] == port["name"]


def test_what_is_accepted_is_answered_before_the_kill(pod, container):
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before + DRAIN_S + 5
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    grace = compose["services"]["unet"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) >= DRAIN_S + 5


def test_the_user_is_the_images_and_nothing_more_is_allowed(pod, container):
    (user,) = set(re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE))
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not pod["enableServiceLinks"]  # else UNET_..._PORT of services come in


@pytest.mark.parametrize("name", ["cpu/deployment", "cuda/gpu"])
def test_environment_is_of_settings_that_exist(name):
    (container,) = manifest(name)["spec"]["template"]["spec"]["containers"]
    given = {item["name"].removeprefix(PREFIX).lower(): item["value"] for item in container["env"]}
    Settings.model_validate({"weights_dir": ROOT, **given})
    assert given.keys() <= Settings.model_fields.keys()


def test_cpus_are_whole_and_all_the_pods_own(container):
    resources = container["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
    assert int(resources["limits"]["cpu"]) >= 1


def test_everything_is_applied_and_selects_the_pods():
    listed = set(manifest("cpu/kustomization")["resources"])
    assert listed == {path.name for path in MANIFESTS} - {"kustomization.yaml"}
    labels = manifest("cpu/deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("cpu/deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("cpu/service")["spec"]["selector"] == labels
    assert manifest("cpu/disruption-budget")["spec"]["selector"]["matchLabels"] == labels
    patched = manifest("cuda/gpu")["spec"]["template"]["spec"]["containers"][0]["name"]
    assert patched == "unet-server"
