"""`aot-cache gc`: it removes what nobody needs, never what is named or in use, and may be killed at any moment."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits import HANGS
from store_child import blob, objects

from aot_cache.cli.main import main
from aot_cache.errors import StoreInUse, StoreUnwritable
from aot_cache.files import mounts, scratch
from aot_cache.store import Store, read_bundle, use, write_bundle
from aot_cache.store import gc as housekeeping
from aot_cache.store.gc import DAY, Limits
from aot_cache.store.objects import LAYOUT, facts_in

CHILD = Path(__file__).with_name("store_child.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Else these tests would see what others' killed processes have left."""
    folder = tmp_path_factory.mktemp("tmp")
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def child(*arguments: object) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    environment = {**ENVIRONMENT, "TMPDIR": tempfile.gettempdir()}
    command = [sys.executable, str(CHILD), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def put(root: Path, number: int, *, age: float = 0.0, size: int = 1000) -> Path:
    """An object and a record that names it, last used `age` seconds ago; returns the record's file."""
    store = Store(root)
    store.put_record("blob", str(number), {"digest": store.put(blob(number, size))})
    path = root / LAYOUT / "records" / "blob" / f"{number}.json"
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def digest(number: int, size: int = 1000) -> str:
    return hashlib.sha256(blob(number, size)).hexdigest()


def clean(root: Path, **limits: Any) -> housekeeping.Plan:
    with use.alone(root):
        plan = housekeeping.plan(root, Limits(**limits))
        housekeeping.carry_out(plan)
    return plan


def there(root: Path) -> set[int]:
    """The numbers of `put` whose record and object are both there; one without its object is a failure."""
    store = Store(root)
    found = set()
    for path in (root / LAYOUT / "records" / "blob").glob("*.json"):
        record = facts_in(path.read_bytes(), "blob", path.stem)  # and not get_record, which is a use
        assert record is not None
        assert store.holds(record["digest"]), f"record {path.stem} names an object that is gone"
        found.add(int(path.stem))
    return found


def run_gc(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = main(["gc", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


# --- what goes --------------------------------------------------------------------------------------------------------


def test_without_limits_only_garbage_goes(tmp_path: Path) -> None:
    put(tmp_path, 1, age=900 * DAY)
    Store(tmp_path).put(blob(2))
    damaged = put(tmp_path, 3)
    damaged.write_bytes(damaged.read_bytes().replace(b"digest", b"digesT"))
    plan = clean(tmp_path)
    assert [(one.what, len(one.paths)) for one in plan.removals] == [("records", 1), ("objects", 2)]
    assert there(tmp_path) == {1}


def test_the_most_recently_used_stay(tmp_path: Path) -> None:
    for number in range(10):
        put(tmp_path, number, age=number * 1000.0, size=10_000)
    clean(tmp_path, max_size=45_000)
    assert there(tmp_path) == {0, 1, 2, 3}
    assert len(list((tmp_path / LAYOUT / "objects").rglob("?" * 64))) == 4


def test_reading_a_record_is_a_use(tmp_path: Path) -> None:
    for number in range(4):
        put(tmp_path, number, age=(number + 1) * DAY)
    assert Store(tmp_path).get_record("blob", "3")
    clean(tmp_path, older_than=DAY / 2)
    assert there(tmp_path) == {3}


def test_a_use_is_noted_at_most_once_a_minute(tmp_path: Path) -> None:
    path = put(tmp_path, 1, age=use.PRECISION / 2)
    before = path.stat().st_mtime_ns
    Store(tmp_path).get_record("blob", "1")
    assert path.stat().st_mtime_ns == before


def test_what_a_bundle_names_stays_with_its_records(tmp_path: Path) -> None:
    put(tmp_path, 1, age=99 * DAY, size=5000)
    put(tmp_path, 2, age=98 * DAY, size=5000)
    bundle = tmp_path / "bundles" / "a.safetensors"
    write_bundle(bundle, {}, objects(1))
    os.utime(bundle, (0, 0))
    plan = clean(tmp_path, max_size=1, older_than=DAY)
    assert there(tmp_path) == {1}
    assert bundle.exists() and "--bundles" in plan.notes[0]


def test_bundles_go_on_request_and_then_what_they_named(tmp_path: Path) -> None:
    bundles = {}
    for number in (1, 2):
        put(tmp_path, number, age=99 * DAY, size=5000)
        bundles[number] = tmp_path / "bundles" / f"{number}.safetensors"
        write_bundle(bundles[number], {}, objects(number))
        bundles[number].with_suffix(".plan.json").write_text("{}")
        bundles[number].with_suffix(".rehearsed.json").write_text("{}")
    os.utime(bundles[1], (0, 0))
    clean(tmp_path, older_than=DAY, bundles=True)
    assert there(tmp_path) == {2}
    assert sorted(path.name for path in (tmp_path / "bundles").iterdir()) == [
        "1.plan.json", "2.plan.json", "2.rehearsed.json", "2.safetensors"
    ]  # fmt: skip


def test_a_bundle_that_cannot_be_read_stays_and_is_said(tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "odd.safetensors").write_bytes(b"odd")
    plan = clean(tmp_path, older_than=DAY)
    assert (tmp_path / "bundles" / "odd.safetensors").exists()
    assert "odd.safetensors" in plan.notes[0]


@pytest.mark.parametrize("pattern", ["3.json", "v2/records/blob/3*"])
def test_keep(tmp_path: Path, pattern: str) -> None:
    for number in range(5):
        put(tmp_path, number, age=DAY * 9)
    clean(tmp_path, older_than=DAY, keep=[pattern])
    assert there(tmp_path) == {3}


@settings(max_examples=60, deadline=None)
@given(
    records=st.dictionaries(
        st.integers(0, 30), st.tuples(st.frozensets(st.integers(0, 9), max_size=3), st.integers(0, 20)), max_size=12
    ),
    loose=st.frozensets(st.integers(0, 9)),
    bundles=st.dictionaries(st.integers(0, 3), st.tuples(st.frozensets(st.integers(0, 9)), st.integers(0, 20))),
    max_size=st.none() | st.integers(0, 60_000),
    days=st.none() | st.integers(0, 20),
    also_bundles=st.booleans(),
)
def test_never_what_is_named(
    records: dict[int, tuple[frozenset[int], int]],
    loose: frozenset[int],
    bundles: dict[int, tuple[frozenset[int], int]],
    max_size: int | None,
    days: int | None,
    also_bundles: bool,
) -> None:
    """Any store under any limits: all that stays has all that it names, and what went was used no later than what stayed."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "fsync"):  # thousands of them take minutes
        root, store, now = Path(folder), Store(folder), time.time()
        for number in loose:
            store.put(blob(number))
        for key, (names, age) in records.items():
            store.put_record("any", str(key), {"deep": [{"objects": {store.put(blob(n)): 1 for n in names}}]})
            os.utime(root / LAYOUT / "records" / "any" / f"{key}.json", (now - age * DAY,) * 2)
        for key, (names, age) in bundles.items():
            path = root / "bundles" / f"{key}.safetensors"
            write_bundle(path, {}, objects(*names))
            os.utime(path, (now - age * DAY,) * 2)
        older_than = None if days is None else (days + 0.5) * DAY
        clean(root, max_size=max_size, older_than=older_than, bundles=also_bundles)

        left = {int(path.stem) for path in (root / LAYOUT / "records").rglob("*.json")}
        bundles_left = {int(path.stem) for path in (root / "bundles").glob("*.safetensors")}
        named = {n for key in left for n in records[key][0]} | {n for key in bundles_left for n in bundles[key][0]}
        all_objects = loose | {n for names, _ in records.values() for n in names}
        assert {n for n in range(10) if store.holds(digest(n, 5000))} == named & all_objects
        assert also_bundles or bundles_left == set(bundles)

        def last(key: int) -> int:
            """Days since a record was used, directly or through a bundle that is there."""
            uses = [age if also_bundles else -1 for names, age in bundles.values() if names & records[key][0]]
            return min([records[key][1], *uses])

        gone = set(records) - left
        assert all(last(one) >= last(other) for one in gone for other in left)
        if max_size is None:
            assert gone == {key for key in records if days is not None and last(key) > days}
        if not bundles and max_size is not None:
            files = [*(root / LAYOUT).rglob("?" * 64), *(root / LAYOUT / "records").rglob("*.json")]
            assert sum(path.stat().st_size for path in files) <= max_size


# --- what killed processes have left ----------------------------------------------------------------------------------


def test_partial_files_go(tmp_path: Path) -> None:
    name = f".{'a' * 32}.tmp"
    put(tmp_path, 1)
    (tmp_path / "bundles").mkdir()
    inside = tmp_path / LAYOUT / "objects" / name
    old, new = tmp_path / "bundles" / name, tmp_path / name
    for path in (inside, old, new):
        path.write_bytes(b"part")
    os.utime(old, (time.time() - 7200,) * 2)
    clean(tmp_path)
    assert [path.exists() for path in (inside, old, new)] == [False, False, True]


def test_a_partial_file_of_a_killed_writer_goes_soon_and_one_that_is_written_stays(tmp_path: Path) -> None:
    """Beside bundles, which other commands write, too, at any time."""
    folder = tmp_path / "bundles"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, CHILD, "die_at", str(tmp_path), "half written", "bundle"], env=ENVIRONMENT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (killed,) = tmp_path.glob(".*.tmp")
    with pytest.MonkeyPatch.context() as patch:
        seen: list[Path] = []

        def write(descriptor: int, data: Any) -> int:
            seen.extend(folder.glob(".*.tmp"))
            for path in (killed, *seen):
                os.utime(path, (time.time() - 60,) * 2)
            clean(tmp_path)
            assert not killed.exists() and all(path.exists() for path in seen)
            return real(descriptor, data)

        real = os.write
        patch.setattr(os, "write", write)
        write_bundle(folder / "b.safetensors", {}, {})
    assert len(seen) == 1 and [path.name for path in folder.iterdir()] == ["b.safetensors"]


def test_old_layouts_go_and_new_ones_stay(tmp_path: Path) -> None:
    for name in ("v0", "v1", "v3", "vendor"):
        (tmp_path / name / "objects").mkdir(parents=True)
        (tmp_path / name / "objects" / "x").write_bytes(b"x")
        if name != "v1":
            os.utime(tmp_path / name / "objects" / "x", (0, 0))
    clean(tmp_path)
    assert {path.name for path in tmp_path.glob("v*")} == {"v1", "v3", "vendor"}


def test_folders_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path, own_temporary_folder: Path) -> None:
    living, dead = child("scratch", tmp_path), child("scratch", tmp_path)
    names = [Path(json.loads(process.stdout.readline())) for process in (living, dead)]  # type: ignore[union-attr]
    (own_temporary_folder / "aot-cache-run-file").write_text("no folder")
    try:
        dead.kill()
        dead.wait()
        assert all(path.is_dir() for path in names)
        clean(tmp_path)
        assert [path.is_dir() for path in names] == [True, False]
    finally:
        living.communicate()
    assert not names[0].exists()


def test_a_folder_whose_child_lives_is_not_abandoned(tmp_path: Path) -> None:
    """A forked child may still write there."""
    path, file = scratch.make()
    pid = os.fork()
    if not pid:
        signal.pause()
    os.close(file)
    with scratch.abandoned() as found:
        assert path not in found
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with scratch.abandoned() as found:
        assert found == [path]


# --- beside others ----------------------------------------------------------------------------------------------------


@pytest.fixture
def builder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that builds with the store."""
    process = child("in_use", tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "in use\n"
    yield process
    process.communicate()


def test_a_store_in_use_is_left_alone(
    tmp_path: Path, builder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, 1, age=9 * DAY)
    code, document = run_gc(capsys, tmp_path, "--older-than", "1d")
    assert code == 3 and document["error"]["type"] == "StoreInUse"
    assert (
        f"process {builder.pid} (" in document["error"]["message"] and "store_child.py" in document["error"]["message"]
    )
    assert there(tmp_path) == {1}
    code, document = run_gc(capsys, tmp_path, "--older-than", "1d", "--dry-run")
    assert code == 0 and str(builder.pid) in document["in_use_by"][0] and there(tmp_path) == {1}


def test_it_waits_for_a_builder_and_takes_over_from_a_killed_one(
    tmp_path: Path, builder: subprocess.Popen[str]
) -> None:
    put(tmp_path, 1, age=9 * DAY)
    with pytest.raises(StoreInUse), use.alone(tmp_path, wait=0.3):
        pass
    waiting = child("gc", tmp_path, HANGS)
    builder.kill()
    waiting.communicate(timeout=HANGS)
    assert waiting.returncode == 0 and there(tmp_path) == set()


def test_builders_share_it(tmp_path: Path, builder: subprocess.Popen[str]) -> None:
    with Store(tmp_path).in_use(), Store(tmp_path).in_use():
        Store(tmp_path).put(blob(1))


def test_a_builder_waits_for_housekeeping(tmp_path: Path) -> None:
    with use.alone(tmp_path):
        process = child("in_use", tmp_path)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    out, _ = process.communicate(timeout=HANGS)
    assert out.startswith("in use")


def test_a_store_that_is_read_only_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1, age=DAY)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(
        os, "open", lambda path, *rest, _open=os.open: refuse() if ".use" in str(path) else _open(path, *rest)
    )
    with Store(tmp_path).in_use():
        assert there(tmp_path) == {1}


def test_without_locks_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    put(tmp_path, 1, age=9 * DAY)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with Store(tmp_path).in_use():
        pass
    with pytest.raises(StoreUnwritable, match="No locks available"), use.alone(tmp_path):
        pass


@pytest.mark.parametrize(
    ("mounted", "words"),
    [
        ("nfs4 host:/x rw,local_lock=flock", "mounted with local_lock=flock"),
        ("nfs host:/x rw,nolock", "mounted with nolock"),
        ("fuse.sshfs host: rw", "fuse.sshfs"),
        ("nfs4 host:/x rw,local_lock=none", ""),
        ("ext4 /dev/sda rw", ""),
    ],
)
def test_locks_that_other_hosts_do_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mounted: str, words: str
) -> None:
    folder = str(tmp_path).replace("_", "\\137")  # as the kernel writes a space
    table = f"1 0 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {folder} rw shared:1 - {mounted}\n"
    real = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda path, *a, **k: table if "mountinfo" in str(path) else real(path, *a, **k)
    )
    assert words in mounts.unseen_locks(tmp_path) and bool(words) == bool(mounts.unseen_locks(tmp_path))
    if words:
        with pytest.raises(StoreUnwritable, match="other hosts"), use.alone(tmp_path):
            pass


def test_killed_again_and_again(tmp_path: Path) -> None:
    """50 times: wherever it is killed, no record names an object that is gone, and the next one finishes the work."""
    chance = random.Random(0)
    for number in range(120):
        put(tmp_path, number, age=number * DAY)
    for _ in range(50):
        _, status = os.waitpid(killed_after(tmp_path, chance.randrange(1, 7)), 0)
        assert os.WIFSIGNALED(status), "there was nothing left to remove"
        there(tmp_path)
    clean(tmp_path, older_than=10.5 * DAY)
    assert there(tmp_path) == set(range(11))
    assert len(list((tmp_path / LAYOUT / "objects").rglob("?" * 64))) == 11


def killed_after(root: Path, removals: int) -> int:
    """A child that is killed when it has removed so many files; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        unlink, left = Path.unlink, iter(range(removals - 1, -1, -1))

        def remove(path: Path, missing_ok: bool = False) -> None:
            unlink(path, missing_ok)
            if not next(left):
                os.kill(os.getpid(), signal.SIGKILL)

        Path.unlink = remove  # type: ignore[method-assign]
        clean(root, older_than=10.5 * DAY)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def test_beside_builders_readers_and_another(tmp_path: Path) -> None:
    """Two of them in a loop beside builders that put, read again and write a bundle: nothing that a builder uses goes."""
    builders = [child("build_for_ever", tmp_path, number * 1000, 25) for number in range(2)]
    reader = child("read_until", tmp_path, tmp_path / "stop")
    cleaners = [child("gc_until", tmp_path, tmp_path / "stop") for _ in range(2)]
    for process in builders:
        _, err = process.communicate(timeout=HANGS)
        assert process.returncode == 0, err
    (tmp_path / "stop").touch()
    done = 0
    for process in [*cleaners, reader]:
        out, err = process.communicate(timeout=HANGS)
        assert process.returncode == 0, err
        done += 0 if process is reader else json.loads(out)
    assert done, "no housekeeping ran"
    assert read_bundle(tmp_path / "shared.safetensors").check_all() == []


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_plan_is_printed_and_a_dry_run_removes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        put(tmp_path, number, age=number * 2 * DAY)
    before = sorted(tmp_path.rglob("*"))
    assert main(["gc", str(tmp_path), "--older-than", "3d", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "not used for longer than --older-than" in out and "would remove" in out and "stays: 2 records" in out
    assert sorted(tmp_path.rglob("*")) == before
    code, document = run_gc(capsys, tmp_path, "--max-size", "1.2kB")
    assert code == 0 and there(tmp_path) == {0}
    assert [(row["what"], row["count"]) for row in document["removed"]] == [("records", 2), ("objects", 2)]
    assert document["kept"] == {"records": 1, "objects": 1}


@pytest.mark.parametrize(
    "words",
    [["--max-size", "big"], ["--max-size", "-1"], ["--older-than", "30"], ["--older-than", "1y"], ["nowhere"]],
    ids=" ".join,
)
def test_what_is_not_understood(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, 1)
    assert main(["gc", *([] if words == ["nowhere"] else [str(tmp_path)]), *words]) == 3
    assert "hint: " in capsys.readouterr().err and there(tmp_path) == {1}


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("12", 12), ("1kB", 1000), ("1.5 GB", 1_500_000_000), ("2KiB", 2048), ("1g", 10**9)]
)
def test_sizes(text: str, size: int) -> None:
    from aot_cache.cli.gc import _bytes

    assert _bytes(text) == size
