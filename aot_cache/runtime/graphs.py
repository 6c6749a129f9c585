"""The graphs of one bundle in this process: found where Dynamo would have to trace, put into Dynamo's own cache.

Nothing is installed on code objects beforehand. A call that Dynamo has no code for is looked up here by what its function
does (module and digest of its code); guards are built from that very call, so that inference mode, thread counts and
functions that were replaced are seen as they are. What fits belongs, in Dynamo's cache, to the wrapping that asked.

This module is imported inside somebody's import of Dynamo, which may be inside one of Inductor: rooms that need more of
either are imported when they are used.
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
from aot_cache.store import Bundle
from aot_cache.upstream.codec import code_bytes, dynamo_globals, python_code, torch_ranks
from aot_cache.upstream.hooks import torch_capture
from aot_cache.upstream.hooks.dynamo_frames import Found, Frame


@dataclass(kw_only=True)
class Loaded:
    """Counts of one bundle's graphs.

    Args:
        digest: of the bundle.
        graphs: how many it has.
        primed: compiled graphs that are loaded.
        found: graph (see `manifest.graph_label`) → how often Dynamo had no code for a call and was given this graph. Later
            calls hit in Dynamo's own cache, where nothing of ours is, and are not counted.
        stale: graph → why its source here is not what was built.
    """

    digest: str
    graphs: int
    primed: int = 0
    found: dict[str, int] = field(default_factory=dict)
    stale: dict[str, str] = field(default_factory=dict)


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
        """Compiled graph → the globals that name it, by their id."""
        self._codes: dict[str, types.CodeType] = {}
        self._changed: dict[str, str] | None = None
        self._numbers = itertools.count(1)
        self.on_cpu = self.manifest.on_cpu
        self._lock = threading.RLock()

    def waiting(self) -> bool:
        """Whether any compiled graph is not loaded yet."""
        return self.loaded.primed < len(self._artifacts)

    def missing(self, name: str) -> str:
        """Why a graph of the function `module:qualname` would not be found, as far as is known; empty when it would.

        Sources are looked at the first time, and by `changed`: it takes a while, and many points are asked for.
        """
        if self._changed is None:
            self.changed()
        why = (self._changed or {}).get(name) or self.loaded.stale.get(name)
        return why or ("its graph is not loaded" if self.waiting() else "")

    def changed(self) -> dict[str, str]:
        """Function → why its source, or that of what is inlined into it, is not what was built; of modules that are imported."""
        digests: dict[str, dict[str, set[str]]] = {}
        found = [(graph.name, self._changed_source(graph, digests)) for graph in self._graphs]
        self._changed = {name: why for name, why in found if why}
        return self._changed

    def _changed_source(self, graph: ServedGraph, digests: dict[str, dict[str, set[str]]]) -> str:
        # Of several functions of one name, as a loop makes them, the last one is found in its module.
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
        """Whether any graph may be for this code."""
        return python_code.digest(code) in self._by_code

    def find(self, frame: Frame) -> Found | None:
        """Code and guards for a call, or None: a miss."""
        with self._lock:
            for number in self._by_code.get(python_code.digest(frame.code), ()):
                manager, _ = self._check(number, frame)
                if manager is not None:
                    code = self._install(number, frame)
                    label = graph_label(number)
                    self.loaded.found[label] = self.loaded.found.get(label, 0) + 1
                    self._ledger.note("graph", self._graphs[number].function, torch_capture.capturing())
                    return Found(code, manager, next(self._numbers))
        return None

    def reasons(self, frame: Frame) -> list[tuple[ServedGraph, str]]:
        """For each graph of this code, why the call does not fit it; empty text where it does."""
        digest = python_code.digest(frame.code)
        if digest in self._by_code:
            return [(self._graphs[number], self._check(number, frame)[1]) for number in self._by_code[digest]]
        name = (frame.module, frame.name)
        why = f"the source of {':'.join(name)} differs"
        return [(graph, why) for graph in self._graphs if (graph.module, graph.function) == name]

    def prime(self) -> int:
        """Load all compiled graphs, and their kernels onto the current device. Returns how many are new.

        Raises:
            Incompatible: the current GPU is not the first that the process sees.
        """
        with self._lock:
            self._check_device()
            new = [self._function(name, at) for name, at in self._artifacts.items() if name not in self._functions]
            return len(new)

    def _check_device(self) -> None:
        """Dynamo's guards and Inductor's code hold the number of the GPU, which was 0 when they were built."""
        if self.on_cpu or torch_capture.device_number() == 0:
            return
        expected = f"GPU 0 as the current GPU of the process, for the graphs of {self.bundle.path}"
        hint = "start each rank with a GPU of its own in CUDA_VISIBLE_DEVICES"
        raise Incompatible(expected, f"GPU {torch_capture.device_number()}", hint)

    def _check(self, number: int, frame: Frame) -> tuple[object, str]:
        """(guard manager, "") when the call may run this graph, else (None, why not)."""
        graph = self._graphs[number]
        why = self._differs(number, graph, frame)
        if why:
            return None, why
        from aot_cache.upstream.codec import dynamo_guards

        dynamo_globals.install_modules(graph.imports, frame.f_globals)
        dynamo_globals.prepare_modules(module for module, _, _ in graph.inlined)
        data = self.bundle.object(graph.guard_state)
        return dynamo_guards.build(data, graph.identities, graph.values, frame.code, frame.f_globals, frame.f_locals)

    def _differs(self, number: int, graph: ServedGraph, frame: Frame) -> str:
        """How the call differs from what was built, as far as it can be told without guards."""
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
        here = {module: python_code.digests(module) for module in {module for module, _, _ in graph.inlined}}
        for module, qualname, digest in graph.inlined:
            if module not in sys.modules:  # the graph of another model that calls its forward in the same way
                return f"{module} is not imported"
            if digest not in here[module].get(qualname, ()):
                why = f"the source of {module}:{qualname} differs"
                self.loaded.stale[graph.name] = why
                return why
        return ""

    def _changed_settings(self, wanted: str, found: str) -> str:
        was, now = json.loads(self.bundle.object(wanted)), json.loads(found)
        names = sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name))
        return "Inductor's settings differ: " + ", ".join(f"{n} was {was.get(n)} and is {now.get(n)}" for n in names)

    def _install(self, number: int, frame: Frame) -> types.CodeType:
        """Put the functions that a graph's bytecode names where it looks for them; returns the bytecode."""
        graph = self._graphs[number]
        for name, digest in graph.graphs.items():
            frame.f_globals[name] = self._function(name, digest)
            self._users.setdefault(name, {})[id(frame.f_globals)] = frame.f_globals
        for name, resume in graph.resumes.items():
            dynamo_globals.install_resume(name, self._code(resume.code), resume.module, resume.free)
        return self._code(graph.bytecode)

    def _code(self, digest: str) -> types.CodeType:
        if digest not in self._codes:
            self._codes[digest] = code_bytes.load(self.bundle.object(digest))
        return self._codes[digest]

    def _function(self, name: str, digest: str) -> object:
        if name not in self._functions:
            self._load(name, digest, self._choices.get(name, {}))
        return self._functions[name]

    def _load(self, name: str, digest: str, choices: Mapping[str, int] | None) -> list[Any]:
        """Load a compiled graph; returns its kernels that have several configs."""
        from aot_cache.upstream.hooks import inductor_artifact, inductor_cpp, inductor_tuning

        with inductor_cpp.serving(self._library), inductor_tuning.choosing(choices) as several:
            made = inductor_artifact.load_graph(self.bundle.object(digest))
        self._functions[name] = dynamo_globals.not_traced(made)
        for names in self._users.get(name, {}).values():
            names[name] = self._functions[name]
        self.loaded.primed = len(self._functions)
        return several

    def load_again(self, name: str, choices: Mapping[str, int] | None) -> list[Any]:
        """Load a compiled graph with the configs of these numbers; with all, to be measured at its next run, for None.

        Returns its `inductor_tuning.Kernel`s.
        """
        with self._lock:
            return self._load(name, self._artifacts[name], choices)

    def _library(self, source: str) -> bytes | None:
        digest = self._libraries.get(source)
        return self.bundle.object(digest) if digest is not None else None


def short(graph: ServedGraph) -> str:
    """What people are shown of a graph."""
    return next(iter(graph.graphs), graph.bytecode[:24])
