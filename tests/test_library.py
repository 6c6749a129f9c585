"""Libraries are loaded where a temporary folder is `noexec`, and one line says so where that cannot be."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from limits import HANGS

from aot_cache.errors import Incompatible
from aot_cache.store import library

ROOT = Path(__file__).parents[1]
SCRIPT = """
import ctypes, os, sys
from aot_cache.errors import Incompatible
from aot_cache.store import library

data = open(sys.argv[1], "rb").read()
print(library.loaded(data, "memory", ctypes.CDLL).answer())

def refuse(*_):
    raise OSError(13, "Permission denied")

os.memfd_create = refuse
try:
    library.loaded(data, "file", ctypes.CDLL)
except Incompatible as error:
    print(str(error).count("\\n"), error.message)
"""


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    (folder / "answer.c").write_text("int answer(void) { return 42; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "answer.c", "-o", "answer.so"], cwd=folder, check=True)
    return folder / "answer.so"


def refuse(*_: object) -> int:
    raise OSError(13, "Permission denied")


def test_on_a_file_system_without_execution(binary: Path, tmp_path: Path) -> None:
    prefix = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    mount = 'mount -t tmpfs -o noexec,mode=0777 none "$0"'
    try:
        subprocess.run([*prefix, "sh", "-c", mount, str(tmp_path)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system of its own")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = [*prefix, "sh", "-c", f'{mount} && exec "$@"', str(tmp_path), sys.executable, "-c", SCRIPT, str(binary)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    answer, said = done.stdout.splitlines()
    assert answer == "42"
    assert said.startswith("0 cannot load the library file: from memory: PermissionError") and "failed to map" in said


def test_without_memory_files_it_is_loaded_from_the_temporary_folder(
    binary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert library.loaded(binary.read_bytes(), "x", ctypes.CDLL).answer() == 42
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_nothing_can_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Incompatible, match="without noexec"):
        library.loaded(b"no library", "x", ctypes.CDLL)
    assert not list(tmp_path.iterdir()) and len(os.listdir("/proc/self/fd")) == before
