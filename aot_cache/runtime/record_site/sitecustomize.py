"""Put first on PYTHONPATH by `aot-cache record`: starts the recording in every Python process of the command."""

import importlib.machinery
import importlib.util
import os
import sys
import types

_STARTED = "aot_cache_record_site"
if _STARTED not in sys.modules:  # another sitecustomize that runs the environment's own may find this one again
    sys.modules[_STARTED] = types.ModuleType(_STARTED)
    # Run the environment's own sitecustomize, if there is one.
    _here = os.path.dirname(os.path.abspath(__file__))
    _rest = [p for p in sys.path if os.path.abspath(p or ".") != _here]
    _spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _rest)
    if _spec is not None and _spec.loader is not None:
        _module = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(_module)

    from aot_cache.runtime.record import start_from_environment

    start_from_environment()
