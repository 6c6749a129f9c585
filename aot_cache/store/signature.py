"""Signatures of bundles: Ed25519, in a file beside the bundle (`X.safetensors` → `X.safetensors.sig`).

A short text is signed that names the bundle's digest, which covers every byte of it (see `bundle`). So neither signing nor
checking reads an object. The text has two lines, each with a newline at its end:

    aot-cache-bundle-v1
    sha256 <the digest, 64 hex digits>

The file has a line for each signature, the base64 of its 64 bytes. Several lines are several keys', such as the old and the new
one while keys are changed.

Sources: RFC 8032, pure Ed25519. `cosign verify-blob` (cosign 2.0 to 3.1.2, `verify_blob.go`) reads such a file, if it has one
line, and checks with an Ed25519 key of a PEM file in the same way (`LoadVerifier` in sigstore's `verifier.go`). Signing is
another matter: since cosign 2.6 `cosign sign-blob` makes Ed25519ph signatures, which are refused here.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aot_cache.errors import BundleMissing, DeclarationError, StoreError, Untrusted
from aot_cache.store import trust
from aot_cache.store.atomic import open_regular, unwritable, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PASSWORD = "AOT_CACHE_KEY_PASSWORD"
SHORT = 16
"""Number of a key id's characters that are shown to people."""

_BYTES = 64  # of a signature
_MOST_BYTES = 8192  # of a file of signatures: 92 of them
_MOST_PEM = 1 << 20  # bytes of a file of keys
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----.*?-----END \1-----", re.DOTALL)
_MAKE_ONE = "`openssl genpkey -algorithm ed25519` makes one, and `openssl pkey -pubout` its public key"


@dataclass(frozen=True)
class Key:
    """A public key.

    Args:
        id: the sha256 of its DER form (SubjectPublicKeyInfo), 64 hex digits.
        raw: its 32 bytes.
    """

    id: str
    raw: bytes


@dataclass(frozen=True)
class Signatures:
    """What the file beside a bundle has.

    Args:
        path: the file.
        found: 64 bytes each. Whose they are is not known yet.
        problem: why there is none; empty if there is one.
    """

    path: Path
    found: tuple[bytes, ...] = ()
    problem: str = ""

    def by(self, digest: str, keys: Iterable[Key]) -> Iterator[Key]:
        """Those of the keys that have signed the bundle with this digest.

        Raises:
            DeclarationError: cryptography is not installed.
        """
        return (key for key in keys if any(_verifies(key, signature, digest) for signature in self.found))

    def why_not(self, keys: Sequence[Key]) -> str:
        """Why none of the keys has signed the bundle."""
        named = ", ".join(key.id[:SHORT] for key in keys[:5]) + (", …" if len(keys) > 5 else "")
        return self.problem or f"{self.path} is of another bundle or by another key than {named}"


def beside(bundle: Path) -> Path:
    """Path of the file with a bundle's signatures."""
    return bundle.with_name(f"{bundle.name}.sig")


def signed_text(digest: str) -> bytes:
    """What is signed of the bundle with this digest. The first line keeps the signature from meaning anything elsewhere."""
    return f"aot-cache-bundle-v1\nsha256 {digest}\n".encode("ascii")


def read(bundle: Path) -> Signatures:
    """Read the signatures beside a bundle. Never raises: a bad file is `Signatures.problem`."""
    path = beside(bundle)
    try:
        with open_regular(path, "signature") as (file, _):
            data = file.read(_MOST_BYTES + 1)
    except BundleMissing:
        return Signatures(path, problem=f"there is no {path}")
    except StoreError as error:
        return Signatures(path, problem=error.message)
    if len(data) > _MOST_BYTES:
        return Signatures(path, problem=f"{path} has more than {_MOST_BYTES} bytes")
    try:
        found = tuple(base64.b64decode(line, validate=True) for line in data.split())
    except ValueError:
        found = ()
    if not found or any(len(signature) != _BYTES for signature in found):
        return Signatures(path, problem=f"{path} does not have signatures of {_BYTES} bytes in base64")
    return Signatures(path, found)


def require(bundle: Path, digest: str, keys: Sequence[Key]) -> Key:
    """The first of the trusted keys that has signed the bundle at this path with this digest.

    Raises:
        Untrusted: none of them has.
        DeclarationError: cryptography is not installed.
    """
    signatures = read(bundle)
    key = next(signatures.by(digest, keys), None)
    if key is None:
        hint = "sign it (`aot-cache sign`), or copy its .sig file with it"
        raise Untrusted(
            f"{bundle} is not signed by a key of AOT_CACHE_TRUSTED_KEYS: {signatures.why_not(keys)}", hint=hint
        )
    return key


def sign(bundle: Path, digest: str, key: Ed25519PrivateKey, add: bool = False) -> Path:
    """Write the signature of the bundle at this path with this digest; returns the file's path.

    Args:
        add: keep the signatures that are there; else they are replaced.

    Raises:
        StoreError: with `add`, there is a file that has no signatures.
        StoreUnwritable: it cannot be written.
    """
    path, signature = beside(bundle), key.sign(signed_text(digest))
    before = read(bundle) if add and path.exists() else Signatures(path)
    if before.problem:
        raise StoreError(f"cannot add to the signatures: {before.problem}", hint="replace the file: leave --add out")
    lines = dict.fromkeys([*before.found, signature])  # once each: the same key signs the same text alike
    write_atomic(path, b"".join(base64.b64encode(line) + b"\n" for line in lines))
    return path


def remove(bundle: Path) -> None:
    """Remove the signatures beside a bundle, if there are any.

    Raises:
        StoreUnwritable: the file cannot be removed.
    """
    path = beside(bundle)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


# --- keys -------------------------------------------------------------------------------------------------------------


def trusted_keys() -> list[Key] | None:
    """The keys in the files that AOT_CACHE_TRUSTED_KEYS lists, as in PATH. None if that is not set: nothing has to be signed.

    Raises:
        DeclarationError: it is empty, a file has no public key or something else, or cryptography is not installed. Whoever set
            it meant to trust only some.
        Untrusted: others can have written a file.
    """
    listed = os.environ.get("AOT_CACHE_TRUSTED_KEYS")
    if listed is None:
        return None
    paths = [Path(path) for path in listed.split(os.pathsep) if path]
    if not paths:
        hint = "name a PEM file with public keys, or unset it"
        raise DeclarationError("a file of public keys in AOT_CACHE_TRUSTED_KEYS", "an empty value", hint)
    return [key for path in paths for key in public_keys(path, own=True)]


def public_keys(path: Path, own: bool = False) -> list[Key]:
    """The Ed25519 public keys in a PEM file (SubjectPublicKeyInfo), at least one.

    Args:
        own: only if nobody else can have written the file (see `trust`).

    Raises:
        DeclarationError: it has none or something else, cannot be read, or cryptography is not installed.
        Untrusted: others can have written it.
    """
    _require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    expected = f"Ed25519 public keys in {path}"
    try:
        with open_regular(path, "key") as (file, _):  # never waits: a server may read it
            data, status = file.read(_MOST_PEM + 1), os.fstat(file.fileno())
    except StoreError as error:
        raise DeclarationError(expected, error.message, _MAKE_ONE) from error
    if own:
        trust.require_own(path, status, how="")
    blocks = list(_PEM.finditer(data))
    if not blocks or len(data) > _MOST_PEM:
        raise DeclarationError(expected, "no PEM", _MAKE_ONE)
    keys = []
    for block in blocks:
        label = block[1].decode("ascii")
        if label != "PUBLIC KEY":
            raise DeclarationError(expected, f"a {label.lower()}", _MAKE_ONE)
        try:
            key = load_pem_public_key(block[0])
        except (ValueError, UnsupportedAlgorithm) as error:
            raise DeclarationError(expected, f"a key that cannot be read ({error})", _MAKE_ONE) from error
        if not isinstance(key, Ed25519PublicKey):
            raise DeclarationError(expected, f"a key of another kind ({type(key).__name__})", _MAKE_ONE)
        keys.append(_key(key))
    return keys


def private_key(path: Path) -> Ed25519PrivateKey:
    """The Ed25519 private key in a PEM file (PKCS#8). Its password is in AOT_CACHE_KEY_PASSWORD, if it is encrypted.

    Raises:
        DeclarationError: there is none, its password is missing or wrong, or cryptography is not installed.
    """
    _require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    expected, password = f"an Ed25519 private key in {path}", os.environ.get(PASSWORD)
    try:
        with path.open("rb") as file:  # may be a pipe, so that a key need not be in a file
            data = file.read(_MOST_PEM)
    except OSError as error:
        raise DeclarationError(expected, error.strerror or str(error), _MAKE_ONE) from error
    encrypted = b"BEGIN ENCRYPTED PRIVATE KEY" in data
    if encrypted and not password:
        raise DeclarationError(f"the password of {path} in {PASSWORD}", "none", "set it")
    try:
        key = load_pem_private_key(data, password.encode() if encrypted and password else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if encrypted:
            raise DeclarationError(
                f"the password of {path} in {PASSWORD}", "one that does not open it", "correct it"
            ) from error
        raise DeclarationError(expected, "no private key in PEM (PKCS#8)", _MAKE_ONE) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise DeclarationError(expected, f"a key of another kind ({type(key).__name__})", _MAKE_ONE)
    return key


def public_key(key: Ed25519PrivateKey) -> Key:
    """The public key of a private one."""
    return _key(key.public_key())


def _key(key: Ed25519PublicKey) -> Key:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    der = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return Key(hashlib.sha256(der).hexdigest(), key.public_bytes_raw())


def _verifies(key: Key, signature: bytes, digest: str) -> bool:
    _require_library()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, signed_text(digest))
    except InvalidSignature:
        return False
    return True


def _require_library() -> None:
    """Raise DeclarationError if the extra `sign` is not installed: it is imported only where something is signed."""
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        expected = "the package cryptography, which signatures need"
        raise DeclarationError(expected, f"none ({error})", "pip install 'aot-cache[sign]'") from error
