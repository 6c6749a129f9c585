"""A recipe that is one module's text, built for this machine's GPU and served in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

from aot_cache.builder.pipeline import Request, build

ROOT = Path(__file__).resolve().parents[2]


def served(folder: Path, module: str, source: str, script: str, **variables: str) -> Any:
    """What `script` prints as JSON, with the bundle of `source` in AOT_CACHE and empty caches."""
    from aot_cache.runtime.host_gpu import native

    (folder / f"{module}.py").write_text(source)
    paths = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        built = build(Request(target=native()[0], store=folder / "store", model=f"{module}:recipe"))
    assert built.failed == []
    caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, **caches, "PYTHONPATH": paths, "AOT_CACHE": str(built.path), **variables},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
