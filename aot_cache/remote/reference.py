"""What a REF on the command line names.

With a scheme it is a folder (`file://`, `s3://`, `gs://`, `az://`, …: whatever fsspec knows), except for `oci://` and
`oci+http://`. Without one it is an image in a registry, as in `docker pull`: `registry.example.com/team/name:tag`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from aot_cache.errors import DeclarationError

_HTTPS, _HTTP = "oci", "oci+http"
# The grammars of distribution's reference package (reference/regexp.go), without the parts that no registry on a network has.
_REGISTRY = re.compile(r"localhost(:\d+)?|[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)+(:\d+)?|[A-Za-z0-9.-]+:\d+", re.ASCII)
_REPOSITORY = re.compile(r"[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*(/[a-z0-9]+(([._]|__|-+)[a-z0-9]+)*)*", re.ASCII)
_TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_LOOPBACK = re.compile(r"(localhost|127(\.\d+){3})(:\d+)?", re.ASCII)


@dataclass(frozen=True)
class Image:
    """An image in a registry.

    Args:
        registry: host, and port if there is one.
        repository: its path there.
        tag: the tag; empty if there is a digest.
        digest: `sha256:` and 64 hex digits of the image's manifest; empty if there is a tag.
        plain_http: whether it is asked without TLS.
    """

    registry: str
    repository: str
    tag: str
    digest: str
    plain_http: bool

    def __str__(self) -> str:
        last = f"@{self.digest}" if self.digest else f":{self.tag}"
        return f"{self.registry}/{self.repository}{last}"


@dataclass(frozen=True)
class Folder:
    """A folder, or one bundle in it: a URL that fsspec knows, without a slash at its end."""

    url: str

    @property
    def is_bundle(self) -> bool:
        return self.url.endswith(".safetensors")

    def __str__(self) -> str:
        return self.url


def parse(text: str) -> Image | Folder:
    """What `text` names.

    Raises:
        DeclarationError: nothing that this could be.
    """
    scheme, there, rest = text.partition("://")
    if not there:
        scheme, rest = _HTTPS, text
    if "@" in rest.partition("/")[0]:  # not echoed: what stands there may be a password
        hint = "log in with `docker login`, or use the object store's own variables"
        raise DeclarationError("a REF without a user and password in it", "one that has them", hint)
    if scheme in (_HTTPS, _HTTP):
        return _image(text, rest, scheme == _HTTP)
    if not rest.strip("/"):
        raise DeclarationError("a folder behind the scheme of REF", repr(text), "as in s3://bucket/folder")
    return Folder(text.rstrip("/"))


def _image(text: str, rest: str, plain_http: bool) -> Image:
    registry, _, path = rest.partition("/")
    name, at, digest = path.partition("@")
    repository, _, tag = name.partition(":")
    if not (_REGISTRY.fullmatch(registry) and _REPOSITORY.fullmatch(repository)):
        hint = "write registry.example.com/team/name:tag, or a folder as file:///path or s3://bucket/folder"
        raise DeclarationError("an image's name or a URL as REF", repr(text), hint)
    if at and not tag and _DIGEST.fullmatch(digest):
        return Image(registry, repository, "", digest, plain_http or _is_here(registry))
    if at or not _TAG.fullmatch(tag):
        hint = "add one, as in registry.example.com/team/name:v1"
        raise DeclarationError("an image's name with a tag, or with @sha256:…, as REF", repr(text), hint)
    return Image(registry, repository, tag, "", plain_http or _is_here(registry))


def _is_here(registry: str) -> bool:
    """Whether a registry is on this machine: those are asked without TLS, as docker does."""
    return _LOOPBACK.fullmatch(registry) is not None
