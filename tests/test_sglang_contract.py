"""What SGLang's plug-in and `build --engine sglang` take for granted of SGLang, read from its source: nothing is imported, no GPU
and no wheel's needs.

AOT_TESTS_SGLANG names folders, separated as in PATH, in each of which an unpacked wheel is (`pip download --no-deps sglang`).
Without it these tests are skipped.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest

from aot_cache.engines.requests import SAMPLERS
from aot_cache.upstream.hooks import sglang_metrics, sglang_steps
from aot_cache.upstream.virtual import sglang_compiled, sglang_engine, sglang_values

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


# --- what `build --engine sglang` takes for granted -------------------------------------------------------------------


@sglang
def test_a_scheduler_is_made_from_the_command_line(source: Path) -> None:
    assert "['--model-path', extra_argv[0], *extra_argv[1:]]" in code(
        source, "sglang.cli.serve", "_normalize_positional_model_path"
    )
    code(source, "sglang.srt.server_args", "prepare_server_args")
    code(source, "sglang.srt.server_args", "PortArgs", "init_new")
    run = code(source, sglang_engine.SCHEDULER, "run_scheduler_process")
    made = ast.parse(run).body[0]
    (call,) = [n for n in ast.walk(made) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Scheduler"]
    init = ast.parse(code(source, sglang_engine.SCHEDULER, "Scheduler", "__init__")).body[0]
    assert isinstance(init, ast.FunctionDef)
    wanted = [one.arg for one in init.args.args][1:]
    assert len(call.args) == len(wanted) and set(wanted) <= sglang_engine.PLACE, wanted
    if "publish(" in run:
        in_order(run, "publish(", "role='scheduler'", "SpawnRanks(", "world_rank=spawn_world_rank(", "Scheduler(")


@sglang
def test_the_loop_asks_for_requests_and_can_be_left(source: Path) -> None:
    loop = code(source, sglang_engine.SCHEDULER, "Scheduler", "event_loop_overlap")
    in_order(loop, "while True:", "if self.gracefully_exit:", "break", "get_next_batch_to_run(", "run_batch(batch)")
    assert "self.request_receiver.recv_requests(" in code(source, sglang_engine.SCHEDULER, "Scheduler")
    code(source, sglang_engine.RECEIVER, "SchedulerRequestReceiver", "recv_requests")
    for name in ("is_fully_idle", "init_running_status", "flush_cache", "run_event_loop"):
        code(source, sglang_engine.SCHEDULER, "Scheduler", name)


@sglang
def test_a_request_has_these_fields(source: Path) -> None:
    fields = code(source, sglang_engine.REQUESTS, "TokenizedGenerateReqInput")
    needed = re.findall(r"^    (\w+): [^=\n]*$", fields, re.MULTILINE)
    given = set(inspect_fields(sglang_engine.request)) - {"rid"}
    assert set(needed) == given, set(needed) ^ given
    params = code(source, sglang_engine.SAMPLING, "SamplingParams")
    for name in {name for wanted in SAMPLERS.values() for name in wanted} - OF_A_REQUEST | {"sampling_seed"}:
        assert f"    {name}: " in params, name


OF_A_REQUEST = {"logprobs", "prompt_logprobs", "seed", "min_tokens"}
"""Not SGLang's names, or not of its `SamplingParams`."""


def inspect_fields(function: Any) -> list[str]:
    """The names that a function gives to the last call in it."""
    tree = ast.parse(inspect.getsource(function))
    (last,) = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    assert isinstance(last.value, ast.Call)
    return [str(keyword.arg) for keyword in last.value.keywords]


@sglang
def test_groups_of_ranks_say_what_they_use(source: Path) -> None:
    init = code(source, "sglang.srt.distributed.parallel_state", "GroupCoordinator", "__init__")
    (function,) = ast.parse(init).body
    assert isinstance(function, ast.FunctionDef)
    uses = [one.arg for one in function.args.args if one.arg.startswith("use_")]
    assert {"use_pynccl", "use_custom_allreduce", "use_message_queue_broadcaster"} <= set(uses)
    for name in uses:  # all of them are switches
        assert f"{name}: bool" in init, name


@sglang
def test_other_compilers_are_where_they_were(source: Path) -> None:
    found = [
        module for module in sglang_compiled.LOADERS if source.joinpath(*module.split(".")).with_suffix(".py").exists()
    ]
    assert len(found) == 1 and "def load_jit(" in code(source, found[0], "load_jit")
    code(source, sglang_compiled.DEEP_GEMM, "update_deep_gemm_config")
    code(source, sglang_compiled.GRAPHS, "_is_stream_capturing")
    if source.joinpath(*sglang_values.COPIES.split(".")).with_suffix(".py").exists():
        assert "def try_small_copy(dsts, srcs)" in code(source, sglang_values.COPIES, "try_small_copy")
