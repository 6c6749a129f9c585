"""What Inductor's autotuner chose elsewhere, and Inductor's keys on another machine: Inductor itself asks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch._inductor import codecache, config
from torch._inductor.runtime.autotune_cache import AutotuneCache
from triton import Config

from aot_cache.upstream.hooks import inductor_choices, inductor_keys

Serve = Callable[[dict[str, bytes]], None]
_READ = AutotuneCache._read
CONFIGS = [Config({"XBLOCK": size}) for size in (32, 64, 128)]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """`inductor_choices.serve`, taken out after the test."""
    with contextlib.ExitStack() as undo:

        def serve(choices: dict[str, bytes]) -> None:
            undo.callback(inductor_choices.serve(choices))

        yield serve
    assert AutotuneCache._read is _READ


def cache(folder: Path, configs_hash: str = "configs") -> Any:
    return AutotuneCache.create({}, str(folder / "kernel.py"), configs_hash)


def chosen(folder: Path, size: int) -> dict[str, bytes]:
    """The file in which Inductor keeps that this size was chosen for a kernel in `folder`."""
    folder.mkdir()
    cache(folder).save(next(one for one in CONFIGS if one.kwargs["XBLOCK"] == size), 1000)
    (file,) = folder.glob(f"*{inductor_choices.SUFFIX}")
    return {file.name: file.read_bytes()}


@pytest.mark.contract("inductor_choices")
def test_a_choice_made_in_another_folder_is_found(tmp_path: Path, serve: Serve) -> None:
    choices = chosen(tmp_path / "there", 64)
    gone = tmp_path / "gone"
    assert cache(gone).read_best({}, CONFIGS) is None
    serve(choices)
    for _ in range(2):
        assert cache(gone).read_best({}, CONFIGS).kwargs == {"XBLOCK": 64}
    assert not gone.exists(), "nothing is written"
    other = AutotuneCache.create({}, str(gone / "other.py"), "configs")
    assert other is not None and other.read_best({}, CONFIGS) is None, "another kernel"
    assert cache(gone, "others").read_best({}, CONFIGS) is None, "the kernel has other configs here"


@pytest.mark.contract("inductor_choices")
def test_what_inductor_has_itself_comes_first(tmp_path: Path, serve: Serve) -> None:
    serve(chosen(tmp_path / "there", 64))
    chosen(tmp_path / "here", 128)
    assert cache(tmp_path / "here").read_best({}, CONFIGS).kwargs == {"XBLOCK": 128}


@pytest.mark.contract("inductor_keys")
def test_a_key_is_made_as_where_it_was_compiled() -> None:
    """On this thread, for Inductor's settings, and without changing them."""
    import torch._dynamo.config

    before, elsewhere = config.save_config_portable(), []
    there = {"cpp.cxx": (None, "/there/g++")}
    module = torch.fx.symbolic_trace(torch.nn.Identity())

    def key() -> str:
        return codecache.compiled_fx_graph_hash(module, [], {}, [])[0]

    with config.patch(there):
        elsewhere_key = key()
    assert key() != elsewhere_key
    with inductor_keys.with_settings(there):
        assert {**before, **there} == config.save_config_portable() != before
        assert key() == elsewhere_key
        assert config.cpp.cxx == before["cpp.cxx"]
        thread = threading.Thread(target=lambda: elsewhere.append(config.save_config_portable()))
        thread.start()
        thread.join()
        assert "cpp.cxx" not in torch._dynamo.config.save_config_portable()
    assert elsewhere == [before] and config.save_config_portable() == before
