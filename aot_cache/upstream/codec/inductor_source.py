"""Remove imports that are not needed at load time from the Python module that Inductor writes for a graph.

Each such module imports parts of the compiler (lowerings, templates, memory planning) that few graphs use, which takes a
second or more. Used imports stay. Library calls go to the plain torch functions that upstream registers under these names.

Upstream: `torch/_inductor/codegen/wrapper.py` (`write_header`), `torch/_inductor/kernel/` (`ExternKernelChoice`).
"""

from __future__ import annotations

import re
import types

import torch

extern_kernels = types.SimpleNamespace(
    mm=torch.mm, addmm=torch.addmm, bmm=torch.bmm, baddbmm=torch.baddbmm, convolution=torch.convolution
)
"""Imported from here by modules of graphs. Stored artifacts contain this name, so it must not change."""

_IMPORT = re.compile(r"^from torch\._inductor\.[\w.]+ import (\w+)(?: as (\w+))?\n", re.MULTILINE)
_CALL = re.compile(r"\bextern_kernels\.(\w+)")
_OURS = f"from {__name__} import extern_kernels\n"


def lean(source: str) -> str:
    """`source` without unused imports from Inductor."""
    head, start, rest = source.partition("\naten = ")
    simple = all(hasattr(extern_kernels, name) for name in _CALL.findall(rest))

    def kept(found: re.Match[str]) -> str:
        name = found[2] or found[1]
        if not re.search(rf"\b{name}\b", rest):
            return ""
        return _OURS if name == "extern_kernels" and simple else found[0]

    return _IMPORT.sub(kept, head) + start + rest
