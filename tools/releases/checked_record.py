"""What `tools/check_torch` found: its record, the table that aot-cache reads of it, and what the documentation says of it.

A record holds a run for each torch × triton × transformers; a run that is made again takes the place of the one before.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checked_environments import ROOT
from checked_parts import CONTRACTS, PARTS, RECIPES

from aot_cache import tested

Json = Any
RECORD = ROOT / "artifacts" / "measurements" / "check_torch.json"
PAGE = ROOT / "docs" / "support.md"
UPSTREAM = ROOT / "aot_cache" / "upstream"
NO_ROOMS = ("__init__", "versions")
"""Files of upstream/ that rely on nothing of torch or Triton."""
_ENGINES = ("vllm_", "sglang_", "tensorrt_llm_", "flash_attention")
"""What modules begin with that rely on an engine or its kernels: `tools/check_vllm` holds vLLM's, and tests of their own the
others'."""
_BEGIN, _END = "<!-- written by tools/check_torch --page -->\n", "<!-- until here -->\n"


# --- the record -------------------------------------------------------------------------------------------------------


def read(path: Path = RECORD) -> list[dict[str, Json]]:
    """The runs of a record, the oldest releases first; none where there is no record."""
    runs: list[dict[str, Json]] = json.loads(path.read_text())["runs"] if path.exists() else []
    return sorted(runs, key=_key)


def merged(runs: Sequence[dict[str, Json]], new: dict[str, Json]) -> list[dict[str, Json]]:
    """The runs with `new` among them. Its parts take the place of those that ran before under the same releases, whatever their
    patch release; parts that it has not run stay with the patch release under which they ran."""
    parts, others = dict(new["parts"]), []
    for run in runs:
        if any(tested.minor(run[name]) != tested.minor(new[name]) for name in _RELEASES):
            others.append(run)
            continue
        left = {part: found for part, found in run["parts"].items() if part not in new["parts"]}
        if all(run[name] == new[name] for name in _RELEASES):
            parts = {**left, **parts}
        elif left:
            others.append({**run, "parts": left})
    return sorted([*others, {**new, "parts": parts}], key=_key)


def write(runs: Iterable[dict[str, Json]], path: Path = RECORD) -> None:
    path.write_text(json.dumps({"tool": "check_torch", "runs": list(runs)}, indent=1, ensure_ascii=False) + "\n")


_RELEASES = ("torch", "triton", "transformers")


def _key(run: Mapping[str, str]) -> list[tuple[int, ...]]:
    return [_number(run[name]) for name in _RELEASES]


def _number(version: str) -> tuple[int, ...]:
    """`2.12.1+cu130` → (2, 12, 1)."""
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


# --- the table --------------------------------------------------------------------------------------------------------


def table(runs: Sequence[dict[str, Json]]) -> dict[str, Json]:
    """What `aot_cache/tested.json` holds: see `aot_cache.tested`."""
    pairs = [same for same in _by_pair(runs) if CONTRACTS in _parts(same)]
    served = serving()
    return {
        "pairs": [_pair(same) for same in pairs],
        "modules": {name: _module(name, name in served, pairs) for name in modules()},
    }


def modules() -> list[str]:
    """The modules of upstream/ that rely on something."""
    found = (path.stem for path in UPSTREAM.rglob("*.py"))
    return sorted(name for name in found if name not in NO_ROOMS and not name.startswith(_ENGINES))


def path_of(module: str) -> Path:
    """The file of a module of upstream/; a name stands in one of its folders only."""
    (found,) = UPSTREAM.rglob(f"{module}.py")
    return found


def _by_pair(runs: Sequence[dict[str, Json]]) -> list[list[dict[str, Json]]]:
    pairs: dict[tuple[str, str], list[dict[str, Json]]] = {}
    for run in runs:
        pairs.setdefault((tested.minor(run["torch"]), tested.minor(run["triton"])), []).append(run)
    return list(pairs.values())


def _parts(runs: Sequence[dict[str, Json]]) -> set[str]:
    return {part for run in runs for part in run["parts"]}


def _pair(runs: Sequence[dict[str, Json]]) -> dict[str, Json]:
    """A pair of releases: `runs` differ in transformers alone."""
    recipes = [run for run in runs if RECIPES in run["parts"]]
    others = {part for run in runs for part, found in run["parts"].items() if found["failed"]} - {CONTRACTS, RECIPES}
    return {
        "torch": tested.minor(runs[0]["torch"]),
        "triton": tested.minor(runs[0]["triton"]),
        "transformers": [tested.minor(run["transformers"]) for run in recipes if not run["parts"][RECIPES]["failed"]],
        "broken": [name for name in modules() if _counts(name, runs)["failed"]],
        "failed": sorted(others) + [f"{part} {tested.NOT_RUN}" for part in PARTS if part not in _parts(runs)],
    }


def _counts(module: str, runs: Iterable[dict[str, Json]]) -> dict[str, int]:
    rows = [part["modules"].get(module, {}) for run in runs for part in run["parts"].values()]
    return {what: sum(row.get(what, 0) for row in rows) for what in ("passed", "failed")}


def _module(name: str, serves: bool, pairs: Sequence[Sequence[dict[str, Json]]]) -> dict[str, Json]:
    holds = [runs[0] for runs in pairs if _counts(name, runs)["passed"] and not _counts(name, runs)["failed"]]
    return {
        "relies_on": relies_on(name),
        "serves": serves,
        **{what: sorted({tested.minor(run[what]) for run in holds}, key=_number) for what in ("torch", "triton")},
    }


def relies_on(module: str) -> str:
    """What stands under "Upstream" in a module's docstring; empty where nothing does."""
    text = ast.get_docstring(ast.parse(path_of(module).read_text())) or ""
    found = re.search(r"^Upstream: (.*?)(?:\n\n|\Z)", text, re.S | re.M)
    return " ".join(found[1].split()) if found else ""


def serving() -> set[str]:
    """The modules of upstream/ that a serving process imports: those of runtime/, and what they import."""
    found: set[str] = set()
    todo = list((ROOT / "aot_cache" / "runtime").rglob("*.py"))
    while todo:
        new = _imported(todo.pop()) - found
        found |= new
        todo += [path_of(name) for name in new]
    return found


def _imported(path: Path) -> set[str]:
    """The modules of upstream/ that a file imports, anywhere in it."""
    known, out = {*modules(), *NO_ROOMS}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("aot_cache.upstream"):
            last = str(node.module).rpartition(".")[2]
            out |= {last} if last in known else {alias.name for alias in node.names}
    return out


# --- what is printed, and the page ------------------------------------------------------------------------------------


def overview(runs: Sequence[dict[str, Json]]) -> list[list[str]]:
    """A row of cells for each run: its releases, and for each part how many tests passed, and how many did not."""
    head = ["torch", "triton", "transformers", "Python", *PARTS]
    return [head, *([*_releases(run), *(_cell(run["parts"].get(part)) for part in PARTS)] for run in runs)]


def _releases(run: Mapping[str, str]) -> list[str]:
    return [run["torch"].partition("+")[0], run["triton"], run["transformers"], run["python"].rpartition(".")[0]]


def _cell(found: Mapping[str, Json] | None) -> str:
    if found is None:
        return ""
    return f"{found['passed']}, {len(found['failed'])} failed" if found["failed"] else str(found["passed"])


def moved(runs: Iterable[dict[str, Json]]) -> list[str]:
    """A line for each test that failed."""
    return [
        f"{' × '.join(_releases(run)[:3])}: {test}: {why}"
        for run in runs
        for part in run["parts"].values()
        for test, why in part["failed"].items()
    ]


def page_block(runs: Sequence[dict[str, Json]]) -> str:
    """The page's table of what was tested, between its two comments."""
    found = tested.read(json.dumps(table(runs)))
    good = [pair for pair in found.pairs if not (pair.broken or pair.failed)]
    bad = [f"{p.text} ({', '.join((*p.broken, *p.failed))})" for p in found.pairs if p not in good and not _is_unrun(p)]
    unrun = [f"{pair.text} (contracts pass)" for pair in found.pairs if _is_unrun(pair)]
    oldest = [min((getattr(p, what) for p in found.pairs), key=_number, default="none") for what in ("torch", "triton")]
    releases = found.transformers()
    failing = sorted({_releases(run)[2] for run in runs if run["parts"].get(RECIPES, {}).get("failed")})
    rows = [
        ["", "tested", "expected", "not"],
        [
            "torch × triton, without a GPU",
            ", ".join(pair.text for pair in good),
            ", ".join([*unrun, "any other: a line of warning, under `strict` an error"]),
            "; ".join([f"torch < {oldest[0]}, triton < {oldest[1]}: refused", *bad]),
        ],
        [
            "transformers, for the shipped recipes",
            ", ".join(releases),
            "newer: a line of warning from `build`",
            "; ".join(
                [f"< {releases[0]}" if releases else "", *(f"{release} (tests fail)" for release in failing)]
            ).strip("; "),
        ],
    ]
    passed = [["tests passed under torch", "triton", "transformers", "Python", *PARTS], *overview(runs)[1:]]
    return f"{_BEGIN}{_markdown(rows)}\n{_markdown(passed)}{_END}"


def _is_unrun(pair: tested.Pair) -> bool:
    """Whether nothing failed, and something that counts was not run."""
    return bool(pair.failed) and not pair.broken and all(part.endswith(tested.NOT_RUN) for part in pair.failed)


def _markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]) + "\n"


def in_page(text: str) -> str:
    """The block that stands in the page's text now."""
    found = re.search(re.escape(_BEGIN) + ".*?" + re.escape(_END), text, re.S)
    return found[0] if found else ""


def with_block(text: str, block: str) -> str:
    """The page's text with `block` in place of the one that is there."""
    old = in_page(text)
    if not old:
        raise SystemExit(f"check_torch: {PAGE} has no {_BEGIN.strip()} to write behind")
    return text.replace(old, block)
