"""cli.render.html: the page of `inspect --html`, as text and in a browser. What is on it comes from a file of unknown origin."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from limits import HANGS
from test_inspect import KERNEL, a_bundle, a_manifest, a_plan

from aot_cache.cli.facts import build as build_facts
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.render import html as html_page

HOSTILE = "<script>alert(1)</script><!-- \" ' & </title></style>\x1b[31m"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")


def a_graph(function: str = "layer", reached: str = "2..4", **more: Any) -> dict[str, Any]:
    """A graph of a manifest, of the kind that `a_manifest` has none of."""
    return {
        "module": "pack.model",
        "function": function,
        "line": 7,
        "mode": "inference",
        "code": "c",
        "values": [],
        "imports": {},
        "wrapping": {"options": {}, "dynamic": None},
        "dynamic": {"L['x']": [[0, 2, 4]]},
        "kernels": ["triton_poi_0"],
        "candidates": {},
        "choices": {},
        "resumes": {},
        "graphs": {},
        "libraries": {},
        "guard_state": a_manifest()["units"][0]["object"],
        "bytecode": a_manifest()["units"][1]["object"],
        "settings": a_manifest()["units"][0]["object"],
        "guards": ["len(L['x']) == 3"],
        "identities": [],
        "inlined": [],
        "rank": None,
        "per_rank": "",
        "reached": {"decode": [{"batch": reached, "tokens": "1"}]},
        **more,
    }


def facts_of(folder: Path, manifest: dict[str, Any] | None = None) -> dict[str, Any]:
    whole = manifest or a_manifest() | {"graphs": [a_graph(reached="1"), a_graph()], "graph_key": {"torch": "2.13.0"}}
    return bundle_facts.bundle(a_bundle(folder, whole), points=True)


class Seen(HTMLParser):
    """The elements, texts and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._scripts = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def having(self, name: str) -> list[str]:
        return [value or "" for _, attributes in self.elements for key, value in attributes.items() if key == name]


def hostile(value: Any) -> Any:
    """A manifest in which what a bundle's author can write freely is hostile."""
    out = copy.deepcopy(value)
    out["recipe"] = out["spec"] = HOSTILE
    for case in out["cases"]:
        case["mode"] = case["doc"] = HOSTILE
    out["kernels"][0]["name"] = HOSTILE
    out["kernels"][0]["closure"] = {HOSTILE: out["kernels"][0]["closure"][KERNEL]}
    out["toolchain"] = {**out["toolchain"], "triton": HOSTILE, HOSTILE: HOSTILE}
    out["target"] = {**out["target"], "name": HOSTILE, "source": HOSTILE, HOSTILE: HOSTILE}
    out["failed"] = [{"kernel": HOSTILE, "unit": HOSTILE, "error": HOSTILE}]
    strange = {"mode": HOSTILE, "kernels": [HOSTILE], "guards": [HOSTILE], "line": HOSTILE, "module": HOSTILE}
    out["graphs"] = [a_graph(HOSTILE, dynamic={HOSTILE: [[0, 2, 4]]}, **strange)]
    out["graph_key"] = {"torch": HOSTILE, HOSTILE: HOSTILE}
    out["complete"] = False
    return out


# --- as text ----------------------------------------------------------------------------------------------------------


def test_the_page_says_what_the_bundle_is(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    seen = Seen(html_page.page(facts))
    for text in (facts["recipe"], "NVIDIA H200 (h200)", f"sha256 {facts['digest']}", "enumerated 4 points", "complete"):
        assert text in seen.texts
    used = "\n".join(seen.texts)
    assert all(text in used for text in build_facts.dockerfile(Path(facts["path"]), facts["digest"]))
    assert "· traced · torch 2.13.0 · Triton 3.7.1" in seen.texts
    assert any(text == "g1" for text in seen.texts) and seen.having("data-units").count("g2") == 2, "grid and table"
    assert seen.having("data-dimension") == [grid["dimension"] for grid in facts["grids"]] != []


def test_the_page_says_how_many_ranks_it_is_for(tmp_path: Path) -> None:
    one, two = (Seen(html_page.page(facts_of(tmp_path, a_manifest(a_plan(ranks=ranks))))) for ranks in (1, 2))
    assert any(text.endswith(" · 2 ranks") for text in two.texts) and not any("ranks" in text for text in one.texts)


def test_the_page_of_a_plan() -> None:
    facts = bundle_facts.plan(a_plan(), Path("p.json"), points=True)
    seen = Seen(html_page.page(facts))
    assert "aot-cache plan" in seen.texts and "k1" in seen.texts and "Bytes" not in seen.texts


def test_the_page_says_what_a_case_is(tmp_path: Path) -> None:
    manifest = a_manifest()
    assert "what it is" not in Seen(html_page.page(facts_of(tmp_path, manifest))).texts, (
        "a column only where a case says it"
    )
    manifest["cases"][0]["doc"] = "One token of each request."
    texts = Seen(html_page.page(facts_of(tmp_path, manifest))).texts
    assert "what it is" in texts and "One token of each request." in texts


def test_what_was_recorded_has_no_grid(tmp_path: Path) -> None:
    plan = a_plan(cases=[], origin="recorded")
    seen = Seen(html_page.page(bundle_facts.plan(plan, Path("p"), points=True)))
    assert not seen.having("data-dimension") and any(text.startswith("Recorded: ") for text in seen.texts)


def test_nothing_of_a_bundle_becomes_markup(tmp_path: Path) -> None:
    """The page of a hostile bundle has the elements and attributes of an ordinary one, and no more."""
    text = html_page.page(facts_of(tmp_path, hostile(a_manifest())))
    seen = Seen(text)
    assert {tag for tag, _ in seen.elements} <= {
        tag for tag, _ in Seen(html_page.page(facts_of(tmp_path))).elements
    } | {"p"}
    assert [tag for tag, _ in seen.elements].count("script") == 2
    assert "<script>alert" not in text and "\x1b" not in text
    assert not [name for _, attributes in seen.elements for name in attributes if name.startswith("on")]
    assert "alert(1)" in " ".join(seen.texts), "it is shown, as text"


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    text = html_page.page(facts_of(tmp_path))
    seen = Seen(text)
    assert not {"link", "img", "iframe", "object", "base", "form"} & {tag for tag, _ in seen.elements}
    assert (
        not seen.having("src")
        and not seen.having("href")
        and not re.search(r"url\(|@import|https?://", html_page.STYLE)
    )
    assert seen.having("content")[0].startswith("default-src 'none';")


def test_a_narrow_page_has_the_names_above_the_cells(tmp_path: Path) -> None:
    text = html_page.page(facts_of(tmp_path))
    rows = re.findall(r'<tr class="label"><th colspan="(\d+)"><span>(.*?)</span></th></tr>', text)
    assert [re.sub("<.*?>", "", names) for _, names in rows] == [
        "decode pack.model:layer",
        "pack.mod:add",
        "pack.mod:norm",
    ]
    assert {width for width, _ in rows} == {"2"}
    wide, _, narrow = html_page.STYLE.partition("@media (max-width: 700px)")
    assert ".grid tr.label { display: none; }" in wide and ".grid tr.label { display: table-row; }" in narrow


# --- in a browser -----------------------------------------------------------------------------------------------------


class Shown(NamedTuple):
    dom: str
    console: list[str]

    def attribute(self, name: str) -> list[str]:
        return Seen(self.dom).having(name)

    def panel(self) -> str:
        """The text of the part that shows a unit; empty while it is hidden."""
        found = re.search(r'<aside id="unit"[^>]*?( hidden="")?>(.*?)</aside>', self.dom, re.S)
        assert found
        return "" if found[1] else " ".join(Seen(found[2]).texts)


Show = Callable[..., Shown]


@pytest.fixture(scope="module")
def show() -> Show:
    """The page as it is after its scripts ran, and what the browser said on its console."""
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        pytest.skip("no chromium: apt-get install chromium")
    if subprocess.run([program, "--version"], capture_output=True, timeout=HANGS, check=False).returncode:
        pytest.skip(f"{program} does not start")  # Ubuntu's is a script that asks for a snap
    options = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --enable-logging=stderr"

    def run(path: Path, fragment: str = "", *more: str) -> Shown:
        done = subprocess.run(
            [
                program,
                *options.split(),
                *more,
                f"--user-data-dir={path.parent / 'profile'}",
                "--dump-dom",
                path.as_uri() + fragment,
            ],
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=True,
        )
        return Shown(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])

    return run


def written(folder: Path, text: str) -> Path:
    path = folder / "page.html"
    path.write_text(text)
    return path


def test_the_script_runs_and_says_nothing(tmp_path: Path, show: Show) -> None:
    """A policy forbids every request, and one that is forbidden would be on the console."""
    shown = show(written(tmp_path, html_page.page(facts_of(tmp_path))))
    assert shown.console == [] and shown.panel() == ""
    hover = shown.attribute("title")
    assert any(title.startswith("g2  pack.model:layer:7\nmode: inference") for title in hover), hover
    assert any(title.startswith("k1  pack.mod:add\nsignature: ") for title in hover), hover


def test_a_unit_is_shown_with_its_parts(tmp_path: Path, show: Show) -> None:
    path = written(tmp_path, html_page.page(facts_of(tmp_path)))
    panel = show(path, "#g2").panel()
    assert "pack.model:layer:7" in panel and "decode: batch 2..4, tokens 1" in panel and "guards: 1" in panel
    assert "len(L['x']) == 3" in panel
    assert show(path, "#nothing").panel() == ""


@pytest.mark.parametrize(("width", "left"), [(500, 40), (1100, 300)])
def test_where_the_cells_of_the_coverage_begin(tmp_path: Path, show: Show, width: int, left: int) -> None:
    """On a phone they begin at the left edge, before what scrolls out of view; else the names stand beside them."""
    measure = "document.title = Math.round(document.querySelector('.grid .cell').getBoundingClientRect().left)"
    text = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", html_page.page(facts_of(tmp_path)))
    path = written(tmp_path, text.replace("</body>", f"<script>{measure}</script></body>"))
    found = re.search(r"<title>(\d+)</title>", show(path, "", f"--window-size={width},900").dom)
    assert found is not None
    assert int(found[1]) < left if width < 700 else int(found[1]) > left


def test_a_hostile_bundle_in_a_browser(tmp_path: Path, show: Show) -> None:
    text = html_page.page(facts_of(tmp_path, hostile(a_manifest())))
    shown = show(written(tmp_path, text), "#g1")
    assert shown.console == [] and shown.dom.count("<script") == 2
    assert "alert(1)" in shown.panel(), "text, put there by the script"


def test_the_browser_would_say_so(tmp_path: Path, show: Show) -> None:
    """What the tests above rely on: markup that got onto the page would be refused, and be on the console."""
    text = html_page.page(facts_of(tmp_path))
    more = '<img src="http://127.0.0.1:9/x.png"><script>document.title = "taken"</script></main>'
    shown = show(written(tmp_path, text.replace("</main>", more)))
    assert len(shown.console) == 2 and "<title>taken" not in shown.dom
