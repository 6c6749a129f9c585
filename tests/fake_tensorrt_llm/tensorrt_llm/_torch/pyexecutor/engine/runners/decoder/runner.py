"""The layout of TensorRT-LLM's main: a runner has the warm-up, which goes over the shapes twice."""

from __future__ import annotations

from tensorrt_llm.stand_in import Engine, Resources


class DecoderRunner(Engine):
    """Warms all shapes up before it captures one."""

    def warmup(self, resource_manager: Resources) -> None:
        self._capture_generation_cuda_graphs(resource_manager)
        self._capture_generation_cuda_graphs(resource_manager)
