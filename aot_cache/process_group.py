"""A child process in a process group of its own, which does not outlive its parent.

This holds however the parent ends, even by SIGKILL: a shell reads from a pipe of the parent, which the system then closes, and
kills the group. Otherwise a compiler that a forked child started could run on for half a minute and write into a deleted folder.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence

_GUARD = ["/bin/sh", "-c", 'read -r _; kill -s KILL -- "-$0"']


class ProcessGroup:
    """A process, and the group that it leads.

    Args:
        command: the command line.
        environment: its environment variables.
        folder: its current folder; None: this process's.

    Attributes:
        process: the leader, with text pipes for stdin, stdout and stderr.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: str | None = None) -> None:
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        # A new session, so that Ctrl-C reaches only this (the parent) process, which then ends the group.
        self.process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=dict(environment),
            cwd=folder,
            text=True,
            start_new_session=True,
        )
        self._guard = subprocess.Popen(
            [*_GUARD, str(self.process.pid)], stdin=pipe, stdout=nothing, stderr=nothing, start_new_session=True
        )

    def kill(self) -> None:
        """Kill what is left of the group. Safe at any time, and more than once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses if only zombies are left
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left of the group, and wait for its leader."""
        self._guard.kill()  # first, because it could otherwise kill a later group with the same id
        self._guard.wait()
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self.kill()
        self.process.wait()


class Terminated(KeyboardInterrupt):
    """The process was asked to end by Ctrl-C, SIGTERM or SIGHUP. It is an exception so that cleanup runs."""


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Raise SIGINT, SIGTERM and SIGHUP as `Terminated` inside the block. The yielded list then has the signal's number.

    Only the first one raises: a closed terminal or a stopped container may send several, and another exception would end the
    cleanup that the first has begun.

    This works in the main thread only, and for signals without another handler. The list is needed because libraries that parse
    command lines may catch the exception and return normally.
    """
    came: list[int] = []
    before = {}

    def raise_it(number: int, _frame: object) -> None:
        came.append(number)
        if len(came) == 1:
            raise Terminated(signal.Signals(number).name)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            with contextlib.suppress(ValueError):  # not the main thread
                before[number] = signal.signal(number, raise_it)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
