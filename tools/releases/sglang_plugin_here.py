"""Whether SGLang's own code, without a GPU, loads our plug-in, has the steps that it hooks, and shows our ledger: a JSON record.

    pip download --no-deps --dest /tmp sglang==0.5.23; unzip -d WHEEL /tmp/sglang-*.whl
    PYTHONPATH=WHEEL:PACKAGES python tools/releases/sglang_plugin_here.py [--out RECORD.json]

PACKAGES has what SGLang imports and this environment lacks (fastapi, orjson, pyzmq …: `pip install --target PACKAGES`). Packages
that need a GPU are replaced by nothing (`BINARY`), so no scheduler can be made here: what is shown is that the plug-in is in.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.abc
import importlib.machinery
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "gpu")]

from harness import commit, finish

BINARY = frozenset(
    "torchvision torchaudio sgl_kernel flashinfer deep_gemm cutlass tilelang flash_attn quack nvshmem sgl_deep_ep "
    "torch_memory_saver cv2 decord".split()
)
OURS = "aot_cache.upstream.hooks."


class Nothing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Any module of `BINARY`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in BINARY:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        made = MagicMock(name=spec.name)
        made.__path__, made.__spec__, made.__version__ = [], spec, "99.0.0"
        return made

    def exec_module(self, module: ModuleType) -> None: ...


def page() -> str:
    """What SGLang's `/metrics` answers."""
    routes: list[Any] = []
    app = type("App", (), {"routes": routes})
    importlib.import_module("sglang.srt.utils.common").add_prometheus_middleware(app)
    said: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    asked = {"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": []}
    asyncio.run(routes[0].app(asked, receive, send))
    text: bytes = said[-1]["body"]
    return text.decode()


def hooked(module: str, owner: str, name: str) -> bool:
    found = getattr(getattr(importlib.import_module(module), owner), name)
    return str(found.__module__).startswith(OURS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    options = parser.parse_args()
    os.environ["AOT_CACHE_POLICY"] = "observe"
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()
    sys.meta_path.insert(0, Nothing())
    plugins = importlib.import_module("sglang.srt.plugins")
    before = {"sglang.srt.managers.scheduler", "sglang.srt.model_executor.model_runner"} & set(sys.modules)
    plugins.load_plugins()
    families = sorted({line.split()[2] for line in page().splitlines() if line.startswith("# TYPE aot_cache")})
    runner, scheduler = "sglang.srt.model_executor.model_runner", "sglang.srt.managers.scheduler"
    claims = {
        "the ledger is in /metrics": "aot_cache_events_total" in families and "aot_cache_sealed" in families,
        "Scheduler.__init__": hooked(scheduler, "Scheduler", "__init__"),
        "ModelRunner.load_model": hooked(runner, "ModelRunner", "load_model"),
        "ModelRunner.init_cuda_graphs": hooked(runner, "ModelRunner", "init_cuda_graphs"),
    }
    record = {
        "what": "SGLang's own code loads the plug-in, without a GPU",
        "commit": commit(),
        "versions": {"sglang": version("sglang"), "torch": version("torch"), "python": platform.python_version()},
        "imported before the plug-in": sorted(before),
        "replaced by nothing": sorted({name.partition(".")[0] for name in sys.modules} & BINARY),
        "families": families,
        "claims": claims,
    }
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
