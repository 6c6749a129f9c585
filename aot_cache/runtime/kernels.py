"""Install a bundle's kernel units into Triton's in-memory caches, on the devices that the process uses."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aot_cache.artifact import at_start
from aot_cache.artifact.key import function_of
from aot_cache.artifact.manifest import ServedTuning, TuningChoice, UnitRow, served
from aot_cache.artifact.plan import Config, Encoded
from aot_cache.errors import one_line
from aot_cache.runtime.late_compile import Work
from aot_cache.runtime.ledger import Ledger
from aot_cache.store import Bundle
from aot_cache.upstream.codec import torch_ranks
from aot_cache.upstream.hooks import torch_capture

AnyTuning = ServedTuning | TuningChoice


@dataclass(kw_only=True)
class Report:
    """What `load`, `prime` and `ready` have done so far with one bundle. Counts are kernel units (specializations).

    Args:
        path: the bundle's file.
        digest: the bundle's digest.
        units: units in the bundle.
        installed: units in Triton's caches, on the devices used so far.
        primed: units of these that are loaded onto a device.
        modules: GPU modules loaded for them; units with equal binaries share one.
        pending: kernels whose module the process has not imported yet.
        not_imported: module → error, for modules of pending kernels that `ready` tried to import.
        stale: kernel → how its source here differs from the one that was built.
        unchosen: kernel and autotuner key → why the chosen config could not be used.
        other_kind: says that choices were not used because another kind of GPU measured them; else empty.
        devices: indices of the devices on which units are installed.
    """

    path: str
    digest: str
    units: int
    installed: int = 0
    primed: int = 0
    modules: int = 0
    pending: list[str] = field(default_factory=list)
    not_imported: dict[str, str] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)
    unchosen: dict[str, str] = field(default_factory=dict)
    other_kind: str = ""
    devices: list[int] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        return dict(self.__dict__)


def of_this_rank(ranks: Sequence[int]) -> bool:
    """Whether something that belongs to `ranks` (empty: to all ranks) belongs to this process's rank."""
    return not ranks or torch_ranks.own_or_first() in ranks


class _OnDevice:
    """What is installed on one device. Strong references to the kernels keep their modules loaded."""

    def __init__(self, installer: Any) -> None:
        self.installer = installer
        self.kernels: list[object] = []
        self.entries: list[tuple[object, list[tuple[str, object]]]] = []
        """(function, (Triton's key, kernel) of each unit)."""
        self.units: list[UnitRow] = []
        self.numbers: set[int] = set()


class KernelSet:
    """The kernel units of one bundle in this process.

    Args:
        strict: whether it was loaded with `strict`: its errors raise, now and later.
    """

    def __init__(self, bundle: Bundle, ledger: Ledger, strict: bool = False) -> None:
        self.bundle, self.strict = bundle, strict
        self.manifest = manifest = served(bundle)
        self.report = Report(path=str(bundle.path), digest=bundle.digest, units=len(manifest.units))
        self._ledger = ledger
        self._names = manifest.kernel_names()
        self._units: dict[int, list[int]] = {}
        for number, unit in enumerate(manifest.units):
            self._units.setdefault(unit.kernel, []).append(number)
        self._tunings: dict[int, list[ServedTuning]] = {}
        for tuning in manifest.tunings:
            self._tunings.setdefault(tuning.kernel, []).append(tuning)
        self._devices: dict[int, _OnDevice] = {}
        self._done: set[tuple[int, int, int]] = set()  # (pid, device, kernel number)
        self._made: dict[str, list[int]] = {}
        """Function name → numbers of its kernels, for functions that no module attribute holds: a factory may make several."""
        for number, name in enumerate(self._names):
            if "<locals>" in name or name != function_of(name):
                self._made.setdefault(function_of(name), []).append(number)
        self._hidden: dict[int, tuple[Any, ...]] = {}
        self._chosen: set[int] = set()
        self._took: list[tuple[Any, Sequence[Any]]] = []
        """(autotuner, key) of each choice that is in use."""
        self._lock = threading.RLock()

    def name_of(self, tuning: AnyTuning) -> str:
        """The name of a tuning's kernel."""
        return self._names[tuning.kernel]

    def is_chosen(self, tuning: AnyTuning) -> bool:
        """Whether a tuning's measured choice is in use here."""
        return tuning.choice is not None and not self.report.other_kind

    def choose_now(self, tuning: AnyTuning, config: Config) -> None:
        """Replace the default config by one that was just measured."""
        from aot_cache.upstream.codec import triton_kernel
        from aot_cache.upstream.hooks import triton_launches

        for function in self.functions_of(tuning):
            tuners = triton_launches.tuners_of(function, tuning.tuner)
            triton_kernel.choose(tuners, tuning.key, config, replace=True)

    def functions_of(self, tuning: AnyTuning) -> list[object]:
        """The functions in this process that a tuning belongs to; several if a factory makes them."""
        return self._built_from(tuning.kernel)

    def _built_from(self, number: int) -> list[object]:
        """The functions in this process that a kernel of the bundle was built from."""
        found = self._functions([number]).get(number, ())
        return [function for function in found if not self._differs(function, number)]

    def waiting(self, device: int) -> bool:
        """Whether any kernel of this bundle is not yet installed on `device`."""
        pid = os.getpid()
        return any((pid, device, n) not in self._done for n in range(len(self._names)))

    def install(self, device: int) -> int:
        """Install every kernel whose module the process has imported. Returns how many units are new.

        Raises:
            BundleCorrupt: an object's hash is wrong.
        """
        from aot_cache.upstream.codec import triton_kernel  # imports Triton, which the process has by now

        with self._lock:
            missing = [n for n in range(len(self._names)) if (os.getpid(), device, n) not in self._done]
            if not missing:
                return 0
            if device not in self._devices:
                current = triton_kernel.current_target()
                self._devices[device] = _OnDevice(triton_kernel.Installer(current, device, self.bundle))
                self.report.devices.append(device)
            found = self._functions(missing)
            self.bundle.require_sound()  # check the whole bundle first: all units are installed, or none
            before = self.report.installed
            for number, functions in found.items():
                self._install_fitting(functions, number, device)
            new = self.report.installed - before
            self.report.pending = [
                self._names[n] for n in range(len(self._names)) if not self._known(n) and self._mine(n)
            ]
            self._ledger.note("installed", "", torch_capture.capturing(), new)
            return new

    def import_pending(self) -> bool:
        """Import the modules of pending kernels whose package is already imported. Returns whether any was imported.

        Some libraries import a kernel's module at its first launch, which may be inside a capture. If a module raises, its
        kernels stay pending, and the library will meet the error itself.
        """
        came = False
        for name in sorted({name.partition(":")[0] for name in self.report.pending}):
            if name in sys.modules or name.partition(".")[0] not in sys.modules:
                continue
            try:
                importlib.import_module(name)
                came = True
            except Exception as error:
                self.report.not_imported[name] = one_line(error)
        return came

    def start_work(self, device: int, values: Mapping[str, Encoded]) -> list[Work]:
        """The specializations with these values of constants that are known only now, as far as they are not installed."""
        from aot_cache.upstream.codec import triton_jit, triton_kernel

        if device not in self._devices:
            return []
        mine = {variant.kernel for variant in self.manifest.at_start if self._mine(variant.kernel)}
        functions = {number: self._built_from(number) for number in mine}  # once: a factory's are looked for in memory
        out: dict[tuple[int, str], Work] = {}
        for variant in self.manifest.at_start:
            encoded = at_start.filled(variant, values)
            if encoded is None:
                continue
            pairs = [triton_jit.decode_pair(pair) for pair in encoded]
            options = {name: triton_jit.decode(value) for name, value in variant.options}
            key = triton_jit.memory_key(pairs, options)
            for function in functions.get(variant.kernel, ()):
                if not triton_kernel.has(function, device, key):
                    out[id(function), key] = Work(self._names[variant.kernel], function, pairs, options, key)
        return list(out.values())

    def learn(self, name: str, unit: Callable[[], Mapping[str, Any]]) -> dict[str, Encoded]:
        """The values of constants with which a launch of the kernel `name` is one of the declared specializations; empty if it
        is none. `unit` gives the launch in the form that plans use; it is called only for kernels with such constants."""
        named = [n for n, one in enumerate(self._names) if function_of(one) == name]
        variants = [variant for variant in self.manifest.at_start if variant.kernel in named]
        if not variants:
            return {}
        asked = unit()
        pairs = [pair["t"] for pair in asked["specialization"]]
        return at_start.learned(variants, pairs, asked["options"])

    def adopt(self, function: object, name: str, device: int) -> bool:
        """Install units for a kernel object that a factory has just made. Returns whether there were any."""
        if name not in self._made or device not in self._devices:
            return False
        with self._lock:
            return sum(self._install_fitting([function], number, device) for number in self._made[name]) > 0

    def unload(self) -> None:
        """Take all units and choices out of Triton's caches. What is loaded onto a device stays loaded."""
        if not self._devices:
            return
        from aot_cache.upstream.codec import triton_kernel

        with self._lock:
            for place in self._devices.values():
                for function, entries in place.entries:
                    place.installer.take_out(function, entries)
            for tuner, key in self._took:
                triton_kernel.forget_choice(tuner, key)
            self._took.clear()
            self._forget()

    def install_again(self) -> None:
        """Let the next `install` put everything in again: another bundle that had the same units was taken out."""
        with self._lock:
            self._forget()

    def _forget(self) -> None:
        self._devices.clear()
        self._done.clear()
        self._chosen.clear()
        self.report.devices.clear()
        self.report.installed = self.report.primed = 0

    def prime(self, device: int) -> int:
        """Load the installed units onto the current device, which must be `device`. Returns how many modules were loaded."""
        from aot_cache.upstream.codec import triton_kernel

        with self._lock:
            place = self._devices.get(device)
            if place is None:
                return 0
            modules = place.installer.prime(place.kernels, place.units)
            if modules:
                self._ledger.note("primed", "", torch_capture.capturing(), modules)
            self.report.primed = 0
            for one in self._devices.values():  # a unit of a factory's kernel may be installed more than once
                loaded = {id(unit) for unit, kernel in zip(one.units, one.kernels) if triton_kernel.is_loaded(kernel)}
                self.report.primed += len(loaded)
            self.report.modules += modules
            return int(modules)

    def _known(self, number: int) -> bool:
        return self._names[number] in self.report.stale or any(n == number for _, _, n in self._done)

    def _mine(self, number: int) -> bool:
        """Whether this process's rank launches the kernel; one that only other ranks launch is not missing here."""
        return of_this_rank(self.manifest.kernels[number].ranks)

    def _functions(self, numbers: list[int]) -> dict[int, list[object]]:
        from aot_cache.upstream.codec import triton_jit, triton_kernel

        out: dict[int, list[object]] = {}
        made: set[str] = set()
        for number in numbers:
            name = function_of(self._names[number])
            function = triton_jit.unwrap(triton_jit.find(name, loaded_only=True))
            if name in self._made:
                made.add(name)
            elif function is not None and triton_jit.name_of(function) == name:
                out[number] = [function]
        if made:
            for name, functions in triton_kernel.functions_in_memory(made).items():
                out |= {number: functions for number in self._made[name] if number in numbers}
        return out

    def _differs(self, function: object, number: int) -> str:
        """How a function differs from the one that a kernel was built from; empty if it does not."""
        from aot_cache.upstream.codec import triton_jit

        return triton_jit.closure_differs(function, self.manifest.kernels[number].closure)

    def _install_fitting(self, functions: list[object], number: int, device: int) -> int:
        """Install a kernel's units for those of `functions` (all have its name) whose source it was built from."""
        name = self._names[number]
        differs = {id(function): self._differs(function, number) for function in functions}
        fitting = [function for function in functions if not differs[id(function)]]
        if not fitting and function_of(name) not in self._made:
            # The module holds another function of this name. The launched one may be derived from it (xformers).
            self._made[name] = [number]
            return self._install_fitting(self._functions([number]).get(number, functions), number, device)
        others = [n for n in self._made.get(function_of(name), ()) if n != number]
        strange = [f for f in functions if f not in fitting and all(self._differs(f, other) for other in others)]
        why = self._unclear(fitting, number) or next((differs[id(f)] for f in strange if not fitting), "")
        if fitting or why:
            self._done.add((os.getpid(), device, number))
        if why:
            self.report.stale[name] = why
            return 0
        if fitting:
            self.report.stale.pop(name, None)
        return sum(self._install_kernel(function, number, device) for function in fitting)

    def _unclear(self, functions: list[object], number: int) -> str:
        """Why these functions cannot be told apart, although only one was built; empty if that is no problem."""
        from aot_cache.upstream.codec import triton_names

        found = {triton_names.hidden(function) for function in functions}
        found |= {self._hidden[number]} if number in self._hidden else set()
        if len(found) > 1:
            what = ", ".join(sorted({name for hidden in found for name, _ in hidden}))
            return f"{len(found)} kernels have this name and differ only in {what}"
        for hidden in found:
            self._hidden[number] = hidden
        return ""

    def _install_kernel(self, function: object, number: int, device: int) -> int:
        place = self._devices[device]
        units = [(n, self.manifest.units[n]) for n in self._units.get(number, [])]
        keyed = [(unit, unit.memory_key if unit.memory_key is not None else self._late_key(n)) for n, unit in units]
        found = [(unit, key) for unit, key in keyed if key is not None]
        kernels = place.installer.install(function, found)
        place.kernels += kernels
        place.entries.append((function, [(key, kernel) for (_, key), kernel in zip(found, kernels)]))
        place.units += [unit for unit, _ in found]
        if number not in place.numbers:
            place.numbers.add(number)
            self.report.installed += len(units)
        if number not in self._chosen:
            self._chosen.add(number)
            self._choose(function, number)
        return len(units)

    def _late_key(self, unit_number: int) -> str | None:
        """The in-memory key of a unit that takes another jit function as argument; None if that function has changed."""
        from aot_cache.errors import TraceError
        from aot_cache.upstream.codec import triton_jit

        late = self.manifest.late[unit_number]
        options = {name: triton_jit.decode(value) for name, value in late.options}
        try:
            specialization = [triton_jit.decode_pair(pair) for pair in late.specialization]
        except TraceError as error:
            self.report.stale[f"{self._names[self.manifest.units[unit_number].kernel]} (unit)"] = str(error)
            return None
        return triton_jit.memory_key(specialization, options)

    def _choose(self, function: object, number: int) -> None:
        """Give autotuners their configs: the measured choice if this kind of GPU measured it, else the first config that fits."""
        from aot_cache.upstream.codec import triton_kernel
        from aot_cache.upstream.hooks import triton_launches

        # Tunings of other ranks may have the same key, with other candidates. One that is for this rank goes before one for all.
        tunings = [tuning for tuning in self._tunings.get(number, []) if of_this_rank(tuning.ranks)]
        tunings.sort(key=lambda tuning: not tuning.ranks)
        tuners = {n: triton_launches.tuners_of(function, n) for n in {tuning.tuner for tuning in tunings}}
        same_kind = torch_capture.device_name() == self.manifest.target["name"]
        for tuning in tunings:
            config = self._config(tuning, same_kind)
            why = "none of its candidates compiled and fits" if config is None else ""
            if config is not None:
                why = triton_kernel.choose(tuners[tuning.tuner], tuning.key, config)
            if why:
                self.report.unchosen[f"{self._names[number]} {tuning.key}"] = why
            else:
                self._took += [(tuner, tuning.key) for tuner in tuners[tuning.tuner]]

    def _config(self, tuning: ServedTuning, same_kind: bool) -> Config | None:
        if tuning.choice is not None:
            if same_kind:
                return tuning.choice
            self.report.other_kind = (
                f"choices were measured on {self.manifest.target['name']}, "
                f"this is {torch_capture.device_name()}: the first config that fits is used"
            )
        return tuning.first
