"""Processes for hostile bytes: their limits, their errors, their end and their replacement."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import CorruptImage, Unavailable, UnprocessableImage
from app.imaging.workers import child, shared, worker
from app.imaging.workers.pool import WorkerPool
from app.imaging.workers.shared import BlockCache
from app.imaging.workers.worker import CallLimit, KillReason
from tests.conftest import ROOT
from tests.devices import until
from tests.unit.app.imaging import worker_calls as calls

LIMIT = CallLimit("decoding", 20, 100_000_000)
QUICK = CallLimit("decoding", 0.3, 100_000_000)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and its limits of memory")


class Workers(WorkerPool):
    """A pool that counts what it reports."""

    def __init__(self, size: int = 1) -> None:
        self.kills: Counter[str] = Counter()
        self.restarts = 0
        super().__init__(
            size,
            (calls.__name__,),
            on_kill=lambda reason: self.kills.update([str(reason)]),
            on_restart=self._count_restart,
        )

    def _count_restart(self) -> None:
        self.restarts += 1

    async def pid(self) -> int:
        return int(await self.call(LIMIT, os.getpid))


def with_workers(body: Callable[[Workers], Awaitable[None]], size: int = 1) -> None:
    async def scene() -> None:
        workers = Workers(size)
        workers.start()
        try:
            await asyncio.wait_for(body(workers), 60)
        finally:
            await workers.stop()

    asyncio.run(scene())


def is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except FileNotFoundError:
        return False


def kill_and_wait(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # asyncio has reaped it
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_call_runs_in_another_process_and_returns_json() -> None:
    async def body(workers: Workers) -> None:
        assert await workers.pid() != os.getpid()
        assert await workers.call(LIMIT, calls.echo, {"a": [1, 2.5, None]}) == {"a": [1, 2.5, None]}

    with_workers(body)


def test_limit_of_a_call_does_not_apply_to_the_next() -> None:
    async def body(workers: Workers) -> None:
        pid = await workers.call(QUICK, os.getpid)
        await workers.call(LIMIT, time.sleep, 2 * QUICK.seconds)
        assert await workers.pid() == pid

    with_workers(body)


@pytest.mark.parametrize("mapped", [False, True])
def test_arrays_are_passed_in_shared_memory(mapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_MAP_FROM", 1 if mapped else 10**9)

    async def body(workers: Workers) -> None:
        pixels = np.arange(600, dtype=np.uint16).reshape(20, 30)
        cache = BlockCache()
        with cache.borrow() as source, cache.borrow() as target:
            stored = source.store(pixels[:, ::-1])
            size = await workers.call(LIMIT, calls.double, stored, target)
            loaded = stored.load()
            written = target.read(size)
            assert target.read(4, 2) == written[2:6]
        np.testing.assert_array_equal(loaded, 2 * pixels[:, ::-1])  # the block is closed
        assert written == pixels[:, ::-1].tobytes()
        cache.close()

    with_workers(body)


def test_block_without_memfd_is_an_unnamed_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    for mapped in (False, True):
        test_arrays_are_passed_in_shared_memory(mapped, monkeypatch)


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOMEM])
def test_block_without_files_or_memory_is_unavailable_for_now(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    cache = BlockCache()
    with monkeypatch.context() as exhausted:
        exhausted.setattr(os, "memfd_create", fail, raising=False)
        exhausted.setattr(tempfile, "TemporaryFile", fail)
        with pytest.raises(Unavailable) as raised, cache.borrow():
            pass
    assert raised.value.retry_after == 1
    with cache.borrow() as block, pytest.raises(TimeoutError), cache.borrow():
        raise TimeoutError
    assert block.fd != -1
    cache.close()


@linux
def test_large_blocks_are_freed_on_a_thread_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes 70 ms for 300 MB, in which the event loop would answer nothing."""
    freed: list[tuple[str, str]] = []

    def record(kind: str, free: Callable[[Any], None]) -> Callable[[Any], None]:
        def recorded(what: Any) -> None:
            freed.append((kind, threading.current_thread().name))
            free(what)

        return recorded

    monkeypatch.setattr(shared, "_MAP_FROM", 1000)
    monkeypatch.setattr(os, "close", record("file", os.close))
    monkeypatch.setattr(shared._Mapping, "close", record("mapping", mmap.mmap.close))
    before = len(list(Path("/proc/self/fd").iterdir()))
    cache = BlockCache()
    with cache.borrow() as block:
        array = block.store(np.arange(1000, dtype=np.uint16)).map()
    with cache.borrow() as written:
        written.write(bytes(5000))
    assert array[999] == 999  # the block is closed, and the mapping is not
    del array
    cache.close()

    async def body() -> None:
        await until(lambda: len(freed) == 3)

    asyncio.run(body())
    assert sorted(freed) == [("file", "memory freer")] * 2 + [("mapping", "memory freer")]
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_blocks_are_reused_unless_a_call_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BlockCache()
    with cache.borrow() as first:
        first.write(b"x" * 1000)
    with cache.borrow() as again:
        assert again is first
        monkeypatch.setattr(shared, "_MAP_FROM", 1000)
    assert again.fd == -1  # too large by now
    with pytest.raises(CorruptImage), cache.borrow() as failed:
        raise CorruptImage
    assert failed.fd == -1
    with cache.borrow() as new:
        pass
    cache.close()
    assert new.fd == -1


def test_errors_keep_their_class_and_text() -> None:
    async def body(workers: Workers) -> None:
        with pytest.raises(CorruptImage, match=r"^it is damaged$"):
            await workers.call(LIMIT, calls.fail, "CorruptImage", "it is damaged")
        with pytest.raises(RuntimeError, match=r"ZeroDivisionError"):
            await workers.call(LIMIT, calls.divide_by_zero)
        assert workers.kills == {}

    with_workers(body)


@pytest.mark.parametrize("busy", [calls.spin, calls.sleep_in_c])
def test_call_that_takes_too_long_is_killed(busy: Callable[[], None]) -> None:
    async def body(workers: Workers) -> None:
        pid = await workers.pid()
        start = time.monotonic()
        with pytest.raises(UnprocessableImage, match=r"^decoding the image took longer than 0.3 s"):
            await workers.call(QUICK, busy)
        assert time.monotonic() - start < 5
        assert await workers.pid() != pid
        assert not is_running(pid)
        assert workers.kills == {"time": 1}
        assert workers.restarts == 1

    with_workers(body)


@linux
def test_call_that_allocates_too_much_is_killed() -> None:
    async def body(workers: Workers) -> None:
        pid = await workers.pid()
        for function in (calls.allocate, calls.allocate_within_a_decoder):
            assert await workers.call(LIMIT, function, 20_000_000) is None
            with pytest.raises(UnprocessableImage, match="decoding the image takes more than 100"):
                await workers.call(LIMIT, function, 2_000_000_000)
            assert await workers.pid() != pid
        assert workers.kills == {"memory": 2}

    with_workers(body)


@linux
def test_process_that_keeps_memory_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LEAK_BYTES", 30_000_000)

    async def body(workers: Workers) -> None:
        pid = await workers.pid()
        await workers.call(LIMIT, calls.keep, 20_000_000)
        assert await workers.pid() == pid
        await workers.call(LIMIT, calls.keep, 20_000_000)  # its answer is not lost
        assert await workers.pid() != pid
        assert workers.kills == {"leak": 1}

    with_workers(body)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSEGV])
def test_process_that_crashes_fails_its_call_alone(sent: signal.Signals) -> None:
    async def body(workers: Workers) -> None:
        await workers.pid()
        others = [asyncio.create_task(workers.call(LIMIT, calls.sleep, 0.02)) for _ in range(20)]
        with pytest.raises(UnprocessableImage, match=f"its process ended .{sent.name}"):
            await workers.call(LIMIT, calls.send_to_itself, int(sent))
        await asyncio.gather(*others)
        await until(lambda: workers.restarts == 1)
        assert workers.kills == {"crash": 1}

    with_workers(body, size=2)


def test_idle_process_that_is_killed_is_replaced() -> None:
    async def body(workers: Workers) -> None:
        pid = await workers.pid()
        os.kill(pid, signal.SIGKILL)
        await until(lambda: workers.restarts == 1)
        assert await workers.pid() != pid
        assert workers.kills == {"crash": 1}

    with_workers(body)


def test_call_is_not_lost_when_its_process_ended_before() -> None:
    async def body(workers: Workers) -> None:
        pid = await workers.pid()
        kill_and_wait(pid)  # the pool has not noticed yet
        assert await workers.pid() != pid

    with_workers(body)


@linux
def test_worker_does_not_preempt_the_engine() -> None:
    async def body(workers: Workers) -> None:
        assert await workers.call(LIMIT, os.sched_getscheduler, 0) == os.SCHED_BATCH

    with_workers(body)


def test_worker_does_not_know_the_settings_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNET_API_KEYS", "secret")

    async def body(workers: Workers) -> None:
        assert await workers.call(LIMIT, os.getenv, "UNET_API_KEYS") is None

    with_workers(body)


def test_cancelled_calls_leave_nothing_running() -> None:
    async def body(workers: Workers) -> None:
        short = await workers.pid()
        for _ in range(50):  # each ends soon, so the process is kept
            task = asyncio.create_task(workers.call(LIMIT, calls.sleep, 0.005))
            await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await workers.pid() == short
        assert workers.kills == {}
        task = asyncio.create_task(workers.call(LIMIT, calls.spin))
        await asyncio.sleep(0.05)
        task.cancel()
        start = time.monotonic()
        assert await workers.pid() != short
        assert time.monotonic() - start < 10
        assert workers.kills == {"cancelled": 1}

    with_workers(body)


def test_process_of_a_call_past_its_deadline_is_killed() -> None:
    async def body(workers: Workers) -> None:
        await workers.pid()
        limit = CallLimit("decoding", 20, 100_000_000, time.monotonic() + 0.1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(workers.call(limit, calls.spin), 0.1)
        await workers.pid()
        assert workers.kills == {"deadline": 1}

    with_workers(body)


def test_pool_fails_when_no_process_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(workers: Workers) -> None:
        pid = await workers.pid()
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/bin/false")
            os.kill(pid, signal.SIGKILL)
            await until(lambda: workers.failure is not None)
            assert "3 failures in a row" in str(workers.failure)
        await until(lambda: workers.failure is None)
        assert await workers.pid() != pid

    with_workers(body)


@linux
@pytest.mark.parametrize("fallback", [False, True])
def test_processes_end_with_their_parent(fallback: bool, tmp_path: Path) -> None:
    """After kill -9, with a call in progress."""
    code = f"""
import asyncio, os, sys
from app.imaging.workers.pool import WorkerPool
from tests.unit.app.imaging import worker_calls as calls
from tests.unit.app.imaging.test_workers import LIMIT, Workers
async def main():
    workers = Workers(2)
    workers.start()
    pids = {{await workers.pid() for _ in range(20)}}
    while len(workers._idle) < 2:
        await asyncio.sleep(0.01)
    portable, path = {fallback}, {str(tmp_path / "pid")!r}
    asyncio.create_task(workers.call(LIMIT, calls.write_pid_and_spin, path, portable))
    await asyncio.sleep(60)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        pid_file = tmp_path / "pid"
        end = time.monotonic() + 30
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < end
            time.sleep(0.02)
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        assert pid_file.read_text() in children
        assert len(children) == 2
    finally:
        parent.kill()
        parent.wait()
    while any(is_running(int(each)) for each in children):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_signals_for_the_process_group_do_not_end_workers() -> None:
    async def body(workers: Workers) -> None:
        pid = await workers.pid()
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(pid, sent)
        assert await workers.pid() == pid

    with_workers(body)


def test_standard_error_of_workers_is_not_that_of_the_service(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def body(workers: Workers) -> None:
        await workers.call(LIMIT, calls.write_to_stderr, 1_000_000)  # more than a pipe holds

    with_workers(body)
    assert capfd.readouterr().err == ""


def test_worker_imports_nothing_heavy() -> None:
    async def body(workers: Workers) -> None:
        heavy = {"torch", "openvino", "fastapi", "uvicorn", "scipy"}
        assert heavy.isdisjoint(await workers.call(LIMIT, calls.modules))

    async def scene() -> None:
        workers = WorkerPool(1, ("app.inference.steps", calls.__name__))
        workers.start()
        try:
            await body(workers)  # type: ignore[arg-type]
        finally:
            await workers.stop()

    asyncio.run(scene())


def test_reasons_are_those_of_the_metrics() -> None:
    from app.metrics import KILL_REASONS

    assert set(KILL_REASONS) == set(KillReason) - {KillReason.STOP}
    assert child.MAX_BLOCKS >= 3
