"""Which graph or specialization serves which values of a dimension, as plain dicts: functions are rows, values are columns.

A column is a set of values, not only a range: if a kernel has one specialization for multiples of 16 and one for the rest,
these are two columns, although they interleave. Values that are served alike in every row share a column, so there are as few
columns as possible. Pure functions, which import neither torch nor Triton.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from aot_cache.artifact.plan import CasePlan
from aot_cache.artifact.reached import Reached
from aot_cache.recipes import dimensions
from aot_cache.store import Json

Facts = dict[str, Json]

MOST_JOINED = 8
"""Cases share a grid if it has at most this many columns, and a further case adds at most one. Keeps grids readable."""
MOST_VALUES = 1 << 17
"""Maximum size of a set of values. A case has at most 16384 points; a hostile file must not fill the memory."""
LONG = 30
"""Maximum length of a column's head; a longer one is shown as its count and its ends."""
FEW = 2
"""Maximum number of labels that a cell names; more are counted."""
ABSENT, NOTHING = "·", "–"
"""Signs for a value that a case does not declare, and for a declared value at which the function is not reached."""
GRAPH, KERNEL, CALL = "graph", "kernel", "call"


@dataclass(frozen=True)
class Served:
    """A unit and the points that it serves.

    Args:
        label: what a cell shows: `g1`, `k12`.
        kind: `graph`, `kernel` (a specialization of one), or `call` (of a compiled function, in a plan).
        name: `module:qualname` of the function or kernel.
        reached: case → boxes of points.
    """

    label: str
    kind: str
    name: str
    reached: Reached


@dataclass(frozen=True)
class Missed:
    """Calls that servers missed at a known point of a case."""

    kind: str
    name: str
    case: str
    point: Mapping[str, int]
    count: int


_Cell = frozenset[str]
_Row = tuple[str, str]


@dataclass
class _Slice:
    """One case along one of its dimensions.

    Args:
        rows: (kind, name) of each function or kernel that the case reaches.
        cells: value → for each row, the labels that serve it at some value of the other dimensions.
        missed: (row, value) → number of missed calls.
    """

    case: CasePlan
    rows: list[_Row]
    cells: dict[int, tuple[_Cell, ...]]
    missed: Counter[tuple[_Row, int]] = field(default_factory=Counter)

    def splits(self) -> bool:
        """Whether anything depends on the dimension."""
        return len(set(self.cells.values())) > 1 or bool(self.missed)

    def look(self, value: int) -> tuple[object, ...]:
        """The contents of the column for a value; values with equal contents share a column."""
        missed = tuple(bool(self.missed[row, value]) for row in self.rows) if self.missed else ()
        return (self.cells.get(value), missed)


def grids(cases: Sequence[CasePlan], units: Sequence[Served], missed: Iterable[Missed] = ()) -> list[Facts]:
    """The coverage of a bundle or a plan, with one grid for each dimension on which something depends.

    A case is in the grid of each dimension along which the units that serve it change, and at least in one grid.

    Returns:
        For each grid `dimension`, `columns` and `rows`. A column has `values` (text, see `dimensions`), `short`, `count` and
        `sampled` (true if declared values between these were not visited). A row has `case`, `kind` and `name`, and for each
        column: in `cells` the labels in the order of `units`, or None if the case does not declare the value; in `shown` the
        same for people; in `missed` the number of missed calls.

        Several labels mean that another dimension, or an autotuner, chooses between them. They are shown as `a ×24`: 24 labels;
        the letter distinguishes the sets of one row.

    Raises:
        DeclarationError: a set of values is not in the grammar, or has more than MOST_VALUES values.
    """
    order = {unit.label: number for number, unit in enumerate(units)}
    known: dict[str, frozenset[int]] = {}
    missed = list(missed)
    by_dim: dict[str, list[list[_Slice]]] = {}
    for case in cases:
        mine = [unit for unit in units if case.name in unit.reached]
        found = {dim: _slice(case, dim, mine, missed, known) for dim in case.dims}
        if mine and not found:
            found = {"": _undivided(case, mine)}
        chosen = [dim for dim, one in found.items() if one.splits()] or list(found)[:1]
        for dim in chosen:
            if found[dim].rows:
                _join(by_dim.setdefault(dim, []), found[dim])
    return [_grid(dim, group, order) for dim, groups in by_dim.items() for group in groups]


def _rows(units: Iterable[Served]) -> list[_Row]:
    return list(dict.fromkeys((unit.kind, unit.name) for unit in units))


def _undivided(case: CasePlan, units: Sequence[Served]) -> _Slice:
    """A case without dimensions: one column."""
    rows = _rows(units)
    cells = tuple(frozenset(u.label for u in units if (u.kind, u.name) == row) for row in rows)
    return _Slice(case, rows, {0: cells})


def _slice(
    case: CasePlan, dim: str, units: Sequence[Served], missed: Iterable[Missed], known: dict[str, frozenset[int]]
) -> _Slice:
    rows = _rows(units)
    # Most units share sets of values, so each set is expanded once, not once for each unit.
    labels: dict[str, dict[_Row, set[str]]] = {}
    for unit in units:
        for box in unit.reached[case.name]:
            labels.setdefault(box[dim], {}).setdefault((unit.kind, unit.name), set()).add(unit.label)
    inside: dict[int, list[str]] = {value: [] for value in _declared(case, dim)}
    for text in labels:
        for value in _values(text, known):
            inside.setdefault(value, []).append(text)
    of: dict[tuple[str, ...], tuple[_Cell, ...]] = {}
    cells = {}
    for value, texts in inside.items():
        same = tuple(texts)
        if same not in of:
            of[same] = tuple(frozenset().union(*(labels[t].get(row, set()) for t in same)) for row in rows)
        cells[value] = of[same]
    found = _Slice(case, rows, cells)
    for miss in missed:
        if miss.case == case.name and (miss.kind, miss.name) in rows and dim in miss.point:
            found.missed[(miss.kind, miss.name), miss.point[dim]] += miss.count
    return found


def _declared(case: CasePlan, dim: str) -> Iterable[int]:
    """The declared values, if all were visited, even those where nothing was launched; empty for a sampled dimension."""
    values = dimensions.parse_dimension(case.dims[dim]).values
    return () if dim in case.sampled or len(values) > MOST_VALUES else values


def _values(text: str, known: dict[str, frozenset[int]]) -> frozenset[int]:
    if text not in known:
        known[text] = frozenset(point[""] for point in dimensions.expand([{"": text}], MOST_VALUES))
    return known[text]


def _join(groups: list[list[_Slice]], one: _Slice) -> None:
    """Put a case into the first group whose columns remain few, else into a new group."""
    alone = len(_columns([one]))
    for group in groups:
        if len(_columns([*group, one])) <= min(MOST_JOINED, max(alone, len(_columns(group))) + 1):
            group.append(one)
            return
    groups.append([one])


def _columns(group: Sequence[_Slice]) -> list[list[int]]:
    """One list of ascending values for each column, sorted by their least value."""
    every = sorted({value for one in group for value in (*one.cells, *(at for _, at in one.missed))})
    columns: dict[tuple[object, ...], list[int]] = {}
    for value in every:
        columns.setdefault(tuple(one.look(value) for one in group), []).append(value)
    return list(columns.values())


def _grid(dim: str, group: Sequence[_Slice], order: Mapping[str, int]) -> Facts:
    columns = _columns(group)
    sampled = any(dim in one.case.sampled for one in group)
    rows = []
    for one in group:
        for n, row in enumerate(one.rows):
            found = [one.cells[values[0]][n] if values[0] in one.cells else None for values in columns]
            cells = [None if labels is None else sorted(labels, key=lambda label: order[label]) for labels in found]
            rows.append(
                {
                    "case": one.case.name,
                    "kind": row[0],
                    "name": row[1],
                    "cells": cells,
                    "shown": _shown(cells),
                    "missed": [sum(one.missed[row, value] for value in values) for values in columns],
                }
            )
    return {"dimension": dim, "columns": [_column(dim, values, sampled) for values in columns], "rows": rows}


def _shown(cells: Sequence[list[str] | None]) -> list[str]:
    letters: dict[tuple[str, ...], str] = {}
    for labels in cells:
        if labels is not None and len(labels) > FEW:
            letters.setdefault(tuple(labels), _letter(len(letters)))
    return [
        ABSENT
        if labels is None
        else NOTHING
        if not labels
        else f"{letters[tuple(labels)]} ×{len(labels)}"
        if tuple(labels) in letters
        else " ".join(labels)
        for labels in cells
    ]


def _letter(number: int) -> str:
    """a, b, … z, then #27, #28, …"""
    return chr(ord("a") + number) if number < 26 else f"#{number + 1}"


def _column(dim: str, values: Sequence[int], sampled: bool) -> Facts:
    if not dim:
        return {"values": "always", "short": "always", "count": 1, "sampled": False}
    text = dimensions.describe([{dim: value} for value in values], [dim])[0][dim]
    short = text if len(text) <= LONG else f"{len(values)} of {values[0]}..{values[-1]}"
    return {"values": text, "short": short, "count": len(values), "sampled": sampled}


def signs(found: Sequence[Facts]) -> Iterator[str]:
    """Explanations of the signs that occur in these grids, one line each. The counts come from `facts.ledger.annotate`."""
    rows = [row for grid in found for row in grid["rows"]]
    shown = {text for row in rows for text in row["shown"]}
    if any("×" in text for text in shown):
        yield "a ×3: three specializations or graphs, of which an autotuner or another dimension selects one; b: others"
    if ABSENT in shown:
        yield f"{ABSENT}: not declared"
    if NOTHING in shown:
        yield f"{NOTHING}: declared, but not reached there"
    if any(any(row["missed"]) for row in rows):
        yield "✗12: number of calls that missed there"
    if any(any(row.get("found", ())) for row in rows):
        yield "g1 3×: three first calls got this graph; later calls hit in Dynamo's cache and are not counted"
