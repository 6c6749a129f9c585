"""Finds where in the user's own code an error was raised."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from aot_cache.errors import AotCacheError, one_line

_OURS = str(Path(__file__).parents[1])
_OTHERS = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib")})


def told(error: BaseException) -> str:
    """The error in one line, with file and line of the last frame in the user's code, else of the last frame."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((_OURS, *_OTHERS))]
    frame = (own or frames)[-1:]
    words = str(error) if isinstance(error, AotCacheError) else one_line(error)
    return " ".join([words, *(f"({one.filename}:{one.lineno})" for one in frame)])
