"""`python -m app.cli`: the same as `unet`."""

import sys

from app.cli import main

sys.exit(main())
