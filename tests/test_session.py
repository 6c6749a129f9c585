"""aot_cache.runtime.session: what is one process's, and strictness that is one bundle's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aot_cache.errors import BundleMissing, Incompatible
from aot_cache.runtime import session
from aot_cache.runtime.session import Session
from aot_cache.upstream.codec import triton_kernel
from aot_cache.upstream.hooks import cuda_libraries


@dataclass(eq=False)
class Kernels:
    """A bundle that cannot be installed."""

    strict: bool
    bundle: Any = field(default_factory=lambda: SimpleNamespace(path=Path("b")))
    report: Any = None

    def waiting(self, device: int) -> bool:
        raise Incompatible(f"strict is {self.strict}", "it is not", "")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has CUDA up, as far as a session asks."""
    monkeypatch.setattr(session.torch_capture, "cuda_is_up", lambda: True)
    monkeypatch.setattr(triton_kernel, "current_device", lambda: 0)
    monkeypatch.setattr(Session, "arm", lambda self: None)
    monkeypatch.setattr(Session, "triton_hooks", lambda self: iter(()))


def test_sessions_share_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    one, other = Session(said.append), Session(said.append)
    assert one.load(tmp_path / "none", None, False, []) is None
    assert [s.ledger.to_json()["total"]["rejected_bundle"] for s in (one, other)] == [1, 0]
    assert len(said) == 1 and "none" in said[0]
    with pytest.raises(BundleMissing):
        other.load(tmp_path / "none", None, True, [])


@pytest.mark.usefixtures("here")
def test_a_strict_bundle_makes_no_other_one_strict() -> None:
    said: list[str] = []
    mine = Session(said.append)
    lax, strict = Kernels(strict=False), Kernels(strict=True)
    mine._kernels += [lax, strict]  # type: ignore[list-item]
    with pytest.raises(Incompatible, match="strict is True"):
        mine.prime()
    assert len(said) == 1 and "strict is False" in said[0] and mine.kernels() == []


def test_whoever_asks_why_is_told_where_dynamo_cannot_be_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    mine = Session(said.append)

    monkeypatch.setitem(__import__("sys").modules, "aot_cache.runtime.graph_lookup", None)
    with pytest.raises(Incompatible, match="cannot be explained; hint: see the warning"):
        mine.explain(lambda: None)
    assert len(said) == 1 and "graph_lookup" in said[0]


@pytest.mark.parametrize("strict", [True, False])
def test_graphs_that_are_refused_are_counted_once(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loaded before Dynamo is imported; what comes after a bundle whose graphs are refused is looked at, too."""
    said: list[str] = []
    mine = Session(said.append)
    seen: list[Any] = []

    def refuse(bundle: Any) -> None:
        seen.append(bundle)
        raise Incompatible("no graphs here")

    monkeypatch.setattr(session.bundle_lookup, "check_torch", refuse)
    monkeypatch.setattr(mine.hooks, "once", lambda *_: None)
    mine._waiting_graphs += [Kernels(strict=False), Kernels(strict=strict)]  # type: ignore[list-item]
    if strict:
        with pytest.raises(Incompatible, match="no graphs here"):
            mine._hook_dynamo()
    else:
        mine._hook_dynamo()
    assert len(seen) == 2 and mine.ledger.to_json()["total"]["rejected_bundle"] == 2
    assert len(said) == (1 if strict else 2)


@pytest.mark.parametrize("asked", [True, False])
def test_an_engine_may_make_the_libraries_ready_itself(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(cuda_libraries, "prime", lambda: done.append(1))
    session = Session(lambda _: None)
    assert session.primes_libraries
    session.primes_libraries = asked
    session._prime_libraries()
    assert bool(done) == asked
