"""Simulate how an autoscaler follows the load of GPU pods by different metrics.

    python -m tools.autoscaling

Each pod decodes images on its CPUs and computes their windows on one device; both have a queue.
Requests arrive at random at a pod that is ready. The autoscaler is the HorizontalPodAutoscaler's
algorithm (Kubernetes documentation, "Algorithm details") with the limits of the chart. Time
advances in seconds. The rate of the device (docs/reports/h200.md) and the CPU time per image
(docs/performance.md) were measured. Knows nothing of the service's code.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

DEADLINE_S = 60
"""A request that would wait longer is rejected (UNET_REQUEST_TIMEOUT_S)."""
PERIOD_S = 15
"""Time between two decisions, and between two readings of the metrics."""
AVERAGED_S = 60
"""Time over which usage is averaged."""
TOLERANCE = 0.1
"""The autoscaler ignores smaller deviations from the target."""
SCALE_UP_PERIOD_S = 30
"""In which the number of pods may double, or grow by two."""
SCALE_DOWN_PERIOD_S = 60
"""In which one pod may be removed."""
STABILIZATION_S = 300
"""Pods are removed if all recommendations of this time were lower."""


@dataclasses.dataclass(frozen=True)
class Pods:
    """The pods, and the requests that they get.

    Attributes:
        rate: windows per second of a device.
        windows: per image.
        cpu_s: CPU time per image outside the network.
        cpus: CPU limit of a pod.
        start_s: time until a new pod is ready.
    """

    rate: float = 984.0
    windows: int = 12
    cpu_s: float = 0.022
    cpus: float = 8.0
    start_s: int = 60
    minimum: int = 1
    maximum: int = 20

    @property
    def decoding_rate(self) -> float:
        """Windows per second that the CPUs prepare."""
        return self.cpus / self.cpu_s * self.windows

    @property
    def capacity(self) -> float:
        """Windows per second of a pod."""
        return min(self.rate, self.decoding_rate)


@dataclasses.dataclass(frozen=True)
class Reading:
    """Metrics of all pods that are ready.

    Attributes:
        pods: how many these are.
        busy: devices that compute, in the last minute on average.
        cpu: CPU usage in the last minute, as a share of the limits of all pods.
        waiting: windows in all devices' queues.
    """

    pods: int
    busy: float
    cpu: float
    waiting: float


Metric = Callable[[Reading, Pods], float]
"""Pods that are needed, before it is rounded up."""

TARGET = 0.7
CPU_TARGET = 0.8
WAITING_TARGET = 100.0


def measure_cpu(now: Reading, pods: Pods) -> float:
    """CPU usage of 80%."""
    return now.pods * now.cpu / CPU_TARGET


def measure_waiting(now: Reading, pods: Pods) -> float:
    """100 waiting windows per pod."""
    return now.waiting / WAITING_TARGET


def measure_busy(now: Reading, pods: Pods) -> float:
    """70% of the devices busy."""
    return now.busy / TARGET


def measure_load(now: Reading, pods: Pods) -> float:
    """The chart's query: busy devices, plus the waiting windows as work for a minute."""
    return (now.busy + now.waiting / pods.rate / 60) / TARGET


def measure_load_and_cpu(now: Reading, pods: Pods) -> float:
    """The chart's two metrics; an autoscaler takes the larger result."""
    return max(measure_load(now, pods), measure_cpu(now, pods))


METRICS: dict[str, Metric] = {
    "cpu": measure_cpu,
    "waiting": measure_waiting,
    "busy": measure_busy,
    "load": measure_load,
    "load and cpu": measure_load_and_cpu,
}


@dataclasses.dataclass
class Outcome:
    """Measures of a simulation, for clients and for the cluster.

    Attributes:
        rejected: share of the requests.
        p95_s: 95th percentile of the time in the queue, of accepted requests.
        mean_pods, most_pods: pods that were paid for.
    """

    rejected: float
    p95_s: float
    mean_pods: float
    most_pods: int


@dataclasses.dataclass
class _Pod:
    ready_at: int
    undecoded: float = 0.0
    queue: float = 0.0

    def wait_s(self, pods: Pods) -> float:
        return self.undecoded / pods.decoding_rate + self.queue / pods.rate

    def work(self, pods: Pods) -> tuple[float, float]:
        """Work for a second; returns for which shares of it the CPUs and the device were busy."""
        decoded = min(self.undecoded, pods.decoding_rate)
        self.undecoded -= decoded
        self.queue += decoded
        done = min(self.queue, pods.rate)
        self.queue -= done
        return decoded / pods.decoding_rate, done / pods.rate


class Autoscaler:
    """The algorithm of the HorizontalPodAutoscaler."""

    def __init__(self, metric: Metric, pods: Pods) -> None:
        self._metric = metric
        self._pods = pods
        self._recommended: deque[tuple[int, int]] = deque()
        self._sizes: deque[tuple[int, int]] = deque(maxlen=2 * SCALE_DOWN_PERIOD_S // PERIOD_S)

    def decide(self, second: int, size: int, reading: Reading) -> int:
        """The number of pods from now on.

        Args:
            size: the number of pods, including those that are not ready.
        """
        if not self._sizes:
            self._sizes.append((second - STABILIZATION_S, size))
        needed = self._metric(reading, self._pods)
        wanted = size if abs(needed / size - 1) <= TOLERANCE else math.ceil(needed)
        wanted = min(max(wanted, self._pods.minimum), self._pods.maximum)
        self._recommended.append((second, wanted))
        while self._recommended[0][0] <= second - STABILIZATION_S:
            self._recommended.popleft()
        if wanted < size:
            wanted = min(size, max(each for _, each in self._recommended))
        if wanted > size:
            before = self._size_at(second - SCALE_UP_PERIOD_S)
            wanted = max(size, min(wanted, max(2 * before, before + 2)))
        elif wanted < size:
            before = self._size_at(second - SCALE_DOWN_PERIOD_S)
            wanted = min(size, max(wanted, before - 1))
        self._sizes.append((second, wanted))
        return wanted

    def _size_at(self, second: int) -> int:
        return next(size for since, size in reversed(self._sizes) if since <= second)


def simulate(
    metric: Metric,
    pods: Pods,
    demand: Sequence[float],
    large: Sequence[float] | None = None,
    seed: int = 0,
) -> Outcome:
    """Run a load against pods that are scaled by a metric.

    Args:
        demand: work that arrives, per second of the simulation, in pods that it would fill.
        large: windows of one further request, per second of the simulation.
    """
    random = np.random.default_rng(seed)
    scaler = Autoscaler(metric, pods)
    running = [_Pod(0) for _ in range(pods.minimum)]
    leaving: list[_Pod] = []
    history: deque[tuple[float, float]] = deque(maxlen=AVERAGED_S)
    waits: list[float] = []
    counts: list[int] = []
    rejected = arrived = paid = most = 0
    for second, filled in enumerate(demand):
        ready = [pod for pod in running if pod.ready_at <= second]
        requests = random.poisson(filled * pods.capacity / pods.windows)
        shares = random.multinomial(requests, [1 / len(ready)] * len(ready))
        for pod, count in zip(ready, shares, strict=True):
            wait = pod.wait_s(pods)
            arrived += count
            if wait > DEADLINE_S:
                rejected += count
            else:
                pod.undecoded += count * pods.windows
                waits.append(wait)
                counts.append(count)
        if large is not None:
            ready[random.integers(len(ready))].undecoded += large[second]
        used = [pod.work(pods) for pod in [*ready, *leaving]]
        history.append((sum(cpu for cpu, _ in used), sum(busy for _, busy in used)))
        leaving = [pod for pod in leaving if pod.undecoded or pod.queue]
        if second % PERIOD_S == 0 and second:
            cpu, busy = (sum(each) / len(history) for each in zip(*history, strict=True))
            waiting = sum(pod.queue for pod in ready)
            reading = Reading(len(ready), busy, cpu / len(ready), waiting)
            size = scaler.decide(second, len(running), reading)
            running += [_Pod(second + pods.start_s) for _ in range(size - len(running))]
            leaving += running[size:]
            del running[size:]
        paid += len(running) + len(leaving)
        most = max(most, len(running))
    order = np.argsort(waits)
    totals = np.cumsum(np.array(counts)[order])
    p95 = float(np.array(waits)[order][np.searchsorted(totals, 0.95 * totals[-1])])
    return Outcome(float(rejected / max(1, arrived)), p95, paid / len(demand), most)


def make_ramp(low: float = 0.5, high: float = 4.0) -> list[float]:
    """Demand of each second, in pods: ten minutes low, five rising, twenty high, twenty low."""
    rise = [low + (high - low) * second / 300 for second in range(300)]
    return [*[low] * 600, *rise, *[high] * 1200, *[low] * 1200]


def make_large_requests(seconds: int, windows: float = 2000.0, every_s: int = 300) -> list[float]:
    """Windows of each second: five images of 100 megapixels every few minutes, before a reading."""
    return [windows if (second + 1) % every_s == 0 else 0.0 for second in range(seconds)]


def main() -> int:
    """Print a table of scenarios and metrics."""
    many, one = Pods(windows=12), Pods(windows=1)
    steady = [0.4] * 3600
    scenarios = [
        ("12 windows per image, 0.5 to 4 pods of work", many, make_ramp(), None),
        ("1 window per image, 0.5 to 4 pods of work", one, make_ramp(), None),
        (
            "0.4 pods of work, a large request every 5 minutes",
            many,
            steady,
            make_large_requests(3600),
        ),
    ]
    for title, pods, demand, large in scenarios:
        cpu, device = pods.capacity / pods.decoding_rate, pods.capacity / pods.rate
        print(f"\n{title}; a full pod uses {cpu:.0%} of its CPUs and {device:.0%} of its device")
        print("| metric | rejected | p95 in the queue, s | pods, mean | pods, most |")
        print("|---|---|---|---|---|")
        for name, metric in METRICS.items():
            found = simulate(metric, pods, demand, large)
            print(
                f"| {name} | {found.rejected:.1%} | {found.p95_s:.1f} | {found.mean_pods:.1f} "
                f"| {found.most_pods} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
