"""The log: silent unless a program configures `logging`; a line at `load`, at `ready`, and for first misses after `seal`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

from aot_cache.runtime.guard import Guard
from aot_cache.runtime.ledger import Ledger
from aot_cache.runtime.miss_log import Misses

ROOT = Path(__file__).parents[1]


def test_a_library_writes_nothing_to_stderr() -> None:
    code = (
        "import logging, aot_cache\n"
        "for name in ('aot_cache', 'aot_cache.runtime.loader'): logging.getLogger(name).error('x')\n"
        "aot_cache.ready()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def guard() -> Guard:
    return Guard(Ledger(), Misses(), lambda *_: False, lambda _: False, lambda _: ("", lambda: None), lambda _: None)


def test_the_first_miss_of_each_name_after_seal_is_a_warning(guard: Guard, caplog: pytest.LogCaptureFixture) -> None:
    def miss(name: str, in_capture: bool = False) -> None:
        guard._note("kernel", name, in_capture, "compiled", "n is 17", lambda: None)

    with caplog.at_level(logging.INFO, logger="aot_cache"):
        miss("m:early")
        assert not caplog.records, "start-up may miss"
        guard._ledger.seal()
        for _ in range(3):
            miss("m:early")
            miss("m:other", in_capture=True)
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "kernel m:early missed after seal() (action: compiled): n is 17"),
        ("WARNING", "kernel m:other missed after seal(), inside a CUDA graph capture (action: compiled): n is 17"),
    ]
