"""A coverage grid (see `coverage_grid`) as lines of text. Neighbouring columns with equal contents share a cell: `g1 │ g2`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from aot_cache.store import Json

Facts = Mapping[str, Json]

_CASE, _NAME = 16, 40
"""Maximum width of a case's name and of a function's name, in characters."""
_HEAD = ("case", "function or kernel")
_RANGES = 4
"""Maximum number of ranges in a line if the grid is too wide to be drawn."""


def lines(grid: Facts, width: int) -> Iterator[str]:
    """The grid, drawn with at most `width` characters a line. If it does not fit, each row with its ranges as text."""
    heads = [_head(column) for column in grid["columns"]]
    rows = [_cells(row) for row in grid["rows"]]
    cases = _fitting([row["case"] for row in grid["rows"]], _CASE)
    names = _fitting([row["name"] for row in grid["rows"]], _NAME)
    states = [_state(row) for row in grid["rows"]]
    widths = [max(map(len, [*head, *(row[n] for row in rows)])) for n, head in enumerate(heads)]
    left = [_longest([*cases, _HEAD[0]]), _longest([*names, _HEAD[1]])]
    if sum(left) + 4 + sum(widths) + 3 * len(widths) + 2 + _longest(states) > width:
        yield from _listed(grid, rows, states)
        return
    if grid["dimension"]:
        sampled = any(column["sampled"] for column in grid["columns"])
        yield f"{'':{sum(left) + 4}}{grid['dimension']}{', sampled' if sampled else ''}"
    for n in range(max(map(len, heads))):
        texts = [head[n] if n < len(head) else "" for head in heads]
        first = _HEAD if n == max(map(len, heads)) - 1 else ("", "")
        yield _line([f"{a:{b}}" for a, b in zip(first, left)], [f"{t:{w}}" for t, w in zip(texts, widths)], "")
    yield "─" * (sum(left) + 4 + sum(widths) + 3 * (len(widths) - 1) + (2 + _longest(states) if any(states) else 0))
    before = ""
    for row, case, name, state in zip(rows, cases, names, states):
        shown = "" if case == before else case
        before = case
        yield _line([f"{shown:{left[0]}}", f"{name:{left[1]}}"], _spans(row, widths), state)


def _head(column: Facts) -> list[str]:
    """The lines of a column's head."""
    plain, separator, taken = column["short"].partition(" except ")
    return [plain, f"except {taken}"] if separator else [plain]


def _cells(row: Facts) -> list[str]:
    """The text of each cell: the unit, the number of first calls that got it, and of missed calls."""
    found = row.get("found", [0] * len(row["shown"]))
    out = []
    for shown, given, missed in zip(row["shown"], found, row["missed"]):
        words = [shown, *([f"{given}×"] if given else []), *([f"✗{missed}"] if missed else [])]
        out.append(" ".join(words))
    return out


def _state(row: Facts) -> str:
    calls = row.get("calls", 0)
    return ", ".join(filter(None, (row.get("state", ""), f"missed {calls}" if calls else "")))


def _fitting(names: Sequence[str], most: int) -> list[str]:
    """Names cut to `most` characters. Their ends differ, so the module is removed first, then the beginning."""
    own = [name if len(name) <= most else name.rpartition(":")[2] for name in names]
    return [name if len(name) <= most else "…" + name[1 - most :] for name in own]


def _longest(texts: Sequence[str]) -> int:
    return max(map(len, texts), default=0)


def _spans(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    """One text for each run of equal cells, padded to the width of its columns."""
    out, at = [], 0
    for text, run in itertools.groupby(cells):
        count = len(list(run))
        out.append(f"{text:{sum(widths[at : at + count]) + 3 * (count - 1)}}")
        at += count
    return out


def _line(left: Sequence[str], cells: Sequence[str], state: str) -> str:
    return "  ".join([*left, " │ ".join(cells), *([state] if state else [])]).rstrip()


def _listed(grid: Facts, rows: Sequence[Sequence[str]], states: Sequence[str]) -> Iterator[str]:
    """The grid as a list: for each row the ranges of each cell text."""
    yield f"{grid['dimension']}:"
    heads = [column["short"] for column in grid["columns"]]
    for row, cells, state in zip(grid["rows"], rows, states):
        name = f"  {row['case']}  {row['name']}{f'  {state}' if state else ''}"
        if len(set(cells)) == 1:
            yield f"{name}  {cells[0]} at all"
            continue
        yield name
        for text in dict.fromkeys(cells):
            ranges = [head for head, cell in zip(heads, cells) if cell == text]
            more = len(ranges) - _RANGES
            said = [*ranges[: _RANGES - 1], "…", ranges[-1], f"({len(ranges)} ranges)"] if more > 0 else ranges
            yield f"    {text:<8} {'  '.join(said)}"
