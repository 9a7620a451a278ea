"""The command `unet`, and `python -m app`: a signal while modules are imported ends it quietly."""

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run a command and return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:  # process 1 of a container ignores signals that have no handler
        signal.signal(signal.SIGTERM, _exit)
    from app import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def _exit(sig: int, _: FrameType | None) -> None:
    os._exit(128 + sig)


if __name__ == "__main__":
    sys.exit(main())
