"""Forged bundles, whose hashes are all right: without a pin nothing of them runs, and the server serves as without them.

Each canary makes a file if it runs. A control shows that it does once the bundle is pinned: then its maker is trusted.
"""

from __future__ import annotations

import dis
import hashlib
import marshal
import os
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
    for bundle, digest in {bundles!r}:
        aot_cache.load(bundle, digest=digest)
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


def with_an_import(manifest: Json, objects: dict[str, bytes]) -> None:
    for graph in each(manifest):
        graph["imports"] = {**graph["imports"], "__import_canary": "canary_at_import"}


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


CODE = {
    "importing": (importing, "an import"),
    "naming": (naming, "exec"),
    "pointing outside": (pointing_outside, "an instruction that does not fit it"),
}
OPEN = "open-to-all"


def plain(name: str) -> str:
    """As the name of a file: a canary hands its mark to a shell."""
    return name.replace(" ", "-")


def outcome(built: Built, bundles: list[tuple[Path, str | None]], **environment: str) -> Json:
    """What a server says that loads these and then makes one call. Its result is right, whatever it has loaded."""
    script = SERVE.format(bundles=[(str(path), digest) for path, digest in bundles])
    found = built.project.serve(script, bundles[0][0], **environment)
    assert found["scaled"]["error"] == "" and found["scaled"]["distance"] < 1e-5, found["scaled"]
    return found


@pytest.fixture(scope="module")
def refused(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Json:
    """One server that loads every forged bundle: importing torch for each would take minutes."""
    folder = tmp_path_factory.mktemp("forged")
    (built.project.folder / "canary_at_import.py").write_text(
        "import os, pathlib\npathlib.Path(os.environ['MARK'], 'an import').touch()\n"
    )
    changes = {"an import": with_an_import}
    for what, (make, _) in PICKLES.items():
        for where, change in {"guards": with_guards, "artifact": with_artifact}.items():
            changes[f"{where} {what}"] = change(make(folder / plain(f"{where} {what}")))
    changes |= {what: with_code(make) for what, (make, _) in CODE.items()}
    bundles: list[tuple[Path, str | None]] = []
    for name, change in changes.items():
        path = folder / "bundles" / plain(name) / "forged.safetensors"
        forged(built, path, change)
        bundles.append((path, None))
    open_to_all = folder / "bundles" / OPEN / "forged.safetensors"
    forged(built, open_to_all, lambda manifest, objects: None)
    open_to_all.parent.chmod(0o777)
    bundles.append((open_to_all, None))
    ran = folder / "ran"
    ran.mkdir()
    found = outcome(built, bundles, MARK=str(ran))
    return {
        **found,
        "bundles": len(bundles),
        "ran": [path.name for path in folder.iterdir() if path.is_file()] + os.listdir(ran),
    }


def test_nothing_of_a_forged_bundle_runs(refused: Json) -> None:
    """The call is compiled as without a bundle, and each bundle is refused once."""
    assert refused["ran"] == []
    assert refused["scaled"]["graph"] == 0 and refused["scaled"]["frame"] == 1
    assert refused["stats"]["total"]["rejected_bundle"] == refused["bundles"]


def is_refused(refused: Json, name: str, why: str) -> None:
    """The reason is said, with the bundle that it is of."""
    place = f"/{plain(name)}/forged.safetensors"
    lines = [line for line in refused["said"] if "serves without a bundle" in line and place in line]
    assert len(lines) == 1 and why in lines[0], refused["said"]


@pytest.mark.parametrize("what", PICKLES)
@pytest.mark.parametrize("where", ["guards", "artifact"])
def test_a_pickle_that_names_something_else(refused: Json, where: str, what: str) -> None:
    is_refused(refused, f"{where} {what}", PICKLES[what][1])


def test_a_module_that_the_process_does_not_use(refused: Json) -> None:
    is_refused(refused, "an import", "canary_at_import")


@pytest.mark.parametrize("what", CODE)
def test_bytecode_that_is_not_dynamos(refused: Json, what: str) -> None:
    is_refused(refused, what, CODE[what][1])


def test_a_folder_that_others_can_write(refused: Json) -> None:
    """A library's constructor runs when it is loaded, and no check of names stops that: who can write the file is asked first."""
    is_refused(refused, OPEN, "can have been written by others")


def test_a_pin_says_that_its_maker_is_trusted(built: Built, tmp_path: Path) -> None:
    """The control: the canary sings. And a file that others can write is what it was when it was pinned."""
    mark, bundle = tmp_path / "ran", tmp_path / "open" / "forged.safetensors"
    digest = forged(built, bundle, with_artifact(shell(mark)))
    whole = tmp_path / "open" / "whole.safetensors"
    digest_of_whole = forged(built, whole, lambda manifest, objects: None)
    bundle.parent.chmod(0o777)
    found = outcome(built, [(bundle, digest), (whole, digest_of_whole)])
    assert mark.exists()
    assert found["scaled"]["graph"] == 1 and found["stats"]["total"]["rejected_bundle"] == 1, found
