"""Asks `/livez` until its standard input ends, then prints the latencies in milliseconds.

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
    port, latencies = int(sys.argv[1]), list[float]()
    probe = request(path="/livez", method="GET")
    while not select.select([sys.stdin], [], [], _PAUSE_S)[0]:
        start = time.perf_counter()
        try:
            answer = exchange(port, probe, 60)
            passed = answer.status == 200
        except OSError:
            passed = False
        latencies.append((time.perf_counter() - start) * 1000 if passed else _FAILED_MS)
    print("\n".join(f"{each:.3f}" for each in latencies))


if __name__ == "__main__":
    main()
