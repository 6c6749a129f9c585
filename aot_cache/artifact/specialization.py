"""Specializations as text: what one kernel binary was compiled for, on one line. Imports neither torch nor Triton.

Plans hold no parameter names, because Triton's key has none. They are read from the kernel's source file, if it still has
the source that the plan was made from. The module is not imported: that could take seconds and run arbitrary code.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from aot_cache.artifact.key import function_of
from aot_cache.artifact.plan import Pair, Unit

Names = Callable[[str, Mapping[str, Any]], Sequence[str]]
"""(kernel, its source closure) → its parameters' names; empty if unknown."""


def no_names(kernel: str, closure: Mapping[str, Any]) -> Sequence[str]:
    """A `Names` that knows none: arguments are then shown by position."""
    return ()


def signature(unit: Unit, names: Sequence[str] = ()) -> str:
    """One specialization on one line, such as `q:*bf16:16 T:i32 K=128 num_warps=1`."""
    if len(names) != len(unit.specialization):
        names = [f"#{n}" for n in range(len(unit.specialization))]
    words = [_argument(name, pair) for name, pair in zip(names, unit.specialization)]
    # Options that are off or empty are left out.
    words += [f"{k}={value_text(v)}" for k, v in unit.options.items() if v not in (None, False, "") and k not in names]
    return " ".join(words)


def _argument(name: str, pair: Pair) -> str:
    kind, value = pair["t"]
    if isinstance(kind, dict):  # a tuple: each element has its own type and value
        values = value["t"] if isinstance(value, dict) else [None] * len(kind["t"])
        return " ".join(_argument(f"{name}.{n}", {"t": [k, v]}) for n, (k, v) in enumerate(zip(kind["t"], values)))
    if kind == "constexpr":
        return f"{name}={value_text(value)}"
    # Triton's attributes: D is divisible by 16, S points into less than 2 GiB (AMD's 32-bit offsets).
    marks = {"D": ":16", "S": ":32bit"}
    return f"{name}:{kind}" + "".join(marks.get(c, f":{c}") for c in (value if isinstance(value, str) else ""))


def value_text(value: object) -> str:
    """An encoded value (see `upstream.codec.triton_jit.encode`) as Python text."""
    if not isinstance(value, dict):
        return repr(value)
    if "named" in value:
        return f"{value['named'].rpartition(':')[2]}({', '.join(map(value_text, value['t']))})"
    if "enum" in value:
        return f"{value['enum'].rpartition(':')[2]}({value_text(value['value'])})"
    for tag, write in _WRITTEN.items():
        if tag in value:
            return write(value[tag])
    raise ValueError(f"no value of a known kind: {value}")


_WRITTEN: dict[str, Callable[[Any], str]] = {
    "constexpr": value_text,
    "dtype": str,
    "torch": "torch.{}".format,
    "float": str,
    "jit": lambda name: str(name).rpartition(":")[2],
    "t": lambda items: f"({', '.join(map(value_text, items))})",
    "l": lambda items: f"[{', '.join(map(value_text, items))}]",
}


def closure_digest(closure: Mapping[str, Any]) -> str:
    """Same as `upstream.codec.triton_jit.closure_digest`, which cannot be imported without Triton."""
    return hashlib.sha256(json.dumps(closure, sort_keys=True).encode()).hexdigest()


@cache
def _module_text(module: str) -> str:
    """A module's source, found without importing it or its parent packages; empty if it is not installed."""
    path: list[str] | None = [os.getcwd(), *sys.path]  # the builder's worker looks in the working folder first, too
    origin = None
    for part in module.split("."):
        spec = PathFinder.find_spec(part, path)  # not by its whole name: a namespace package would ask for its parent
        if spec is None:
            return ""
        path = list(spec.submodule_search_locations or ())
        origin = spec.origin
    try:
        return Path(origin).read_text(encoding="utf-8") if origin and origin.endswith(".py") else ""
    except (OSError, UnicodeDecodeError):
        return ""


def parameter_names(kernel: str, closure: Mapping[str, Any]) -> Sequence[str]:
    """A kernel's parameters, read from the installed source; empty if the kernel was built from another source."""
    function = function_of(kernel)
    module, _, qualname = function.partition(":")
    text = _module_text(module)
    wanted = str(closure[function]["src"]) or "-"
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ()
    lines = [line + "\n" for line in text.split("\n")]  # as ast counts them; splitlines splits at more characters
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name != qualname.rpartition(".")[2]:
            continue
        body = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        if hashlib.sha256(body.encode()).hexdigest()[: len(wanted)] == wanted:
            return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return ()
