"""How long a test waits for what may hang. Nothing here says how fast anything should be: a busy machine must fail no test."""

from __future__ import annotations

import os

PATIENCE = float(os.environ.get("AOT_TESTS_PATIENCE", "1"))
"""Set it to 5 on a machine that is that much slower than anybody's."""
HANGS = 1500 * PATIENCE
"""Seconds for another process; a whole test has a little more (`timeout` in pyproject.toml)."""
