"""artifact.manifest: what `split` takes apart, `whole` puts together, through a file; and what a server parses is lean."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import raw_manifest
from hypothesis import given
from hypothesis import strategies as st

from aot_cache.artifact import manifest
from aot_cache.artifact.manifest import Graph, Manifest, ServedGraph, graph_from_json
from aot_cache.artifact.plan import CallPlan, CasePlan, Failure, Plan
from aot_cache.artifact.target import TARGETS
from aot_cache.builder import assemble
from aot_cache.builder.workers import BuildResult
from aot_cache.errors import BundleCorrupt
from aot_cache.store import Bundle, Store, read_bundle, write_bundle


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


OBJECTS = {
    sha(data): data
    for data in (b"binary", pickle.dumps("guards"), b"bytecode", b"settings", b"graph", b"resume", b"library")
}
BINARY, GUARDS, BYTECODE, SETTINGS, GRAPH, RESUME, LIBRARY = OBJECTS

# --- manifests of any content -----------------------------------------------------------------------------------------

text = st.text(max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
mappings = st.dictionaries(text, scalars, max_size=3)
reached = st.dictionaries(text, st.lists(st.dictionaries(text, text, max_size=2), max_size=2), max_size=2)
digests = st.sampled_from(list(OBJECTS))

specializations = st.lists(
    st.fixed_dictionaries({"t": st.tuples(st.sampled_from(["i32", "*bf16", "constexpr"]), scalars).map(list)}),
    max_size=3,
)


@st.composite
def units(draw: st.DrawFn) -> dict[str, Any]:
    options = draw(mappings)
    return {
        "kernel": draw(st.integers(0, 1)),
        "key": draw(text),
        "memory_key": draw(st.none() | text),
        "specialization": draw(specializations),
        "options": options,
        "option_order": list(options),
        "object": draw(digests),
        "metadata": draw(mappings),
        "via": draw(st.lists(st.lists(st.integers(-1, 3), min_size=2, max_size=2), max_size=2)),
        "reached": draw(reached),
        "ranks": draw(st.lists(st.integers(0, 7), max_size=2)),
    }


several = st.fixed_dictionaries({"kernel": text, "configs": st.lists(text, max_size=2)})
graphs = st.fixed_dictionaries(
    {
        "module": text,
        "function": text,
        "line": st.integers(1, 999),
        "kernels": st.lists(text, max_size=2),
        "code": text,
        "mode": st.sampled_from(["inference", "no_grad", "grad bfloat16"]),
        "wrapping": st.fixed_dictionaries({"backend": st.just("inductor"), "options": mappings, "dynamic": st.none()}),
        "settings": digests,
        "guard_state": digests,
        "bytecode": digests,
        "graphs": st.dictionaries(text, digests, max_size=2),
        "libraries": st.dictionaries(text, digests, max_size=2),
        "rank": st.none() | st.integers(0, 7),
        "per_rank": text,
        "candidates": st.dictionaries(text, st.dictionaries(text, several, max_size=2), max_size=2),
        "choices": st.dictionaries(text, st.dictionaries(text, st.integers(0, 9), max_size=2), max_size=2),
        "imports": st.dictionaries(text, text, max_size=2),
        "resumes": st.dictionaries(
            text, st.fixed_dictionaries({"module": text, "code": digests, "free": st.booleans()}), max_size=2
        ),
        "inlined": st.lists(st.lists(text, min_size=3, max_size=3), max_size=2),
        "identities": st.lists(st.lists(text, min_size=3, max_size=3), max_size=2),
        "values": st.lists(st.lists(text, min_size=3, max_size=3), max_size=2),
        "guards": st.lists(text, max_size=2),
        "dynamic": st.dictionaries(text, st.lists(st.lists(st.integers(), min_size=3, max_size=3)), max_size=2),
        "reached": reached,
    }
)


@st.composite
def tunings(draw: st.DrawFn) -> dict[str, Any]:
    candidates = draw(st.lists(mappings, min_size=1, max_size=3))
    return {
        "kernel": draw(st.integers(0, 1)),
        "tuner": draw(st.integers(0, 1)),
        "key": draw(st.lists(scalars, max_size=2)),
        "candidates": candidates,
        "choice": draw(st.none() | mappings),
        "measured": draw(mappings),
        "reached": draw(reached),
        "default": draw(st.none() | st.integers(0, len(candidates) - 1)),
        "ranks": draw(st.lists(st.integers(0, 7), max_size=2)),
    }


ranks = st.lists(st.integers(0, 7), max_size=2)
kernels = st.fixed_dictionaries({"name": text, "closure": mappings, "ranks": ranks})
cases = st.builds(CasePlan, name=text, dims=st.dictionaries(text, text), points=st.integers(0, 9), total=st.integers(0, 9),
                  sampled=st.lists(text, max_size=2), missed=st.lists(st.dictionaries(text, st.integers()), max_size=2),
                  doc=text, autocast=st.none() | text, sets=st.lists(text, max_size=2)).map(asdict)  # fmt: skip
calls = st.builds(CallPlan, function=text, line=st.integers(1, 9), id=text, mode=text, wrapping=mappings, structure=text,
                  dynamic=st.just({}), reached=reached).map(asdict)  # fmt: skip
pruned = st.fixed_dictionaries({"kernel": text, "unit": text, "via": st.just([[0, 1]]), "why": text})
failures = st.fixed_dictionaries({"kernel": text, "unit": text, "error": text}, optional={"reached": reached})
natives = st.fixed_dictionaries({"name": text, "source": text, "suffix": text, "object": digests})
manifests = st.fixed_dictionaries(
    {
        "kind": st.just("units"),
        "recipe": text,
        "spec": text,
        "origin": st.sampled_from(["traced", "recorded"]),
        "ranks": st.integers(1, 8),
        "target": st.just(TARGETS["h200"].properties()),
        "toolchain": mappings,
        "cases": st.lists(cases, max_size=2),
        "kernels": st.lists(kernels, max_size=2),
        "metadata": mappings,
        "units": st.lists(units(), max_size=3),
        "tunings": st.lists(tunings(), max_size=2),
        "pruned": st.lists(pruned, max_size=1),
        "failed": st.lists(failures, max_size=1),
        "native": st.lists(natives, max_size=1),
        "graph_key": mappings,
        "graphs": st.lists(graphs, max_size=3),
        "calls": st.lists(calls, max_size=2),
        "complete": st.booleans(),
    }
)


def through_a_file(whole: dict[str, Any], folder: Path) -> Bundle:
    lean, details = manifest.split(Manifest.from_json(whole))
    path = folder / "a.safetensors"
    write_bundle(path, lean, {**OBJECTS, lean["details"]: details})
    return read_bundle(path)


@given(whole=manifests)
def test_a_manifest_comes_back(whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    before = copy.deepcopy(whole)
    back = manifest.whole(through_a_file(whole, tmp_path_factory.mktemp("bundle"))).to_json()
    assert whole == before, "split changes what it is given"
    back.pop("objects")
    assert back == json.loads(json.dumps(whole))


@given(whole=manifests)
def test_what_is_written_is_what_is_read(whole: dict[str, Any]) -> None:
    """Byte for byte what a writer that knows no types makes of it."""
    header, details = manifest.split(Manifest.from_json(whole))
    assert (header, details) == raw_manifest.split(json.loads(json.dumps(whole)))


def test_what_a_newer_version_adds_is_passed_over(tmp_path: Path) -> None:
    header, details = raw_manifest.split(of_graphs(GRAPH_FACTS))
    write_bundle(tmp_path / "a", header, {**OBJECTS, header["details"]: details})
    more = json.loads(json.dumps(header))
    for one in (more, more["graphs"][0], more["graphs"][0]["resumes"]["__aot_resume_0"]):
        one["new"] = 1
    write_bundle(tmp_path / "b", more, {**OBJECTS, header["details"]: details})
    old, new = read_bundle(tmp_path / "a"), read_bundle(tmp_path / "b")
    assert manifest.served(new) == manifest.served(old) and manifest.whole(new) == manifest.whole(old)


@given(whole=manifests)
def test_the_same_manifest_gives_the_same_bytes(whole: dict[str, Any]) -> None:
    one, details = manifest.split(Manifest.from_json(whole))
    two, again = manifest.split(Manifest.from_json(json.loads(json.dumps(whole))))
    assert details == again and one["details"] == sha(details)
    assert json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True)


# --- what is lean -----------------------------------------------------------------------------------------------------

GRAPH_FACTS: dict[str, Any] = {
    "module": "model",
    "function": "Layer.forward",
    "line": 7,
    "kernels": ["triton_poi_fused_0"],
    "code": "c" * 32,
    "mode": "inference",
    "wrapping": {"backend": "inductor", "options": {}, "dynamic": None},
    "settings": SETTINGS,
    "guard_state": GUARDS,
    "bytecode": BYTECODE,
    "graphs": {"__aot_graph_0": GRAPH},
    "libraries": {"s" * 64: LIBRARY},
    "rank": 1,
    "per_rank": "the rank's number is asked for in offset (model.py:19)",
    "candidates": {
        "__aot_graph_0": {"k" * 52: {"kernel": "triton_poi_fused_0", "configs": ["XBLOCK: 1", "XBLOCK: 2"]}}
    },
    "choices": {"__aot_graph_0": {"k" * 52: 1}},
    "imports": {"__aot_import_torch": "torch"},
    "resumes": {"__aot_resume_0": {"module": "model", "code": RESUME, "free": False}},
    "inlined": [["model", "helper", "d" * 32]],
    "identities": [["FUNCTION_MATCH", "G['helper']", "function model:helper 0"]],
    "values": [["EQUALS_MATCH", "G['scale']", "2"]],
    "guards": ["L['x'].size()[0] >= 2"],
    "dynamic": {"L['x']": [[0, 2, 9]]},
    "reached": {"case": [{"n": "2..9"}]},
}


CALL = CallPlan(
    function="model:Layer.forward",
    line=7,
    id="0" * 16,
    mode="inference",
    wrapping={"backend": "inductor"},
    dynamic={"L['x']": [[0, 2, 9]]},
)


FACTS = graph_from_json(Graph, GRAPH_FACTS)
OF_FACTS = FACTS.objects()


def of_graphs(*found: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The whole manifest of a bundle of graphs."""
    return {
        "kind": "units", "recipe": "tiny", "spec": "tiny:recipe", "origin": "traced", "ranks": 1,
        "target": TARGETS["cpu"].properties(), "toolchain": {"triton": ""}, "cases": [], "kernels": [], "metadata": {},
        "units": [], "tunings": [], "pruned": [], "failed": [], "native": [], "graph_key": {"torch": "2.13.0"},
        "graphs": list(found), "calls": [asdict(CALL)], "complete": True, **more,
    }  # fmt: skip


def test_what_a_server_needs_of_a_graph_is_in_the_header() -> None:
    """Looking a call up must not parse what only people read; and what it needs must not be among the details."""
    lean, details = manifest.split(Manifest.from_json(of_graphs(GRAPH_FACTS)))
    (graph,) = lean["graphs"]
    needed = {"module", "function", "code", "mode", "wrapping", "settings", "guard_state", "bytecode", "graphs"}
    needed |= {"imports", "resumes", "inlined", "identities", "values", "libraries", "choices"}
    assert needed <= set(graph), "the loader reads these"
    assert not {"guards", "dynamic", "reached", "line", "candidates", "per_rank"} & set(graph), "only people read these"
    assert (
        graph_from_json(ServedGraph, graph).objects()
        == OF_FACTS
        == {SETTINGS, GUARDS, BYTECODE, GRAPH, RESUME, LIBRARY}
    )
    assert "calls" not in lean and "graph_key" in lean
    assert json.loads(details)["graphs"] == [
        {
            name: GRAPH_FACTS[name]
            for name in ("guards", "dynamic", "line", "reached", "kernels", "candidates", "per_rank")
        }
    ]


def test_details_of_another_number_of_graphs(tmp_path: Path) -> None:
    lean, details = manifest.split(Manifest.from_json(of_graphs(GRAPH_FACTS, GRAPH_FACTS)))
    lean["graphs"].pop()
    write_bundle(tmp_path / "a.safetensors", lean, {**OBJECTS, lean["details"]: details})
    with pytest.raises(BundleCorrupt, match="do not fit its manifest"):
        manifest.whole(read_bundle(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("lacking", ["graphs", "calls"])
def test_details_that_lack_a_part(tmp_path: Path, lacking: str) -> None:
    lean, details = manifest.split(Manifest.from_json(of_graphs(GRAPH_FACTS)))
    data = json.dumps({k: v for k, v in json.loads(details).items() if k != lacking}).encode()
    lean["details"] = sha(data)
    write_bundle(tmp_path / "a.safetensors", lean, {**OBJECTS, sha(data): data})
    with pytest.raises(BundleCorrupt, match=lacking):
        manifest.whole(read_bundle(tmp_path / "a.safetensors"))


# --- what is put together ---------------------------------------------------------------------------------------------


@pytest.fixture
def kept(clean_store: Store) -> Store:
    """A store that has every object."""
    for data in OBJECTS.values():
        clean_store.put(data)
    return clean_store


CPU = TARGETS["cpu"]
BOUND = {"torch": "2.13.0", "target": {"backend": "cpu", "isa": "x86_64 AVX2"}}


def test_graphs_are_put_into_a_bundle_with_all_that_they_need(kept: Store) -> None:
    result = BuildResult(plan=Plan(recipe="tiny", target="cpu", calls=[CALL]), graphs=[FACTS], graph_key=BOUND)
    found, objects = assemble.assemble(CPU, "tiny:recipe", result, kept)
    made = found.to_json()
    assert made["graphs"] == [GRAPH_FACTS] and made["graph_key"] == BOUND and made["complete"] is True
    assert made["calls"] == [asdict(CALL)] and made["units"] == [] and made["toolchain"] == {"triton": ""}
    assert objects == {digest: OBJECTS[digest] for digest in OF_FACTS}
    json.dumps(made)


def test_a_bundle_without_graphs_is_bound_to_no_torch(kept: Store) -> None:
    """Kernels serve any torch: a key of graphs that are not there must not refuse them."""
    result = BuildResult(plan=Plan(recipe="tiny", target="cpu"), graph_key=BOUND)
    made, objects = assemble.assemble(CPU, "tiny:recipe", result, kept)
    assert (made.graphs, made.calls, made.graph_key, objects) == ([], [], {}, {})


def test_a_call_of_which_nothing_could_be_compiled_makes_a_bundle_incomplete(kept: Store) -> None:
    failure = Failure(kernel="model:Layer.forward", unit="0" * 16, error="it reads a value")
    plan = Plan(recipe="tiny", target="cpu", calls=[CALL])
    result = BuildResult(plan=plan, graphs=[FACTS], failed=[failure], graph_key=BOUND)
    made, objects = assemble.assemble(CPU, "tiny:recipe", result, kept)
    assert made.failed == [failure] and made.complete is False
    assert GRAPH in objects, "what could be compiled is there"


def test_what_two_graphs_share_is_in_a_bundle_once(kept: Store) -> None:
    other = replace(FACTS, bytecode=RESUME, resumes={})
    result = BuildResult(plan=Plan(recipe="tiny", target="cpu"), graphs=[FACTS, other], graph_key=BOUND)
    _, objects = assemble.assemble(CPU, "tiny:recipe", result, kept)
    assert set(objects) == OF_FACTS | other.objects()
    assert len(objects) == 6
