"""As much of vLLM as a plug-in sees: entry points, the worker's steps, the registry of /metrics. Names are vLLM 0.33's."""

__version__ = "0.33.0"
