"""A bundle's manifest as typed data, and its two parts in the file.

Every server start parses the header, so it is compact and holds only what loading needs (`Served`): a unit is four numbers
and Triton's own key. What only `inspect`, `tune` and `diff` need (the points that reach a unit, losing candidates,
measurements) is one object of the bundle, the details, hashed like the others. `split` and `whole` convert between the two
forms. Only this module reads or writes their JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from aot_cache.artifact import engine_cache
from aot_cache.artifact.engine_cache import EngineCache
from aot_cache.artifact.plan import CallPlan, CasePlan, Config, Encoded, Failure, Origin, Pair
from aot_cache.artifact.reached import Reached
from aot_cache.errors import BundleCorrupt
from aot_cache.store import Bundle, JsonObject, JsonValue, json_in

KIND = "units"
"""`Manifest.kind` of a bundle of kernels and graphs."""

T = TypeVar("T")


# --- kernels ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel that has units in the bundle.

    Args:
        name: `module:qualname`; with `@` and the start of the source digest where several kernels share it (`key.variant`).
        closure: its source closure, see `upstream.codec.triton_jit.closure`.
        ranks: the ranks that launch it; empty if all do.
    """

    name: str
    closure: JsonObject
    ranks: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class KernelUnit:
    """One specialization of a kernel, compiled.

    Args:
        kernel: number in `Manifest.kernels`.
        key: its key in the store.
        memory_key: Triton's in-memory key. None if only the serving process can compute it: the unit takes another jit
            function as an argument, and that function's key depends on its position in its file.
        specialization: Triton's (type, value) for each parameter, encoded.
        options: launch options.
        option_order: their names in the order in which they were passed, which is part of Triton's key.
        object: digest of the binary.
        metadata: Triton's metadata of the binary, without what all units have in common (`Manifest.metadata`).
        via: `[tuning, candidate]` pairs through which it is launched; `[-1, -1]` is a launch without a tuner.
        reached: the points that reach it.
        ranks: the ranks that launch it; empty if all do.
    """

    kernel: int
    key: str
    memory_key: str | None
    specialization: Sequence[Pair]
    options: Mapping[str, Encoded]
    option_order: Sequence[str]
    object: str
    metadata: Mapping[str, Any]
    via: Sequence[Sequence[int]]
    reached: Reached
    ranks: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class StartVariant:
    """A specialization with constants that are known only when a server starts, see `artifact.at_start`.

    Args:
        kernel: number in `Manifest.kernels`.
        arguments: name of each such constant → its position.
        specialization: (type, value) pairs, encoded; the value of such a constant is None.
        options: (name, value) launch options, in the order in which they were passed.
    """

    kernel: int
    arguments: Mapping[str, int]
    specialization: Sequence[Sequence[Any]]
    options: Sequence[tuple[str, Encoded]]


@dataclass(frozen=True, kw_only=True)
class ServedTuning:
    """One choice of an autotuner: the part that loading needs.

    Args:
        kernel: number in `Manifest.kernels`.
        tuner: index of the autotuner among those around the kernel.
        key: the tuner's key, encoded.
        choice: the config that was measured fastest; None without a measurement.
        first: the config that is used without a measurement: the first that compiled and fits, or None.
        ranks: the ranks that need it; empty if all do.
    """

    kernel: int
    tuner: int
    key: Sequence[Encoded]
    choice: Config | None
    first: Config | None = None
    ranks: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class TuningChoice:
    """One choice of an autotuner: `ServedTuning` with all candidates.

    Args:
        measured: device, method and spread of the measurement; empty without one.
        reached: the points that need it.
        default: index of the first candidate that compiled and fits, or None.
    """

    kernel: int
    tuner: int
    key: Sequence[Encoded]
    candidates: Sequence[Config]
    choice: Config | None
    measured: JsonObject
    reached: Reached
    default: int | None
    ranks: Sequence[int] = ()

    def served(self) -> ServedTuning:
        first = None if self.default is None else self.candidates[self.default]
        return ServedTuning(
            kernel=self.kernel, tuner=self.tuner, key=self.key, choice=self.choice, first=first, ranks=self.ranks
        )


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A unit that was left out because it does not fit the target; its autotuner skips it, too."""

    kernel: str
    unit: str
    via: Sequence[Sequence[int]]
    why: str


@dataclass(frozen=True, kw_only=True)
class NativeModule:
    """A C module that Triton would build at run time.

    Args:
        name: the name that Triton gives it.
        source: digest of its source, by which Triton looks it up.
        suffix: the interpreter's extension suffix, such as `.cpython-311-x86_64-linux-gnu.so`.
        object: digest of its bytes.
    """

    name: str
    source: str
    suffix: str
    object: str


# --- graphs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Resume:
    """A resume function: the rest of a function after a graph break. `free` says whether it has free variables."""

    module: str
    code: str
    free: bool


@dataclass(frozen=True, kw_only=True)
class ServedGraph:
    """The bytecode that Dynamo made of one function for one call signature: the part that loading needs.

    Digests name objects of the bundle, except where noted.

    Args:
        module, function: the function's module and qualname.
        code: digest of its code (`upstream.codec.python_code.digest`), by which graphs are looked up; names no object.
        mode: grad mode and autocast.
        wrapping: the compile config: backend, options and dynamic of its `torch.compile`.
        settings: digest of Inductor's settings.
        guard_state: digest of the guards. `identities` and `values` are those that compare with objects of the process, as
            `(kind of guard, expression, text)`.
        bytecode: digest of the code that Dynamo made.
        graphs: name in the bytecode → digest of a compiled graph.
        choices: compiled graph → kernel → number of the config that was measured fastest.
        libraries: digest of a C++ source → digest of the shared library.
        imports: name in the bytecode → module.
        resumes: name in the bytecode → the rest of the function after a graph break.
        inlined: (module, qualname, digest of its code) of functions that were traced with it.
        rank: the only rank that may run it; None if all may.
    """

    module: str
    function: str
    code: str
    mode: str
    wrapping: JsonObject | None
    settings: str
    guard_state: str
    identities: Sequence[Sequence[str]]
    values: Sequence[Sequence[str]]
    bytecode: str
    graphs: Mapping[str, str]
    choices: Mapping[str, Mapping[str, int]]
    libraries: Mapping[str, str]
    imports: Mapping[str, str]
    resumes: Mapping[str, Resume]
    inlined: Sequence[Sequence[str]]
    rank: int | None = None

    @property
    def name(self) -> str:
        """`module:qualname` of the function."""
        return f"{self.module}:{self.function}"

    def objects(self) -> set[str]:
        """Digests of all objects that it refers to."""
        resumes = [resume.code for resume in self.resumes.values()]
        return {
            self.guard_state,
            self.bytecode,
            self.settings,
            *self.graphs.values(),
            *self.libraries.values(),
            *resumes,
        }


@dataclass(frozen=True, kw_only=True)
class SeveralConfigs:
    """An Inductor kernel that is compiled with several configs; each config is given as text."""

    kernel: str
    configs: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Graph(ServedGraph):
    """`ServedGraph` with what `inspect` shows.

    Args:
        line: the function's line in its file.
        guards: all guards, as Python expressions.
        dynamic: expression of an argument → [dimension, low, high] of its dynamic sizes (see `plan.CallPlan`).
        kernels: names of the kernels that it launches.
        candidates: compiled graph → its kernels with several configs, by key.
        reached: the points at which it is called.
        per_rank: why it is built for one rank only; empty if it is for all.
    """

    line: int
    guards: Sequence[str]
    dynamic: Mapping[str, Sequence[Sequence[int]]]
    kernels: Sequence[str]
    candidates: Mapping[str, Mapping[str, SeveralConfigs]]
    reached: Reached = field(default_factory=dict)
    per_rank: str = ""


# --- the whole, and what is served ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The full manifest of a bundle.

    Args:
        kind: `KIND`.
        recipe: the recipe's name; `spec` is the text that loads it.
        origin: see `plan.Origin`.
        ranks: the world size that the bundle is for.
        target: the target's properties (`target.Target.properties`).
        toolchain: what the bytes of all kernels depend on (`key.toolchain_parts`).
        metadata: the part of Triton's metadata that all units have in common.
        graph_key: what all graphs depend on (`key.graph_parts`); empty without graphs.
        complete: whether nothing failed.
        at_start: what the server compiles when it knows the values of some constants; left out of the JSON if empty.
        engine_caches: entries of an engine's own compile cache; left out of the JSON if empty.
        objects: digest → size in bytes of every object in the file; empty until it is written.
    """

    kind: str
    recipe: str
    spec: str
    origin: Origin
    ranks: int
    target: Mapping[str, Any]
    toolchain: Mapping[str, Any]
    cases: Sequence[CasePlan]
    kernels: Sequence[Kernel]
    metadata: Mapping[str, Any]
    units: Sequence[KernelUnit]
    tunings: Sequence[TuningChoice]
    pruned: Sequence[Pruned]
    failed: Sequence[Failure]
    native: Sequence[NativeModule]
    graph_key: Mapping[str, Any]
    graphs: Sequence[Graph]
    calls: Sequence[CallPlan]
    complete: bool
    at_start: Sequence[StartVariant] = ()
    engine_caches: Sequence[EngineCache] = ()
    objects: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in plain(self).items() if name not in _LEFT_OUT or value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """Raises KeyError, TypeError or ValueError if `data` does not have the form that `to_json` writes."""
        parts = dict(data)
        for name, part in _PARTS.items():
            parts[name] = [_known(part, one) for one in parts[name]]
        parts["graphs"] = [graph_from_json(Graph, one) for one in parts["graphs"]]
        parts["at_start"] = [_known(StartVariant, one) for one in parts.get("at_start", ())]
        parts["engine_caches"] = [engine_cache.from_json(one) for one in parts.get("engine_caches", ())]
        return _known(cls, parts)


class UnitRow(NamedTuple):
    """A unit in the header: indices into `kernels`, `signatures`, `metadata_sets` and `binaries`, and its key."""

    kernel: int
    signature: int
    metadata: int
    binary: int
    memory_key: str | None


@dataclass(frozen=True, kw_only=True)
class LateKey:
    """The input from which the serving process computes a unit's missing key: (type, value) pairs, and (name, value) options."""

    specialization: Sequence[Sequence[Any]]
    options: Sequence[tuple[str, Encoded]]


def _need_what_hosts_are_compared_with(parts: Mapping[str, Any]) -> None:
    """Raises KeyError or TypeError if it is not in a header's parts."""
    needed = {"target": ["backend"], "toolchain": ["triton"]}
    if parts["target"]["backend"] != "cpu":
        needed["target"] += ["arch", "warp_size", "name"]
    for name, keys in needed.items():
        lost = [key for key in keys if key not in parts[name]]
        if lost:
            raise KeyError(f"{name} without {', '.join(lost)}")
    if not all(isinstance(native.suffix, str) for native in parts["native"]):
        raise TypeError("the suffix of a module is no text")


@dataclass(frozen=True, kw_only=True)
class Served:
    """The header of a bundle, which is all that loading reads.

    Args:
        signatures: lists of parameter types.
        metadata_sets: Triton's metadata of a binary, without what is in `metadata`.
        binaries: digests.
        late: number of a unit without a key → what its key is computed from.
        details: digest of the object with the rest of the manifest.

    The other fields are as in `Manifest`.
    """

    kind: str
    recipe: str
    spec: str
    origin: Origin
    ranks: int
    target: Mapping[str, Any]
    toolchain: Mapping[str, Any]
    kernels: Sequence[Kernel]
    metadata: Mapping[str, Any]
    units: Sequence[UnitRow]
    signatures: Sequence[Sequence[Any]]
    metadata_sets: Sequence[Mapping[str, Any]]
    binaries: Sequence[str]
    late: Mapping[int, LateKey]
    tunings: Sequence[ServedTuning]
    native: Sequence[NativeModule]
    graph_key: Mapping[str, Any]
    graphs: Sequence[ServedGraph]
    complete: bool
    details: str
    at_start: Sequence[StartVariant] = ()
    engine_caches: Sequence[EngineCache] = ()
    objects: Mapping[str, int] = field(default_factory=dict)

    @property
    def on_cpu(self) -> bool:
        return bool(self.target["backend"] == "cpu")

    def kernel_names(self) -> list[str]:
        """Kernel names, in the order of their numbers."""
        return [kernel.name for kernel in self.kernels]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Served:
        """Raises KeyError, TypeError or ValueError if `data` does not have the form that `split` writes."""
        parts = dict(data)
        parts["kernels"] = [_known(Kernel, one) for one in parts["kernels"]]
        parts["units"] = [UnitRow(*one) for one in parts["units"]]
        parts["late"] = {int(number): _known(LateKey, one) for number, one in parts["late"].items()}
        parts["tunings"] = [_known(ServedTuning, one) for one in parts["tunings"]]
        parts["native"] = [_known(NativeModule, one) for one in parts["native"]]
        parts["graphs"] = [graph_from_json(ServedGraph, one) for one in parts["graphs"]]
        parts["at_start"] = [_known(StartVariant, one) for one in parts.get("at_start", ())]
        parts["engine_caches"] = [engine_cache.from_json(one) for one in parts.get("engine_caches", ())]
        _need_what_hosts_are_compared_with(parts)
        return _known(cls, parts)


_PARTS: Mapping[str, type] = {
    "cases": CasePlan,
    "kernels": Kernel,
    "units": KernelUnit,
    "tunings": TuningChoice,
    "pruned": Pruned,
    "failed": Failure,
    "native": NativeModule,
    "calls": CallPlan,
}
_HEADER_OF_GRAPH = frozenset(one.name for one in fields(ServedGraph))
_IN_BOTH = tuple(one.name for one in fields(Manifest) if one.name in {part.name for part in fields(Served)})
_UNIT_DETAILS = ("key", "specialization", "options", "option_order", "via", "reached", "ranks")
_TUNING_DETAILS = ("candidates", "default", "measured", "reached")
_DETAILS = ("cases", "pruned", "failed", "calls")
_LEFT_OUT = ("objects", "at_start", "engine_caches")
"""Fields that are not written if they are empty."""


def lacking(header: Mapping[str, object]) -> list[str]:
    """Names of fields that this version needs and the header lacks."""
    needed = [one.name for one in fields(Served) if one.name not in _LEFT_OUT]
    return [name for name in needed if name not in header]


def served(bundle: Bundle) -> Served:
    """The parsed header of a bundle; cached per bundle.

    Raises:
        BundleCorrupt: its header does not have the form that this version writes.
    """
    known = _served.get(bundle)
    if known is not None:
        return known
    try:
        return _served.setdefault(bundle, Served.from_json(bundle.manifest))
    except _OTHER_FORM as error:
        raise _misfit(bundle, f"its header has another form ({error})") from error


def split(manifest: Manifest) -> tuple[dict[str, Any], bytes]:
    """(header, bytes of the details object) of a manifest, as they are written."""
    signatures, metadata_sets, binaries = _Table(), _Table(), _Table()
    late: dict[str, Any] = {}
    rows = []
    for number, unit in enumerate(manifest.units):
        pairs = [pair["t"] for pair in unit.specialization]
        if unit.memory_key is None:
            options = [[name, unit.options[name]] for name in unit.option_order]
            late[str(number)] = {"specialization": pairs, "options": options}
        rows.append(
            [
                unit.kernel,
                signatures.number([first for first, _ in pairs]),
                metadata_sets.number(unit.metadata),
                binaries.number(unit.object),
                unit.memory_key,
            ]
        )
    graphs, tunings = [plain(graph) for graph in manifest.graphs], [plain(tuning) for tuning in manifest.tunings]
    details = {name: plain(getattr(manifest, name)) for name in _DETAILS}
    details["graphs"] = [{k: v for k, v in graph.items() if k not in _HEADER_OF_GRAPH} for graph in graphs]
    details["units"] = [{k: plain(getattr(unit, k)) for k in _UNIT_DETAILS} for unit in manifest.units]
    details["tunings"] = [{k: tuning[k] for k in _TUNING_DETAILS} for tuning in tunings]
    data = json.dumps(details, sort_keys=True, separators=(",", ":")).encode()
    header = {name: plain(getattr(manifest, name)) for name in _IN_BOTH if name not in ("objects", "units", "graphs")}
    for name in ("at_start", "engine_caches"):
        if not header[name]:
            del header[name]
    header |= {
        "units": rows,
        "late": late,
        "signatures": signatures.values,
        "metadata_sets": metadata_sets.values,
        "binaries": binaries.values,
        "tunings": [plain(tuning.served()) for tuning in manifest.tunings],
        "graphs": [{k: v for k, v in graph.items() if k in _HEADER_OF_GRAPH} for graph in graphs],
        "details": hashlib.sha256(data).hexdigest(),
    }
    return header, data


def whole(bundle: Bundle) -> Manifest:
    """The full manifest of a bundle: the inverse of `split`. Cached per bundle; treat it as read-only.

    Raises:
        BundleCorrupt: the details are missing, do not hash, or do not fit the header.
    """
    known = _whole.get(bundle)
    if known is not None:
        return known
    header = dict(bundle.manifest)
    try:
        details = json_in(bundle.object(header["details"]))
        sets, binaries = header["metadata_sets"], header["binaries"]
        units = [
            {"kernel": kernel, "metadata": sets[metadata], "object": binaries[binary], "memory_key": key, **more}
            for (kernel, _, metadata, binary, key), more in zip(header["units"], details["units"], strict=True)
        ]
        tunings = [
            {**{k: v for k, v in tuning.items() if k != "first"}, **more}
            for tuning, more in zip(header["tunings"], details["tunings"], strict=True)
        ]
        graphs = [{**graph, **more} for graph, more in zip(header["graphs"], details["graphs"], strict=True)]
        both = {name: header[name] for name in _IN_BOTH if name in header or name not in _LEFT_OUT}
        rest = {name: details[name] for name in _DETAILS}
        found = Manifest.from_json({**both, **rest, "units": units, "tunings": tunings, "graphs": graphs})
        return _whole.setdefault(bundle, found)
    except _OTHER_FORM as error:
        raise _misfit(bundle, f"its details do not fit its manifest ({error})") from error


_served: WeakKeyDictionary[Bundle, Served] = WeakKeyDictionary()
_whole: WeakKeyDictionary[Bundle, Manifest] = WeakKeyDictionary()
_OTHER_FORM = (KeyError, IndexError, TypeError, ValueError, AttributeError)


def _misfit(bundle: Bundle, found: str) -> BundleCorrupt:
    return BundleCorrupt(f"bundle {bundle.path} is damaged: {found}", hint="build it again")


def _known(kind: type[T], data: Mapping[str, Any]) -> T:
    """Make an object of one of the types above. Unknown fields are ignored: a newer version may write more."""
    return kind(**{one.name: data[one.name] for one in fields(kind) if one.name in data})  # type: ignore[arg-type]


def graph_from_json(kind: type[T], data: Mapping[str, Any]) -> T:
    """A graph of type `kind`: `ServedGraph`, or a subclass of it. Raises like `Manifest.from_json`."""
    parts = {**data, "resumes": {name: _known(Resume, one) for name, one in data["resumes"].items()}}
    if "candidates" in parts:
        parts["candidates"] = {
            name: {key: _known(SeveralConfigs, one) for key, one in found.items()}
            for name, found in parts["candidates"].items()
        }
    return _known(kind, parts)


def plain(value: Any) -> Any:
    """A value of this module's types, or of the plan's, as JSON values."""
    if hasattr(value, "__dataclass_fields__"):
        found = {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
        return {k: v for k, v in found.items() if v is not None} if isinstance(value, Failure) else found
    if isinstance(value, Mapping):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return value


class _Table:
    """Distinct values, numbered in the order in which they first occur."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.values: list[JsonValue] = []

    def number(self, value: Any) -> int:
        text = json.dumps(value, sort_keys=True)
        if text not in self._numbers:
            self._numbers[text] = len(self.values)
            self.values.append(value)
        return self._numbers[text]


# --- labels for display -----------------------------------------------------------------------------------------------


def graph_label(number: int) -> str:
    """Label of a bundle's graph, for display and in the ledger: `g1` is the first in the manifest."""
    return f"g{number + 1}"


def call_label(number: int) -> str:
    """Label of a plan's compiled call, which has no graph yet: `c1` is the first in the plan."""
    return f"c{number + 1}"


def unit_label(number: int) -> str:
    """Label of a bundle's specialization: `k1` is the first in the manifest."""
    return f"k{number + 1}"
