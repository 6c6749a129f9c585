"""Signatures of bundles: `aot-cache sign`, what `verify` and `inspect` say of them, and that only signed bundles are read where
keys are trusted. A server that does so is in tests/test_loader.py."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from limits import HANGS

from aot_cache.cli.main import main
from aot_cache.errors import BundleCorrupt, DeclarationError, DigestMismatch, Untrusted
from aot_cache.runtime import bundle_lookup
from aot_cache.store import Bundle, read_bundle, signature, write_bundle
from aot_cache.store import bundle as bundles

PKCS8 = (Encoding.PEM, PrivateFormat.PKCS8)
SPKI = PublicFormat.SubjectPublicKeyInfo


class Pair(NamedTuple):
    """A key in two files."""

    private: Path
    public: Path

    @property
    def key(self) -> signature.Key:
        (key,) = signature.public_keys(self.public)
        return key


class Signed(NamedTuple):
    path: Path
    digest: str


class Said(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Said]


def a_pair(folder: Path, name: str, password: bytes = b"") -> Pair:
    key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    pair = Pair(folder / f"{name}.pem", folder / f"{name}.pub.pem")
    pair.private.write_bytes(key.private_bytes(*PKCS8, encryption))
    pair.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, SPKI))
    return pair


def a_bundle(path: Path, what: bytes = b"an object") -> Signed:
    """A sound bundle, which is of no kind."""
    objects = {hashlib.sha256(what).hexdigest(): what}
    return Signed(path, write_bundle(path, {"complete": True, "what": what.decode()}, objects))


def sign(bundle: Signed, pair: Pair, add: bool = False) -> Path:
    return signature.sign(*bundle, signature.private_key(pair.private), add)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return a_pair(tmp_path, "mine")


@pytest.fixture
def other(tmp_path: Path) -> Pair:
    return a_pair(tmp_path, "other")


@pytest.fixture
def bundle(tmp_path: Path) -> Signed:
    return a_bundle(tmp_path / "b.safetensors")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Said:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capfd.readouterr())

    return call


# --- what is signed ---------------------------------------------------------------------------------------------------


def test_the_text_is_what_was_once_written_down(bundle: Signed) -> None:
    """Files of signatures outlive releases: this text never changes without another first line."""
    assert signature.signed_text("ab" * 32) == b"aot-cache-bundle-v1\nsha256 " + b"ab" * 32 + b"\n"


def test_a_signature_is_a_line_of_base64_beside_the_bundle(bundle: Signed, pair: Pair) -> None:
    path = sign(bundle, pair)
    assert path.name == "b.safetensors.sig"
    data = path.read_bytes()
    assert data.endswith(b"\n") and len(base64.b64decode(data, validate=False)) == 64 and data.count(b"\n") == 1
    assert signature.require(*bundle, [pair.key]) == pair.key


def test_a_key_s_id_is_what_openssl_says(pair: Pair) -> None:
    der = base64.b64decode("".join(pair.public.read_text().splitlines()[1:-1]))
    assert pair.key.id == hashlib.sha256(der).hexdigest() and der.endswith(pair.key.raw)


def openssl(*words: object) -> subprocess.CompletedProcess[str]:
    """What openssl says; skips where there is none that has Ed25519 on the command line."""
    found = shutil.which("openssl")
    version = subprocess.run([found, "version"], capture_output=True, text=True, check=False).stdout if found else ""
    if not version.startswith("OpenSSL ") or int(version.split()[1].partition(".")[0]) < 3:
        pytest.skip(f"openssl 3 is not here: {version or 'none'}")
    return subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, timeout=HANGS, check=False)


def test_openssl_makes_the_keys_and_checks_the_signature(run: Run, bundle: Signed, tmp_path: Path) -> None:
    """As docs/serving.md has it, and without a line of cryptography in the check."""
    assert openssl("genpkey", "-algorithm", "ed25519", "-out", tmp_path / "key.pem").returncode == 0
    assert openssl("pkey", "-in", tmp_path / "key.pem", "-pubout", "-out", tmp_path / "public.pem").returncode == 0
    assert run("sign", bundle.path, "--key", "key.pem").code == 0
    text, raw = tmp_path / "text", tmp_path / "raw"
    text.write_text(run("sign", bundle.path, "--show-text").out)
    raw.write_bytes(base64.b64decode(signature.beside(bundle.path).read_bytes()))
    check = ["pkeyutl", "-verify", "-rawin", "-pubin", "-inkey", tmp_path / "public.pem", "-in", text, "-sigfile", raw]
    assert openssl(*check).returncode == 0
    text.write_text(text.read_text().replace("bundle-v1", "bundle-v2"))
    assert openssl(*check).returncode != 0
    der = openssl("pkey", "-in", tmp_path / "key.pem", "-pubout", "-outform", "DER", "-out", tmp_path / "der")
    assert der.returncode == 0
    (key,) = signature.public_keys(tmp_path / "public.pem")
    assert key.id == hashlib.sha256((tmp_path / "der").read_bytes()).hexdigest()


def test_a_signature_that_openssl_made_is_accepted(bundle: Signed, pair: Pair, tmp_path: Path) -> None:
    """So that a key need not leave an HSM."""
    (tmp_path / "text").write_bytes(signature.signed_text(bundle.digest))
    made = openssl(
        "pkeyutl", "-sign", "-rawin", "-inkey", pair.private, "-in", tmp_path / "text", "-out", tmp_path / "raw"
    )
    assert made.returncode == 0, made.stderr
    signature.beside(bundle.path).write_bytes(base64.b64encode((tmp_path / "raw").read_bytes()))
    assert signature.require(*bundle, [pair.key]) == pair.key


# --- files of signatures that prove nothing ---------------------------------------------------------------------------


def nothing(path: Path, bundle: Signed, other: Pair) -> None:
    assert not path.exists()


def empty(path: Path, bundle: Signed, other: Pair) -> None:
    path.touch()


def huge(path: Path, bundle: Signed, other: Pair) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


def too_many(path: Path, bundle: Signed, other: Pair) -> None:
    path.write_bytes(sign(bundle, other).read_bytes() * 100)


def garbage(path: Path, bundle: Signed, other: Pair) -> None:
    path.write_bytes(bytes(range(256)))


def short(path: Path, bundle: Signed, other: Pair) -> None:
    path.write_bytes(base64.b64encode(bytes(63)))


def raw(path: Path, bundle: Signed, other: Pair) -> None:
    path.write_bytes(base64.b64decode(sign(bundle, other).read_bytes()))


def of_another_bundle(path: Path, bundle: Signed, other: Pair) -> None:
    another = a_bundle(bundle.path.with_name("another.safetensors"), b"another object")
    mine = Pair(bundle.path.with_name("mine.pem"), bundle.path.with_name("mine.pub.pem"))
    shutil.copy(sign(another, mine), path)


def of_another_key(path: Path, bundle: Signed, other: Pair) -> None:
    sign(bundle, other)


def of_another_text(path: Path, bundle: Signed, other: Pair) -> None:
    """The same key signs the bare digest for somebody else."""
    key = signature.private_key(bundle.path.with_name("mine.pem"))
    path.write_bytes(base64.b64encode(key.sign(bundle.digest.encode())))


def a_folder(path: Path, bundle: Signed, other: Pair) -> None:
    path.mkdir()


def a_pipe(path: Path, bundle: Signed, other: Pair) -> None:
    os.mkfifo(path)


def a_circle(path: Path, bundle: Signed, other: Pair) -> None:
    path.symlink_to(path.name)


def endless(path: Path, bundle: Signed, other: Pair) -> None:
    path.symlink_to("/dev/zero")


PROVE_NOTHING = {
    nothing: "there is no ",
    empty: "does not have signatures",
    huge: "has more than 8192 bytes",
    too_many: "has more than 8192 bytes",
    garbage: "does not have signatures",
    short: "does not have signatures of 64 bytes",
    raw: "does not have signatures",
    of_another_bundle: "of another bundle or by another key than ",
    of_another_key: "of another bundle or by another key than ",
    of_another_text: "of another bundle or by another key than ",
    a_folder: "folder, pipe or device",
    a_pipe: "folder, pipe or device",
    a_circle: "cannot read ",
    endless: "folder, pipe or device",
}


@pytest.mark.parametrize("make", PROVE_NOTHING, ids=lambda make: make.__name__)
def test_what_proves_nothing_is_refused(
    make: Callable[[Path, Signed, Pair], None], bundle: Signed, pair: Pair, other: Pair, run: Run
) -> None:
    make(signature.beside(bundle.path), bundle, other)
    words = PROVE_NOTHING[make]
    with pytest.raises(Untrusted) as caught:
        signature.require(*bundle, [pair.key])
    assert (
        words in str(caught.value) and str(bundle.path) in str(caught.value) and "aot-cache sign" in caught.value.hint
    )
    said = run("verify", bundle.path, "--key", pair.public, "--json")
    (found,) = [one for one in json.loads(said.out)["findings"] if one["kind"] == "not trusted"]
    assert said.code & 8 and found["code"] == 8 and words in found["what"]


@pytest.mark.parametrize("bit", range(0, 512, 7))
def test_no_bit_of_a_signature_may_differ(bundle: Signed, pair: Pair, bit: int) -> None:
    path = sign(bundle, pair)
    data = bytearray(base64.b64decode(path.read_bytes()))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(base64.b64encode(data))
    with pytest.raises(Untrusted):
        signature.require(*bundle, [pair.key])


# --- several keys -----------------------------------------------------------------------------------------------------


def test_keys_are_changed_without_a_gap(run: Run, bundle: Signed, pair: Pair, other: Pair, tmp_path: Path) -> None:
    assert run("sign", bundle.path, "--key", pair.private).code == 0
    assert run("sign", bundle.path, "--key", other.private, "--add").code == 0
    for keys in ([pair.key], [other.key], [pair.key, other.key]):
        assert signature.require(*bundle, keys) == keys[0]
    both = tmp_path / "both.pem"
    both.write_bytes(b"the old one\n" + pair.public.read_bytes() + b"the new one\n" + other.public.read_bytes())
    assert signature.public_keys(both) == [pair.key, other.key]
    data = signature.beside(bundle.path).read_bytes()
    assert run("sign", bundle.path, "--key", pair.private, "--add").code == 0
    assert signature.beside(bundle.path).read_bytes() == data, "the same signature is there once"
    assert run("sign", bundle.path, "--key", other.private).code == 0
    with pytest.raises(Untrusted):
        signature.require(*bundle, [pair.key])


def test_lines_may_end_as_in_windows(bundle: Signed, pair: Pair, other: Pair) -> None:
    sign(bundle, other)
    path = sign(bundle, pair, add=True)
    path.write_bytes(b"\r\n" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert signature.require(*bundle, [pair.key]) == pair.key


def test_nothing_is_added_to_what_has_no_signatures(run: Run, bundle: Signed, pair: Pair) -> None:
    signature.beside(bundle.path).write_text("notes")
    said = run("sign", bundle.path, "--key", pair.private, "--add")
    assert said.code == 3 and "does not have signatures" in said.err and "--add" in said.err
    assert signature.beside(bundle.path).read_text() == "notes"


# --- keys -------------------------------------------------------------------------------------------------------------


def trusted(monkeypatch: pytest.MonkeyPatch, *files: Path) -> None:
    monkeypatch.setenv("AOT_CACHE_TRUSTED_KEYS", os.pathsep.join(map(str, files)))


def test_trusted_keys_are_listed_as_in_path(monkeypatch: pytest.MonkeyPatch, pair: Pair, other: Pair) -> None:
    assert signature.trusted_keys() is None
    trusted(monkeypatch, pair.public, other.public)
    assert signature.trusted_keys() == [pair.key, other.key]


@pytest.mark.parametrize("value", ["", ":"])
def test_an_empty_list_of_keys_is_an_error(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """As a Dockerfile has it whose build argument was not given: whoever wrote it meant to trust somebody."""
    monkeypatch.setenv("AOT_CACHE_TRUSTED_KEYS", value)
    with pytest.raises(DeclarationError, match="found an empty value"):
        signature.trusted_keys()


def test_a_list_with_a_bad_file_is_an_error(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, other: Pair, tmp_path: Path
) -> None:
    """And not a shorter list: a key that is missing by mistake would be seen only at the next change of keys."""
    ecdsa = tmp_path / "ecdsa.pem"
    ecdsa.write_bytes(generate_private_key(SECP256R1()).public_key().public_bytes(Encoding.PEM, SPKI))
    (tmp_path / "text").write_text("no key")
    cut = tmp_path / "cut.pem"
    cut.write_text(pair.public.read_text().replace("MCowBQ", "MCowAA"))
    os.mkfifo(tmp_path / "pipe")
    mixed = tmp_path / "mixed.pem"
    mixed.write_bytes(pair.public.read_bytes() + other.private.read_bytes())
    bad = {
        tmp_path / "gone": "no key at",
        tmp_path / "pipe": "pipe",
        tmp_path / "text": "no PEM",
        other.private: "a private key",
        mixed: "a private key",
        ecdsa: "another kind",
        cut: "cannot be read",
    }
    for file, words in bad.items():
        trusted(monkeypatch, pair.public, file)
        with pytest.raises(DeclarationError) as caught:
            signature.trusted_keys()
        assert words in str(caught.value) and str(file) in str(caught.value)


def test_a_key_that_others_can_exchange_is_none(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    """Whoever can write the file of trusted keys can add his own."""
    trusted(monkeypatch, pair.public)
    pair.public.chmod(0o666)
    with pytest.raises(Untrusted, match=f"everybody can write {pair.public}") as caught:
        signature.trusted_keys()
    assert "AOT_CACHE_TRUSTED_FOLDERS" in caught.value.hint and "sign" not in caught.value.hint
    monkeypatch.setenv("AOT_CACHE_TRUSTED_FOLDERS", str(pair.public.parent))
    assert signature.trusted_keys() == [pair.key]


def test_an_encrypted_key(run: Run, bundle: Signed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = a_pair(tmp_path, "locked", b"open sesame")
    words = ("sign", bundle.path, "--key", pair.private)
    said = run(*words)
    assert said.code == 3 and "found none" in said.err and "AOT_CACHE_KEY_PASSWORD" in said.err
    monkeypatch.setenv("AOT_CACHE_KEY_PASSWORD", "open barley")
    said = run(*words)
    assert said.code == 3 and "does not open it" in said.err and "barley" not in said.err
    assert not signature.beside(bundle.path).exists()
    monkeypatch.setenv("AOT_CACHE_KEY_PASSWORD", "open sesame")
    assert run(*words).code == 0 and signature.require(*bundle, [pair.key])


def test_a_password_is_no_harm_to_a_key_without_one(
    bundle: Signed, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AOT_CACHE_KEY_PASSWORD", "open sesame")
    assert sign(bundle, pair).exists()


def test_what_is_no_private_key(run: Run, bundle: Signed, pair: Pair, tmp_path: Path) -> None:
    ecdsa = tmp_path / "ecdsa.pem"
    ecdsa.write_bytes(generate_private_key(SECP256R1()).private_bytes(*PKCS8, NoEncryption()))
    for file, words in ((pair.public, "PKCS#8"), (ecdsa, "another kind"), (tmp_path / "gone", "No such file")):
        said = run("sign", bundle.path, "--key", file)
        assert said.code == 3 and words in said.err and "openssl genpkey -algorithm ed25519" in said.err
    assert not signature.beside(bundle.path).exists()


def test_a_private_key_from_a_pipe(bundle: Signed, pair: Pair) -> None:
    """`--key <(vault …)`: it need not be in a file."""
    read, write = os.pipe()
    with os.fdopen(write, "wb") as file:
        file.write(pair.private.read_bytes())
    key = signature.private_key(Path(f"/dev/fd/{read}"))
    os.close(read)
    assert signature.public_key(key) == pair.key


def test_without_the_library(run: Run, bundle: Signed, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sign(bundle, pair)
    trusted(monkeypatch, pair.public)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for words in (("sign", "--key", pair.private), ("verify",), ("inspect", "--key", pair.public)):
        said = run(words[0], bundle.path, *words[1:])
        assert said.code == 3 and "expected the package cryptography" in said.err
        assert "hint: pip install 'aot-cache[sign]'" in said.err
    with pytest.raises(DeclarationError):
        bundle_lookup.find(bundle.path, None)
    monkeypatch.delenv("AOT_CACHE_TRUSTED_KEYS")
    assert "name the key" in run("verify", bundle.path).out, "what needs no key needs no library"
    assert bundle_lookup.find(bundle.path, None).digest == bundle.digest


# --- the command line -------------------------------------------------------------------------------------------------


def test_signing_several(run: Run, pair: Pair, tmp_path: Path) -> None:
    made = [a_bundle(tmp_path / f"{name}.safetensors", name.encode()) for name in ("a", "b")]
    said = run("sign", *(one.path for one in made), "--key", pair.private, "--json")
    facts = json.loads(said.out)
    assert said.code == 0 and facts["key"] == pair.key.id
    assert [(one["path"], one["digest"]) for one in facts["bundles"]] == [(str(path), digest) for path, digest in made]
    for one in made:
        assert signature.require(*one, [pair.key])
    text = run("sign", made[0].path, "--key", pair.private).out
    assert made[0].digest[:16] in text and f"key {pair.key.id[:16]}" in text and "incomplete" not in text


def test_one_bad_bundle_and_none_is_signed(run: Run, bundle: Signed, pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(bundle.path.read_bytes()[:-1])
    said = run("sign", bundle.path, "bad.safetensors", "--key", pair.private)
    assert said.code == 8 and "bad.safetensors" in said.err and not list(tmp_path.glob("*.sig"))


def test_an_incomplete_bundle_can_be_signed_and_that_is_said(run: Run, pair: Pair, tmp_path: Path) -> None:
    write_bundle(tmp_path / "half.safetensors", {"complete": False}, {})
    assert "it is incomplete" in run("sign", "half.safetensors", "--key", pair.private).out
    facts = json.loads(run("sign", "half.safetensors", "--key", pair.private, "--json").out)
    assert facts["bundles"][0]["complete"] is False


def test_the_text_can_be_signed_elsewhere(run: Run, bundle: Signed) -> None:
    said = run("sign", bundle.path, "--show-text")
    assert said == Said(0, signature.signed_text(bundle.digest).decode(), "")
    assert not signature.beside(bundle.path).exists()


@pytest.mark.parametrize(
    "words", ["", "--key k --show-text", "--show-text --add", "--show-text --json", "b --show-text"]
)
def test_what_cannot_be_meant(run: Run, bundle: Signed, words: str) -> None:
    said = run("sign", bundle.path, *words.replace("b ", f"{bundle.path} ").split())
    assert said.code == 3 and "--key PEM, or --show-text" in said.err


def test_verifying_says_whose_signature_it_is(
    run: Run, bundle: Signed, pair: Pair, other: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is of no kind, so `verify` may have more to say; here it is about the signature."""
    path = ("verify", bundle.path)

    def facts(*options: object) -> dict[str, object]:
        found = json.loads(run(*path, *options, "--json").out)
        assert any(one["kind"] == "not trusted" for one in found["findings"]) == bool(found["signature"]["why_not"])
        return dict(found["signature"])

    none = {
        "path": f"{bundle.path}.sig",
        "signatures": 0,
        "problem": f"there is no {bundle.path}.sig",
        "checked": False,
    }
    assert facts() == {**none, "keys": [], "why_not": ""}
    assert not [line for line in run(*path).out.splitlines() if line.startswith(("signed", "not "))]
    sign(bundle, pair)
    there = {**none, "signatures": 1, "problem": ""}
    assert facts() == {**there, "keys": [], "why_not": ""}
    assert "signed: once, not checked: name the key (--key)" in run(*path).out
    assert facts("--key", pair.public) == {**there, "checked": True, "keys": [pair.key.id], "why_not": ""}
    assert facts("--key", other.public, "--key", pair.public)["keys"] == [pair.key.id]
    assert f"signed by: key {pair.key.id[:16]}" in run(*path, "--key", pair.public).out
    assert "not trusted: not signed by a trusted key: " in run(*path, "--key", other.public).out
    assert other.key.id[:16] in str(facts("--key", other.public)["why_not"])
    trusted(monkeypatch, pair.public)
    assert facts()["keys"] == [pair.key.id] and facts("--key", other.public)["keys"] == []


# --- where keys are trusted -------------------------------------------------------------------------------------------


def test_nothing_is_read_ahead_of_what_is_not_accepted(bundle: Signed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even of a bundle that is pinned."""

    def body(*_: object) -> None:
        raise AssertionError("objects are read")

    monkeypatch.setattr(bundles, "_Body", body)
    asked = []

    def accept(digest: str) -> None:
        asked.append(digest)
        raise Untrusted("no")

    for pinned in (None, bundle.digest):
        with pytest.raises(Untrusted):
            read_bundle(bundle.path, pinned, prefetch=True, accept=accept)
    assert asked == [bundle.digest] * 2
    with pytest.raises(AssertionError, match="objects are read"):
        read_bundle(bundle.path, prefetch=True, accept=lambda digest: None)


def test_a_signature_does_not_unpin(bundle: Signed, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    sign(bundle, pair)
    trusted(monkeypatch, pair.public)
    assert bundle_lookup.find(bundle.path, bundle.digest).check_all() == []
    with pytest.raises(DigestMismatch):
        bundle_lookup.find(bundle.path, "0" * 64)


def test_a_signature_does_not_mend(bundle: Signed, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what the bytes must be, and they are hashed as ever."""
    sign(bundle, pair)
    trusted(monkeypatch, pair.public)
    data = bytearray(bundle.path.read_bytes())
    data[-1] ^= 1
    bundle.path.write_bytes(data)
    found = bundle_lookup.find(bundle.path, None)
    (name,) = found.manifest["objects"]
    with pytest.raises(BundleCorrupt):
        found.object(name)


def test_files_that_are_replaced_after_the_check(
    bundle: Signed, pair: Pair, other: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was checked is what is used: its digest is of the header in memory, and objects are held against that."""
    sign(bundle, pair)
    trusted(monkeypatch, pair.public)
    evil = a_bundle(tmp_path / "evil.safetensors", b"evil")
    require = signature.require

    def and_then_replace(path: Path, digest: str, keys: list[signature.Key]) -> signature.Key:
        key = require(path, digest, keys)
        evil.path.replace(path)
        signature.beside(path).write_text("garbage")
        return key

    monkeypatch.setattr(signature, "require", and_then_replace)
    found = bundle_lookup.find(bundle.path, None)
    assert found.digest == bundle.digest and found.manifest["what"] == "an object"
    assert [found.object(name) for name in found.manifest["objects"]] == [b"an object"]


def test_files_that_are_replaced_before_the_check(
    bundle: Signed, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is read, and only then the signed bundle is put where it was read from."""
    sign(bundle, pair)
    trusted(monkeypatch, pair.public)
    good = bundle.path.read_bytes()
    write_bundle(tmp_path / "evil.safetensors", {"what": "evil"}, {})
    shutil.copy(tmp_path / "evil.safetensors", bundle.path)
    require = signature.require

    def replace_first(path: Path, digest: str, keys: list[signature.Key]) -> signature.Key:
        bundle.path.write_bytes(good)
        return require(path, digest, keys)

    monkeypatch.setattr(signature, "require", replace_first)
    with pytest.raises(Untrusted):
        bundle_lookup.find(bundle.path, None)


def test_files_that_are_replaced_all_the_time(
    bundle: Signed, pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(bundle, pair)
    trusted(monkeypatch, pair.public)
    good, proof = bundle.path.read_bytes(), signature.beside(bundle.path).read_bytes()
    evil = a_bundle(tmp_path / "evil.safetensors", b"an evil object").path.read_bytes()
    over = threading.Event()

    def attack() -> None:
        fresh = tmp_path / "fresh"
        while not over.is_set():
            for data in (evil, good):
                fresh.write_bytes(data)
                fresh.replace(bundle.path)
                fresh.write_bytes(b"" if data is evil else proof)
                fresh.replace(signature.beside(bundle.path))

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        read: list[Bundle] = []
        for _ in range(400):
            with contextlib.suppress(Untrusted):
                read.append(bundle_lookup.find(bundle.path, None))
        assert {one.manifest["what"] for one in read} <= {"an object"}
        assert all(one.object(name) == b"an object" for one in read for name in one.manifest["objects"])
    finally:
        over.set()
        attacker.join()


def test_processes_that_load_no_bundle_read_signed_ones_only(
    bundle: Signed, pair: Pair, other: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's API server, and C modules before the bundle is loaded."""
    monkeypatch.setenv("AOT_CACHE", str(bundle.path))
    sign(bundle, other)
    trusted(monkeypatch, pair.public)
    assert list(bundle_lookup.of_environment()) == []
    sign(bundle, pair)
    assert [one.digest for one in bundle_lookup.of_environment()] == [bundle.digest]
    monkeypatch.setenv("AOT_CACHE_TRUSTED_KEYS", "")
    assert list(bundle_lookup.of_environment()) == []


@pytest.mark.parametrize("command", ["rehearse", "tune --out tuned.safetensors"])
def test_commands_that_execute_a_bundle_want_it_signed(
    run: Run, bundle: Signed, pair: Pair, other: Pair, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Before they import the recipe that it names."""
    sign(bundle, other)
    trusted(monkeypatch, pair.public)
    name, *options = command.split()
    said = run(name, bundle.path, *options)
    assert said.code == 8 and "is not signed by a key of AOT_CACHE_TRUSTED_KEYS" in said.err
    sign(bundle, pair)
    assert "is not signed" not in run(name, bundle.path, *options).err


# --- a bundle that is written over a signed one -----------------------------------------------------------------------


def test_a_signature_goes_with_the_bundle_that_it_is_of(bundle: Signed, pair: Pair) -> None:
    path = sign(bundle, pair)
    assert a_bundle(bundle.path) == bundle and path.exists(), "the same bytes keep it"
    a_bundle(bundle.path, b"another object")
    assert not path.exists()
    path.write_text("of a bundle that somebody has removed")
    bundle.path.unlink()
    a_bundle(bundle.path)
    assert not path.exists()
