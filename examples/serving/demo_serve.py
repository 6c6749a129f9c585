#!/usr/bin/env python3
"""Start serve.py with a bundle, send it requests, and stop it. Exit code 1 if it traced or compiled anything.

python examples/serving/demo_serve.py BUNDLE --model qwen3.5-tiny --device cpu …     # options after the bundle go to serve.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from aot_cache.runtime.ledger import HARMFUL

Json = Any
SERVE = Path(__file__).with_name("serve.py")
WHOLE = {"prompt": [1, 2, 3], "max_tokens": 8, "temperature": 0}
STREAM = {"prompt": list(range(100, 117)), "max_tokens": 6, "temperature": 1, "seed": 7, "stream": True}
"""A prompt longer than a chunk of 8 tokens: prefilled in parts of 8, 8 and 1."""


def start(bundle: str, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """Start the server. Returns it and its address; it may not be ready yet."""
    environment = {**os.environ, "AOT_CACHE": bundle, "AOT_CACHE_STRICT": "1"}
    # fla-core warns on every machine without a GPU.
    environment.setdefault("PYTHONWARNINGS", "ignore::UserWarning:fla.utils.hardware")
    command = [sys.executable, str(SERVE), *options, "--port", "0"]
    print(f"$ AOT_CACHE={bundle} examples/serving/serve.py {' '.join(options)}", flush=True)
    server = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
    assert server.stdout is not None
    return server, server.stdout.readline().strip()


def wait(server: subprocess.Popen[str], address: str) -> None:
    """Wait until the server takes requests.

    Raises:
        SystemExit: the server ended.
    """
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health").close()
        except urllib.error.URLError:  # 503 while it is starting
            time.sleep(0.1)
        else:
            return
    raise SystemExit(f"the server ended with {server.returncode}")


def said(server: subprocess.Popen[str]) -> None:
    """Print the server's table about its start, up to the line with the misses."""
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="")
        if line.startswith("misses"):
            break


def ask(address: str, body: Json) -> None:
    """Send a request, and print the answer as it arrives."""
    text = json.dumps(body)
    print(f"\n$ curl {address}/v1/completions -d '{text}'", flush=True)
    with urllib.request.urlopen(f"{address}/v1/completions", data=text.encode()) as answer:
        for line in answer:
            if line.strip():
                print(line.decode().strip(), flush=True)


def harm(address: str) -> list[str]:
    """What the server did although a bundle should prevent it; empty if every first call got its graph from the bundle."""
    print(f"\n$ curl {address}/aot", flush=True)
    with urllib.request.urlopen(f"{address}/aot") as answer:
        stats = json.load(answer)
    total = stats["total"]
    print(f"{'answered from the bundle':28}{total['graph']:>4}  first calls of compiled functions")
    for kind in HARMFUL:
        print(f"{kind:28}{total[kind]:>4}  since the process began, {stats['after_seal'][kind]} of them after ready")
    print(f"{'misses':28}{len(stats['misses']):>4}", flush=True)
    # On a GPU, ready() itself loads modules; after it none may be loaded.
    harmful = {kind: (stats["after_seal"] if kind == "module_load" else total)[kind] for kind in HARMFUL}
    found = [kind for kind, count in harmful.items() if count] + ["a miss"] * bool(stats["misses"])
    return found if total["graph"] else [*found, "nothing came from the bundle"]


def main() -> int:
    bundle, *options = sys.argv[1:]
    server, address = start(bundle, options)
    try:
        wait(server, address)
        said(server)
        ask(address, WHOLE)
        ask(address, STREAM)
        found = harm(address)
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    print(f"\nserver stopped; {'FAILED: ' + ', '.join(found) if found else 'nothing was traced or compiled in it'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
