"""One bundle for the whole session, built in a folder of its own; and the same again elsewhere, to compare."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from projects import Project

from aot_cache.artifact import manifest
from aot_cache.store import read_bundle

ELSEWHERE = "another/place"
SEEDS = {"here": "1", ELSEWHERE: "2"}
"""Folder → PYTHONHASHSEED, and there how many processes compile."""


@dataclass(frozen=True)
class Built:
    """The session's builds: the one that the tests serve, and the one beside it."""

    project: Project
    again: Project
    said: dict[str, dict[str, Any]]

    @property
    def bundle(self) -> Path:
        return self.project.bundle()

    def graphs(self) -> list[dict[str, Any]]:
        graphs: list[dict[str, Any]] = manifest.whole(read_bundle(self.bundle)).to_json()["graphs"]
        return graphs


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Both at once, as one process of each leaves a core idle."""
    root = tmp_path_factory.mktemp("graphs")
    projects = [Project.at(root / folder) for folder in SEEDS]
    with ThreadPoolExecutor(len(projects)) as pool:
        runs = list(pool.map(lambda p, seed: p.build(workers=int(seed), PYTHONHASHSEED=seed), projects, SEEDS.values()))
    for run in runs:
        assert run.returncode == 0, run.stderr
    said = {folder: json.loads(run.stdout)["bundles"][0] for folder, run in zip(SEEDS, runs)}
    return Built(projects[0], projects[1], said)


Serve = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def serve(built: Built, request: pytest.FixtureRequest) -> Iterator[Serve]:
    """Run a script as a server of the session's bundle; a script that ran is not run again.

    The script of a fixture `kinds` is called KINDS: those that this session asks for are begun at once, two at a time.
    """
    with ThreadPoolExecutor(2) as pool:
        done: dict[str, Future[dict[str, Any]]] = {}

        def begin(script: str) -> Future[dict[str, Any]]:
            if script not in done:
                done[script] = pool.submit(built.project.serve, script, built.bundle)
            return done[script]

        for item in request.session.items:
            for name in getattr(item, "fixturenames", ()):
                script = getattr(getattr(item, "module", None), name.upper(), None)
                if isinstance(script, str):
                    begin(script)
        yield lambda script: begin(script).result()
        for future in done.values():
            future.cancel()
