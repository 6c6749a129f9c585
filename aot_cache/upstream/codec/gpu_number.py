"""Graphs on another GPU of the process than GPU 0, for which all are built.

A rank that uses `cuda:1` gets the same code with another number in it: in the text of what guards compare, in Dynamo's
bytecode, and in the Python module that Inductor writes. Kernels are binaries for any GPU of their kind; `inductor_tuning` says
onto which one they are loaded. What names the GPU in a way that is not known here is refused.

Upstream: `torch/_inductor/codegen/wrapper.py` and `torch/_inductor/codegen/cuda/device_op_overrides.py`, which write the number;
`torch/_inductor/utils.py` (`device(type='cuda', index=0)` is the repr of a device).
"""

from __future__ import annotations

import pickletools
import re
import types
from collections.abc import Callable, Iterator

BUILT_FOR = 0
_NAME = re.compile(rf"\bcuda:{BUILT_FOR}\b")
_KERNEL = re.compile(r"(async_compile\.triton\('\w+', '''.*?''', device_str='cuda'\))", re.DOTALL)
"""A kernel's definition. Its text is the key under which its binaries are found, so it stays as it is."""
_COMMENT = re.compile(r"^[ \t]*#.*\n", re.MULTILINE)
"""A line in which Inductor explains what a kernel is for; it shows devices, too."""
_WRITTEN = re.compile(
    r"(?P<before>_DeviceGuard\(|set_device\(|get_raw_stream\(|device\(type='cuda', index=|'cuda:)"
    rf"{BUILT_FOR}(?P<after>\)|'| as )"
)
_LEFT = re.compile(
    rf"cuda:{BUILT_FOR}\b|\b(?:index|device_index|device_idx|device)={BUILT_FOR}\b|\w*(?:Guard|_device|stream)\({BUILT_FOR}\b"
)


def in_text(text: str, number: int) -> str:
    """The text of a guard or of a constant, for GPU `number`."""
    return _NAME.sub(f"cuda:{number}", text) if number != BUILT_FOR else text


def in_module(source: str, number: int) -> str:
    """The Python module of a graph, for GPU `number`.

    Raises:
        ValueError: it names the GPU in a way that is not known here.
    """

    def moved(part: str) -> str:
        found = _WRITTEN.sub(rf"\g<before>{number}\g<after>", _COMMENT.sub("", part))
        left = _LEFT.search(found)
        if left:
            raise ValueError(f"its code names the GPU as {left[0]!r}")
        return found

    return _outside_kernels(source, moved) if number != BUILT_FOR else source


def kernels(source: str) -> int:
    """How many Triton kernels the module defines."""
    return len(_KERNEL.findall(source))


def _outside_kernels(source: str, change: Callable[[str], str]) -> str:
    return "".join(part if n % 2 else change(part) for n, part in enumerate(_KERNEL.split(source)))


def holds_devices(data: bytes) -> bool:
    """Whether a pickle (protocol 4 or later) holds a `torch.device`."""
    memo: list[str] = []
    pushed = ["", ""]  # the two last texts on the stack
    for operation, argument, _ in pickletools.genops(data):
        name, text = operation.name, ""
        if name == "MEMOIZE":
            memo.append(pushed[1])
            continue
        if name in ("FRAME", "PROTO"):  # nothing of the stack; a frame may begin between any two texts
            continue
        if name == "STACK_GLOBAL" and pushed == ["torch", "device"]:
            return True
        if "UNICODE" in name:
            text = str(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            text = memo[int(argument or 0)]
        pushed = [pushed[1], text]
    return False


def named_in(code: types.CodeType) -> bool:
    """Whether users' code names GPU 0 itself: then its graph is for that GPU, wherever it is called."""
    return any(_NAME.search(text) for text in _texts(code))


def _texts(code: types.CodeType) -> Iterator[str]:
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _texts(value)
        else:
            yield repr(value)
