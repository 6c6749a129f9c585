"""Put a compiled kernel into Triton's in-memory cache, as if this process had compiled it.

Upstream: `triton/compiler/compiler.py` (`CompiledKernel.__init__`, `_init_handles`), `triton/runtime/jit.py`
(`device_caches`). Seen to hold: see `versions.TRITON_SEEN`.
"""

from __future__ import annotations

import gc
from collections import namedtuple
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler.compiler import AsmDict
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from aot_cache.upstream import triton_jit, triton_launches

Json = Any


def current_device() -> int:
    """Triton's current device. Asks the driver, so the process must have initialised CUDA."""
    return int(driver.active.get_current_device())


def current_target() -> GPUTarget:
    return driver.active.get_current_target()


class Installer:
    """Makes and installs the kernels of one bundle on one device.

    Args:
        target: Triton's target of the current device.
        common: metadata that all units share.
        version: Triton's version, as its metadata has it.
    """

    def __init__(self, target: GPUTarget, common: Mapping[str, Json], version: str) -> None:
        self._target = target
        self._backend = make_backend(target)
        self._binary_ext: str = self._backend.binary_ext
        self._common = dict(common)
        self._version = version
        self._types: dict[tuple[str, ...], Any] = {}

    def install(
        self,
        function: JITFunction,
        device: int,
        specialization: list[Any],
        options: dict[str, Any],
        metadata: Mapping[str, Json],
        binary: bytes,
        digest: str,
    ) -> CompiledKernel:
        """Install one specialization; the ordinary launch finds it from now on. Loads nothing onto the device."""
        kernel = self._make(function, specialization, metadata, binary, digest)
        key = triton_jit.memory_key(specialization, options)
        function.device_caches[device][0].setdefault(key, kernel)
        return kernel

    def _make(
        self,
        function: JITFunction,
        specialization: list[Any],
        metadata: Mapping[str, Json],
        binary: bytes,
        digest: str,
    ) -> CompiledKernel:
        source = ASTSource.__new__(ASTSource)  # what __init__ does, without walking constants that launches never read
        names = [p.name for p in function.params]
        source.fn = function
        source.language = triton_language(function)
        source.ext = "ttir"
        source.name = function.__name__
        source.signature = {name: pair[0] for name, pair in zip(names, specialization)}
        source.constants = {(n,): pair[1] for n, pair in enumerate(specialization) if pair[0] == "constexpr"}
        source.attrs = {}
        kernel = CompiledKernel.__new__(CompiledKernel)
        kernel.metadata = self._metadata(metadata, digest)
        kernel.packed_metadata = self._backend.pack_metadata(kernel.metadata)
        kernel.src = source
        kernel.hash = digest
        kernel.name = kernel.metadata.name
        kernel.asm = AsmDict({self._binary_ext: binary})
        kernel.metadata_group = {}
        kernel.kernel = binary
        kernel.module = kernel.function = kernel._run = kernel._module_pid = None
        return kernel

    def _metadata(self, own: Mapping[str, Json], digest: str) -> Any:
        values = {**self._common, **own}
        values.update(hash=digest, target=self._target, triton_version=self._version, extern_libs=[])
        names = tuple(sorted(values))
        made = self._types.get(names)
        if made is None:
            made = self._types[names] = namedtuple("KernelMetadata", names)
        return made(**values)


def triton_language(function: JITFunction) -> Any:
    """Triton or Gluon, as the function's own source class would say."""
    from triton.backends.compiler import Language

    return Language.GLUON if function.is_gluon() else Language.TRITON


def prime(kernels: Iterable[CompiledKernel]) -> int:
    """Load modules onto the current device, and make launchers, for those that are not loaded. Returns how many."""
    loaded = 0
    for kernel in kernels:
        if kernel.module is None:
            kernel._init_handles()
            loaded += 1
    return loaded


def choose(
    function: JITFunction, ordinal: int, key: list[Json], config: Mapping[str, Json], replace: bool = False
) -> str:
    """Make an autotuner of `function` take `config` under `key`. Returns why it could not; empty when it did."""
    tuners = triton_launches.tuners_of(function)
    if ordinal >= len(tuners):
        return f"there are {len(tuners)} autotuners around it, not {ordinal + 1}"
    tuner: Autotuner = tuners[ordinal]
    decoded = tuple(triton_jit.decode(k) for k in key)
    wanted = dict(config)
    for candidate in tuner.configs:
        if {k: triton_jit.encode(v) for k, v in triton_jit.config_kwargs(candidate).items()} == wanted:
            if replace or decoded not in tuner.cache:
                tuner.cache[decoded] = candidate
            return ""
    return "none of its configs is the one that was chosen"


def functions_in_memory(names: set[str]) -> dict[str, list[JITFunction]]:
    """Kernels made inside functions, which no module attribute reaches: found among all live objects."""
    found: dict[str, list[JITFunction]] = {}
    for value in gc.get_objects():
        if type(value) is JITFunction or (
            type(value).__module__.startswith("triton.") and isinstance(value, JITFunction)
        ):
            name = triton_jit.name_of(value)
            if name in names:
                found.setdefault(name, []).append(value)
    return found


MissHandler = Callable[[JITFunction, str, int], bool]


def on_miss(handler: MissHandler) -> Callable[[], None]:
    """Ask `handler(function, key, device)` before Triton compiles; True means that it has installed the kernel.

    The hook is on the miss path only: a launch that hits never comes here. Returns a function that takes it out.
    """
    original: Any = JITFunction._do_compile

    def _do_compile(self: JITFunction, key: str, signature: Any, device: int, *args: Any, **kwargs: Any) -> Any:
        if handler(self, key, device):
            kernel = self.device_caches[device][0].get(key)
            if kernel is not None:
                return kernel
        return original(self, key, signature, device, *args, **kwargs)

    JITFunction._do_compile = _do_compile

    def undo() -> None:
        JITFunction._do_compile = original

    return undo
