"""Let the ranks of a job agree, on the CPU, before a step that all of them must do or none.

Every rank writes its value into the store of the job (the rendezvous store) and reads the values of all others. So no
communicator is needed, which all ranks would have to create together, and ranks that do not answer can be named. It is never
called inside a capture, and never uses the GPU. With one rank, or without a job, it does nothing and costs nothing.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from aot_cache.errors import RankDisagreement, one_line
from aot_cache.store import Json
from aot_cache.upstream.codec import torch_ranks

TIMEOUT = 60.0
"""Default seconds that a rank waits for the others."""
_SHORTEST, _LONGEST = 5e-5, 0.02
"""Seconds between two polls: short at first, when the others are about to answer; longer later, to spare the store."""
_SWEPT = 64
"""Texts that a rank leaves on the board before it removes them together: each removal is a request to the store."""
_lock = threading.Lock()
_known: dict[tuple[int, ...], Ranks] = {}


def of(group: object = None) -> Ranks:
    """The ranks of a process group; None is the whole job. Outside of a job: this process alone."""
    members = torch_ranks.ranks_of(group) if torch_ranks.up() else (0,)
    with _lock:
        found = _known.get(members)
        if found is None or not found.lives():
            found = _known[members] = Ranks(members)
        return found


def agree_all(ok: bool, what: str, *, why: str = "", group: object = None, timeout: float = TIMEOUT) -> None:
    """Return if every rank answers yes, else raise on all ranks.

    Args:
        ok: this rank's answer.
        what: the subject; the same text on every rank.
        why: this rank's reason if its answer is no.
        group: the process group whose ranks agree; None is the whole job.
        timeout: seconds to wait for the others.

    Raises:
        RankDisagreement: a rank answers no (raised on every rank), or does not answer in time (raised on those that wait).
    """
    said = of(group).gather({"ok": bool(ok), "why": why}, what, timeout)
    no = {rank: one["why"] or "no" for rank, one in said.items() if not one["ok"]}
    if no:
        raise RankDisagreement(f"every rank to agree on {what}", say(no), "see why on these ranks: the others agree")


def agree_same(value: str, what: str, *, group: object = None, timeout: float = TIMEOUT) -> None:
    """Return if every rank has the same value (a digest, a version), else raise on all ranks.

    Raises:
        RankDisagreement: two ranks differ (raised on every rank), or one does not answer in time (raised on those that wait).
    """
    said = of(group).gather(value, what, timeout)
    if len(set(said.values())) > 1:
        raise RankDisagreement(f"the same {what} on every rank", say(said))


class Ranks:
    """A set of ranks of a job that includes this process.

    Args:
        members: their rank numbers in the job.
    """

    def __init__(self, members: tuple[int, ...]) -> None:
        self.members = members
        self.own = torch_ranks.own_rank() if len(members) > 1 else members[0]
        self._board = torch_ranks.Board() if len(members) > 1 else None
        self._name = "aot-cache/" + ",".join(map(str, members))
        self._number = 0
        self._lock = threading.Lock()

    @property
    def leads(self) -> bool:
        """Whether this rank is the first one, which prints progress."""
        return self.own == self.members[0]

    def lives(self) -> bool:
        """Whether this object belongs to the process's current job."""
        return self._board is None or self._board.of is torch_ranks.store()

    def gather(self, value: Json, what: str, timeout: float = TIMEOUT) -> dict[int, Json]:
        """Rank → value, for every rank. All ranks call it, in the same order, outside of captures.

        Raises:
            RankDisagreement: a rank did not answer in time, gave up, or called with another `what`.
        """
        if self._board is None:
            return {self.own: value}
        with self._lock:
            number, self._number = self._number, self._number + 1
            try:
                self._board.put(self._key(number, self.own), json.dumps({"what": what, "value": value}))
                said = self._read(self._board, number, what, timeout)
                if number % _SWEPT == 0:  # a rank that has answered now has read all earlier texts
                    for old in range(max(0, number - _SWEPT), number):
                        self._board.remove(self._key(old, self.own))
            except RuntimeError as error:
                raise RankDisagreement(
                    f"cannot agree on {what} with {_list(self.members)}: their store is gone: {one_line(error)}"
                ) from error
        elsewhere = {rank: f"at {one['what']!r}" for rank, one in said.items() if one["what"] != what}
        if elsewhere:
            raise RankDisagreement(
                f"every rank to be at {what!r}", say(elsewhere), "call in the same order on every rank"
            )
        return {rank: one["value"] for rank, one in said.items()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """If this rank raises inside, the others raise as soon as they wait for it, instead of after their timeout."""
        try:
            yield
        except BaseException as error:
            if self._board is not None and not isinstance(error, RankDisagreement):
                self._give_up(self._board, one_line(error))
            raise

    def _give_up(self, board: torch_ranks.Board, why: str) -> None:
        try:
            board.put(self._gone(self.own), why)
        except RuntimeError:
            return  # without the store the other ranks cannot be told

    def _read(self, board: torch_ranks.Board, number: int, what: str, timeout: float) -> dict[int, Mapping[str, Json]]:
        keys = [self._key(number, rank) for rank in self.members]
        deadline, pause = time.monotonic() + timeout, _SHORTEST
        while not board.has(*keys):
            gone = [rank for rank in self.members if board.has(self._gone(rank))] if pause > _LONGEST else []
            if gone:
                told = board.get([self._gone(rank) for rank in gone])
                raise RankDisagreement(f"a rank gave up before {what}: {say(dict(zip(gone, told)))}")
            if time.monotonic() > deadline:
                silent = [rank for rank, key in zip(self.members, keys) if not board.has(key)]
                raise RankDisagreement(
                    f"no answer to {what} from {_list(silent)} within {timeout:g} s",
                    hint="see their logs: they died, hang, or took a different code path",
                )
            time.sleep(min(pause, _LONGEST))
            pause *= 1.5
        return {rank: json.loads(text) for rank, text in zip(self.members, board.get(keys))}

    def _key(self, number: int, rank: int) -> str:
        return f"{self._name}/{number}/{rank}"

    def _gone(self, rank: int) -> str:
        return f"{self._name}/gone/{rank}"


def _list(ranks: tuple[int, ...] | list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def say(values: Mapping[int, Json]) -> str:
    """`ranks 0, 2: abc; rank 1: def`."""
    by: dict[str, list[int]] = {}
    for rank, value in values.items():
        by.setdefault(str(value), []).append(rank)
    return "; ".join(f"{_list(ranks)}: {value}" for value, ranks in by.items())
