"""Models that are added, changed, damaged and deleted, and what is served meanwhile."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from app.batching.deadline import Deadline
from app.errors import ImageTooLarge, Unavailable, UnknownModel
from app.inference.outputs import Options, Output
from app.inference.registry import MAX_WINDOWS, ServedModel
from app.inference.service import Service
from model.checkpoint import Golden, load_checkpoint, save_checkpoint
from model.errors import CheckpointError
from tests.conftest import encode, nuclei, write_tiny
from tests.in_process import read_metric, with_service

IMAGE = encode(nuclei(60, 60)[0])


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three folders, each with another checkpoint of the same name and its manifest."""
    folders = [tmp_path_factory.mktemp(f"v{n}") for n in range(3)]
    for seed, folder in enumerate(folders):
        write_tiny(folder / "nuclei.safetensors", seed=seed)
    return folders


def put(version: Path, folder: Path) -> None:
    """Copy a checkpoint and its manifest."""
    for file in version.iterdir():
        shutil.copy(file, folder)


async def scan_twice(service: Service) -> None:
    """A changed file is loaded at the second scan that sees it."""
    await service.registry.scan()
    await service.registry.scan()


async def segment_with(service: Service, model: ServedModel) -> bytes:
    result = await service.segmenter.segment(model, IMAGE, Options(), Deadline.after(30))
    return result.rendered[Output.MASK].content


async def segment(service: Service) -> bytes:
    """The mask by the default model."""
    with service.registry.lease(None) as model:
        return await segment_with(service, model)


def reloads(service: Service, result: str) -> float:
    return read_metric(service, "unet_reloads_total", result=result)


def test_file_that_is_put_back_gets_engines_of_its_own(
    versions: list[Path], tmp_path: Path
) -> None:
    """A, then B, then A again: freeing the first A must not free the engines of the second."""
    put(versions[0], tmp_path)

    async def body(service: Service) -> None:
        await service.registry.load_default()
        first = await segment(service)
        with service.registry.lease(None) as leased:
            for version in (versions[1], versions[0]):
                put(version, tmp_path)
                await scan_twice(service)
            assert await segment_with(service, leased) == first
        async with asyncio.timeout(30):
            assert await segment(service) == first
        assert len(service.devices[0].engines) == 1
        assert service.readiness_error() is None

    with_service(tmp_path, body, load=False)


def test_bad_file_is_reported_until_a_good_one_replaces_it(
    versions: list[Path], tmp_path: Path
) -> None:
    put(versions[0], tmp_path)
    path = tmp_path / "nuclei.safetensors"

    async def body(service: Service) -> None:
        await service.registry.load_default()
        entry = service.registry.entries["nuclei"]
        first = await segment(service)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        await scan_twice(service)
        assert "nuclei.safetensors" in str(entry.error)
        assert await segment(service) == first
        await scan_twice(service)
        assert reloads(service, "rejected") == 1  # not at every scan
        path.write_bytes(whole)
        await scan_twice(service)
        assert entry.error is None
        assert reloads(service, "accepted") == 0  # the model was in service all the time

    with_service(tmp_path, body, load=False)


def test_file_that_is_being_copied_is_not_loaded(versions: list[Path], tmp_path: Path) -> None:
    put(versions[0], tmp_path)
    path = tmp_path / "nuclei.safetensors"

    async def body(service: Service) -> None:
        await service.registry.load_default()
        whole = (versions[1] / path.name).read_bytes()
        shutil.copy(versions[1] / "manifest.json", tmp_path)
        for part in range(1, 5):
            path.write_bytes(whole[: len(whole) * part // 4])
            await service.registry.scan()
        await service.registry.scan()
        assert service.registry.entries["nuclei"].served.checkpoint.sha256  # type: ignore[union-attr]
        assert (reloads(service, "accepted"), reloads(service, "rejected")) == (1, 0)

    with_service(tmp_path, body, load=False)


def test_checkpoint_is_loaded_again_when_its_manifest_changes(
    versions: list[Path], tmp_path: Path
) -> None:
    put(versions[0], tmp_path)

    async def body(service: Service) -> None:
        await service.registry.load_default()
        entry = service.registry.entries["nuclei"]
        before = entry.served
        shutil.copy(versions[1] / "nuclei.safetensors", tmp_path)
        await scan_twice(service)
        assert entry.served is before
        assert "manifest" in str(entry.error)
        shutil.copy(versions[1] / "manifest.json", tmp_path)
        await scan_twice(service)
        assert entry.served is not before
        assert entry.error is None

    with_service(tmp_path, body, load=False)


def test_link_to_another_folder_is_seen_as_a_change(versions: list[Path], tmp_path: Path) -> None:
    """Kubernetes updates a volume by replacing a link to a folder. Sizes and times may be equal."""
    for folder in versions[:2]:
        for file in folder.iterdir():
            os.utime(file, (1, 1))
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to(versions[0])
    for file in versions[0].iterdir():
        (mount / file.name).symlink_to(Path("..data") / file.name)

    async def body(service: Service) -> None:
        await service.registry.load_default()
        before = await segment(service)
        (mount / "..new").symlink_to(versions[1])
        (mount / "..new").replace(mount / "..data")
        await scan_twice(service)
        assert service.registry.entries["nuclei"].error is None
        assert await segment(service) != before

    with_service(mount, body, load=False)


def test_model_whose_file_is_deleted_stays_in_service(versions: list[Path], tmp_path: Path) -> None:
    put(versions[0], tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"not a checkpoint")

    async def body(service: Service) -> None:
        await service.registry.load_default()
        await service.registry.load_others()
        assert service.registry.entries["other"].error
        before = await segment(service)
        await asyncio.to_thread(shutil.rmtree, tmp_path)
        tmp_path.mkdir()  # noqa: ASYNC240
        await scan_twice(service)
        assert await segment(service) == before
        assert list(service.registry.entries) == ["nuclei"]
        put(versions[2], tmp_path)
        await scan_twice(service)
        assert await segment(service) != before

    with_service(tmp_path, body, load=False)


def test_deleted_file_is_reported_once_and_when_it_is_back(
    versions: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(versions[0], tmp_path)
    path = tmp_path / "nuclei.safetensors"
    caplog.set_level("INFO", "app.inference.registry")

    def messages() -> list[str]:
        return [
            record.getMessage() for record in caplog.records if record.name.endswith("registry")
        ]

    async def body(service: Service) -> None:
        await service.registry.load_default()
        entry = service.registry.entries["nuclei"]
        served = entry.served
        await scan_twice(service)
        caplog.clear()
        path.rename(tmp_path / "aside")
        await service.registry.scan()
        assert messages() == []  # it may be replaced at this moment
        await scan_twice(service)
        await scan_twice(service)
        says = f"{path} was deleted; the model is served until the service stops"
        assert messages() == [f"model nuclei: {says}"]
        assert caplog.records[0].levelname == "WARNING"
        assert (entry.served, entry.error) == (served, says)
        (tmp_path / "aside").rename(path)
        await scan_twice(service)
        assert messages()[1:] == ["model nuclei: its file is back, and is loaded again"]
        assert (entry.served, entry.error) == (served, None)

    with_service(tmp_path, body, load=False)


def test_bad_default_model_can_be_replaced(versions: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "nuclei.safetensors"
    path.write_bytes(b"not a checkpoint")

    async def body(service: Service) -> None:
        with pytest.raises(CheckpointError, match="nuclei"):
            await service.registry.load_default()
        assert "cannot be served" in str(service.readiness_error())
        assert not service.started
        put(versions[0], tmp_path)
        await scan_twice(service)
        assert service.readiness_error() is None
        assert service.started

    with_service(tmp_path, body, load=False)


def test_golden_mask_is_checked_while_the_queue_is_full(
    versions: list[Path], tmp_path: Path
) -> None:
    put(versions[0], tmp_path)

    async def body(service: Service) -> None:
        await service.registry.load_default()
        before = service.registry.entries["nuclei"].served
        reservations = [service.batcher.admit(["other"]) for _ in range(4)]
        put(versions[1], tmp_path)
        await scan_twice(service)
        assert service.registry.entries["nuclei"].error is None
        assert service.registry.entries["nuclei"].served is not before
        for reservation in reservations:
            reservation.__exit__()

    with_service(tmp_path, body, load=False, queue_windows=4)


def test_model_that_confuses_its_classes_is_not_served(tmp_path: Path) -> None:
    """It finds everything that is not background, but as another class."""
    path = tmp_path / "nuclei.safetensors"
    write_tiny(path, classes=3)
    good = load_checkpoint(path)
    image, mask = good.golden.image, good.golden.mask
    assert mask.any()
    swapped = np.array([0, 2, 1], np.uint8)[mask]

    async def body(service: Service) -> None:
        await service.registry.load_others()
        entries = service.registry.entries
        assert entries["good"].error is None
        assert "does not reproduce its golden mask" in str(entries["bad"].error)

    save_checkpoint(tmp_path / "good.safetensors", good)
    wrong = dataclasses.replace(good, golden=Golden(image, swapped))
    save_checkpoint(tmp_path / "bad.safetensors", wrong)
    with_service(tmp_path, body, load=False)


def test_model_whose_name_fits_no_header_is_rejected(versions: list[Path], tmp_path: Path) -> None:
    put(versions[0], tmp_path)
    shutil.copy(tmp_path / "nuclei.safetensors", tmp_path / "клетка.safetensors")

    async def body(service: Service) -> None:
        await service.registry.load_others()
        assert "клетка" in str(service.registry.entries["клетка"].error)
        assert service.registry.entries["клетка"].served is None

    with_service(tmp_path, body, load=False)


def test_unknown_model_names_those_that_are_available(versions: list[Path], tmp_path: Path) -> None:
    put(versions[0], tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"not a checkpoint")

    async def body(service: Service) -> None:
        with pytest.raises(UnknownModel) as unknown, service.registry.lease("nothing"):
            pass
        assert str(unknown.value) == "unknown model 'nothing'; available: nuclei, other"
        with pytest.raises(Unavailable, match="other is still loading"):
            service.registry.lease("other").__enter__()

    with_service(tmp_path, body, load=False)


def test_freed_models_do_not_count_in_estimates_and_metrics(
    versions: list[Path], tmp_path: Path
) -> None:
    put(versions[0], tmp_path)

    async def body(service: Service) -> None:
        estimates = service.batcher.estimates
        with service.registry.lease(None) as old:
            await segment(service)
            keys = set(old.keys(old.plan(60, 60)))
            put(versions[1], tmp_path)
            await scan_twice(service)
            # The old model is still leased, so its own measurements are used.
            assert all(estimates.seconds(key) != estimates.seconds() for key in keys)
        # They are gone with the model: an unknown key counts as the mean of all known ones.
        assert all(estimates.seconds(key) == estimates.seconds() for key in keys)
        with service.registry.lease(None) as new:
            (key,) = set(new.keys(new.plan(*new.checkpoint.golden.image.shape[:2])))
        assert estimates.seconds() == estimates.seconds(key) > 0
        rate = read_metric(service, "unet_engine_windows_per_second")
        assert rate == 1 / estimates.seconds(key)

    with_service(tmp_path, body)


def test_plan_of_too_many_windows_is_rejected(versions: list[Path], tmp_path: Path) -> None:
    """They are counted, and not listed."""

    async def body(service: Service) -> None:
        with service.registry.lease(None) as model:
            assert model.plan(3000, 3000).count < MAX_WINDOWS
            with pytest.raises(ImageTooLarge, match=f"{MAX_WINDOWS} are allowed"):
                model.plan(1, 100_000_000)

    put(versions[0], tmp_path)
    with_service(tmp_path, body)
