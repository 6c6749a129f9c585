"""cli.facts.bundle, artifact.specialization and cli.render.terminal: facts from plans and bundles, without torch."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import stub_builds
from raw_manifest import split
from test_manifest import FACTS

from aot_cache.artifact.key import Part
from aot_cache.artifact.manifest import Manifest, NativeModule
from aot_cache.artifact.plan import CallPlan, CasePlan, Plan, Tuning, Unit
from aot_cache.artifact.reached import together
from aot_cache.artifact.specialization import closure_digest, parameter_names, signature, value_text
from aot_cache.artifact.target import TARGETS, Difference
from aot_cache.builder.pipeline import Built
from aot_cache.cli.facts import build as build_facts
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.facts import diff as diff_facts
from aot_cache.cli.facts import sizes as size_facts
from aot_cache.cli.render import build as render_build
from aot_cache.cli.render import bundle as render_bundle
from aot_cache.cli.render import terminal
from aot_cache.errors import BundleCorrupt, DeclarationError
from aot_cache.recipes import dimensions
from aot_cache.store import Bundle, read_bundle, write_bundle

KERNEL, OTHER = "pack.mod:add", "pack.mod:norm"
CLOSURES: dict[str, Any] = {name: {name: {"src": "ab" * 16, "refs": {}}} for name in (KERNEL, OTHER)}
SPECIALIZATION = [{"t": ["*bf16", "D"]}, {"t": ["i32", None]}, {"t": ["constexpr", 128]}]
ONE, TWO = b"one binary", b"another binary"


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def a_unit(kernel: str = KERNEL, warps: int = 4, **more: Any) -> Unit:
    return Unit(
        kernel=kernel,
        source=closure_digest(CLOSURES[kernel]),
        specialization=copy.deepcopy(SPECIALIZATION),
        options={"num_warps": warps, "debug": False},  # not in order of name: a manifest sorts its keys
        reached={"decode": [{"batch": "1..4", "tokens": "1"}]},
        **more,
    )


def a_plan(**more: Any) -> Plan:
    cases = [CasePlan(name="decode", dims={"batch": "1..4", "tokens": "1"}, points=4, total=4, sampled=[])]
    units = [a_unit(), a_unit(OTHER, 1, via=[[0, 0]]), a_unit(OTHER, 2, via=[[0, 1]])]
    tunings = [
        Tuning(kernel=OTHER, tuner=0, key=[128, "torch.bfloat16"], candidates=[{"num_warps": 1}, {"num_warps": 2}])
    ]
    return replace(
        Plan(
            recipe="tiny",
            target="h200",
            origin="traced",
            triton="3.7.1",
            cases=cases,
            units=units,
            tunings=tunings,
            closures=CLOSURES,
        ),
        **more,
    )


def a_manifest(plan: Plan | None = None) -> dict[str, Any]:
    """What `builder.assemble.assemble` writes, by hand, for the two kernels of `a_plan`."""
    plan = plan or a_plan()
    number = {KERNEL: 0, OTHER: 1}
    return {
        "kind": "units",
        "recipe": plan.recipe,
        "spec": "tiny:recipe",
        "origin": plan.origin,
        "ranks": plan.ranks,
        "target": TARGETS["h200"].properties(),
        "toolchain": {"schema": "1", "triton": plan.triton, "toolkit": "ptxas 12.8"},
        "cases": [case.__dict__ for case in plan.cases],
        "kernels": [{"name": name, "closure": CLOSURES[name], "ranks": []} for name in number],
        "metadata": {"shared": 64},
        "units": [
            {
                "kernel": number[u.kernel],
                "key": f"{n}" * 64,
                "memory_key": f"key {n}",
                "specialization": u.specialization,
                "options": u.options,
                "option_order": list(u.options),
                "object": sha(TWO if n else ONE),
                "metadata": {"shared": 1024} if n == 2 else {},
                "via": u.via,
                "reached": u.reached,
                "ranks": u.ranks,
            }
            for n, u in enumerate(plan.units)
        ],
        "tunings": [{**t.__dict__, "kernel": number[t.kernel], "default": 0} for t in plan.tunings],
        "pruned": [],
        "failed": [],
        "native": [],
        "graph_key": {},
        "graphs": [],
        "calls": [],
        "complete": True,
    }


def a_bundle(folder: Path, manifest: dict[str, Any] | None = None, **in_header: Any) -> Bundle:
    path = folder / "tiny.safetensors"
    lean, details = split(manifest or a_manifest())
    write_bundle(path, lean | in_header, {sha(data): data for data in (ONE, TWO, details)})
    return read_bundle(path)


def as_json(facts: Any) -> Any:
    """The facts as they are after a trip through JSON; fails where they are not plain."""
    assert json.loads(json.dumps(facts)) == facts
    return facts


# --- signatures -------------------------------------------------------------------------------------------------------


def test_a_signature_reads_like_a_call() -> None:
    assert signature(a_unit(), ["x", "n", "BLOCK"]) == "x:*bf16:16 n:i32 BLOCK=128 num_warps=4"


def test_arguments_without_names_go_by_position() -> None:
    assert signature(a_unit()) == "#0:*bf16:16 #1:i32 #2=128 num_warps=4"
    assert signature(a_unit(), ["too", "few"]) == signature(a_unit())


def test_a_signature_of_tuples_and_amd_pointers() -> None:
    pair = {"t": [{"t": ["*fp32", "constexpr"]}, {"t": ["DS", 3]}]}
    unit = replace(a_unit(), specialization=[pair, {"t": [{"t": ["i32"]}, None]}], options={})
    assert signature(unit, ["pair", "one"]) == "pair.0:*fp32:16:32bit pair.1=3 one.0:i32"


def test_an_option_that_is_a_parameter_is_said_once() -> None:
    unit = replace(a_unit(), specialization=[{"t": ["constexpr", 4]}])
    assert signature(unit, ["num_warps"]) == "num_warps=4"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (3, "3"),
        ("silu", "'silu'"),
        ({"float": "inf"}, "inf"),
        ({"dtype": "fp32"}, "fp32"),
        ({"torch": "bfloat16"}, "torch.bfloat16"),
        ({"constexpr": 8}, "8"),
        ({"jit": "a.b:act"}, "act"),
        ({"t": [1, {"dtype": "int8"}]}, "(1, int8)"),
        ({"l": [1, 2]}, "[1, 2]"),
        ({"named": "a.b:Shape", "t": [1, 2]}, "Shape(1, 2)"),
    ],
)
def test_values_as_python_would_write_them(value: Any, text: str) -> None:
    assert value_text(value) == text


def test_a_closure_is_hashed_as_the_builder_does() -> None:
    triton_jit = pytest.importorskip("aot_cache.upstream.codec.triton_jit")
    assert closure_digest(CLOSURES[KERNEL]) == triton_jit.closure_digest(CLOSURES[KERNEL])


SOURCE = "def add(x, n, *, BLOCK: 'tl.constexpr'):\n    return x\n"


def a_module(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str = SOURCE) -> dict[str, Any]:
    """A kernel in `name.mod`, in packages that must not be imported; returns its closure."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('nothing may import this')\n")
    (folder / name / "mod.py").write_text(f"import nothing_of_this_name\n\nif True:\n    @jit\n    {INDENTED}")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    return {f"{name}.mod:add": {"src": sha(source.encode())[:32], "refs": {}}}


INDENTED = SOURCE.replace("\n", "\n    ").rstrip(" ")


def test_names_come_from_the_source_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closure = a_module(tmp_path, monkeypatch, "never_imported_1")
    assert list(parameter_names("never_imported_1.mod:add", closure)) == ["x", "n", "BLOCK"]
    assert "never_imported_1" not in sys.modules


def test_names_come_from_a_package_without_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each depth: the first whose parent is one has made `inspect` of SGLang's kernels raise KeyError."""
    (tmp_path / "never_imported_3" / "inner" / "deep").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    closure = {"src": sha(SOURCE.encode())[:32], "refs": {}}
    for folder in ("", "inner", "inner/deep"):
        tmp_path.joinpath("never_imported_3", folder, "mod.py").write_text(SOURCE)
        kernel = ".".join(("never_imported_3", *Path(folder).parts, "mod:add"))
        assert list(parameter_names(kernel, {kernel: closure})) == ["x", "n", "BLOCK"], kernel
    assert "never_imported_3" not in sys.modules


def test_names_of_other_source_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closure = a_module(tmp_path, monkeypatch, "never_imported_2", SOURCE + "# other\n")
    assert not parameter_names("never_imported_2.mod:add", closure)


@pytest.mark.parametrize("kernel", ["no_such_module:f", "json.nothing:f", "math:f", "json:f", "..:f", ":f", "a/b:f"])
def test_names_of_what_is_not_here(kernel: str) -> None:
    assert not parameter_names(kernel, {kernel: {"src": "00"}})


# --- plans and bundles ------------------------------------------------------------------------------------------------


def test_the_facts_of_a_bundle(tmp_path: Path) -> None:
    found = a_bundle(tmp_path)
    facts = as_json(bundle_facts.bundle(found))
    wanted = {"kind": "bundle", "recipe": "tiny", "target": "h200", "device": "NVIDIA H200", "triton": "3.7.1"}
    assert wanted.items() <= facts.items()
    assert (facts["digest"], facts["bytes"]) == (found.digest, found.path.stat().st_size)
    assert (facts["units"], facts["untuned"], facts["pruned"], facts["complete"]) == (3, 1, 0, True)
    assert facts["coverage"] == "enumerated 4 points"
    assert "specializations" not in facts


def test_the_row_of_a_kernel(tmp_path: Path) -> None:
    rows = bundle_facts.bundle(a_bundle(tmp_path))["kernels"]
    assert rows == [
        {"kernel": KERNEL, "specializations": 1, "configs": 1, "bytes": len(ONE), "choices": 0, "tuned": 0},
        # two units with one binary, which the bundle has once
        {"kernel": OTHER, "specializations": 2, "configs": 2, "bytes": len(TWO), "choices": 1, "tuned": 0},
    ]


def test_the_bytes_add_up_to_the_file_s(tmp_path: Path) -> None:
    found = a_bundle(tmp_path)
    rows = {row["kind"]: row for row in bundle_facts.bundle(found)["sizes"]}
    assert list(rows) == ["kernels", "details for people", "manifest"]
    assert rows["kernels"] == {"kind": "kernels", "objects": 2, "bytes": len(ONE) + len(TWO)}, "each object once"
    assert sum(row["bytes"] for row in rows.values()) == found.path.stat().st_size


def test_bytes_by_what_they_are_for() -> None:
    """Of objects that two kinds use, the first has the bytes."""
    graph = replace(FACTS, graphs={"x": "c"}, libraries={}, guard_state="g", bytecode="c", settings="s", resumes={})
    stored = {"u": 1, "c": 10, "g": 100, "s": 1000, "n": 10_000, "d": 100_000, "?": 1_000_000}
    native = NativeModule(name="", source="", suffix="", object="n")
    found = Manifest.from_json(a_manifest())
    whole = replace(found, objects=stored, units=[replace(found.units[0], object="u")], graphs=[graph], native=[native])
    rows = {row["kind"]: (row["objects"], row["bytes"]) for row in size_facts.sizes(whole, "d", 9_000_000)}
    assert rows == {
        "kernels": (1, 1),
        "compiled graphs": (1, 10),
        "guards and bytecode": (2, 1100),
        "C launchers": (1, 10_000),
        "details for people": (1, 100_000),
        "other": (1, 1_000_000),
        "manifest": (0, 9_000_000 - 1_111_111),
    }


def test_the_coverage_of_a_bundle_and_of_its_plan(tmp_path: Path) -> None:
    (grid,) = bundle_facts.bundle(a_bundle(tmp_path))["grids"]
    assert grid == bundle_facts.plan(a_plan(), Path("p"))["grids"][0]
    assert [(row["case"], row["name"], row["cells"]) for row in grid["rows"]] == [
        ("decode", KERNEL, [["k1"]]),
        ("decode", OTHER, [["k2", "k3"]]),
    ]
    labels = [one["label"] for one in bundle_facts.bundle(a_bundle(tmp_path), points=True)["specializations"]]
    assert labels == ["k1", "k2", "k3"]


def test_a_choice_that_was_measured_counts_as_tuned(tmp_path: Path) -> None:
    plan = a_plan()
    plan = replace(plan, tunings=[replace(plan.tunings[0], choice={"num_warps": 2}), *plan.tunings[1:]])
    facts = bundle_facts.bundle(a_bundle(tmp_path, a_manifest(plan)))
    assert facts["untuned"] == 0
    assert facts["kernels"][1]["tuned"] == 1


def test_one_candidate_is_no_choice() -> None:
    plan = a_plan(tunings=[Tuning(kernel=OTHER, tuner=0, key=[1], candidates=[{"num_warps": 1}])])
    facts = bundle_facts.plan(plan, Path("p"))
    assert (facts["untuned"], facts["kernels"][1]["choices"]) == (0, 0)


def test_the_specializations_of_a_kernel(tmp_path: Path) -> None:
    facts = as_json(bundle_facts.bundle(a_bundle(tmp_path), "norm", names=lambda *_: ["x", "n", "D"]))
    assert [k["kernel"] for k in facts["kernels"]] == [OTHER]
    first, second = facts["specializations"]
    assert first["signature"] == "x:*bf16:16 n:i32 D=128 num_warps=1"
    assert (first["shared"], second["shared"]) == (64, 1024)
    assert (first["bytes"], first["key"]) == (len(TWO), "1" * 64)
    assert first["reached_by"] == ["decode: batch 1..4, tokens 1"]
    assert list(first["parts"]) == ["kernel", "source", "specialization", "options"]
    assert facts["key"]["toolkit"] == "ptxas 12.8"


def test_points_lists_every_kernel() -> None:
    plan = a_plan()
    plan = replace(plan, units=[replace(plan.units[0], overrides={"num_warps": 4}), *plan.units[1:]])
    facts = as_json(bundle_facts.plan(plan, Path("p"), points=True))
    assert [s["kernel"] for s in facts["specializations"]] == [KERNEL, OTHER, OTHER]
    assert facts["specializations"][0]["id"] == plan.units[0].id
    assert facts["specializations"][0]["parts"]["overrides"] == {"num_warps": 4}
    assert facts["kernels"][0]["bytes"] is None


def test_no_kernel_of_that_name(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=r"'nope'.*pack\.mod:add"):
        bundle_facts.bundle(a_bundle(tmp_path), "nope")
    with pytest.raises(DeclarationError, match="'nope'"):
        bundle_facts.plan(a_plan(), Path("p"), "nope")


def test_a_bundle_without_units(tmp_path: Path) -> None:
    facts = bundle_facts.bundle(a_bundle(tmp_path, a_manifest() | {"units": []}), points=True)
    assert (facts["units"], facts["kernels"], facts["specializations"]) == (0, [], [])


@pytest.mark.parametrize(
    ("whole", "header"),
    [
        ({"cases": [{"name": "x"}]}, {}),
        (
            {
                "cases": [
                    CasePlan(
                        name="decode", dims={"batch": "many", "tokens": "1"}, points=4, total=4, sampled=[]
                    ).__dict__
                ]
            },
            {},
        ),
        ({"cases": [CasePlan(name="decode", dims={"other": "1..4"}, points=4, total=4, sampled=[]).__dict__]}, {}),
        ({"failed": [1]}, {}),
        ({"failed": None}, {}),
        ({}, {"units": 3}),
        ({}, {"units": [{}, {}, {}]}),
        ({}, {"tunings": []}),
        ({}, {"kernels": []}),
        ({}, {"target": None}),
        ({}, {"toolchain": []}),
        ({}, {"metadata": 3}),
        ({}, {"graphs": 3}),
        ({}, {"graphs": [{}]}),
        ({}, {"details": "0" * 64}),
        ({}, {"details": sha(ONE)}),
        ({}, {"binaries": []}),
    ],
)
def test_a_sound_file_with_another_manifest_is_one_error(
    tmp_path: Path, whole: dict[str, Any], header: dict[str, Any]
) -> None:
    found = a_bundle(tmp_path, a_manifest() | whole, **header)
    with pytest.raises(BundleCorrupt, match="again"):
        bundle_facts.bundle(found, points=True)


def test_a_plan_with_strange_values_is_one_error() -> None:
    for strange in ({"reached": 5}, {"reached": {"a": [1]}}, {"specialization": [1]}, {"specialization": [{"t": [1]}]}):
        with pytest.raises(DeclarationError):
            bundle_facts.plan(a_plan(units=[replace(a_unit(), **strange)]), Path("p"), points=True)


@pytest.mark.parametrize(
    ("origin", "points", "sampled", "text"),
    [
        ("traced", 1112, [], "enumerated 1112 points"),
        ("traced", 1, [], "enumerated 1 point"),
        ("traced", 90, ["decode.batch", "prefill.tokens"], "sampled: decode.batch, prefill.tokens"),
        ("recorded", 0, [], "recorded: only what ran"),
        ("", 0, [], "recorded: only what ran"),
    ],
)
def test_coverage_in_words(origin: str, points: int, sampled: list[str], text: str) -> None:
    assert bundle_facts.coverage(origin, points, sampled) == text


# --- comparing --------------------------------------------------------------------------------------------------------


def side(plan: Plan) -> diff_facts.Side:
    return diff_facts.Side(Path("left.json"), plan)


def test_a_plan_is_the_same_as_itself_and_its_bundle(tmp_path: Path) -> None:
    bundle = diff_facts.side(a_bundle(tmp_path))
    assert diff_facts.diff(side(a_plan()), side(a_plan()))["same"]
    assert diff_facts.diff(side(a_plan()), bundle)["same"]
    assert diff_facts.diff(bundle, side(a_plan()))["same"]


def test_what_a_bundle_left_out_as_unfit_is_no_difference(tmp_path: Path) -> None:
    plan, manifest = a_plan(), a_manifest()
    first, second, *others = plan.units
    second = replace(second, overrides={"num_warps": 1})  # which a bundle does not write down
    unfit = a_unit(OTHER, 32, via=[[0, 2]])
    plan = replace(plan, units=[first, second, *others, unfit])
    assert not diff_facts.diff(side(plan), diff_facts.side(a_bundle(tmp_path, manifest)))["same"]
    manifest["pruned"] = [{"kernel": OTHER, "unit": unfit.id, "via": [[0, 2]], "why": "too much shared memory"}]
    assert diff_facts.diff(side(plan), diff_facts.side(a_bundle(tmp_path, manifest)))["same"]
    assert diff_facts.diff(diff_facts.side(a_bundle(tmp_path, manifest)), side(plan))["same"]


def test_each_side_says_what_the_other_lacks() -> None:
    left = a_plan(units=[a_unit()], tunings=[])
    facts = as_json(diff_facts.diff(side(left), side(a_plan(units=[a_unit(warps=8)])), lambda *_: ["x", "n", "B"]))
    assert not facts["same"]
    assert [u["signature"] for u in facts["only_left"]["units"]] == ["x:*bf16:16 n:i32 B=128 num_warps=4"]
    assert [u["signature"] for u in facts["only_right"]["units"]] == ["x:*bf16:16 n:i32 B=128 num_warps=8"]
    assert facts["only_left"]["tunings"] == []
    assert facts["only_right"]["tunings"][0]["key"] == ["128", "'torch.bfloat16'"]


# --- a bundle on this host --------------------------------------------------------------------------------------------

FITS = [Part("triton", "3.7.1", "3.7.1"), Part("gpu name", "H200", "H100", needed=False)]
MISFIT = Part("arch", "90", "80")


def test_nothing_is_found(tmp_path: Path) -> None:
    found = a_bundle(tmp_path)
    assert bundle_facts.findings(found, None, FITS) == []
    assert bundle_facts.findings(found, found.digest, FITS) == []


def test_every_finding_has_its_bit(tmp_path: Path) -> None:
    failed = [{"kernel": KERNEL, "unit": "0", "error": "E"}]
    path = a_bundle(tmp_path, a_manifest() | {"complete": False, "failed": failed}).path
    data = bytearray(path.read_bytes())
    data[data.index(ONE)] ^= 1  # of a binary: damaged details could not say what failed
    path.write_bytes(data)
    found = as_json(bundle_facts.findings(read_bundle(path), "0" * 64, [*FITS, MISFIT]))
    assert [f["code"] for f in found] == [8, 8, 16, 32]
    assert [f["kind"] for f in found] == ["corrupt", "corrupt", "not for this host", "incomplete"]
    assert found[2]["what"] == "arch: the bundle is for 90, this host has 80"
    assert KERNEL in found[3]["what"]


def test_an_incomplete_bundle_whose_details_are_damaged(tmp_path: Path) -> None:
    found = a_bundle(tmp_path, complete=False, details="0" * 64)
    assert [f["what"] for f in bundle_facts.findings(found, None, FITS)] == [
        "the build is incomplete: something did not compile"
    ]


def test_a_unit_without_its_object(tmp_path: Path) -> None:
    manifest = a_manifest()
    manifest["units"][0]["object"] = "0" * 64
    (found,) = bundle_facts.findings(a_bundle(tmp_path, manifest), None, FITS)
    assert found["code"] == 8


def test_explaining_part_by_part(tmp_path: Path) -> None:
    facts = as_json(bundle_facts.explain(a_bundle(tmp_path), [*FITS, MISFIT]))
    assert [p["status"] for p in facts["parts"]] == ["ok", "costs", "differs"]
    assert not facts["loads"]
    assert bundle_facts.explain(a_bundle(tmp_path), FITS)["loads"]


# --- builds and targets -----------------------------------------------------------------------------------------------


def a_built(path: Path, **more: Any) -> Built:
    return stub_builds.a_built(
        **{"path": path, "size": 10, "units": 3, "compiled": 3, "points": 4, "seconds": 0.5, **more}
    )


def test_a_build_says_what_goes_into_the_dockerfile() -> None:
    facts = as_json(build_facts.built(a_built(Path("/a/b.safetensors"))))
    there = "/opt/aot-cache/b.safetensors"
    assert facts["dockerfile"] == [
        f"COPY /a/b.safetensors {there}",
        f"ENV AOT_CACHE={there} AOT_CACHE_DIGEST={'d' * 64}",
    ]
    assert facts["server"] == "import aot_cache.auto  # before the model"
    assert facts["coverage"] == "enumerated 4 points"


def test_a_bundle_within_the_folder_is_copied_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker's COPY takes paths within its context."""
    monkeypatch.chdir(tmp_path)
    facts = build_facts.built(a_built(Path("c/b")))
    assert (facts["path"], facts["dockerfile"][0]) == (str(tmp_path / "c/b"), "COPY c/b /opt/aot-cache/b")


def test_a_path_that_a_dockerfile_would_take_apart_is_quoted() -> None:
    copy, env = build_facts.built(a_built(Path("/a b/$c d")))["dockerfile"]
    assert json.loads(copy.removeprefix("COPY ")) == ["/a b/\\$c d", "/opt/aot-cache/\\$c d"]
    assert env.startswith('ENV AOT_CACHE="/opt/aot-cache/\\$c d" ')


def test_a_build_that_failed_has_proved_nothing() -> None:
    facts = build_facts.built(a_built(Path("b"), failed=[{"kernel": "k"}], covered=1, declared=4))
    assert (facts["coverage"], facts["covered"], facts["declared"]) == ("not proved: 1 failed", 1, 4)


def test_what_reaches_a_kernel_is_put_together() -> None:
    one = {"a": [{"n": "1..4", "m": "2"}], "b": [{}]}
    other = {"a": [{"n": "3..8", "m": "2"}, {"n": "9", "m": "2,4"}]}
    assert together([one, other]) == {"a": [{"n": "1..8", "m": "2"}, {"n": "9", "m": "2,4"}], "b": [{}]}
    assert together([one, one]) == one and together([]) == {}


def test_boxes_that_overlap_may_hold_more_points_than_a_plan_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel with many specializations over a large case; here with a limit that costs no time."""
    monkeypatch.setattr(dimensions, "expand", functools.partial(dimensions.expand, limit=100))
    many = [{"a": [{"n": f"{n}..{n + 80}", "m": "1"}]} for n in range(9)]
    assert together(many) == {"a": [{"n": "0..88", "m": "1"}]}


def test_targets_are_plain() -> None:
    rows = as_json(build_facts.targets(TARGETS.values()))
    assert [row["id"] for row in rows] == list(TARGETS)
    assert all(row["source"] for row in rows)
    found = [Difference("capability", (9, 0), (9, 1))]
    assert as_json(build_facts.differences("h200", found)) == [
        {"target": "h200", "field": "capability", "table": [9, 0], "device": [9, 1]}
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_623_432, "1.6 MB"), (143 * 10**12, "143000.0 GB")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert terminal.size(count) == text


def test_hostile_text_reaches_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = a_manifest() | {"recipe": "\x1b[31m[bold]red\x07\nsecond line"}
    manifest["cases"][0]["mode"] = manifest["cases"][0]["doc"] = "\x9b2J"
    render_bundle.plan_or_bundle(bundle_facts.bundle(a_bundle(tmp_path, manifest), points=True))
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert "?[31m[bold]red? second line" in out


def test_a_table_that_is_piped_folds_no_name(capsys: pytest.CaptureFixture[str]) -> None:
    name = "a.very.long.module:" + "kernel_" * 40
    terminal.table(("kernel", "n"), [(name, 1)], ("n",))
    assert name in capsys.readouterr().out


def test_tuned_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    tunings = [
        Tuning(kernel=OTHER, tuner=0, key=[n], candidates=[{"num_warps": 1}, {"num_warps": 2}]) for n in range(2)
    ]
    tunings[0] = replace(tunings[0], choice={"num_warps": 1})
    render_bundle.plan_or_bundle(bundle_facts.plan(a_plan(tunings=tunings), Path("p")))
    out = capsys.readouterr().out
    assert "1 of 2" in out and "no choice" in out
    assert "1 choices are not tuned and use the first config that fits" in out


def test_a_plan_that_is_shown_says_each_thing_once(capsys: pytest.CaptureFixture[str]) -> None:
    """What is served at which sizes comes first, then all that reaches each call and each kernel."""
    boxes = ({"batch": "1", "tokens": "1"}, {"batch": "2..4", "tokens": "1"})
    calls = [
        CallPlan(
            function="m:f",
            line=7,
            id=f"{n}",
            mode="inference",
            wrapping={"options": {"epilogue_fusion": True}},
            dynamic={},
            reached={"decode": [box]},
        )
        for n, box in enumerate(boxes)
    ]
    tunings = [
        Tuning(kernel=OTHER, tuner=0, key=[n], candidates=[{"num_warps": 1}, {"num_warps": 2}]) for n in range(2)
    ]
    tunings[0] = replace(tunings[0], choice={"num_warps": 1})
    cases = [replace(a_plan().cases[0], doc="One token each.")]
    shown = build_facts.plan(a_plan(cases=cases, calls=calls, tunings=tunings), Path("p"))
    render_build.plan({**shown, "engine": {}})
    lines = capsys.readouterr().out.splitlines()
    assert "case:      decode: batch=1..4 tokens=1 (4 points, inference): One token each." in lines
    (row,) = [line.split() for line in lines if "m:f " in line]
    assert row == ["decode", "m:f", "c1", "│", "c2"]
    assert lines[lines.index("c1  m:f:7, inference, epilogue_fusion=True, changes nothing") + 1 :][:4] == [
        "  reached by decode: batch 1, tokens 1",
        "",
        "c2  m:f:7, inference, epilogue_fusion=True, changes nothing",
        "  reached by decode: batch 2..4, tokens 1",
    ]
    assert f"{KERNEL}: 1 specialization, 1 config, no choice" in lines
    assert f"{OTHER}: 2 specializations, 2 configs, 1 of 2 choices tuned" in lines
    assert sum(KERNEL in line for line in lines) == 2 == sum("m:f:7" in line for line in lines)


def test_a_build_without_a_terminal_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seconds, lines in ((0.0, ["h200: compile 1/2, ", "h200: compile 2/2, "]), (1e9, [])):
        monkeypatch.setattr(terminal.Progress, "FIRST", seconds)
        monkeypatch.setattr(terminal.Progress, "SECONDS", seconds)
        progress = terminal.Progress()
        progress.target = "h200"
        for done in (1, 2):
            progress("compile", done, 2)
        progress("graphs", 0, 0)  # there are none
        found = capsys.readouterr().err.splitlines()
        assert [line.rpartition(",")[0] + ", " for line in found] == lines


def test_what_will_take_long_is_said_with_what_takes_less(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A range too large to be run in reasonable time is known by its first points."""
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    progress = terminal.Progress()
    for seconds, done in ((0, 0), (20, 64), (700, 10_000), (1400, 16_000)):
        now[0] = seconds
        progress("trace", done, 16_384)
    assert capsys.readouterr().err.splitlines() == [
        "trace 64/16384, 20 s, about 85 min left; hint: a narrower --range takes less",
        "trace 10000/16384, 700 s",
        "trace 16000/16384, 1400 s",
    ]
