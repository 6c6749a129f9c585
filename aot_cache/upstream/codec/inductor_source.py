"""The Python module that Inductor writes for a graph, without imports that it does not need where it is loaded.

Each such module imports the compiler (lowerings, templates, memory planning), a second or more, to have at hand what few
graphs use. What is used stays; library calls are the plain functions of torch that upstream registers under their names.

Upstream: `torch/_inductor/codegen/wrapper.py` (`write_header`), `torch/_inductor/kernel/` (`ExternKernelChoice`).
"""

from __future__ import annotations

import re
import types

import torch

extern_kernels = types.SimpleNamespace(
    mm=torch.mm, addmm=torch.addmm, bmm=torch.bmm, baddbmm=torch.baddbmm, convolution=torch.convolution
)
"""What modules of graphs import from here; an artifact names it."""

_IMPORT = re.compile(r"^from torch\._inductor\.[\w.]+ import (\w+)(?: as (\w+))?\n", re.MULTILINE)
_CALL = re.compile(r"\bextern_kernels\.(\w+)")
_OURS = f"from {__name__} import extern_kernels\n"


def lean(source: str) -> str:
    """`source` without what it imports of Inductor and does not use."""
    head, start, rest = source.partition("\naten = ")
    simple = all(hasattr(extern_kernels, name) for name in _CALL.findall(rest))

    def kept(found: re.Match[str]) -> str:
        name = found[2] or found[1]
        if not re.search(rf"\b{name}\b", rest):
            return ""
        return _OURS if name == "extern_kernels" and simple else found[0]

    return _IMPORT.sub(kept, head) + start + rest
