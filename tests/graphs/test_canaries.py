"""Forged bundles, whose hashes are all right: without a pin nothing of them runs, and the server serves as without them.

Each canary makes a file if it runs. A control shows that it does once the bundle is pinned: then its maker is trusted.
"""

from __future__ import annotations

import dis
import hashlib
import marshal
import pickle
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Built

from aot_cache.store import read_bundle, write_bundle

Json = dict[str, Any]

SERVE = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import aot_cache
    from serving import FACTS, call, say
    aot_cache.load({bundle!r}, digest={digest!r})
    import torch, sample_model as m
    aot_cache.ready()
    aot_cache.seal()
    with torch.inference_mode():
        call("scaled", m.compiled_scaled, torch.randn(8, 16), 3)
FACTS["said"] = [str(one.message) for one in said if one.category is aot_cache.AotCacheWarning]
say()
"""


class Runs:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def shell(mark: Path) -> bytes:
    import os

    return pickle.dumps(Runs(os.system, f"touch {mark}"))


def by_getattr(mark: Path) -> bytes:
    """Names nothing but `getattr` and classes that graphs contain."""
    from torch._inductor.runtime.autotune_cache import AutotuneCache

    save = Runs(getattr, AutotuneCache, "save")
    return pickle.dumps(Runs(getattr, Runs(getattr, save, "__globals__"), "get"))


def by_a_nested_name(mark: Path) -> bytes:
    """`torch._dynamo.guards.os.system`: from a module that graphs name, through what it imports."""
    return b"\x80\x04\x8c\x14torch._dynamo.guards\x8c\tos.system\x93\x8c" + _text(f"touch {mark}") + b"\x85R."


def by_a_function(mark: Path) -> bytes:
    """A function of a module of whose classes all are allowed."""
    import torch._guards

    return pickle.dumps(Runs(torch._guards.detect_fake_mode))


def _text(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


PICKLES = {
    "os.system": (shell, "posix.system"),
    "an attribute": (by_getattr, "__globals__"),
    "a nested name": (by_a_nested_name, "torch._dynamo.guards.os.system"),
    "a function": (by_a_function, "torch._guards.detect_fake_mode"),
    "garbage": (lambda mark: b"\x80\x04garbage", "cannot be unpickled"),
}


def forged(built: Built, to: Path, change: Callable[[Json, dict[str, bytes]], None]) -> str:
    """A copy of the session's bundle in which `change` was made, with every hash right; returns its digest."""
    bundle = read_bundle(built.bundle)
    manifest = {**bundle.manifest}
    objects = {name: bundle.object(name) for name in manifest["objects"]}
    change(manifest, objects)
    return write_bundle(to, manifest, objects)


def stored(objects: dict[str, bytes], data: bytes) -> str:
    name = hashlib.sha256(data).hexdigest()
    objects[name] = data
    return name


def each(manifest: Json) -> list[Json]:
    return [graph for graph in manifest["graphs"] if graph["function"] == "scaled"]


def with_guards(data: bytes) -> Callable[[Json, dict[str, bytes]], None]:
    def change(manifest: Json, objects: dict[str, bytes]) -> None:
        for graph in each(manifest):
            graph["guard_state"] = stored(objects, data)

    return change


def with_artifact(data: bytes) -> Callable[[Json, dict[str, bytes]], None]:
    def change(manifest: Json, objects: dict[str, bytes]) -> None:
        for graph in each(manifest):
            graph["graphs"] = {name: stored(objects, data) for name in graph["graphs"]}

    return change


def with_code(make: Callable[[types.CodeType], types.CodeType]) -> Callable[[Json, dict[str, bytes]], None]:
    def change(manifest: Json, objects: dict[str, bytes]) -> None:
        for graph in each(manifest):
            code = make(marshal.loads(objects[graph["bytecode"]]))  # noqa: S302  # of a bundle that this test has built
            graph["bytecode"] = stored(objects, marshal.dumps(code, 2))

    return change


def outcome(built: Built, bundle: Path, digest: str | None = None, **environment: str) -> Json:
    found = built.project.serve(SERVE.format(bundle=str(bundle), digest=digest), bundle, **environment)
    assert found["scaled"]["error"] == "" and found["scaled"]["distance"] < 1e-5, found["scaled"]
    return found


def is_refused(built: Built, bundle: Path, why: str) -> None:
    """The call is compiled as without a bundle, the bundle is refused, and the reason is said."""
    found = outcome(built, bundle)
    assert found["scaled"]["graph"] == 0 and found["scaled"]["frame"] == 1
    assert found["stats"]["total"]["rejected_bundle"] == 1
    assert any("serves without a bundle" in line and why in line for line in found["said"]), found["said"]


@pytest.mark.parametrize("what", PICKLES)
@pytest.mark.parametrize("where", ["guards", "artifact"])
def test_a_pickle_that_names_something_else(built: Built, tmp_path: Path, where: str, what: str) -> None:
    make, why = PICKLES[what]
    mark, bundle = tmp_path / "ran", tmp_path / "forged.safetensors"
    forged(built, bundle, (with_guards if where == "guards" else with_artifact)(make(mark)))
    is_refused(built, bundle, why)
    assert not mark.exists()


def test_the_canary_sings_when_its_maker_is_trusted(built: Built, tmp_path: Path) -> None:
    mark, bundle = tmp_path / "ran", tmp_path / "forged.safetensors"
    digest = forged(built, bundle, with_artifact(shell(mark)))
    outcome(built, bundle, digest)
    assert mark.exists()


def test_a_module_that_the_process_does_not_use(built: Built, tmp_path: Path) -> None:
    mark, bundle = tmp_path / "ran", tmp_path / "forged.safetensors"
    (built.project.folder / "canary_at_import.py").write_text(
        "import os, pathlib\npathlib.Path(os.environ['MARK']).touch()\n"
    )

    def change(manifest: Json, objects: dict[str, bytes]) -> None:
        for graph in each(manifest):
            graph["imports"] = {**graph["imports"], "__import_canary": "canary_at_import"}

    forged(built, bundle, change)
    found = outcome(built, bundle, MARK=str(mark))
    assert found["stats"]["total"]["rejected_bundle"] == 1 and found["scaled"]["graph"] == 0
    assert not mark.exists()


def importing(code: types.CodeType) -> types.CodeType:
    """`import os` before what the code does."""
    ops = dis.opmap
    head = [ops["LOAD_CONST"], len(code.co_consts), ops["LOAD_CONST"], len(code.co_consts) + 1]
    head += [ops["IMPORT_NAME"], len(code.co_names), ops["POP_TOP"], 0]
    return code.replace(
        co_code=bytes(head) + code.co_code,
        co_consts=(*code.co_consts, 0, None),
        co_names=(*code.co_names, "os"),
        co_stacksize=code.co_stacksize + 2,
    )


def naming(code: types.CodeType) -> types.CodeType:
    return code.replace(co_names=(*code.co_names, "exec"))


def pointing_outside(code: types.CodeType) -> types.CodeType:
    """Reads a constant far behind its last one: CPython would read whatever is there."""
    return code.replace(co_code=bytes([dis.opmap["EXTENDED_ARG"], 200, dis.opmap["LOAD_CONST"], 7]) + code.co_code)


@pytest.mark.parametrize(
    ("make", "why"),
    [(importing, "an import"), (naming, "exec"), (pointing_outside, "an instruction that does not fit it")],
)
def test_bytecode_that_is_not_dynamos(
    built: Built, tmp_path: Path, make: Callable[[types.CodeType], types.CodeType], why: str
) -> None:
    bundle = tmp_path / "forged.safetensors"
    forged(built, bundle, with_code(make))
    is_refused(built, bundle, why)


def test_a_folder_that_others_can_write(built: Built, tmp_path: Path) -> None:
    """A library's constructor runs when it is loaded, and no check of names stops that: who can write the file is asked first."""
    bundle = tmp_path / "open" / "forged.safetensors"
    digest = forged(built, bundle, lambda manifest, objects: None)
    bundle.parent.chmod(0o777)
    is_refused(built, bundle, "can have been written by others")
    found = outcome(built, bundle, digest)
    assert found["scaled"]["graph"] == 1 and found["stats"]["total"]["rejected_bundle"] == 0
