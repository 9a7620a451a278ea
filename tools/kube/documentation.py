"""Tries what the documentation shows of Helm, kustomize and kubectl, without a cluster."""

from __future__ import annotations

import base64
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tools.kube.chart import CHART, RELEASE, ROOT, SNAPSHOTS, render_chart

PAGES = ("docs/deploy.md", "docs/kubernetes.md")

_HELM = re.compile(
    r"^ {4}helm (?:install|upgrade) \S+ deploy/helm/unet-server\b(.*)$", re.MULTILINE
)
_FLAGS = re.compile(r"`(--set [^`]+)`")
_SECRET = re.compile(r"^ {4}(kubectl create secret .*)$", re.MULTILINE)
_YAML = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NEEDS_A_RELEASE = "--reuse-values"


def find_flags(text: str) -> Iterator[list[str]]:
    """Yield the flags of each `helm install` and `helm upgrade`, and those in the text."""
    commands = _HELM.findall(text.replace("\\\n", " "))
    for command in [*commands, *_FLAGS.findall(text)]:
        flags = shlex.split(command, comments=True)
        yield [flag for flag in flags if flag != _NEEDS_A_RELEASE]


def find_yaml(text: str) -> Iterator[dict[str, Any]]:
    """Yield each block of YAML of a page."""
    for block in _YAML.findall(text):
        yield yaml.safe_load(block)


def find_adapter_query() -> str:
    """The query of the rule for prometheus-adapter, for the release in the namespace default."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    (rules,) = [block["rules"] for block in find_yaml(page) if "rules" in block]
    (rule,) = rules["external"]
    query: str = rule["metricsQuery"]
    return query.replace("<<.LabelMatchers>>", f'namespace="default",service="{RELEASE}"')


def try_documentation() -> Iterator[tuple[str, str]]:
    """Yield what was tried, and what is wrong with it or nothing."""
    keys = yaml.safe_load((CHART / "values.yaml").read_text()).keys()
    for page in PAGES:
        text = (ROOT / page).read_text()
        for flags in find_flags(text):
            yield f"{page}, helm {shlex.join(flags)}", _try_helm(flags)
        for block in find_yaml(text):
            if block.get("kind") == "Kustomization":
                yield f"{page}, overlay", _try_overlay(block)
            elif block.keys() <= keys:
                yield f"{page}, values {', '.join(block)}", _try_values(block)
        for command in _SECRET.findall(text):
            yield f"{page}, {command}", _try_secret(command)
    for snapshot in SNAPSHOTS:
        folder = (ROOT / snapshot).parent
        if (folder / "kustomization.yaml").exists():
            yield f"kubectl kustomize {folder.name}", _try_kustomization(folder)


def _try_helm(flags: list[str]) -> str:
    try:
        return "" if render_chart(flags) else "renders nothing"
    except RuntimeError as error:
        return str(error)


def _try_values(values: dict[str, Any]) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(values, file)
        file.flush()
        return _try_helm(["--values", file.name])


def _try_kustomization(folder: Path) -> str:
    """Compare the objects that kustomize makes with the manifests in the folder."""
    try:
        built = _kustomize(folder)
    except RuntimeError as error:
        return str(error)
    manifests = yaml.safe_load_all((folder / "unet-server.yaml").read_text())
    expected = {each["kind"]: each for each in manifests}
    return "" if built == expected else "the objects are not those of unet-server.yaml"


def _try_overlay(overlay: dict[str, Any]) -> str:
    """Build an overlay with the folder of this repository in place of its address."""
    (address,) = overlay["resources"]
    path = ROOT / re.sub(r"^.*//(deploy/[^?]+).*$", r"\1", address)
    with tempfile.TemporaryDirectory() as name:
        resources = [os.path.relpath(path, Path(name).resolve())]
        (Path(name) / "kustomization.yaml").write_text(
            yaml.safe_dump({**overlay, "resources": resources})
        )
        try:
            objects = _kustomize(Path(name))
        except RuntimeError as error:
            return str(error)
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    wanted = overlay["images"][0]["newName"]
    found = container["image"].partition(":")[0]
    return "" if found == wanted else f"the image is {container['image']}"


def _kustomize(folder: Path) -> dict[str, Any]:
    """Kind -> object of a kustomization.

    Raises:
        RuntimeError: kubectl rejects it.
    """
    command = ["kubectl", "kustomize", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if run.returncode:
        raise RuntimeError(run.stderr.strip())
    return {each["kind"]: each for each in yaml.safe_load_all(run.stdout)}


def _try_secret(command: str) -> str:
    """Make the Secret as a dry run, and look for the key that the chart mounts."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    words = [*shlex.split(command, comments=True), "--dry-run=client", "--output=yaml"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "keys.txt").write_text("one\n")
        run = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60)
    if run.returncode:
        return run.stderr.strip()
    data = yaml.safe_load(run.stdout)["data"]
    expected = {values["apiKeys"]["secretKey"]: base64.b64encode(b"one\n").decode()}
    return "" if data == expected else f"the keys of the Secret are {', '.join(data)}"
