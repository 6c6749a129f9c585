"""Shared by the scripts that check and measure: folders, parts in fresh processes, independent counts, builds, records.

Importing it makes aot-cache and the workloads importable, here and in processes that are started with `PATH`.
"""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "tests" / "graphs"
FOLDERS = [str(ROOT), str(ROOT / "tools" / "gpu"), str(ROOT / "tools" / "workloads")]
sys.path[:0] = [folder for folder in FOLDERS if folder not in sys.path]
PATH = os.pathsep.join(filter(None, [*FOLDERS, os.environ.get("PYTHONPATH", "")]))

Json = Any
NO_COMPILER = {"CC": "/bin/false", "CXX": "/bin/false"}
"""Variables that make every run of a C compiler fail, for parts that claim to need none."""


# --- a part in a fresh process ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """The result of a part: its answer (None if it gave none), its exit code, and the last lines of its stderr."""

    answer: Json
    code: int
    said: list[str]
    seconds: float


def ran(script: str, part: str, arguments: Sequence[str] = (), timeout: float = 540.0, **variables: str) -> Ran:
    """Run a part of `script` in a fresh process with empty caches. Of aot-cache's variables only those in `variables` are set."""
    with tempfile.TemporaryDirectory(prefix="part-") as folder:
        place = Path(folder, "answer.json")
        more = {"PYTHONPATH": PATH, "ANSWER": str(place), **variables}
        environment = {**without_ours(), **empty_caches(folder), **more}
        command = [sys.executable, "-W", "ignore", script, "--part", part, *arguments]
        began = time.perf_counter()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)
        answer = json.loads(place.read_text()) if place.exists() else None
        return Ran(answer, done.returncode, last_words(done.stderr), round(time.perf_counter() - began, 2))


def run_part(script: str, part: str, arguments: Sequence[str] = (), timeout: float = 540.0, **variables: str) -> Json:
    """The answer of a part that `ran` runs; if it failed, `error` with the last lines of its stderr."""
    found = ran(script, part, arguments, timeout, **variables)
    if found.code or found.answer is None:
        return {"error": found.said, "code": found.code}
    return {**found.answer, "process_seconds": found.seconds}


def hand_over(answer: Json) -> int:
    """Pass a part's answer to the process that started it."""
    Path(os.environ["ANSWER"]).write_text(json.dumps(answer))
    return 0


def without_ours() -> dict[str, str]:
    """The environment without aot-cache's variables, but for AOT_CACHE_UNTESTED."""
    return {k: v for k, v in os.environ.items() if not k.startswith("AOT_CACHE") or k == "AOT_CACHE_UNTESTED"}


def empty_caches(folder: str | Path) -> dict[str, str]:
    return {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}


def last_words(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.strip() and "^^^" not in line][-40:]


# --- what is counted and compared -------------------------------------------------------------------------------------


class Independent:
    """Counts events with its own hooks in upstream; the ledger must agree. With `kernels` only Triton is hooked."""

    def __init__(self, kernels: bool = False) -> None:
        import triton.compiler
        from triton.runtime import autotuner, build

        self.counts: Counter[str] = Counter()
        self._wrap(triton.compiler, "compile", "compile")
        self._wrap(autotuner.Autotuner, "_bench", "benchmark")
        self._wrap(build.subprocess, "check_call", "gcc")
        if not kernels:
            self._watch_torch()

    def _watch_torch(self) -> None:
        import torch._inductor.codecache  # noqa: F401  # so that all of it can be hooked
        from torch._dynamo import convert_frame
        from torch._inductor import compile_fx, cpp_builder
        from torch._inductor.runtime import static_triton_launcher, triton_heuristics

        self._wrap(convert_frame, "_compile", "frame")
        self._wrap(compile_fx, "compile_fx", "graph_compile")
        self._wrap(triton_heuristics.CachingAutotuner, "_precompile_config", "compile")  # Inductor's own way to it
        self._wrap(triton_heuristics.CachingAutotuner, "bench", "benchmark")
        self._wrap(static_triton_launcher.StaticallyLaunchedTritonKernel, "load_kernel", "module_load")
        self._wrap(cpp_builder.CppBuilder, "build", "gcc")

    def watch_driver(self) -> None:
        """Count module loads by Triton's driver, too. Call it once the GPU is initialised."""
        from triton.runtime.driver import driver

        self._wrap(driver.active.utils, "load_binary", "module_load")

    def _wrap(self, owner: Any, name: str, kind: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[kind] += 1
            return original(*args, **kwargs)

        setattr(owner, name, counted)


def eager(call: Any) -> Any:
    import torch

    with torch.compiler.set_stance("force_eager"):
        return call()


def distance(found: Any, wanted: Any) -> float:
    """The largest relative norm of the difference, over all tensors."""
    worst = 0.0
    for a, b in zip(_tensors_of(found), _tensors_of(wanted), strict=True):
        a, b = a.double(), b.double()
        worst = max(worst, float((a - b).norm() / max(float(b.norm()), 1e-30)))
    return worst


def _tensors_of(value: Any) -> list[Any]:
    import torch

    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors_of(v)] if isinstance(value, (list, tuple)) else []


# --- aot-cache's own commands -----------------------------------------------------------------------------------------


def cli(
    *arguments: str, folder: Path = ROOT, paths: Sequence[Path | str] = (), **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run aot-cache in `folder`, with `paths` added to the import path."""
    path = os.pathsep.join([*map(str, paths), PATH])
    return subprocess.run(
        [sys.executable, "-m", "aot_cache", *arguments],
        env={**os.environ, "PYTHONPATH": path, **variables},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def build(recipe: str, target: str, store: Path, *more: str, cores: str = "0,1") -> Json:
    """Build a bundle on the given cores, in a process that sees no GPU and cannot open its driver library."""
    inner = [sys.executable, "-m", "aot_cache", "build", "--model", recipe, "--target", target]
    inner += ["--store", str(store), "--json", *more]
    libraries = sorted({os.path.realpath(p) for d in _library_folders() for p in glob.glob(f"{d}/libcuda.so*")})
    hide = " && ".join(f"mount --bind /dev/null {path}" for path in libraries) or "true"
    probe = "import ctypes\ntry: ctypes.CDLL('libcuda.so.1'); print('found')\nexcept OSError: print('hidden')"
    script = f'{hide} && {sys.executable} -c "$PROBE" 1>&2 && exec "$@"'
    command = ["taskset", "-c", cores, "unshare", "--mount", "sh", "-c", script, "sh", *inner]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": PATH, "PROBE": probe}
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    seconds = time.perf_counter() - began
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-10:] + _failed(done.stdout)}
    built = json.loads(done.stdout)["bundles"][0]
    kept = {k: built[k] for k in ("units", "graphs", "compiled", "size", "points", "digest", "failed", "path")}
    return {**kept, "seconds": round(seconds, 1), "driver": done.stderr.split()[:1], "cores": cores}


def _failed(stdout: str) -> list[str]:
    """What a build says of each case, kernel and graph that failed."""
    try:
        return [json.dumps(one) for bundle in json.loads(stdout).get("bundles", []) for one in bundle["failed"]]
    except (ValueError, KeyError, AttributeError):
        return stdout.strip().splitlines()[-5:]


def _library_folders() -> list[str]:
    found = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    paths = [line.split("=>")[1].strip() for line in found.splitlines() if "libcuda.so" in line]
    return sorted(
        {os.path.dirname(path) for path in paths} | {*os.environ.get("LD_LIBRARY_PATH", "").split(":")} - {""}
    )


def tune(bundle: str, out: Path | str, *more: str, **variables: str) -> Json:
    """Run `aot-cache tune`; returns its JSON, or `error`."""
    done = cli("tune", bundle, "--out", str(out), "--json", *more, **variables)
    return json.loads(done.stdout) if done.returncode == 0 else {"error": last_words(done.stderr)}


def summary(case: Json) -> Json:
    """A rehearsed case in a record: numbers, and the reasons for points that did not hit."""
    why = {f"{point['status']}: {point['why'][:300]}" for point in case["points"] if point["status"] != "hit"}
    names = ("name", "declared", "run", "hits", "events", "distance", "not_captured")
    return {**{key: case[key] for key in names}, "why": sorted(why)[:4]}


# --- records ----------------------------------------------------------------------------------------------------------


def finish(record: Json, out: str | None) -> int:
    """Print a record, and write it to `out` if given. Returns the exit code: 0 if every claim holds, else 1."""
    text = json.dumps(record, indent=1)
    print(text)
    if out:
        Path(out).write_text(text + "\n")
    return 0 if all(record.get("claims", {}).values()) else 1


def machine() -> Json:
    gpu = ""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "fla-core"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return {"gpu": gpu, "python": platform.python_version(), "versions": found, "cores": os.cpu_count()}


def versions() -> Json:
    """The versions in this process."""
    import torch
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0]}


def commit() -> str:
    if os.environ.get("AOT_CACHE_COMMIT"):
        return os.environ["AOT_CACHE_COMMIT"]
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()
