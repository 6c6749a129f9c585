"""Triton's kernels as data: names, source closures, and specializations that can be written down and read back.

Upstream: `triton/runtime/jit.py` (`JITFunction`, `create_function_from_signature`, `compute_cache_key`, `_pack_args`).
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import inspect
import json
import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from triton.compiler import CompiledKernel, make_backend
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

from aot_cache.artifact.key import variant
from aot_cache.errors import TraceError
from aot_cache.upstream.codec import triton_names
from aot_cache.upstream.codec.triton_names import name_of as name_of

Json = Any
JITCallable = triton_names.JITCallable
_JIT = "jit "  # begins the meaning of a name that refers to a jit function


def unwrap(kernel: Any) -> JITFunction | None:
    """The `JITFunction` under heuristics and autotuners; None if `kernel` is no kernel."""
    seen = 0
    while not isinstance(kernel, JITFunction):
        kernel = getattr(kernel, "fn", None)
        seen += 1
        if kernel is None or seen > 8:
            return None
    return kernel


def wrappers(kernel: Any) -> Iterator[Any]:
    """`kernel` and what it wraps, outermost first."""
    seen = 0
    while kernel is not None and seen <= 8:
        yield kernel
        if isinstance(kernel, JITFunction):
            return
        kernel = getattr(kernel, "fn", None)
        seen += 1


def find(name: str, loaded_only: bool = False) -> Any:
    """The object called `module:qualname`; None if there is none.

    With `loaded_only` nothing is imported: a loader must not import a model's modules before the process does.
    """
    module_name, _, qualname = name.partition(":")
    try:
        import sys

        owner: Any = sys.modules.get(module_name) if loaded_only else importlib.import_module(module_name)
        for part in qualname.split("."):
            owner = getattr(owner, part)
    except (ImportError, AttributeError):
        return None
    return owner


# --- source -----------------------------------------------------------------------------------------------------------


def closure(function: Any) -> dict[str, Json]:
    """What decides a kernel's code: its source, that of every function it calls, and the meaning of each name in them.

    Unlike Triton's own `cache_key` it has no line number, so moving a kernel within its file changes nothing. Unlike a plain
    hash it can be checked in the serving process without parsing: see `closure_differs`.

    Returns:
        `{function name: {"src": sha256, "refs": {dotted name: meaning}}}`. If several functions have one name, because a
        factory makes them, all but the first get a number: `name#2`.
    """
    out: dict[str, Json] = {}
    _close(function, out, {})
    return dict(sorted(out.items()))


def _close(function: Any, out: dict[str, Json], keys: dict[int, str]) -> str:
    """Add a function, and the functions it calls, to `out`; returns its key there."""
    if id(function) in keys:
        return keys[id(function)]
    name, number = name_of(function), 1
    key = name
    while key in out:
        number += 1
        key = f"{name}#{number}"
    keys[id(function)] = key
    refs: dict[str, str] = {}
    out[key] = {"src": _source_digest(function), "refs": refs}
    for dotted in triton_names.in_source(function.src):
        value = triton_names.look_up(function, dotted)
        if isinstance(value, JITCallable):
            refs[dotted] = f"{_JIT}{_close(value, out, keys)}"
            continue
        meaning = triton_names.meaning(value)
        if meaning is not None:
            refs[dotted] = meaning
    return key


def closure_digest(document: Mapping[str, Json]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def closure_differs(function: Any, document: Mapping[str, Json]) -> str:
    """How `function` differs from the one whose closure is `document`; empty if it does not."""
    pending, seen = [(function, name_of(function))], set()
    while pending:
        current, key = pending.pop()
        if (id(current), key) in seen:
            continue
        seen.add((id(current), key))
        name, entry = name_of(current), document.get(key)
        if entry is None:
            return f"{name} is not among the functions that it was built from"
        if _source_digest(current) != entry["src"]:
            return f"the source of {name} differs"
        for dotted, meaning in entry["refs"].items():
            value = triton_names.look_up(current, dotted)
            found, wanted = triton_names.meaning(value), meaning
            if isinstance(value, JITCallable):
                pending.append((value, meaning.removeprefix(_JIT)))
                wanted = meaning.partition("#")[0]
            if found != wanted:
                return f"{dotted} in {name} was {wanted} and is {found}"
    return ""


def identity(function: Any, document: dict[str, Json]) -> str:
    """A kernel's name with a digest of its closure, which tells it from other kernels of that name."""
    return variant(name_of(function), closure_digest(document))


def _source_digest(function: Any) -> str:
    return hashlib.sha256(function.src.encode()).hexdigest()[:32]


# --- values -----------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Json:
    """A value of a specialization as JSON.

    Raises:
        TraceError: the value has no JSON form.
    """
    if value is None or type(value) in (
        bool,
        str,
        int,
    ):  # not an enum or numpy scalar: its text is another key
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, enum.Enum):
        return _encode_member(value)
    if isinstance(value, tl.constexpr):
        return {"constexpr": encode(value.value)}
    if type(value) is tl.dtype:
        return {"dtype": value.name}
    if isinstance(value, torch.dtype):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, JITCallable):
        return {"jit": name_of(value), "source": closure_digest(closure(value))[:32]}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return {"named": f"{type(value).__module__}:{type(value).__qualname__}", "t": [encode(v) for v in value]}
    if isinstance(value, tuple):
        return {"t": [encode(v) for v in value]}
    if isinstance(value, list):
        return {"l": [encode(v) for v in value]}
    raise TraceError(
        "a constexpr that can be written to a plan (number, string, enum, dtype, tuple, jit function)",
        f"an object of type {type(value).__module__}.{type(value).__qualname__}",
        "pass it as one of those",
    )


def _encode_member(value: enum.Enum) -> Json:
    """An enum member, written by value: combined flags have no name."""
    name = f"{type(value).__module__}:{type(value).__qualname__}"
    if find(name) is not type(value):
        raise TraceError(
            f"enum {name} of a constexpr cannot be found by its name", hint="define it at the top level of its module"
        )
    return {"enum": name, "value": encode(value.value)}


def decode(value: Json) -> Any:
    """The inverse of `encode`. It imports modules by name: call it only on a plan or bundle whose hash was checked.

    Raises:
        TraceError: a jit function cannot be found, or its source has changed.
    """
    if not isinstance(value, dict):
        return value
    if "constexpr" in value:
        return tl.constexpr(decode(value["constexpr"]))
    if "dtype" in value:
        return tl.dtype(value["dtype"])
    if "torch" in value:
        return getattr(torch, value["torch"])
    if "float" in value:
        return float(value["float"])
    if "enum" in value:
        return find(value["enum"])(decode(value["value"]))
    if "named" in value:
        return find(value["named"])(*[decode(v) for v in value["t"]])
    if "t" in value:
        return tuple(decode(v) for v in value["t"])
    if "l" in value:
        return [decode(v) for v in value["l"]]
    found = find(value["jit"])
    function = found if isinstance(found, JITCallable) else unwrap(found)
    if function is None:
        raise TraceError(f"no jit function {value['jit']}", hint="import the module that defines it")
    if closure_digest(closure(function))[:32] != value["source"]:
        raise TraceError(f"the source of jit function {value['jit']} has changed", hint="build again")
    return function


def names_a_function(value: Json) -> bool:
    """Whether an encoded value holds a jit function."""
    if isinstance(value, dict):
        return "jit" in value or any(names_a_function(v) for v in value.values())
    return isinstance(value, list) and any(names_a_function(v) for v in value)


def decode_pair(pair: Json) -> tuple[Any, Any]:
    """One parameter's (type, value). Nearly all pairs are plain, and are returned without decoding."""
    first, second = pair["t"] if isinstance(pair, dict) else pair
    if isinstance(first, dict):
        first = decode(first)
    if isinstance(second, dict):
        second = decode(second)
    return (first, second)


# --- specializations --------------------------------------------------------------------------------------------------


def bind(function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, list[Any], dict[str, Any]]:
    """(Triton's in-memory key, specialization, options) of one launch, computed by Triton's own binder."""
    _, keys, _, _, binder = function.device_caches[0]
    _, specialization, options = binder(*args, **kwargs)
    return compute_cache_key(keys, specialization, options), specialization, options


_OF_ALL_CLASSES = (1, 16, 3, 1 << 40, (1 << 40) + 1, 1 << 63, (1 << 63) + 1)
"""An integer of each class that Triton compiles for: 1, multiples of 16 and others, of 32 and 64 bits, with and without sign."""


def integer_classes(function: JITFunction, at: int) -> list[Json]:
    """The encoded (type, value) pairs that Triton's own binder gives the parameter at position `at` for integers."""
    parameter = function.params[at]
    alone = inspect.Signature([function.signature.parameters[parameter.name].replace(default=inspect.Parameter.empty)])
    specialize = create_function_from_signature(alone, [parameter], function.device_caches[0][3])
    pairs = [encode(tuple(specialize(value)[1][0])) for value in _OF_ALL_CLASSES]
    return [pair for number, pair in enumerate(pairs) if pair not in pairs[:number]]


def memory_key(specialization: list[Any], options: dict[str, Any]) -> str:
    """Triton's in-memory key, computed by this process's Triton."""
    return str(compute_cache_key({}, specialization, options))


def launch_defaults(function: JITFunction, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`kwargs` with what `JITFunction.run` adds before binding. The order is part of the key."""
    from triton import knobs

    kwargs["debug"] = kwargs.get("debug", function.debug) or knobs.runtime.debug
    for name in ("instrumentation_mode", "fpsan_homomorphic_casts"):
        if hasattr(knobs.compilation, name) and (name != "fpsan_homomorphic_casts" or _run_adds(name)):
            kwargs[name] = getattr(knobs.compilation, name)
    return kwargs


_run_sources: dict[str, bool] = {}


def _run_adds(name: str) -> bool:
    if name not in _run_sources:
        _run_sources[name] = f'kwargs["{name}"]' in inspect.getsource(_ORIGINAL_RUN)
    return _run_sources[name]


_ORIGINAL_RUN = JITFunction.run


def option_overrides(function: JITFunction, kwargs: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Backend options that a launch passed as kernel parameters of the same name (`num_warps: tl.constexpr`)."""
    names = {p.name for p in function.params}
    backend = function.device_caches[0][3]
    fields = set(backend.parse_options({}).__dict__)
    return {k: v for k, v in kwargs.items() if k in names and k in fields and k not in options}


def pack(
    function: JITFunction, specialization: list[Any], kwargs: dict[str, Any], target: Any
) -> tuple[Any, Any, Any, Any]:
    """(options, signature, constexprs, attrs) that `triton.compile` takes for a specialization."""
    backend = make_backend(target)
    bound = {p.name: value for p, (_, value) in zip(function.params, specialization)}
    return function._pack_args(backend, dict(kwargs), bound, specialization, kwargs)  # type: ignore[no-any-return]


def compile_for(
    function: JITFunction, specialization: list[Any], kwargs: dict[str, Any], target: Any, device: int
) -> CompiledKernel:
    """Compile a specialization as a launch on `device` would, without installing or loading it.

    Raises:
        Exception: whatever Triton's compiler raises.
    """
    with _front_end:
        options, signature, constexprs, attrs = pack(function, specialization, kwargs, target)
        _ = function.device_caches[device]  # gluon and plain kernels bind their own kind of source here
        source = function.ASTSource(function, signature, constexprs, attrs)
        _ = function.cache_key
    make_ir = source.make_ir

    def one_at_a_time(*args: Any, **kwargs: Any) -> Any:
        with _front_end:
            return make_ir(*args, **kwargs)

    source.make_ir = one_at_a_time
    return triton.compile(source, target=target, options=options.__dict__)


_front_end = threading.Lock()
"""Held while Python source is parsed: in Python 3.11, `ast.parse` on two threads fails now and then with "AST constructor
recursion depth mismatch" (https://github.com/python/cpython/issues/106905). The lowering, which takes the time, is outside."""


def signature_of(function: JITFunction, specialization: list[Any]) -> dict[str, Any]:
    """Parameter name → type, as the launcher reads it."""
    return {p.name: ty for p, (ty, _) in zip(function.params, specialization)}


def tuning_key(tuner: Autotuner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The key under which an autotuner caches its choice, as `Autotuner.run` computes it."""
    named = {**dict(zip(tuner.arg_names, args)), **kwargs}
    named = {k: v for k, v in named.items() if k in tuner.arg_names}
    key = [named[k] for k in tuner.keys if k in named]
    key += [str(v.dtype) for v in named.values() if hasattr(v, "dtype")]
    return tuple(key)


def config_kwargs(config: Any) -> dict[str, Any]:
    """A config's launch arguments, as `Autotuner.run` passes them."""
    return dict(config.all_kwargs())


def encoded_config(config: Any) -> dict[str, Json]:
    """A config's launch arguments as JSON.

    Raises:
        TraceError: an argument has no JSON form.
    """
    return {name: encode(value) for name, value in config_kwargs(config).items()}
