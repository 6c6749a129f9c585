"""Settings of the whole process: what is set inside is put back, what an import sets stays."""

from __future__ import annotations

import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config

from aot_cache.upstream.virtual import process_settings

inductor: Any = torch._inductor.config
dynamo: Any = torch._dynamo.config
functorch: Any = torch._functorch.config
backends: Any = torch.backends
eval_frame: Any = torch._dynamo.eval_frame

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "a variable": (lambda: os.environ.get("AOT_TEST_VARIABLE"), lambda: os.environ.update(AOT_TEST_VARIABLE="1")),
    "no variable": (lambda: os.environ.get("PATH"), lambda: os.environ.pop("PATH")),
    "directory": (os.getcwd, lambda: os.chdir("/")),
    "filters": (lambda: list(warnings.filters), lambda: warnings.simplefilter("error")),
    "dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "grad": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(False)),
    "threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "deterministic": (torch.are_deterministic_algorithms_enabled, lambda: torch.use_deterministic_algorithms(True)),
    "anomaly": (torch.is_anomaly_enabled, lambda: torch.autograd.set_detect_anomaly(True)),
    "precision": (torch.get_float32_matmul_precision, lambda: torch.set_float32_matmul_precision("high")),
    "tf32": (lambda: backends.cuda.matmul.allow_tf32, lambda: setattr(backends.cuda.matmul, "allow_tf32", True)),
    "cudnn": (lambda: backends.cudnn.benchmark, lambda: setattr(backends.cudnn, "benchmark", True)),
    "attention": (torch.backends.cuda.flash_sdp_enabled, lambda: torch.backends.cuda.enable_flash_sdp(False)),
    "autocast": (lambda: torch.is_autocast_enabled("cpu"), lambda: torch.set_autocast_enabled("cpu", True)),
    "stance": (
        lambda: eval_frame._stance.stance,
        lambda: torch.compiler.set_stance("force_eager"),
    ),
    "inductor": (lambda: inductor.max_autotune, lambda: setattr(inductor, "max_autotune", True)),
    "inductor, nested": (lambda: inductor.cpp.threads, lambda: setattr(inductor.cpp, "threads", 3)),
    "inductor, in place": (
        lambda: list(inductor._fuse_ddp_communication_passes),
        lambda: inductor._fuse_ddp_communication_passes.append("mine"),
    ),
    "dynamo": (lambda: dynamo.recompile_limit, lambda: setattr(dynamo, "recompile_limit", 99)),
    "dynamo, disabled": (lambda: dynamo.disable, lambda: setattr(dynamo, "disable", True)),
    "dynamo, not in its hash": (lambda: dynamo.suppress_errors, lambda: setattr(dynamo, "suppress_errors", True)),
    "functorch": (lambda: functorch.functionalize_rng_ops, lambda: setattr(functorch, "functionalize_rng_ops", True)),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.contract("process_settings")
def test_a_setting_is_put_back(name: str) -> None:
    read, write = SETTINGS[name]
    before = read()
    for again in range(2):  # the second time from what was put back
        with process_settings.kept() as settings:
            write()
            assert read() != before, again
            settings.put_back()
            assert read() == before, again
            write()
        assert read() == before, again


def test_a_setting_is_put_back_where_something_raises() -> None:
    def fails() -> None:
        with process_settings.kept():
            torch.set_default_dtype(torch.float64)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.contract("process_settings")
def test_both_ways_to_set_a_precision() -> None:
    """torch does not even let the old one be read after the new one was used."""
    if not hasattr(torch._C, "_get_fp32_precision_getter"):
        pytest.skip("this torch has one way")
    before = torch.get_float32_matmul_precision(), backends.cuda.matmul.fp32_precision
    with process_settings.kept():
        backends.cuda.matmul.fp32_precision = "tf32"
    assert (torch.get_float32_matmul_precision(), backends.cuda.matmul.fp32_precision) == before


def test_what_was_set_before_is_what_is_put_back() -> None:
    before = dynamo.recompile_limit
    try:
        with process_settings.kept():
            pass
        dynamo.recompile_limit = before + 1
        with process_settings.kept():
            dynamo.recompile_limit = before + 2
        assert dynamo.recompile_limit == before + 1
    finally:
        dynamo.recompile_limit = before


def test_numbers_are_drawn_from_the_start() -> None:
    drawn = []
    for seed in (1, 2):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        with process_settings.kept():
            drawn.append((random.random(), float(numpy.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


MODULE = """
import os
import torch._dynamo
os.environ["AOT_TEST_IMPORTED"] = os.environ["AOT_TEST_BEFORE"]
torch._dynamo.config.recompile_limit += 1
import imported_settings_inner
"""
INNER = "import os\nos.environ['AOT_TEST_INNER'] = '1'\n"


def test_what_an_import_sets_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a server, which imports it too, it is so; what the recipe has set around it is not."""
    (tmp_path / "imported_settings.py").write_text(MODULE)
    (tmp_path / "imported_settings_inner.py").write_text(INNER)
    monkeypatch.syspath_prepend(str(tmp_path))
    limit = dynamo.recompile_limit
    try:
        with process_settings.kept():
            os.environ["AOT_TEST_BEFORE"] = "seen"
            dynamo.verbose = True
            __import__("imported_settings")
            os.environ["AOT_TEST_IMPORTED"] = "changed"
        assert os.environ["AOT_TEST_IMPORTED"] == "seen" and os.environ["AOT_TEST_INNER"] == "1"
        assert "AOT_TEST_BEFORE" not in os.environ and dynamo.verbose is False
        assert dynamo.recompile_limit == limit + 1
    finally:
        dynamo.recompile_limit = limit
        for name in ("AOT_TEST_IMPORTED", "AOT_TEST_INNER"):
            os.environ.pop(name, None)


def test_no_finder_is_left() -> None:
    before = list(sys.meta_path)
    with process_settings.kept():
        assert len(sys.meta_path) == len(before) + 1
        with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
            __import__("no_such_module_at_all")
    assert sys.meta_path == before
