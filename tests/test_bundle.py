"""The bundle: what is written is what is read, the same input gives the same bytes, and every byte is covered."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors
from hypothesis import given
from hypothesis import strategies as st
from limits import HANGS

import aot_cache.store
from aot_cache.errors import BundleCorrupt, BundleMissing, DigestMismatch, StoreError, StoreUnwritable
from aot_cache.store import Bundle, bundle, read_bundle, write_bundle

ROOT = Path(__file__).parents[1]
BLOBS = [b"", b"a", b"first object", bytes(range(256)) * 40]
TEXT = st.text(max_size=20)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


def named(*blobs: bytes) -> dict[str, bytes]:
    return {hashlib.sha256(data).hexdigest(): data for data in blobs}


def flip(path: Path, data: bytes) -> None:
    """Flip one bit of the only place where `path` has `data`."""
    content = bytearray(path.read_bytes())
    assert content.count(data) == 1
    content[content.index(data)] ^= 1
    path.write_bytes(content)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bundle.safetensors"


@given(manifest=st.dictionaries(TEXT, PLAIN, max_size=5), blobs=st.lists(st.binary(max_size=300), max_size=8))
def test_what_is_written_is_read(manifest: dict[str, Any], blobs: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle.safetensors"
        objects = named(*blobs)
        digest = write_bundle(path, manifest, objects)
        found = read_bundle(path, digest)
        sizes = {name: len(data) for name, data in objects.items()}
        assert found.manifest == {**manifest, "objects": sizes}
        assert {name: bytes(found.object(name)) for name in sizes} == objects
        assert found.check_all() == []
        assert (found.path, found.digest, found.size) == (path, digest, path.stat().st_size)


@pytest.mark.parametrize("complete", [True, False])
def test_complete_stays_and_objects_is_set(path: Path, complete: bool) -> None:
    given = {"complete": complete, "objects": {"of": "another bundle"}}
    write_bundle(path, given, named(b"a"))
    assert read_bundle(path).manifest == {"complete": complete, "objects": {hashlib.sha256(b"a").hexdigest(): 1}}
    assert given["objects"] == {"of": "another bundle"}


def test_the_bytes_are_known(path: Path) -> None:
    """The format itself: whoever changes these bytes changes the schema, for old bundles are no longer read."""
    digest = write_bundle(path, {"b": "ü", "a": [1, 2.5, None]}, named(b"abc", b""))
    empty, abc = hashlib.sha256(b"").hexdigest(), hashlib.sha256(b"abc").hexdigest()
    assert abc < empty
    manifest = f'{{"a":[1,2.5,null],"b":"\\u00fc","objects":{{"{abc}":3,"{empty}":0}}}}'
    check = hashlib.sha256((manifest + abc).encode()).hexdigest()  # the one object with bytes is all objects together
    metadata = f'{{"format":"aot-cache","manifest":{json.dumps(manifest)},"manifest_sha256":"{check}",'
    metadata += f'"objects_sha256":"{abc}","schema":"1"}}'
    tensors = f'"{abc}":{{"dtype":"U8","shape":[3],"data_offsets":[0,3]}},'
    tensors += f'"{empty}":{{"dtype":"U8","shape":[0],"data_offsets":[3,3]}}'
    header = f'{{"__metadata__":{metadata},{tensors}}}'.encode()
    header += b" " * (-len(header) % 8)
    content = path.read_bytes()
    assert content == len(header).to_bytes(8, "little") + header + b"abc"
    assert digest == hashlib.sha256(content[:-3]).hexdigest()


def test_safetensors_reads_it(path: Path) -> None:
    objects = named(*BLOBS)
    write_bundle(path, {"a": "ü"}, objects)
    tensors = dict(safetensors.deserialize(path.read_bytes()))
    assert {name: bytes(tensor["data"]) for name, tensor in tensors.items()} == objects
    assert {(tensor["dtype"], len(tensor["shape"])) for tensor in tensors.values()} == {("U8", 1)}


def test_the_same_input_gives_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    script = """if True:
        import hashlib, sys
        from aot_cache.store import write_bundle
        order = int(sys.argv[2])
        blobs = [b"%d" % number for number in range(50)][::order]
        manifest = dict([("units", [{"b": 1, "a": 2}]), ("target", "h200"), ("complete", True)][::order])
        print(write_bundle(sys.argv[1], manifest, {hashlib.sha256(blob).hexdigest(): blob for blob in blobs}))
    """
    seen = set()
    for seed, order in (("1", 1), ("2", -1), ("3", 1)):
        path = tmp_path / seed / "bundle.safetensors"
        root = str(Path(aot_cache.store.__file__).parents[2])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root}
        line = [sys.executable, "-c", script, str(path), str(order)]
        done = subprocess.run(line, env=environment, check=True, capture_output=True, text=True)
        seen.add((done.stdout, path.read_bytes()))
    assert len(seen) == 1


def test_the_pin(path: Path, tmp_path: Path) -> None:
    digest = write_bundle(path, {"version": 1}, named(*BLOBS))
    other = write_bundle(tmp_path / "other", {"version": 2}, named(*BLOBS))
    fewer = write_bundle(tmp_path / "fewer", {"version": 1}, named(*BLOBS[1:]))
    assert len({digest, other, fewer}) == 3
    assert read_bundle(path, digest).digest == digest
    with pytest.raises(DigestMismatch) as caught:
        read_bundle(path, other)
    assert digest in str(caught.value) and other in str(caught.value)
    with pytest.raises(DigestMismatch):
        read_bundle(path, "")


def test_damage_is_not_called_another_bundle(path: Path) -> None:
    digest = write_bundle(path, {"version": "one"}, {})
    flip(path, b"one")
    with pytest.raises(BundleCorrupt):
        read_bundle(path, digest)


def test_an_object_is_hashed_when_it_is_asked_for(path: Path) -> None:
    objects = named(*BLOBS)
    digest = write_bundle(path, {}, objects)
    bad = hashlib.sha256(b"first object").hexdigest()
    flip(path, b"first object")
    found = read_bundle(path, digest)
    for name in objects.keys() - {bad}:
        assert found.object(name) == objects[name]
    for _ in range(2):
        with pytest.raises(BundleCorrupt, match=bad) as caught:
            found.object(bad)
        assert str(path) in str(caught.value)
    assert found.check_all() == [bad]


def test_an_object_that_is_not_there(path: Path) -> None:
    write_bundle(path, {}, named(b"a"))
    for name in ("0" * 64, "__metadata__", "", hashlib.sha256(b"a").hexdigest().upper()):
        with pytest.raises(BundleCorrupt, match="no object"):
            read_bundle(path).object(name)


def test_an_object_cannot_be_changed_and_is_hashed_once(path: Path) -> None:
    write_bundle(path, {}, named(b"abc"))
    found = read_bundle(path)
    data = found.object(hashlib.sha256(b"abc").hexdigest())
    assert type(data) is bytes
    assert found.object(hashlib.sha256(b"abc").hexdigest()) is data


def test_threads_get_the_same_bytes(path: Path) -> None:
    objects = named(*(bytes([number]) * 50_000 for number in range(40)))
    write_bundle(path, {}, objects)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    bad = max(objects)  # its bytes are the last
    found = read_bundle(path)
    results: list[set[str]] = []

    def work() -> None:
        refused = set()
        for name, data in objects.items():
            try:
                assert found.object(name) == data
            except BundleCorrupt:
                refused.add(name)
        results.append(refused)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{bad}] * 6


def test_a_file_may_be_replaced_or_deleted_later(path: Path) -> None:
    objects = named(*BLOBS)
    write_bundle(path, {}, objects)
    found = read_bundle(path)
    write_bundle(path, {}, named(b"another"))
    path.unlink()
    assert found.check_all() == []
    assert {name: found.object(name) for name in objects} == objects


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_file_that_is_overwritten_in_place_is_found_out(path: Path, prefetch: bool) -> None:
    objects = named(*BLOBS)
    write_bundle(path, {}, objects)
    found = read_bundle(path, prefetch=prefetch)
    for name in list(objects)[:1]:
        assert found.object(name) == objects[name]  # with prefetch, all is in memory and hashed now
    with path.open("r+b") as file:  # as `cp` does it: this would kill the reader of a mapped file
        file.truncate(found.size - sum(map(len, objects.values())))
    if prefetch:
        assert {name: found.object(name) for name in objects} == objects
    else:
        with pytest.raises(BundleCorrupt):
            [found.object(name) for name in objects]


def test_a_process_that_is_forked_while_the_objects_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers import, then fork: the child has the bundle and none of the threads that were reading it."""
    objects = named(*BLOBS)
    write_bundle(path, {}, objects)
    read, parent, go_on = bundle._Body._read, os.getpid(), threading.Event()

    def slow(self: Any, number: int) -> str:
        if os.getpid() == parent:
            go_on.wait()
        return read(self, number)

    monkeypatch.setattr(bundle._Body, "_read", slow)
    found = read_bundle(path, prefetch=True)
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a child that waits for ever is killed
        found.require_sound()
        os._exit(0 if {name: found.object(name) for name in objects} == objects else 1)
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    found.require_sound()


def test_what_a_forked_process_reads_again_does_not_reach_what_was_hashed(path: Path) -> None:
    objects = named(*BLOBS)
    write_bundle(path, {}, objects)
    found = read_bundle(path, prefetch=True)
    found.require_sound()
    child = os.fork()
    if child == 0:
        found._body.memory.write(b"\0" * len(found._body.memory))  # as if the file had changed meanwhile
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert {name: found.object(name) for name in objects} == objects


def test_a_process_that_may_start_no_more_threads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = named(b"x" * (3 * bundle.PART), b"y")
    write_bundle(path, {}, objects)
    started = []

    class OneOnly(threading.Thread):
        def start(self) -> None:
            if started:
                raise RuntimeError("can't start new thread")
            started.append(self)
            super().start()

    monkeypatch.setattr(bundle, "Thread", OneOnly)
    found = read_bundle(path, prefetch=True)
    found.require_sound()
    assert {name: found.object(name) for name in objects} == objects and len(started) == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_prefetched_objects_are_hashed_before_they_are_given(path: Path, damaged: bool) -> None:
    objects = named(*(bytes([number]) * 1000 for number in range(9)))
    write_bundle(path, {}, objects)
    if damaged:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    found = read_bundle(path, prefetch=True)
    if damaged:
        for name in objects:  # also those whose own bytes are whole: the body is one
            with pytest.raises(BundleCorrupt, match=max(objects)):
                found.object(name)
    else:
        assert {name: found.object(name) for name in objects} == objects


def test_reading_changes_nothing(path: Path) -> None:
    digest = write_bundle(path, {}, named(*BLOBS))
    before = (os.listdir(path.parent), path.stat().st_mtime_ns, path.read_bytes())
    assert read_bundle(path, digest).check_all() == []
    assert (os.listdir(path.parent), path.stat().st_mtime_ns, path.read_bytes()) == before


def test_a_bundle_may_be_moved_and_linked(path: Path, tmp_path: Path) -> None:
    digest = write_bundle(path, {}, named(*BLOBS))
    shutil.move(path, tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    assert read_bundle(str(tmp_path / "link"), digest).check_all() == []


def test_writing_again_replaces(path: Path) -> None:
    first = write_bundle(path, {"version": 1}, named(*BLOBS))
    second = write_bundle(path, {"version": 2}, {})
    assert read_bundle(path, second).manifest == {"version": 2, "objects": {}}
    with pytest.raises(DigestMismatch):
        read_bundle(path, first)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["", "0" * 64, "x", hashlib.sha256(b"a").hexdigest().upper()])
def test_an_object_under_a_false_name_is_not_written(path: Path, name: str) -> None:
    with pytest.raises(BundleCorrupt, match="do not hash"):
        write_bundle(path, {}, {name: b"a"})
    assert not path.exists()


@pytest.mark.parametrize(
    "manifest", [{"a": float("nan")}, {"a": float("inf")}, {"a": b""}, {"a": {1: 2, "1": 3}}, {"a": {10: 0, 9: 0}}]
)
def test_a_manifest_that_is_not_plain_json_is_not_written(path: Path, manifest: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError)):
        write_bundle(path, manifest, {})
    assert not path.exists()


def test_a_header_that_no_reader_would_take_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_HEADER", 1000)
    write_bundle(path, {"a": "x" * 500}, {})
    assert read_bundle(path).manifest["a"] == "x" * 500
    with pytest.raises(StoreError, match="more than the 1,000 and"):
        write_bundle(path, {"a": "x" * 1000}, {})
    assert read_bundle(path).manifest["a"] == "x" * 500


READ = """
import sys
sys.path.insert(0, sys.argv[2])
from aot_cache.errors import BundleCorrupt
from aot_cache.store import read_bundle
try:
    read_bundle(sys.argv[1], prefetch=True)
except BundleCorrupt as error:
    print(error)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""
MOST = bundle.MAX_HEADER
FILLED = {
    "[]": MOST // 3,
    "{}": MOST // 3,
    "1": MOST // 2,
    '"a"': MOST // 4,
    '"aaaaaaaaaa"': MOST // 13,
    '{"a":[]}': MOST // 9,
}


def forged(manifest: str, more: str = "") -> bytes:
    digest = hashlib.sha256(manifest.encode()).hexdigest()
    facts = {
        "format": "aot-cache",
        "manifest": manifest,
        "manifest_sha256": digest,
        "objects_sha256": "",
        "schema": "1",
    }
    header = f'{{"__metadata__":{json.dumps(facts, sort_keys=True, separators=(",", ":"))}{more}}}'.encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("value", FILLED)
@pytest.mark.parametrize("where", ["few", "all", "behind"])
def test_no_header_takes_much_memory(path: Path, value: str, where: str) -> None:
    """Headers that are well formed and as large as is allowed: by bytes, and by values."""
    number = (
        FILLED[value]
        if where == "all"
        else min(FILLED[value], bundle.MAX_VALUES // (value.count("[") + value.count("{") + 1))
    )
    number = int(number * 0.8)  # what is around it, and the backslashes of a string in a string
    if where == "behind":
        data = forged('{"objects":{}}', "," + ",".join(f'"{n}":{value}' for n in range(number // 3)))
    else:
        data = forged('{"a":[' + ",".join([value] * number) + '],"objects":{}}')
    path.write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ, path, ROOT], capture_output=True, text=True, check=True, timeout=HANGS
    )
    refused, mib = done.stdout.splitlines()
    assert int(mib) < 300, refused


def test_nothing_is_read_ahead_of_a_header_that_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = write_bundle(path, {"a": 1}, named(*BLOBS))
    begun: list[int] = []
    original = bundle._Body

    def body(*given: int) -> Any:
        begun.append(given[2])
        return original(*given)

    monkeypatch.setattr(bundle, "_Body", body)
    with pytest.raises(DigestMismatch):
        read_bundle(path, "0" * 64, prefetch=True)
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"a\\":1', b'"a\\":2'))
    with pytest.raises(BundleCorrupt):
        read_bundle(path, prefetch=True)
    assert begun == []
    path.write_bytes(data)
    for pinned in (digest, None):
        assert read_bundle(path, pinned, prefetch=True).check_all() == []
    assert begun == [sum(map(len, BLOBS))] * 2


def test_no_bundle(path: Path) -> None:
    with pytest.raises(BundleMissing, match=path.name):
        read_bundle(path)
    path.write_bytes(b"")
    with pytest.raises(BundleMissing):
        read_bundle(path / "inside")
    with pytest.raises(StoreUnwritable):
        write_bundle(path / "inside", {}, {})


def test_there_is_no_way_around_the_hash() -> None:
    assert {name for name in dir(Bundle) if not name.startswith("_")} == {
        "object",
        "check_all",
        "status",
        "require_sound",
    }


# --- reads that give less than was asked for --------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("most", [1, 7, 1000])
def test_reads_that_give_less(path: Path, monkeypatch: pytest.MonkeyPatch, prefetch: bool, most: int) -> None:
    """Network and FUSE file systems may: the rest is asked for."""
    objects = named(*(bytes([number]) * 2000 for number in range(3)))
    digest = write_bundle(path, {}, objects)
    pread, preadv = os.pread, os.preadv
    monkeypatch.setattr(os, "pread", lambda file, size, at: pread(file, min(size, most), at))
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:most]], at))
    found = read_bundle(path, digest, prefetch=prefetch)
    assert {name: found.object(name) for name in objects} == objects and found.check_all() == []
    assert bundle.peek(path) == path.read_bytes()[: path.stat().st_size - 6000]


# --- a header that says which bytes are whose -------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [False, True])
def test_an_object_under_anothers_name(path: Path, prefetch: bool) -> None:
    """Forged, with every hash over the whole right: an object read ahead must hash to its own name, too."""
    names = sorted(named(b"one", b"two"))
    swapped = [data for _, data in sorted(named(b"one", b"two").items(), reverse=True)]
    parts = bundle._part_digests(b"".join(swapped))
    sizes = dict.fromkeys(names, 3)
    text = bundle._canonical({"objects": sizes})
    path.write_bytes(bundle._header(text, sizes, parts) + b"".join(swapped))
    found = read_bundle(path, prefetch=prefetch)
    for name in names:
        with pytest.raises(BundleCorrupt, match=f"the bytes of object {name} do not hash to its name"):
            found.object(name)


# --- a folder of many -------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(st.text(max_size=5), st.text(max_size=5) | st.integers() | st.booleans() | st.none(), max_size=4)
)
def test_fragments_of_a_manifest_are_found_in_its_header(facts: dict[str, Any]) -> None:
    text = bundle._canonical({"facts": facts, "objects": {}})
    header = bundle._header(text, {}, "")
    assert bundle.looks_sound(header)
    for name, value in facts.items():
        fragment = f"{json.dumps(name)}:{json.dumps(value)}"
        assert bundle.in_header(fragment) in header
