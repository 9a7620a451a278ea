"""The manifests, the compose file and the Dockerfile agree with the service and with each other."""

from __future__ import annotations

import importlib
import re
import tomllib
from typing import Any

import pytest
import yaml

from app.settings import PREFIX, Settings
from tests.conftest import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
DRAIN_S = Settings.model_fields["drain_s"].default
WARM_UP_S = 300
"""In which a CUDA device tries its algorithms and captures its graphs for every shape."""
KUBERNETES = ROOT / "deploy/kubernetes"
DEVICES = ["cpu", "cuda"]


def objects(device: str) -> dict[str, Any]:
    """Kind -> object of the rendered manifests for a device."""
    text = (KUBERNETES / device / "unet-server.yaml").read_text()
    return {item["kind"]: item for item in yaml.safe_load_all(text)}


@pytest.fixture(params=DEVICES)
def pod(request: pytest.FixtureRequest) -> Any:
    return objects(request.param)["Deployment"]["spec"]["template"]["spec"]


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


@pytest.mark.parametrize("device", DEVICES)
def test_service_and_policy_use_the_port_of_the_container(device: str) -> None:
    found = objects(device)
    (container,) = found["Deployment"]["spec"]["template"]["spec"]["containers"]
    (port,) = container["ports"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert found["NetworkPolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == port["name"]


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


def test_pods_set_no_user_and_the_image_sets_one_by_number(pod: Any, container: Any) -> None:
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"] * 2
    # runAsNonRoot needs a number; OpenShift assigns its own
    assert "runAsUser" not in {**pod["securityContext"], **container["securityContext"]}


def test_pods_meet_the_restricted_pod_security_standard(pod: Any, container: Any) -> None:
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image"}
    allowed |= {"persistentVolumeClaim", "projected", "secret"}
    assert all(volume.keys() - {"name"} <= allowed for volume in pod["volumes"])
    assert not pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
    assert not any("hostPort" in port for port in container["ports"])
    assert not pod["automountServiceAccountToken"]


def test_service_links_are_disabled(pod: Any) -> None:
    assert not pod["enableServiceLinks"]  # they would set UNET_..._PORT for other services


def test_environment_contains_valid_settings(container: Any) -> None:
    given = {item["name"].removeprefix(PREFIX).lower(): item["value"] for item in container["env"]}
    Settings.model_validate({"weights_dir": ROOT, **given})
    assert given.keys() <= Settings.model_fields.keys()


@pytest.mark.parametrize("device", DEVICES)
def test_pods_use_the_device_and_nothing_else(device: str) -> None:
    (container,) = objects(device)["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "UNET_DEVICE", "value": device} in container["env"]
    assert container["image"].endswith("-cuda") == (device == "cuda")
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (device == "cuda")


def test_cpu_request_equals_its_limit_in_whole_cpus(container: Any) -> None:
    resources = container["resources"]
    assert resources["requests"]["cpu"] == resources["limits"]["cpu"]
    assert int(resources["limits"]["cpu"]) >= 1


def to_bytes(quantity: str) -> float:
    return float(quantity.removesuffix("Gi")) * 2**30


def largest_memory(megapixels: str) -> float:
    """Bytes that a replica may use, by docs/operate.md: the most that any row of its table has, and
    what the settings admit."""
    sizing = (ROOT / "docs/operate.md").read_text()
    peaks = re.findall(r"^\|.* \| ([\d.]+) GB \|$", sizing, re.MULTILINE)
    ((per_pixel, default),) = re.findall(
        r"plus (\d+) bytes per pixel of the images in work \(`UNET_QUEUE_MEGAPIXELS`, (\d+) by",
        sizing,
    )
    assert float(default) == Settings.model_fields["queue_megapixels"].default
    buffered = Settings.model_fields["queue_mb"].default * 1e6
    return float(max(map(float, peaks)) * 1e9 + float(megapixels) * 1e6 * int(per_pixel) + buffered)


def test_memory_of_pods_holds_what_the_settings_admit(container: Any) -> None:
    variables = {item["name"]: item["value"] for item in container["env"]}
    limit = to_bytes(container["resources"]["limits"]["memory"])
    assert largest_memory(variables["UNET_QUEUE_MEGAPIXELS"]) <= limit


@pytest.mark.parametrize("device", DEVICES)
def test_kustomization_lists_the_rendered_manifests(device: str) -> None:
    listed = yaml.safe_load((KUBERNETES / device / "kustomization.yaml").read_text())["resources"]
    assert listed == ["unet-server.yaml"]


@pytest.mark.parametrize("device", DEVICES)
def test_selectors_match_the_pods(device: str) -> None:
    found = objects(device)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels


def test_gpu_pod_has_cpus_and_time_for_its_device() -> None:
    (container,) = objects("cuda")["Deployment"]["spec"]["template"]["spec"]["containers"]
    # the loop, the device's two threads, and image workers that keep up with it
    assert int(container["resources"]["limits"]["cpu"]) >= 8
    assert container["startupProbe"]["failureThreshold"] >= WARM_UP_S  # every second


def compose() -> Any:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]


def test_compose_starts_only_the_cpu_service_without_a_profile() -> None:
    profiles = {name: service.get("profiles") for name, service in compose().items()}
    assert profiles == {
        "unet": None, "unet-gpu": ["gpu"],
        "prometheus": ["observability"], "grafana": ["observability"],
    }  # fmt: skip


def test_every_compose_service_is_hardened_and_has_a_port_of_its_own() -> None:
    ports = []
    for name, service in compose().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        ports += service["ports"]
    assert len({re.findall(r":-(\d+)}", port)[0] for port in ports}) == len(ports) == 4


def test_prometheus_and_grafana_are_not_reached_from_other_machines() -> None:
    for name in ("prometheus", "grafana"):
        assert all(port.startswith("127.0.0.1:") for port in compose()[name]["ports"])


def test_compose_mounts_files_that_exist() -> None:
    for service in compose().values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (ROOT / source).exists(), volume


def test_compose_builds_the_targets_of_the_dockerfile() -> None:
    stages = re.findall(r"^FROM .* AS (\S+)$", DOCKERFILE, re.MULTILINE)
    targets = [service["build"]["target"] for service in compose().values() if "build" in service]
    assert targets == ["cpu", "cuda"]
    assert set(targets) <= set(stages)


def test_images_are_labeled_with_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]+)"', DOCKERFILE))
    assert labels["version"] == project["version"]
    assert labels["licenses"] == project["license"]
    assert labels["title"] == project["name"]
    assert DOCKERFILE.count("\nLABEL org.opencontainers.image.revision=$REVISION\n") == 2


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


def test_config_of_ray_serve_finds_the_weights_of_the_repository_and_of_the_image() -> None:
    config = yaml.safe_load((ROOT / "deploy/ray/serve_config.yaml").read_text())
    (application,) = config["applications"]
    assert "UNET_WEIGHTS_DIR" not in application["runtime_env"]["env_vars"]
    assert (ROOT / Settings.model_fields["weights_dir"].default).is_dir()
    image = (ROOT / "deploy/ray/Dockerfile").read_text()
    folder = re.findall(r"UNET_WEIGHTS_DIR=(\S+)", image)
    assert folder == ["/srv/weights"]
    assert "WORKDIR /srv\n" in image
    assert "COPY weights weights\n" in image


def test_workers_of_ray_have_the_memory_of_their_replicas() -> None:
    config = yaml.safe_load((ROOT / "deploy/ray/serve_config.yaml").read_text())
    (application,) = config["applications"]
    (deployment,) = application["deployments"]
    cluster = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())["spec"]
    (group,) = cluster["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    replicas = int(limits["cpu"]) // deployment["ray_actor_options"]["num_cpus"]
    megapixels = application["runtime_env"]["env_vars"]["UNET_QUEUE_MEGAPIXELS"]
    ray = 1e9
    assert replicas * largest_memory(megapixels) + ray <= to_bytes(limits["memory"])
    room = replicas * group["maxReplicas"]
    assert room == deployment["autoscaling_config"]["max_replicas"]


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


def test_ray_image_has_the_versions_of_the_manifest_and_of_the_extra() -> None:
    image = (ROOT / "deploy/ray/Dockerfile").read_text()
    ((version, python),) = re.findall(r"^ARG RAY=([\d.]+)-py(\d+)$", image, re.MULTILINE)
    ((build_python,),) = [re.findall(r"^ARG PYTHON=([\d.]+)$", image, re.MULTILINE)]
    assert build_python.replace(".", "") == python
    service = yaml.safe_load((ROOT / "deploy/ray/rayservice.yaml").read_text())
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == version
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ray, paths = project["optional-dependencies"]["ray"]
    lowest = re.findall(r">=([\d.]+)", ray)[0]
    assert version.startswith(f"{lowest}.")
    assert f'"{paths}"' in image
