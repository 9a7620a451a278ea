"""`unet models`: list checkpoints with what their headers say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from app.cli.errors import CommandError, reading
from app.cli.flags import add_flags, explicit_flags
from app.settings import Settings, load_settings
from model.checkpoint import SUFFIX, load_checkpoint
from model.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", type=Path, help="a folder or a checkpoint (default: the weights folder)"
    )
    parser.add_argument("--json", action="store_true", help="full metadata as JSON")
    add_flags(parser, Settings, ["weights_dir"])


def main(args: argparse.Namespace) -> int:
    """List the checkpoints. Returns 1 if one is damaged."""
    folder = args.path or load_settings(**explicit_flags(args, Settings)).weights_dir
    models = [_read_metadata(path) for path in _find_checkpoints(folder)]
    if args.json:
        print(json.dumps(models, indent=2))
    else:
        for metadata in models:
            print(_format_line(metadata))
    return 1 if any("error" in metadata for metadata in models) else 0


def _find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a folder, or the file itself.

    Raises:
        CommandError: the path does not exist, or the folder has no checkpoint.
    """
    with reading(path):
        if not path.exists():
            raise CommandError(f"{path} does not exist")
        if not path.is_dir():
            return [path]
    paths = sorted(path.glob(f"*{SUFFIX}"))
    if not paths:
        raise CommandError(f"{path} holds no {SUFFIX} files")
    return paths


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        return {"name": path.stem, "error": str(error)}
    return {
        "name": path.stem,
        "sha256": checkpoint.sha256,
        "bytes": path.stat().st_size,
        "architecture": checkpoint.architecture.to_json(),
        "preprocessing": checkpoint.preprocess.to_json(),
        **checkpoint.card,
    }


def _format_line(metadata: dict[str, Any]) -> str:
    if "error" in metadata:
        return f"{metadata['name']:12} damaged: {metadata['error']}"
    metrics = metadata.get("metrics", {})
    scores = [f"{name} {value:.3f}" for name, value in metrics.items() if isinstance(value, float)]
    return (
        f"{metadata['name']:12} {metadata['sha256'][:12]}  {metadata['bytes'] / 1e6:5.1f} MB  "
        f"{_describe_network(metadata['architecture'])}  "
        f"{', '.join(metadata['preprocessing']['classes'][1:])}  {'  '.join(scores)}"
    )


def _describe_network(architecture: dict[str, Any]) -> str:
    """The width of a U-Net, or the kind of another network; 7 characters."""
    if "base_features" in architecture:
        return f"base {architecture['base_features']:2}"
    return f"{architecture['kind']:7}"
