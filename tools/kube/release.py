"""Installs, upgrades and rolls back a release with helm on a real API server. No pod starts."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from tools.kube.api_server import ApiServer
from tools.kube.chart import CHART, RELEASE

_IMAGE = "registry.example/unet-server"
_STATE = (
    "jsonpath={.spec.template.spec.containers[0].image} {.spec.template.spec.volumes[*].name} "
    "{.spec.replicas}"
)


def try_release(server: ApiServer, chart: Path) -> str:
    """Install a release, upgrade it, roll it back and remove it; returns the problem, or nothing.

    The upgrade keeps the values of the installation, and the rollback takes back the upgrade's.
    """
    upgrade = ("--reuse-values", "--set", "apiKeys.secretName=unet-keys,replicas=3")
    steps = (
        (("install", RELEASE, str(chart), "--set", f"image.repository={_IMAGE}"), "tmp 2"),
        (("upgrade", RELEASE, str(chart), *upgrade), "tmp keys 3"),
        (("rollback", RELEASE, "1"), "tmp 2"),
    )
    for arguments, expected in steps:
        if problem := server.run_helm(*arguments):
            return problem
        image, _, state = server.read("deployment", RELEASE, _STATE).partition(" ")
        if not image.startswith(f"{_IMAGE}:") or state != expected:
            return f"after helm {arguments[0]}: {image} {state}"
    if problem := server.run_helm("uninstall", RELEASE, "--wait"):
        return problem
    left = server.read("deployment,service,networkpolicy,poddisruptionbudget", "", "name")
    return "" if RELEASE not in left else f"after helm uninstall: {left}"


def copy_chart(folder: Path, versions: Mapping[str, str]) -> Path:
    """Copy the chart for an API server that is older than the chart supports.

    Args:
        versions: API version of the chart -> the one that the server knows, with the same fields.
    """
    chart = folder / "chart"
    shutil.copytree(CHART, chart)
    description = chart / "Chart.yaml"
    description.write_text(re.sub(r"(?m)^kubeVersion:.*$", "", description.read_text()))
    for template in (chart / "templates").iterdir():
        text = template.read_text()
        for newer, older in versions.items():
            text = text.replace(f"apiVersion: {newer}\n", f"apiVersion: {older}\n")
        template.write_text(text)
    return chart
