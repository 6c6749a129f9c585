"""Loaded by every Python process with this folder on PYTHONPATH: counts what is compiled, if JIT_TRACE names a folder."""

import importlib.machinery
import importlib.util
import os
import sys

if os.environ.get("JIT_TRACE") and "jit_trace" not in sys.modules:
    import jit_trace

    jit_trace.install()

    # Run the environment's own sitecustomize, if there is one. It may find this file again.
    _here = os.path.dirname(os.path.abspath(__file__))
    _spec = importlib.machinery.PathFinder.find_spec(
        "sitecustomize", [p for p in sys.path if os.path.abspath(p or ".") != _here]
    )
    if _spec is not None and _spec.loader is not None:
        _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
