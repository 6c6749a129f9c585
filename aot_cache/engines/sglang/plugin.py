"""The entry point `sglang.srt.plugins`: SGLang calls `register` in each of its processes before they do anything else.

Without AOT_CACHE and AOT_CACHE_POLICY nothing happens. Else the bundle is loaded in the processes that make a scheduler, right
before that. The API server and the detokenizer make none, and pay only for this module. Nothing here raises: SGLang serves
without us, and its log has one warning.
"""

from __future__ import annotations

import logging

from aot_cache.runtime.engine_start import Start, asked_for
from aot_cache.upstream.after_import import after_import

_start = Start(logging.getLogger("sglang.aot_cache"))
_registered = False
_loaded = False


def register() -> None:
    """Load the bundle, and call `ready` and `seal`, at the right steps of SGLang's scheduler. May be called more than once."""
    global _registered
    if _registered or not asked_for():
        return
    _registered = True
    _start.or_warn(_wait)


def _wait() -> None:
    from aot_cache.engines import exporter
    from aot_cache.upstream.hooks import sglang_metrics, sglang_steps

    after_import(sglang_steps.SCHEDULER, lambda: _start.or_warn(lambda: sglang_steps.around_scheduler(_begin, _seal)))
    after_import(sglang_steps.RUNNER, lambda: _start.or_warn(lambda: sglang_steps.around_steps(_ready)))
    exporter.publish(sglang_metrics.add_collector)


def _begin() -> None:
    """A scheduler is about to be made; no kernel was launched yet."""
    global _loaded
    if not _loaded:
        from aot_cache.engines import loading

        _loaded = True
        _start.timed(loading.load)


def _ready() -> None:
    """A model is loaded, or its graphs are about to be captured."""
    from aot_cache.runtime import loader

    _start.timed(loader.ready)


def _seal() -> None:
    """The last step before requests: all graphs of target and draft are captured."""

    def say() -> None:
        from aot_cache.runtime import loader

        loader.seal()
        _start.say()

    _start.or_warn(say)
