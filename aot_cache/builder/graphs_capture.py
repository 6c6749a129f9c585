"""The child that compiles one call signature: answers what Dynamo asks for, and keeps the frames and artifacts it made."""

from __future__ import annotations

import contextlib
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aot_cache.artifact.manifest import Resume, SeveralConfigs
from aot_cache.builder.call_signatures import CallSignature
from aot_cache.builder.messages import TracedGraph
from aot_cache.builder.recorded_calls import resized
from aot_cache.misses.call_signature import structure_of
from aot_cache.store import JsonObject, Store
from aot_cache.upstream.codec import code_bytes, dynamo_globals, dynamo_guards, python_code
from aot_cache.upstream.codec.dynamo_package import CompiledFrame, Package, numbered_globals
from aot_cache.upstream.hooks import dynamo_frames, inductor_artifact, inductor_cpp, inductor_tuning
from aot_cache.upstream.hooks.dynamo_frames import Found, Frame
from aot_cache.upstream.virtual import dynamo_answers, dynamo_inputs


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is known of a frame when Dynamo has compiled it, see `manifest.Graph`; `settings` is the text itself."""

    identities: list[list[str]]
    values: list[list[str]]
    guards: list[str]
    inlined: list[list[str]]
    wrapping: JsonObject | None
    mode: str
    settings: str


class CompileJob:
    """One call signature in its child.

    Args:
        signature: to be compiled.
        signatures: all of the recipe: a call of another one is left to that one's child.
    """

    def __init__(self, signature: CallSignature, signatures: Iterable[CallSignature]) -> None:
        self.signature = signature
        self.met = False
        self.unmatched: set[tuple[int, int]] = set()
        self._known: dict[str, list[CallSignature]] = {}
        for other in signatures:
            self._known.setdefault(other.structure, []).append(other)
        self.at = (0, 0)
        self.mode = ""
        self.failed = ""
        self.written = dynamo_guards.Written()
        self._frames: list[tuple[CompiledFrame, dict[str, str], _Facts]] = []
        self._artifacts: dict[str, bytes] = {}
        self._libraries: dict[str, dict[str, bytes]] = {}
        self._candidates: dict[str, dict[str, SeveralConfigs]] = {}
        self._users: dict[str, dict[int, set[int]]] = {}
        self._template: dict[str, Any] = {}
        self._checks: list[tuple[Any, list[str]]] = []
        self._only_mine = True

    def handle(self, frame: Frame, compile_frame: Any) -> Any:
        """Dynamo is about to compile `frame`."""
        structure, found = structure_of(frame, self.mode)
        mine = self.signature.fits(structure, found)
        if structure in self._known and not mine:
            if not any(other.fits(structure, found) for other in self._known[structure]):
                self.unmatched.add(self.at)
            return dynamo_frames.run_without_compiling()
        if mine:
            self.met, self._template = True, dict(frame.f_locals)
            dynamo_inputs.mark(frame, self.signature.dynamic())
        same = self._made_before(frame)
        if same is not None:
            return same
        package = Package(frame.code, frame.module)
        try:
            answer = compile_frame(package)
        except Exception as error:  # Dynamo may go on without it: as plain Python, after a look at it in every process
            self.failed = self.failed or dynamo_frames.why_given_up(error, f"{frame.module}:{frame.code.co_name}")
            raise
        self._keep(package.frame, frame, answer)
        self._only_mine &= mine and not package.frame.resumes
        return answer

    def _made_before(self, frame: Frame) -> object:
        """The graph of an earlier call, if a server would take it for this one, too: its guards, read again, hold.

        Dynamo itself asks again for a new instance of a model or a new closure; a server's process never sees those two.
        """
        for number, (made, _, facts) in enumerate(self._frames):
            if made.code is frame.code and facts.wrapping == frame.wrapping:
                manager, _ = _read_again(made, facts, frame)
                if manager is not None:
                    self._checks.append((manager, list(made.graphs)))
                    assert made.dynamo_code is not None
                    return dynamo_frames.as_compiled(Found(made.dynamo_code, manager, number), frame.code)
        return None

    def hits(self, calls: Sequence[Mapping[str, Sequence[int]]]) -> bool:
        """Whether calls of these sizes, at the job's current point, all hit graphs made before. If so, that is noted.

        Must be called in the modes of the point's case, which the template's tensors were made in.
        """
        if not self._only_mine or not self._checks:
            return False
        used: list[str] = []
        for sizes in calls:
            given = resized(self._template, sizes)
            graphs = next((graphs for check, graphs in self._checks if given and check.check(given)), None)
            if graphs is None:
                return False
            used += graphs
        for name in used:
            self._users.setdefault(name, {}).setdefault(self.at[0], set()).add(self.at[1])
        return True

    def _keep(self, made: CompiledFrame, frame: Frame, answer: Any) -> None:
        name = f"{frame.module}:{frame.code.co_name}"
        manager = dynamo_frames.guards_of(answer)
        if manager is None:
            self.failed = f"Dynamo did not compile {name}: {dynamo_frames.why_not(answer)}"
            return
        if made.bypassed or made.dynamo_code is None:
            self.failed = f"Dynamo cannot write {name} down ({made.bypassed})"
            return
        aliases, objects = _by_number(made.dynamo_code, frame)
        inlined, unknown = _inlined(made.inlined, self.written)
        if self.written.nameless:
            self.failed = f"{name} depends on objects that have no name: {'; '.join(self.written.nameless)}"
        elif objects:
            self.failed = f"the bytecode of {name} holds objects that have no name: {', '.join(objects)}"
        elif unknown:
            self.failed = f"{name} calls what no name of a module leads to: {', '.join(unknown)}"
        else:
            facts = _Facts(
                identities=list(self.written.identities),
                values=list(self.written.values),
                guards=dynamo_guards.expressions(manager),
                inlined=inlined,
                wrapping=frame.wrapping,
                mode=self.mode,
                settings=dynamo_globals.settings(),
            )
            guards, why = _read_again(made, facts, frame)
            if guards is None:
                self.failed = f"the guards of {name} do not hold for the call that they were made of: {why}"
                return
            self._frames.append((made, aliases, facts))
            self._checks.append((guards, list(made.graphs)))

    @contextlib.contextmanager
    def graphs_answered(self) -> Iterator[None]:
        """Inductor compiles and its artifact is kept; Dynamo gets the graph itself."""

        def compiled(wrapper: object, backend: object, graph: object, inputs: object, **kwargs: object) -> object:
            name = inductor_artifact.name_of(graph)
            with inductor_cpp.keeping() as libraries, inductor_tuning.collecting() as several:
                self._artifacts[name] = inductor_artifact.compile_graph(wrapper, backend, graph, inputs, **kwargs)
            self._libraries[name] = libraries
            self._candidates[name] = {key: SeveralConfigs(**found) for key, found in several.items()}
            run = dynamo_answers.answer(graph)

            def answer(*args: object) -> object:
                self._users.setdefault(name, {}).setdefault(self.at[0], set()).add(self.at[1])
                return run(*args)

            return answer

        with inductor_artifact.instead(compiled):
            yield

    def results(self, store: Store) -> list[TracedGraph]:
        """What was made; its bytes go into the store."""
        artifacts = {name: store.put(data) for name, data in self._artifacts.items()}
        return [self._graph(*frame, artifacts, store) for frame in self._frames]

    def _graph(
        self,
        made: CompiledFrame,
        aliases: Mapping[str, str],
        facts: _Facts,
        artifacts: Mapping[str, str],
        store: Store,
    ) -> TracedGraph:
        assert made.dynamo_code is not None
        # Dynamo names what it makes by a counter or a uuid4. Names by content make equal builds equal bytes.
        names = {name: f"__aot_graph_{artifacts[name][:24]}" for name in made.graphs}
        modules = {f"__aot_import_{module.replace('.', '_dot_')}": module for module in aliases.values()}
        names |= {name: f"__aot_import_{module.replace('.', '_dot_')}" for name, module in aliases.items()}
        resumes = {}
        for name, (code, module) in made.resumes.items():
            digest = store.put(code_bytes.dump(code, {}, f"<{module}>"))
            names[name] = f"__aot_resume_{digest[:24]}"
            resumes[names[name]] = Resume(module=module, code=digest, free=bool(code.co_freevars))
        libraries = {source: data for name in made.graphs for source, data in self._libraries[name].items()}
        points: dict[int, set[int]] = {}
        for name in made.graphs:
            for case, at in self._users.get(name, {}).items():
                points.setdefault(case, set()).update(at)
        return TracedGraph(
            identities=facts.identities,
            values=facts.values,
            guards=facts.guards,
            inlined=facts.inlined,
            wrapping=facts.wrapping,
            mode=facts.mode,
            settings=store.put(facts.settings.encode()),
            module=made.module,
            function=getattr(made.code, "co_qualname", made.code.co_name),
            line=made.code.co_firstlineno,
            code=python_code.digest(code_bytes.load(code_bytes.dump(made.code, {}, ""))),
            guard_state=store.put(made.guards),
            bytecode=store.put(code_bytes.dump(made.dynamo_code, names, f"<{made.module}>")),
            graphs={names[name]: artifacts[name] for name in made.graphs},
            candidates={names[name]: self._candidates[name] for name in made.graphs},
            choices={},
            libraries={source: store.put(data) for source, data in sorted(libraries.items())},
            imports=dict(sorted({**made.imports, **modules}.items())),
            resumes=resumes,
            dynamic=self.signature.dynamic(),
            kernels=[k for name in made.graphs for k in inductor_artifact.kernels_in(self._artifacts[name])],
            asks_rank=sorted(place for place in map(_asks_rank, (made.code, *made.inlined)) if place),
            points={str(case): sorted(at) for case, at in points.items()},
        )


def _read_again(made: CompiledFrame, facts: _Facts, frame: Frame) -> tuple[object, str]:
    """(the guard manager that a server would make of what was written, "") for a call that fulfils it, else (None, why)."""
    return dynamo_guards.build(made.guards, facts.identities, facts.values, frame.code, frame.f_globals, frame.f_locals)


_RANK = frozenset({"get_rank", "get_node_local_rank", "get_group_rank"})
_VARIABLES = frozenset({"RANK", "LOCAL_RANK", "GROUP_RANK"})


def _asks_rank(code: types.CodeType) -> str:
    """`function (file's name:line)` of code that asks which rank it is; empty for other code."""
    if dynamo_inputs.module_of(code) is None or not (_RANK & {*code.co_names} or _VARIABLES & {*_texts(code)}):
        return ""
    return f"{code.co_name} ({os.path.basename(code.co_filename)}:{code.co_firstlineno})"


def _texts(code: types.CodeType) -> list[str]:
    return [value for value in code.co_consts if isinstance(value, str)]


def _by_number(code: types.CodeType, frame: Frame) -> tuple[dict[str, str], list[str]]:
    """({name: module} of globals in `code` that Dynamo numbered and that are modules, the others in words)."""
    modules, others = {}, []
    for name in numbered_globals(code):
        value = frame.f_globals.get(name)
        if isinstance(value, types.ModuleType):
            modules[name] = value.__name__
        else:
            others.append(f"{name}, a {type(value).__name__}")
    return modules, others


def _inlined(codes: Iterable[types.CodeType], written: dynamo_guards.Written) -> tuple[list[list[str]], list[str]]:
    """([module, function, digest] of each function outside of torch and Python that was traced, the others in words).

    The others have no place and no guard names them: a reader could not tell that they changed.
    """
    named = " ".join(name for _, _, name in written.identities)
    found, others = set(), []
    for code in codes:
        module = dynamo_inputs.module_of(code)
        if module is None or code.co_name.startswith("torch_dynamo_resume_in"):
            continue  # the rest of a function after a graph break is checked with that function
        place = python_code.place(code, module)
        if place is not None:
            found.add((module, place[0], python_code.digest(place[1])))
        elif python_code.digest(code) not in named:
            others.append(f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})")
    return [list(item) for item in sorted(found)], others
