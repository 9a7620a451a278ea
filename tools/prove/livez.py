"""Asks `/livez` until its standard input ends, then prints a line for each probe.

The line has the time when it was sent, by the monotonic clock, and its latency in milliseconds.

    python -m tools.prove.livez PORT

Each probe has a connection of its own, as those of an orchestrator. A failed one counts as a
minute.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time

from tools.prove.wire import exchange, request

_PAUSE_S = 0.02
_FAILED_MS = 60_000.0


def main() -> None:
    with contextlib.suppress(PermissionError):
        os.nice(-10)  # the time of this process itself should not count
    port, probes = int(sys.argv[1]), list[tuple[float, float]]()
    probe = request(path="/livez", method="GET")
    while not select.select([sys.stdin], [], [], _PAUSE_S)[0]:
        start = time.monotonic()
        try:
            answer = exchange(port, probe, 60)
            passed = answer.status == 200
        except OSError:
            passed = False
        latency = (time.monotonic() - start) * 1000 if passed else _FAILED_MS
        probes.append((start, latency))
    print("\n".join(f"{start:.6f} {latency:.3f}" for start, latency in probes))


if __name__ == "__main__":
    main()
