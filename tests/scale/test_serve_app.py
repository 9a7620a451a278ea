"""The settings of a replica follow what Ray assigned to it."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from app.settings import load_settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # those of Ray
    from deploy.ray.serve_app import fit_settings


@pytest.fixture(autouse=True)
def _weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_WEIGHTS_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("resources", "threads", "device"),
    [
        ({"CPU": 4.0}, 4, "cpu"),
        ({"CPU": 0.5}, 1, "cpu"),
        ({}, 1, "cpu"),
        ({"CPU": 2.0, "GPU": 0.5}, 2, "cuda:0"),
        ({"CPU": 2.0, "GPU": 2.0}, 2, "cuda:0,cuda:1"),
    ],
)
def test_threads_and_devices_are_those_that_ray_assigned(
    resources: dict[str, float], threads: int, device: str
) -> None:
    settings = fit_settings(load_settings(), resources)
    assert (settings.threads, settings.image_workers) == (threads, threads)
    assert settings.device == device


def test_variables_override_what_ray_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_THREADS", "3")
    monkeypatch.setenv("UNET_DEVICE", "cpu")
    settings = fit_settings(load_settings(), {"CPU": 8.0, "GPU": 1.0})
    assert (settings.threads, settings.image_workers, settings.device) == (3, 8, "cpu")
