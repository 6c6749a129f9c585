"""Compare a bundle's key with this host, part by part. Initialises no GPU, except `parts` with `look_at_gpu`."""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Mapping
from typing import Any

from aot_cache.artifact.key import Part
from aot_cache.artifact.manifest import Served
from aot_cache.store import in_header
from aot_cache.tested import installed
from aot_cache.upstream.codec import torch_release
from aot_cache.upstream.hooks import torch_capture

NO_GPU = "no GPU looked at"


def parts(manifest: Served, look_at_gpu: bool = True) -> list[Part]:
    """The parts of the key that kernels are bound to, each with the bundle's value and this host's (graphs: `graph_parts`).

    Args:
        manifest: the bundle's manifest.
        look_at_gpu: if the process has no CUDA up yet, read device 0; if false, compare no GPU in that case.
    """
    wanted = manifest.target
    if wanted["backend"] == "cpu":
        return []
    out = [Part("triton", str(manifest.toolchain["triton"]), installed("triton") or "not installed")]
    gpu = _gpu(look_at_gpu)
    if gpu is None:
        out.append(Part("gpu", _describe(wanted), NO_GPU, needed=False))
    else:
        for name in ("backend", "arch", "warp_size"):
            out.append(Part(name, str(wanted[name]), str(gpu[name])))
        out.append(Part("gpu name", str(wanted["name"]), str(gpu["name"]), needed=False))
    natives = {native.suffix for native in manifest.native}
    if natives:
        mine = str(sysconfig.get_config_var("EXT_SUFFIX"))
        out.append(Part("launchers", mine if mine in natives else ", ".join(sorted(natives)), mine, needed=False))
    return out


def signs() -> list[tuple[bytes, ...]]:
    """What the header of a bundle for this host has in it (see `store.peek`): all parts of at least one of these. So that most of
    the others need not be parsed."""
    on_cpu = (in_header('"backend":"cpu"'),)
    triton = in_header(f'"triton":{json.dumps(installed("triton"))}')
    gpu = _gpu(look=False)
    if gpu is None:
        return [on_cpu, (triton,)]
    arches = (json.dumps(gpu["arch"]), json.dumps(str(gpu["arch"])))
    return [on_cpu, *((triton, in_header(f'"arch":{arch}')) for arch in arches)]


def graph_parts(manifest: Served) -> list[Part]:
    """The parts of the key that graphs are bound to (see `key.graph_parts`); empty if the bundle has no graph.

    Works without torch. The GPU, to which kernels are bound as well, is in `parts`.
    """
    if not manifest.graphs:
        return []
    wanted, target = manifest.graph_key, manifest.target
    here = {
        "torch": torch_release.release(),
        "torch git": torch_release.git(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "triton": installed("triton"),
    }
    names = [name for name in here if name != "triton" or target["backend"] != "cpu"]
    out = [Part(name, str(wanted[name]), here[name] or "not installed") for name in names]
    if target["backend"] == "cpu":
        isa = torch_release.cpu_isa() if here["torch"] else "not known without torch"
        out.append(Part("vector instructions", str(wanted["target"]["isa"]), isa))
    return out


def differing(found: list[Part]) -> list[Part]:
    """The parts that forbid loading."""
    return [part for part in found if part.needed and not part.same]


def say(found: list[Part]) -> str:
    """`triton: bundle 3.6.0, here 3.7.1; arch: …` for the given parts."""
    return "; ".join(f"{p.name}: bundle {p.wanted}, here {p.found}" for p in found)


def _describe(target: Mapping[str, Any]) -> str:
    return f"{target['name']} ({target['backend']} {target['arch']})"


def _gpu(look: bool) -> Mapping[str, Any] | None:
    if torch_capture.cuda_is_up():
        from aot_cache.upstream.codec import triton_kernel

        current = triton_kernel.current_target()
        return {
            "backend": current.backend,
            "arch": current.arch,
            "warp_size": current.warp_size,
            "name": torch_capture.device_name(),
        }
    if not look:
        return None
    from aot_cache.errors import TargetError
    from aot_cache.runtime import host_gpu

    try:
        return host_gpu.native()[0].properties()
    except (TargetError, ImportError):
        return None
