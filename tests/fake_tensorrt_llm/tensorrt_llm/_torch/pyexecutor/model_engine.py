"""`PyTorchModelEngine`: with the warm-up in it (the layout of 1.2), with a runner that has it (main), or with neither."""

from __future__ import annotations

import os
from typing import Any

from tensorrt_llm.stand_in import Engine, Resources

LAYOUT = os.environ["FAKE_TENSORRT_LLM"]

if LAYOUT == "1.2":

    class PyTorchModelEngine(Engine):
        def warmup(self, resource_manager: Resources) -> None:
            self._capture_generation_cuda_graphs(resource_manager)

elif LAYOUT == "main":
    from tensorrt_llm._torch.pyexecutor.engine.runners.decoder.runner import DecoderRunner

    class PyTorchModelEngine:  # type: ignore[no-redef]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.runner = DecoderRunner(*args, **kwargs)

        @property
        def ran(self) -> list[tuple[int, int]]:
            return self.runner.ran

        def warmup(self, resource_manager: Resources) -> None:
            self.runner.warmup(resource_manager)

else:

    class PyTorchModelEngine:  # type: ignore[no-redef]
        """Of a release that nobody has read yet."""
