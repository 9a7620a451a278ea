"""Renders the chart into the manifests of the repository, or tests it.

    python -m tools.kube unpack build/kube/venv/bin
    python -m tools.kube render
    python -m tools.kube test --api-server build/kube/kube-apiserver

`test` lints the chart, renders it with every values file, and checks each object against the
published schemas of Kubernetes, strictly, and on a real API server as a server-side dry run; so it
does with the RayService of deploy/ray and the pods in it. It also checks that each of these rejects
a broken object, and tries the commands of the documentation. It needs helm and kubectl, which
`unpack` writes into a folder, and etcd, OpenSSL and promtool.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from tools.kube.api_server import ApiServer, run_api_server
from tools.kube.chart import (
    CHART,
    ROOT,
    lint_chart,
    render_chart,
    render_objects,
    render_snapshots,
    values_files,
    values_flags,
)
from tools.kube.custom_resources import custom_resource_definitions
from tools.kube.documentation import find_adapter_query, try_documentation
from tools.kube.programs import unpack_programs
from tools.kube.release import copy_chart, try_release

KUBERNETES_VERSIONS = ("1.25", "1.31", "1.37")
"""Whose published schemas are used; the oldest and the newest are those of kubernetes-validate."""
OWN_GROUPS = ("keda.sh/", "monitoring.coreos.com/", "ray.io/", "serving.kserve.io/")
"""API groups of custom resources, which are not in the schemas of Kubernetes."""
BETA = {"policy/v1": "policy/v1beta1", "autoscaling/v2": "autoscaling/v2beta2"}
"""Beta versions that an API server of 1.20 serves instead. The fields used are the same."""
COMMANDS = ("etcd", "helm", "kubectl", "openssl", "promtool")
BROKEN_FIELD = "notAField"
REJECTED = {
    "settings.MAX_BATHC=4": "MAX_BATHC",
    "settings.API_KEYS=one": "API_KEYS",
    "device=cuda,autoscaling.kind=hpa": "does not show the load of a GPU pod",
    "ingress.enabled=true": "ingress.host",
    "serviceMonitor.enabled=true,apiKeys.secretName=keys": "serviceMonitor.secretKey",
    "kserve.enabled=true,autoscaling.kind=hpa": "KServe creates its own autoscaler",
    "kserve.enabled=true,ingress.enabled=true,ingress.host=a.b": "KServe creates its own ingress",
    "kserve.storageUri=s3://weights": "kserve",
}
"""Values that helm must reject -> a part of its message."""
RAY_SERVICE = ROOT / "deploy/ray/rayservice.yaml"

Check = Callable[[dict[str, Any]], str]
"""Returns what is wrong with an object, or nothing."""


class Results:
    """Counts checks, and prints those that failed."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed = 0

    def add(self, name: str, problem: str) -> None:
        """Count a check. It failed if `problem` is not empty."""
        if problem:
            self.failed += 1
            print(f"FAIL {name}: {problem}")
        else:
            self.passed += 1


def main(arguments: Sequence[str]) -> int:
    """Run a command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.kube")
    commands = parser.add_subparsers(dest="command", required=True)
    unpack = commands.add_parser("unpack", help="write the programs helm and kubectl")
    unpack.add_argument("folder", type=Path)
    commands.add_parser("render", help="write the manifests that are kept in the repository")
    test = commands.add_parser("test", help="test the chart")
    test.add_argument("--api-server", type=Path, required=True, help="the binary kube-apiserver")
    options = parser.parse_args(arguments)
    if options.command == "unpack":
        for path in unpack_programs(options.folder):
            print(path)
        return 0
    if options.command == "render":
        for path, text in render_snapshots():
            path.write_text(text)
            print(path.relative_to(ROOT))
        return 0
    missing = [name for name in COMMANDS if not shutil.which(name)]
    if missing:
        print(f"not found: {', '.join(missing)}; docs/kubernetes.md names their packages")
        return 2
    results = Results()
    check_chart(results)
    for name, problem in try_documentation():
        results.add(name, problem)
    check_schemas(results)
    check_queries(results)
    check_api_server(results, options.api_server)
    print(f"{results.passed} passed, {results.failed} failed")
    return 1 if results.failed or not results.passed else 0


def check_chart(results: Results) -> None:
    """Lint the chart with every values file, and compare the manifests of the repository."""
    for name in values_files():
        for version in KUBERNETES_VERSIONS:
            problem = lint_chart(values_flags(name), version)
            results.add(f"helm lint for Kubernetes {version} -f {name}", problem)
    for values, reason in REJECTED.items():
        results.add(f"helm rejects {values}", _expect_rejection(values, reason))
    for path, text in render_snapshots():
        same = path.exists() and path.read_text() == text
        results.add(str(path.relative_to(ROOT)), "" if same else "run `make kube-render`")


def _expect_rejection(values: str, reason: str) -> str:
    """Render the chart with values that it rejects; returns what differs, or nothing."""
    try:
        render_chart(["--set", values])
    except RuntimeError as error:
        return "" if reason in str(error) else str(error)
    return "accepted"


def check_schemas(results: Results) -> None:
    """Check the built-in objects against the schemas of several versions of Kubernetes."""
    for version in KUBERNETES_VERSIONS:

        def check(item: dict[str, Any], version: str = version) -> str:
            import kubernetes_validate

            try:
                kubernetes_validate.validate(item, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                return str(error.message)
            return ""

        kinds: set[str] = set()
        for name, item in all_objects():
            if not item["apiVersion"].startswith(OWN_GROUPS):
                check_object(results, f"Kubernetes {version}, {name}", item, check, kinds)


def check_api_server(results: Results, binary: Path) -> None:
    """Apply every object to an API server as a server-side dry run, and install a release there."""
    with tempfile.TemporaryDirectory() as folder, run_api_server(binary, Path(folder)) as server:
        print(f"kube-apiserver {server.version}")
        server.define(custom_resource_definitions())
        kinds: set[str] = set()
        for name, item in all_objects():
            served = _as_served(item, server)
            check_object(results, f"dry run, {name}", served, server.try_apply, kinds)
        chart = copy_chart(Path(folder), BETA) if _is_old(server) else CHART
        results.add("helm install, upgrade, rollback, uninstall", try_release(server, chart))


def check_queries(results: Results) -> None:
    """Run the autoscaler's query with promtool, on metrics with a known answer."""
    objects = [item for _, item in all_objects() if item["kind"] == "ScaledObject"]
    (query,) = {each["spec"]["triggers"][0]["metadata"]["query"] for each in objects}
    same = find_adapter_query().split() == query.split()
    results.add("query of the adapter's rule", "" if same else "is not that of the ScaledObject")
    for rate, waiting, expected in ((0.5, 0, 1.0), (1.0, 600, 4.0), (0.0, 0, 0.0)):
        results.add(f"query at {rate} and {waiting}", run_query(query, rate, waiting, expected))
    wrong = run_query(query, 0.5, 0, 99.0)
    results.add("query with a wrong answer", "" if wrong else "promtool accepts it")


def run_query(query: str, rate: float, waiting: int, expected: float) -> str:
    """Evaluate the query for two pods of 10 windows/s; returns what differs, or nothing.

    Args:
        rate: load of each device, 0 to 1.
        waiting: windows in each queue.
    """
    series = []
    for pod in ("a", "b"):
        labels = f'{{namespace="default",service="unet-server",pod="{pod}"}}'
        device = labels.replace("}", ',device="cuda:0"}')
        series += [
            {"series": f"unet_batch_seconds_sum{device}", "values": f"0+{rate * 15}x20"},
            {"series": f"unet_windows_waiting{labels}", "values": f"{waiting}x20"},
            {"series": f"unet_engine_windows_per_second{labels}", "values": "10x20"},
            {"series": f"unet_ready{labels}", "values": "1x20"},
        ]
    test = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": series,
                "promql_expr_test": [
                    {
                        "expr": query,
                        "eval_time": "5m",
                        "exp_samples": [{"labels": "{}", "value": expected}],
                    }
                ],
            }
        ],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(test, file)
        file.flush()
        run = subprocess.run(
            ["promtool", "test", "rules", file.name], capture_output=True, text=True, timeout=60
        )
    return "" if run.returncode == 0 else (run.stdout + run.stderr).strip()


def check_object(
    results: Results, name: str, item: dict[str, Any], check: Check, kinds: set[str]
) -> None:
    """Check an object, and the first one of its kind also with a field that does not exist."""
    results.add(name, check(item))
    if item["kind"] not in kinds:
        kinds.add(item["kind"])
        broken = copy.deepcopy(item)
        broken["spec"][BROKEN_FIELD] = True
        accepted = BROKEN_FIELD not in check(broken)
        results.add(f"{name} with an unknown field", "accepted" if accepted else "")


def all_objects() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields a name for messages and the object, for each object of each values file and of Ray."""
    for name in values_files():
        for item in render_objects(name):
            yield f"{name}, {item['kind']}", item
    for item in ray_objects():
        yield f"{RAY_SERVICE.name}, {item['kind']}", item


def ray_objects() -> Iterator[dict[str, Any]]:
    """Yields the RayService, and the pods that KubeRay makes of its templates."""
    service = yaml.safe_load(RAY_SERVICE.read_text())
    yield service
    cluster = service["spec"]["rayClusterConfig"]
    for number, group in enumerate([cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]):
        metadata = {**group["template"].get("metadata", {}), "name": f"ray-{number}"}
        spec = group["template"]["spec"]
        yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _as_served(item: dict[str, Any], server: ApiServer) -> dict[str, Any]:
    """The object as this version of the API server knows it."""
    if _is_old(server):
        return {**item, "apiVersion": BETA.get(item["apiVersion"], item["apiVersion"])}
    return item


def _is_old(server: ApiServer) -> bool:
    return server.version.startswith("v1.20.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
