"""What tests of `aot_cache.remote` share: bundles that are quickly made, and servers in processes of their own."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limits import HANGS
from raw_manifest import split

from aot_cache.artifact import target
from aot_cache.store import write_bundle

USER, PASSWORD = "ada", "s3cret"


def a_bundle(path: Path, size: int = 3000, target_id: str = "h200", **more: Any) -> str:
    """Write a sound bundle with random bytes as its one object; returns its digest."""
    lists = ("cases", "kernels", "units", "tunings", "pruned", "failed", "native", "graphs", "calls")
    whole: dict[str, Any] = {name: [] for name in lists}
    whole |= {"kind": "units", "recipe": "small", "spec": "small", "origin": "traced", "ranks": 1, "metadata": {}}
    whole |= {"target": target.get(target_id).properties(), "complete": True}
    whole |= {"toolchain": {"triton": "3.7.1"}, "graph_key": {"torch": "2.13.0"}}
    header, details = split({**whole, **more})
    return write_bundle(path, header, {hashlib.sha256(data).hexdigest(): data for data in (os.urandom(size), details)})


def listing(folder: Path) -> list[str]:
    """Everything in a folder, hidden files included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


@dataclass
class Registry:
    """A registry that runs: `host` is what stands before the repository in an image's name."""

    host: str
    folder: Path

    def blobs(self) -> dict[str, Path]:
        return {path.name: path for path in (self.folder / "blobs").iterdir()}

    def log(self) -> list[dict[str, Any]]:
        path = self.folder / "log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def served(self) -> int:
        """Bytes of blobs that were sent."""
        return sum(line["sent"] for line in self.log() if "/blobs/" in line["path"] and line["method"] == "GET")


@contextmanager
def small_registry(folder: Path, *options: str) -> Iterator[Registry]:
    """The registry of small_registry.py."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("small_registry.py")), str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield Registry(f"127.0.0.1:{int(server.stdout.readline())}", folder)
        finally:
            server.kill()


@contextmanager
def distribution(folder: Path) -> Iterator[str]:
    """CNCF's registry, whose program is `registry` or, in Debian's docker-registry, `docker-registry`: its host and port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True)
    config = (
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\nhttp: {{addr: 127.0.0.1:{port}}}\n"
    )
    (folder / "config.yml").write_text(config)
    program = shutil.which("docker-registry") or shutil.which("registry")
    assert program is not None
    with (folder / "log").open("w") as log:
        server = subprocess.Popen([program, "serve", str(folder / "config.yml")], stdout=log, stderr=log)
        try:
            wait_for(port)
            yield f"127.0.0.1:{port}"
        finally:
            server.kill()
            server.wait()


def wait_for(port: int) -> None:
    """Until something listens."""
    end = time.monotonic() + HANGS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.05)


@contextmanager
def s3_server() -> Iterator[str]:
    """moto's S3 in a process of its own: its URL."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # else what another file's tests have made asks their server, which is gone
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def s3_environment(url: str) -> dict[str, str]:
    """The variables with which boto and so s3fs find that server."""
    names = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "s3cret", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**names, "AWS_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true"}


def docker_config(folder: Path, host: str, password: str = PASSWORD) -> Path:
    """A folder with what `docker login` writes."""
    folder.mkdir(exist_ok=True)
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (folder / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))
    return folder
