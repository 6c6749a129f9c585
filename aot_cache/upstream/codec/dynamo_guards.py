"""Write Dynamo's guards as bytes, and build guards from them for an actual call.

Upstream writes a frame's guards with example values (`torch/_dynamo/guards.py`, `CheckFunctionManager.serialize_guards`,
`GuardsStatePickler`), and refuses or drops every guard that compares by identity (a function, a class, a module), because an
address has no meaning in another process. The builder's examples are tensors without memory and instances of users' classes,
of which upstream keeps a part and replaces the rest by a placeholder. So no example is written. Each guard is written as its
expression, and what it compares as text (`guard_facts`). The serving process evaluates the expression on the call that may use
the graph; if the text is the same, the guard is created on the value found there. Thread counts, inference tensors and
dispatch keys are taken from that call.

Upstream: `torch/_dynamo/guards.py` (`CheckFunctionManager`, `GuardsStatePickler`, `GuardBuilder`), `torch/_guards.py` (`Guard`).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch._dynamo import config, guards, package
from torch._guards import Guard, GuardsSet, Source, TracingContext, tracing
from torch._library import custom_ops
from torch._subclasses.fake_tensor import FakeTensor

from aot_cache.upstream.codec import gpu_number, guard_facts, guard_lookups
from aot_cache.upstream.codec.guard_facts import LIVENESS, NAMELESS

Json = Any
_SERIALIZABLE: Any = next(part.default for part in fields(Guard) if part.name == "_unserializable")


@dataclass
class Written:
    """What `writing` collected about the last frame's guards.

    Args:
        identities: [guard type, guarded expression, name of the object], for guards that compare with `is`.
        values: [guard type, guarded expression, text of the value], for guards that compare a value.
        nameless: guards on values that no text can describe, with their place in user code. Such a frame cannot be kept.
    """

    identities: list[list[str]] = field(default_factory=list)
    values: list[list[str]] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)


@contextlib.contextmanager
def writing() -> Iterator[Written]:
    """Inside, Dynamo saves guards in a form that `build` can read. Each frame replaces the contents of the `Written`."""
    written = Written()
    manager: Any = guards.CheckFunctionManager
    pickler: Any = guards.GuardsStatePickler
    module: Any = guards
    refused, serialize = manager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES, manager.serialize_guards
    reduce, dump = pickler.reducer_override, module.pickle_guards_state

    def serialize_guards(self: Any, builder: Any, sorted_guards: Sequence[Guard], output_graph: Any) -> Any:
        kept = [guard for guard in sorted_guards if not guard_facts.kinds_of(guard) <= LIVENESS]
        written.identities, written.values, written.nameless = [], [], []
        kept = guard_lookups.by_key(kept, builder)
        in_order = {source.name for source in guard_lookups.in_order(output_graph.guard_on_key_order, builder)}
        for guard in kept:
            guard._unserializable = _SERIALIZABLE  # upstream refuses local classes; here they have a name
            _write(guard, guard_facts.value_of(guard, builder.get), guard.name in in_order, written)
        return serialize(self, builder, kept, output_graph)

    def pickle_guards_state(state: Any, builder: Any) -> Any:
        every = [_bare(guard) for guard in state.output_graph.guards]
        in_order = guard_lookups.in_order(state.output_graph.guard_on_key_order, builder)
        graph = replace(state.output_graph, _guards=GuardsSet(_ordered(every)), guard_on_key_order=in_order)
        graph = replace(graph, local_scope={}, global_scope={})
        for guard in every:
            guard._hash = None  # the hash contains an address
        state = replace(state, output_graph=graph)
        state.shape_code_parts = _without_places(state.shape_code_parts)
        if hasattr(state, "local_state"):
            state.local_state = None  # torch 2.14: this process's dispatch keys; the reader uses its own
        return dump(state, builder)

    manager.serialize_guards, module.pickle_guards_state = serialize_guards, pickle_guards_state
    manager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES = ()
    pickler.reducer_override = _others(reduce)
    with config.patch(strict_precompile=True):
        try:
            yield written
        finally:
            manager.serialize_guards, module.pickle_guards_state, pickler.reducer_override = serialize, dump, reduce
            manager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES = refused


def _write(guard: Guard, value: Any, in_order: bool, written: Written) -> None:
    kind, by_identity = guard.create_fn_name(), guard_facts.is_by_identity(guard)
    try:
        text = guard_facts.of_identity(value) if by_identity else guard_facts.of_value(guard, value, in_order)
    except KeyError:
        text = NAMELESS
    if text is None:
        return
    if text == NAMELESS:
        where = guard.user_stack
        place = f" ({where[-1].filename}:{where[-1].lineno})" if where else ""
        written.nameless.append(f"{kind} on {guard.name}, a {type(value).__name__}{place}")
    (written.identities if by_identity else written.values).append([kind, guard_facts.expression_of(guard), text])


def _ordered(every: list[Guard]) -> Any:
    from torch.utils._ordered_set import OrderedSet

    return OrderedSet(every)


def _bare(guard: Guard) -> Guard:
    """A guard without the parts that belong to this process: stacks (paths), example values, generated code."""
    return replace(
        guard,
        create_fn=_without_example(guard.create_fn),
        guard_types=None,
        code_list=None,
        obj_weakref=None,
        guarded_class_weakref=None,
        stack=None,
        user_stack=None,
        _hash=None,
        _unserializable=_SERIALIZABLE,
    )


def _without_example(create: Any) -> Any:
    """Remove the example tensor that a guard may hold; the guard then uses the value of its expression."""
    if not isinstance(create, functools.partial):
        return create
    return functools.partial(create.func, *create.args, **{k: v for k, v in create.keywords.items() if k != "value"})


def _without_places(parts: Any) -> Any:
    """Guards on sizes, without the comments with positions in user code."""
    if parts is None:
        return None
    names = ("python_code_parts", "verbose_code_parts", "cpp_code_parts")
    texts = {name: getattr(parts, name) for name in names if getattr(parts, name) is not None}
    return replace(parts, **{n: replace(t, exprs=[_plain(e) for e in t.exprs]) for n, t in texts.items()})


def _others(reduce: Any) -> Any:
    """Pickle what upstream's pickler cannot. Operators of `torch.library.custom_op` hold dispatcher objects, which cannot be
    pickled, so they go by their registered name. Sources (`DefaultsSource`) pass computed fields to `__init__`, so only
    fields with `init=True` are passed."""

    def reducer_override(self: Any, value: Any) -> Any:
        if isinstance(value, custom_ops.CustomOpDef):
            return _operator, (value._qualname,)
        if isinstance(value, Source) and is_dataclass(value):
            return type(value), tuple(getattr(value, part.name) for part in fields(value) if part.init)
        return reduce(self, value)

    return reducer_override


def _operator(name: str) -> Any:
    return custom_ops.OPDEFS.get(name)  # None if it is not defined here: its guards then fail


# --- reading ----------------------------------------------------------------------------------------------------------


def build(
    data: bytes,
    identities: Sequence[Sequence[str]],
    values: Sequence[Sequence[str]],
    code: types.CodeType,
    f_globals: dict[str, Any],
    f_locals: Mapping[str, Any],
    number: int = gpu_number.BUILT_FOR,
) -> tuple[Any, str]:
    """Build the guards in `data` for an actual call: (guard manager, "") or (None, why the call fails them).

    `data` is unpickled: the caller must have checked its hash. `number` is the GPU on which the graph is to run.
    """
    state = _read(data)
    graph = state.output_graph
    _take_host_threads(graph.global_state_guard)
    _install_builtins(graph.name_of_builtins_dict_key_in_fglobals, f_globals)
    graph.local_scope, graph.global_scope = dict(f_locals), f_globals
    scope = _Scope({"L": graph.local_scope, "G": f_globals, "__builtins__": _builtins(f_globals)})
    why = _first_difference(graph, scope, identities, values, number)
    if why:
        return None, why
    try:
        manager = package.load_guard_manager(state, code, f_globals)
    except (KeyError, AttributeError, IndexError, TypeError, AssertionError) as error:
        return None, f"its arguments have a different structure ({type(error).__name__}: {error})"
    if manager.check(f_locals):
        return manager, ""
    return None, failure(manager, f_locals)


def _read(data: bytes) -> Any:
    """The pickled guard state. The tracing context is for sources (`ImportSource`) that install a guard when created."""
    with tracing(TracingContext(None)):
        return package.load_guards_state(data)


def _first_difference(
    graph: Any, scope: _Scope, identities: Sequence[Sequence[str]], values: Sequence[Sequence[str]], number: int
) -> str:
    """The first guard whose text differs here from the one written by the builder, as a sentence; empty if none does."""
    by_identity = {(kind, name): text for kind, name, text in identities}
    by_value = {(kind, name): text for kind, name, text in values}
    in_order = {source.name for source in graph.guard_on_key_order}
    for guard in graph.guards:
        place = guard.create_fn_name(), guard_facts.expression_of(guard)
        was = by_identity.get(place, by_value.get(place))
        if was is None:
            continue
        was = gpu_number.in_text(was, number)
        value = scope.value(guard)
        if place in by_identity:
            found = guard_facts.of_identity(value) or f"a {type(value).__name__}"
        else:
            found = guard_facts.of_value(guard, value, guard.name in in_order) or f"a {type(value).__name__}"
        if found != was:
            return f"{_plain(place[1])} was {was} and is {found}"
    return ""


def failure(manager: Any, f_locals: Mapping[str, Any]) -> str:
    """The first guard of `manager` that the call fails, in Dynamo's words, without source positions."""
    parts = manager.check_verbose(f_locals).verbose_code_parts
    return "; ".join(dict.fromkeys(_plain(str(part)) for part in parts)) or "a guard failed without a reason"


def expressions(manager: Any) -> list[str]:
    """Every guard of a manager, in Dynamo's words as a server would print them."""
    return [_as_served(str(part)) for part in manager.verbose_code_parts or manager.code_parts]


_ADDRESS = re.compile(r", \d{6,}(?=\))|_\d{9,}(_c[^\s(]*)?")
"""The address of a compared object, or in the name of a checking function (`___check_metadata_139961542209472_c0/0`)."""


def _plain(text: str) -> str:
    return _ADDRESS.sub("", text.split("  # ", 1)[0].strip())


_WHERE_IT_IS = re.compile(r""" at 0x[0-9a-f]+| from '[^']*'(?=>)|, file "[^"]*", line \d+""")
_IN_SERVING = ((f"{FakeTensor.__module__}.FakeTensor'", "torch.Tensor'"), (", FakeTensor, ", ", Tensor, "))


def _as_served(text: str) -> str:
    """The text of a builder's guard as a server would print it: with real tensor types, without addresses and folders."""
    for built, served in _IN_SERVING:
        text = text.replace(built, served)
    return _WHERE_IT_IS.sub("", _plain(text))


@dataclass
class _Scope:
    """Evaluates guarded expressions. `names` are their first names; `known` caches values, since most share a prefix."""

    names: dict[str, Any]
    known: dict[Any, Any] = field(default_factory=dict)

    def value(self, guard: Guard) -> Any:
        return guard_facts.value_of(
            guard, lambda source: source.get_value(self.names, guards._get_closure_vars(), self.known)
        )


def _take_host_threads(state: Any) -> None:
    """Use this process's number of CPU threads: Dynamo guards on it, but it is host-specific."""
    values = json.loads(state.__getstate__())
    values["num_threads"] = torch.get_num_threads()
    state.__setstate__(json.dumps(values))


def _install_builtins(name: str | None, f_globals: dict[str, Any]) -> None:
    if name:
        f_globals.setdefault(name, _builtins(f_globals))


def _builtins(f_globals: Mapping[str, Any]) -> dict[str, Any]:
    found = f_globals["__builtins__"]
    return found if isinstance(found, dict) else vars(found)
