"""Hides nothing: `python -m kalshi_cancel.cli` is `cancelctl`."""

import sys

from kalshi_cancel.cli import main

sys.exit(main())
