"""A process with all that it starts, in a group of its own: nothing of it outlives the process that began it.

However that one ends, also by SIGKILL: a shell waits at the other end of a pipe, which the system closes then, and kills the
group. A compiler that a forked child has started would go on for half a minute, and write into a folder that is gone.
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
        command: what it runs.
        environment: its variables.

    Attributes:
        process: with pipes for stdin, stdout and stderr, as text.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        # A session of its own: Ctrl-C reaches this process alone, which ends the others.
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=dict(environment), text=True, start_new_session=True
        )
        self._guard = subprocess.Popen(
            [*_GUARD, str(self.process.pid)], stdin=pipe, stdout=nothing, stderr=nothing, start_new_session=True
        )

    def kill(self) -> None:
        """Kill what is left of the group; safe at any time, and twice."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses where only the dead are left
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what is left of the group, and wait for its leader."""
        self._guard.kill()  # first: it would kill a group of that number later
        self._guard.wait()
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        self.kill()
        self.process.wait()


class Terminated(KeyboardInterrupt):
    """The process was asked to end, by Ctrl-C or a signal to the same purpose: what it has begun is cleaned up."""


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Inside, SIGINT, SIGTERM and SIGHUP are raised as `Terminated`; the list then has the signal's number.

    In the main thread only, and where nobody else answers them. Libraries that parse command lines may catch what is raised,
    and return as if nothing had been.
    """
    came: list[int] = []
    before = {}

    def raise_it(number: int, _frame: object) -> None:
        came.append(number)
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
