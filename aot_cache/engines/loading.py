"""How an engine's worker loads the bundle."""

from __future__ import annotations


def load() -> None:
    """Load what the environment names, into an engine that runs each size before it captures it: that gives libraries their
    handles."""
    import aot_cache.auto  # noqa: F401  # reads the environment
    from aot_cache.runtime import loader

    loader.SESSION.primes_libraries = False
