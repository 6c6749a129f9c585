"""What an engine compiled itself, from a recording into a bundle and back, with a small package that has vLLM's names.

That vLLM itself has these names and this order is what `test_vllm_contract.py` and `tools/check_vllm` hold.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from limits import HANGS
from test_vllm_plugin import FAKE, ROOT, environment, serve
from typer.testing import CliRunner

from aot_cache.artifact import engine_cache
from aot_cache.artifact import target as targets
from aot_cache.artifact.engine_cache import Caches
from aot_cache.artifact.manifest import served, whole
from aot_cache.artifact.plan import Plan
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Request
from aot_cache.cli.main import app
from aot_cache.engines.vllm import compile_cache
from aot_cache.errors import BundleCorrupt, DeclarationError
from aot_cache.store import read_bundle, signature
from aot_cache.upstream.hooks.inductor_choices import SUFFIX

Json = Any


def entry(files: dict[str, bytes], key: str = "k", factors: dict[str, str] | None = None) -> Caches:
    return engine_cache.one_entry("vllm", "compiled model", key, factors or {}, files)


# --- the file beside a plan -------------------------------------------------------------------------------------------


def test_ranks_are_one_entry() -> None:
    ranks = [entry({f"rank_{n}/model": b"model %d" % n, "shared": b"from %d" % n}) for n in range(3)]
    together = engine_cache.merged(ranks)
    (found,) = together.entries
    assert sorted(found.files) == ["rank_0/model", "rank_1/model", "rank_2/model", "shared"]
    assert together.objects[found.files["shared"]] == b"from 0" and set(together.objects) == found.objects()
    assert len(engine_cache.merged([*ranks, entry({"a": b""}, key="other")]).entries) == 2


@pytest.mark.parametrize("path", ["../x", "/x", "a/../x", "", "a/./b", "..", "a\\..\\b"])
def test_no_path_leads_out(path: str) -> None:
    with pytest.raises(ValueError, match="within the entry"):
        entry({path: b""})


def test_a_plan_names_the_file_beside_it(tmp_path: Path) -> None:
    plan = Plan(recipe="r", target="none", origin="recorded")
    out = tmp_path / "server.plan.json"
    written = engine_cache.write_plan(plan, entry({"a": b"1"}), out)
    assert Plan.read(out) == written and engine_cache.beside(out).name == "server.caches.safetensors"
    (found,) = engine_cache.of_plans([out]).entries
    assert list(found.files) == ["a"]
    engine_cache.write(engine_cache.beside(out), entry({"a": b"2"}))  # another recording's
    with pytest.raises(DeclarationError, match="cannot read the engine's caches"):
        engine_cache.of_plans([out])
    engine_cache.beside(out).unlink()
    with pytest.raises(DeclarationError, match="keep the file beside its plan"):
        engine_cache.of_plans([out])
    assert "caches" not in engine_cache.write_plan(plan, Caches(), out).to_json()
    assert not engine_cache.of_plans([out]).entries


def test_another_bundle_beside_a_plan(tmp_path: Path) -> None:
    from aot_cache.store import write_bundle

    digest = write_bundle(tmp_path / "p.caches.safetensors", {"kind": "units"}, {})
    replace(Plan(recipe="r", target="none"), caches=digest).write(tmp_path / "p.plan.json")
    with pytest.raises(DeclarationError, match="no caches of an engine"):
        engine_cache.of_plans([tmp_path / "p.plan.json"])


def test_merged_plans_keep_their_entries(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plan = Plan(recipe=name, target="none", origin="recorded")
        engine_cache.write_plan(plan, entry({"file": name.encode()}, key=name), tmp_path / f"{name}.plan.json")
    paths = [str(tmp_path / f"{name}.plan.json") for name in ("a", "b")]
    ran = CliRunner().invoke(app, ["merge", *paths, "--out", str(tmp_path / "all.plan.json"), "--json"])
    assert ran.exit_code == 0 and json.loads(ran.stdout)["engine_caches"] == 2, ran.output
    assert [one.key for one in engine_cache.of_plans([tmp_path / "all.plan.json"]).entries] == ["a", "b"]


def test_a_plan_without_kernels_needs_a_recipe(tmp_path: Path) -> None:
    plan = tmp_path / "only.plan.json"
    engine_cache.write_plan(Plan(recipe="r", target="none", origin="recorded"), entry({"a": b""}), plan)
    with pytest.raises(DeclarationError, match="name a recipe with --model"):
        pipeline.build(Request(plans=(plan,), target=targets.get("h200"), store=tmp_path / "store"))


# --- from vLLM, and back ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan of a run in which vLLM has compiled its model, without a bundle."""
    folder = tmp_path_factory.mktemp("recorded")
    out = folder / "server.plan.json"
    command = [sys.executable, "-W", "ignore", "-m", "aot_cache", "record", "--out", str(out), "--"]
    command += [sys.executable, str(FAKE / "server.py"), "spawn"]
    given = environment(folder, VLLM_CACHE_ROOT=str(folder / "root"), VLLM_CONFIG_ROOT="/home/me")
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["worker"]["models"] == {"compiled": 1, "loaded": 0, "measured": 0}
    assert "recorded the engine's compile cache in" in done.stderr
    return out


@pytest.fixture(scope="module")
def bundle(recorded: Path) -> Path:
    out = recorded.parent / "bundle.safetensors"
    asked = ["--model", "fake_vllm_model:recipe", "--plan", str(recorded), "--target", "cpu", "--no-rehearse"]
    asked += ["--store", str(recorded.parent / "store"), "--out", str(out)]
    command = [sys.executable, "-m", "aot_cache", "build", *asked]
    given = environment(recorded.parent)
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_what_is_recorded(recorded: Path) -> None:
    found = engine_cache.of_plans([recorded])
    model, info = found.entries
    assert (model.engine, model.kind, info.kind, info.key) == (
        "vllm",
        "compiled model",
        "model info",
        "fake.models-Fake.json",
    )
    (choice,) = [name for name in model.files if name.startswith("inductor_cache/ab/") and name.endswith(SUFFIX)]
    assert sorted(model.files) == [
        choice,
        "rank_0_0/model",
        "subgraphs/rank_0_0/backbone/artifact_compile_range_1_64_subgraph_0",
        "subgraphs/rank_0_0/backbone/vllm_compile_cache.py",
    ]
    factors = json.loads(found.objects[model.factors])
    assert factors["config.compilation_config.level"] == "3" and factors["env.VLLM_CONFIG_ROOT"] == "'/home/me'"
    assert factors["source.fake_vllm_model"] and factors["inductor.epilogue_fusion"] == "True"
    assert not any(b"hunter2" in data for data in found.objects.values()), "a secret is in the recording"


def test_what_is_in_the_bundle(bundle: Path) -> None:
    found = read_bundle(bundle)
    assert not found.check_all()
    assert [one.kind for one in served(found).engine_caches] == ["compiled model", "model info"]
    assert whole(found).engine_caches == served(found).engine_caches
    ran = CliRunner().invoke(app, ["inspect", str(bundle), "--json"])
    facts = json.loads(ran.stdout)
    assert [(one["kind"], one["files"]) for one in facts["engine_caches"]] == [("compiled model", 4), ("model info", 1)]
    assert sum(row["bytes"] for row in facts["sizes"]) == found.size
    assert "1 compiled model, 1 model info" in CliRunner().invoke(app, ["inspect", str(bundle)]).stdout


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_vllm_compiles_nothing(bundle: Path, tmp_path: Path, method: str) -> None:
    """Another user, with empty folders: vLLM's own counts. Inductor's choice is found, and nothing is put into vLLM's folder."""
    found, log = serve(
        tmp_path,
        method,
        AOT_CACHE=str(bundle),
        VLLM_CACHE_ROOT=str(tmp_path / "root"),
        VLLM_CONFIG_ROOT="/home/you",
        TMPDIR=str(tmp_path),
    )
    worker = found["worker"]
    assert worker["models"] == {"compiled": 0, "loaded": 1, "measured": 0} and found["children"] == 0
    assert worker["cache_dir"] == "", "where other models are kept is as it was"
    assert worker["stats"]["total"]["graph"] == 2 and worker["stats"]["total"]["rejected_bundle"] == 0
    assert any("1 of 1 models that vLLM compiles were in the bundle" in line for line in log)
    assert not [file for file in (tmp_path / "root").rglob("*") if file.is_file()]
    assert not list(tmp_path.glob("aot-cache-vllm-*"))


def test_what_vllm_has_itself_comes_first(bundle: Path, tmp_path: Path) -> None:
    for loaded in (0, 1):
        given = {"AOT_CACHE_POLICY": "observe"} if not loaded else {"AOT_CACHE": str(bundle)}
        found, log = serve(tmp_path, "spawn", VLLM_CACHE_ROOT=str(tmp_path / "root"), **given)
        assert found["worker"]["models"] == {"compiled": 1 - loaded, "loaded": loaded, "measured": 0}
    assert not any("models that vLLM compiles" in line for line in log)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"FAKE_LEVEL": "2"}, "config.compilation_config.level is 2, it was compiled with 3"),
        ({"VLLM_USE_TRITON_AWQ": "1"}, "env.VLLM_USE_TRITON_AWQ is '1', it was compiled with None"),
    ],
)
def test_another_configuration_is_named(bundle: Path, tmp_path: Path, given: dict[str, str], words: str) -> None:
    root = {"VLLM_CACHE_ROOT": str(tmp_path / "root"), "VLLM_CONFIG_ROOT": "/home/you"}
    found, log = serve(tmp_path, "spawn", AOT_CACHE=str(bundle), **root, **given)
    assert found["worker"]["models"] == {"compiled": 1, "loaded": 0, "measured": 0} and found["exit"] == 0
    (line,) = [line for line in log if "WARNING" in line]
    assert "vLLM compiles vllm.compilation.decorators:Model.forward itself" in line and words in line
    assert any("0 of 1 models that vLLM compiles were in the bundle" in line for line in log)


def test_changed_source_is_named(bundle: Path, tmp_path: Path) -> None:
    package = tmp_path / "fake"
    subprocess.run(["cp", "-r", str(FAKE), str(package)], check=True)
    with (package / "fake_vllm_model.py").open("a") as file:
        file.write("# changed\n")
    given = environment(tmp_path, AOT_CACHE=str(bundle), VLLM_CACHE_ROOT=str(tmp_path / "root"))
    given["PYTHONPATH"] = f"{package}{os.pathsep}{ROOT}"
    command = [sys.executable, "-W", "ignore", str(package / "server.py"), "spawn"]
    ran = subprocess.run(command, env=given, capture_output=True, text=True, timeout=HANGS, check=False)
    assert json.loads(ran.stdout)["worker"]["models"] == {"compiled": 1, "loaded": 0, "measured": 0}, ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if "LOG vllm.aot_cache WARNING" in line]
    assert f"other source than it was compiled from: {package}/fake_vllm_model.py" in line


def test_another_class_is_looked_at_by_vllm(bundle: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    found, _ = serve(tmp_path, "spawn", AOT_CACHE=str(bundle), VLLM_CACHE_ROOT=root, FAKE_HASH="2")
    assert found["children"] == 1


def test_a_digest_pins_what_the_api_server_reads(bundle: Path, tmp_path: Path) -> None:
    pinned = {"AOT_CACHE": str(bundle), "AOT_CACHE_DIGEST": "0" * 64, "VLLM_CACHE_ROOT": str(tmp_path / "root")}
    found, _ = serve(tmp_path, "spawn", **pinned)
    assert found["children"] == 1 and found["worker"]["models"] == {"compiled": 1, "loaded": 0, "measured": 0}


def test_what_the_api_server_reads_is_signed(bundle: Path, tmp_path: Path) -> None:
    """Also the worker, where it has no bundle then."""
    key = Ed25519PrivateKey.generate()
    public = tmp_path / "public.pem"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(bundle.read_bytes())
    given = {"AOT_CACHE": str(copy), "AOT_CACHE_TRUSTED_KEYS": str(public), "VLLM_CACHE_ROOT": str(tmp_path / "root")}
    found, log = serve(tmp_path, "spawn", **given)
    assert found["children"] == 1 and found["worker"]["models"] == {"compiled": 1, "loaded": 0, "measured": 0}
    assert any("serves without a bundle (1 refused)" in line for line in log)
    signature.sign(copy, read_bundle(copy).digest, key)
    found, _ = serve(tmp_path, "spawn", **given | {"VLLM_CACHE_ROOT": str(tmp_path / "another")})
    assert found["children"] == 0 and found["worker"]["models"] == {"compiled": 0, "loaded": 1, "measured": 0}


def test_hostile_factors_are_a_damaged_bundle(tmp_path: Path) -> None:
    from aot_cache.store import write_bundle

    caches = entry({"a": b""})
    data = b"[1, 2]"
    digest = hashlib.sha256(data).hexdigest()
    write_bundle(tmp_path / "b.safetensors", {"kind": "units"}, {digest: data})
    with pytest.raises(BundleCorrupt, match="factors"):
        engine_cache.factors_of(read_bundle(tmp_path / "b.safetensors"), replace(caches.entries[0], factors=digest))


def test_what_cannot_be_recorded_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """vLLM goes on whatever is wrong with what we ask of its objects."""
    from aot_cache.engines.vllm import compile_cache

    hooked: list[Any] = []
    monkeypatch.setattr(compile_cache.hook, "around_load", hooked.append)
    monkeypatch.setattr(compile_cache.hook, "when_model_info_is_known", hooked.append)
    kept: list[Caches] = []
    recorder = compile_cache.Recorder(kept.append)
    recorder.start()
    compile_cache.record_model_info(kept.append)
    answer, known = hooked
    assert answer(object(), Path("root/key/rank_0_0/model"), lambda path: path.name) == "model"
    known(Path("nowhere"))
    recorder.finish()
    assert kept == [] and [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


def test_settings_as_they_were_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = {
        "inductor.cpp.cxx": "(None, '/there/g++')",
        "inductor.cuda.cuda_cxx": "'/a/very/long… 0123",
        "model": "m",
    }
    monkeypatch.setattr(engine_cache, "factors_of", lambda *_: factors)
    cached: Any = (None, None)
    assert compile_cache._moved_settings(cached) == {"cpp.cxx": (None, "/there/g++")}
