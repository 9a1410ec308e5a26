"""Runs `cancelctl` for `python -m kalshi_cancel.cli`."""

import sys

from kalshi_cancel.cli import main

sys.exit(main())
