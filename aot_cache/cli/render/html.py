"""`inspect --html`: the facts of a bundle or a plan as one self-contained page.

A bundle may be of unknown origin. So each of its texts goes through `_e`, or through JSON that cannot close a tag and that the
script inserts as text. The page's content security policy allows only the script with the given hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from aot_cache.cli.facts.build import SERVER, dockerfile
from aot_cache.cli.facts.bundle import reached_text
from aot_cache.cli.facts.coverage_grid import signs
from aot_cache.cli.render.html_style import SCRIPT, STYLE
from aot_cache.cli.render.terminal import clean, size
from aot_cache.store import Json

Facts = Mapping[str, Json]
_TINTS = 6
_COLOURS = 7
_LONG = 400
"""Maximum length of a shown guard; `--points` shows them in full."""


def page(facts: Facts) -> str:
    """The whole page.

    Args:
        facts: from `facts.bundle.bundle` or `facts.bundle.plan`, with `points=True`.
    """
    title = f"{facts['recipe']} for {facts.get('device', facts['target'])}"
    policy = f"default-src 'none'; style-src '{_hash(STYLE)}'; script-src '{_hash(SCRIPT)}'; base-uri 'none'"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_e(title)}</title><style>{STYLE}</style></head><body><main>",
        *_head(facts),
        *_coverage(facts),
        *(_ledger(facts["ledger"]) if "ledger" in facts else ()),
        *_graphs(facts),
        *_kernels(facts),
        *(_of_bundle(facts) if facts["kind"] == "bundle" else ()),
        f"<footer>Written by aot-cache inspect from {_e(facts['path'])}</footer></main>",
        '<aside id="unit" aria-live="polite" hidden><button class="close" aria-label="close">×</button><div></div></aside>',
        f'<script type="application/json" id="units">{_data(_units(facts))}</script>',
        f"<script>{SCRIPT}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _e(text: object) -> str:
    """A text of the bundle, escaped for HTML content and attribute values."""
    return escape(clean(text))


def _data(value: Json) -> str:
    """JSON for a script element, without `<`, so that no text can close the element or begin a comment."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- what it is -------------------------------------------------------------------------------------------------------


def _head(facts: Facts) -> Iterator[str]:
    device = f"{facts['device']} ({facts['target']})" if "device" in facts else facts["target"]
    yield f'<header><span class="kind">aot-cache {_e(facts["kind"])}</span><h1>{_e(facts["recipe"])}</h1>'
    found = facts.get("graph_key", {})
    versions = {"torch": found.get("torch"), "Triton": facts["triton"], "Python": found.get("python")}
    words = [facts["origin"], *(f"{name} {version}" for name, version in versions.items() if version)]
    words += [f"{facts['ranks']} ranks"] if facts["ranks"] > 1 else []
    yield f"<p>for <b>{_e(device)}</b> <span class='soft'>· {_e(' · '.join(words))}</span></p>"
    if "digest" in facts:
        yield f'<p class="mono soft" id="digest">sha256 {_e(facts["digest"])}</p><p>'
        whole = "complete" if facts["complete"] else f"incomplete: {len(facts['failed'])} failed"
        yield f'<span class="pill {"good" if facts["complete"] else "bad"}">{_e(whole)}</span>'
    else:
        yield "<p>"
    yield f'<span class="pill">{_e(facts["coverage"])}</span>'
    if facts["untuned"]:
        yield f'<span class="pill">{_e(facts["untuned"])} choices not tuned</span>'
    yield "</p></header>"
    tiles = {
        "size": size(facts.get("bytes")),
        "graphs" if "graphs" in facts else "compiled calls": len(facts["graphs" if "graphs" in facts else "calls"]),
        "kernels": facts["kernel_count"],
        "specializations": facts["units"],
        "declared points": facts["points"],
        "cases": len(facts["cases"]),
    }
    shown = [f"<div><b>{_e(value)}</b><span>{name}</span></div>" for name, value in tiles.items() if value != "-"]
    yield f'<div class="tiles">{"".join(shown)}</div>'
    for failure in facts.get("failed", ()):
        yield f'<p class="bad">{_e(failure["kernel"])}: {_e(failure["error"])}</p>'


# --- coverage ---------------------------------------------------------------------------------------------------------


def _coverage(facts: Facts) -> Iterator[str]:
    yield "<h2>Coverage <small>which graph or specialization serves which sizes; select a cell to see its parts</small></h2>"
    if not facts["grids"]:
        yield '<p class="soft">Recorded: only what ran is known, not the ranges.</p>'
    for grid in facts["grids"]:
        yield from _grid(grid)
    yield "".join(f'<p class="soft">{_e(text)}</p>' for text in signs(facts["grids"]))
    cases = facts["cases"]
    columns = {
        "case": [_td(case["name"]) for case in cases],
        "what it is": [_td(case["doc"]) for case in cases if any(c["doc"] for c in cases)],
        "declared": [
            _td(" × ".join(f"{d} {values}" for d, values in case["dims"].items()) or "always") for case in cases
        ],
        "added from misses": [_td("; ".join(case["missed"])) for case in cases if any(c["missed"] for c in cases)],
        "points#": [
            _td(c["points"] if c["points"] == c["total"] else f"{c['points']} of {c['total']}", "n") for c in cases
        ],
        "mode": [_td(case["mode"]) for case in cases],
    }
    shown = {name: cells for name, cells in columns.items() if cells}
    if shown:
        yield _table(list(shown), list(zip(*shown.values())))


def _grid(grid: Facts) -> Iterator[str]:
    columns = grid["columns"]
    state = any(row.get("state") or row.get("calls") for row in grid["rows"])
    sampled = ", sampled" if any(column["sampled"] for column in columns) else ""
    yield f'<div class="card"><table class="grid" data-dimension="{_e(grid["dimension"])}"><thead>'
    left = '<th rowspan="2" class="case">case</th><th rowspan="2" class="function">function or kernel</th>'
    right = '<th rowspan="2">in the process</th>' if state else ""
    dim = f'<th class="dim" colspan="{len(columns)}">{_e(grid["dimension"] or "any call")}{sampled}</th>'
    yield f"<tr>{left}{dim}{right}</tr><tr>"
    for column in columns:
        about = f"{column['count']} values: {column['values']}"
        yield f'<th class="range" title="{_e(about)}">{_e(column["short"])}</th>'
    yield "</tr></thead>"
    for case, group in groupby(grid["rows"], key=lambda row: row["case"]):
        rows = list(group)
        yield "<tbody>"
        for number, row in enumerate(rows):
            # On a narrow page this row shows the names above the cells, which then begin at the left edge.
            label = f"<b>{_e(case)}</b> {_name(row['name'])}" if not number else _name(row["name"])
            yield f'<tr class="label"><th colspan="{len(columns) + state}"><span>{label}</span></th></tr>'
            first = f'<th scope="row" class="case" rowspan="{len(rows)}">{_e(case)}</th>' if not number else ""
            yield f'<tr>{first}<th scope="row">{_name(row["name"])}</th>{"".join(_cells(row))}'
            yield f'<td class="state">{_e(_state(row))}</td></tr>' if state else "</tr>"
        yield "</tbody>"
    yield "</table></div>"


def _name(name: str) -> str:
    module, _, own = name.rpartition(":")
    return f'<span class="module">{_e(module)}:</span>{_e(own)}' if module else _e(own)


def _cells(row: Facts) -> Iterator[str]:
    """The cells of a row; neighbours with equal contents are merged."""
    counts = row.get("found", [0] * len(row["cells"]))
    looks = list(zip(row["shown"], counts, row["missed"]))
    tints: dict[str, int] = {}
    at = 0
    for (shown, given, missed), run in groupby(looks):
        width = len(list(run))
        labels = row["cells"][at]
        at += width
        more = f'<span class="given">{given}×</span>' if given else ""
        more += f'<span class="missed">✗{missed}</span>' if missed else ""
        if labels:
            tint = tints.setdefault(shown, len(tints)) % _TINTS
            units = _e(" ".join(labels))
            text = f'<button class="cell t{tint}" data-units="{units}" aria-expanded="false">{_e(shown)}{more}</button>'
        else:
            why = "not declared" if labels is None else "declared, but not reached there"
            text = f'<span class="none" title="{why}">{_e(shown)}{more}</span>'
        yield f'<td colspan="{width}">{text}</td>'


def _state(row: Facts) -> str:
    missed = f"missed {row['calls']}" if row.get("calls") else ""
    return ", ".join(filter(None, (row.get("state", ""), missed)))


# --- tables -----------------------------------------------------------------------------------------------------------


def _td(text: object, name: str = "wrap") -> str:
    return f'<td class="{name}">{_e(text)}</td>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table. Columns whose name ends with # contain numbers."""
    heads = "".join(f"<th{' class=n' if name.endswith('#') else ''}>{name.rstrip('#')}</th>" for name in head)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="card"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _of_bundle(facts: Facts) -> Iterator[str]:
    yield '<div class="two"><section>'
    yield from _sizes(facts)
    yield "</section><section>"
    yield from _use(facts)
    yield "</section></div>"
    yield from _built_for(facts)


def _sizes(facts: Facts) -> Iterator[str]:
    whole = max(1, facts["bytes"])
    at, bars, rows = 0.0, [], []
    for number, row in enumerate(facts["sizes"]):
        share, colour = 100 * row["bytes"] / whole, number % _COLOURS
        bars.append(f'<rect class="s{colour}" x="{at:.3f}" width="{share:.3f}" height="12"/>')
        at += share
        dot = f'<td><span class="dot s{colour}"></span>{_e(row["kind"])}</td>'
        cells = (row["objects"] or "", size(row["bytes"]), f"{share:.1f} %")
        rows.append((dot, *(_td(cell, "n") for cell in cells)))
    yield f"<h2>Bytes <small>{_e(facts['bytes'])} in all</small></h2>"
    yield f'<svg class="bar" viewBox="0 0 100 12" preserveAspectRatio="none" role="img" aria-label="shares">{"".join(bars)}</svg>'
    yield _table(("for", "objects#", "size#", "share#"), rows)


def _kernels(facts: Facts) -> Iterator[str]:
    if facts["kernels"]:
        rows = [
            (
                f'<td class="wrap">{_name(k["kernel"])}</td>',
                _td(k["specializations"], "n"),
                _td(k["configs"], "n"),
                _td(size(k["bytes"]), "n"),
                _td(f"{k['tuned']} of {k['choices']}" if k["choices"] else "no choice", "n"),
            )
            for k in facts["kernels"]
        ]
        yield "<h2>Kernels</h2>" + _table(("kernel", "specializations#", "configs#", "size#", "tuned#"), rows)


def _graphs(facts: Facts) -> Iterator[str]:
    if facts.get("graphs"):
        rows = [
            (
                f'<td><button class="cell" data-units="{_e(g["label"])}" aria-expanded="false">{_e(g["label"])}</button></td>',
                f'<td class="wrap">{_name(g["function"])}<span class="module">:{_e(g["line"])}</span></td>',
                _td(" ".join(filter(None, (g["mode"], g["options"])))),
                _td(g["changes"]),
                _td(len(g["kernels"]), "n"),
                _td(len(g["guards"]) + len(g["identities"]), "n"),
                _td(size(g["bytes"]), "n"),
            )
            for g in facts["graphs"]
        ]
        yield "<h2>Graphs</h2>" + _table(("", "function", "mode", "changes", "kernels#", "guards#", "size#"), rows)


def _ledger(found: Facts) -> Iterator[str]:
    yield f"<h2>In the serving processes <small>{_e(', '.join(found['paths']))}</small></h2>"
    if found["processes"]:
        loaded = ((found["kernels"], "specializations"), (found["graphs"], "compiled graphs"))
        words = [f"processes: {found['processes']}, sealed: {found['sealed']}"]
        words += [f"{one['loaded']} of {one['in_all']} {what} loaded" for one, what in loaded if one["in_all"]]
        yield f"<p>{_e('; '.join(words))}</p>"
    yield '<p class="soft">First calls, events and misses. Hits are not counted: they run no code of aot-cache.</p>'
    if found["events"]:
        names = ("total", "in_capture", "after_seal")
        rows = [(_td(e["kind"]), *(_td(e[name], "n") for name in names)) for e in found["events"]]
        yield _table(("event", "in all#", "in captures#", "after seal()#"), rows)
    trouble = [(_td("not installed"), _td(name), _td("", "n"), _td(why)) for name, why in found["stale"].items()]
    trouble += [
        (_td("not installed"), _td(n), _td("", "n"), _td("its module is not imported")) for n in found["pending"]
    ]
    trouble += [
        (_td(f"missed {m['kind']}"), _td(m["name"]), _td(m["count"], "n"), _td("; ".join(m["why"])))
        for m in found["misses"]
    ]
    if trouble:
        yield _table(("what", "name", "calls#", "why"), trouble)
    if found["misses"] and not found["complete"]:
        yield '<p class="soft">These are the last misses that each process kept; a misses file has all of them.</p>'


def _built_for(facts: Facts) -> Iterator[str]:
    key = {f"graphs: {name}": value for name, value in facts["graph_key"].items() if value}
    parts = [
        [(_td(name), f'<td class="wrap mono">{_e(_plain(value))}</td>') for name, value in table.items()]
        for table in (facts["properties"], {**facts["key"], **key})
    ]
    yield '<h2>Built for</h2><div class="two">'
    yield _table(("target", ""), parts[0]) + _table(("part of the key", ""), parts[1]) + "</div>"


def _plain(value: Json) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _use(facts: Facts) -> Iterator[str]:
    docker = ["# Dockerfile", *dockerfile(Path(facts["path"]), facts["digest"])]
    serve = [
        "# in the serving process",
        SERVER,
        "…",
        "aot_cache.ready()  # before the first capture",
        "capture_cuda_graphs(model)",
        "aot_cache.seal()",
    ]
    yield "<h2>Use</h2>"
    for lines in (docker, serve):
        yield f'<div class="card"><pre>{chr(10).join(map(_e, lines))}</pre></div>'


# --- units ------------------------------------------------------------------------------------------------------------


def _units(facts: Facts) -> dict[str, Json]:
    """Label → name, facts and lists of a unit, in the form that the script shows."""
    out: dict[str, Json] = {}
    for g in facts.get("graphs", ()):
        about = {
            "mode": g["mode"],
            "options": g["options"],
            "changes": g["changes"],
            "points": "\n".join(reached_text(g["reached"])),
            "size": size(g["bytes"]),
            "breaks": g["breaks"],
            "rank": "" if g["rank"] is None else g["rank"],
        }
        lists = {
            "kernels": g["kernels"],
            "kernels not tuned": g["open"],
            "guards": [*g["identities"], *g["guards"]],
            "inlined functions": g["inlined"],
        }
        out[g["label"]] = _unit(f"{g['function']}:{g['line']}", about, lists)
    for call in facts["calls"] if "graphs" not in facts else ():
        about = {name: call[name] for name in ("mode", "options", "changes")}
        about["points"] = "\n".join(reached_text(call["reached"]))
        out[call["label"]] = _unit(f"{call['function']}:{call['line']}", about, {})
    for s in facts["specializations"]:
        about = {
            "signature": s["signature"],
            "points": "\n".join(s["reached_by"]),
            "size": size(s.get("bytes")),
            "shared": f"{s['shared']} bytes of shared memory" if "shared" in s else "",
            "source": s["parts"]["source"],
            "key": s.get("key", s.get("id")),
            "ranks": ", ".join(map(str, s["ranks"])),
        }
        out[s["label"]] = _unit(s["kernel"], about, {})
    return out


def _unit(name: str, about: Facts, lists: Facts) -> Json:
    shown = [[key, _cut(value)] for key, value in about.items() if value not in ("", "-", 0, None)]
    return {"name": clean(name), "facts": shown, "lists": [[key, [_cut(v) for v in vs]] for key, vs in lists.items()]}


def _cut(value: object) -> str:
    text = "\n".join(map(clean, str(value).split("\n")))
    return text if len(text) <= _LONG else text[:_LONG] + " …"
