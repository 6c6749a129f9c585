"""Hook the point where Dynamo is about to compile a frame: observe the frame, answer in Dynamo's place, or let it compile.

Both hooks are on the miss path: a call whose guards hold in Dynamo's own cache never gets here.
Upstream: `torch/_dynamo/convert_frame.py` (`CatchErrorsWrapper`, `_compile`), `torch/_dynamo/types.py`
(`ConvertFrameReturn`, `GuardedCode`).
"""

from __future__ import annotations

import contextlib
import os
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _FrameAction as FrameAction
from torch._C._dynamo.eval_frame import _FrameExecStrategy as FrameExecStrategy
from torch._dynamo import config, convert_frame
from torch._dynamo.eval_frame import innermost_backend
from torch._dynamo.types import ConvertFrameReturn, GuardedCode, wrap_guarded_code
from torch._dynamo.utils import orig_code_map
from torch._guards import CompileId

from aot_cache.errors import one_line
from aot_cache.upstream import patch
from aot_cache.upstream.hooks import dynamo_stance

Json = Any


@dataclass(frozen=True)
class Frame:
    """A call for which Dynamo has no code.

    Args:
        code: the function's code object.
        f_globals, f_locals: the call's globals and locals.
        wrapping: its compile config, see `compile_config_of`; None if the backend is not Inductor.
        fullgraph: whether a graph break is an error.
    """

    code: types.CodeType
    f_globals: dict[str, Any]
    f_locals: dict[str, Any]
    wrapping: dict[str, Json] | None
    fullgraph: bool

    @property
    def module(self) -> str:
        return str(self.f_globals.get("__name__", ""))

    @property
    def function(self) -> str:
        """`module:qualname`, as in plans and bundles."""
        return f"{self.module}:{self.name}"

    @property
    def name(self) -> str:
        """The function's qualified name (on Python 3.10 its plain name, as code objects have no other)."""
        return str(getattr(self.code, "co_qualname", self.code.co_name))


def compile_config_of(backend: Any) -> dict[str, Json] | None:
    """The compile config: the arguments of `torch.compile` that decide its code: backend, options (modes are options), dynamic.

    None for any backend except Inductor.
    """
    inner: Any = innermost_backend(backend)
    if type(inner) is not torch._TorchCompileInductorWrapper:
        return None
    options = {
        name: value if isinstance(value, (bool, int, str)) else repr(value) for name, value in inner.config.items()
    }
    return {"backend": "inductor", "options": dict(sorted(options.items())), "dynamic": inner.dynamic}


def is_fullgraph(callback: Any) -> bool:
    """Whether a graph break is an error in calls for which Dynamo has this `callback`."""
    inner = getattr(callback, "_torchdynamo_orig_backend", callback)
    return bool(getattr(getattr(inner, "_inner_convert", inner), "_one_graph", False))


_ARGUMENTS = ("code", "globals", "locals", "builtins", "closure", "compiler_fn", "one_graph")
"""The first parameters of `convert_frame._compile`, as a list, because another library's hook may hide its signature."""

Compile = Callable[[Any], ConvertFrameReturn]
Instead = Callable[[Frame, Compile], ConvertFrameReturn]


def run_without_compiling() -> ConvertFrameReturn:
    """Run this call, and everything it calls, as plain Python. Later calls are not affected."""
    dynamo_stance.count_as_compiled()
    return ConvertFrameReturn(FrameExecStrategy(FrameAction.DEFAULT, FrameAction.SKIP), apply_to_code=False)


_refused = threading.local()


def refuse(error: Exception) -> ConvertFrameReturn:
    """Make this call raise `error`, even if Dynamo suppresses errors. Works only while `before_compiling` is hooked."""
    _refused.error = error
    return run_without_compiling()


def intercept_compile(handler: Instead) -> Callable[[], None]:
    """Call `handler(frame, compile)` where Dynamo would compile a frame that it has not decided to skip.

    `compile(package)` lets Dynamo compile, and record its results in `package` (see `dynamo_package.Package`) unless that is
    None. Returns a function that takes the hook out.
    """

    def _compile(original: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(_ARGUMENTS, args)), **kwargs}
        frame = Frame(
            given["code"],
            given["globals"],
            given["locals"],
            compile_config_of(given["compiler_fn"]),
            bool(given["one_graph"]),
        )

        def go_on(package: Any) -> Any:
            return original(*args, **(kwargs if package is None else {**kwargs, "package": package}))

        return handler(frame, go_on)

    return patch.replace(convert_frame, "_compile", _compile)


def guards_of(answer: ConvertFrameReturn) -> Any:
    """The guard manager of the code that Dynamo compiled; None if it compiled nothing."""
    return None if answer.guarded_code is None else answer.guarded_code.guard_manager


def why_not(answer: ConvertFrameReturn) -> str:
    """Why Dynamo compiled nothing."""
    return getattr(answer, "skip_reason", None) or "it gave no reason"


_NOT_WRITTEN = (
    "torch cannot write this graph down; where it is over DTensors whose sizes vary, declare those sizes with Values"
)


def why_given_up(error: Exception, name: str) -> str:
    """Why Dynamo or its backend gave up on the function `name`, in one line, with the position in user code."""
    frames = getattr(error, "real_stack", None) or ()  # set by Dynamo if it knows the current line
    inside = os.path.dirname(os.path.realpath(torch.__file__)) + os.sep
    stack = [
        f for f in frames if not f.filename.startswith("<") and not os.path.realpath(f.filename).startswith(inside)
    ]
    place = f" ({stack[-1].filename}:{stack[-1].lineno})" if stack else ""
    why = one_line(error)
    if "pickle" in why:
        why += f"; {_NOT_WRITTEN}"
    return f"Dynamo gave up on {name}{place}: {why}"


@contextlib.contextmanager
def hooked(handler: Instead) -> Iterator[None]:
    """`intercept_compile` until the block ends."""
    undo = intercept_compile(handler)
    try:
        yield
    finally:
        undo()


@dataclass(frozen=True)
class Found:
    """Code for a frame, and the guards under which it holds."""

    code: types.CodeType
    guard_manager: Any
    number: int


def before_compiling(
    find: Callable[[Frame], Found | None], wanted: Callable[[types.CodeType], bool]
) -> Callable[[], None]:
    """Call `find(frame)` before Dynamo handles a frame whose code is `wanted`, and put the result into Dynamo's cache.

    The cache entry belongs to the `torch.compile` wrapper of the call, as if that had compiled it. Returns a function that
    takes the hook out.
    """
    wrapper: Any = convert_frame.CatchErrorsWrapper

    def ask(self: Any, frame: Any) -> ConvertFrameReturn | None:
        if not wanted(frame.f_code):
            return None
        if _left_alone():
            return run_without_compiling()  # else upstream would skip this function in all later calls, too
        config, fullgraph = compile_config_of(self), is_fullgraph(self)
        found = find(Frame(frame.f_code, frame.f_globals, frame.f_locals, config, fullgraph))
        return None if found is None else as_compiled(found, frame.f_code)

    def __call__(original: Any, self: Any, frame: Any, cache_entry: Any, frame_state: Any) -> ConvertFrameReturn:
        answer: ConvertFrameReturn | None = ask(self, frame)
        if answer is None:
            answer = original(self, frame, cache_entry, frame_state)
        error = _refused.__dict__.pop("error", None)
        if error is not None:
            raise error
        return answer

    take_out = patch.replace(wrapper, "__call__", __call__)
    undo_stance = dynamo_stance.ask_where_recompiling_fails(wrapper, ask)

    def undo() -> None:
        undo_stance()
        take_out()

    return undo


def as_compiled(found: Found, code: types.CodeType) -> ConvertFrameReturn:
    """The answer that Dynamo would give for a frame of `code` if it had just compiled `found`."""
    orig_code_map[found.code] = code  # as Dynamo does for its own code
    convert_frame.output_codes.add(found.code)
    convert_frame.input_codes.add(code)  # so that `torch._dynamo.reset` forgets it
    number = CompileId(frame_id=found.number, frame_compile_id=0)
    return wrap_guarded_code(GuardedCode(found.code, found.guard_manager, number, "aot-cache"))


def _left_alone() -> bool:
    """Whether Dynamo would run a frame as plain Python: it is disabled, or a TorchDispatchMode is active."""
    return bool(config.disable) or torch._C._len_torch_dispatch_stack() > 0


def count(note: Callable[[str, str], None]) -> Callable[[], None]:
    """Call `note(kind, name)`: kind `frame` for each frame that Dynamo traces, `graph_compile` for each graph a backend compiles.

    Returns a function that stops it.
    """
    from torch._dynamo.output_graph import OutputGraph

    def look(frame: Frame, go_on: Compile) -> ConvertFrameReturn:
        note("frame", f"{frame.module}:{frame.code.co_name}")
        return go_on(None)

    def call_user_compiler(call: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        note("graph_compile", str(getattr(self.compiler_fn, "__name__", "backend")))
        return call(self, *args, **kwargs)

    undo_graphs = patch.replace(OutputGraph, "call_user_compiler", call_user_compiler)
    undo_frames = intercept_compile(look)

    def undo() -> None:
        undo_frames()
        undo_graphs()

    return undo
