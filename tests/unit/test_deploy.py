"""The manifests, the compose file and the Dockerfile agree with the service and with each other."""

from __future__ import annotations

import importlib
import re
from typing import Any

import pytest
import yaml

from app.settings import PREFIX, Settings
from tests.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
DRAIN_S = Settings.model_fields["drain_s"].default
WARM_UP_S = 300
"""In which a CUDA device tries its algorithms and captures its graphs for every shape."""
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


def test_probes_use_their_routes_on_the_port_of_the_image(container: Any) -> None:
    paths = {
        kind: container[f"{kind}Probe"]["httpGet"]["path"]
        for kind in ("startup", "readiness", "liveness")
    }
    assert paths == {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}
    (port,) = container["ports"]
    assert str(port["containerPort"]) == image_environment()["UNET_PORT"]
    assert {container[f"{kind}Probe"]["httpGet"]["port"] for kind in paths} == {port["name"]}
    assert manifest("cpu/service")["spec"]["ports"][0]["targetPort"] == port["name"]


def test_grace_periods_are_longer_than_the_drain(pod: Any, container: Any) -> None:
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= before + DRAIN_S + 5
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    grace = compose["services"]["unet"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) >= DRAIN_S + 5


@pytest.mark.parametrize("name", ["Dockerfile", "README.md", "docs/deploy.md"])
def test_documented_stop_timeout_is_longer_than_the_drain(name: str) -> None:
    timeouts = re.findall(r"--stop-timeout (\d+)", (ROOT / name).read_text())
    assert timeouts
    assert all(float(seconds) >= DRAIN_S + 5 for seconds in timeouts)


def test_every_documented_docker_run_sets_the_stop_timeout() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for command in re.findall(r"docker run .*unet-server", path.read_text()):
            assert "--stop-timeout" in command, path


def test_health_check_runs_a_file_of_the_image() -> None:
    (script,) = re.findall(r'CMD \["python", "-I", "/srv/(\S+)"\]', DOCKERFILE)
    assert (ROOT / "deploy" / script).exists()
    assert f"COPY deploy/{script} ./\n" in DOCKERFILE
    assert f"!deploy/{script}" in (ROOT / ".dockerignore").read_text().splitlines()


def test_pods_run_as_the_user_of_the_image_and_cannot_write_its_root(
    pod: Any, container: Any
) -> None:
    (user,) = set(re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE))
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert container["securityContext"]["readOnlyRootFilesystem"]


def test_service_links_are_disabled(pod: Any) -> None:
    assert not pod["enableServiceLinks"]  # they would set UNET_..._PORT for other services


@pytest.mark.parametrize("name", ["cpu/deployment", "cuda/gpu"])
def test_environment_contains_valid_settings(name: str) -> None:
    (container,) = manifest(name)["spec"]["template"]["spec"]["containers"]
    given = {item["name"].removeprefix(PREFIX).lower(): item["value"] for item in container["env"]}
    Settings.model_validate({"weights_dir": ROOT, **given})
    assert given.keys() <= Settings.model_fields.keys()


def test_cpu_request_equals_its_limit_in_whole_cpus(container: Any) -> None:
    resources = container["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
    assert int(resources["limits"]["cpu"]) >= 1


def test_kustomization_lists_every_manifest() -> None:
    listed = set(manifest("cpu/kustomization")["resources"])
    assert listed == {path.name for path in MANIFESTS} - {"kustomization.yaml"}


def test_selectors_match_the_pods() -> None:
    labels = manifest("cpu/deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("cpu/deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("cpu/service")["spec"]["selector"] == labels
    assert manifest("cpu/disruption-budget")["spec"]["selector"]["matchLabels"] == labels


def test_cuda_patch_applies_to_the_container_of_the_deployment(container: Any) -> None:
    (patched,) = manifest("cuda/gpu")["spec"]["template"]["spec"]["containers"]
    assert patched["name"] == container["name"]


def test_gpu_pod_has_cpus_and_time_for_its_device() -> None:
    (patched,) = manifest("cuda/gpu")["spec"]["template"]["spec"]["containers"]
    resources = patched["resources"]
    # the loop, the device's two threads, and image workers that keep up with it
    assert int(resources["limits"]["cpu"]) >= 8
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
    assert patched["startupProbe"]["failureThreshold"] >= WARM_UP_S  # every second


def test_health_check_waits_for_the_first_warm_up() -> None:
    (seconds,) = re.findall(r"HEALTHCHECK .*--start-period=(\d+)s", DOCKERFILE)
    assert int(seconds) >= WARM_UP_S


def test_ray_service_holds_the_config_of_serve_deploy() -> None:
    config = yaml.safe_load((ROOT / "deploy/ray/serve_config.yaml").read_text())
    service = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    assert yaml.safe_load(service["spec"]["serveConfigV2"]) == config
    (application,) = config["applications"]
    variables = application["runtime_env"]["env_vars"]
    assert {name.removeprefix(PREFIX).lower() for name in variables} <= Settings.model_fields.keys()


def test_ray_gives_replicas_the_time_to_drain() -> None:
    config = yaml.safe_load((ROOT / "deploy/ray/serve_config.yaml").read_text())
    (deployment,) = config["applications"][0]["deployments"]
    assert deployment["graceful_shutdown_timeout_s"] >= DRAIN_S + 5
    cluster = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())["spec"]
    for group in (
        cluster["rayClusterConfig"]["headGroupSpec"],
        *cluster["rayClusterConfig"]["workerGroupSpecs"],
    ):
        pod = group["template"]["spec"]
        assert (
            pod["terminationGracePeriodSeconds"] >= deployment["graceful_shutdown_timeout_s"] + 30
        )
        assert pod["enableServiceLinks"] is False
        (container,) = pod["containers"]
        (variable,) = container["env"]
        assert variable["name"] == "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
        module, _, function = variable["value"].partition(":")
        assert hasattr(importlib.import_module(module), function)
