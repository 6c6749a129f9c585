"""Tests in a process that has become a target: for good, so they are only collected by tests/test_on_target.py.

By hand: `AOT_TESTS_ON_TARGET=h200 python -m pytest tests/on_target`.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

TARGET = os.environ.get("AOT_TESTS_ON_TARGET")

if TARGET is None:
    collect_ignore_glob = ["*"]
else:
    # As the builder's worker has it; before Triton is imported, which reads most of its variables once.
    os.environ.update(
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
        TRITON_DISABLE_LINE_INFO="1",
        TRITON_CACHE_DIR=tempfile.mkdtemp(prefix="aot-cache-tests-triton-"),
    )
    atexit.register(shutil.rmtree, os.environ["TRITON_CACHE_DIR"], ignore_errors=True)

    from aot_cache.artifact import target as targets
    from aot_cache.builder import virtual_gpu

    virtual_gpu.become(targets.get(TARGET))

    from gpu_stub import device  # noqa: F401  # a fixture; imports Triton
