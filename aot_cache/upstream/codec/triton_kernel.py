"""Put compiled kernels into Triton's in-memory cache, as if this process had compiled them.

Upstream: `triton/compiler/compiler.py` (`CompiledKernel.__init__`, `_init_handles`), `triton/runtime/jit.py`
(`device_caches`), `triton/backends/nvidia/driver.py` (launchers).

The code that runs once for each unit is written for speed: a server loads hundreds, and the driver alone takes 40 microseconds
each. What units share (source, metadata, launcher, and the module if the binary is the same) is made once.
"""

from __future__ import annotations

import functools
import weakref
from collections import namedtuple
from collections.abc import Mapping, Sequence
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler.compiler import AsmDict
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from aot_cache.artifact.manifest import Served, UnitRow, served
from aot_cache.store import Bundle
from aot_cache.tested import minor
from aot_cache.upstream.codec import live_objects, triton_jit
from aot_cache.upstream.versions import UNLOADS_ON_DELETE

Json = Any

# In these versions a kernel unloads its module when it is deleted, so each kernel needs its own module.
_SHARES_MODULES = minor(triton.__version__) not in UNLOADS_ON_DELETE


def current_device() -> int:
    """Triton's current device. Asks the driver, so the process must have initialised CUDA."""
    return int(driver.active.get_current_device())


def current_target() -> GPUTarget:
    return driver.active.get_current_target()


def device_limits(device: int) -> dict[str, int]:
    """The properties of a real device, from Triton's driver."""
    return dict(driver.active.utils.get_device_properties(device))


class _Kernel(CompiledKernel):  # type: ignore[misc]  # Triton has no types
    """A kernel from a bundle. Attributes that only debugging tools read are made on demand."""

    bundle: Bundle
    binary_ext: str

    @functools.cached_property
    def kernel(self) -> bytes:
        return self.bundle.object(self.hash)

    @functools.cached_property
    def asm(self) -> AsmDict:
        return AsmDict({self.binary_ext: self.kernel})


class Installer:
    """Makes, installs and loads the kernels of one bundle on one device.

    Args:
        target: Triton's target of the current device.
        device: the current device.
        bundle: provides the binaries, and checks their hashes.
    """

    def __init__(self, target: GPUTarget, device: int, bundle: Bundle) -> None:
        manifest = served(bundle)
        self._bundle = bundle
        self._binaries = manifest.binaries
        backend = make_backend(target)
        self._binary_ext: str = backend.binary_ext
        self._device = device
        self._signatures = [[triton_jit.decode(ty) for ty in types] for types in manifest.signatures]
        self._metadata = _MetadataMaker(target, manifest, backend)
        self._sources: dict[tuple[int, int], ASTSource] = {}
        self._kernels: dict[tuple[int, int, int, int], CompiledKernel] = {}
        self._launchers: dict[Any, Any] = {}
        self._modules: dict[tuple[int, str, int], tuple[Any, ...]] = {}
        self._target = target

    def install(self, function: JITFunction, units: Sequence[tuple[UnitRow, str]]) -> list[CompiledKernel]:
        """Install units of one kernel, each under its Triton key. From now on ordinary launches find them.

        `prime` loads them onto the device.
        Units with equal results (they differ in an argument's alignment that nothing uses) share one kernel object.
        """
        cache, kernels = function.device_caches[self._device][0], []
        for unit, key in units:
            same = (id(function), unit.signature, unit.metadata, unit.binary)
            kernel = self._kernels.get(same)
            if kernel is None:
                kernel = self._kernels[same] = self._make(function, unit)
            cache.setdefault(key, kernel)
            kernels.append(kernel)
        return kernels

    def take_out(self, function: JITFunction, entries: Sequence[tuple[str, CompiledKernel]]) -> None:
        """Make ordinary launches miss units that `install` has put there: (Triton's key, kernel). What is loaded onto the device
        stays loaded, because a captured graph may launch it."""
        cache = function.device_caches[self._device][0]
        for key, kernel in entries:
            if cache.get(key) is kernel:
                del cache[key]

    def _make(self, function: JITFunction, unit: UnitRow) -> CompiledKernel:
        kernel = _Kernel.__new__(_Kernel)
        digest = self._binaries[unit.binary]
        metadata, packed = self._metadata.get(unit.metadata, digest)
        kernel.__dict__.update(
            metadata=metadata,
            packed_metadata=packed,
            src=self._source(function, unit.kernel, unit.signature),
            hash=digest,
            name=metadata.name,
            bundle=self._bundle,
            binary_ext=self._binary_ext,
            metadata_group={},
            module=None,
            function=None,
            _run=None,
            _module_pid=None,
        )
        return kernel

    def _source(self, function: JITFunction, number: int, signature: int) -> ASTSource:
        source = self._sources.get((number, signature))
        if source is None:
            # As ASTSource.__init__ does. Launches read no constants, so units with one signature share a source.
            source = self._sources[number, signature] = ASTSource.__new__(ASTSource)
            source.fn = function
            source.language = Language.GLUON if function.is_gluon() else Language.TRITON
            source.ext = "ttir"
            source.name = function.__name__
            source.signature = dict(zip((p.name for p in function.params), self._signatures[signature]))
            source.constants = {}
            source.attrs = {}
        return source

    def prime(self, kernels: list[CompiledKernel], units: Sequence[UnitRow]) -> int:
        """Load kernels onto the current device. Returns how many modules were loaded.

        Does what `CompiledKernel._init_handles` does, but shares launchers and modules. A kernel that does not fit the device
        is left unloaded, so that its launch raises Triton's own error.
        """
        driver_utils, properties = driver.active.utils, None
        modules = 0
        for kernel, (_, _, metadata_set, binary, _) in zip(kernels, units):
            if kernel.module is not None:
                continue
            if properties is None:
                properties = driver_utils.get_device_properties(self._device)
            metadata = kernel.metadata
            if metadata.shared > properties["max_shared_mem"] or (getattr(metadata, "tmem_size", None) or 0) > 512:
                continue
            place = (binary, kernel.name, metadata.shared)
            loaded = self._modules.get(place) if _SHARES_MODULES else None
            if loaded is None:
                loaded = self._load(kernel, driver_utils)
                modules += 1
                if _SHARES_MODULES:
                    self._modules[place] = loaded
            if metadata.num_warps * self._target.warp_size > loaded[4]:
                continue
            kernel._run = self._launcher(kernel, metadata_set)
            kernel.module, kernel.function, kernel.n_regs, kernel.n_spills, kernel.n_max_threads = loaded
        return modules

    def _load(self, kernel: CompiledKernel, driver_utils: Any) -> tuple[Any, ...]:
        _tell(_listeners(knobs.runtime.kernel_load_start_hook), kernel)
        binary = self._bundle.object(kernel.hash)  # a copy for the driver, not kept
        loaded = driver_utils.load_binary(kernel.name, binary, kernel.metadata.shared, self._device)
        _tell(_listeners(knobs.runtime.kernel_load_end_hook), kernel)
        return tuple(loaded)

    def _launcher(self, kernel: CompiledKernel, metadata_set: int) -> Any:
        same = (id(kernel.src), metadata_set)
        launcher = self._launchers.get(same)
        if launcher is None:
            launcher = self._launchers[same] = self._make_launcher(kernel)
        return launcher

    def _make_launcher(self, kernel: CompiledKernel) -> Any:
        metadata = kernel.metadata
        if getattr(metadata, "tensordesc_meta", None):
            return driver.active.launcher_cls(kernel.src, metadata)
        # All metadata that a launcher keeps; see CudaLauncher.__init__ and HIPLauncher.__init__.
        key = (id(kernel.src), *(getattr(metadata, name, None) for name in _LAUNCHER_FIELDS))
        launcher = self._launchers.get(key)
        if launcher is None:
            launcher = self._launchers[key] = driver.active.launcher_cls(kernel.src, metadata)
        return launcher


_LAUNCHER_FIELDS = (
    "num_ctas",
    "global_scratch_size",
    "global_scratch_align",
    "profile_scratch_size",
    "profile_scratch_align",
    "launch_cooperative_grid",
    "launch_pdl",
    "warp_size",
)


OURS = "_aot_cache_counts"
"""Attribute that marks aot-cache's own listeners. They need no notice of loads made here."""


def _listeners(chain: Any) -> list[Any]:
    """The listeners of one of Triton's hooks, without aot-cache's own."""
    return [call for call in getattr(chain, "calls", ()) if not hasattr(call, OURS)]


def _tell(listeners: list[Any], kernel: CompiledKernel) -> None:
    for listener in listeners:
        listener(kernel.module, kernel.function, kernel.name, kernel.metadata_group, kernel.hash)


class _MetadataMaker:
    """Makes Triton's `KernelMetadata` tuples for a bundle's units."""

    def __init__(self, target: GPUTarget, manifest: Served, backend: Any) -> None:
        common = {
            **manifest.metadata,
            "target": target,
            "triton_version": manifest.toolchain["triton"],
            "extern_libs": [],
            "hash": "",
        }
        kinds: dict[tuple[str, ...], Any] = {}
        self._sets = []
        for own in manifest.metadata_sets:
            values = {**common, **own}
            names = tuple(sorted(values))
            if names not in kinds:
                kinds[names] = namedtuple("KernelMetadata", names)  # as Triton makes it
            plain = kinds[names](**values)
            self._sets.append((plain, names.index("hash"), backend.pack_metadata(plain)))

    def get(self, number: int, digest: str) -> tuple[Any, Any]:
        """(metadata, packed metadata) for a metadata set and a binary."""
        plain, place, packed = self._sets[number]
        return plain._make((*plain[:place], digest, *plain[place + 1 :])), packed


def is_loaded(kernel: CompiledKernel) -> bool:
    """Whether a kernel's module is on its device."""
    return kernel.module is not None


def load_as_triton_does(kernel: CompiledKernel) -> None:
    """Load a kernel as Triton does. Benchmarks compare `Installer.prime` with this."""
    kernel._init_handles()


def choose(tuners: Sequence[Autotuner], key: Sequence[Json], config: Mapping[str, Json], replace: bool = False) -> str:
    """Make `tuners` use `config` for `key`. Tuners that create their configs when called use it then, if it is among them.

    Returns why no tuner can use it; empty if one does.
    """
    if not tuners:
        return "its autotuner is not there"
    decoded, wanted = tuple(triton_jit.decode(k) for k in key), dict(config)
    took = [_take(tuner, decoded, wanted, replace) for tuner in tuners]
    return "" if any(took) else "none of its configs is the one that was chosen"


def _take(tuner: Autotuner, key: tuple[Any, ...], wanted: dict[str, Json], replace: bool) -> bool:
    number = _place(tuner.configs, wanted)
    if number is not None:
        if replace or key not in tuner.cache:
            tuner.cache[key] = tuner.configs[number]
        return True
    if not _makes_configs(tuner):
        return False
    if replace:
        forget(tuner, key)
    _choices.setdefault(tuner, {}).setdefault(key, wanted)
    return True


def forget(tuner: Autotuner, key: tuple[Any, ...]) -> None:
    """Make a tuner choose again for `key`."""
    tuner.cache.pop(key, None)
    _choices.get(tuner, {}).pop(key, None)


def forget_choice(tuner: Autotuner, key: Sequence[Json]) -> None:
    """Undo `choose` for one tuner."""
    forget(tuner, tuple(triton_jit.decode(k) for k in key))


def waiting_choice(tuner: Autotuner, key: tuple[Any, ...], configs: list[Any]) -> int | None:
    """The index in `configs`, which the tuner has just created, of the config that `choose` set for `key`; or None."""
    wanted = _choices.get(tuner, {}).get(key)
    return None if wanted is None else _place(configs, wanted)


def _place(configs: list[Any], wanted: dict[str, Json]) -> int | None:
    return next((number for number, c in enumerate(configs) if triton_jit.encoded_config(c) == wanted), None)


_choices: weakref.WeakKeyDictionary[Autotuner, dict[tuple[Any, ...], dict[str, Json]]] = weakref.WeakKeyDictionary()
"""Choices for tuners that create their configs at the first call, with hooks that no bundle could contain (gemlite)."""


def _makes_configs(tuner: Autotuner) -> bool:
    """Whether a tuner's pruning may return configs that are not in `tuner.configs`."""
    return getattr(tuner, "early_config_prune", None) is not None


def functions_in_memory(names: set[str]) -> dict[str, list[JITFunction]]:
    """Name → kernels of that name, found among all live objects. For kernels that no module attribute holds."""
    found: dict[str, list[JITFunction]] = {}
    for value in live_objects.all_objects():
        if issubclass(type(value), JITFunction):  # isinstance on the value itself would load lazy proxies
            name = triton_jit.name_of(value)
            if name in names:
                found.setdefault(name, []).append(value)
    return found


def compile_now(
    function: JITFunction, pairs: Sequence[Any], options: Mapping[str, Any], key: str, device: int, target: GPUTarget
) -> CompiledKernel:
    """Compile a specialization as a launch on `device` would, and put it where launches find it, without loading it.

    May be called from any thread (the current device is a thread's own, so it is given). Triton's disk cache is used.

    Raises:
        Exception: whatever Triton's compiler raises.
    """
    kernel = triton_jit.compile_for(function, list(pairs), dict(options), target, device)
    return function.device_caches[device][0].setdefault(key, kernel)


def has(function: JITFunction, device: int, key: str) -> bool:
    """Whether the kernel for `key` is installed."""
    return key in function.device_caches[device][0]
