"""`aot-cache build --plan-matrix` and `--on`: what is built, what is refused, and that it is the same bytes on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS
from processes import MARK, left, marked

from aot_cache.builder import matrix, on_ray
from aot_cache.builder.matrix import Done, Outcome, Unit
from aot_cache.cli.main import main

Json = Any
ROOT = Path(__file__).parents[1]
Run = Callable[..., tuple[int, str, str]]


def bundle(**more: Json) -> Json:
    """What a build command says of a bundle of two specializations, but for what is given."""
    counts = {"units": 2, "graphs": 0, "compiled": 2, "points": 3, "size": 9}
    return {**counts, "complete": True, "written": True, "nothing_to_do": False, "digest": "d" * 64, **more}


class Pretended:
    """Builds that are none: the units that were asked for, and the outcome of each."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self.units: list[Unit] = []
        self.outcomes: dict[str, tuple[int, Json]] = {}
        """Label → exit code and document; one that is not in it is built."""

    def written(self, name: str) -> str:
        """The path of a bundle, which is there."""
        path = self.store / name.replace("/", "-")
        path.touch()
        return str(path)

    def run_here(self, units: list[Unit], folder: Path, environment: Json, done: Done) -> None:
        self.units = units
        for unit in units:
            code, document = self.outcomes.get(unit.label, (0, {"bundles": [bundle(path=self.written(unit.label))]}))
            done(Outcome(unit=unit, exit_code=code, document=document, seconds=1.0, host="h"))


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Pretended:
    made = Pretended(tmp_path_factory.mktemp("store"))
    monkeypatch.setattr(matrix, "run_here", made.run_here)
    return made


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`aot-cache build --plan-matrix m.json ARGUMENTS`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(content: Json, *arguments: str) -> tuple[int, str, str]:
        (tmp_path / "m.json").write_text(content if isinstance(content, str) else json.dumps(content))
        code = main(["build", "--plan-matrix", "m.json", *arguments])
        return code, *capsys.readouterr()

    return call


# --- what is built ----------------------------------------------------------------------------------------------------


def test_builds_times_targets_times_versions(run: Run, builds: Pretended, tmp_path: Path) -> None:
    asked = {
        "builds": [
            {"model": "qwen3.5", "spec": "mtp", "max-batch": 64, "option": ["a=1", "b=x y"], "rehearse": False},
            {"plan": ["a.json", "b.json"], "line-info": True, "target": "native"},
            {"engine": "vllm", "arguments": ["MODEL", "--max-num-seqs", "64"], "neighbours": True, "target": ["h100"]},
        ],
        "targets": ["h200", "cpu"],
        "versions": {"old": "/old/bin/python", "new": "/new/bin/python"},
    }
    code, out, err = run(asked, "--store", "s", "--workers", "3", "--json")
    assert (code, json.loads(out)["units"]) == (0, 8), err
    one = ("--option=a=1", "--option=b=x y", "--no-rehearse")
    words = {unit.label: (unit.python, unit.arguments) for unit in builds.units}
    assert words["qwen3.5 spec=mtp max-batch=64 option=a=1 b=x y rehearse=False cpu new"] == (
        "/new/bin/python",
        (
            "--workers=3",
            f"--store={tmp_path}/s/new",
            "--target=cpu",
            "--model=qwen3.5",
            "--spec=mtp",
            "--max-batch=64",
            *one,
        ),
    )
    assert words["a.json b.json line-info=True native old"] == (
        "/old/bin/python",
        (
            "--workers=3",
            f"--store={tmp_path}/s/old",
            "--target=native",
            "--plan=a.json",
            "--plan=b.json",
            "--line-info",
        ),
    )
    assert words["vllm MODEL --max-num-seqs 64 neighbours=True h100 old"][1][2:] == (
        *("--target=h100", "--engine=vllm", "--neighbours"),
        *("--", "MODEL", "--max-num-seqs", "64"),
    )


def test_without_targets_the_machine_that_builds_chooses(run: Run, builds: Pretended) -> None:
    assert run({"builds": [{"model": "m:r"}]})[0] == 0
    assert [word for word in builds.units[0].arguments if word.startswith("--target")] == []


@pytest.mark.parametrize("how", ["option", "variable"])
def test_a_remote_store_is_for_all_builds(
    run: Run, builds: Pretended, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The variable, too: on Ray, a build has the environment of its machine."""
    if how == "variable":
        monkeypatch.setenv("AOT_CACHE_REMOTE_STORE", "s3://bucket/store")
    words = ["--remote-store", "s3://bucket/store"] if how == "option" else []
    assert run({"builds": [{"model": "a"}, {"model": "b"}]}, *words)[0] == 0
    assert all("--remote-store=s3://bucket/store" in unit.arguments for unit in builds.units) and len(builds.units) == 2


def test_a_command_line_is_a_matrix_on_ray(
    builds: Pretended, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(units: list[Unit], on: str, cores: int, folder: Path, done: Done) -> None:
        assert (on, cores, folder) == ("ray://head:10001", 1, tmp_path)
        builds.run_here(units, folder, {}, done)

    monkeypatch.setattr(on_ray, "check", lambda on: None)
    monkeypatch.setattr(on_ray, "run", run)
    monkeypatch.chdir(tmp_path)
    words = ["--model", "m:r", "--target", "h200", "--target", "a100", "--plan", "p.json", "--no-rehearse", "--tp", "2"]
    assert main(["build", *words, "--on", "ray://head:10001", "--json"]) == 0
    assert [row["target"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["h200", "a100"]
    more = ("--model=m:r", "--tp=2", "--plan=p.json", "--no-rehearse")
    assert builds.units[1].arguments == ("--workers=1", f"--store={tmp_path}/artifacts", "--target=a100", *more)


def test_all_of_these_are_options_of_the_command(run: Run, builds: Pretended, tmp_path: Path) -> None:
    """What a unit is asked is understood by the command that it is: a target that there is not is found before all else."""
    asked = {"model": "m:r", "range": ["n=1..2"], "at-start": "n", "python": "p", "misses": [], "ranks": 2, "tp": 1}
    run({"builds": [asked]})
    assert main(["build", *builds.units[0].arguments, "--target", "nowhere"]) == 3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "matrix m.json is not JSON"),
        ([], "matrix m.json: there is no list of builds"),
        ({"builds": []}, "there is no list of builds"),
        ({"builds": ["m:r"]}, "there is no list of builds"),
        ({"builds": [{"model": "m:r"}], "target": ["h200"]}, "unknown key 'target'"),
        ({"builds": [{"model": "m:r"}], "targets": "h200"}, "a list of names as targets"),
        ({"builds": [{"model": "m:r"}], "versions": {"a": 1}}, "names with a Python each as versions"),
        ({"builds": [{"model": "m:r"}], "versions": {"../a": "p"}}, "names with a Python each as versions"),
        ({"builds": [{"model": "m:r"}, {"modle": "m:r"}]}, "build 2: unknown key 'modle'"),
        ({"builds": [{"model": "m:r", "store": "s"}]}, "unknown key 'store'"),
        ({"builds": [{"model": "m:r", "json": True}]}, "unknown key 'json'"),
        ({"builds": [{"model": ["m:r"]}]}, "a text or a number as 'model'"),
        ({"builds": [{"model": None}]}, "a text or a number as 'model'"),
        ({"builds": [{"model": "m:r", "line-info": "yes"}]}, "true or false as 'line-info'"),
        ({"builds": [{"model": "m:r", "option": [{}]}]}, "a list of texts as 'option'"),
        ({"builds": [{"model": "m:r", "target": 5}]}, "a list of texts as 'target'"),
        ({"builds": [{"engine": "vllm", "arguments": "M"}]}, "a list of texts as 'arguments'"),
        ({"builds": [{"model": "m:r"}], "targets": ["h201"]}, "build 1: unknown target 'h201'"),
        ({"builds": [{"model": "m:r"}, {"model": "m:r"}]}, "build 2: m:r is there twice"),
        (
            {"builds": [{"model": "m:r", "out": "b"}], "targets": ["h200", "b200"]},
            "one target and one version with out",
        ),
    ],
)
def test_a_matrix_that_is_none(run: Run, builds: Pretended, content: Json, words: str) -> None:
    code, out, err = run(content, "--json")
    assert code == 3 and words in err and err.count("\n") <= 2 and not builds.units
    assert list(json.loads(out)) == ["error"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "m:r", "--target", "h200"], "no options of one build beside --plan-matrix, found model, target"),
        (["--on", "cluster:6379"], "`ray` or ray://HOST:PORT as --on"),
    ],
)
def test_what_does_not_go_together(run: Run, builds: Pretended, arguments: list[str], words: str) -> None:
    code, _, err = run({"builds": [{"model": "m:r"}]}, *arguments)
    assert code == 3 and words in err and not builds.units


def test_a_matrix_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--plan-matrix", str(tmp_path / "none.json")]) == 3
    assert f"cannot read matrix {tmp_path}/none.json: No such file" in capsys.readouterr().err


def test_without_ray_it_says_how_to_get_it(run: Run, builds: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    code, _, err = run({"builds": [{"model": "m:r"}]}, "--on", "ray")
    assert code == 3 and 'hint: pip install "aot-cache[ray]"' in err


# --- what is said of it -----------------------------------------------------------------------------------------------


def test_what_failed_is_named_and_the_rest_is_built(run: Run, builds: Pretended) -> None:
    error = {"message": "unknown model 'b'", "exit_code": 3}
    builds.outcomes = {
        "b h200": (3, {"error": error}),
        "c h200": (
            4,
            {"bundles": [bundle(path=builds.written("c"), complete=False)], "error": {"message": "1 of 2"}},
        ),
        "d h200": (0, {"bundles": [bundle(path=builds.written("d"), compiled=0, nothing_to_do=True)]}),
    }
    asked = {"builds": [{"model": model} for model in "abcd"], "targets": ["h200"]}
    code, out, err = run(asked, "--json")
    document = json.loads(out)
    assert code == document["error"]["exit_code"] == 4
    assert "2 of 4 builds failed or are incomplete: b h200 (failed), c h200 (incomplete)" in err
    rows = {row["name"]: row for row in document["rows"]}
    assert [row["state"] for row in rows.values()] == ["built", "failed", "incomplete", "nothing to do"]
    assert [row["exit_code"] for row in rows.values()] == [0, 3, 4, 0]
    assert [(row["compiled"], row["reused"]) for row in rows.values()] == [(2, 0), (0, 0), (2, 0), (0, 2)]
    assert rows["b"]["error"] == "unknown model 'b'"
    code, out, _ = run(asked)
    assert "b h200: failed: unknown model 'b'" in out and f"bundle: {builds.store}/d  {'d' * 64}" in out


def test_two_builds_that_write_the_same_file(run: Run, builds: Pretended) -> None:
    """Recipes may have one name, and the last would have replaced the first."""
    same = {"bundles": [bundle(path=builds.written("recipe-h200"))]}
    builds.outcomes = {"a h200": (0, same), "b h200": (0, same)}
    code, _, err = run({"builds": [{"model": "a"}, {"model": "b"}], "targets": ["h200"]})
    assert code == 4 and "1 of 2 builds failed or are incomplete: b h200 (failed)" in err


def test_a_bundle_on_a_machine_with_another_store(run: Run, builds: Pretended) -> None:
    builds.outcomes = {"a h200": (0, {"bundles": [bundle(path="/no/such/store/a")]})}
    code, out, _ = run({"builds": [{"model": "a"}], "targets": ["h200"]})
    assert code == 4 and "/no/such/store/a is on h, and not here: all machines must see one --store" in out


def test_what_was_built_before_an_interrupt_is_said(
    run: Run, builds: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(units: list[Unit], folder: Path, environment: Json, done: Done) -> None:
        builds.run_here(units[:1], folder, environment, done)
        raise KeyboardInterrupt

    monkeypatch.setattr(matrix, "run_here", interrupted)
    code, out, err = run({"builds": [{"model": "a"}, {"model": "b"}]}, "--json")
    assert code == 130 and "run it again to continue: what is done is kept" in err
    assert [row["name"] for row in json.loads(out)["rows"]] == ["a"]


# --- real ones --------------------------------------------------------------------------------------------------------


def test_a_real_matrix_in_a_process(tmp_path: Path) -> None:
    """Its plan alone; then with a recipe that there is not; then with an interpreter that there is not."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools" / "workloads")])}

    def command(models: list[str], versions: dict[str, str], *arguments: str) -> tuple[int, list[Json], str]:
        builds = [{"model": f"small_kernels:{model}"} for model in models]
        (tmp_path / "m.json").write_text(json.dumps({"builds": builds, "targets": ["h200"], "versions": versions}))
        words = [sys.executable, "-m", "aot_cache", "build", "--plan-matrix", "m.json", "--store", "s", "--json"]
        done = subprocess.run(
            [*words, *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )
        return done.returncode, json.loads(done.stdout)["rows"], done.stderr

    code, (planned,), err = command(["small"], {}, "--show-plan")
    assert (code, planned["state"], planned["points"]) == (0, "planned", 3), err
    assert planned["plan"]["kernels"][0]["specializations"] == 2 and not (tmp_path / "s" / "bundles").exists()
    code, (built, none), err = command(["small", "none"], {})
    assert (code, built["state"], none["state"]) == (4, "built", "failed")
    assert "1 of 2 builds failed or are incomplete: small_kernels:none h200 (failed)" in err and "none" in none["error"]
    assert built["path"] == f"{tmp_path}/s/bundles/small-h200.safetensors" and Path(built["path"]).exists()
    code, (lost,), _ = command(["small"], {"v": "/no/such/python"})
    assert code == 4 and "/no/such/python" in lost["error"]


def test_sigterm_ends_the_build_that_runs(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text(json.dumps({"builds": [{"model": "small_kernels:small"}], "targets": ["h200"]}))
    mark = str(tmp_path)
    with subprocess.Popen(
        [sys.executable, "-m", "aot_cache", "build", "--plan-matrix", "m.json"],
        env={**os.environ, MARK: mark, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools" / "workloads")])},
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as running:
        while len(marked(mark)) < 3:  # itself, the build, and the guard that would end it
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        assert running.wait(HANGS) == 128 + signal.SIGTERM
    assert left(mark) == {}


def test_on_ray_with_a_worker_killed(tmp_path: Path) -> None:
    """As `tools/check_matrix` does it with more targets: the bytes of one machine, and the lost build is started again."""
    pytest.importorskip("ray")
    command = [
        sys.executable,
        str(ROOT / "tools" / "check_matrix"),
        "--targets",
        "h200",
        "--only",
        "one,killed,stopped",
    ]
    out = tmp_path / "record.json"
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=HANGS, check=False, cwd=tmp_path
    )
    if "error: no Ray at ray" in done.stderr:
        pytest.skip("Ray does not start here within its own time limits")  # which a busy machine exceeds
    assert out.exists(), done.stderr
    claims = json.loads(out.read_text())["claims"]
    assert len(claims) == 5 and all(claims.values()), claims
