"""What the store's tests let other processes do: `python store_child.py <command> <folder> [<argument>...]`.

A command prints one JSON value, or ends by the signal that the test is about.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aot_cache.errors import AotCacheError, BundleMissing, StoreError
from aot_cache.store import Store, read_bundle, write_bundle

NOBODY = 65534
PAGE = 4096


def blob(number: int, size: int = 5000) -> bytes:
    return hashlib.shake_128(str(number).encode()).digest(size)


def objects(*numbers: int) -> dict[str, bytes]:
    return {hashlib.sha256(blob(number)).hexdigest(): blob(number) for number in numbers}


def error_of(action: Callable[[], object]) -> list[str] | None:
    """[the class, the message] of the aot-cache error that `action` raises; other errors are the test's failure."""
    try:
        action()
    except AotCacheError as error:
        return [type(error).__name__, str(error)]
    return None


def leftovers(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*.tmp"))


def enter_writer(store: Store) -> None:
    with store.writer(timeout=0):
        pass


def put_many(root: Path, first: str, count: str) -> int:
    """Put objects `first`..`first + count`, a record for each, and one bundle that every writer fights for."""
    store = Store(root)
    for number in range(int(first), int(first) + int(count)):
        digest = store.put(blob(number))
        store.put_record("blob", str(number), {"digest": digest})
        write_bundle(root / "shared.safetensors", {"number": number, "complete": True}, objects(number, number + 1))
    return int(count)


def read_until(root: Path, stop: str) -> dict[str, int]:
    """Read whatever is there until the file `stop` appears; anything unsound ends this process with a traceback."""
    store = Store(root)
    reads = {"records": 0, "bundles": 0}
    for key in itertools.cycle(range(40)):
        record = store.get_record("blob", str(key))
        if record is not None:
            assert store.get(record["digest"]) == blob(key)
            reads["records"] += 1
        try:
            bundle = read_bundle(root / "shared.safetensors")
        except BundleMissing:
            pass
        else:
            assert bundle.check_all() == []
            number = bundle.manifest["number"]
            assert bundle.manifest["objects"].keys() == objects(number, number + 1).keys()
            reads["bundles"] += 1
        if os.path.exists(stop):
            return reads
    raise AssertionError


def count(root: Path, times: str) -> int:
    """Add to a number in a file in the way that loses additions unless the lock keeps the others out."""
    store = Store(root)
    path = root / "count"
    for _ in range(int(times)):
        with store.writer(timeout=60):
            value = int(path.read_text()) if path.exists() else 0
            time.sleep(0.001)
            path.write_text(str(value + 1))
    return int(times)


def hold(root: Path) -> str:
    """Hold the writers' lock until the parent closes our input."""
    with Store(root).writer(timeout=60):
        print("held", flush=True)
        sys.stdin.read()
    return "released"


def write_for_ever(root: Path) -> None:
    store = Store(root)
    print("started", flush=True)
    for number in itertools.count():
        with store.writer(timeout=60):
            digest = store.put(blob(number, 200_000))
            store.put_record("last", "one", {"digest": digest})
            write_bundle(root / "shared.safetensors", {"number": number}, objects(number, number + 1, number + 2))


def in_use(root: Path) -> str:
    """Use the store as a build does, until the parent closes our input."""
    with Store(root).in_use():
        print("in use", flush=True)
        sys.stdin.read()
    return "released"


def scratch(root: Path) -> str:
    """Have a temporary folder until the parent closes our input."""
    from aot_cache.files import scratch

    with scratch.folder() as folder:
        (folder / "file").write_bytes(bytes(PAGE))
        print(json.dumps(str(folder)), flush=True)
        sys.stdin.read()
    return "removed"


def gc(root: Path, wait: str) -> int:
    from aot_cache.store import gc, use

    with use.alone(root, float(wait)):
        gc.carry_out(gc.plan(root, gc.Limits(older_than=gc.DAY)))
    return 0


def gc_until(root: Path, stop: str) -> int:
    """Clean up whenever nobody builds, until the file `stop` appears; returns how often."""
    from aot_cache.errors import StoreInUse
    from aot_cache.store import gc, use

    done = 0
    while not os.path.exists(stop) or not done:
        try:
            with use.alone(root):
                gc.carry_out(gc.plan(root, gc.Limits(max_size=20_000)))
                done += 1
        except StoreInUse:
            time.sleep(0.001)
    return done


def build_for_ever(root: Path, first: str, times: str) -> int:
    """What a build does, again and again: look, put what is absent, and at the end read all of it for a bundle."""
    store = Store(root)
    for again in range(int(times)):
        numbers = range(int(first) + again % 3, int(first) + again % 3 + 5)
        with store.in_use():
            for number in numbers:
                record = store.get_record("blob", str(number))
                if record is None or not store.holds(record["digest"]):
                    store.put_record("blob", str(number), {"digest": store.put(blob(number))})
            found = [store.get_record("blob", str(number)) for number in numbers]
            made = {one["digest"]: store.get(one["digest"]) for one in found if one is not None}
            assert len(made) == len(numbers)
            write_bundle(root / "shared.safetensors", {"number": numbers[0]}, objects(numbers[0], numbers[0] + 1))
    return int(times)


def die_at(root: Path, moment: str, what: str) -> None:
    """Be killed at one moment of one write."""
    real_write, real_fsync, real_replace = os.write, os.fsync, os.replace

    def die(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def half(descriptor: int, data: Any) -> int:
        real_write(descriptor, data[: len(data) // 2])
        return int(die())

    def die_for_a_file(descriptor: int) -> None:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # a new folder is flushed first
            die()
        real_fsync(descriptor)

    def replace_and_die(*names: Any) -> None:
        real_replace(*names)
        die()

    patches: dict[str, tuple[str, Any]] = {
        "half written": ("write", half),
        "before the flush": ("fsync", die_for_a_file),
        "before the rename": ("replace", die),
        "after the rename": ("replace", replace_and_die),
    }
    name, patch = patches[moment]
    with Store(root).writer(timeout=60):
        setattr(os, name, patch)
        if what == "object":
            Store(root).put(blob(2))
        elif what == "record":
            Store(root).put_record("kind", "key", {"version": "new"})
        else:
            write_bundle(root / "shared.safetensors", {"version": "new"}, objects(2))


def full_disk(root: Path) -> dict[str, Any]:
    """Fill the file system of `root` (64 KiB) and say what still holds."""
    store = Store(root)
    bundle = root / "shared.safetensors"
    digest = write_bundle(bundle, {"version": "old"}, objects(1))
    store.put_record("kind", "key", {"version": "old"})
    kept: list[str] = []
    error = None
    for number in range(64):
        error = error_of(lambda number=number: kept.append(store.put(blob(number, PAGE))))  # type: ignore[misc]
        if error:
            break
    return {
        "kept": len(kept),
        "put": error,
        "bundle": error_of(lambda: write_bundle(bundle, {"version": "new"}, objects(1, 2, 3))),
        "record": error_of(lambda: store.put_record("kind", "key", {"version": "new" * PAGE})),
        "check": error_of(store.check_writable),
        "sound": [store.get(name) == blob(number, PAGE) for number, name in enumerate(kept)],
        "old": [read_bundle(bundle, digest).check_all(), store.get_record("kind", "key")],
        "leftovers": leftovers(root),
    }


def read_only_disk(root: Path) -> dict[str, Any]:
    """Make the file system of `root` read-only and say what still works."""
    store = Store(root)
    digest = write_bundle(root / "shared.safetensors", {}, objects(1))
    name = store.put(blob(1))
    subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
    return {
        "read": read_bundle(root / "shared.safetensors", digest).check_all() == [] and store.get(name) == blob(1),
        "errors": write_errors(store),
    }


def write_errors(store: Store) -> list[list[str] | None]:
    return [
        error_of(lambda: store.put(blob(2))),
        error_of(lambda: store.put_record("kind", "key", {})),
        error_of(lambda: write_bundle(store.root / "shared.safetensors", {}, {})),
        error_of(store.check_writable),
        error_of(lambda: enter_writer(store)),
    ]


def limited(root: Path) -> dict[str, Any]:
    """Write more than the process may."""
    import resource

    store = Store(root)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PAGE, 2 * PAGE))
    return {
        "large": error_of(lambda: store.put(blob(1, 10 * PAGE))),
        "small": store.get(store.put(blob(1, PAGE))) == blob(1, PAGE),
        "leftovers": leftovers(root),
    }


def without_permission(root: Path) -> dict[str, Any]:
    """Use a store of which this user may read all but one object."""
    with tempfile.TemporaryDirectory() as folder:  # what is imported late may be out of the other user's reach
        enter_writer(Store(folder))
        Store(folder).check_writable()
    if os.geteuid() == 0:  # permissions do not apply to root
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    store = Store(root)
    secret = hashlib.sha256(
        blob(3)
    ).hexdigest()  # nobody can say whether its bytes are sound, so `put` would write it again
    try:
        store.get(secret)
    except StoreError as error:
        unreadable = [type(error).__name__, str(error)]
    return {
        "read": read_bundle(root / "shared.safetensors").check_all() == [] and store.get(store.put(blob(1))) == blob(1),
        "unreadable": unreadable,
        "errors": write_errors(store),
    }


if __name__ == "__main__":
    result = globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
    print(json.dumps(result), flush=True)
