"""aot_cache.runtime without a GPU: what `import aot_cache.auto` does to a process, and that a bad bundle does no harm.

Each in a process of its own, as a server would be; the bundle is a real one. What needs a device is in tests/gpu, what
needs none but Triton's caches in tests/on_target.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from limits import HANGS

from aot_cache.artifact import manifest as manifests
from aot_cache.artifact import target as targets
from aot_cache.artifact.manifest import served
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Request
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.facts import files as file_facts
from aot_cache.errors import AotCacheError, BundleMissing, Incompatible, Untrusted
from aot_cache.runtime import bundle_lookup, host_check
from aot_cache.runtime.ledger import HARMFUL, KINDS, Ledger
from aot_cache.runtime.session import Session
from aot_cache.store import read_bundle, signature, write_bundle

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One case of the samples, built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        request = Request(
            target=targets.get("h200"), store=tmp_path_factory.mktemp("store"), model="sample_kernels:packed", workers=2
        )
        built = pipeline.build(request)
    assert not built.failed
    return built.path


def altered(bundle: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A sound bundle with another manifest."""
    found = read_bundle(bundle)
    manifest = json.loads(json.dumps(found.manifest))
    objects = {digest: bytes(found.object(digest)) for digest in manifest.pop("objects")}
    change(manifest)
    write_bundle(path, manifest, objects)
    return path


# A server: what it imports, in which order, and what is then true of it, as one line of JSON.
SERVER = """
import json, sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    facts, error = {}, None
    try:
        %s
    except Exception as failure:
        error = [type(failure).__name__, str(failure), getattr(failure, "exit_code", None)]
ours = [str(w.message) for w in caught if w.category.__name__ == "AotCacheWarning"]
files = [w.filename for w in caught if w.category.__name__ == "AotCacheWarning"]
facts |= {"error": error, "warnings": ours, "files": files}
facts["imported"] = [name for name in ("torch", "triton", "fla", "numpy") if name in sys.modules]
if "aot_cache" in sys.modules:
    import aot_cache
    facts["stats"] = aot_cache.stats()
print(json.dumps(facts))
"""


@dataclass
class Served:
    """What a process said of itself."""

    facts: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.facts[name]


def serve(code: str, **environment: str) -> Served:
    """Run `code` (statements, separated by ;) in a process without a GPU."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("AOT_CACHE")}
    done = subprocess.run(
        [sys.executable, "-c", SERVER % code.replace("\n", "\n        ")],
        env={
            **clean,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "AOT_CACHE_UNTESTED": "1",  # as in tests/conftest.py
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Served(json.loads(done.stdout.splitlines()[-1]))


# --- what an import does ----------------------------------------------------------------------------------------------


def test_without_a_bundle_nothing_happens() -> None:
    served = serve(
        "import aot_cache.auto; facts['loader'] = sorted(m for m in sys.modules if m.startswith('aot_cache.'))"
    )
    assert served.error is None and served.warnings == [] and served.imported == []
    assert served.stats["bundles"] == [] and not any(served.stats["total"].values())


def test_an_empty_name_is_no_bundle() -> None:
    served = serve("import aot_cache.auto", AOT_CACHE="")
    assert served.error is None and served.warnings == [] and served.stats["bundles"] == []


def test_a_bundle_is_loaded_without_torch_or_triton(bundle: Path) -> None:
    served = serve("import aot_cache.auto", AOT_CACHE=str(bundle))
    assert served.error is None and served.warnings == [] and served.imported == []
    (report,) = served.stats["bundles"]
    assert report["units"] > 0 and report["installed"] == 0 and report["digest"] == read_bundle(bundle).digest
    assert served.stats["total"]["rejected_bundle"] == 0


def test_several_bundles_are_loaded(bundle: Path, tmp_path: Path) -> None:
    other = altered(bundle, tmp_path / "other.safetensors", lambda manifest: manifest.update(recipe="another"))
    paths, digests = [str(bundle), str(other)], [read_bundle(path).digest for path in (bundle, other)]
    for pinned in ({}, {"AOT_CACHE_DIGEST": os.pathsep.join(digests)}):
        served = serve("import aot_cache.auto", AOT_CACHE=os.pathsep.join(paths), **pinned)
        assert served.warnings == [] and [report["digest"] for report in served.stats["bundles"]] == digests
    turned = serve(
        "import aot_cache.auto", AOT_CACHE=os.pathsep.join(paths), AOT_CACHE_DIGEST=os.pathsep.join(digests[::-1])
    )
    assert len(turned.warnings) == 2 and turned.stats["bundles"] == []


def test_the_same_bundle_is_loaded_once(bundle: Path, tmp_path: Path) -> None:
    """By the environment, by the server's code, by many threads, and from a copy."""
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(bundle.read_bytes())
    code = f"""
import aot_cache.auto, threading
def again():
    facts.setdefault("reports", []).append(aot_cache.load({str(copy)!r}).digest)
threads = [threading.Thread(target=again) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    served = serve(code, AOT_CACHE=os.pathsep.join([str(bundle), str(bundle)]))
    assert served.error is None and served.warnings == [] and len(served.reports) == 16
    assert [report["digest"] for report in served.stats["bundles"]] == [read_bundle(bundle).digest]


def test_a_missing_digest_pins_nothing_silently(bundle: Path) -> None:
    """Which of the bundles it is of cannot be known: none is loaded."""
    given = {"AOT_CACHE": f"{bundle}{os.pathsep}{bundle}", "AOT_CACHE_DIGEST": read_bundle(bundle).digest}
    served = serve("import aot_cache.auto", **given)
    (warning,) = served.warnings
    assert "each of the 2 bundles" in warning and served.stats["bundles"] == []
    assert served.stats["total"]["rejected_bundle"] == 1
    strict = serve("import aot_cache.auto", AOT_CACHE_STRICT="1", **given)
    assert "each of the 2 bundles" in strict.error[1]


def test_loading_initialises_no_gpu(bundle: Path) -> None:
    code = "import torch, triton; import aot_cache.auto; facts['up'] = torch.cuda.is_initialized()"
    served = serve(code, AOT_CACHE=str(bundle))
    assert served.error is None and served.up is False and served.warnings == []
    assert served.stats["bundles"][0]["devices"] == []


def test_load_and_ready_log_a_line_each(bundle: Path) -> None:
    code = (
        "import logging, aot_cache; facts['lines'] = lines = []; handler = logging.Handler(); "
        "handler.emit = lambda record: lines.append([record.levelname, record.getMessage()]); "
        "logger = logging.getLogger('aot_cache'); logger.addHandler(handler); logger.setLevel('INFO'); "
        f"report = aot_cache.load({str(bundle)!r}); aot_cache.ready(); facts['units'] = report.units"
    )
    served = serve(code)
    loaded = f"loaded {bundle} (digest {read_bundle(bundle).digest[:16]}): {served.units} specializations, 0 graphs"
    ready = f"ready: 0 of {served.units} specializations and 0 compiled graphs are loaded"
    assert served.lines == [["INFO", loaded], ["INFO", ready]]


ORDERS = {
    "bundle, triton": "import aot_cache.auto; import triton",
    "bundle, torch, triton": "import aot_cache.auto; import torch; import triton",
    "triton, bundle": "import triton; import aot_cache.auto",
    "bundle, a room of triton": "import aot_cache.auto; import triton.runtime.jit",
    "bundle, the language": "import aot_cache.auto; import triton.language",
    "two bundles": "import aot_cache.auto; import os; aot_cache.load(os.environ['AOT_CACHE']); import triton",
    "bundle, a look whether there is a triton": (
        "import aot_cache.auto; import importlib.util as u\n"
        "assert u.find_spec('triton') and u.find_spec('triton.runtime') and u.find_spec('triton.runtime.jit')\n"
        "import triton"
    ),
}
ARMED = (
    "\nfrom triton import knobs; from triton.runtime.jit import JITFunction; from triton.runtime.autotuner import Autotuner\n"
    "facts['hooks'] = [JITFunction._do_compile.__module__, Autotuner._bench.__module__,"
    " knobs.compilation.listener.__module__]"
)


@pytest.mark.parametrize("order", ORDERS)
def test_triton_is_hooked_in_any_order(order: str, bundle: Path) -> None:
    served = serve(ORDERS[order] + ARMED, AOT_CACHE=str(bundle))
    assert served.error is None and served.warnings == []
    assert served.hooks == [f"aot_cache.upstream.hooks.triton_{room}" for room in ("miss", "tuner_miss", "events")]


def test_a_kernel_s_module_that_comes_late_does_no_harm(bundle: Path) -> None:
    code = "import aot_cache.auto; import sample_kernels; facts['reports'] = [r.to_json() for r in aot_cache.ready()]"
    served = serve(code, AOT_CACHE=str(bundle), PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    assert served.error is None and len(served.reports) == 1


def test_an_import_of_triton_that_fails_stays_the_error_that_it_is(bundle: Path, tmp_path: Path) -> None:
    """A broken Triton is the user's to see, by its own message."""
    (tmp_path / "triton" / "runtime").mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").write_text("from . import runtime")
    (tmp_path / "triton" / "runtime" / "__init__.py").write_text("from . import jit")
    (tmp_path / "triton" / "runtime" / "jit.py").write_text("raise ImportError('libtriton is missing')")
    served = serve("import aot_cache.auto; import triton", AOT_CACHE=str(bundle), PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert served.error[:2] == ["ImportError", "libtriton is missing"]


# --- bad bundles ------------------------------------------------------------------------------------------------------


def missing(bundle: Path, folder: Path) -> dict[str, str]:
    return {"AOT_CACHE": str(folder / "gone.safetensors")}


def cut(bundle: Path, folder: Path) -> dict[str, str]:
    (folder / "cut.safetensors").write_bytes(bundle.read_bytes()[:-1])
    return {"AOT_CACHE": str(folder / "cut.safetensors")}


def flipped(bundle: Path, folder: Path) -> dict[str, str]:
    data = bytearray(bundle.read_bytes())
    data[200] ^= 4
    (folder / "flipped.safetensors").write_bytes(data)
    return {"AOT_CACHE": str(folder / "flipped.safetensors")}


def text(bundle: Path, folder: Path) -> dict[str, str]:
    (folder / "text").write_text("this is no bundle")
    return {"AOT_CACHE": str(folder / "text")}


def of_another_triton(bundle: Path, folder: Path) -> dict[str, str]:
    def change(manifest: dict[str, Any]) -> None:
        manifest["toolchain"]["triton"] = "0.0.1"

    return {"AOT_CACHE": str(altered(bundle, folder / "foreign.safetensors", change))}


def another_digest(bundle: Path, folder: Path) -> dict[str, str]:
    return {"AOT_CACHE": str(bundle), "AOT_CACHE_DIGEST": "0" * 64}


def lacking(name: str) -> Callable[[Path, Path], dict[str, str]]:
    def lacks(bundle: Path, folder: Path) -> dict[str, str]:
        return {"AOT_CACHE": str(altered(bundle, folder / "x.safetensors", lambda manifest: manifest.pop(name)))}

    return lacks


def of_another_kind(bundle: Path, folder: Path) -> dict[str, str]:
    write_bundle(folder / "graphs.safetensors", {"kind": "graphs"}, {})
    return {"AOT_CACHE": str(folder / "graphs.safetensors")}


def signed_by(*names: str, trusts: str = "a.pub.pem") -> Callable[[Path, Path], dict[str, str]]:
    """A copy that these keys have signed, for a server that trusts the key in the file `trusts`, or what else is there."""

    def make(bundle: Path, folder: Path) -> dict[str, str]:
        copy = folder / "copy.safetensors"
        copy.write_bytes(bundle.read_bytes())
        for name in ("a", "b"):
            key = Ed25519PrivateKey.generate()
            public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
            (folder / f"{name}.pub.pem").write_bytes(public)
            if name in names:
                signature.sign(copy, read_bundle(copy).digest, key, add=True)
        return {"AOT_CACHE": str(copy), "AOT_CACHE_TRUSTED_KEYS": str(folder / trusts) if trusts else ""}

    return make


BAD: dict[str, tuple[Callable[[Path, Path], dict[str, str]], str, str, int]] = {
    "missing": (missing, "BundleMissing", "no bundle at ", 3),
    "cut": (cut, "BundleCorrupt", "bytes of objects", 8),
    "flipped": (flipped, "BundleCorrupt", "manifest", 8),
    "text": (text, "BundleCorrupt", "header", 8),
    "of another triton": (of_another_triton, "Incompatible", "triton: bundle 0.0.1, here ", 16),
    "another digest": (another_digest, "DigestMismatch", "0" * 64, 8),
    "without units": (lacking("units"), "Incompatible", "units", 16),
    "without toolchain": (lacking("toolchain"), "Incompatible", "toolchain", 16),
    "without graphs": (lacking("graphs"), "Incompatible", "graphs", 16),
    "without a key of graphs": (lacking("graph_key"), "Incompatible", "graph_key", 16),
    "of another kind": (of_another_kind, "Incompatible", "graphs", 16),
    "not signed": (
        signed_by(),
        "Untrusted",
        "copy.safetensors is not signed by a key of AOT_CACHE_TRUSTED_KEYS: there is no ",
        8,
    ),
    "signed by another key": (signed_by("b"), "Untrusted", "by another key than ", 8),
    "signed, and nobody is trusted": (signed_by("a", trusts=""), "DeclarationError", "found an empty value", 3),
    "signed, and the key is missing": (signed_by("a", trusts="gone.pem"), "DeclarationError", "no key at ", 3),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_bundle_is_one_warning(what: str, bundle: Path, tmp_path: Path) -> None:
    make, _, words, _ = BAD[what]
    served = serve("import aot_cache.auto; facts['on'] = 1", **make(bundle, tmp_path))
    assert served.error is None and served.on == 1 and served.imported == []
    (warning,) = served.warnings
    assert warning.startswith("aot-cache serves without a bundle: ") and words in warning
    assert served.stats["total"]["rejected_bundle"] == 1 and served.stats["bundles"] == []


@pytest.mark.parametrize("what", BAD)
def test_a_bad_bundle_is_an_error_when_that_is_wanted(what: str, bundle: Path, tmp_path: Path) -> None:
    make, kind, words, exit_code = BAD[what]
    served = serve("import aot_cache.auto", **make(bundle, tmp_path), AOT_CACHE_STRICT="1")
    assert served.error is not None
    name, message, code = served.error
    assert (name, code) == (kind, exit_code) and words in message
    assert served.warnings == [] and served.stats["total"]["rejected_bundle"] == 1


def test_a_process_goes_on_after_a_bad_bundle(bundle: Path, tmp_path: Path) -> None:
    """A good one may still come; and Triton works as it did."""
    code = f"import aot_cache.auto; import triton; facts['report'] = aot_cache.load({str(bundle)!r}).to_json()"
    served = serve(code + ARMED, **of_another_triton(bundle, tmp_path))
    assert served.error is None and len(served.warnings) == 1
    assert served.report["units"] > 0 and [b["path"] for b in served.stats["bundles"]] == [str(bundle)]


def test_the_warning_says_whose_call_it_was(bundle: Path) -> None:
    served = serve("import aot_cache; aot_cache.load('gone')")
    assert served.files == ["<string>"]


def test_the_right_digest_is_accepted(bundle: Path) -> None:
    served = serve("import aot_cache.auto", AOT_CACHE=str(bundle), AOT_CACHE_DIGEST=read_bundle(bundle).digest)
    assert served.warnings == [] and len(served.stats["bundles"]) == 1


def test_a_signed_bundle_is_loaded(bundle: Path, tmp_path: Path) -> None:
    """One of its two keys is trusted. Both bundles of a list have to be signed."""
    given = signed_by("b", "a")(bundle, tmp_path)
    served = serve("import aot_cache.auto", **given)
    assert served.error is None and served.warnings == [] and len(served.stats["bundles"]) == 1
    other = altered(bundle, tmp_path / "other.safetensors", lambda manifest: manifest.update(recipe="another"))
    given["AOT_CACHE"] += f"{os.pathsep}{other}"
    served = serve("import aot_cache.auto", **given)
    (warning,) = served.warnings
    assert f"{other} is not signed" in warning and served.stats["total"]["rejected_bundle"] == 1
    assert [report["path"] for report in served.stats["bundles"]] == [str(tmp_path / "copy.safetensors")]


def test_a_folder_where_keys_are_trusted(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bundle that fits and is not signed is passed over, and does not make the signed one ambiguous."""
    monkeypatch.setenv("AOT_CACHE_TRUSTED_KEYS", signed_by("a")(bundle, tmp_path)["AOT_CACHE_TRUSTED_KEYS"])
    altered(bundle, tmp_path / "other.safetensors", lambda manifest: manifest.update(recipe="another"))
    (tmp_path / "cut.safetensors").write_bytes(bundle.read_bytes()[:-1])
    assert bundle_lookup.find(tmp_path, None).path.stem == "copy"
    assert {record.args[0].stem for record in caplog.records} == {"cut", "other"}
    (tmp_path / "copy.safetensors.sig").unlink()
    with pytest.raises(
        Untrusted, match=r"AOT_CACHE_TRUSTED_KEYS; not signed by one: copy.safetensors, other.safetensors"
    ):
        bundle_lookup.find(tmp_path, None)


def test_a_folder_with_a_bundle_for_each_gpu(bundle: Path, tmp_path: Path) -> None:
    """Which one is for this GPU is known when there is one: until then it is neither wrong nor loaded."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["target"] = targets.get("a100").properties()

    (tmp_path / "h200.safetensors").write_bytes(bundle.read_bytes())
    altered(bundle, tmp_path / "a100.safetensors", change)
    served = serve("import aot_cache.auto; import triton" + ARMED, AOT_CACHE=str(tmp_path))
    assert served.error is None and served.warnings == []


def test_a_folder_with_bad_neighbours(bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "good.safetensors").write_bytes(bundle.read_bytes())
    (tmp_path / "cut.safetensors").write_bytes(bundle.read_bytes()[:-1])
    (tmp_path / "empty.safetensors").touch()
    of_another_kind(bundle, tmp_path)
    altered(bundle, tmp_path / "half.incomplete.safetensors", lambda manifest: manifest.update(complete=False))
    assert bundle_lookup.find(tmp_path, None).path.stem == "good"
    assert {record.args[0].stem for record in caplog.records} == {"cut", "empty", "graphs"}
    (tmp_path / "good.safetensors").unlink()
    with pytest.raises(BundleMissing, match="none of 3 fits"):
        bundle_lookup.find(tmp_path, None)


GONE = object()
OTHER_VALUES = [None, -1, "x", [], {}, True, [[1]], GONE]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in a tree of JSON; of a list only its ends."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*at, key))
    elif isinstance(value, list) and value:
        for number in {0, len(value) - 1}:
            yield from places(value[number], (*at, number))


def put(tree: Any, at: tuple[Any, ...], value: Any) -> None:
    for key in at[:-1]:
        tree = tree[key]
    if value is GONE:
        del tree[at[-1]]
    else:
        tree[at[-1]] = value


@pytest.mark.parametrize("part", ["header", "details"])
def test_a_manifest_of_any_form_is_refused_with_an_error_of_ours(bundle: Path, tmp_path: Path, part: str) -> None:
    """Sound hashes, and one value somewhere that is of another kind, or gone: loaded strictly, verified, explained, inspected."""
    found = read_bundle(bundle)
    whole = {key: value for key, value in found.manifest.items() if key != "objects"}
    objects = {digest: bytes(found.object(digest)) for digest in found.manifest["objects"]}
    details = json.loads(objects[whole["details"]])
    path, tried, others = tmp_path / "other.safetensors", 0, []
    for at in places(whole if part == "header" else details):
        for value in OTHER_VALUES:
            header, inside = json.loads(json.dumps([whole, details]))
            put(header if part == "header" else inside, at, value)
            now = dict(objects)
            if part == "details":
                data = json.dumps(inside, sort_keys=True, separators=(",", ":")).encode()
                header["details"] = hashlib.sha256(data).hexdigest()
                now[header["details"]] = data
            write_bundle(path, header, now)
            tried += 1
            for look in (load_strictly, verified, explained, inspected):
                try:
                    look(path)
                except AotCacheError:
                    pass
                except Exception as error:
                    others.append(f"{look.__name__}: {'.'.join(map(str, at))} = {value!r}: {error!r}")
    assert tried > 300 and others == []


def load_strictly(path: Path) -> None:
    Session(lambda warning: None).load(path, None, True, [])


def verified(path: Path) -> None:
    found = read_bundle(path)
    bundle_facts.findings(found, None, host_check.parts(served(found), look_at_gpu=False))


def explained(path: Path) -> None:
    found = read_bundle(path)
    bundle_facts.explain(found, host_check.graph_parts(served(found)))


def inspected(path: Path) -> None:
    file_facts.facts(path, None, True, [])


@pytest.mark.parametrize("digest", ["", ":"])
def test_an_empty_digest_is_an_error(bundle: Path, digest: str) -> None:
    """As a Dockerfile has it whose build argument was not given: whoever wrote it meant to pin a bundle."""
    given = {"AOT_CACHE": str(bundle), "AOT_CACHE_DIGEST": digest}
    served = serve("import aot_cache.auto", **given)
    (warning,) = served.warnings
    assert "expected a digest in AOT_CACHE_DIGEST, found an empty value" in warning and served.stats["bundles"] == []
    strict = serve("import aot_cache.auto", AOT_CACHE_STRICT="1", **given)
    assert strict.error is not None and strict.error[0] == "DeclarationError"


def test_an_incomplete_bundle_is_loaded_with_a_warning(bundle: Path, tmp_path: Path) -> None:
    half = altered(bundle, tmp_path / "half.safetensors", lambda manifest: manifest.update(complete=False))
    served = serve("import aot_cache.auto", AOT_CACHE=str(half))
    (warning,) = served.warnings
    assert f"{half} is incomplete" in warning and len(served.stats["bundles"]) == 1
    strict = serve("import aot_cache.auto", AOT_CACHE=str(half), AOT_CACHE_STRICT="1")
    assert strict.error is not None and strict.error[0] == "NotReady" and "incomplete" in strict.error[1]
    later = serve(f"import aot_cache.auto; aot_cache.load({str(half)!r}, strict=True)", AOT_CACHE=str(half))
    assert later.error is not None and later.error[0] == "NotReady" and len(later.warnings) == 1


@pytest.mark.parametrize(
    ("up", "there", "found"),
    [
        (True, ["cpu", "h200"], "h200"),  # one for the CPU fits every host, and is not what a GPU is there for
        (True, ["cpu"], "cpu"),
        (False, ["cpu", "h200"], None),  # which of them is wanted cannot be told
    ],
)
def test_a_folder_with_one_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, up: bool, there: list[str], found: str | None
) -> None:
    for name in there:
        (tmp_path / f"{name}.safetensors").touch()

    def read(path: Path, *_: object, **options: object) -> SimpleNamespace:
        return SimpleNamespace(path=path, digest="", status=path.stat)

    monkeypatch.setattr(bundle_lookup, "read_bundle", read)
    monkeypatch.setattr(bundle_lookup, "check_form", lambda bundle: None)
    monkeypatch.setattr(bundle_lookup, "served", lambda bundle: SimpleNamespace(on_cpu=bundle.path.stem == "cpu"))
    monkeypatch.setattr(bundle_lookup.host_check, "parts", lambda manifest, look_at_gpu: [])
    monkeypatch.setattr(bundle_lookup.host_check, "signs", list)
    monkeypatch.setattr(bundle_lookup.torch_capture, "cuda_is_up", lambda: up)
    if found is None:
        with pytest.raises(Incompatible, match="name the file"):
            bundle_lookup.find(tmp_path, None)
    else:
        assert bundle_lookup.find(tmp_path, None).path.stem == found


# --- graphs that are not for this host --------------------------------------------------------------------------------


def with_graphs(bundle: Path, folder: Path, backend: str = "cpu", **key: Any) -> dict[str, str]:
    """A bundle of one graph that nothing can load, bound to what is here but for `key`."""

    def change(manifest: dict[str, Any]) -> None:
        bound = json.loads(json.dumps(here(backend)))
        manifest["target"] = targets.get(backend).properties()
        manifest["graph_key"] = {**bound, **key}
        none: dict[str, Any] = {"graphs": {}, "resumes": {}, "libraries": {}, "choices": {}, "imports": {}}
        none |= dict.fromkeys(("mode", "settings", "guard_state", "bytecode"), "")
        none |= {"wrapping": None, "identities": [], "values": [], "inlined": []}
        manifest["graphs"] = [{"module": "m", "function": "f", "code": "0" * 32, **none}]
        manifest["units"] = []

    return {"AOT_CACHE": str(altered(bundle, folder / "graphs.safetensors", change))}


@cache
def here(backend: str) -> dict[str, Any]:
    """What graphs that are made on this host are bound to."""
    code = (
        "import json; from aot_cache.artifact import target; from aot_cache.upstream.codec import dynamo_globals\n"
        f"print(json.dumps(dynamo_globals.bound_to(target.get({backend!r}).properties())))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


DYNAMO = "import aot_cache.auto; facts['before'] = aot_cache.stats()['graphs']; import torch._dynamo"


def test_graphs_wait_for_dynamo(bundle: Path, tmp_path: Path) -> None:
    """A process that compiles nothing does not pay for Dynamo."""
    served = serve("import aot_cache.auto", **with_graphs(bundle, tmp_path))
    assert served.error is None and served.warnings == [] and served.imported == [] and served.stats["graphs"] == []
    served = serve(DYNAMO, **with_graphs(bundle, tmp_path))
    assert served.error is None and served.warnings == [] and served.before == []
    (graphs,) = served.stats["graphs"]
    assert len(graphs.pop("digest")) == 64
    assert graphs == {"graphs": 1, "primed": 0, "found": {}, "stale": {}}


@pytest.mark.parametrize(
    ("backend", "part", "words"),
    [
        ("cpu", {"torch": "2.0.0"}, "torch: bundle 2.0.0, here "),
        ("cpu", {"torch git": "0" * 40}, f"torch git: bundle {'0' * 40}"),
        ("cpu", {"python": "2.7"}, "python: bundle 2.7, here "),
        ("cpu", {"target": {"backend": "cpu", "isa": "riscv64 RVV"}}, "vector instructions: bundle riscv64 RVV"),
        ("h200", {"triton": "2.0.0"}, "triton: bundle 2.0.0, here "),
    ],
)
def test_graphs_of_another_host_are_refused_once(
    bundle: Path, tmp_path: Path, backend: str, part: dict[str, Any], words: str
) -> None:
    served = serve(DYNAMO, **with_graphs(bundle, tmp_path, backend, **part))
    assert served.error is None and served.stats["graphs"] == []
    (warning,) = served.warnings
    assert words in warning and "are not for this host" in warning
    assert served.stats["total"]["rejected_bundle"] == 1


# --- releases -----------------------------------------------------------------------------------------------------------

TESTED = (
    "from aot_cache import tested; P, M = tested.Pair, tested.Module('what', True, (), ()); new = '99.1'; "
    "T, R = (tested.minor(tested.installed(name)) for name in ('torch', 'triton')); "
    "tested.table = lambda: tested.Table({'dynamo_guards': M, 'triton_jit': M}, (%s,)); "
)
UNTOLD = "never tested with torch"
FAILS = "tests did not pass with torch"
RELEASES = {  # what was tested; what is said of kernels, and of graphs for the CPU, which have nothing of Triton's
    "these": ("P(T, R)", "", ""),
    "both, but not together": ("P(T, '0.1'), P('0.1', R)", UNTOLD, ""),
    "older": ("P('0.1', '0.1')", UNTOLD, UNTOLD),
    "newer": ("P(new, new)", "99.1 is the oldest", "99.1 is the oldest"),
    "these, and graphs fail": ("P(T, R, broken=('dynamo_guards',))", FAILS, "dynamo_guards of aot_cache.upstream"),
    "these, and kernels fail": ("P(T, R, broken=('triton_jit',))", "triton_jit of aot_cache.upstream", FAILS),
}


def is_harmless(words: str) -> bool:
    """Whether what is said is only said; the bundle is refused otherwise."""
    return words in ("", UNTOLD, FAILS)


@pytest.mark.parametrize("what", RELEASES)
def test_kernels_where_other_releases_were_tested(bundle: Path, what: str) -> None:
    pairs, words, _ = RELEASES[what]
    code = TESTED % pairs + "import aot_cache; [aot_cache.load(facts['path']) for _ in 'ab']"
    served = serve(f"facts['path'] = {str(bundle)!r}; {code}", AOT_CACHE_UNTESTED="")
    assert served.error is None and len(served.stats["bundles"]) == is_harmless(words)
    assert len(set(served.warnings)) == bool(words) and all(words in warning for warning in served.warnings)
    assert len(served.warnings) <= 1 or not is_harmless(words)  # said once, however often it is loaded


@pytest.mark.parametrize("what", ["these", "both, but not together", "newer"])
def test_strict_leaves_nothing_to_chance(bundle: Path, what: str) -> None:
    pairs, words, _ = RELEASES[what]
    a_gpu = "from aot_cache.runtime import host_gpu as native; native.gpu_here = lambda: True; "
    served = serve(
        TESTED % pairs + a_gpu + "import aot_cache.auto",
        AOT_CACHE=str(bundle),
        AOT_CACHE_STRICT="1",
        AOT_CACHE_UNTESTED="",
    )
    assert (served.error is None) if not words else (served.error[0] == "Incompatible" and words in served.error[1])


def test_strict_refuses_a_bundle_for_a_gpu_where_there_is_none(bundle: Path) -> None:
    served = serve("import aot_cache.auto", AOT_CACHE=str(bundle), AOT_CACHE_STRICT="1")
    assert served.error[0] == "Incompatible" and "no GPU is visible here, and " in served.error[1]
    served = serve("import aot_cache.auto", AOT_CACHE=str(bundle))
    assert served.error is None and served.warnings == [], "without it, the process may see its GPU later"


@pytest.mark.parametrize("what", RELEASES)
def test_graphs_where_other_releases_were_tested(bundle: Path, tmp_path: Path, what: str) -> None:
    pairs, _, words = RELEASES[what]
    served = serve(TESTED % pairs + DYNAMO, **with_graphs(bundle, tmp_path), AOT_CACHE_UNTESTED="")
    assert served.error is None and len(served.stats["graphs"]) == is_harmless(words)
    assert (words in served.warnings[-1]) if words else served.warnings == []


def test_who_takes_it_upon_himself_hears_nothing(bundle: Path, tmp_path: Path) -> None:
    for what in ("older", "newer"):
        served = serve(TESTED % RELEASES[what][0] + DYNAMO, **with_graphs(bundle, tmp_path), AOT_CACHE_UNTESTED="1")
        assert served.error is None and served.warnings == [] and len(served.stats["graphs"]) == 1


# --- ready, seal, stats -----------------------------------------------------------------------------------------------


def test_not_ready_without_a_bundle_or_a_gpu(bundle: Path) -> None:
    served = serve("import aot_cache; aot_cache.ready(); aot_cache.ready(strict=True)")
    assert served.error[0] == "NotReady" and "no bundle is loaded" in served.error[1] and served.error[2] == 32
    served = serve("import aot_cache.auto; aot_cache.ready(); aot_cache.ready(strict=True)", AOT_CACHE=str(bundle))
    assert served.error[0] == "NotReady" and "CUDA is not initialised" in served.error[1]
    assert served.imported == []


def test_stats_are_json_and_tell_of_the_seal(bundle: Path) -> None:
    served = serve(
        "import aot_cache.auto; facts['before'] = aot_cache.stats(); aot_cache.seal()", AOT_CACHE=str(bundle)
    )
    assert served.before["sealed"] is False and served.stats["sealed"] is True
    for part in ("total", "in_capture", "after_seal"):
        assert set(served.stats[part]) == set(KINDS)


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_the_ledger_counts_by_kind_capture_and_seal() -> None:
    ledger = Ledger()
    ledger.note("compile", "a", False)
    ledger.note("compile", "b", True)
    ledger.note("installed", "", False, 7)
    ledger.seal()
    ledger.note("benchmark", "c", True)
    found = ledger.to_json()
    assert found["total"]["compile"] == 2 and found["total"]["installed"] == 7
    assert found["in_capture"] == {**dict.fromkeys(KINDS, 0), "compile": 1, "benchmark": 1}
    assert found["after_seal"] == {**dict.fromkeys(KINDS, 0), "benchmark": 1}
    assert [(e["kind"], e["name"], e["in_capture"], e["sealed"]) for e in found["events"]] == [
        ("compile", "a", False, False), ("compile", "b", True, False), ("benchmark", "c", True, True)
    ]  # fmt: skip
    assert json.loads(json.dumps(found)) == found
    ledger.reset()
    assert not any(ledger.to_json()["total"].values()) and not ledger.to_json()["sealed"]


def test_what_is_harmful_is_counted() -> None:
    assert set(HARMFUL) < set(KINDS)
    assert KINDS[: len(HARMFUL)] == HARMFUL, "as the text under KINDS says"
    assert len(set(KINDS)) == len(KINDS)


def test_graphs_are_in_the_ledger() -> None:
    """A frame that is traced and a graph that is compiled are misses; a graph that was found in a bundle is none."""
    ledger = Ledger()
    for kind in ("frame", "graph_compile", "graph"):
        ledger.note(kind, "model:f", True)
    found = ledger.to_json()
    assert {kind: count for kind, count in found["in_capture"].items() if count} == {
        "frame": 1, "graph_compile": 1, "graph": 1
    }  # fmt: skip
    assert [event["kind"] for event in found["events"]] == ["frame", "graph_compile"]


def test_the_ledger_keeps_the_last_events() -> None:
    ledger = Ledger()
    for number in range(1000):
        ledger.note("compile", str(number), False)
    found = ledger.to_json()
    assert found["total"]["compile"] == 1000
    assert [event["name"] for event in found["events"]] == [str(n) for n in range(1000 - 256, 1000)]


def test_the_ledger_counts_in_many_threads() -> None:
    ledger = Ledger()
    threads = [threading.Thread(target=lambda: [ledger.note("gcc", "x", True) for _ in range(500)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.to_json()["in_capture"]["gcc"] == 4000


# --- whether a bundle is for this host --------------------------------------------------------------------------------


def test_parts_of_the_key_beside_this_host(bundle: Path) -> None:
    manifest = served(read_bundle(bundle))
    parts = {part.name: part for part in host_check.parts(manifest, look_at_gpu=False)}
    assert parts["triton"].same and parts["launchers"].same
    assert not parts["gpu"].needed and parts["gpu"].found == host_check.NO_GPU and "H200" in parts["gpu"].wanted
    assert host_check.differing(list(parts.values())) == []


def test_a_bundle_without_launchers_for_this_python_only_costs(bundle: Path) -> None:
    manifest = json.loads(json.dumps(read_bundle(bundle).manifest))
    for native in manifest["native"]:
        native["suffix"] = ".cpython-38-other.so"
    (part,) = [
        p for p in host_check.parts(manifests.Served.from_json(manifest), look_at_gpu=False) if p.name == "launchers"
    ]
    assert not part.same and not part.needed and part.wanted == ".cpython-38-other.so"


# --- C modules --------------------------------------------------------------------------------------------------------

MODULE = r"""
#include <Python.h>
typedef int CUresult;
CUresult cuInit(unsigned int flags);
static PyObject *answer(PyObject *self, PyObject *none) { return PyLong_FromLong(ANSWER + 0 * (long)(size_t)&cuInit); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "cuda_utils", NULL, -1, methods};
PyMODINIT_FUNC PyInit_cuda_utils(void) { return PyModule_Create(&module); }
"""

NATIVE = """
import ctypes, hashlib, json, os, subprocess, sys
from aot_cache.upstream.hooks import triton_launcher
from aot_cache.errors import TargetError
source, folder = sys.argv[1:]
# The module needs libcuda by name: on a machine without a driver, a library of that name.
open(f"{folder}/stub.c", "w").write("int cuInit(unsigned int flags) { return 0; }")
library = f"{folder}/libcuda.so.1"
subprocess.run(["gcc", "-shared", "-fPIC", f"{folder}/stub.c", "-Wl,-soname,libcuda.so.1", "-o", library], check=True)
ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
facts = {}
python = triton_launcher.this_python()
modules = []
for answer in ("42", "7"):
    text = source.replace("ANSWER", answer)
    binary = triton_launcher.build(text, triton_launcher.UTILS, python)
    again = triton_launcher.build(text, triton_launcher.UTILS, python)
    key = triton_launcher.source_key(text)
    facts[answer] = [hashlib.sha256(binary).hexdigest(), hashlib.sha256(again).hexdigest(), b"/tmp" in binary]
    modules.append(triton_launcher.load_module(binary, triton_launcher.UTILS, key))
facts["answers"] = [module.answer() for module in modules] + [modules[0].answer()]
facts["python"] = [python.suffix, triton_launcher.interpreter_tag(), triton_launcher.other_python(sys.executable).suffix]
for what, call in {
    "broken": lambda: triton_launcher.build("no C", "x", python),
    "no interpreter": lambda: triton_launcher.other_python("/no/such/python"),
    "no compiler": lambda: (os.environ.update(CC="/no/such/cc"), triton_launcher.build(source, "x", python)),
}.items():
    try:
        call()
    except TargetError as error:
        facts[what] = str(error)
print(json.dumps(facts))
"""


def test_c_modules_are_built_and_loaded_from_memory(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NATIVE, MODULE, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["answers"] == [42, 7, 42], "two modules of one name"
    for answer in ("42", "7"):
        first, again, has_path = facts[answer]
        assert first == again and not has_path, "the same bytes, without the folder they were built in"
    assert len(set(facts["python"])) == 1
    assert "gcc cannot build x" in facts["broken"] and "/no/such/python" in facts["no interpreter"]
    assert "install gcc or set CC" in facts["no compiler"]


def test_c_modules_of_a_bundle_are_for_this_python(bundle: Path) -> None:
    import sysconfig

    found = read_bundle(bundle)
    natives = found.manifest["native"]
    assert natives and {n["suffix"] for n in natives} == {sysconfig.get_config_var("EXT_SUFFIX")}
    for native in natives:
        data = bytes(found.object(native["object"]))
        assert data.startswith(b"\x7fELF") and hashlib.sha256(data).hexdigest() == native["object"]
