"""A fresh process with a package in some form and a bundle: says what of the kernel is installed, and what would still miss.

`packaged_child.py BUNDLE MODULE`: `MODULE.run(n, device)` launches the kernel `MODULE.times`.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

from aot_cache.artifact import target as targets
from aot_cache.builder import virtual_gpu

virtual_gpu.become(targets.get("h200"))

from triton.runtime.jit import JITFunction  # noqa: E402  # only now may Triton be imported

from aot_cache.runtime.kernels import KernelSet  # noqa: E402
from aot_cache.runtime.ledger import Ledger  # noqa: E402
from aot_cache.store import read_bundle  # noqa: E402


def main(bundle: str, name: str) -> None:
    module = importlib.import_module(name)
    asked: list[str] = []
    with mock.patch.object(JITFunction, "_do_compile", lambda self, key, *rest: asked.append(key)):
        for n in range(1, 5):
            module.run(n, "cpu")
    kernels = KernelSet(read_bundle(Path(bundle)), Ledger())
    kernels.install(0)
    installed = {*module.times.device_caches[0][0]} if 0 in module.times.device_caches else set()
    facts = {"file": module.__file__, "stale": kernels.report.stale, "asked": len({*asked})}
    print(json.dumps({**facts, "missed": sorted({*asked} - installed)}))


main(*sys.argv[1:])
