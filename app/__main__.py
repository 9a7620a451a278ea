"""The command `unet`, and `python -m app`: ends without a traceback on Ctrl-C while it imports."""

import signal
import sys


def main() -> int:
    """Run a command and return its exit status."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from app import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
