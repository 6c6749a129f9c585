"""Agreement between the ranks of a job, on the CPU, before anything that all of them must do or none.

Every rank puts its value on a board (the store in which the ranks found each other) and reads those of all others. So it
needs no communicator, which would itself have to be made by all ranks together, and it names the ranks that do not answer.
Never inside a capture, never through the GPU. One rank, or no job: nothing is asked and nothing is paid.
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
"""Seconds that a rank waits for the others unless told otherwise."""
_SHORTEST, _LONGEST = 5e-5, 0.02
"""Seconds between two looks: short while the others are about to come, and not a burden on the store later."""
_SWEPT = 64
"""Texts that a rank leaves on the board before it takes them away: each time it asks the store."""
_lock = threading.Lock()
_known: dict[tuple[int, ...], Ranks] = {}


def of(group: object = None) -> Ranks:
    """The ranks of a process group, or of the whole job for None; outside of a job, this process alone."""
    members = torch_ranks.ranks_of(group) if torch_ranks.up() else (0,)
    with _lock:
        found = _known.get(members)
        if found is None or not found.lives():
            found = _known[members] = Ranks(members)
        return found


def agree_all(ok: bool, what: str, *, why: str = "", group: object = None, timeout: float = TIMEOUT) -> None:
    """Go on when every rank says yes.

    Args:
        ok: this rank's answer.
        what: what is agreed on; the same text on every rank.
        why: said of this rank when its answer is no.
        timeout: seconds to wait for the others.

    Raises:
        RankDisagreement: on every rank, when one says no; and on those that wait, when one does not answer in time.
    """
    said = of(group).gather({"ok": bool(ok), "why": why}, what, timeout)
    no = {rank: one["why"] or "no" for rank, one in said.items() if not one["ok"]}
    if no:
        raise RankDisagreement(f"every rank to agree on {what}", say(no), "see why on these ranks: the others agree")


def agree_same(value: str, what: str, *, group: object = None, timeout: float = TIMEOUT) -> None:
    """Go on when every rank has the same value (a digest, a version).

    Raises:
        RankDisagreement: on every rank, when two differ; and on those that wait, when one does not answer in time.
    """
    said = of(group).gather(value, what, timeout)
    if len(set(said.values())) > 1:
        raise RankDisagreement(f"the same {what} on every rank", say(said))


class Ranks:
    """Some ranks of a job, of which this process is one.

    Args:
        members: their numbers in the job.
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
        """Whether this rank is the one that talks to people."""
        return self.own == self.members[0]

    def lives(self) -> bool:
        """Whether this is of the job that the process belongs to now."""
        return self._board is None or self._board.of is torch_ranks.store()

    def gather(self, value: Json, what: str, timeout: float = TIMEOUT) -> dict[int, Json]:
        """Every rank's value, by rank. All of them call it, in the same order, outside of captures.

        Raises:
            RankDisagreement: a rank did not answer in time, gave up, or is at another place of the program.
        """
        if self._board is None:
            return {self.own: value}
        with self._lock:
            number, self._number = self._number, self._number + 1
            try:
                self._board.put(self._key(number, self.own), json.dumps({"what": what, "value": value}))
                said = self._read(self._board, number, what, timeout)
                if number % _SWEPT == 0:  # whoever has spoken now has read all of what was said before
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
        """Where this rank raises inside, the others raise as soon as they wait for it, and not after their timeout."""
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
            return  # nobody can be told

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
