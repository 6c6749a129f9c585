"""A store that builders share: what is copied when, what is not believed, and builds of two machines that meet in it only."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from elsewhere import listing, s3_environment, s3_server
from limits import HANGS

from aot_cache.artifact import target as targets
from aot_cache.artifact.key import GRAPHS, IR, NATIVE, UNITS
from aot_cache.builder import engine_start, pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.misses import file as miss_file
from aot_cache.remote.folders import RemoteFolder
from aot_cache.remote.shared_store import SHARED, SharedStore, open_store
from aot_cache.store import Store

pytest.importorskip("fsspec")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in s3_environment(url).items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem().mkdir("builds")
        yield "s3://builds"


@pytest.fixture(params=["file", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/remote"
    return f"{request.getfixturevalue('s3')}/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}"


def named(record: Mapping[str, Any]) -> list[str]:
    return [record["object"]]


def put(store: Store, key: str, data: bytes, kind: str = UNITS) -> str:
    digest = store.put(data)
    store.put_record(kind, key, {"object": digest, "hash": "f" * 64})
    return digest


def objects(folder: Path) -> list[str]:
    return [name for name in listing(folder / "v2" / "objects") if len(Path(name).name) == 64]


# --- what is copied ---------------------------------------------------------------------------------------------------


def test_what_one_has_made_another_one_has(remote: str, tmp_path: Path) -> None:
    one, two = SharedStore(tmp_path / "one", remote), SharedStore(tmp_path / "two", remote)
    digests = {f"k{n}": put(one, f"k{n}", os.urandom(1000)) for n in range(70)}
    two.fetch(UNITS, [*digests, "nobody"], named)
    for key, digest in digests.items():
        assert two.get_record(UNITS, key) == one.get_record(UNITS, key)
        assert Store(two.root).get(digest) == one.get(digest)
    assert two.get_record(UNITS, "nobody") is None and not two.problem


def test_what_was_made_before_it_was_shared_is_shared_when_it_is_asked_for(remote: str, tmp_path: Path) -> None:
    digest = put(Store(tmp_path / "one"), "k", b"data")
    SharedStore(tmp_path / "one", remote).fetch(UNITS, ["k"], named)
    two = SharedStore(tmp_path / "two", remote)
    two.fetch(UNITS, ["k"], named)
    assert two.get(digest) == b"data"


def test_only_what_is_not_of_one_machine_is_shared(tmp_path: Path) -> None:
    assert {UNITS, NATIVE, GRAPHS} == SHARED and not {pipeline.STAMPS, engine_start.STARTS, IR} & SHARED
    store = SharedStore(tmp_path / "one", f"file://{tmp_path}/remote")
    put(store, "k", b"data", pipeline.STAMPS)
    assert listing(tmp_path / "remote") == []


def test_objects_are_there_before_the_record_that_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    whole = RemoteFolder.write
    monkeypatch.setattr(RemoteFolder, "write", lambda *a: (written.append(a[1]), whole(*a)))
    digest = put(SharedStore(tmp_path / "one", f"file://{tmp_path}/remote"), "k", b"data")
    assert written == [f"v2/objects/{digest[:2]}/{digest}", f"v2/records/{UNITS}/k.json"]


def test_without_a_remote_store_it_is_the_store(tmp_path: Path) -> None:
    assert type(open_store(tmp_path, None)) is Store and type(open_store(tmp_path, "")) is Store


# --- what is not believed ---------------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-2] + bytes([data[-2] ^ 1]) + data[-1:]


@pytest.mark.parametrize("which", ["objects", "records"])
@pytest.mark.parametrize(
    "change", [flipped, lambda data: data[:-3], lambda data: b"", None], ids=["flip", "cut", "empty", "gone"]
)
def test_damage_there_counts_as_absent_and_is_mended(
    which: str, change: Callable[[bytes], bytes] | None, remote: str, tmp_path: Path
) -> None:
    one, two = SharedStore(tmp_path / "one", remote), SharedStore(tmp_path / "two", remote)
    digest = put(one, "k", b"some data")
    name = f"v2/objects/{digest[:2]}/{digest}" if which == "objects" else f"v2/records/{UNITS}/k.json"
    folder = RemoteFolder(remote)
    good = folder.read(name)
    folder.write(name, change(good)) if change else folder.remove(name)
    two.fetch(UNITS, ["k"], named)
    assert two.get_record(UNITS, "k") is None or not two.holds(digest)  # so that a builder compiles it
    put(two, "k", b"some data")
    assert folder.read(name) == good
    assert not two.problem


@pytest.mark.parametrize(
    "facts",
    [{}, {"object": 3}, {"object": "../../../etc/passwd"}, {"object": None}, {"object": "0" * 64}, {"object": ["a"]}],
)
def test_a_record_with_a_right_seal_and_wrong_facts(facts: dict[str, Any], tmp_path: Path) -> None:
    Store(tmp_path / "remote").put_record(UNITS, "k", facts)
    two = SharedStore(tmp_path / "two", f"file://{tmp_path}/remote")
    two.fetch(UNITS, ["k"], named)
    assert objects(two.root) == [] and not two.problem


def test_a_record_in_another_s_place(tmp_path: Path) -> None:
    one = SharedStore(tmp_path / "one", f"file://{tmp_path}/remote")
    put(one, "a", b"a")
    put(one, "b", b"b")
    records = tmp_path / "remote" / "v2" / "records" / UNITS
    (records / "a.json").write_bytes((records / "b.json").read_bytes())
    two = SharedStore(tmp_path / "two", f"file://{tmp_path}/remote")
    two.fetch(UNITS, ["a", "b"], named)
    assert two.get_record(UNITS, "a") is None and two.get_record(UNITS, "b") is not None


def test_what_is_sound_here_is_not_replaced(tmp_path: Path) -> None:
    one = SharedStore(tmp_path / "one", f"file://{tmp_path}/remote")
    put(one, "k", b"theirs")
    mine = put(Store(tmp_path / "two"), "k", b"mine")
    two = SharedStore(tmp_path / "two", f"file://{tmp_path}/remote")
    two.fetch(UNITS, ["k"], named)
    record = two.get_record(UNITS, "k")
    assert record is not None and record["object"] == mine


def test_what_is_damaged_here_comes_from_there(tmp_path: Path) -> None:
    one = SharedStore(tmp_path / "one", f"file://{tmp_path}/remote")
    digest = put(one, "k", b"data")
    (path,) = (tmp_path / "one" / "v2" / "objects").rglob(digest)
    path.write_bytes(b"dat!")
    one.fetch(UNITS, ["k"], named)
    assert one.get(digest) == b"data"


# --- a remote store that does not answer ------------------------------------------------------------------------------


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    s3fs = pytest.importorskip("s3fs")
    for name, value in s3_environment("http://127.0.0.1:9").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()  # fsspec keeps the client that a test before this one has made
    yield "s3://builds/nobody"
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_remote_store_that_is_down_is_one_warning(
    nobody_answers: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SharedStore(tmp_path / "one", nobody_answers)
    for n in range(5):
        put(store, f"k{n}", b"data")
    store.fetch(UNITS, ["k0", "k9"], named)
    assert "not used any more" in store.problem and len(caplog.records) == 1
    assert Store(store.root).get_record(UNITS, "k4") is not None


def test_a_remote_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    store = SharedStore(tmp_path / "one", f"file://{tmp_path}/file")
    put(store, "k", b"data")
    assert store.problem and store.get_record(UNITS, "k") is not None


def test_a_remote_store_that_nobody_knows(tmp_path: Path) -> None:
    assert "nothing here knows nosuch://" in SharedStore(tmp_path, "nosuch://bucket").problem


# --- many writers -----------------------------------------------------------------------------------------------------

WRITER = """
import sys
from aot_cache.artifact.key import UNITS
from aot_cache.remote.shared_store import SharedStore
store = SharedStore(sys.argv[1], sys.argv[2])
for turn in range(4):
    for n in range(5):
        digest = store.put(b"data" * 5000 + bytes([n]))
        store.put_record(UNITS, f"k{n}", {"object": digest})
    store.fetch(UNITS, [f"k{n}" for n in range(5)], lambda record: [record["object"]])
assert not store.problem, store.problem
"""


def test_many_write_the_same_names(remote: str, tmp_path: Path) -> None:
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path / f"w{n}"), remote], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    for writer in writers:
        assert writer.wait(HANGS) == 0, writer.stderr.read() if writer.stderr else ""
        assert writer.stderr is not None
        writer.stderr.close()
    reader = SharedStore(tmp_path / "reader", remote)
    reader.fetch(UNITS, [f"k{n}" for n in range(5)], named)
    assert len(objects(reader.root)) == 5


# --- builds -----------------------------------------------------------------------------------------------------------

MODEL = """
import torch
import triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare, device

@triton.jit
def double(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

@torch.compile
def gate(x, weight):
    return torch.nn.functional.silu(x) * weight

def host(batch):
    x = torch.randn(batch, 32, device=device())
    if device() != "cpu":
        double[(1,)](x, batch, BLOCK=64)
    return gate(x, torch.randn(batch, 32, device=device()))

@declare(batch=Range(2, 8))
def step(batch):
    return Call(host, batch)

recipe = Recipe("shared", [step])
"""


@pytest.fixture(scope="module")
def built(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Callable[..., Built], Built]]:
    """Builds of one recipe with a store of their own; and the first one, which has filled the remote store."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "shared_model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))

        def build(store: str, remote: str | None = f"{s3}/built") -> Built:
            model = "shared_model:recipe"
            asked = Request(
                target=targets.get("h200"), store=folder / store, model=model, remote_store=remote, workers=2
            )
            return pipeline.build(asked)

        yield build, build("a")


def test_what_one_machine_has_built_no_other_one_builds(built: tuple[Callable[..., Built], Built]) -> None:
    build, first = built
    second = build("b")
    assert first.compiled and not second.compiled and not first.warnings and not second.warnings
    assert first.units and first.graphs
    assert second.digest == first.digest and second.path.read_bytes() == first.path.read_bytes()


def test_damage_there_is_built_again_and_mended(built: tuple[Callable[..., Built], Built], s3: str) -> None:
    build, first = built
    import s3fs

    there = s3fs.S3FileSystem()
    names = there.find(f"{s3}/built")
    good = there.cat(names)
    records = [name for name in names if "/records/" in name]
    (unit,) = [name for name in records if f"/{UNITS}/" in name and "pruned" not in good[name].decode()]
    graph = next(name for name in records if f"/{GRAPHS}/" in name)
    binary = json.loads(good[unit])["facts"]["object"]
    (object_of_unit,) = [name for name in names if name.endswith(binary)]
    for damaged in (object_of_unit, graph):
        there.pipe_file(damaged, flipped(good[damaged]))
    third = build("c")
    assert first.compiled == third.compiled == 2 and not third.warnings
    assert third.digest == first.digest
    there.invalidate_cache()
    mended = there.cat(names)
    assert mended[object_of_unit] == good[object_of_unit] and mended[graph] != flipped(good[graph])
    fourth = build("d")
    assert not fourth.compiled and fourth.digest == third.digest


def test_a_build_whose_remote_store_is_down(
    built: tuple[Callable[..., Built], Built], nobody_answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, first = built
    found = build("a", nobody_answers)
    assert found.digest == first.digest and found.nothing_to_do
    (warning,) = found.warnings
    assert warning.startswith("the remote store is not used any more: cannot read s3://builds/nobody")
    found = build("e", nobody_answers)
    assert found.digest == first.digest and found.compiled and found.warnings == [warning]


def test_a_remote_store_is_not_a_part_of_what_is_asked_for(tmp_path: Path) -> None:
    asked = Request(target=targets.get("cpu"), store=tmp_path)
    misses = miss_file.read(())
    assert pipeline._question(asked, misses) == pipeline._question(replace(asked, remote_store="s3://bucket"), misses)
