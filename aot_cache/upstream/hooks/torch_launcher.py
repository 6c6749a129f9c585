"""Launch a Triton kernel through torch, where Triton's own launcher cannot be built because there is no C compiler.

Up to Triton 3.6 a launcher is a C module for the types of a kernel's arguments. Bundles have them for the kernels that were
built; a kernel that was missed needs another one. torch has a launcher for any types, which Inductor uses. It is some
microseconds slower.

Upstream: `torch/csrc/inductor/static_launcher/cuda.cpp` (`_launch_kernel`, whose types are letters; a pointer may be a tensor, an
integer or None), `torch/_inductor/runtime/static_triton_launcher.py` (`type_mappings`), and what Triton calls its launcher with:
`triton/backends/nvidia/driver.py` (`CudaLauncher.__call__`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

_LETTERS = {
    "i1": "i", "i8": "b", "i16": "h", "i32": "i", "i64": "l",
    "u1": "I", "u8": "B", "u16": "H", "u32": "I", "u64": "K",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
"""Half precision is left out: Triton passes it as two bytes, and torch as a float."""


class TorchLauncher:
    """Stands for the C module `__triton_launcher` of one signature.

    Args:
        types: Triton's names of the arguments' types; a tuple argument has a tuple.
        why: raised where torch cannot launch the kernel either (clusters, cooperative and dependent launches).

    Raises:
        KeyError: an argument has a type that torch's launcher does not have.
        ImportError: this torch has no such launcher.
    """

    def __init__(self, types: Sequence[Any], why: BaseException) -> None:
        from torch._C import _StaticCudaLauncher

        self._launch: Callable[..., None] = _StaticCudaLauncher._launch_kernel
        self._types, self._why = types, why
        self._letters = "".join(_letters(types)) + "OO"  # the kernel's two scratch buffers

    def launch(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        function: int,
        cooperative: bool,
        dependent: bool,
        global_scratch: Any,
        profile_scratch: Any,
        kernel: tuple[int, int, int],
        launch: Any,
        enter: Callable[[Any], object] | None,
        leave: Callable[[Any], object] | None,
        *args: Any,
    ) -> None:
        """As Triton's: `kernel` is (warps, CTAs, bytes of shared memory), `launch` is what the hooks are called with."""
        warps, ctas, shared = kernel
        if ctas != 1 or cooperative or dependent:
            raise self._why
        if enter is not None:
            enter(launch)
        if grid_x * grid_y * grid_z > 0:
            given = (*_passed(self._types, args), global_scratch, profile_scratch)
            self._launch(function, grid_x, grid_y, grid_z, warps, shared, self._letters, given, stream)
        if leave is not None:
            leave(launch)


def _letters(types: Sequence[Any]) -> list[str]:
    out: list[str] = []
    for one in types:
        if isinstance(one, tuple):
            out += _letters(one)
        elif one != "constexpr":
            out.append("O" if one[0] == "*" else _LETTERS[one])
    return out


def _passed(types: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The arguments that the kernel has: no constants, and the parts of tuples."""
    out: list[Any] = []
    for one, value in zip(types, args, strict=True):
        if isinstance(one, tuple):
            out += _passed(one, value)
        elif one != "constexpr":
            out.append(value)
    return out
