"""What Inductor's autotuners chose on another machine, by the names of the files that Inductor keeps it in.

Inductor looks for a choice beside the kernel's source, in the folder in which the kernel was compiled. A compiled graph that is
loaded on another machine still names that folder. The file's name does not depend on it: it is a digest of the source and of
torch. Inductor itself checks that a choice is one of the kernel's configs.

Upstream: `torch/_inductor/runtime/autotune_cache.py` (`AutotuneCache._read`, `.local_cache`), called by
`triton_heuristics.CachingAutotuner.recheck_autotune_cache`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from aot_cache.upstream import patch

SUFFIX = ".best_config"
"""Ends the names of these files."""


def serve(choices: Mapping[str, bytes]) -> patch.Undo:
    """Where Inductor finds no file, give it the one of the same name: name → content (JSON).

    Returns a function that takes the hook out.

    Raises:
        AttributeError, ImportError: this torch has no such step; nothing is hooked then.
    """
    from torch._inductor.runtime.autotune_cache import AutotuneCache

    def _read(original: Any, self: Any) -> Any:
        found = original(self)
        if found is not None or not self.local_cache:
            return found
        content = choices.get(os.path.basename(self.local_cache[1]))
        return json.loads(content) if content is not None else None

    return patch.replace(AutotuneCache, "_read", _read)
