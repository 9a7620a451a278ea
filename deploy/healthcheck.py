"""The HEALTHCHECK of the container image: exit status 0 if `/readyz` answers 200, else 1.

    python healthcheck.py [PID]

It asks the server that the container runs (process 1), at the address in that process's command
line (`unet serve --host ... --port ...`) or, without these flags, in UNET_HOST and UNET_PORT.
Proxy variables have no effect. Knows nothing of the service's code.
"""

from __future__ import annotations

import http.client
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

TIMEOUT_S = 2.0
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def server_address(command: Sequence[str], environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port on which a client in the container reaches `unet serve`.

    Args:
        command: the command line of the server. Its last `--host` and `--port` win, as in argparse.
        environment: used where a flag is missing.
    """
    host = _flag(command, "--host") or environment.get("UNET_HOST") or "127.0.0.1"
    port = _flag(command, "--port") or environment.get("UNET_PORT") or "8000"
    return _LOOPBACK.get(host, host), int(port)


def _command_of(pid: str) -> list[str]:
    """The command line of a process; empty where the system hides it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _flag(command: Sequence[str], name: str) -> str | None:
    value = None
    # `sh -c 'unet serve --port 9000'` is one argument of several words.
    words = [word for argument in command for word in argument.split()]
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == name:
            value = following
        elif word.startswith(f"{name}="):
            value = word.removeprefix(f"{name}=")
    return value


def main(arguments: Sequence[str]) -> int:
    """Print what `/readyz` says, and return the exit status."""
    command = _command_of(arguments[0] if arguments else "1")
    host, port = server_address(command, os.environ)
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        print(response.status, response.read().decode())
        return 0 if response.status == 200 else 1
    except (OSError, http.client.HTTPException) as error:
        print(f"GET http://{host}:{port}/readyz: {error}")
        return 1
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
