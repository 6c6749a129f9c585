"""Whether a bundle is for this host, part by part. Initialises no GPU unless the process has."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping
from typing import Any

from aot_cache.key import Part
from aot_cache.tested import installed
from aot_cache.upstream import torch_capture

Json = Any
NO_GPU = "no GPU looked at"


def parts(manifest: Mapping[str, Json], look_at_gpu: bool = True) -> list[Part]:
    """The named parts of the bundle's key beside this host's.

    Args:
        manifest: a bundle's manifest.
        look_at_gpu: read device 0 when there is one; otherwise only when the process has CUDA up already.
    """
    wanted = manifest["target"]
    if wanted["backend"] == "cpu":
        return []  # what its graphs are bound to is compared when Dynamo is there
    out = [Part("triton", str(manifest["toolchain"]["triton"]), installed("triton") or "not installed")]
    gpu = _gpu(look_at_gpu)
    if gpu is None:
        out.append(Part("gpu", _describe(wanted), NO_GPU, needed=False))
    else:
        for name in ("backend", "arch", "warp_size"):
            out.append(Part(name, str(wanted[name]), str(gpu[name])))
        out.append(Part("gpu name", str(wanted["name"]), str(gpu["name"]), needed=False))
    natives = {n["suffix"] for n in manifest["native"]}
    if natives:
        mine = str(sysconfig.get_config_var("EXT_SUFFIX"))
        out.append(Part("launchers", mine if mine in natives else ", ".join(sorted(natives)), mine, needed=False))
    return out


def differing(found: list[Part]) -> list[Part]:
    """The parts that forbid loading."""
    return [part for part in found if part.needed and not part.same]


def say(found: list[Part]) -> str:
    """`triton: bundle 3.6.0, here 3.7.1; arch: …` for the parts given."""
    return "; ".join(f"{p.name}: bundle {p.wanted}, here {p.found}" for p in found)


def _describe(target: Mapping[str, Json]) -> str:
    return f"{target['name']} ({target['backend']} {target['arch']})"


def _gpu(look: bool) -> Mapping[str, Json] | None:
    if torch_capture.cuda_is_up():
        from aot_cache.upstream import triton_kernel

        current = triton_kernel.current_target()
        return {
            "backend": current.backend,
            "arch": current.arch,
            "warp_size": current.warp_size,
            "name": torch_capture.device_name(),
        }
    if not look:
        return None
    from aot_cache import native
    from aot_cache.errors import TargetError

    try:
        return native.native()[0].properties()
    except (TargetError, ImportError):
        return None
