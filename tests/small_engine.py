"""An adapter for `build --engine`: an engine that is small enough for tests, and does what engines do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import recorded_steps
import sample_at_start
import torch

from aot_cache.artifact import engine_cache
from aot_cache.artifact.engine_cache import COMPILED, Caches
from aot_cache.builder.engine_worker import Process, Run
from aot_cache.builder.messages import OtherRanks
from aot_cache.errors import DeclarationError
from aot_cache.upstream.virtual import torch_fake_group, torch_fake_host

PACKAGE = "pytest"
TRIED = ("0.0.1",)
ENVIRONMENT = {"SMALL_ENGINE": "runs"}
AT_START = ("num_lines", "none_has_this")
Progress = Callable[[str, int, int], None]


def version() -> str:
    return metadata.version(PACKAGE)


def model_folder(arguments: Sequence[str]) -> Path | None:
    folder = Path(arguments[0])
    return folder if folder.is_dir() else None


def _options(arguments: Sequence[str]) -> dict[str, str]:
    options = dict(one.removeprefix("--").split("=") for one in arguments[1:])
    if set(options) - {"batches", "ranks"}:
        raise DeclarationError("the option batches", repr(sorted(options)))
    return options


def _batches(arguments: Sequence[str]) -> list[int]:
    return [int(number) for number in _options(arguments).get("batches", "1,3").split(",")]


def _join(arguments: Sequence[str], process: Process) -> None:
    """As an engine does whose model is split over GPUs."""
    wanted = int(_options(arguments).get("ranks", "1"))
    if wanted != process.ranks:
        raise OtherRanks(wanted)
    assert (torch.cuda.device_count(), torch.cuda.current_device()) == (wanted, process.rank)
    torch_fake_group.only_fake(process.rank, process.ranks)


def run(arguments: Sequence[str], process: Process, progress: Progress) -> Run:
    import os

    assert os.environ["SMALL_ENGINE"] == "runs" and str(process.folder)
    _join(arguments, process)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert torch.cuda.is_current_stream_capturing()
        sample_at_start.step(16)
    assert not torch.cuda.is_current_stream_capturing()
    graph.replay()
    if process.rank:
        sample_at_start.other[(1,)](torch.zeros(128, device="cuda"), BLOCK=128)  # only the second rank has so much
    batches = _batches(arguments)
    for done, batch in enumerate(batches):
        progress("requests", done, len(batches))
        sample_at_start.step(batch)
        sampled = torch.rand(batch, 8, device="cuda").argmax(-1)
        lengths = [1 + token for token in sampled.tolist()]  # nobody knows what is sampled
        with torch.inference_mode():
            recorded_steps.step(torch.empty(sum(lengths), 8, device="cuda"), {"w": torch.empty(8, 4, device="cuda")})
    return Run(
        requests=[f"a batch of {batch}" for batch in batches],
        answered=len(batches),
        unreached=["requests with two heads: no second head (small_engine.py:1)"],
    )


def compile_models(
    arguments: Sequence[str], process: Process, keep: Callable[[Caches], None], progress: Progress
) -> list[str]:
    _join(arguments, process)
    batches = _batches(arguments)
    process.folder.mkdir(parents=True, exist_ok=True)
    compiled: list[Any] = []

    def backend(graph: Any, inputs: list[Any]) -> Any:
        """As vLLM compiles a graph: with Dynamo's own example inputs, ahead of time."""
        from torch._inductor import standalone_compile

        given = [node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"]
        compiled.append(standalone_compile(graph, given, dynamic_shapes="from_graph", aot=True))
        return graph.forward

    with torch_fake_host.running():
        model = recorded_steps.Model().to("cuda").eval()
        host = torch.zeros(max(batches), 8, pin_memory=True).numpy()  # host tensors are real
        x = torch.tensor(host.tolist(), device="cuda")
        assert host.shape == x.shape and x.new_tensor([1.0]).device.type == "cuda"
        with torch_fake_host.compiling(), torch.no_grad():
            torch.compile(model, backend=backend)(x)
    (artifact,) = compiled
    files = {f"rank_{process.rank}/model": artifact.serialize(), "batch": str(max(batches)).encode()}
    keep(engine_cache.one_entry("small", COMPILED, "key", {"model": "small:Model"}, files))
    progress("models", 1, 1)
    return ["small:Model"]
