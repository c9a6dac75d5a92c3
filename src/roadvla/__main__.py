"""``python -m roadvla``."""

from __future__ import annotations

import sys

from roadvla.cli import main

sys.exit(main())
