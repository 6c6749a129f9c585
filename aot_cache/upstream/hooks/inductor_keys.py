"""Inductor's keys as another machine would make them.

A key has all settings of Inductor, also such as name a program of the machine (`cpp.cxx`), on which no compiled code depends.

Upstream: `torch/_inductor/codecache.py` (`FxGraphHashDetails`), `torch/utils/_config_module.py`
(`ConfigModule.save_config_portable`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from aot_cache.upstream import patch


@contextlib.contextmanager
def with_settings(settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, on this thread, Inductor makes its keys as if it had these settings. What it does is not changed."""
    from torch._inductor import config

    def save_config_portable(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        return {**found, **settings} if self is config else found

    with _portable_settings().replaced(save_config_portable):
        yield


@functools.cache
def _portable_settings() -> patch.OnThisThread:
    from torch.utils._config_module import ConfigModule

    return patch.OnThisThread(ConfigModule, "save_config_portable")
