"""The misses file: one JSON line per miss, written by all processes of a server; here it is read and counted.

A process writes a miss again when its count, `seen`, reaches 1, 2, 4, 8 … The file is trusted like a plan file: a build from
it runs code that it names, because the values in a kernel's unit are decoded by importing what they name. This module imports
nothing; it checks the shape of every line, and a wrong line is an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aot_cache.artifact.plan import Tuning, Unit
from aot_cache.errors import DeclarationError
from aot_cache.recipes.dimensions import LARGEST
from aot_cache.store import Json, json_in

SCHEMA = 1
MARK = "aot-cache miss"
GRAPH, KERNEL, TUNING, LOAD = KINDS = ("graph", "kernel", "tuning", "load")
_BEGINNING = b'{"' + MARK.encode() + b'":'
"""How every line starts, even one that its process did not finish."""

_COMMON = {
    "kind": str,
    "name": str,
    "in_capture": bool,
    "sealed": bool,
    "action": str,
    "why": str,
    "pid": int,
    "seen": int,
}
_UNIT = {"kernel": str, "source": str, "specialization": list, "options": dict, "overrides": dict}
_TUNING = {"kernel": str, "tuner": int, "key": list, "candidates": list}
_OWN: dict[str, dict[str, type]] = {
    GRAPH: {
        "place": str,
        "wrapping": dict,
        "mode": str,
        "structure": str,
        "sizes": dict,
        "points": dict,
        "declare": str,
    },
    KERNEL: {"unit": dict, "nearest": list},
    TUNING: {"tuning": dict, "units": list},
    LOAD: {},
}
_IDENTITY = {GRAPH: ("wrapping", "mode", "structure", "sizes"), KERNEL: ("unit",), TUNING: ("tuning",), LOAD: ()}


@dataclass
class Miss:
    """One distinct miss, counted over all processes.

    Args:
        kind: `graph`, `kernel`, `tuning` or `load`.
        name: `module:qualname` of the function or kernel.
        count: how often it was missed.
        in_capture, sealed: whether it was ever missed inside a capture, or after the seal.
        actions: the distinct actions that were taken instead.
        why: the distinct reasons.
        facts: the fields that belong to the kind, from the last line.
    """

    kind: str
    name: str
    count: int = 0
    in_capture: bool = False
    sealed: bool = False
    actions: list[str] = field(default_factory=list)
    why: list[str] = field(default_factory=list)
    facts: dict[str, Json] = field(default_factory=dict)

    def units(self) -> list[Unit]:
        """The missing specializations. Their `via` refers to this miss's own tuning as number 0."""
        return [_unit(data) for data in ([self.facts["unit"]] if self.kind == KERNEL else self.facts.get("units", []))]

    def tuning(self) -> Tuning | None:
        """The choice that a Triton autotuner had to make, or None; choices of Inductor's kernels belong to their graph."""
        return Tuning(**{name: self.facts["tuning"][name] for name in _TUNING}) if "tuning" in self.facts else None


@dataclass(frozen=True)
class Misses:
    """Contents of misses files: each distinct miss, in a deterministic order, and the number of cut-off lines."""

    found: list[Miss]
    cut_off: int


def identity(line: Mapping[str, Json]) -> str:
    """Key of a miss: covers what was asked for, but not who asked, when, how often, or what was done."""
    own = {name: line[name] for name in _IDENTITY[line["kind"]] if name in line}
    # The order of options is part of Triton's key, so nothing is sorted here.
    return json.dumps([line["kind"], line["name"], list(own.items())])


def is_misses(path: Path, what: str = "file") -> bool:
    """Whether a file is a misses file, and not a plan, `stats()` or another document, by its first bytes.

    Raises:
        DeclarationError: it cannot be read; `what` is what it was given as.
    """
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip().startswith(_BEGINNING)
    except OSError as error:
        raise DeclarationError(
            f"cannot read {what} {path}: {error.strerror or error}", hint="correct the path"
        ) from error


def read(paths: Sequence[Path]) -> Misses:
    """Read the misses in one or more files.

    A line that its process did not finish, because it was killed, is left out and counted in `cut_off`.

    Raises:
        DeclarationError: a file cannot be read, or a line in it is not a miss.
    """
    found: dict[str, Miss] = {}
    seen: dict[tuple[Path, str], int] = {}
    cut_off = 0
    for path in paths:
        for line in _lines(path):
            if line is None:
                cut_off += 1
                continue
            same = identity(line)
            miss = found.setdefault(same, Miss(line["kind"], line["name"]))
            # A process has a counter of its own for each different action. Process ids repeat, mostly in containers: a count
            # that starts again is another process.
            counter = json.dumps({name: value for name, value in line.items() if name not in ("seen", "why")})
            before = seen.get((path, counter), 0)
            miss.count += line["seen"] - (before if line["seen"] > before else 0)
            seen[path, counter] = line["seen"]
            miss.in_capture |= line["in_capture"]
            miss.sealed |= line["sealed"]
            _once(miss.actions, line["action"])
            _once(miss.why, line["why"])
            miss.facts = {name: line[name] for name in _OWN[miss.kind] if name in line}
    return Misses([found[same] for same in sorted(found)], cut_off)


def _once(texts: list[str], text: str) -> None:
    if text and text not in texts:
        texts.append(text)


def _lines(path: Path) -> Iterator[dict[str, Json] | None]:
    """Each line of a file, checked; None for one that was cut off."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _line(text, f"{path}, line {number}")
    except OSError as error:
        raise DeclarationError(
            f"cannot read misses file {path}: {error.strerror or error}", hint="correct the path"
        ) from error


def _line(text: bytes, where: str) -> dict[str, Json] | None:
    try:
        data = json_in(text)
    except (ValueError, RecursionError) as error:
        whole = text.strip()
        if _BEGINNING in whole or _BEGINNING.startswith(whole):  # another process may have continued in the same line
            return None
        raise _wrong(where, "it is not JSON") from error
    if not isinstance(data, dict) or MARK not in data:
        raise _wrong(where, "it is JSON of another kind")
    if data[MARK] != SCHEMA:
        raise DeclarationError(
            f"misses of schema {SCHEMA}", f"schema {data[MARK]!r} in {where}", "use one version of aot-cache"
        )
    why = shape(data, {"kind": str}) or ("" if data["kind"] in KINDS else f"kind {data['kind']!r}")
    why = why or shape(data, {**_COMMON, **({} if _of_inductor(data) else _OWN[data["kind"]])}) or _inside(data)
    if why:
        raise _wrong(where, why)
    return data


def _of_inductor(data: Mapping[str, Json]) -> bool:
    """Whether a line is a choice between the configs of an Inductor kernel; it has no further fields."""
    return data["kind"] == TUNING and "tuning" not in data and "units" not in data


def _wrong(where: str, found: str) -> DeclarationError:
    return DeclarationError(f"{where}, is not a miss: {found}", hint="give the file that the server wrote")


def shape(data: Json, wanted: Mapping[str, type]) -> str:
    """What in `data` is missing or of another type than in `wanted`, as text; empty if nothing is."""
    if not isinstance(data, dict):
        return f"{type(data).__name__} where {', '.join(wanted)} belong"
    for name, kind in wanted.items():
        if type(data.get(name)) is not kind:
            return (
                f"{name} is {type(data[name]).__name__}, not {kind.__name__}" if name in data else f"it has no {name}"
            )
    return ""


def _inside(data: Mapping[str, Json]) -> str:
    """What is wrong below the first level, as text; empty if nothing is."""
    if not 0 < data["seen"] <= LARGEST:
        return f"seen is {data['seen']}"
    if data["kind"] == GRAPH:
        sizes = all(isinstance(found, list) and all(map(_is_size, found)) for found in data["sizes"].values())
        points = all(
            isinstance(point, dict) and all(_is_size(value) and value >= 0 for value in point.values())
            for point in data["points"].values()
        )
        return "" if sizes and points else f"{'points' if sizes else 'sizes'} hold what is no size"
    if data["kind"] == KERNEL:
        texts = all(isinstance(text, str) for text in data["nearest"])
        return shape(data["unit"], _UNIT) or ("" if texts else "nearest holds what is no text")
    if data["kind"] == TUNING and not _of_inductor(data):
        return _inside_tuning(data["tuning"], data["units"])
    return ""


def _inside_tuning(tuning: Json, units: Iterable[Json]) -> str:
    why = shape(tuning, _TUNING)
    if why or not all(isinstance(candidate, dict) for candidate in tuning["candidates"]):
        return why or "a candidate is no mapping"
    for unit in units:
        why = shape(unit, {**_UNIT, "via": list})
        if why:
            return why
        if not all(_is_candidate(pair, len(tuning["candidates"])) for pair in unit["via"]):
            return f"a unit comes by {unit['via']!r}, which is none of the candidates"
    return ""


def _is_candidate(pair: Json, candidates: int) -> bool:
    return (
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(number) is int for number in pair)
        and pair[0] == 0
        and 0 <= pair[1] < candidates
    )


def _is_size(value: Json) -> bool:
    return type(value) is int and -LARGEST <= value <= LARGEST


def _unit(data: Mapping[str, Json]) -> Unit:
    return Unit(**{name: data[name] for name in _UNIT}, via=[list(pair) for pair in data.get("via", [])])
