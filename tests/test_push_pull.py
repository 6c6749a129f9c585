"""`push` and `pull`: through registries, an S3 server and folders, each in a process of its own where it has one."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from elsewhere import (
    PASSWORD,
    Registry,
    a_bundle,
    distribution,
    docker_config,
    listing,
    s3_environment,
    s3_server,
    small_registry,
)
from limits import HANGS

from aot_cache.cli.main import main
from aot_cache.errors import (
    BundleCorrupt,
    DeclarationError,
    DigestMismatch,
    RemoteDenied,
    RemoteError,
    RemoteMissing,
    StoreUnwritable,
    Untrusted,
)
from aot_cache.remote import image, reference
from aot_cache.remote.description import describe
from aot_cache.remote.pull import pull
from aot_cache.remote.push import push
from aot_cache.remote.reference import Folder, Image
from aot_cache.store import read_bundle, signature

pytest.importorskip("oras")
pytest.importorskip("fsspec")

BIG = 6_000_000  # bytes: some seconds at the pace of `slow`, and more than one of a piece


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with small_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server() as url:
        before = dict(os.environ)
        os.environ.update(s3_environment(url))
        try:
            import s3fs

            s3fs.S3FileSystem().mkdir("bundles")
            yield "s3://bundles"
        finally:
            os.environ.clear()
            os.environ.update(before)


def with_companions(bundle: Path) -> dict[str, bytes]:
    """Write what may lie beside a bundle; returns the names and bytes of all of it."""
    stem = bundle.name.removesuffix(".safetensors")
    for ending in (".plan.json", ".rehearsed.json", ".safetensors.sig"):
        bundle.with_name(stem + ending).write_text(f"of {bundle.name}: {ending}")
    return {path.name: path.read_bytes() for path in bundle.parent.iterdir()}


def files(folder: Path) -> dict[str, bytes]:
    assert all((folder / name).is_file() for name in listing(folder)), "something was left"
    return {name: (folder / name).read_bytes() for name in listing(folder)}


# --- what REF names ---------------------------------------------------------------------------------------------------


def test_what_a_ref_names() -> None:
    digest = "sha256:" + "a" * 64
    assert reference.parse("ghcr.io/team/name:v1") == Image("ghcr.io", "team/name", "v1", "", plain_http=False)
    assert reference.parse("oci://ghcr.io/name:v1") == Image("ghcr.io", "name", "v1", "", plain_http=False)
    assert reference.parse(f"host:5000/a/b@{digest}") == Image("host:5000", "a/b", "", digest, plain_http=False)
    assert reference.parse("oci+http://host.lan/a:1") == Image("host.lan", "a", "1", "", plain_http=True)
    assert reference.parse("localhost:5000/a:1") == Image("localhost:5000", "a", "1", "", plain_http=True)
    assert reference.parse("127.0.0.1:5000/a:1").plain_http  # type: ignore[union-attr]
    assert not reference.parse("127.0.0.1.example.com/a:1").plain_http  # type: ignore[union-attr]
    assert reference.parse("s3://bucket/a/") == Folder("s3://bucket/a")
    assert reference.parse("file:///a/b.safetensors") == Folder("file:///a/b.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "name:v1",
        "./folder",
        "/folder",
        "ghcr.io/name",
        "ghcr.io/Name:v1",
        "ghcr.io/name:",
        "ghcr.io/name@sha256:12",
        "s3://",
    ]
    + ["", "oci://", "ghcr.io/a/../b:v1", "ghcr.io//a:v1", "ghcr.io/a:v1@sha256:" + "a" * 64, "ghcr.io/a:v1 "],
)
def test_what_a_ref_cannot_be(text: str) -> None:
    with pytest.raises(DeclarationError):
        reference.parse(text)


@pytest.mark.parametrize(
    "text", ["oci://ada:s3cret@ghcr.io/a:v1", "ada:s3cret@ghcr.io/a:v1", "s3://ada:s3cret@bucket/a"]
)
def test_a_password_in_a_ref_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(DeclarationError) as error:
        reference.parse(text)
    assert "s3cret" not in str(error.value) and "ada" not in str(error.value)


# --- there and back ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["registry", "s3", "file"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A REF of each kind, to which nothing was pushed yet."""
    name = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    if request.param == "registry":
        return f"{request.getfixturevalue('registry').host}/team/{name}:v1"
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/{name}"
    return f"file://{tmp_path}/there/{name}"


def test_bundles_come_back_with_what_belongs_to_them(elsewhere: str, tmp_path: Path) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    digests = [a_bundle(here / "a.safetensors"), a_bundle(here / "b.safetensors", target_id="b200")]
    with_companions(here / "a.safetensors")
    sent = push([here / "a.safetensors", here / "b.safetensors"], elsewhere)
    assert [one.description.digest for one in sent.bundles] == digests
    came = pull(elsewhere, out)
    assert [one.description.digest for one in came.bundles] == digests and all(one.moved for one in came.bundles)
    assert files(out) == files(here)
    again = pull(elsewhere, out)
    assert [one.moved for one in again.bundles] == [0, 0]


def test_one_bundle_by_its_digest(elsewhere: str, tmp_path: Path) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    a_bundle(here / "a.safetensors")
    wanted = a_bundle(here / "b.safetensors")
    push(sorted(here.iterdir()), elsewhere)
    with pytest.raises(DigestMismatch):
        pull(elsewhere, out, "0" * 64)
    assert listing(out) == []
    pull(elsewhere, out, wanted)
    assert listing(out) == ["b.safetensors"]


def test_a_newer_bundle_takes_the_place_of_all_of_the_older_one(elsewhere: str, tmp_path: Path) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    a_bundle(here / "a.safetensors")
    with_companions(here / "a.safetensors")
    push([here / "a.safetensors"], elsewhere)
    pull(elsewhere, out)
    shutil.rmtree(here)
    a_bundle(here / "a.safetensors")
    push([here / "a.safetensors"], elsewhere)
    pull(elsewhere, out)
    assert files(out) == files(here)  # without a signature that is of the older one


def test_a_bundle_that_was_signed_later(elsewhere: str, tmp_path: Path) -> None:
    here, out = tmp_path / "here", tmp_path / "out"
    a_bundle(here / "a.safetensors")
    push([here / "a.safetensors"], elsewhere)
    pull(elsewhere, out)
    (out / "a.rehearsed.json").write_text("rehearsed where it serves")
    (here / "a.safetensors.sig").write_text("a signature")
    push([here / "a.safetensors"], elsewhere)
    pull(elsewhere, out)
    assert files(out) == files(here) | {"a.rehearsed.json": b"rehearsed where it serves"}


def test_with_trusted_keys_only_signed_bundles_come(
    elsewhere: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ed25519 = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    here, out = tmp_path / "here", tmp_path / "out"
    key, other = ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate()
    public = tmp_path / "public.pem"
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    digest = a_bundle(here / "a.safetensors")
    push([here / "a.safetensors"], elsewhere)
    pull(elsewhere, tmp_path / "before")
    monkeypatch.setenv("AOT_CACHE_TRUSTED_KEYS", str(public))
    for folder in (out, tmp_path / "before"):  # also one that is there already
        with pytest.raises(Untrusted, match=r"a\.safetensors .*is not signed by a key of AOT_CACHE_TRUSTED_KEYS"):
            pull(elsewhere, folder)
    signature.sign(here / "a.safetensors", digest, other)
    push([here / "a.safetensors"], elsewhere)
    with pytest.raises(Untrusted):
        pull(elsewhere, out)
    assert listing(out) == []
    signature.sign(here / "a.safetensors", digest, key)
    push([here / "a.safetensors"], elsewhere)
    pull(elsewhere, out)
    assert files(out) == files(here)


def test_a_second_push_sends_nothing_again(registry: Registry, tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors")
    first = push([tmp_path / "a.safetensors"], f"{registry.host}/twice:v1")
    second = push([tmp_path / "a.safetensors"], f"{registry.host}/twice:v2")
    assert first.bundles[0].moved and not second.bundles[0].moved
    assert first.digest == second.digest  # the same bytes: no times in them


def test_an_image_by_its_digest(registry: Registry, tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors")
    done = push([tmp_path / "a.safetensors"], f"{registry.host}/pinned:v1")
    pull(f"{registry.host}/pinned@{done.digest}", tmp_path / "out")
    assert listing(tmp_path / "out") == ["a.safetensors"]
    (registry.folder / "tags" / "pinned" / done.digest).write_bytes(b"{}")
    with pytest.raises(BundleCorrupt, match="does not hash to its name"):
        pull(f"{registry.host}/pinned@{done.digest}", tmp_path / "out")


def test_one_file_of_a_folder(s3: str, tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors")
    a_bundle(tmp_path / "b.safetensors")
    push([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], f"{s3}/one")
    pull(f"{s3}/one/b.safetensors", tmp_path / "out")
    assert listing(tmp_path / "out") == ["b.safetensors"]


def test_an_incomplete_bundle_is_pulled_only_by_name(tmp_path: Path) -> None:
    name = "a.incomplete.safetensors"
    a_bundle(tmp_path / "here" / name, complete=False)
    a_bundle(tmp_path / "here" / "b.safetensors")
    pull(f"file://{tmp_path}/here", tmp_path / "out")
    assert listing(tmp_path / "out") == ["b.safetensors"]
    came = pull(f"file://{tmp_path}/here/{name}", tmp_path / "out")
    assert not came.bundles[0].description.complete


@pytest.mark.skipif(not (shutil.which("docker-registry") or shutil.which("registry")), reason="no CNCF registry here")
def test_through_the_registry_that_others_use(tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors", BIG)
    with distribution(tmp_path / "registry") as host:
        done = push([tmp_path / "a.safetensors"], f"{host}/team/bundle:v1")
        pull(f"{host}/team/bundle:v1", tmp_path / "tag")
        pull(f"{host}/team/bundle@{done.digest}", tmp_path / "digest")
        with pytest.raises(RemoteMissing):
            pull(f"{host}/team/bundle:v2", tmp_path / "none")
    for name in ("tag", "digest"):
        assert (tmp_path / name / "a.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


# --- the image --------------------------------------------------------------------------------------------------------


def test_the_image_is_an_artifact_that_can_be_mounted(registry: Registry, tmp_path: Path) -> None:
    """What containerd and CRI-O need to mount it, and what the Model Cache Vault reads (its `extractCompatImg`)."""
    digest = a_bundle(tmp_path / "a.safetensors")
    push([tmp_path / "a.safetensors"], f"{registry.host}/image:v1")
    manifest = json.loads((registry.folder / "tags" / "image" / "v1").read_bytes())
    assert manifest["artifactType"] == "application/vnd.aot-cache.bundle.v1"
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    (layer,) = manifest["layers"]
    assert layer["mediaType"] == "application/vnd.oci.image.layer.v1.tar+gzip"
    blobs = registry.blobs()
    config = json.loads(blobs[manifest["config"]["digest"].removeprefix("sha256:")].read_bytes())
    plain = gzip.decompress(blobs[layer["digest"].removeprefix("sha256:")].read_bytes())
    assert config["rootfs"] == {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(plain).hexdigest()}"]}
    assert config["os"] == "linux" and config["architecture"]
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        assert tar.getnames() == ["io.triton.cache", "io.triton.cache/a.safetensors"]
        assert {entry.mtime for entry in tar} == {0}
    labels = config["config"]["Labels"]
    size = (tmp_path / "a.safetensors").stat().st_size
    assert labels["cache.triton.image/cache-size-bytes"] == str(size)
    assert labels["cache.triton.image/entry-count"] == "1"
    targets = [{"backend": "cuda", "arch": "90", "warp_size": 32}]
    assert json.loads(labels["cache.triton.image/summary"]) == {"targets": targets}
    assert labels["io.kserve.km/cache-root-env"].startswith("AOT_CACHE=/")
    facts = {"digest": digest, "target": "h200", "torch": "2.13.0", "triton": "3.7.1", "recipe": "small"}
    facts |= {"complete": "true", "size": str(size)}
    for notes in (labels, manifest["annotations"], layer["annotations"]):
        assert {name: notes[f"aot-cache.bundle/{name}"] for name in facts} == facts


def test_a_bundle_for_a_cpu_is_no_kernel_cache(registry: Registry, tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors", target_id="cpu")
    push([tmp_path / "a.safetensors"], f"{registry.host}/cpu:v1")
    manifest = json.loads((registry.folder / "tags" / "cpu" / "v1").read_bytes())
    config = json.loads(registry.blobs()[manifest["config"]["digest"].removeprefix("sha256:")].read_bytes())
    assert not [name for name in config["config"]["Labels"] if name.startswith("cache.triton")]


# --- damage -----------------------------------------------------------------------------------------------------------


def test_a_flipped_byte_in_a_registry_is_refused_and_nothing_is_left(registry: Registry, tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors")
    push([tmp_path / "a.safetensors"], f"{registry.host}/flipped:v1")
    layer = json.loads((registry.folder / "tags" / "flipped" / "v1").read_bytes())["layers"][0]
    blob = registry.blobs()[layer["digest"].removeprefix("sha256:")]
    good = blob.read_bytes()
    for at in (0, len(good) // 2, len(good) - 1):
        blob.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(BundleCorrupt, match="does not hash"):
            pull(f"{registry.host}/flipped:v1", tmp_path / "out")
        assert listing(tmp_path / "out") == []


def test_a_flipped_byte_in_a_folder_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    digest = a_bundle(tmp_path / "there" / "a.safetensors")
    path = tmp_path / "there" / "a.safetensors"
    good = path.read_bytes()
    for at in (0, 9, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        for pinned in (None, digest):
            with pytest.raises((BundleCorrupt, DigestMismatch)) as error:
                pull(f"file://{tmp_path}/there", tmp_path / "out", pinned)
            assert ".aot-cache-pull" not in str(error.value)
            assert listing(tmp_path / "out") == []


def forged(registry: Registry, name: str, entries: list[tuple[tarfile.TarInfo, bytes]], digest: str, title: str) -> str:
    """Push a layer with any entries; its hash is right."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for entry, data in entries:
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    blob = buffer.getvalue()
    hashed = hashlib.sha256(blob).hexdigest()
    (registry.folder / "blobs" / hashed).write_bytes(blob)
    notes = {"org.opencontainers.image.title": title, "aot-cache.bundle/digest": digest}
    layer = {"mediaType": image.LAYER_TYPE, "digest": f"sha256:{hashed}", "size": len(blob), "annotations": notes}
    manifest = {"artifactType": image.ARTIFACT_TYPE, "config": {}, "layers": [layer]}
    folder = registry.folder / "tags" / name
    folder.mkdir(parents=True)
    (folder / "v1").write_text(json.dumps(manifest))
    return f"{registry.host}/{name}:v1"


def link(name: str, to: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, to
    return entry, b""


A = "io.triton.cache/a.safetensors"


@pytest.mark.parametrize(
    "extra",
    [
        (tarfile.TarInfo("../../escaped"), b"x"),
        (tarfile.TarInfo("/tmp/aot-cache-escaped"), b"x"),
        (tarfile.TarInfo("io.triton.cache/../escaped"), b"x"),
        (tarfile.TarInfo("io.triton.cache/other"), b"x"),
        (tarfile.TarInfo(A), b"x"),
        link("io.triton.cache/a.plan.json", "/etc/passwd", tarfile.SYMTYPE),
        link("io.triton.cache/a.plan.json", A, tarfile.LNKTYPE),
        link("io.triton.cache/a.plan.json", "", tarfile.FIFOTYPE),
    ],
    ids=["up", "absolute", "through", "other", "twice", "symlink", "hardlink", "pipe"],
)
def test_a_layer_that_leads_elsewhere(extra: tuple[tarfile.TarInfo, bytes], registry: Registry, tmp_path: Path) -> None:
    digest = a_bundle(tmp_path / "a.safetensors")
    name = "leads-" + hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]
    entries = [(tarfile.TarInfo(A), (tmp_path / "a.safetensors").read_bytes()), extra]
    with pytest.raises(BundleCorrupt, match="not one that aot-cache writes"):
        pull(forged(registry, name, entries, digest, "a.safetensors"), tmp_path / "out" / "deep")
    assert listing(tmp_path / "out") == ["deep"]


def test_a_layer_that_says_another_digest(registry: Registry, tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors")
    other = a_bundle(tmp_path / "b.safetensors")
    entries = [(tarfile.TarInfo(A), (tmp_path / "a.safetensors").read_bytes())]
    ref = forged(registry, "says-another", entries, other, "a.safetensors")
    for pinned in (None, other):
        with pytest.raises(DigestMismatch):
            pull(ref, tmp_path / "out", pinned)
        assert listing(tmp_path / "out") == []


@pytest.mark.parametrize(
    "title", ["../a.safetensors", ".a.safetensors", "a", "a\n.safetensors", "x" * 300 + ".safetensors"]
)
def test_a_bundle_cannot_have_any_name(title: str) -> None:
    notes = {"org.opencontainers.image.title": title, "aot-cache.bundle/digest": "0" * 64}
    layer = {"digest": "sha256:" + "0" * 64, "size": 3, "annotations": notes}
    with pytest.raises(BundleCorrupt, match="not one that aot-cache writes"):
        image.read_manifest(json.dumps({"artifactType": image.ARTIFACT_TYPE, "layers": [layer]}).encode(), "there")


@pytest.mark.parametrize(
    "manifest", [b"", b"{", b"[]", b"null", b'{"artifactType": 3}', b"[" * 100_000, b'{"layers": 1}']
)
def test_what_is_no_manifest(manifest: bytes) -> None:
    with pytest.raises(BundleCorrupt):
        image.read_manifest(manifest, "there")


def test_an_image_of_something_else(registry: Registry, tmp_path: Path) -> None:
    folder = registry.folder / "tags" / "alpine"
    folder.mkdir(parents=True)
    (folder / "v1").write_text(json.dumps({"config": {"mediaType": image.CONFIG_TYPE}, "layers": []}))
    with pytest.raises(BundleCorrupt, match=r"expected bundles .* found application/vnd\.oci\.image\.config"):
        pull(f"{registry.host}/alpine:v1", tmp_path)


def test_no_room_for_what_a_layer_unpacks_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_bundle(tmp_path / "there" / "a.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))  # type: ignore[attr-defined]
    with pytest.raises(StoreUnwritable, match="free bytes"):
        pull(f"file://{tmp_path}/there", tmp_path / "out")
    assert listing(tmp_path / "out") == []


# --- interruptions ----------------------------------------------------------------------------------------------------


def in_a_process(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "aot_cache", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + HANGS
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


def parts(out: Path) -> int:
    return sum(path.stat().st_size for path in out.glob(".aot-cache-pull/*.part"))


@pytest.mark.parametrize("damaged", [False, True], ids=["", "what is left is damaged"])
def test_a_pull_that_was_killed_is_continued(damaged: bool, tmp_path: Path) -> None:
    digest = a_bundle(tmp_path / "a.safetensors", BIG)
    out = tmp_path / "out"
    with small_registry(tmp_path / "registry") as fast:
        push([tmp_path / "a.safetensors"], f"{fast.host}/a:v1")
    with small_registry(tmp_path / "registry", "--piece", "65536", "--pause", "0.02") as slow:
        process = in_a_process("pull", f"{slow.host}/a:v1", "--out", str(out))
        until(lambda: parts(out) > BIG // 4, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = parts(out)
    assert 0 < left < BIG and not list(out.glob("*.safetensors"))
    if damaged:
        (part,) = out.glob(".aot-cache-pull/*.part")
        part.write_bytes(bytes(left))
    with small_registry(tmp_path / "registry") as fast:
        before = fast.served()
        pull(f"{fast.host}/a:v1", out, digest)
        whole = json.loads((fast.folder / "tags" / "a" / "v1").read_bytes())["layers"][0]["size"]
        assert fast.served() - before == whole - left + (whole if damaged else 0)
    assert (out / "a.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert listing(out) == ["a.safetensors"]


def test_what_is_left_is_continued_where_nobody_knows_ranges(tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors", BIG)
    with small_registry(tmp_path / "registry", "--no-ranges") as registry:
        push([tmp_path / "a.safetensors"], f"{registry.host}/a:v1")
        layer = json.loads((registry.folder / "tags" / "a" / "v1").read_bytes())["layers"][0]
        hashed = layer["digest"].removeprefix("sha256:")
        left = tmp_path / "out" / ".aot-cache-pull" / f"{hashed}.part"
        left.parent.mkdir(parents=True)
        left.write_bytes(registry.blobs()[hashed].read_bytes()[:1_500_000])
        pull(f"{registry.host}/a:v1", tmp_path / "out")
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


def test_a_folder_is_continued_too(tmp_path: Path) -> None:
    digest = a_bundle(tmp_path / "there" / "a.safetensors", BIG)
    left = tmp_path / "out" / ".aot-cache-pull" / f"{digest}.part"
    left.parent.mkdir(parents=True)
    whole = (tmp_path / "there" / "a.safetensors").read_bytes()
    for start in (whole[:100_000], bytes(100_000), whole + b"more"):
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(start)
        pull(f"file://{tmp_path}/there", tmp_path / "out", digest)
        assert files(tmp_path / "out") == {"a.safetensors": whole}
        (tmp_path / "out" / "a.safetensors").unlink()


def test_two_pulls_at_once_into_one_folder(tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors", BIG)
    with small_registry(tmp_path / "registry", "--piece", "262144", "--pause", "0.02") as registry:
        push([tmp_path / "a.safetensors"], f"{registry.host}/a:v1")
        out = tmp_path / "out"
        both = [in_a_process("pull", f"{registry.host}/a:v1", "--out", str(out), "--json") for _ in range(2)]
        facts = []
        for process in both:
            stdout, stderr = process.communicate(timeout=HANGS)
            assert process.returncode == 0, stderr
            facts.append(json.loads(stdout)["bundles"][0]["moved"])
        assert sorted(map(bool, facts)) == [False, True]  # one waited, and found it there
        assert registry.served() == max(facts)
    assert files(out) == {"a.safetensors": (tmp_path / "a.safetensors").read_bytes()}


def test_a_push_that_was_killed_leaves_no_tag(tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors", 100)
    a_bundle(tmp_path / "b.safetensors", 40 * BIG)
    with small_registry(tmp_path / "registry") as registry:
        words = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), f"{registry.host}/a:v1"]
        process = in_a_process("push", *words)
        until(lambda: registry.blobs(), process)  # the first one is there, the second one is not
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not listing(registry.folder / "tags")
        with pytest.raises(RemoteMissing):
            pull(f"{registry.host}/a:v1", tmp_path / "out")


# --- credentials and errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["basic", "token"])
def test_credentials_from_docker_s_config(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_bundle(tmp_path / "a.safetensors", BIG)
    monkeypatch.setenv("HOME", str(tmp_path))
    with small_registry(tmp_path / "registry", "--auth", kind) as registry:
        ref = f"{registry.host}/team/a:v1"
        with pytest.raises(RemoteDenied, match="401") as error:
            push([tmp_path / "a.safetensors"], ref)
        monkeypatch.setenv("DOCKER_CONFIG", str(docker_config(tmp_path / "docker", registry.host, "wrong")))
        with pytest.raises(RemoteDenied, match="401") as error:
            push([tmp_path / "a.safetensors"], ref)
        assert "wrong" not in str(error.value)
        docker_config(tmp_path / "docker", registry.host)
        push([tmp_path / "a.safetensors"], ref)
        pull(ref, tmp_path / "out")
        monkeypatch.delenv("DOCKER_CONFIG")
        monkeypatch.setenv("ORAS_USER", "ada")
        monkeypatch.setenv("ORAS_PASS", PASSWORD)
        pull(ref, tmp_path / "again")
    assert (tmp_path / "out" / "a.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("repository", "expected", "said"),
    [("forbidden/a", RemoteDenied, "403"), ("full/a", RemoteError, "413 (SIZE_INVALID")],
)
def test_what_a_registry_refuses(
    repository: str, expected: type[RemoteError], said: str, registry: Registry, tmp_path: Path
) -> None:
    a_bundle(tmp_path / "a.safetensors")
    with pytest.raises(expected) as error:
        push([tmp_path / "a.safetensors"], f"{registry.host}/{repository}:v1")
    assert said in str(error.value) and "_state" not in str(error.value)
    assert not (registry.folder / "tags" / repository).exists()


def test_nothing_of_that_name(registry: Registry, s3: str, tmp_path: Path) -> None:
    for ref in (f"{registry.host}/none:v1", f"{s3}/none", f"file://{tmp_path}/none", f"{s3}/none/a.safetensors"):
        with pytest.raises(RemoteMissing):
            pull(ref, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RemoteMissing):
        pull(f"file://{tmp_path}/empty", tmp_path / "out")
    assert listing(tmp_path / "out") == []


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=r"127\.0\.0\.1:9 does not answer"):
        pull("127.0.0.1:9/a:v1", tmp_path)


def test_a_bucket_that_is_not_there(s3: str, tmp_path: Path) -> None:
    a_bundle(tmp_path / "a.safetensors")
    with pytest.raises(RemoteError) as error:
        push([tmp_path / "a.safetensors"], "s3://no-such-bucket/folder")
    assert PASSWORD not in str(error.value)


def test_an_object_store_whose_package_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(RemoteError, match="gs:// needs the package gcsfs"):
        pull("gs://bucket/folder", tmp_path)
    with pytest.raises(RemoteError, match="nothing here knows nosuch://"):
        pull("nosuch://bucket/folder", tmp_path)


@pytest.mark.parametrize(("package", "ref"), [("oras", "ghcr.io/a:v1"), ("fsspec", "s3://bucket/folder")])
def test_without_the_extra(package: str, ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RemoteError, match=f"the package {package}") as error:
        pull(ref, tmp_path)
    assert "aot-cache[remote]" in error.value.hint


def test_what_cannot_be_pushed(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        a_bundle(folder / "a.safetensors")
    with pytest.raises(DeclarationError, match="different names"):
        push([tmp_path / "a.safetensors", tmp_path / "b" / "a.safetensors"], "ghcr.io/a:v1")
    with pytest.raises(DeclarationError, match="a folder to push to"):
        push([tmp_path / "a.safetensors"], "s3://bucket/a.safetensors")
    with pytest.raises(DeclarationError, match="a tag to push to"):
        push([tmp_path / "a.safetensors"], "ghcr.io/a@sha256:" + "a" * 64)
    good = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(BundleCorrupt):
        push([tmp_path / "a.safetensors"], f"file://{tmp_path}/there")
    assert not (tmp_path / "there").exists()


# --- the commands -----------------------------------------------------------------------------------------------------


def test_the_commands(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = a_bundle(tmp_path / "a.safetensors")
    ref = f"{registry.host}/command:v1"
    assert main(["push", str(tmp_path / "a.safetensors"), ref, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ref"] == ref and facts["digest"].startswith("sha256:") and facts["bundles"][0]["digest"] == digest
    assert main(["pull", ref, "--out", str(tmp_path / "out")]) == 0
    assert digest in capsys.readouterr().out
    assert main(["pull", ref, "--out", str(tmp_path / "out"), "--json"]) == 0
    (came,) = json.loads(capsys.readouterr().out)["bundles"]
    assert came == {
        **describe(read_bundle(tmp_path / "out" / "a.safetensors")).__dict__,
        "path": came["path"],
        "moved": 0,
    }
    assert main(["pull", ref, "--out", str(tmp_path / "no"), "--digest", "0" * 64]) == 8
    assert main(["pull", f"{registry.host}/none:v1", "--json"]) == 3
    told = capsys.readouterr()
    assert json.loads(told.out)["error"]["type"] == "RemoteMissing" and "Traceback" not in told.err
