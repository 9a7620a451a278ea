"""Renders the Helm chart with each of its values files. Knows no API server.

Runs Helm as a library (helm-python-sdk, which contains Helm 4), so that no helm command is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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

_ONLY_HELM = ("app.kubernetes.io/managed-by:", "helm.sh/chart:")
"""Labels that would be wrong on objects which kubectl applies."""


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


def lint_chart(name: str) -> list[str]:
    """Findings of `helm lint --strict` with a values file, except that the chart has no icon."""
    import helm_python

    report = helm_python.lint(CHART, read_values(name), strict=True)
    messages = [f"{each['path']}: {each['error']}" for each in report["messages"]]
    return [each for each in messages + report["errors"] if "icon is recommended" not in each]


def render_chart(name: str) -> dict[str, str]:
    """Template -> what it renders with a values file, without those that render nothing."""
    import helm_python

    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(read_values(name), name=RELEASE, namespace="default")
    return {Path(path).name: text for path, text in sorted(rendered.items()) if text.strip()}


def render_objects(name: str) -> list[dict[str, Any]]:
    """The Kubernetes objects of a values file."""
    texts = render_chart(name).values()
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


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
        parts = [_without_helm_labels(text) for text in render_chart(name).values()]
        yield ROOT / path, header + "".join(f"---\n{part}\n" for part in parts)


def _without_helm_labels(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return "\n".join(line for line in lines if not line.strip().startswith(_ONLY_HELM))
