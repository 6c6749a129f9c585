"""Bundles and store objects that are elsewhere: in a registry, an object store or a folder (extra `remote`).

Nothing of this is imported where a bundle is served. What comes from elsewhere is hostile until its hash is checked.
"""

from __future__ import annotations

from collections.abc import Callable

INSTALL = "pip install 'aot-cache[remote]'"

Progress = Callable[[int], None]
"""Is told how many bytes of a file have been moved."""
