"""The graphs of one bundle in this process: looked up when Dynamo would have to trace, then put into Dynamo's own cache.

Nothing is installed on code objects in advance. When Dynamo has no code for a call, graphs are looked up by the module of
the function and the digest of its code. Guards are built on that call, so that they see the inference mode, thread count and
replaced functions of this process. Dynamo caches a graph for the compile config whose call asked for it.

This module is imported inside an import of Dynamo, which may itself be inside one of Inductor. So modules that need more of
either are imported where they are used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import threading
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aot_cache.artifact.manifest import ServedGraph, graph_label, served
from aot_cache.errors import Incompatible
from aot_cache.runtime.ledger import Ledger
from aot_cache.store import Bundle, json_in
from aot_cache.upstream.codec import code_bytes, dynamo_globals, gpu_number, graph_names, python_code, torch_ranks
from aot_cache.upstream.hooks import torch_capture
from aot_cache.upstream.hooks.dynamo_frames import Found, Frame


@dataclass(kw_only=True)
class Loaded:
    """Counts of one bundle's graphs.

    Args:
        digest: of the bundle.
        graphs: number of graphs in the bundle.
        primed: number of compiled graphs that are loaded.
        found: graph (see `manifest.graph_label`) → how often Dynamo had no code for a call and got this graph. Later calls
            hit in Dynamo's own cache, which has no hook of ours, and are not counted.
        stale: function → how the source here differs from the one that was built.
    """

    digest: str
    graphs: int
    primed: int = 0
    found: dict[str, int] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)


_kept: list[Mapping[str, Any]] = []
"""Compiled graphs for a GPU that are unloaded."""


class GraphSet:
    """The graphs of one bundle."""

    def __init__(self, bundle: Bundle, ledger: Ledger, strict: bool = False) -> None:
        self.bundle, self._ledger, self.strict = bundle, ledger, strict
        self.manifest = served(bundle)
        self._graphs = self.manifest.graphs
        self.loaded = Loaded(digest=bundle.digest, graphs=len(self._graphs))
        self._by_code: dict[str, list[int]] = {}
        for number, graph in enumerate(self._graphs):
            self._by_code.setdefault(graph.code, []).append(number)
        self._artifacts = {name: digest for graph in self._graphs for name, digest in graph.graphs.items()}
        self._libraries = {source: digest for graph in self._graphs for source, digest in graph.libraries.items()}
        self._choices = {name: found for graph in self._graphs for name, found in graph.choices.items()}
        self._functions: dict[str, Any] = {}
        self._users: dict[str, dict[int, dict[str, Any]]] = {}
        """Compiled graph → the globals dictionaries that hold it, by their id."""
        self._codes: dict[str, types.CodeType] = {}
        self._changed: dict[str, str] | None = None
        self._numbers = itertools.count(1)
        self.on_cpu = self.manifest.on_cpu
        self._current_gpu: int | None = None
        self._lock = threading.RLock()

    def waiting(self) -> bool:
        """Whether any compiled graph is not loaded yet."""
        return self.loaded.primed < len(self._artifacts)

    def missing(self, name: str) -> str:
        """Why no graph of the function `module:qualname` would be found, as far as known; empty if one would.

        Sources are compared only the first time, and in `changed`: it is slow, and callers ask for many points.
        """
        if self._changed is None:
            self.changed()
        why = (self._changed or {}).get(name) or self.loaded.stale.get(name)
        return why or ("its graph is not loaded" if self.waiting() else "")

    def changed(self) -> dict[str, str]:
        """Function → how its source, or that of a function inlined into it, differs from the built one. Imported modules only."""
        digests: dict[str, dict[str, set[str]]] = {}
        found = [(graph.name, self._changed_source(graph, digests)) for graph in self._graphs]
        self._changed = {name: why for name, why in found if why}
        return self._changed

    def _changed_source(self, graph: ServedGraph, digests: dict[str, dict[str, set[str]]]) -> str:
        # If several functions have one name, e.g. made in a loop, only the last one can be reached in the module.
        alike = {other.code for other in self._graphs if other.name == graph.name}
        inlined = [(module, qualname, {digest}) for module, qualname, digest in graph.inlined]
        for module, qualname, wanted in [(graph.module, graph.function, alike), *inlined]:
            if module not in digests:
                digests[module] = python_code.digests(module)
            here = digests[module].get(qualname)
            if here and not here & wanted:
                return f"the source of {module}:{qualname} differs"
        return ""

    def wanted(self, code: types.CodeType) -> bool:
        """Whether the bundle has a graph for this code."""
        return python_code.digest(code) in self._by_code

    def find(self, frame: Frame) -> Found | None:
        """Code and guards for a call; None is a miss."""
        with self._lock:
            here = python_code.Functions()
            for number in self._by_code.get(python_code.digest(frame.code), ()):
                manager, _ = self._check(number, frame, here)
                if manager is not None:
                    code = self._install(number, frame)
                    label = graph_label(number)
                    self.loaded.found[label] = self.loaded.found.get(label, 0) + 1
                    self._ledger.note("graph", self._graphs[number].function, torch_capture.capturing())
                    return Found(code, manager, next(self._numbers))
        return None

    def reasons(self, frame: Frame) -> list[tuple[ServedGraph, str]]:
        """For each graph of this code, why the call does not fit; empty text if it does."""
        digest = python_code.digest(frame.code)
        here = python_code.Functions()
        if digest in self._by_code:
            return [(self._graphs[number], self._check(number, frame, here)[1]) for number in self._by_code[digest]]
        name = (frame.module, frame.name)
        why = f"the source of {':'.join(name)} differs"
        return [(graph, why) for graph in self._graphs if (graph.module, graph.function) == name]

    def unload(self) -> None:
        """Forget what is loaded, as far as nothing else uses it.

        Dynamo keeps what it has got: bytecode, guards, and in the globals of the code the compiled graph, which a later call with
        the same guards runs. A captured CUDA graph may launch any kernel that was loaded for it, so graphs for a GPU stay loaded.
        """
        with self._lock:
            if not self.on_cpu:
                _kept.append(self._functions)
            self._functions, self._users, self._codes = {}, {}, {}
            self.loaded.primed = 0

    def prime(self) -> int:
        """Load all compiled graphs, and their kernels onto the current device. Returns how many graphs were loaded now.

        Raises:
            Incompatible: a graph cannot run on the current GPU, because it is not GPU 0 of the process.
        """
        with self._lock:
            new = [self._function(name, at) for name, at in self._artifacts.items() if name not in self._functions]
            return len(new)

    @property
    def _gpu(self) -> int:
        """The number of the GPU for which all graphs are loaded: the one that is current at the first load."""
        if self._current_gpu is None and not self.on_cpu and torch_capture.cuda_is_up():
            self._current_gpu = torch_capture.device_number()
        return gpu_number.BUILT_FOR if self._current_gpu is None else self._current_gpu

    def _check(self, number: int, frame: Frame, here: python_code.Functions) -> tuple[object, str]:
        """(guard manager, "") if the call may run this graph, else (None, why not)."""
        graph = self._graphs[number]
        why = self._differs(graph, frame, here)
        if why:
            return None, why
        from aot_cache.upstream.codec import dynamo_guards
        from aot_cache.upstream.hooks import dynamo_guard_timing

        data = self.bundle.object(graph.guard_state)
        if not self.bundle.proven:
            graph_names.require_modules(graph.imports.values(), f"{short(graph)} of {self.bundle.path}")
            graph_names.require_pickle(data, f"the guards of {short(graph)} of {self.bundle.path}")
        dynamo_globals.install_modules(graph.imports, frame.f_globals)
        dynamo_globals.prepare_modules(module for module, _, _ in graph.inlined)
        facts = (graph.identities, graph.values)
        with dynamo_guard_timing.skipped():
            return dynamo_guards.build(data, *facts, frame.code, frame.f_globals, frame.f_locals, self._gpu)

    def _differs(self, graph: ServedGraph, frame: Frame, here: python_code.Functions) -> str:
        """How the call differs from what was built, checked without guards; empty if it does not."""
        if frame.module != graph.module:
            return f"its function is of module {graph.module}, but this one is of {frame.module}"
        if frame.wrapping != graph.wrapping:
            return f"it was built for torch.compile with {graph.wrapping}, but this is {frame.wrapping}"
        rank = graph.rank
        if rank not in (None, torch_ranks.own_or_first()):
            return f"it was built for rank {rank}, but this is rank {torch_ranks.own_or_first()}"
        mode = dynamo_globals.mode()
        if graph.mode.partition(" ")[0] != mode:
            return f"it was built for mode {graph.mode!r}, but this is {mode!r}"
        if frame.fullgraph and graph.resumes:
            return "it has a graph break, but fullgraph=True is set"
        found = dynamo_globals.settings()
        if hashlib.sha256(found.encode()).hexdigest() != graph.settings:
            return self._changed_settings(graph.settings, found)
        for module, qualname, digest in graph.inlined:
            if module not in sys.modules:  # the graph of another model whose forward has the same code
                return f"{module} is not imported"
            if not here.has(module, qualname, digest):
                why = f"the source of {module}:{qualname} differs"
                self.loaded.stale[graph.name] = why
                return why
        return self._names_a_gpu(graph, frame)

    def _names_a_gpu(self, graph: ServedGraph, frame: Frame) -> str:
        """Why a graph cannot run on another GPU than GPU 0: users' code names that one. Else empty."""
        if self._gpu == gpu_number.BUILT_FOR:
            return ""
        inlined = [code for module, name, _ in graph.inlined for code in python_code.codes(module).get(name, ())]
        if any(gpu_number.named_in(code) for code in (frame.code, *inlined)):
            return f"its code names GPU {gpu_number.BUILT_FOR}, and this process uses GPU {self._gpu}"
        return ""

    def _changed_settings(self, wanted: str, found: str) -> str:
        was, now = json_in(self.bundle.object(wanted)), json.loads(found)
        names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        return "Inductor's settings differ: " + ", ".join(f"{n} was {was.get(n)} and is {now.get(n)}" for n in names)

    def _install(self, number: int, frame: Frame) -> types.CodeType:
        """Put the functions that a graph's bytecode calls into its globals; returns the bytecode."""
        graph = self._graphs[number]
        for name, digest in graph.graphs.items():
            frame.f_globals[name] = self._function(name, digest)
            self._users.setdefault(name, {})[id(frame.f_globals)] = frame.f_globals
        for name, resume in graph.resumes.items():
            dynamo_globals.install_resume(name, self._code(resume.code, frame), resume.module, resume.free)
        return self._code(graph.bytecode, frame)

    def _code(self, digest: str, frame: Frame) -> types.CodeType:
        if digest not in self._codes:
            code = code_bytes.load(self.bundle.object(digest), self._gpu)
            if not self.bundle.proven:
                graph_names.require_code(code, frame.code, f"bytecode for {frame.name} in {self.bundle.path}")
            self._codes[digest] = code
        return self._codes[digest]

    def _function(self, name: str, digest: str) -> object:
        if name not in self._functions:
            self._load(name, digest, self._choices.get(name, {}))
        return self._functions[name]

    def _load(self, name: str, digest: str, choices: Mapping[str, int] | None) -> list[Any]:
        """Load a compiled graph. Returns those of its kernels that have several configs.

        Raises:
            Incompatible: it cannot run on this GPU of the process.
        """
        from aot_cache.upstream.hooks import inductor_artifact, inductor_cpp, inductor_tuning

        data = self.bundle.object(digest)
        if not self.bundle.proven:
            graph_names.require_pickle(data, f"graph {name} of {self.bundle.path}")
        with inductor_cpp.serving(self._library), inductor_tuning.choosing(choices, self._gpu) as several:
            try:
                made = inductor_artifact.load_graph(data, self._gpu)
            except ValueError as error:
                if self._gpu == gpu_number.BUILT_FOR:
                    raise
                expected = f"graph {name} of {self.bundle.path} to run on GPU {self._gpu} of the process"
                hint = "start each rank with a GPU of its own in CUDA_VISIBLE_DEVICES"
                raise Incompatible(expected, f"it was built for GPU {gpu_number.BUILT_FOR}: {error}", hint) from error
        self._functions[name] = dynamo_globals.not_traced(made)
        for names in self._users.get(name, {}).values():
            names[name] = self._functions[name]
        self.loaded.primed = len(self._functions)
        return several

    def load_again(self, name: str, choices: Mapping[str, int] | None) -> list[Any]:
        """Load a compiled graph with the chosen config numbers. If None, keep all configs: its next run measures them.

        Returns its `inductor_tuning.Kernel`s.
        """
        with self._lock:
            return self._load(name, self._artifacts[name], choices)

    def _library(self, source: str) -> bytes | None:
        digest = self._libraries.get(source)
        return self.bundle.object(digest) if digest is not None else None


def short(graph: ServedGraph) -> str:
    """A graph's short name, for people."""
    return next(iter(graph.graphs), graph.bytecode[:24])
