"""What each of Dynamo's guards compares, as text that is the same in every process.

A guard is stored as the expression of a value and this text about the value. The serving process evaluates the expression on
an actual call; if the text is the same, the guard is created on the value found there. So no value of the builder (tensors
without memory, instances of users' classes) has to be stored.

Upstream: `torch/_dynamo/guards.py` (the methods of `GuardBuilder`, one for each kind of guard; `_try_is_cow_tensor`,
`_stream_is_current`), `torch/_guards.py` (`Guard.create_fn_name`, `guard_types`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import guards
from torch._dynamo.source import TypeSource
from torch._guards import Guard
from torch._library import opaque_object
from torch._subclasses.fake_tensor import FakeTensor

from aot_cache.upstream.codec.python_code import exact, identity
from aot_cache.upstream.codec.real_tensors import is_parameter

_KEYS = torch._C.DispatchKey
_MODES = (_KEYS.ADInplaceOrView, _KEYS.AutogradFunctionality, _KEYS.Python, _KEYS.PythonTLSSnapshot)
"""Dispatch keys that distinguish inference tensors, and tensors without memory, from others. No graph's code depends on
them, and whether a tensor has them depends on where it was made."""

_OF_A_MESH = ("_flatten_rank_map", "_layout", "_device_type", "_mesh_dim_names", "_thread_id")
"""The attributes by which two meshes are compared (`torch/distributed/device_mesh.py`, `DeviceMesh.__eq__`)."""

LIVENESS = frozenset({"WEAKREF_ALIVE", "DICT_VERSION"})
"""Guards that a referenced object is alive or unchanged. Not needed: our graphs take everything as an argument."""

BY_IDENTITY = frozenset(guards.CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES) - LIVENESS


@dataclass(frozen=True)
class Unreachable:
    """Stands for the value of an expression that raised on a call."""

    error: Exception

    def __str__(self) -> str:
        return f"nothing ({type(self.error).__name__})"


NAMELESS = ""
"""The text for a value that has no description another process could compare."""


def kinds_of(guard: Guard) -> frozenset[str]:
    """The kinds of a guard that was created: its own, and those that it created in turn."""
    return frozenset({guard.create_fn_name(), *(guard.guard_types or ())})


def expression_of(guard: Guard) -> str:
    """The guarded expression; unique among guards of one kind."""
    attribute = _attribute(guard)
    return f"{guard.name}.{attribute}" if attribute else str(guard.name)


def is_by_identity(guard: Guard) -> bool:
    """Whether a guard that was created compares by identity (`is`)."""
    return bool(kinds_of(guard) & BY_IDENTITY) and guard.create_fn_name() != "TENSOR_MATCH"


def value_of(guard: Guard, get: Callable[[Any], Any]) -> Any:
    """The guarded value, as a serving process has it. `get` evaluates an expression."""
    source = guard.originating_source
    try:
        return type_in_serving(get(source.base)) if isinstance(source, TypeSource) else get(source)
    except Exception as error:  # evaluating may run any code, and `hasattr` guards may have no value
        return Unreachable(error)


def of_identity(value: object) -> str:
    """The name of a value that a guard compares with `is`; without a name, a text of all its contents."""
    return str(value) if isinstance(value, Unreachable) else identity(value) or exact(value)


def of_value(guard: Guard, value: Any, in_order: bool) -> str | None:
    """What `guard` compares of `value`, as text; None if it compares nothing that has to be stored.

    Args:
        in_order: whether the order of a dict's keys is compared, too.

    Raises:
        KeyError: the kind of guard is unknown here.
    """
    kind = guard.create_fn_name()
    if isinstance(value, Unreachable):
        return str(value)
    if kind in BY_IDENTITY or kind == "BUILTIN_MATCH":
        return of_identity(value)
    if kind == "HASATTR":
        attribute = _attribute(guard)
        return str(not attribute or hasattr(value, attribute))
    of_this_kind = functools.partial(_keys, in_order=in_order) if kind == "DICT_KEYS_MATCH" else _FACTS[kind]
    try:
        return of_this_kind(value)
    except Exception:  # another type than where the guard was made, such as None instead of a list
        return f"a {_type(value)}"


def _attribute(guard: Guard) -> str:
    """The attribute of a HASATTR guard; empty up to torch 2.11, where the expression already names the attribute."""
    create: Any = guard.create_fn
    if guard.create_fn_name() != "HASATTR" or not isinstance(create, functools.partial):
        return ""
    return str(create.keywords["attr"] if "attr" in create.keywords else create.args[0])


def _type(value: Any) -> str:
    return identity(type_in_serving(value))


def type_in_serving(value: Any) -> type:
    """The type that a value has in a serving process: the real type for a tensor without memory."""
    if not isinstance(value, FakeTensor):
        return type(value)
    pytype: type | None = value.pytype
    return pytype or (torch.nn.Parameter if is_parameter(value) else torch.Tensor)


def _tensor(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {_type(value)}"
    requires_grad = " requires grad" if value.requires_grad else ""
    return f"{_type(value)} {value.dtype} {value.layout} on {value.device}{requires_grad}, keys {dispatch_keys(value)}"


def dispatch_keys(value: torch.Tensor) -> str:
    """The dispatch keys of a tensor as a hexadecimal mask, without those that depend on where it was made."""
    keys: Any = value.dispatch_keys if isinstance(value, FakeTensor) else None
    keys = keys if keys is not None else torch._C._dispatch_keys(value)
    for key in _MODES:
        keys = keys.remove(key)
    return f"{int(keys.raw_repr()):x}"


def _cow(value: Any) -> str:
    """Whether a tensor is copy-on-write (torch 2.14 and later guard on it)."""
    unfaked: Any = guards
    return f"copy on write {unfaked._try_is_cow_tensor(value)}"


def _stream(value: Any) -> str:
    current: Any = guards
    return f"{value.device.type} stream, current {current._stream_is_current(value)}"


def _length(value: Any) -> str:
    kind = "dict" if isinstance(value, dict) else _type(value)  # as in upstream's guards
    return f"{kind} of {len(value)}"


def _keys(value: Any, in_order: bool) -> str:
    if value is torch.utils._pytree.SUPPORTED_NODES:
        return "the registry of pytrees"  # its size depends on what else was imported
    texts = [of_identity(key) for key in dict.keys(value)]
    if not all(texts):
        texts = [f"a {_type(key)}" for key in dict.keys(value)]
    return f"keys {', '.join(texts if in_order else sorted(texts))}"


def _mapping_keys(value: Any) -> str:
    return f"keys {', '.join(of_identity(key) or _type(key) for key in value)}"


def _subclass(value: Any) -> str:
    return exact(value.__tensor_flatten__()[1]) if hasattr(value, "__tensor_flatten__") else f"a {_type(value)}"


def _sharded(value: Any) -> str:
    """How a DTensor is sharded, and over which mesh. Its sizes are guarded on its local tensor."""
    if not hasattr(value, "placements"):
        return f"a {_type(value)}"
    dtype = None if value.tensor_meta is None else value.tensor_meta.dtype
    mesh = exact([getattr(value.mesh, name) for name in _OF_A_MESH])
    return f"{mesh} {value.placements!r} {getattr(value, 'shard_order', None)!r} {dtype}" if mesh else NAMELESS


def _opaque(value: Any) -> str | None:
    """The facts that an opaque object's type declares for guards."""
    known: Any = opaque_object
    info = known.get_opaque_obj_info(type(value))
    return exact(info.guard_fn(value)) if info is not None and info.guard_fn is not None else None


def _iterator(value: Any) -> str:
    return f"{_type(value)} {value!r}" if type(value).__module__ == "itertools" else f"{_type(value)} {_state(value)}"


def _state(value: Any) -> str:
    return exact(value.__reduce__()[1:])


def _left(value: Any) -> str:
    """The number of items left in an iterator. What it iterates over has guards of its own; this number has not."""
    return f"{_type(value)} of {value.__length_hint__()}"


def _nothing(_: Any) -> None:
    return None


_FACTS: dict[str, Callable[[Any], str | None]] = {
    # On values.
    **dict.fromkeys(
        "EQUALS_MATCH CONSTANT_MATCH BOOL_MATCH NONE_MATCH CONSTANT_SUBCLASS_MATCH NAME_MATCH FLOAT_IS_NAN "
        "COMPLEX_IS_NAN".split(),
        exact,
    ),
    **dict.fromkeys(("TYPE_MATCH", "FAKE_SCRIPT_TYPE_MATCH"), _type),
    **dict.fromkeys(("SEQUENCE_LENGTH", "LIST_LENGTH", "DICT_LENGTH", "EMPTY_NN_MODULE_HOOKS_DICT"), _length),
    **dict.fromkeys(("TUPLE_ITERATOR_LEN", "LIST_REVERSEITERATOR_LEN"), _left),
    "RANGE_ITERATOR_MATCH": _iterator,
    "COUNT_ITERATOR_MATCH": _iterator,
    "MAPPING_KEYS_CHECK": _mapping_keys,
    "DISPATCH_KEY_SET_MATCH": lambda keys: f"{keys.raw_repr():x}",
    # On tensors. Upstream stores their sizes, by source.
    "TENSOR_MATCH": _tensor,
    "COW_TENSOR_MATCH": _cow,
    "TENSOR_SUBCLASS_METADATA_MATCH": _subclass,
    "DTENSOR_SPEC_MATCH": _sharded,
    "OPAQUE_OBJ_GUARD_FN_MATCH": _opaque,
    # These contain their expected value, or compare parts of one call with each other: no text is needed.
    **dict.fromkeys(
        "DICT_CONTAINS DICT_NOT_CONTAINS SET_CONTAINS SET_NOT_CONTAINS NOT_PRESENT_IN_GENERIC_DICT NOT_NONE_MATCH "
        "DUPLICATE_INPUT DATA_PTR_MATCH".split(),
        _nothing,
    ),
    # On the process, not on a value.
    **dict.fromkeys(
        "SHAPE_ENV GLOBAL_STATE GRAD_MODE DETERMINISTIC_ALGORITHMS TORCH_FUNCTION_STATE DEFAULT_DEVICE DUAL_LEVEL "
        "FUNCTORCH_STACK_MATCH AUTOGRAD_SAVED_TENSORS_HOOKS FSDP_TRAINING_STATE".split(),
        _nothing,
    ),
    "CURRENT_STREAM_MATCH": _stream,
}

KINDS = frozenset({*_FACTS, *BY_IDENTITY, *LIVENESS, "BUILTIN_MATCH", "DICT_KEYS_MATCH", "HASATTR"})
"""Every known kind of guard. A graph with another kind cannot be kept."""
