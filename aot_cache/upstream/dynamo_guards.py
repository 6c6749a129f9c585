"""Dynamo's guards as bytes, and back into guards of a living call.

Upstream writes a frame's guards with example values (`torch/_dynamo/guards.py`, `CheckFunctionManager.serialize_guards`,
`GuardsStatePickler`) and drops every guard that compares by identity (a function, a class, a module), because an address
means nothing elsewhere. Dropping them is not sound: a function that was replaced would go unnoticed. Here they are kept
with a name for what they compared (`python_code.identity`). In the serving process the guards are built at the first call
that may use them, from that call: what was recorded is compared with what was written down, and identity guards become
identity guards again, on what is there then. So thread counts, inference tensors and dispatch keys are the caller's own.

Upstream: `torch/_dynamo/guards.py` (`CheckFunctionManager`, `GuardsStatePickler`, `GuardBuilder`), `torch/_guards.py` (`Guard`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch._dynamo import config, guards, package
from torch._guards import Guard, GuardsSet, Source
from torch._library import custom_ops
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from aot_cache.upstream.python_code import identity, literal
from aot_cache.upstream.torch_fake import is_parameter

Json = Any

_BY_IDENTITY = frozenset(guards.CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES)
_LIVENESS = frozenset({"WEAKREF_ALIVE", "DICT_VERSION"})
"""Guards on objects that a graph holds by reference; ours takes everything as an argument."""
_BY_VALUE = frozenset(
    "EQUALS_MATCH CONSTANT_MATCH BOOL_MATCH NONE_MATCH SEQUENCE_LENGTH LIST_LENGTH TUPLE_ITERATOR_LEN DICT_KEYS "
    "DICT_KEYS_MATCH DICT_CONST_KEYS NAME_MATCH FLOAT_IS_NAN COMPLEX_IS_NAN".split()
)
_KEYS = torch._C.DispatchKey
_MODES = (_KEYS.ADInplaceOrView, _KEYS.AutogradFunctionality, _KEYS.Python, _KEYS.PythonTLSSnapshot)
"""Dispatch keys that tell inference tensors from others, and tensors without memory from those with: no graph's code
depends on them, and which ones a tensor has depends on where it was made."""


@dataclass
class Written:
    """What `writing` noticed about the last frame's guards.

    Args:
        identities: guard type, the expression guarded, and the name of what it was.
        values: guard type, expression and what a guard on a value compared it with. Upstream writes functions, classes and
            modules by reference, so that a guard on what one of them holds would be made of what is there, and hold.
        nameless: identity guards on what has no name, with where user code needed it: such a frame cannot be kept.
    """

    identities: list[list[str]] = field(default_factory=list)
    values: list[list[str]] = field(default_factory=list)
    nameless: list[str] = field(default_factory=list)
    _guards: list[Guard] = field(default_factory=list)


@contextlib.contextmanager
def writing() -> Iterator[Written]:
    """While active, guards that Dynamo saves are ones that `build` can read. Renewed by each frame."""
    written = Written()
    manager: Any = guards.CheckFunctionManager
    pickler: Any = guards.GuardsStatePickler
    module: Any = guards
    start, signature = manager.__init__, inspect.signature(manager.__init__)
    reduce, dump = pickler.reducer_override, module.pickle_guards_state

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        inner = bound.arguments.get("guard_filter_fn")

        def keep(entries: Sequence[Any]) -> list[bool]:
            kept = list(inner(entries)) if inner is not None else [True] * len(entries)
            written.identities, written.values, written.nameless, written._guards = [], [], [], []
            return [bool(k) and _stays(entry, written) for k, entry in zip(kept, entries)]

        bound.arguments["guard_filter_fn"] = keep
        start(*bound.args, **bound.kwargs)

    def pickle_guards_state(state: Any, builder: Any) -> Any:
        every = [_bare(guard) for guard in [*state.output_graph.guards, *written._guards]]
        state = replace(state, output_graph=replace(state.output_graph, _guards=GuardsSet(_ordered(every))))
        for guard in every:
            guard._hash = None  # of an address
        state.shape_code_parts = _without_places(state.shape_code_parts)
        if hasattr(state, "local_state"):
            state.local_state = None  # torch 2.15: the dispatch keys in force here; the reader takes its own
        return dump(state, builder)

    manager.__init__, module.pickle_guards_state = __init__, pickle_guards_state
    pickler.reducer_override = _others(_without_fakes(reduce))
    with config.patch(strict_precompile=True):
        try:
            yield written
        finally:
            manager.__init__, module.pickle_guards_state, pickler.reducer_override = start, dump, reduce


def _stays(entry: Any, written: Written) -> bool:
    kinds = {entry.guard_type, *entry.derived_guard_types}
    if not kinds & _BY_IDENTITY:
        if entry.has_value and entry.guard_type in _BY_VALUE:
            written.values.append([entry.guard_type, entry.orig_guard.name, literal(entry.value)])
        return True
    if kinds <= _LIVENESS:
        return False
    name = identity(entry.value) if entry.has_value else ""
    if not name:
        where = entry.orig_guard.user_stack
        place = f" ({where[-1].filename}:{where[-1].lineno})" if where else ""
        written.nameless.append(f"{entry.guard_type} on {entry.orig_guard.name}, a {type(entry.value).__name__}{place}")
    written.identities.append([entry.guard_type, entry.orig_guard.name, name])
    written._guards.append(entry.orig_guard)
    return False


def _ordered(every: list[Guard]) -> Any:
    from torch.utils._ordered_set import OrderedSet

    return OrderedSet(every)


def _bare(guard: Guard) -> Guard:
    """A guard without what belongs to this process: stacks (paths), weak references, what it became here."""
    return replace(
        guard,
        create_fn=_without_references(guard.create_fn),
        guard_types=None,
        code_list=None,
        obj_weakref=None,
        guarded_class_weakref=None,
        stack=None,
        user_stack=None,
        _hash=None,
    )


def _without_places(parts: Any) -> Any:
    """Guards on sizes without the comments that say where user code asked for them."""
    if parts is None:
        return None
    names = ("python_code_parts", "verbose_code_parts", "cpp_code_parts")
    texts = {name: getattr(parts, name) for name in names if getattr(parts, name) is not None}
    return replace(parts, **{n: replace(t, exprs=[_plain(e) for e in t.exprs]) for n, t in texts.items()})


def _without_references(create: Any) -> Any:
    if not isinstance(create, functools.partial):
        return create
    import weakref

    def value(x: Any) -> Any:
        return x() if isinstance(x, weakref.ref) or type(x).__name__ == "TensorWeakRef" else x

    return functools.partial(create.func, *map(value, create.args), **{k: value(v) for k, v in create.keywords.items()})


def _without_fakes(reduce: Any) -> Any:
    """Upstream writes a fake tensor as a fake meta tensor, which takes its whole mode along, and a fake Parameter as a
    Tensor, which no Parameter then matches."""

    def reducer_override(self: Any, value: Any) -> Any:
        made = reduce(self, value)
        if not isinstance(value, FakeTensor) or not isinstance(made, tuple) or made[0] != type(self)._unpickle_tensor:
            return made
        with unset_fake_temporarily():
            meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            meta.requires_grad_(value.requires_grad)
        kind = torch.nn.Parameter if is_parameter(value) else made[1][2]
        return made[0], (meta, made[1][1], kind, *made[1][3:])

    return reducer_override


def _others(reduce: Any) -> Any:
    """What upstream's pickler gets wrong: operators of `torch.library.custom_op` hold dispatcher objects, which have no
    bytes, and are registered by name; sources (`DefaultsSource`) hand what they compute themselves to their `__init__`."""

    def reducer_override(self: Any, value: Any) -> Any:
        if isinstance(value, custom_ops.CustomOpDef):
            return _operator, (value._qualname,)
        if isinstance(value, Source) and is_dataclass(value):
            return type(value), tuple(getattr(value, part.name) for part in fields(value) if part.init)
        return reduce(self, value)

    return reducer_override


def _operator(name: str) -> Any:
    return custom_ops.OPDEFS.get(name)  # None where it is not defined: its guards then fail


# --- reading ----------------------------------------------------------------------------------------------------------


def build(
    data: bytes,
    identities: Sequence[Sequence[str]],
    values: Sequence[Sequence[str]],
    code: types.CodeType,
    f_globals: dict[str, Any],
    f_locals: Mapping[str, Any],
) -> tuple[Any, str]:
    """The guards in `data` for a living call: (guard manager, why the call does not fulfil them).

    One of the two is empty. `data` is unpickled: it must have been hashed before.
    """
    state = package.load_guards_state(data)
    graph = state.output_graph
    _take_host_threads(graph.global_state_guard)
    _install_builtins(graph.name_of_builtins_dict_key_in_fglobals, f_globals)
    live = _Scope({"L": dict(f_locals), "G": f_globals, "__builtins__": _builtins(f_globals)})
    recorded = _Scope({"L": graph.local_scope, "G": graph.global_scope})
    wanted = {(kind, name): text for kind, name, text in identities}
    compared = {(kind, name): text for kind, name, text in values}
    for guard in graph.guards:
        if guard.create_fn_name() == "EMPTY_NN_MODULE_HOOKS_DICT" and live.value(guard):
            # Dynamo does not look again at hooks that come after a trace; those that are there before it traces.
            return None, f"{_plain(guard.name)} was empty and holds hooks"
        value = compared.get((guard.create_fn_name(), guard.name))
        if value is not None and literal(live.value(guard)) != value:
            return None, f"{_plain(guard.name)} was {value} and is {literal(live.value(guard))}"
        text = wanted.get((guard.create_fn_name(), guard.name))
        if text is not None:
            found = live.value(guard)
            if identity(found) != text:
                return None, f"{_plain(guard.name)} was {text} and is {identity(found) or type(found).__name__}"
            guard.create_fn = functools.partial(_create_live, guard.create_fn, live)
        elif guard.create_fn_name() == "TENSOR_MATCH":
            _take_dispatch_keys(recorded.value(guard), live.value(guard))
    try:
        manager = package.load_guard_manager(state, code, f_globals)
    except (KeyError, AttributeError, IndexError, TypeError) as error:
        return None, f"its arguments have another structure ({type(error).__name__}: {error})"
    if manager.check(f_locals):
        return manager, ""
    return None, failure(manager, f_locals)


def unreadable(data: bytes) -> str:
    """Why what was just written cannot be read; empty when it can."""
    try:
        package.load_guards_state(data)
    except Exception as error:  # whatever a class does when it is unpickled
        return f"{type(error).__name__}: {error}"
    return ""


def failure(manager: Any, f_locals: Mapping[str, Any]) -> str:
    """The first guard of `manager` that the call fails, in Dynamo's words without their source positions."""
    parts = manager.check_verbose(f_locals).verbose_code_parts
    return "; ".join(dict.fromkeys(_plain(str(part)) for part in parts)) or "a guard that gives no reason"


def expressions(manager: Any) -> list[str]:
    """Every guard of a manager in Dynamo's words."""
    return [_plain(str(part)) for part in manager.verbose_code_parts] or [_plain(p) for p in manager.code_parts]


_ADDRESS = re.compile(r", \d{6,}\)")


def _plain(text: str) -> str:
    return _ADDRESS.sub(")", text.split("  # ", 1)[0].strip())


@dataclass
class _Scope:
    """Names that guarded expressions begin with, and what these have led to: most share all but their last step."""

    names: dict[str, Any]
    known: dict[Any, Any] = field(default_factory=dict)

    def value(self, guard: Guard) -> Any:
        try:
            return guard.originating_source.get_value(self.names, guards._get_closure_vars(), self.known)
        except Exception as error:  # the expression may lead through anything
            return error


def _create_live(create: Any, live: _Scope, builder: Any, guard: Guard) -> Any:
    """Create `guard` on what is there now; the other guards are created on what was written down."""
    scope, cache = builder.scope, builder.src_get_value_cache
    builder.scope, builder.src_get_value_cache = {**scope, **live.names}, live.known
    try:
        return create(builder, guard)
    finally:
        builder.scope, builder.src_get_value_cache = scope, cache


def _take_host_threads(state: Any) -> None:
    """Dynamo guards on the number of CPU threads, which is the machine's business."""
    values = json.loads(state.__getstate__())
    values["num_threads"] = torch.get_num_threads()
    state.__setstate__(json.dumps(values))


def _install_builtins(name: str | None, f_globals: dict[str, Any]) -> None:
    if name:
        f_globals.setdefault(name, _builtins(f_globals))


def _builtins(f_globals: Mapping[str, Any]) -> dict[str, Any]:
    found = f_globals["__builtins__"]
    return found if isinstance(found, dict) else vars(found)


def _take_dispatch_keys(recorded: Any, found: Any) -> None:
    if isinstance(recorded, FakeTensor) and isinstance(found, torch.Tensor):
        keys: Any = torch._C._dispatch_keys(found)
        if _place(recorded.dispatch_keys or torch._C._dispatch_keys(recorded)) == _place(keys):
            recorded.dispatch_keys = keys


def _place(keys: Any) -> int:
    for key in _MODES:
        keys = keys.remove(key)
    return int(keys.raw_repr())
