"""Lints and renders the Helm chart with each of its values files, by the program helm. Knows no API
server."""

from __future__ import annotations

import functools
import hashlib
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm/unet-server"
RELEASE = "unet-server"

SNAPSHOTS = {
    "deploy/kubernetes/cpu/unet-server.yaml": "values.yaml",
    "deploy/kubernetes/cuda/unet-server.yaml": "values-gpu.yaml",
    "deploy/kserve/inference-service.yaml": "ci/kserve-values.yaml",
}
"""Manifests that are kept in the repository -> the values file that they are rendered from."""

_ONLY_HELM = ("app.kubernetes.io/managed-by:", "helm.sh/chart:", "# Source:")
"""Labels that would be wrong on objects which kubectl applies, and the names of the templates."""


def values_files() -> list[str]:
    """The names of all values files, relative to the chart."""
    files = [*CHART.glob("values*.yaml"), *CHART.glob("ci/*.yaml")]
    return sorted(str(path.relative_to(CHART)) for path in files)


def read_values(name: str) -> dict[str, Any]:
    """The values of a file. Those for GPUs in `ci/` are merged into values-gpu.yaml."""
    values: dict[str, Any] = yaml.safe_load((CHART / name).read_text())
    if name.startswith("ci/gpu-"):
        return merge_values(read_values("values-gpu.yaml"), values)
    return values


def merge_values(base: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Merge values as Helm does: maps key by key, anything else as a whole."""
    merged = dict(base)
    for key, value in other.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = merge_values(old, value)
        else:
            merged[key] = value
    return merged


def values_flags(name: str) -> list[str]:
    """The flags that name a values file to helm; one for GPUs in `ci/` follows values-gpu.yaml."""
    names = ["values-gpu.yaml", name] if name.startswith("ci/gpu-") else [name]
    return [flag for each in names for flag in ("--values", str(CHART / each))]


def lint_chart(flags: Sequence[str], version: str) -> str:
    """The findings of `helm lint --strict` with these flags; empty if there are none.

    Args:
        version: of Kubernetes, whose deprecations are warnings.
    """
    command = ["helm", "lint", str(CHART), "--strict", "--quiet", "--kube-version", version, *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return "" if run.returncode == 0 else (run.stdout + run.stderr).strip()


def render_chart(flags: Sequence[str]) -> str:
    """The manifests that `helm template` renders with these flags.

    Raises:
        RuntimeError: helm rejects the values or a template.
    """
    command = ["helm", "template", RELEASE, str(CHART), "--namespace", "default", *flags]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if run.returncode:
        raise RuntimeError(run.stderr.strip())
    return run.stdout


@functools.cache
def _render(name: str) -> str:
    return render_chart(values_flags(name))


def render_objects(name: str) -> list[dict[str, Any]]:
    """The Kubernetes objects of a values file."""
    return [each for each in yaml.safe_load_all(_render(name)) if each]


def hash_chart() -> str:
    """SHA-256 of everything that the snapshots are rendered from."""
    digest = hashlib.sha256()
    sources = [CHART / "Chart.yaml", CHART / "values.schema.json", *CHART.glob("templates/*")]
    for path in sorted({*sources, *(CHART / values for values in SNAPSHOTS.values())}):
        digest.update(f"{path.relative_to(CHART)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def render_snapshots() -> Iterator[tuple[Path, str]]:
    """Yields the path and the content of each manifest that is kept in the repository."""
    for path, name in SNAPSHOTS.items():
        header = (
            f"# Rendered by `make kube-render` from deploy/helm/unet-server and its {name};\n"
            f"# do not edit. Chart: {hash_chart()}\n"
        )
        lines = _render(name).splitlines()
        kept = [line for line in lines if line.strip() and not line.strip().startswith(_ONLY_HELM)]
        yield ROOT / path, header + "".join(f"{line}\n" for line in kept)
