"""Hides nothing: `python -m worker.cli` is `cancelctl`."""

import sys

from worker.cli import main

sys.exit(main())
