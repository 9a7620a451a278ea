"""`unet models`: what the checkpoints of a folder say about themselves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from app.settings import load_settings
from model.checkpoint import SUFFIX, load_checkpoint
from model.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", type=Path, help="a folder, or one file (UNET_WEIGHTS_DIR, or weights)"
    )
    parser.add_argument("--json", action="store_true", help="everything, for programs")


def main(args: argparse.Namespace) -> int:
    """1 when a checkpoint is damaged."""
    described = [_describe(path) for path in _paths(args.path or load_settings().weights_dir)]
    if args.json:
        print(json.dumps(described, indent=2))
    else:
        for each in described:
            print(_line(each))
    return 1 if any("error" in each for each in described) else 0


def _paths(path: Path) -> list[Path]:
    """
    Raises:
        ValueError: there is no checkpoint.
    """
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    if not path.is_dir():
        return [path]
    if paths := sorted(path.glob(f"*{SUFFIX}")):
        return paths
    raise ValueError(f"{path} holds no {SUFFIX} files")


def _describe(path: Path) -> dict[str, Any]:
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


def _line(each: dict[str, Any]) -> str:
    if "error" in each:
        return f"{each['name']:12} damaged: {each['error']}"
    metrics = each.get("metrics", {})
    scores = "  ".join(f"{k} {v:.3f}" for k, v in metrics.items() if isinstance(v, float))
    return (
        f"{each['name']:12} {each['sha256'][:12]}  {each['bytes'] / 1e6:5.1f} MB  "
        f"base {each['architecture']['base_features']:2}  "
        f"{', '.join(each['preprocessing']['classes'][1:])}  {scores}"
    )
