"""What a command prints on stderr beside errors: lines of progress, as many as the machine is slow."""

from __future__ import annotations

import re

_PROGRESS = re.compile(r"^(\w+: )?[\w .:-]+( \d+/\d+)?, \d+ s(, about .*)?\n", re.MULTILINE)


def without_progress(text: str) -> str:
    return _PROGRESS.sub("", text)
