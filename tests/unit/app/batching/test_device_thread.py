"""The threads of a device: what they submit, in which order they collect, and what they keep."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from app.batching.call_thread import ThreadFuture
from app.batching.device_thread import DeviceCall, DeviceThread, Timed
from tests.devices import until


def with_thread(body: Callable[[DeviceThread], Awaitable[None]], depth: int = 2) -> None:
    async def scene() -> None:
        thread = DeviceThread("device", depth)
        try:
            await asyncio.wait_for(body(thread), 20)
        finally:
            thread.stop()

    asyncio.run(scene())


def put(
    thread: DeviceThread, submit: Callable[[], Any], collect: Callable[[Any], Any]
) -> asyncio.Future[Timed[Any]]:
    outcome: ThreadFuture[Timed[Any]] = ThreadFuture()
    thread.put(DeviceCall(submit, collect, outcome))
    return outcome.future


class Batches:
    """Batches whose end a test decides.

    Attributes:
        events: "submit N" and "collect N", in their order.
        threads: names of the threads that made them.
        gates: a batch can be collected once its gate is open.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self.threads: set[str] = set()
        self.gates = [threading.Event() for _ in range(9)]

    def put(self, thread: DeviceThread, number: int) -> asyncio.Future[Timed[Any]]:
        def submit() -> int:
            self._record(f"submit {number}")
            return number

        def collect(submitted: int) -> int:
            assert self.gates[submitted].wait(20)
            self._record(f"collect {submitted}")
            return submitted

        return put(thread, submit, collect)

    def _record(self, event: str) -> None:
        self.events.append(event)
        self.threads.add(threading.current_thread().name)


@pytest.mark.parametrize(
    ("depth", "events"),
    [
        (1, "submit 0, collect 0, submit 1, collect 1, submit 2, collect 2"),
        (2, "submit 0, submit 1, collect 0, submit 2, collect 1, collect 2"),
    ],
)
def test_batches_in_flight_are_no_more_than_the_depth(depth: int, events: str) -> None:
    batches = Batches()

    async def body(thread: DeviceThread) -> None:
        gate = threading.Event()
        held = asyncio.create_task(thread.call(lambda: gate.wait(20)))
        await until(lambda: thread.elapsed() > 0)
        futures = [batches.put(thread, number) for number in range(3)]
        gate.set()
        await held
        await until(lambda: len(batches.events) == depth)
        for number, future in enumerate(futures):
            await asyncio.sleep(0.02)
            assert len(batches.events) == min(2 * number + depth, 3 + number)
            batches.gates[number].set()
            assert (await future).result == number
        assert thread.elapsed() == 0

    with_thread(body, depth)
    assert ", ".join(batches.events) == events
    collecting = {"device"} if depth == 1 else {"device collect"}
    assert batches.threads == {"device"} | collecting


def test_batch_is_submitted_while_the_last_is_waited_for() -> None:
    """It is formed later than the last was submitted, as under steady load."""
    batches = Batches()

    async def body(thread: DeviceThread) -> None:
        first = batches.put(thread, 0)
        await until(lambda: thread.elapsed() > 0.05)  # it is being waited for
        second = batches.put(thread, 1)
        await until(lambda: "submit 1" in batches.events)
        assert not first.done()
        for each in batches.gates:
            each.set()
        assert [(await each).result for each in (first, second)] == [0, 1]

    with_thread(body)


def test_other_calls_are_made_while_a_batch_is_waited_for() -> None:
    batches = Batches()

    async def body(thread: DeviceThread) -> None:
        first = batches.put(thread, 0)
        await until(lambda: thread.elapsed() > 0.05)
        assert await thread.call(lambda: "checked") == "checked"
        assert thread.elapsed() > 0.05  # of the batch
        batches.gates[0].set()
        await first

    with_thread(body)


def test_time_of_a_batch_begins_when_the_one_before_it_ends() -> None:
    batches = Batches()

    async def body(thread: DeviceThread) -> None:
        first, second = batches.put(thread, 0), batches.put(thread, 1)
        await until(lambda: thread.elapsed() > 0.05)
        batches.gates[0].set()
        one = await first
        assert thread.elapsed() < one.seconds
        batches.gates[1].set()
        two = await second
        assert one.seconds >= 0.05
        assert two.started == pytest.approx(one.started + one.seconds, abs=0.02)

    with_thread(body)


def test_error_does_not_keep_the_memory_of_its_batch() -> None:
    """Frames of a traceback hold their variables: a smaller batch would find no memory either."""

    class Activations:
        pass

    alive: list[weakref.ref[Activations]] = []

    def compute() -> None:
        activations = Activations()
        alive.append(weakref.ref(activations))
        raise RuntimeError("out of memory")

    def submit() -> None:
        try:
            compute()
        except RuntimeError as error:
            raise MemoryError("mapped") from error

    async def body(thread: DeviceThread) -> None:
        for call in (lambda: put(thread, submit, lambda _: None), lambda: thread.call(submit)):
            with pytest.raises(MemoryError, match="mapped") as caught:
                await call()
            assert caught.value.__traceback__ is not None
            assert alive.pop()() is None

    with_thread(body)


def test_stop_collects_what_is_in_flight() -> None:
    batches = Batches()

    async def body(thread: DeviceThread) -> None:
        futures = [batches.put(thread, number) for number in range(3)]
        thread.stop()
        for each in batches.gates:
            each.set()
        assert [(await future).result for future in futures] == [0, 1, 2]

    with_thread(body)
