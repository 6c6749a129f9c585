"""`import aot_cache.auto` in a serving process: load what the environment names, and let ranks of TensorRT-LLM agree.

AOT_CACHE         a bundle, or a folder with one bundle per GPU model; several are separated by `:`, as in PATH (on Linux);
                  unset: no bundle is loaded
AOT_CACHE_DIGEST  the bundle's digest, or one for each bundle, separated in the same way; any other bundle is refused.
                  Unset: none is pinned
AOT_CACHE_TRUSTED_KEYS  a PEM file of public keys, or several; any bundle that none of them has signed is refused. Unset: bundles
                  need not be signed
AOT_CACHE_STRICT  1: raise instead of serving without the bundle
AOT_CACHE_POLICY  fallback, error or observe: what happens where a call misses; without AOT_CACHE, only the guard is armed
AOT_CACHE_UNTESTED  1: accept releases of torch and Triton that were not tested together
AOT_CACHE_MIXED   error or drop: what ranks of TensorRT-LLM do where only some of them have room for a shape
AOT_CACHE_MISSES  a file to which every miss is appended, for `aot-cache build --misses`

Import it before the model; it imports neither torch nor Triton itself and initialises no GPU.
"""

from __future__ import annotations

import os

from aot_cache.engines import tensorrt_llm

if _paths := os.environ.get("AOT_CACHE"):
    from aot_cache.runtime.loader import load_all

    load_all(_paths, os.environ.get("AOT_CACHE_DIGEST"), strict=os.environ.get("AOT_CACHE_STRICT") == "1")
elif os.environ.get("AOT_CACHE_POLICY"):
    from aot_cache.runtime.loader import arm

    arm()

tensorrt_llm.register()  # it has no place for plug-ins: this waits until it is imported
