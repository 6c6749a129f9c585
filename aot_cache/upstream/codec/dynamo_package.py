"""Collect what Dynamo makes of one call: bytecode, guards, resume functions, and the compiled graphs that they call.

`Package` replaces upstream's own package, whose methods Dynamo calls while it compiles a frame. It keeps code objects, needs no
source files and writes nothing.

Upstream: `torch/_dynamo/package.py` (`CompilePackage`), `torch/_dynamo/output_graph.py` (its calls of a package).
"""

from __future__ import annotations

import contextlib
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class CompiledFrame:
    """The result of compiling one frame.

    Args:
        code: the frame's own code.
        module: the module whose globals the frame uses.
        guards: pickled guard state (see `dynamo_guards`).
        dynamo_code: the bytecode that runs instead.
        graphs: names of the compiled graphs that `dynamo_code` calls.
        imports: alias → module, for globals that `dynamo_code` or the guards use.
        resumes: name → (code, module) of the resume functions after graph breaks.
        inlined: code of every function that was inlined into the frame.
        bypassed: why the frame cannot be kept; empty if it can.
    """

    code: types.CodeType
    module: str
    guards: bytes = b""
    dynamo_code: types.CodeType | None = None
    graphs: list[str] = field(default_factory=list)
    imports: dict[str, str] = field(default_factory=dict)
    resumes: dict[str, tuple[types.CodeType, str]] = field(default_factory=dict)
    inlined: list[types.CodeType] = field(default_factory=list)
    bypassed: str = ""


class Package:
    """The part of `CompilePackage` that Dynamo calls for one frame."""

    def __init__(self, code: types.CodeType, module: str) -> None:
        self.frame = CompiledFrame(code, module)

    def is_initialized(self) -> bool:
        return True

    @contextlib.contextmanager
    def code_context(self, code: types.CodeType) -> Iterator[None]:
        yield

    def add_guarded_code(self, guards_state: bytes, dynamo_code: types.CodeType) -> None:
        self.frame.guards, self.frame.dynamo_code = guards_state, dynamo_code

    def add_inlined_source(self, sources: list[types.CodeType]) -> None:
        self.frame.inlined = list(dict.fromkeys(sources))

    def update_device_type(self, graph: Any) -> None: ...

    def bypass_current_entry(self) -> None:
        self.frame.bypassed = self.frame.bypassed or "Dynamo cannot write it down"

    bypass_current_compile = bypass_current_entry  # its name from torch 2.15 on

    def add_resume_function(self, python_code: types.CodeType, python_module: str, function_name: str) -> None:
        self.frame.resumes[function_name] = (python_code, python_module)

    def add_import_source(self, alias: str, module_name: str) -> None:
        self.frame.imports[alias] = module_name

    def add_backend_id(self, backend_id: str, backend: Any | None = None) -> None:
        self.frame.graphs.append(backend_id)


_NUMBERED = re.compile(
    r".*_\d+_c\d+(_\d+)*|__gen_rand_values_\d+|__warnings_warn_wrapper_\d+|_[0-9a-z]*__builtins_dict.*"
)
"""Globals whose names Dynamo makes from an address or a counter (`OutputGraph.install_global_by_id`, `install_global`)."""


def numbered_globals(code: types.CodeType) -> list[str]:
    """Global names in `code` that are valid only in the process that compiled it."""
    found = [name for name in code.co_names if _NUMBERED.fullmatch(name)]
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            found += numbered_globals(value)
    return list(dict.fromkeys(found))
