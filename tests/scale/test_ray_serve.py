"""The service on Ray Serve: replicas that die, hang, are replaced or have no room."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from tests.conftest import ROOT, encode, nuclei, write_tiny
from tests.scale.conftest import Cluster, wait_until
from tests.scale.ports import free_port

pytestmark = pytest.mark.timeout(900)  # a busy machine takes minutes to start a replica

CONFIG = yaml.safe_load((ROOT / "deploy/ray/serve_config.yaml").read_text())
IMAGE = encode(nuclei(120, 150, 1)[0])
CONSTANT = encode(np.full((60, 60), 255, np.uint8))
"""The engine of `hanging_app` never returns from it."""
CLIENTS = 6
ROUNDS = 2
"""Answers per client that show that requests are served."""


class Application:
    """The shipped configuration with small numbers, on a port of its own."""

    def __init__(self, cluster: Cluster, folder: Path, weights: Path) -> None:
        self.cluster = cluster
        self._file = folder / "serve_config.yaml"
        self._weights = weights
        self._port = free_port()  # Serve keeps it for all configurations
        self.url = f"http://127.0.0.1:{self._port}"

    def deploy(
        self,
        *,
        variables: dict[str, str] | None = None,
        import_path: str | None = None,
        **options: Any,
    ) -> None:
        """Deploy, and wait until all replicas run the configuration."""
        config = copy.deepcopy(CONFIG)
        config["proxy_location"] = "HeadOnly"  # both nodes have the same address
        config["http_options"] |= {"host": "127.0.0.1", "port": self._port}
        (application,) = config["applications"]
        application["import_path"] = import_path or application["import_path"]
        application["runtime_env"]["env_vars"] |= {
            "UNET_WEIGHTS_DIR": str(self._weights),
            **(variables or {}),
        }
        (deployment,) = application["deployments"]
        deployment["ray_actor_options"]["num_cpus"] = 1
        deployment["health_check_period_s"] = 1
        deployment["autoscaling_config"] |= {"min_replicas": 2, "max_replicas": 2}
        for name, value in options.items():
            if isinstance(value, dict):
                deployment[name] |= value
            else:
                deployment[name] = value
        self._file.write_text(yaml.safe_dump(config))
        self.cluster.run("serve", "deploy", "--address", self.cluster.dashboard, str(self._file))
        wait_until(self.is_running, 240, "the application")

    def status(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.cluster.dashboard}/api/serve/applications/", timeout=30).json()
        application: dict[str, Any] = answer["applications"]["unet"]
        return application

    def replicas(self) -> list[dict[str, Any]]:
        """The replicas that run, with `pid`, `node_id` and `actor_name`."""
        replicas = self.status()["deployments"]["unet-server"]["replicas"]
        return [replica for replica in replicas if replica["state"] == "RUNNING"]

    def names(self) -> set[str]:
        """Names of the replicas that run. A replica that replaces another one has a new name."""
        return {replica["actor_name"] for replica in self.replicas()}

    def is_running(self) -> bool:
        """Whether Serve has brought the configuration about: no replica starts or stops."""
        status = self.status()
        deployment = status["deployments"]["unet-server"]
        states = {replica["state"] for replica in deployment["replicas"]}
        return (
            status["status"] == "RUNNING"
            and deployment["status"] == "HEALTHY"
            and states == {"RUNNING"}
            and len(deployment["replicas"]) == deployment["target_num_replicas"]
        )


@pytest.fixture(scope="module")
def application(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Application]:
    weights = tmp_path_factory.mktemp("weights")
    write_tiny(weights / "nuclei.safetensors")
    write_tiny(weights / "person.safetensors", seed=1)
    running = Application(cluster, tmp_path_factory.mktemp("serve"), weights)
    running.deploy()
    yield running
    cluster.run("serve", "shutdown", "--address", cluster.dashboard, "--yes")


class Load:
    """Clients that send one request after the other.

    Attributes:
        answers: (start, end, response) of each request.
        errors: requests without a response.
    """

    def __init__(self, url: str, image: bytes) -> None:
        self._url = url
        self._image = image
        self._stopped = False
        self.answers: list[tuple[float, float, httpx.Response]] = []
        self.errors: list[Exception] = []

    async def work(self) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while not self._stopped:
                start = time.monotonic()
                try:
                    response = await client.post(f"{self._url}/segment", content=self._image)
                except httpx.TransportError as error:
                    self.errors.append(error)
                    continue
                self.answers.append((start, time.monotonic(), response))
                if response.status_code != 200:
                    await asyncio.sleep(float(response.headers.get("Retry-After", 1)))

    def stop(self) -> None:
        self._stopped = True

    async def wait(self, number: int = CLIENTS * ROUNDS, status: int = 200) -> None:
        """Wait until this many further requests have got a status."""
        wanted = self.count()[status] + number
        end = time.monotonic() + 120
        while self.count()[status] < wanted:
            assert time.monotonic() < end, f"{number} responses of {status}: {self.count()}"
            await asyncio.sleep(0.05)

    def count(self) -> collections.Counter[int]:
        return collections.Counter(response.status_code for _, _, response in self.answers)

    def served(self, after: float, before: float) -> bool:
        """Whether a request that began and ended within a time got its mask."""
        return any(
            after < began and ended < before
            for began, ended, response in self.answers
            if response.status_code == 200
        )

    def failed(self) -> list[tuple[float, float, httpx.Response]]:
        return [answer for answer in self.answers if answer[2].status_code != 200]


@contextlib.asynccontextmanager
async def loaded(url: str, image: bytes = IMAGE) -> AsyncIterator[Load]:
    """Requests of several clients during the block."""
    load = Load(url, image)
    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(load.work())
        try:
            yield load
        finally:
            load.stop()


def check_masks(load: Load, expected: bytes) -> None:
    """Every request has a response; those with a mask have the right one."""
    assert not load.errors
    assert {response.content for _, _, response in load.answers if response.status_code == 200} == {
        expected
    }


def check_problem(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers.get_list("X-Request-ID") == [response.json()["request_id"]]
    assert float(response.headers["Retry-After"]) >= 1


def test_requests_reach_the_service_on_both_nodes(application: Application) -> None:
    assert len({replica["node_id"] for replica in application.replicas()}) == 2
    mask = httpx.post(f"{application.url}/segment", content=IMAGE, headers={"X-Request-ID": "me"})
    assert mask.status_code == 200, mask.text
    assert mask.headers["Content-Type"] == "image/png"
    assert mask.headers.get_list("X-Request-ID") == ["me"]
    other = httpx.post(f"{application.url}/segment?model=person", content=IMAGE)
    assert other.headers["X-Model"].startswith("person@")
    assert httpx.get(f"{application.url}/readyz").json() == {"status": "ok"}
    missing = httpx.get(f"{application.url}/nope")
    assert (missing.status_code, missing.json()["status"]) == (404, 404)


def kill_actor(cluster: Cluster, name: str) -> None:
    """Kill an actor as Ray does, without a drain."""
    cluster.run(
        "python", "-c",
        "import ray, sys; ray.init(sys.argv[1], namespace='serve', log_to_driver=False); "
        "ray.kill(ray.get_actor(sys.argv[2]))",
        cluster.address, name,
    )  # fmt: skip


async def wait_for(check: Callable[[], object], seconds: float, what: str) -> None:
    await asyncio.to_thread(wait_until, check, seconds, what)


@pytest.mark.parametrize("way", ["kill the replica", "kill its process"])
def test_only_requests_of_a_dead_replica_are_answered_with_503(
    application: Application, way: str
) -> None:
    wait_until(application.is_running, 120, "two replicas")
    expected = httpx.post(f"{application.url}/segment", content=IMAGE).content
    victim = application.replicas()[0]
    process = Path(f"/proc/{victim['pid']}")

    async def scene() -> tuple[Load, float, float, float]:
        async with loaded(application.url) as load:
            await load.wait()
            start = time.monotonic()
            if way == "kill its process":
                os.kill(victim["pid"], signal.SIGKILL)
            else:
                await asyncio.to_thread(kill_actor, application.cluster, victim["actor_name"])
            await wait_for(lambda: not process.exists(), 60, "the end of the process")
            end = time.monotonic()
            await wait_for(
                lambda: victim["actor_name"] not in application.names(),
                60,
                "the end of the replica",
            )
            await wait_for(application.is_running, 240, "a new replica")
            replaced = time.monotonic()
            await load.wait()
        return load, start, end, replaced

    load, start, end, replaced = asyncio.run(scene())
    print(way, load.count(), f"in {load.answers[-1][1] - load.answers[0][0]:.1f} s")
    check_masks(load, expected)
    failed = load.failed()
    # Its own requests: those that were in flight when it was killed, of which each client has one.
    assert len(failed) <= CLIENTS
    for began, ended, response in failed:
        check_problem(response, 503)
        assert began <= end
        assert ended >= start
    assert load.served(after=end, before=replaced)  # by the other replica


def test_an_update_and_a_smaller_number_of_replicas_lose_no_request(
    application: Application,
) -> None:
    wait_until(application.is_running, 120, "two replicas")
    expected = httpx.post(f"{application.url}/segment", content=IMAGE).content
    before = application.names()

    async def scene() -> Load:
        async with loaded(application.url) as load:
            await load.wait()
            await asyncio.to_thread(application.deploy, variables={"UNET_MAX_WAIT_MS": "1"})
            assert before.isdisjoint(application.names())
            fewer = {"min_replicas": 1, "max_replicas": 1}
            await asyncio.to_thread(
                application.deploy,
                variables={"UNET_MAX_WAIT_MS": "1"},
                autoscaling_config=fewer,
            )
            assert len(application.replicas()) == 1
            await load.wait()
        return load

    load = asyncio.run(scene())
    print("update", load.count())
    check_masks(load, expected)
    assert load.count().keys() == {200}


def test_a_full_queue_is_answered_with_429(application: Application) -> None:
    one = {"min_replicas": 1, "max_replicas": 1}
    application.deploy(autoscaling_config=one, max_ongoing_requests=1, max_queued_requests=1)
    expected = httpx.post(f"{application.url}/segment", content=IMAGE).content

    async def scene() -> Load:
        async with loaded(application.url) as load:
            await load.wait(CLIENTS, 429)
            await load.wait()
        return load

    load = asyncio.run(scene())
    print("full", load.count())
    check_masks(load, expected)
    for _, _, response in load.failed():
        check_problem(response, 429)


def test_a_deadline_counts_while_a_request_waits_for_a_replica(application: Application) -> None:
    one = {"min_replicas": 1, "max_replicas": 1}
    application.deploy(
        variables={"UNET_WEIGHTS_DIR": str(ROOT / "weights")},
        autoscaling_config=one,
        max_ongoing_requests=1,
        max_queued_requests=20,
    )

    async def scene() -> httpx.Response:
        large = encode(nuclei(1500, 1500, 1)[0])
        async with (
            loaded(application.url, large) as load,
            httpx.AsyncClient(timeout=60) as client,
        ):
            await load.wait(1)  # one client has an answer, and the others are in the queue
            return await client.post(
                f"{application.url}/segment", content=IMAGE, headers={"X-Request-Timeout": "0.1"}
            )

    response = asyncio.run(scene())
    assert response.status_code == 504, response.text
    assert response.headers["Content-Type"] == "application/problem+json"


def test_replicas_follow_the_load(application: Application) -> None:
    scaled = {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1, "upscale_delay_s": 1,
        "downscale_delay_s": 3, "metrics_interval_s": 1, "look_back_period_s": 2,
    }  # fmt: skip
    application.deploy(autoscaling_config=scaled)

    async def scene() -> Load:
        async with loaded(application.url) as load:
            await wait_for(lambda: len(application.replicas()) == 2, 240, "a second replica")
            await load.wait()
        return load

    load = asyncio.run(scene())
    assert load.count().keys() == {200}
    wait_until(lambda: len(application.replicas()) == 1, 120, "one replica again")


def test_a_replica_whose_engine_hangs_answers_503_until_it_is_replaced(
    application: Application,
) -> None:
    application.deploy(
        variables={"UNET_WATCHDOG_S": "2"}, import_path="tests.scale.hanging_app:app"
    )
    expected = httpx.post(f"{application.url}/segment", content=IMAGE).content
    before = application.names()

    async def scene() -> tuple[Load, httpx.Response, float, float]:
        async with loaded(application.url) as load, httpx.AsyncClient(timeout=120) as client:
            await load.wait()
            start = time.monotonic()
            response = await client.post(f"{application.url}/segment", content=CONSTANT)
            await wait_for(lambda: before - application.names(), 60, "the end of the replica")
            await wait_for(application.is_running, 240, "a new replica")
            replaced = time.monotonic()
            await load.wait()
        return load, response, start, replaced

    load, response, start, replaced = asyncio.run(scene())
    print("hung", load.count(), f"replaced after {replaced - start:.1f} s")
    check_problem(response, 503)
    assert len(before & application.names()) == 1
    check_masks(load, expected)
    for began, _, failed in load.failed():
        check_problem(failed, 503)
        assert began <= replaced
    assert load.served(after=start, before=replaced)  # by the other replica
