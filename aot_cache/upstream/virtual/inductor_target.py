"""Make this process's Inductor compile for a GPU that is absent. Not undone: only for worker processes of the builder.

Upstream: `torch/_inductor` (`compile_fx`, `runtime/triton_heuristics.py`, `fx_passes`, `scheduler.py`, `codegen/wrapper.py`),
`torch/_dynamo/device_interface.py`, `torch/_subclasses/fake_tensor.py`.

What had to be replaced, and why, is in design.md
section 5 and below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from aot_cache.upstream.virtual import inductor_attention, this_gpu, torch_modules

_NAME = 96

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target


Launcher = Callable[[tuple[Any, ...]], None]


def become(target: Target, launcher: Launcher | None = None) -> None:
    """Make Inductor compile for `target` in this process. Inductor must not have been imported before.

    Args:
        launcher: called with the types of the arguments of each kernel for which Triton will make a launcher in C where the graph
            is loaded. Without it, a graph with such a kernel fails.
    """
    if target.backend != "cpu":
        from aot_cache.upstream.virtual import torch_cuda, torch_guard, triton_driver

        torch_guard.ensure()
        torch_cuda.pretend(target, tensors=False)
        triton_driver.pretend(target)
        _stay_off_the_driver()
    torch_modules.for_fake_tensors()
    from torch._inductor import config

    config.compile_threads = 1  # one forked child compiles a whole graph, without further processes
    config.worker_suppress_logging = True
    if target.backend != "cpu":
        _compile_kernels_only(target, launcher)
        _measure_nothing()
        _constants_on_the_cpu()
        _patterns_on_the_cpu()
        inductor_attention.choose_for(target)


def _stay_off_the_driver() -> None:
    """Replace calls of Dynamo's device interface and of fake tensors that would reach the CUDA runtime."""
    cuda: Any = torch.cuda
    cuda._exchange_device = this_gpu.always(this_gpu.number())
    cuda._maybe_exchange_device = this_gpu.always(this_gpu.number())
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device=None: None
    from torch._subclasses import fake_tensor

    module: Any = fake_tensor
    # Else a fake mode would compute constants (`torch.tensor(3, device="cuda")`) on the virtual GPU.
    module.FakeTensorMode.avoid_device_init = property(lambda _mode: True, lambda _mode, _value: None)
    if hasattr(module, "init_gpu_context"):  # up to torch 2.11: creates a CUDA context
        module.init_gpu_context = lambda *_: None


def _compile_kernels_only(target: Target, launcher: Launcher | None) -> None:
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._inductor.triton_bundler import TritonBundler

    for imported in [triton_helpers, *list(sys.modules.values())]:
        if getattr(imported, "set_driver_to_gpu", None) is not None:
            found: Any = imported
            found.set_driver_to_gpu = lambda: None  # it would restore the real driver
    autotuner: Any = triton_heuristics.CachingAutotuner

    def precompile(
        self: Any, warm_cache_only: bool = False, reload_kernel: Any = None, static_triton_bundle_key: str | None = None
    ) -> None:
        """Compile all configs without making launchers; keep the kernel for upstream's static launcher."""
        self._precompile_worker()
        if not self.is_statically_launchable() and launcher is not None:
            for result in self.compile_results:
                launcher(tuple(result.kernel.src.signature.values()))
            return
        if not self.is_statically_launchable():
            name = getattr(self.fn, "__name__", "a kernel")
            raise RuntimeError(f"{name} cannot be launched without compiling a C launcher where it is loaded")
        _keep_what_fits(target, self)
        if static_triton_bundle_key is not None:
            TritonBundler.put_static_autotuner(static_triton_bundle_key, self)

    autotuner.precompile = precompile
    from torch._inductor.codegen import triton as codegen

    module: Any = codegen
    full_name = module.get_fused_kernel_name
    # Triton truncates file names to 150 characters; the static launcher would then not find the kernel's binary.
    module.get_fused_kernel_name = lambda *args, **kwargs: full_name(*args, **kwargs)[:_NAME]
    path_of = module.get_path

    def get_path(*args: Any) -> tuple[str, str, str]:
        name, folder, path = path_of(*args)
        return name, folder, os.path.basename(path)  # only a comment in the artifact: no folder of this build

    module.get_path = get_path


def _measure_nothing() -> None:
    """Decide without a measurement where Inductor would run kernels while it compiles.

    Kernels that may be combined are combined, as without `benchmark_combo_kernel`. Matrix products are not padded, unless that is
    forced. Each autotuner keeps all of its configs, and chooses at the first launch, as where kernels are not tuned at compile
    time (vLLM's compiles set that).
    """
    from torch._inductor import config, scheduler
    from torch._inductor.codegen import wrapper
    from torch._inductor.fx_passes import pad_mm

    combining: Any = scheduler.Scheduler
    combining.speedup_by_combo_kernel = lambda self, nodes: True
    padding: Any = pad_mm
    padding.should_pad = lambda *_args, **_kwargs: bool(config.force_shape_pad)
    writing: Any = wrapper.PythonWrapperCodegen
    writing.generate_and_run_autotune_block = lambda self: None


def _keep_what_fits(target: Target, autotuner: Any) -> None:
    """Drop configs that cannot run on `target`. A device would reject them at load, but nothing is loaded here.

    Every torch build, even without ROCm, compiles for ROCm if `torch.version.hip` is set early enough (seen on CPU and CUDA
    builds). If a new release checks something else, this raises and names the kernel.

    Raises:
        RuntimeError: Inductor compiled for another device, or no config fits. The graph is then listed as failed.
    """
    name, device = getattr(autotuner.fn, "__name__", "a kernel"), autotuner.device_props
    found = (device.type, device.cc, device.warp_size)
    wanted = (target.backend, target.arch, target.warp_size)
    if found != wanted:
        raise RuntimeError(f"Inductor compiled {name} for {found}, and the target {target.id} is {wanted}")
    limit, results = target.shared_memory_per_block_optin, autotuner.compile_results
    autotuner.compile_results = [result for result in results if result.kernel.shared <= limit]
    if not autotuner.compile_results:
        least = min(result.kernel.shared for result in results)
        raise RuntimeError(f"{name} needs {least} bytes of shared memory, {target.id} has {limit}")


def _constants_on_the_cpu() -> None:
    """Fold constants on the CPU: Inductor would compute them on the device of the graph."""
    from torch._inductor.constant_folding import ConstantFolder
    from torch._inductor.fx_passes.joint_graph import UniformValueConstantFolder
    from torch.utils._python_dispatch import TorchDispatchMode

    class OnCpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)

    mode: Any = OnCpu

    def on_cpu(original: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            with mode():
                return original(self, *args, **kwargs)

        return run

    folder: Any = ConstantFolder
    folder.run = on_cpu(folder.run)
    uniform: Any = UniformValueConstantFolder
    uniform._add_peephole_patterns = on_cpu(uniform._add_peephole_patterns)


def _patterns_on_the_cpu() -> None:
    """Trace Inductor's patterns with example tensors on the CPU, instead of on the graph's device."""
    from torch._inductor.fx_passes import joint_graph, post_grad

    for module in (joint_graph, post_grad):
        found: Any = module
        original = found.lazy_init
        found.lazy_init = lambda *_args, _original=original, **_kw: _original(input_device=torch.device("cpu"))
