"""A missed kernel without a C compiler: launched through torch, with what Triton's own launcher would pass."""

from __future__ import annotations

import importlib
import subprocess
from typing import Any

import pytest
import torch

from aot_cache.upstream.hooks import torch_launcher, triton_launcher
from aot_cache.upstream.hooks.torch_launcher import TorchLauncher
from aot_cache.upstream.versions import LAUNCHER_PER_SIGNATURE

TYPES = ("*bf16", "i32", "constexpr", ("fp32", "*i64", "constexpr"), "i1", "u64")
ARGS = ("tensor", 7, 64, (0.5, None, "c"), True, 2**63)
WHY = subprocess.CalledProcessError(1, ["gcc"])


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []

    class Launcher:
        @staticmethod
        def _launch_kernel(*given: Any) -> None:
            found.append(given)

    monkeypatch.setattr(torch._C, "_StaticCudaLauncher", Launcher, raising=False)
    return found


def launch(launcher: TorchLauncher, hooks: list[Any], *, ctas: int = 1, dependent: bool = False, grid: int = 3) -> None:
    def note(about: Any) -> None:
        hooks.append(about)

    kernel = (4, ctas, 1024)
    launcher.launch(grid, 2, 1, 99, 1234, False, dependent, None, "scratch", kernel, "about", note, note, *ARGS)


def test_what_is_passed(launched: list[tuple[Any, ...]]) -> None:
    hooks: list[Any] = []
    launch(TorchLauncher(TYPES, WHY), hooks)
    args = ("tensor", 7, 0.5, None, True, 2**63, None, "scratch")
    assert launched == [(1234, 3, 2, 1, 4, 1024, "OifOiKOO", args, 99)] and hooks == ["about", "about"]


def test_an_empty_grid_launches_nothing(launched: list[tuple[Any, ...]]) -> None:
    hooks: list[Any] = []
    launch(TorchLauncher(TYPES, WHY), hooks, grid=0)
    assert not launched and hooks == ["about", "about"]


@pytest.mark.parametrize("how", [{"ctas": 2}, {"dependent": True}])
def test_what_torch_cannot_launch_fails_as_without_us(launched: list[Any], how: dict[str, Any]) -> None:
    with pytest.raises(subprocess.CalledProcessError):
        launch(TorchLauncher(TYPES, WHY), [], **how)
    assert not launched


@pytest.mark.parametrize("types", [("fp16",), ("tensordesc<bf16[1]>",), (("i32", "bf16"),)])
def test_types_that_torch_does_not_have(launched: list[Any], types: Any) -> None:
    with pytest.raises(KeyError):
        TorchLauncher(types, WHY)


@pytest.mark.contract("torch_launcher")
def test_torch_has_the_same_letters() -> None:
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedTritonKernel

    theirs = StaticallyLaunchedTritonKernel.type_mappings()
    assert {name: theirs[name] for name in torch_launcher._LETTERS} == torch_launcher._LETTERS
    if torch.version.cuda:
        assert callable(torch._C._StaticCudaLauncher._launch_kernel)  # type: ignore[attr-defined]


@pytest.mark.contract("torch_launcher", "triton_launcher")
def test_where_gcc_fails(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton's own driver asks for a launcher, and there is no compiler. Later releases of Triton need no launcher."""
    nvidia: Any = importlib.import_module("triton.backends.nvidia.driver")
    if not hasattr(nvidia, "make_launcher"):
        assert minor_of_triton() not in LAUNCHER_PER_SIGNATURE
        return

    def no_compiler(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError(2, "No such file", "gcc")

    monkeypatch.setattr(nvidia, "library_dirs", list)
    monkeypatch.setattr("triton.runtime.build._build", no_compiler)
    undo = triton_launcher.serve(lambda key: None)
    try:
        source = nvidia.make_launcher({}, {"x": "*bf16", "n": "i32", "B": "constexpr"}, None)
        made = nvidia.compile_module_from_src(
            src=source, name=triton_launcher.LAUNCHER, library_dirs=[], include_dirs=[]
        )
        assert isinstance(made, TorchLauncher)
        made.launch(1, 1, 1, 0, 5, False, False, None, None, (4, 1, 0), None, None, None, "x", 3, 64)
        assert launched[-1][6:8] == ("OiOO", ("x", 3, None, None))
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        with pytest.raises(FileNotFoundError):
            nvidia.compile_module_from_src(src="int other;", name="cuda_utils", library_dirs=[], include_dirs=[])
        half = nvidia.make_launcher({}, {"x": "fp16"}, None)
        with pytest.raises(FileNotFoundError):
            nvidia.compile_module_from_src(src=half, name=triton_launcher.LAUNCHER, library_dirs=[], include_dirs=[])
    finally:
        undo()


def minor_of_triton() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])
