"""A small OCI registry in a process of its own: blobs, uploads, manifests, ranges, and both kinds of challenge.

    python small_registry.py FOLDER [--auth basic|token] [--no-ranges] [--piece BYTES --pause SECONDS]

Prints its port. FOLDER/blobs/HEX are the blobs, FOLDER/tags/REPOSITORY/NAME the manifests, and FOLDER/log has a line of JSON for
each request: method, path, status, the bytes of the body that were sent, and whether it had credentials.

By distribution-spec 1.1: end-1 to end-7, HEAD and ranges of blobs. User and password are `ada` and `s3cret`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

USER, PASSWORD = "ada", "s3cret"
_BASIC = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
_PATH = re.compile(r"/v2/(?P<name>.+)/(?P<kind>blobs/uploads|blobs|manifests)/(?P<rest>[^/]*)")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    options: argparse.Namespace
    folder: Path
    uploads: dict[str, bytes] = {}  # noqa: RUF012 # of the whole server
    tokens: dict[str, set[str]] = {}  # noqa: RUF012

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        size = headers.pop("Content_Length", str(len(body)))
        for name, value in {**headers, "Content_Length": size}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        sent = 0
        try:
            piece = self.options.piece or len(body) or 1
            while self.command != "HEAD" and sent < len(body):
                self.wfile.write(body[sent : sent + piece])
                sent += len(body[sent : sent + piece])
                if self.options.piece:
                    time.sleep(self.options.pause)
        except OSError:
            self.close_connection = True
        line = {"method": self.command, "path": self.path, "status": status, "sent": sent}
        line["credentials"] = "Authorization" in self.headers
        with (self.folder / "log").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _fail(self, status: int, code: str, **headers: str) -> None:
        document = {"errors": [{"code": code, "message": f"this is {code.lower()}"}]}
        self._answer(status, json.dumps(document).encode(), Content_Type="application/json", **headers)

    def _allowed(self, name: str) -> bool:
        """Whether the request may go on; else it has been answered with a challenge."""
        given, needs = self.headers.get("Authorization", ""), "pull" if self.command in ("GET", "HEAD") else "push"
        if self.options.auth == "basic" and given != _BASIC:
            self._fail(401, "UNAUTHORIZED", WWW_Authenticate='Basic realm="small"')
            return False
        if self.options.auth == "token" and needs not in self.tokens.get(given.removeprefix("Bearer "), set()):
            scope = "pull" if needs == "pull" else "pull,push"
            realm = f"http://{self.headers['Host']}/token"
            challenge = f'Bearer realm="{realm}",service="small",scope="repository:{name}:{scope}"'
            self._fail(401, "UNAUTHORIZED", WWW_Authenticate=challenge)
            return False
        if name.startswith("forbidden/"):
            self._fail(403, "DENIED")
            return False
        return True

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _any(self) -> None:
        body = self._body()
        where = urlsplit(self.path)
        if where.path == "/token":
            if self.headers.get("Authorization") != _BASIC:
                return self._fail(401, "UNAUTHORIZED")
            token = uuid.uuid4().hex
            self.tokens[token] = set(parse_qs(where.query)["scope"][0].rpartition(":")[2].split(","))
            return self._answer(200, json.dumps({"token": token}).encode())
        found = _PATH.fullmatch(where.path)
        if found is None:
            return self._fail(404, "NAME_UNKNOWN")
        if not self._allowed(found["name"]):
            return None
        query = {name: values[0] for name, values in parse_qs(where.query).items()}
        return getattr(self, f"_{found['kind'].replace('/', '_')}")(found["name"], found["rest"], query, body)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = _any

    def _blobs(self, name: str, digest: str, query: dict[str, str], body: bytes) -> None:
        path = self.folder / "blobs" / digest.removeprefix("sha256:")
        if not path.is_file():
            return self._fail(404, "BLOB_UNKNOWN")
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and not self.options.no_ranges:
            begin = int(wanted[1])
            if begin >= len(data):
                return self._fail(416, "RANGE_INVALID")
            return self._answer(206, data[begin:], Content_Range=f"bytes {begin}-{len(data) - 1}/{len(data)}")
        return self._answer(200, data if self.command != "HEAD" else b"", Content_Length=str(len(data)))

    def _blobs_uploads(self, name: str, session: str, query: dict[str, str], body: bytes) -> None:
        if self.command == "POST":
            session = uuid.uuid4().hex
            self.uploads[session] = b""
            return self._answer(202, Location=f"/v2/{name}/blobs/uploads/{session}?_state=signed")
        if session not in self.uploads:
            return self._fail(404, "BLOB_UPLOAD_UNKNOWN")
        if len(body) > 64 << 20 or name.startswith("full/"):
            return self._fail(413, "SIZE_INVALID")
        self.uploads[session] += body
        if self.command == "PATCH":
            return self._answer(202, Location=f"/v2/{name}/blobs/uploads/{session}?_state=signed")
        data = self.uploads.pop(session)
        if f"sha256:{hashlib.sha256(data).hexdigest()}" != query.get("digest"):
            return self._fail(400, "DIGEST_INVALID")
        (self.folder / "blobs" / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return self._answer(201, Location=f"/v2/{name}/blobs/{query['digest']}")

    def _manifests(self, name: str, reference: str, query: dict[str, str], body: bytes) -> None:
        folder = self.folder / "tags" / name
        if self.command == "PUT":
            found = json.loads(body)
            for part in [found["config"], *found["layers"]]:
                blob = self.folder / "blobs" / part["digest"].removeprefix("sha256:")
                if not blob.is_file() or blob.stat().st_size != part["size"]:
                    return self._fail(400, "MANIFEST_BLOB_UNKNOWN")
            folder.mkdir(parents=True, exist_ok=True)
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            for alias in (reference, digest):
                (folder / alias).write_bytes(body)
            return self._answer(201, Docker_Content_Digest=digest)
        if not (folder / reference).is_file():
            return self._fail(404, "MANIFEST_UNKNOWN")
        data = (folder / reference).read_bytes()
        return self._answer(200, data, Content_Type="application/vnd.oci.image.manifest.v1+json")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--auth", choices=["none", "basic", "token"], default="none")
    parser.add_argument("--no-ranges", action="store_true")
    parser.add_argument("--piece", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0.0)
    Handler.options = parser.parse_args()
    Handler.folder = Handler.options.folder
    for name in ("blobs", "tags"):
        (Handler.folder / name).mkdir(parents=True, exist_ok=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
