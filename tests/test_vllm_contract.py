"""What the vLLM plug-in takes for granted of vLLM, read from its source: nothing is imported, no GPU and no wheel's needs.

AOT_TESTS_VLLM names folders, separated as in PATH, in each of which an unpacked wheel is. Without it these tests are skipped:
`tools/check_vllm VERSION` fetches wheels, runs them and writes the record that the last test reads.
"""

from __future__ import annotations

import ast
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from aot_cache.upstream.virtual.vllm_engine import COMMUNICATORS, SETTINGS

ROOT = Path(__file__).parents[1]
SOURCES = [Path(folder) for folder in os.environ.get("AOT_TESTS_VLLM", "").split(os.pathsep) if folder]
RECORD = ROOT / "artifacts" / "measurements" / "check_vllm.json"
RUNNERS = ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/model_runner.py")
STEPS = ["load_model", "initialize_from_config", "compile_or_warm_up_model"]

vllm = pytest.mark.parametrize(
    "source",
    SOURCES or [pytest.param(None, marks=pytest.mark.skip(reason="no source of vLLM: AOT_TESTS_VLLM"))],
    ids=lambda folder: folder.name if folder else "none",
)


@cache
def module(source: Path, name: str) -> ast.Module:
    return ast.parse((source / "vllm" / name).read_text())


def function(source: Path, name: str, *path: str) -> ast.FunctionDef:
    """A function by the names that lead to it within a module."""
    node: Any = module(source, name)
    for step in path:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        inside = [child for child in ast.walk(node) if isinstance(child, kinds) and child.name == step]
        assert inside, f"vLLM moved: {name} has no {'.'.join(path)}"
        node = inside[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def order(node: ast.AST, *texts: str) -> None:
    """The texts are in this order in the node's code."""
    code = ast.unparse(node)
    places = [code.find(text) for text in texts]
    assert -1 not in places, f"vLLM moved: no {texts[places.index(-1)]!r} in {getattr(node, 'name', 'the module')}"
    assert places == sorted(places), f"vLLM moved: not in the order {texts}"


@vllm
def test_the_worker_has_the_steps(source: Path) -> None:
    """Each is a method of the class itself that gives its result back; none is a property or a coroutine."""
    for step in STEPS:
        node = function(source, "v1/worker/gpu_worker.py", "Worker", step)
        assert node.args.args[0].arg == "self"
        assert not {"property", "staticmethod", "classmethod"} & {ast.unparse(d) for d in node.decorator_list}


@vllm
def test_the_size_of_the_cache_is_known_after_its_step(source: Path) -> None:
    step = function(source, "v1/worker/gpu_worker.py", "Worker", "initialize_from_config")
    order(step, "self.cache_config.num_gpu_blocks = kv_cache_config.num_blocks", "initialize_kv_cache(")
    kernels = (source / "vllm/model_executor/layers/mamba/ops/causal_conv1d.py").read_text()
    if "num_cache_lines: tl.constexpr" in kernels:  # 0.24; no constant any more in 0.33
        assert "num_cache_lines = conv_states.size(0)" in kernels


@vllm
def test_captures_are_in_the_last_step(source: Path) -> None:
    text = (source / "vllm" / "v1" / "worker" / "gpu_worker.py").read_text()
    names = {"compile_or_warm_up_model", "_compile_or_warm_up_model"}
    steps = [n for n in ast.walk(module(source, "v1/worker/gpu_worker.py")) if getattr(n, "name", "") in names]
    (last,) = [node for node in steps if "capture_model()" in ast.unparse(node)]
    order(last, "capture_model()", "jit_monitor", "freeze_gc_heap()")
    assert text.count(".capture_model()") == 1
    assert "capture_model" not in ast.unparse(function(source, "v1/worker/gpu_worker.py", "Worker", STEPS[0]))


@vllm
def test_plug_ins_come_before_the_worker_is_imported(source: Path) -> None:
    order(function(source, "v1/engine/core.py", "EngineCore", "__init__"), "load_general_plugins()", "executor_class(")
    order(
        function(source, "v1/worker/worker_base.py", "WorkerWrapperBase", "init_worker"),
        "load_general_plugins()",
        "resolve_obj_by_qualname(parallel_config.worker_cls)",
    )
    order(function(source, "engine/arg_utils.py", "EngineArgs", "__post_init__"), "load_general_plugins()")
    loading = function(source, "plugins/__init__.py", "load_general_plugins")
    assert not loading.args.args
    order(loading, "plugins_loaded = True", "func()")
    assert "'vllm.general_plugins'" in ast.unparse(module(source, "plugins/__init__.py"))


@vllm
def test_the_steps_come_in_order(source: Path) -> None:
    for name in ("multiproc_executor.py", "uniproc_executor.py"):
        order(module(source, f"v1/executor/{name}"), "init_device()", ".load_model()")
    order(module(source, "v1/executor/abstract.py"), "'initialize_from_config'", "'compile_or_warm_up_model'")
    order(
        function(source, "v1/engine/core.py", "EngineCore", "_initialize_kv_caches"),
        "determine_available_memory()",
        "initialize_from_config(",
    )


@vllm
def test_the_worker_is_what_a_gpu_s_platform_names(source: Path) -> None:
    for platform in ("cuda", "rocm"):
        text = (source / "vllm" / "platforms" / f"{platform}.py").read_text()
        assert "vllm.v1.worker.gpu_worker.Worker" in text, f"vLLM moved: another worker on {platform}"


@vllm
def test_the_registry_of_metrics(source: Path) -> None:
    assert not function(source, "v1/metrics/prometheus.py", "get_prometheus_registry").args.args
    page = "entrypoints/serve/instrumentator/metrics.py"
    assert "from vllm.v1.metrics.prometheus import get_prometheus_registry" in ast.unparse(module(source, page))
    order(function(source, page, "attach_router"), "get_prometheus_registry()", "make_asgi_app(registry=registry)")


@vllm
def test_where_vllm_looks_for_a_compiled_model(source: Path) -> None:
    file = "compilation/decorators.py"
    load = function(source, file, "_try_load_aot_compiled_fn")
    assert [argument.arg for argument in load.args.args] == ["model", "aot_compilation_path"]
    order(load, "open(aot_compilation_path", "_verify_source_unchanged", "finalize_loading(", "return None")
    call = [n for n in ast.walk(module(source, file)) if getattr(n, "name", "") == "__call__"][-1]
    order(
        call,
        "aot_compile_hash_factors(self.vllm_config)",
        "_model_hash_key(self.forward)",
        "'torch_aot_compile'",
        "os.environ['TORCHINDUCTOR_CACHE_DIR'] = inductor_cache",
        "f'rank_{rank}_{dp_rank}'",
        "os.path.join(cache_dir, 'model')",
        "_try_load_aot_compiled_fn(self, aot_compilation_path)",
        "self.aot_compile(*args, **kwargs)",
        "self.save_aot_compiled_function()",
    )
    order(function(source, file, "_verify_source_unchanged"), "source_info.inlined_sources", "source.content")


@vllm
def test_what_vllm_s_key_is_made_from(source: Path) -> None:
    """Each factor is one that `factors` reads; a new one must be added there."""
    node = function(source, "compilation/caching.py", "aot_compile_hash_factors")
    parts = ["hash_factors(envs.compile_factors())", "vllm_config.compute_hash()", "get_inductor_factors("]
    order(node, *parts)
    assert ast.unparse(node).count("factors.append(") + ast.unparse(node).count("factors.extend(") == len(parts)
    key = function(source, "compilation/decorators.py", "_model_hash_key")
    order(key, "vllm.__version__", "fn.__qualname__", "fn.__code__.co_firstlineno")
    assert ast.unparse(key).count("sha256_hash.update(") == 3
    assert function(source, "config/utils.py", "get_hash_factors").args.args[1].arg == "ignored_factors"
    text = ast.unparse(function(source, "config/vllm.py", "VllmConfig", "compute_hash"))
    assert "self.compilation_config.compute_hash()" in text and "self.cache_config.compute_hash()" in text


@vllm
def test_where_compiled_subgraphs_are(source: Path) -> None:
    backend = function(source, "compilation/backends.py", "VllmBackend", "__call__")
    order(
        backend,
        "if not self.compilation_config.cache_dir",
        "f'rank_{rank}_{dp_rank}', self.prefix)",
        "self.compiler_manager.initialize_cache(local_cache_dir",
    )
    order(
        function(source, "compilation/backends.py", "CompilerManager", "initialize_cache"),
        "'vllm_compile_cache.py'",
        "literal_eval",
    )
    compiling = function(source, "compilation/compiler_interface.py", "InductorStandaloneAdaptor", "compile")
    order(compiling, "path = os.path.join(self.cache_dir, key)", "return (compiled_graph, (key, path))")
    manager = ("compilation/backends.py", "CompilerManager")
    order(function(source, *manager, "load"), "handle = value['graph_handle']")
    order(function(source, *manager, "compile"), "self.load(", "result = orig(*args", "in self.loaded_artifacts")


@vllm
def test_where_vllm_keeps_what_a_class_can_do(source: Path) -> None:
    steps = {
        "_load_modelinfo_from_cache": ["self", "module_hash"],
        "_save_modelinfo_to_cache": ["self", "mi", "module_hash"],
    }
    for name, arguments in steps.items():
        node = function(source, "model_executor/models/registry.py", "_LazyRegisteredModel", name)
        assert [argument.arg for argument in node.args.args] == arguments
        order(node, "self._get_cache_filename()")
    order(
        function(source, "model_executor/models/registry.py", "_LazyRegisteredModel", "inspect_model_cls"),
        "self._load_modelinfo_from_cache(module_hash)",
        "_run_in_subprocess(",
        "self._save_modelinfo_to_cache(mi, module_hash)",
    )
    loading = function(
        source, "model_executor/models/registry.py", "_LazyRegisteredModel", "_load_modelinfo_from_cache"
    )
    order(loading, "mi_dict['hash'] != module_hash", "_ModelInfo(**mi_dict['modelinfo'])")


# --- an engine in one process, without a GPU ----------------------------------------------------------------------------


@vllm
def test_the_options_of_vllm_serve(source: Path) -> None:
    """`vllm_engine.options_of` goes the way of `vllm serve`."""
    init = function(source, "entrypoints/cli/serve.py", "ServeSubcommand", "subparser_init")
    assert [argument.arg for argument in init.args.args] == ["self", "subparsers"]
    order(function(source, "entrypoints/cli/serve.py", "ServeSubcommand", "cmd"), "args.model = args.model_tag")
    assert "class FlexibleArgumentParser" in (source / "vllm/utils/argparse_utils.py").read_text()
    arguments = "engine/arg_utils.py"
    assert function(source, arguments, "EngineArgs", "from_cli_args").args.args[1].arg == "args"
    assert function(source, arguments, "EngineArgs", "create_engine_config").args.args[1].arg == "usage_context"
    text = (source / "vllm" / arguments).read_text()
    for field in ("load_format", "skip_tokenizer_init", "disable_log_stats"):
        assert f"    {field}: " in text, f"vLLM moved: no option {field}"
    assert "OPENAI_API_SERVER" in (source / "vllm/usage/usage_lib.py").read_text()


@vllm
def test_an_engine_in_one_process(source: Path) -> None:
    init = function(source, "v1/engine/llm_engine.py", "LLMEngine", "__init__")
    assert {"vllm_config", "executor_class", "log_stats", "multiprocess_mode"} <= {one.arg for one in init.args.args}
    for name, first in (("add_request", ["self", "request_id", "prompt", "params"]), ("step", ["self"])):
        found = function(source, "v1/engine/llm_engine.py", "LLMEngine", name)
        assert [one.arg for one in found.args.args][: len(first)] == first
    for name in ("has_unfinished_requests", "abort_request"):
        function(source, "v1/engine/llm_engine.py", "LLMEngine", name)
    text = (source / "vllm/v1/executor/uniproc_executor.py").read_text()
    assert "class UniProcExecutor" in text
    (look,) = function(source, "model_executor/models/registry.py", "_run_in_subprocess").args.args
    assert look.arg == "fn"


@vllm
def test_our_settings_are_not_in_vllm_s_key(source: Path) -> None:
    node = function(source, "envs.py", "compile_factors")
    ignored = next(n for n in ast.walk(node) if isinstance(n, ast.AnnAssign) and "ignored" in ast.unparse(n.target))
    assert isinstance(ignored.value, ast.Set)
    names = {one.value for one in ignored.value.elts if isinstance(one, ast.Constant)}
    assert {*SETTINGS, "VLLM_CACHE_ROOT"} <= names


@vllm
def test_where_all_models_are_compiled(source: Path) -> None:
    """Both runners run all models before the sampler, and vLLM saves a model that it has compiled before it runs it."""
    for file in RUNNERS:
        node = function(source, file, "GPUModelRunner", "profile_run")
        order(node, "self._dummy_run(", "self._dummy_sampler_run(")
    calls = [n for n in ast.walk(module(source, "compilation/decorators.py")) if getattr(n, "name", "") == "__call__"]
    order(
        calls[-1],
        "get_forward_context().skip_compiled",
        "self.aot_compiled_fn = self.aot_compile(*args, **kwargs)",
        "self.save_aot_compiled_function()",
    )
    assert "TorchCompileWithNoGuardsWrapper.__call__(self, *args, **kwargs)" in ast.unparse(calls[-1])
    function(source, "compilation/wrapper.py", "TorchCompileWithNoGuardsWrapper", "aot_compile")


@vllm
def test_what_ranks_share(source: Path) -> None:
    """Each communicator takes its group first, and one that is disabled is passed over."""
    for file, name in COMMUNICATORS.items():
        made = function(source, f"distributed/device_communicators/{file}.py", name, "__init__")
        assert [argument.arg for argument in made.args.args[:2]] == ["self", "group"]
        assert "self.disabled = True" in ast.unparse(made)
    reduce = function(source, "distributed/device_communicators/cuda_communicator.py", "CudaCommunicator", "all_reduce")
    assert "torch.distributed.all_reduce(out, group=self.device_group)" in ast.unparse(reduce)
    same = function(source, "distributed/parallel_state.py", "in_the_same_node_as")
    assert [argument.arg for argument in same.args.args] == ["pg", "source_rank"]
    function(source, "distributed/device_communicators/shm_broadcast.py", "MessageQueue", "create_from_process_group")
    place = function(source, "v1/executor/uniproc_executor.py", "UniProcExecutor", "_distributed_args")
    assert "distributed_init_method, 0, local_rank" in ast.unparse(place)


@vllm
def test_which_tokens_have_an_adapter(source: Path) -> None:
    """`vllm_adapters` does what vLLM does, but with indices that have values."""
    step = function(source, "lora/punica_wrapper/punica_gpu.py", "PunicaWrapperGPU", "update_metadata")
    given = ["self", "mapping", "lora_index_to_id", "max_loras", "vocab_size"]
    assert [argument.arg for argument in step.args.args] == given
    order(
        step,
        "self.is_prefill = mapping.is_prefill",
        "self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)",
        "self.token_mapping_meta.prepare_tensors(self.token_lora_indices)",
        "self.prompt_mapping_meta.prepare_tensors(self.sampler_indices)",
    )
    places = ast.unparse(function(source, "lora/punica_wrapper/utils.py", "convert_mapping"))
    assert "if x > 0 else -1 for x in mapping.prompt_mapping" in places
    assert "lora_index_to_id.index(x)" in places or "index for index, lora_id in enumerate(lora_index_to_id)" in places
    assert "base_indices = indices[1]" in places and "sampler_indices = prompt_mapping_tensor" in places
    manager = "lora/worker_manager.py"
    added = function(source, manager, "WorkerLoRAManager", "add_dummy_lora")
    assert [argument.arg for argument in added.args.args] == ["self", "lora_request", "rank"]
    function(source, manager, "WorkerLoRAManager", "get_dummy_lora_warmup_rank")
    order(module(source, "lora/request.py"), "lora_name: str", "lora_int_id: int", "lora_path: str")
    for file in RUNNERS:
        assert "LoRAModelRunnerMixin" in ast.unparse(module(source, file))


@vllm
def test_what_attention_returns(source: Path) -> None:
    """`vllm_operators` has rules for what these give."""
    text = ast.unparse(module(source, "vllm_flash_attn/flash_attn_interface.py"))
    assert "out, softmax_lse, _, _ = torch.ops._vllm_fa3_C.fwd(" in text
    assert "out, softmax_lse = torch.ops._vllm_fa2_C.varlen_fwd(" in text
    node = function(source, "vllm_flash_attn/flash_attn_interface.py", "get_scheduler_metadata")
    (call,) = [
        n for n in ast.walk(node) if isinstance(n, ast.Call) and "fa3_C.get_scheduler_metadata" in ast.unparse(n)
    ]
    assert ast.unparse(call.args[0]) == "batch_size" and ast.unparse(call.args[8]) == "cache_seqlens"


def test_the_record_has_the_versions_that_are_supported() -> None:
    record = json.loads(RECORD.read_text())["vllm"]
    assert {".".join(version.split(".")[:2]) for version in record} == {"0.24", "0.33"}
    own = sum(1 for name in globals() if name.startswith("test_")) - 1
    for version, found in record.items():
        assert found["failed"] == [] and found["passed"] == own, f"tools/check_vllm {version}"
        assert len(found["other compilers"]) == 3 and all(found["other compilers"].values())
        real = found["installed"]  # with vLLM itself in the process
        assert real["vllm"] == version and real["steps hooked"] == STEPS and real["entry point"]
        assert (real["bundles"], real["refused"]) == (1, 0)
        for name in ("update_num_computed_tokens_for_batch_change", "batched_count_greater_than"):
            calls = real[f"calls of {name}"]
            assert calls["frames that Dynamo traced"] == 0 and calls["calls"] == calls["equal to eager"] > 0
        assert "aot_cache.runtime.session" not in real["imported before the worker"]
        _compiled_models(found["compile cache"])


def _compiled_models(found: Any) -> None:
    """vLLM's own counts: with the bundle it loads its model and compiles nothing, and what it refuses is named."""
    counts = {name: found[name]["vLLM's own counts"] for name in ("recorded", "same", "other option", "other source")}
    assert all(found[name]["equal to eager"] for name in counts)
    lowered = {name: found[name]["graphs that Inductor lowered"] for name in counts}
    assert lowered.pop("same") == 0, (
        "also of the layers that are equal to one that is kept, though the compiler has another name"
    )
    assert all(lowered.values())
    assert counts["recorded"]["num_aot_compiles"] == counts["same"]["num_aot_artifacts_loaded"] == 1
    assert counts["same"]["num_aot_compiles"] == 0
    assert (
        found["recorded"]["children that look at a class"] == 1 and found["same"]["children that look at a class"] == 0
    )
    for name, words in {"other option": "epilogue_fusion is False", "other source": "vllm_small_model.py"}.items():
        (line,) = found[name]["our warnings"]
        assert words in line and counts[name]["num_aot_compiles"] == 1
