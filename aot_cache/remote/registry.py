"""An OCI registry over HTTP: the few requests that pushing and pulling take.

oras finds the credentials (docker's config, its credential helpers, ORAS_USER and ORAS_PASS) and answers the registry's
challenges. Blobs are moved here, because oras reads a whole blob into memory to push it, cannot continue a download, and its own
retries wait for two minutes before they say that nothing answers.

Sources: OCI distribution-spec 1.1; oras 0.2.43 (oras/provider.py, oras/auth/token.py).
"""

from __future__ import annotations

import inspect
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

from aot_cache.errors import BundleCorrupt, RemoteDenied, RemoteError, RemoteMissing
from aot_cache.remote import INSTALL, Progress
from aot_cache.remote.image import MANIFEST_TYPE, MAX_MANIFEST, digest_of
from aot_cache.remote.reference import Image

_TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two bytes
_PIECE = 1 << 20  # bytes
_AUTHS = (
    "DOCKER_CONFIG",
    "REGISTRY_AUTH_FILE",
)  # a folder with config.json, as docker has it; a file, as podman has it


class Registry:
    """The repository of an image, and its blobs.

    Raises:
        RemoteError: oras is not installed.
    """

    def __init__(self, image: Image) -> None:
        try:
            import oras.container
            import oras.provider
        except ImportError as error:
            raise RemoteError("registries need the package oras", hint=INSTALL) from error
        logging.getLogger("oras.logger").setLevel(logging.CRITICAL + 1)  # what goes wrong is said here
        self._image = image
        self._base = f"{'http' if image.plain_http else 'https'}://{image.registry}/v2/{image.repository}/"
        self._oras = oras.provider.Registry(image.registry, insecure=image.plain_http)
        self._oras.auth = _auth(self._oras)
        self._container = oras.container.Container(str(image))
        self._ask = inspect.unwrap(oras.provider.Registry.do_request)  # without its retries
        for scheme in ("http://", "https://"):
            self._oras.session.mount(scheme, _adapter())
        with self._said("log in to"):
            self._oras.auth.load_configs(self._container, configs=_configs())

    def manifest(self) -> bytes:
        """The image's manifest.

        Raises:
            RemoteMissing: there is no such image.
            BundleCorrupt: it does not hash to the digest that the image was named by.
            RemoteError: see `Registry`.
        """
        name = self._image.digest or self._image.tag
        with self._said("read"):
            answer = self._request("GET", f"manifests/{name}", {"Accept": MANIFEST_TYPE}, stream=True)
            self._need(answer, 200)
            data: bytes = answer.raw.read(MAX_MANIFEST + 1, decode_content=True)
        if len(data) > MAX_MANIFEST:
            raise BundleCorrupt(f"the manifest at {self._image} has more than {MAX_MANIFEST:,} bytes")
        if self._image.digest and digest_of(data) != self._image.digest:
            raise BundleCorrupt(f"the manifest at {self._image} does not hash to its name", hint="push it again")
        return data

    def put_manifest(self, data: bytes) -> None:
        """Give the image its manifest, and by that its tag. Last: what the manifest names must be there.

        Raises:
            RemoteError: see `Registry`.
        """
        with self._said("write"):
            answer = self._request("PUT", f"manifests/{self._image.tag}", {"Content-Type": MANIFEST_TYPE}, data)
            self._need(answer, 201)

    def has(self, digest: str) -> bool:
        """Whether the repository has a blob."""
        with self._said("read"):
            answer = self._request("HEAD", f"blobs/{digest}")
            if answer.status_code == 404:
                return False
            self._need(answer, 200)
        return True

    def upload(self, digest: str, blob: Path, progress: Progress) -> None:
        """Send a blob, in one request: every registry takes that, and not every one takes pieces.

        Raises:
            RemoteError: see `Registry`.
        """
        with self._said("write"):
            for again in (True, False):
                begun = self._request("POST", "blobs/uploads/")
                self._need(begun, 202)
                place = urljoin(begun.url, begun.headers["Location"])
                place += ("&" if urlsplit(place).query else "?") + urlencode({"digest": digest})
                with _Told(blob, progress) as body:
                    # Not by `_request`: it would send what is left of the file after a challenge.
                    headers = {**self._oras.auth.get_auth_header(), "Content-Type": "application/octet-stream"}
                    answer = self._oras.session.put(place, data=body if body.size else b"", headers=headers)
                if answer.status_code == 401 and again:  # its token has expired
                    self._oras.auth.authenticate_request(answer, {}, refresh=True)
                    continue
                self._need(answer, 201)
                return

    def download(self, digest: str, offset: int) -> Iterator[bytes]:
        """The bytes of a blob from `offset` on. They are not checked.

        Raises:
            RemoteMissing: there is no such blob.
            RemoteError: see `Registry`.
        """
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        with self._said("read"):
            with self._request("GET", f"blobs/{digest}", headers, stream=True) as answer:
                self._need(answer, 200, 206)
                skip = offset if answer.status_code == 200 else 0  # a registry may not know ranges
                for piece in answer.iter_content(_PIECE):
                    yield piece[skip:]
                    skip = max(0, skip - len(piece))

    def _request(
        self,
        method: str,
        path: str,
        headers: dict[str, str] | None = None,
        data: bytes | None = None,
        stream: bool = False,
    ) -> Any:
        # Without compression: a range is one of the blob's bytes.
        given = {"Accept-Encoding": "identity", **(headers or {})}
        return self._ask(self._oras, self._base + path, method, data=data, headers=given, stream=stream)

    @contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """Any error of requests as one of ours. Its text is left out: it has URLs, and these may hold signatures."""
        import requests

        where, there = f"{what} {self._image}", self._image.registry
        try:
            yield
        except requests.exceptions.SSLError as error:
            hint = "add its certificate authority (REQUESTS_CA_BUNDLE), or write oci+http:// for one without TLS"
            raise RemoteError(f"cannot {where}: {there} has no certificate that is trusted", hint=hint) from error
        except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
            hint = "check its name and the network"
            raise RemoteError(f"cannot {where}: {there} does not answer", hint=hint) from error
        except (requests.exceptions.RequestException, ValueError, KeyError, OSError) as error:
            raise RemoteError(f"cannot {where}: {type(error).__name__}", hint="see -vv") from error

    def _need(self, answer: Any, *statuses: int) -> None:
        """Raise unless the registry has answered with one of the statuses."""
        status = answer.status_code
        if status in statuses:
            return
        said = _said_by(answer)
        text = f"{self._image.registry} says {status}{said} about {self._image}"
        if status == 404:
            raise RemoteMissing(
                f"there is no {self._image}, or it is hidden", hint="check the name, or log in (`docker login`)"
            )
        if "quota" in said.lower() or status in (413, 507):
            raise RemoteError(text, hint="its quota is used up, or the bundle is too large for it: remove old tags")
        if status in (401, 403):
            raise RemoteDenied(text, hint=f"log in with `docker login {self._image.registry}`, as one who may do that")
        if status == 429 or status >= 500:
            raise RemoteError(text, hint="try again later")
        raise RemoteError(text, hint="see the registry's own log")


def _auth(registry: Any) -> Any:
    """How oras answers a challenge, with what its own way lacks: a registry that wants the password itself (`Basic`), and a new
    token where the last one was for less, such as for pulling."""
    from oras.auth.token import TokenAuth

    class Auth(TokenAuth):  # type: ignore[misc]  # oras has no types
        def authenticate_request(
            self, original: Any, headers: dict[str, str], refresh: bool = False
        ) -> tuple[Any, bool]:
            self.token, self.basic = None, False
            if original.headers.get("Www-Authenticate", "").lower().startswith("basic"):
                self.basic = bool(getattr(self, "_basic_auth", ""))
                self.token = "basic" if self.basic else None
            else:
                super().authenticate_request(original, headers, refresh=True)
            return {**(headers or {}), **self.get_auth_header()}, True

        def get_auth_header(self) -> dict[str, str]:
            if self.token and self.basic:
                return {"Authorization": f"Basic {self._basic_auth}"}
            return dict(super().get_auth_header())

    auth = Auth()
    auth.basic = False
    auth.session, auth.prefix, auth._tls_verify = registry.session, registry.prefix, True  # noqa: SLF001 # as get_auth_backend does
    if os.environ.get("ORAS_USER") and os.environ.get("ORAS_PASS"):
        auth.set_basic_auth(os.environ["ORAS_USER"], os.environ["ORAS_PASS"])
    return auth


def _configs() -> list[str]:
    """Files with credentials that the environment names; oras adds docker's own."""
    folder, file = (os.environ.get(name, "") for name in _AUTHS)
    found = [os.path.join(folder, "config.json") if folder else "", file]
    return [path for path in found if path and os.path.exists(path)]


def _adapter() -> Any:
    """requests with a time limit, and with second tries where a registry is busy."""
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    class Patient(HTTPAdapter):
        def send(self, request: Any, **options: Any) -> Any:  # type: ignore[override]
            return super().send(request, **{**options, "timeout": options.get("timeout") or _TIMEOUT})

    # Not for uploads: what is sent again is sent from the start, by `Registry.upload`.
    retry = Retry(3, backoff_factor=0.3, status_forcelist=(429, 502, 503, 504), raise_on_status=False, redirect=False)
    return Patient(max_retries=retry)


def _said_by(answer: Any) -> str:
    """` (CODE: message)` of a registry's error document; empty if it has none."""
    try:
        first = answer.json()["errors"][0]
        text = ": ".join(str(first[name]) for name in ("code", "message") if first.get(name))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError):
        return ""
    return f" ({''.join(c for c in text if c.isprintable())[:200]})"


class _Told(io.FileIO):
    """A file that tells how far it was read."""

    def __init__(self, path: Path, progress: Progress) -> None:
        super().__init__(path, "rb")
        self.size = path.stat().st_size
        self._progress = progress

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._progress(self.tell())
        return data
