"""The store against other processes, killed writers, full disks and folders that cannot be written."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import HANGS

import aot_cache.store
from aot_cache.errors import BundleCorrupt, BundleMissing, StoreError, StoreUnwritable
from aot_cache.store import Store, read_bundle, write_atomic, write_bundle
from aot_cache.store.objects import LAYOUT

CHILD = Path(__file__).with_name("store_child.py")
PACKAGE = Path(aot_cache.store.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parents[1])}


def child(*arguments: object) -> list[str]:
    return [sys.executable, str(CHILD), *map(str, arguments)]


def start(*arguments: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(child(*arguments), env=ENVIRONMENT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def blob(number: int, size: int = 5000) -> bytes:
    return hashlib.shake_128(str(number).encode()).digest(size)


def named(*blobs: bytes) -> dict[str, bytes]:
    return {hashlib.sha256(data).hexdigest(): data for data in blobs}


def assert_sound(root: Path) -> None:
    """Every object and the shared bundle hash to their names; what killed writers left has a name that says so."""
    for path in (root / LAYOUT / "objects").rglob("*"):
        if path.is_file() and path.suffix != ".tmp":
            assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    if (root / "shared.safetensors").exists():
        assert read_bundle(root / "shared.safetensors").check_all() == []


def files(root: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}


# --- write_atomic ---


def test_write_atomic_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, b"first, which is longer")
    write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o000, 0o644)])
def test_write_atomic_respects_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        write_atomic(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_write_atomic_replaces_a_link_and_not_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "file").symlink_to("precious")
    write_atomic(tmp_path / "file", b"new")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file/inside", "a file"),
        ("file/deep/inside", "a file"),
        ("folder", "folder is in the file's place"),
        ("n" * 300, "name is too long"),
        ("circle/inside", "a file is where a folder is needed"),
    ],
)
def test_write_atomic_says_why_it_cannot(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(StoreUnwritable, match=words) as caught:
        write_atomic(tmp_path / name, b"new")
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "file").read_bytes() == b"old"


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    write_atomic(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


# --- objects and records ---


@given(data=st.binary(max_size=10_000))
def test_put_then_get(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        digest = hashlib.sha256(data).hexdigest()
        assert not store.holds(digest)
        assert store.put(data) == digest
        assert store.holds(digest)
        assert store.get(digest) == data
        assert (Path(folder) / LAYOUT / "objects" / digest[:2] / digest).read_bytes() == data


def test_putting_again_writes_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(b"data")
    before = files(tmp_path)
    store.put(b"data")
    assert files(tmp_path) == before


def test_a_store_that_is_only_read_is_not_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    assert not store.holds("0" * 64)
    assert store.get_record("kind", "key") is None
    with pytest.raises(BundleMissing):
        store.get("0" * 64)
    assert os.listdir(tmp_path) == []


def test_put_mends_an_object_of_the_wrong_size(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.put(b"data")
    path = tmp_path / LAYOUT / "objects" / digest[:2] / digest
    path.write_bytes(b"dat")
    with pytest.raises(BundleCorrupt, match=digest):
        store.get(digest)
    store.put(b"data")
    assert store.get(digest) == b"data"


def test_put_replaces_a_link_in_an_objects_place(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.put(b"data")
    path = tmp_path / LAYOUT / "objects" / digest[:2] / digest
    path.unlink()
    (path.parent / "real").write_bytes(b"atad")
    path.symlink_to("real")  # link, target and object all have four bytes
    with pytest.raises(BundleCorrupt):
        store.get(digest)
    store.put(b"data")
    assert store.get(digest) == b"data"
    assert (path.parent / "real").read_bytes() == b"atad"


def test_a_flipped_bit_is_found_and_the_file_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.put(b"data")
    path = tmp_path / LAYOUT / "objects" / digest[:2] / digest
    path.write_bytes(b"dat`")
    with pytest.raises(BundleCorrupt) as caught:
        store.get(digest)
    assert str(path) in str(caught.value)


def test_put_mends_a_flipped_bit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digest = store.put(b"data")
    path = tmp_path / LAYOUT / "objects" / digest[:2] / digest
    path.write_bytes(b"dat`")
    assert not store.holds(digest), "it is there, and it is not what it is called"
    assert store.put(b"data") == digest and store.get(digest) == b"data"


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n", "\0" * 64])
def test_what_is_no_digest_is_not_looked_for(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path)
    assert not store.holds(name)
    with pytest.raises(BundleMissing):
        store.get(name)


def test_records(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put_record("unit", "key-1.x_y", {"b": [1, None, "ü"], "a": {"deep": 1.5}})
    assert store.get_record("unit", "key-1.x_y") == {"b": [1, None, "ü"], "a": {"deep": 1.5}}
    store.put_record("unit", "key-1.x_y", {"b": 2})
    assert store.get_record("unit", "key-1.x_y") == {"b": 2}
    assert store.get_record("other", "key-1.x_y") is None
    assert (tmp_path / LAYOUT / "records" / "unit" / "key-1.x_y.json").is_file()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b'{"a": "\xff"}', b"[" * 200_000, b"9" * 5000, b"\0" * 100]
)
def test_a_damaged_record_counts_as_absent(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.put_record("kind", "key", {"good": True})
    path = tmp_path / LAYOUT / "records" / "kind" / "key.json"
    path.write_bytes(content)
    assert store.get_record("kind", "key") is None
    store.put_record("kind", "key", {"good": True})
    assert store.get_record("kind", "key") == {"good": True}


def test_no_flipped_bit_of_a_record_passes_as_another_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    facts = {
        "object": "0" * 64,
        "size": 17,
        "metadata": {"shared": 1024, "name": "ü", "ok": True, "none": None, "share": 0.5},
    }
    store.put_record("kind", "key", facts)
    path = tmp_path / LAYOUT / "records" / "kind" / "key.json"
    whole = path.read_bytes()
    absent = 0
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        found = store.get_record("kind", "key")
        assert found is None or found == facts, f"bit {bit}"
        absent += found is None
    assert absent > 0.95 * 8 * len(whole), "others are digits of \\u00fc, and white space"


def test_a_record_in_another_s_place_counts_as_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for kind, key in (("kind", "one"), ("kind", "two"), ("other", "one")):
        store.put_record(kind, key, {"of": [kind, key]})
    folder = tmp_path / LAYOUT / "records"
    (folder / "kind" / "one.json").replace(folder / "kind" / "two.json")
    assert store.get_record("kind", "two") is None
    (folder / "other" / "one.json").replace(folder / "kind" / "one.json")
    assert store.get_record("kind", "one") is None


def test_a_folder_or_pipe_in_a_records_place_counts_as_absent(tmp_path: Path) -> None:
    folder = tmp_path / LAYOUT / "records" / "kind"
    (folder / "folder.json").mkdir(parents=True)
    os.mkfifo(folder / "pipe.json")
    assert Store(tmp_path).get_record("kind", "folder") is None
    assert Store(tmp_path).get_record("kind", "pipe") is None


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../up", "a\0", "a\n", "ü", "n" * 201])
def test_names_of_records_cannot_lead_elsewhere(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "store")
    for kind, key in ((name, "key"), ("kind", name)):
        with pytest.raises(StoreError, match="a file name as a record"):
            store.put_record(kind, key, {})
        with pytest.raises(StoreError, match="a file name as a record"):
            store.get_record(kind, key)
    assert os.listdir(tmp_path) == []


def test_a_record_is_plain_json(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError):
        store.put_record("kind", "key", {"a": float("nan")})
    with pytest.raises(TypeError):
        store.put_record("kind", "key", {"a": b"bytes"})
    assert store.get_record("kind", "key") is None


def test_check_writable_leaves_only_folders(tmp_path: Path) -> None:
    Store(tmp_path / "new").check_writable()
    assert [path for path in tmp_path.rglob("*") if not path.is_dir()] == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreUnwritable, match="a file is where a folder is needed"):
        Store(tmp_path / "file").check_writable()


# --- other processes ---


def test_writers_and_readers_at_the_same_time(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    root = tmp_path / "store"
    readers = [start("read_until", root, stop) for _ in range(2)]
    # Two pairs of writers put the same objects, and all four put some that their neighbours put.
    writers = [start("put_many", root, first, 25) for first in (0, 0, 15, 15)]
    assert [finish(writer) for writer in writers] == [25] * 4
    stop.touch()
    for reader in readers:
        reads = finish(reader)
        assert reads["records"] > 0
        assert reads["bundles"] > 0
    store = Store(root)
    for number in range(40):
        record = store.get_record("blob", str(number))
        assert record is not None
        assert store.get(record["digest"]) == blob(number)
    assert_sound(root)
    assert list(root.rglob("*.tmp")) == []


def test_the_lock_keeps_writers_apart(tmp_path: Path) -> None:
    counters = [start("count", tmp_path, 40) for _ in range(3)]
    assert [finish(counter) for counter in counters] == [40] * 3
    assert (tmp_path / "count").read_text() == "120"


def test_the_lock_keeps_threads_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    inside: list[int] = []
    most: list[int] = []

    def work() -> None:
        for _ in range(10):
            with store.writer(timeout=60):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 40


def test_a_holder_may_enter_again(tmp_path: Path) -> None:
    with Store(tmp_path).writer(timeout=0), Store(tmp_path).writer(timeout=0):
        other = subprocess.run(child("count", tmp_path, 0), env=ENVIRONMENT, check=True)
    assert other.returncode == 0


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `tmp_path`."""
    process = start("hold", tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_readers_neither_wait_nor_write(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    store = Store(tmp_path)
    digest = store.put(b"data")
    store.put_record("kind", "key", {"a": 1})
    write_bundle(tmp_path / "shared.safetensors", {}, named(b"data"))
    before = files(tmp_path)
    assert store.get(digest) == b"data"
    assert store.get_record("kind", "key") == {"a": 1}
    assert bytes(read_bundle(tmp_path / "shared.safetensors").object(digest)) == b"data"
    assert files(tmp_path) == before
    with pytest.raises(StoreUnwritable, match="another writer"), store.writer(timeout=0.1):
        pass
    assert finish(holder) == "released"
    with store.writer(timeout=0):
        pass


def test_a_killed_holder_frees_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with Store(tmp_path).writer(timeout=10):
        pass


@pytest.mark.parametrize("what", ["object", "record", "bundle"])
@pytest.mark.parametrize("moment", ["half written", "before the flush", "before the rename", "after the rename"])
def test_killed_at_any_moment(tmp_path: Path, moment: str, what: str) -> None:
    store = Store(tmp_path)
    store.put(blob(1))
    store.put_record("kind", "key", {"version": "old"})
    write_bundle(tmp_path / "shared.safetensors", {"version": "old"}, named(blob(1)))
    process = start("die_at", tmp_path, moment, what)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == -signal.SIGKILL, err
    assert_sound(tmp_path)
    done = moment == "after the rename"
    new = hashlib.sha256(blob(2)).hexdigest()
    record = store.get_record("kind", "key")
    assert store.holds(new) == (done and what == "object")
    assert record == {"version": "new" if done and what == "record" else "old"}
    version = read_bundle(tmp_path / "shared.safetensors").manifest["version"]
    assert version == ("new" if done and what == "bundle" else "old")
    assert len(list(tmp_path.rglob("*.tmp"))) == (0 if done else 1)
    with store.writer(timeout=10):
        assert store.get(store.put(blob(2))) == blob(2)


def test_killed_again_and_again(tmp_path: Path) -> None:
    moments = random.Random(0)
    written = set()
    for _ in range(12):
        process = start("write_for_ever", tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        while not written and Store(tmp_path).get_record("last", "one") is None:  # however slow the machine is
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert_sound(tmp_path)
        record = Store(tmp_path).get_record("last", "one")
        if record is not None:
            written.add(record["digest"])
            assert Store(tmp_path).get(record["digest"])
    assert written  # else nothing was ever killed while it wrote
    with Store(tmp_path).writer(timeout=10):
        Store(tmp_path).put(b"data")


# --- disks and folders that refuse ---


def on_small_disk(folder: Path, command: str) -> Any:
    """Run a child on a file system of 64 KiB that only it sees, which goes away with it."""
    prefix = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mount = 'mount -t tmpfs -o size=64k,mode=0777 none "$0"'
    try:
        subprocess.run([*prefix, "sh", "-c", mount, str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system of its own")
    script = f'{mount} && exec "$@"'
    line = [*prefix, "sh", "-c", script, str(folder), *child(command, folder)]
    done = subprocess.run(line, check=False, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_full_disk(tmp_path: Path) -> None:
    result = on_small_disk(tmp_path, "full_disk")
    for name in ("put", "bundle", "record", "check"):
        kind, message = result[name]
        assert kind == "StoreUnwritable"
        assert "no space is left" in message
    assert result["kept"] > 0
    assert result["sound"] == [True] * result["kept"]
    assert result["old"] == [[], {"version": "old"}]
    assert result["leftovers"] == []


def test_a_limit_on_file_size(tmp_path: Path) -> None:
    result = finish(start("limited", tmp_path))
    kind, message = result["large"]
    assert kind == "StoreUnwritable"
    assert "larger than this process may write" in message
    assert result["small"] is True
    assert result["leftovers"] == []


def test_a_read_only_disk(tmp_path: Path) -> None:
    result = on_small_disk(tmp_path, "read_only_disk")
    assert result["read"] is True
    for kind, message in result["errors"]:
        assert kind == "StoreUnwritable"
        assert "that file system is read-only" in message


def test_a_folder_without_permission() -> None:
    # Not pytest's folder: that one is closed to the other user that the child becomes.
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "store"
        store = Store(root)
        store.put(blob(1))
        secret = store.put(blob(3))
        write_bundle(root / "shared.safetensors", {}, named(blob(1)))
        (root / LAYOUT / "objects" / secret[:2] / secret).chmod(0)
        folders = [Path(folder), root, *(path for path in root.rglob("*") if path.is_dir())]
        for path in folders:
            path.chmod(0o555)
        before = files(root)
        try:
            result = finish(start("without_permission", root))
            assert files(root) == before
        finally:
            for path in folders:
                path.chmod(0o755)
    assert result["read"] is True
    kind, message = result["unreadable"]
    assert kind == "StoreError"
    assert "readable" in message
    for kind, message in result["errors"]:
        assert kind == "StoreUnwritable"
        assert "no permission" in message


# --- what the store may know ---

ALLOWED = {"hashlib", "json", "os", "re", "reprlib", "stat", "io", "errno", "collections.abc", "contextlib", "pathlib"}
ALLOWED |= {
    "typing",
    "weakref",
    "mmap",
    "concurrent",
    "concurrent.futures",
    "threading",
    "uuid",
    "fcntl",
    "time",
    "tempfile",
    "shutil",
    "math",
    "fnmatch",
    "collections",
    "dataclasses",
    "filelock",
    "base64",
    "grp",
    "pwd",
    "cryptography",
    "cryptography.exceptions",
    "cryptography.hazmat.primitives.asymmetric.ed25519",
    "cryptography.hazmat.primitives.serialization",
    "__future__",
    "aot_cache.errors",
    "aot_cache.files",
    "aot_cache.files.mounts",
}


def test_the_store_imports_nothing_that_computes_or_unpickles() -> None:
    for source in [*PACKAGE.glob("*.py"), *(PACKAGE.parent / "files").glob("*.py")]:
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0 and node.module is not None
                names = [node.module]
            for name in names:
                assert name in ALLOWED or name.startswith("aot_cache.store"), f"{source.name} imports {name}"
            if isinstance(node, ast.Name):
                assert node.id not in {"eval", "exec", "compile", "__import__"}, source.name


def test_a_reading_process_pays_for_no_writer() -> None:
    code = "import sys, aot_cache.store; print(*{'torch', 'triton', 'safetensors', 'filelock'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
