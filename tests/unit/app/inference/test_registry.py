"""Models that come, change, go bad and go: what is served meanwhile. Without HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest

from app.batching.deadline import Deadline
from app.errors import InvalidRequest
from app.inference.outputs import Options, Output
from app.inference.service import Service
from app.settings import Settings
from model.checkpoint import Golden, load_checkpoint, save_checkpoint
from model.errors import CheckpointError
from tests.conftest import encode, nuclei, write_tiny

IMAGE = encode(nuclei(60, 60)[0])


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three folders, each with another checkpoint of the same name and its manifest."""
    folders = [tmp_path_factory.mktemp(f"v{n}") for n in range(3)]
    for seed, folder in enumerate(folders):
        write_tiny(folder / "nuclei.safetensors", seed=seed)
    return folders


def put(version: Path, folder: Path) -> None:
    for file in version.iterdir():
        shutil.copy(file, folder)


async def look(service: Service) -> None:
    """Twice: a file is taken in once it has stayed the same."""
    await service.registry.scan()
    await service.registry.scan()


async def mask(service: Service) -> bytes:
    with service.registry.lease(None) as model:
        result = await service.segmenter.segment(model, IMAGE, Options(), Deadline.after(30))
        return result.rendered[Output.MASK].content


def with_service(folder: Path, scene: Callable[[Service], Awaitable[None]]) -> None:
    async def run() -> None:
        service = Service(Settings(weights_dir=folder, queue_windows=4))
        await service.batcher.start()
        try:
            await scene(service)
        finally:
            await service.stop()

    asyncio.run(run())


def reloads(service: Service, result: str) -> float:
    labels = {"result": result}
    return service.metrics.registry.get_sample_value("unet_reloads_total", labels) or 0.0


def test_back_to_an_old_file_while_somebody_still_holds_it(
    versions: list[Path], tmp_path: Path
) -> None:
    """A, then B, then A again: who leaves the first A must not take the second one's engines."""
    put(versions[0], tmp_path)

    async def scene(service: Service) -> None:
        await service.registry.load_default()
        first = await mask(service)
        with service.registry.lease(None) as held:
            for version in (versions[1], versions[0]):
                put(version, tmp_path)
                await look(service)
            deadline = Deadline.after(30)
            old = await service.segmenter.segment(held, IMAGE, Options(), deadline)
            assert old.rendered[Output.MASK].content == first
        async with asyncio.timeout(30):
            assert await mask(service) == first
        assert len(service.workers[0].engines) == 1
        assert service.readiness_error() is None

    with_service(tmp_path, scene)


def test_a_bad_file_is_told_until_a_good_one_is_there_again(
    versions: list[Path], tmp_path: Path
) -> None:
    put(versions[0], tmp_path)
    path = tmp_path / "nuclei.safetensors"

    async def scene(service: Service) -> None:
        await service.registry.load_default()
        entry = service.registry.entries["nuclei"]
        first = await mask(service)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        await look(service)
        assert "nuclei.safetensors" in str(entry.error)
        assert await mask(service) == first
        await look(service)
        assert reloads(service, "rejected") == 1  # once, not at every look
        path.write_bytes(whole)
        await look(service)
        assert entry.error is None
        assert reloads(service, "accepted") == 0  # it was served all the time

    with_service(tmp_path, scene)


def test_a_file_that_is_being_copied_is_left_alone(versions: list[Path], tmp_path: Path) -> None:
    put(versions[0], tmp_path)
    path = tmp_path / "nuclei.safetensors"

    async def scene(service: Service) -> None:
        await service.registry.load_default()
        whole = (versions[1] / path.name).read_bytes()
        shutil.copy(versions[1] / "manifest.json", tmp_path)
        for part in range(1, 5):
            path.write_bytes(whole[: len(whole) * part // 4])
            await service.registry.scan()
        await service.registry.scan()
        assert service.registry.entries["nuclei"].served.checkpoint.sha256  # type: ignore[union-attr]
        assert (reloads(service, "accepted"), reloads(service, "rejected")) == (1, 0)

    with_service(tmp_path, scene)


def test_a_manifest_that_comes_later(versions: list[Path], tmp_path: Path) -> None:
    put(versions[0], tmp_path)

    async def scene(service: Service) -> None:
        await service.registry.load_default()
        entry = service.registry.entries["nuclei"]
        before = entry.served
        shutil.copy(versions[1] / "nuclei.safetensors", tmp_path)
        await look(service)
        assert entry.served is before
        assert "manifest" in str(entry.error)
        shutil.copy(versions[1] / "manifest.json", tmp_path)
        await look(service)
        assert entry.served is not before
        assert entry.error is None

    with_service(tmp_path, scene)


def test_links_that_are_turned_to_another_folder(versions: list[Path], tmp_path: Path) -> None:
    """As volumes of Kubernetes change: a link to a folder is replaced, sizes and times alike."""
    for folder in versions[:2]:
        for file in folder.iterdir():
            os.utime(file, (1, 1))
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to(versions[0])
    for file in versions[0].iterdir():
        (mount / file.name).symlink_to(Path("..data") / file.name)

    async def scene(service: Service) -> None:
        await service.registry.load_default()
        before = await mask(service)
        (mount / "..new").symlink_to(versions[1])
        (mount / "..new").replace(mount / "..data")
        await look(service)
        assert service.registry.entries["nuclei"].error is None
        assert await mask(service) != before

    with_service(mount, scene)


def test_a_model_whose_file_is_gone_goes_on_serving(versions: list[Path], tmp_path: Path) -> None:
    put(versions[0], tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"no good")

    async def scene(service: Service) -> None:
        await service.registry.load_default()
        await service.registry.load_others()
        assert service.registry.entries["other"].error
        before = await mask(service)
        await asyncio.to_thread(shutil.rmtree, tmp_path)
        tmp_path.mkdir()  # noqa: ASYNC240
        await look(service)
        assert await mask(service) == before
        assert list(service.registry.entries) == ["nuclei"]
        put(versions[2], tmp_path)
        await look(service)
        assert await mask(service) != before

    with_service(tmp_path, scene)


def test_a_default_that_was_no_good_at_the_start_can_be_mended(
    versions: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "nuclei.safetensors"
    path.write_bytes(b"no good")

    async def scene(service: Service) -> None:
        with pytest.raises(CheckpointError, match="nuclei"):
            await service.registry.load_default()
        assert "cannot be served" in str(service.readiness_error())
        assert not service.started
        put(versions[0], tmp_path)
        await look(service)
        assert service.readiness_error() is None
        assert service.started

    with_service(tmp_path, scene)


def test_a_new_model_is_proven_while_the_queue_is_full(
    versions: list[Path], tmp_path: Path
) -> None:
    put(versions[0], tmp_path)

    async def scene(service: Service) -> None:
        await service.registry.load_default()
        held = service.registry.entries["nuclei"].served
        assert held is not None
        (key,) = held.keys(held.plan(60, 60))
        tickets = [service.batcher.admit([key] * 1) for _ in range(4)]
        put(versions[1], tmp_path)
        await look(service)
        assert service.registry.entries["nuclei"].error is None
        assert service.registry.entries["nuclei"].served is not held
        for ticket in tickets:
            ticket.__exit__()

    with_service(tmp_path, scene)


def test_a_model_that_mistakes_its_classes_is_never_served(tmp_path: Path) -> None:
    """All that is not background is found, as something else."""
    path = tmp_path / "nuclei.safetensors"
    write_tiny(path, classes=3)
    good = load_checkpoint(path)
    image, mask = good.golden.image, good.golden.mask
    assert mask.any()
    swapped = np.array([0, 2, 1], np.uint8)[mask]

    async def scene(service: Service) -> None:
        await service.registry.load_others()
        entries = service.registry.entries
        assert entries["good"].error is None
        assert "does not reproduce its golden mask" in str(entries["bad"].error)

    save_checkpoint(tmp_path / "good.safetensors", good)
    wrong = dataclasses.replace(good, golden=Golden(image, swapped))
    save_checkpoint(tmp_path / "bad.safetensors", wrong)
    with_service(tmp_path, scene)


def test_a_name_that_no_header_can_carry_is_not_taken_in(
    versions: list[Path], tmp_path: Path
) -> None:
    put(versions[0], tmp_path)
    shutil.copy(tmp_path / "nuclei.safetensors", tmp_path / "клетка.safetensors")

    async def scene(service: Service) -> None:
        await service.registry.load_others()
        assert "is no name for a model" in str(service.registry.entries["клетка"].error)

    with_service(tmp_path, scene)


def test_several_classes_have_no_threshold(tmp_path: Path) -> None:
    write_tiny(tmp_path / "nuclei.safetensors", classes=3)

    async def scene(service: Service) -> None:
        await service.registry.load_default()
        with (
            service.registry.lease(None) as model,
            pytest.raises(InvalidRequest, match="only available for binary"),
        ):
            await service.segmenter.segment(model, IMAGE, Options(threshold=0.9), Deadline.after(0))

    with_service(tmp_path, scene)
