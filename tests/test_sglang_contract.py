"""What SGLang's plug-in takes for granted of SGLang, read from its source: nothing is imported, no GPU and no wheel's needs.

AOT_TESTS_SGLANG names folders, separated as in PATH, in each of which an unpacked wheel is (`pip download --no-deps sglang`).
Without it these tests are skipped.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path
from typing import Any

import pytest

from aot_cache.upstream.hooks import sglang_metrics, sglang_steps

SOURCES = [Path(folder) for folder in os.environ.get("AOT_TESTS_SGLANG", "").split(os.pathsep) if folder]

sglang = pytest.mark.parametrize(
    "source",
    SOURCES or [pytest.param(None, marks=pytest.mark.skip(reason="no source of SGLang: AOT_TESTS_SGLANG"))],
    ids=lambda folder: folder.name if folder else "none",
)


def code(source: Path, module: str, *path: str) -> str:
    """The code of a function or class, by the names that lead to it within a module."""
    file = source.joinpath(*module.split("."))
    file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")
    node: Any = ast.parse(file.read_text())
    for step in path:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        found = [child for child in ast.walk(node) if isinstance(child, kinds) and child.name == step]
        assert found, f"SGLang moved: {module} has no {'.'.join(path)}"
        node = found[0]
    return ast.unparse(node)


def in_order(text: str, *parts: str) -> None:
    at = 0
    for part in parts:
        found = text.find(part, at)
        assert found >= 0, f"SGLang moved: no {part!r} behind what comes before it in {parts}"
        at = found + 1


@sglang
def test_plug_ins_come_before_a_scheduler_is_made(source: Path) -> None:
    """And the parent is told that it is ready after that."""
    run = code(source, sglang_steps.SCHEDULER, "run_scheduler_process")
    in_order(run, "load_plugins()", "scheduler = Scheduler(", "pipe_writer.send(", "run_event_loop()")
    plugins = code(source, "sglang.srt.plugins")
    assert "GENERAL_PLUGINS_GROUP = 'sglang.srt.plugins'" in plugins
    in_order(code(source, "sglang.srt.plugins", "load_plugins"), "_plugins_loaded = True", "func()", "apply_hooks()")


@sglang
def test_all_graphs_are_captured_when_a_scheduler_is_made(source: Path) -> None:
    assert "self.init_model_worker()" in code(source, sglang_steps.SCHEDULER, "Scheduler", "__init__")
    worker = code(source, sglang_steps.SCHEDULER, "Scheduler", "init_model_worker")
    in_order(
        worker, "init_tp_model_worker()", "maybe_init_draft_worker()", "init_memory_pools()", "init_all_cuda_graphs()"
    )
    graphs = code(source, sglang_steps.SCHEDULER, "Scheduler", "init_all_cuda_graphs")
    in_order(graphs, "self.tp_worker.init_cuda_graphs()", "self.draft_worker.init_cuda_graphs()")
    assert "self.model_runner.init_cuda_graphs(" in code(source, "sglang.srt.managers.tp_worker")


@sglang
def test_a_model_is_loaded_before_its_graphs(source: Path) -> None:
    assert "self.load_model()" in code(source, sglang_steps.RUNNER, "ModelRunner", "initialize")
    capture = code(source, sglang_steps.RUNNER, "ModelRunner", "init_cuda_graphs")
    assert "capture_cuda_graphs(" in capture


@sglang
def test_each_size_runs_before_it_is_captured(source: Path) -> None:
    """So its libraries have their handles by then, and cuBLAS need not get its own from us."""
    backend = "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend"
    in_order(code(source, backend, "capture_one"), " in range(2)", "forward_fn()", "torch.cuda.CUDAGraph()")


@sglang
def test_the_registry_of_metrics(source: Path) -> None:
    show = code(source, sglang_metrics.PLACES[0], sglang_metrics.NAME)
    in_order(
        show, "from prometheus_client import CollectorRegistry", "registry = CollectorRegistry()", "registry=registry"
    )
    for module in sglang_metrics.PLACES[1:]:
        assert f"{sglang_metrics.NAME}(app)" in code(source, module)
