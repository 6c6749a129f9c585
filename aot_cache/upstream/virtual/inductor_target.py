"""A process in which Inductor compiles for a GPU that is not there. For good: a worker process of the builder only.

Upstream: `torch/_inductor` (`compile_fx`, `runtime/triton_heuristics.py`, `fx_passes`), `torch/_dynamo/device_interface.py`,
`torch/_subclasses/fake_tensor.py`.

What had to be virtual, and why, is in design.md
section 5 and below.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from aot_cache.upstream.virtual import inductor_attention, torch_modules

_NAME = 96

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target


def become(target: Target) -> None:
    """Make Inductor compile for `target` in this process; nothing of Inductor may have been imported before."""
    if target.backend != "cpu":
        from aot_cache.upstream.virtual import torch_cuda, torch_guard, triton_driver

        torch_guard.ensure()
        torch_cuda.pretend(target, tensors=False)
        triton_driver.pretend(target)
        _stay_off_the_driver()
    torch_modules.for_fake_tensors()
    from torch._inductor import config

    config.compile_threads = 1  # a graph is compiled in one forked child; its kernels are not spread further
    config.worker_suppress_logging = True
    if target.backend != "cpu":
        _compile_kernels_only(target)
        _constants_on_the_cpu()
        _patterns_on_the_cpu()
        inductor_attention.choose_for(target)


def _stay_off_the_driver() -> None:
    """Calls that Dynamo's device interface and fake tensors make, and that end in the CUDA runtime."""
    cuda: Any = torch.cuda
    cuda._exchange_device = lambda _device: 0
    cuda._maybe_exchange_device = lambda _device: 0
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda state, device=None: None
    from torch._subclasses import fake_tensor

    module: Any = fake_tensor
    # Else a fake mode would compute constants (`torch.tensor(3, device="cuda")`) on the GPU that is said to be there.
    module.FakeTensorMode.avoid_device_init = property(lambda _mode: True, lambda _mode, _value: None)
    if hasattr(module, "init_gpu_context"):  # to torch 2.11: makes a context
        module.init_gpu_context = lambda *_: None


def _compile_kernels_only(target: Target) -> None:
    from torch._inductor.runtime import triton_helpers, triton_heuristics
    from torch._inductor.triton_bundler import TritonBundler

    for imported in [triton_helpers, *list(sys.modules.values())]:
        if getattr(imported, "set_driver_to_gpu", None) is not None:
            found: Any = imported
            found.set_driver_to_gpu = lambda: None  # it would put the real driver back
    autotuner: Any = triton_heuristics.CachingAutotuner

    def precompile(
        self: Any, warm_cache_only: bool = False, reload_kernel: Any = None, static_triton_bundle_key: str | None = None
    ) -> None:
        """Compile all configs and make no launcher; keep the kernel for upstream's static launcher."""
        self._precompile_worker()
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
    # Triton cuts file names off at 150 characters, and the static launcher then does not find the kernel's binary.
    module.get_fused_kernel_name = lambda *args, **kwargs: full_name(*args, **kwargs)[:_NAME]
    path_of = module.get_path

    def get_path(*args: Any) -> tuple[str, str, str]:
        name, folder, path = path_of(*args)
        return name, folder, os.path.basename(path)  # a comment in the artifact, which is of no folder

    module.get_path = get_path


def _keep_what_fits(target: Target, autotuner: Any) -> None:
    """Drop configs that cannot run on `target`, as a device would; nobody here would notice, as nothing is loaded.

    torch of every build, without ROCm, too, compiles for ROCm when `torch.version.hip` says so early enough: seen to hold
    on CPU and CUDA builds. Where a new release asks something else, this fails, and names the kernel.

    Raises:
        RuntimeError: no config can; the graph is listed as failed.
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
    """Inductor folds constants by computing them, on the device that they are for."""
    from torch._inductor.constant_folding import ConstantFolder
    from torch.utils._python_dispatch import TorchDispatchMode

    class OnCpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
                kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs)

    folder: Any = ConstantFolder
    original = folder.run
    mode: Any = OnCpu

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        with mode():
            return original(self, *args, **kwargs)

    folder.run = run


def _patterns_on_the_cpu() -> None:
    """Inductor's patterns are traced once, on example tensors of the device that it is given."""
    from torch._inductor.fx_passes import joint_graph, post_grad

    for module in (joint_graph, post_grad):
        found: Any = module
        original = found.lazy_init
        found.lazy_init = lambda *_args, _original=original, **_kw: _original(input_device=torch.device("cpu"))
