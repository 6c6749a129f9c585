"""The distance between two results, and the tolerance for it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from aot_cache.rehearsal.leaves import Leaf

TOLERANCES = {"float64": 1e-9, "complex128": 1e-9, "float32": 1e-5, "complex64": 1e-5}
HALF, EIGHT_BITS = 2e-2, 1e-1
NOISE = 1e-7
"""A root mean square below this counts as zero with rounding errors."""
_PART = 1 << 24


@dataclass(frozen=True)
class Distance:
    """The largest of several distances.

    Args:
        value: relative norm of the difference; for integers and bools, the share of elements that differ; infinite if shape,
            dtype, device or type differ.
        where: path of the leaf with this distance.
        close: whether all distances are within tolerance.
    """

    value: float = 0.0
    where: str = ""
    close: bool = True


def tolerance_of(dtypes: Iterable[str]) -> float:
    """The tolerance for floats that were computed with these dtypes: that of the least precise one."""
    return max(map(_tolerance, dtypes), default=TOLERANCES["float32"])


def _tolerance(dtype: str) -> float:
    if dtype in TOLERANCES:
        return TOLERANCES[dtype]
    return HALF if dtype in ("float16", "bfloat16") else EIGHT_BITS


def dtypes_of(found: Iterable[Any]) -> set[str]:
    """Names of the floating-point and complex dtypes among tensors."""
    return {str(t.dtype).removeprefix("torch.") for t in found if t.is_floating_point() or t.is_complex()}


def compare(found: Sequence[Leaf], wanted: Sequence[Leaf], tolerance: float, given: bool) -> Distance:
    """The largest distance between two lists of leaves, which should have the same paths.

    Args:
        tolerance: for floats.
        given: the user set the tolerance, so it also is the share of integers that may differ; else none may.
    """
    if [leaf.path for leaf in found] != [leaf.path for leaf in wanted]:
        names = {leaf.path for leaf in found} ^ {leaf.path for leaf in wanted}
        return Distance(math.inf, f"{min(names, default='the order')}, which only one of the two has", False)
    worst = Distance()
    for mine, theirs in zip(found, wanted):
        value, exact = distance(mine.value, theirs.value)
        close = value <= (0.0 if exact and not given else tolerance)
        if (not close, value) > (not worst.close, worst.value):
            worst = Distance(value, mine.path, close)
    return worst


def distance(found: object, wanted: object) -> tuple[float, bool]:
    """(distance, whether the values must be equal unless the user sets a tolerance)."""
    import torch

    if not isinstance(wanted, torch.Tensor) or not isinstance(found, torch.Tensor):
        return (0.0 if _same_value(found, wanted) else math.inf), True
    if found.shape != wanted.shape or found.dtype != wanted.dtype or found.device != wanted.device:
        return math.inf, True
    if wanted.device.type == "meta" or not wanted.numel():
        return 0.0, True
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return float((found != wanted).double().mean()), True
    return _relative(found, wanted), False


def _same_value(found: Any, wanted: Any) -> bool:
    if type(found) is not type(wanted):
        return False
    return bool(found == wanted) or (isinstance(found, float) and math.isnan(found) and math.isnan(wanted))


def _relative(found: Any, wanted: Any) -> float:
    """Norm of the difference over the norm of `wanted`; infinite if NaNs and infinities are not in the same places."""
    import torch

    apart, size = 0.0, 0.0
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    with torch.no_grad():
        pieces = zip(found.detach().flatten().split(_PART), wanted.detach().flatten().split(_PART))
        for mine, theirs in pieces:
            mine, theirs = mine.to(wide), theirs.to(wide)
            finite = torch.isfinite(theirs)
            if not torch.equal(finite, torch.isfinite(mine)) or not torch.equal(
                torch.nan_to_num(mine[~finite]), torch.nan_to_num(theirs[~finite])
            ):
                return math.inf
            mine, theirs = mine[finite], theirs[finite]
            apart += float((mine - theirs).abs().square().sum())
            size += float(theirs.abs().square().sum())
    least = NOISE * math.sqrt(wanted.numel())
    return math.sqrt(apart) / max(math.sqrt(size), least)
