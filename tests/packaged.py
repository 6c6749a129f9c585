"""One package with a kernel in it, in every form in which Python imports one."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import zipfile
from pathlib import Path

KERNEL = """\
import torch
import triton
import triton.language as tl

FACTOR = tl.constexpr(3)


@triton.jit
def times(x, n, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(x + at, tl.load(x + at, mask=at < n) * FACTOR, mask=at < n)


def run(n, device):
    x = torch.empty(n * 16, device=device)
    times[(1,)](x, x.numel(), WIDTH=64)
"""
RECIPE = """\
import torch
import triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare


@triton.jit
def own(x):
    tl.store(x, 1.0)


@declare(n=Range(1, 4))
def here(n):
    return Call(lambda: own[(1,)](torch.empty(n, device="cuda")))


@declare(n=Range(1, 4))
def packaged(n):
    from pack.kernels import run

    return Call(run, n, "cuda")


recipe = Recipe("packaged", [here, packaged])
"""
INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: pack\nVersion: 1\n",
    "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
}


def source(folder: Path) -> Path:
    """The package as it stands in a checkout."""
    (folder / "pack").mkdir(parents=True)
    (folder / "pack" / "__init__.py").write_text("")
    (folder / "pack" / "kernels.py").write_text(KERNEL)
    return folder


def editable(folder: Path) -> Path:
    """Installed editable: a `.pth` in a site folder names the checkout."""
    checkout, site = source(folder / "checkout"), folder / "site"
    (site / "pack-1.dist-info").mkdir(parents=True)
    (site / "pack-1.dist-info" / "METADATA").write_text(INFO["METADATA"])
    (site / "__editable__.pack-1.pth").write_text(f"{checkout}\n")
    # A folder of PYTHONPATH is no site folder by itself.
    (site / "sitecustomize.py").write_text(f"import site\nsite.addsitedir({str(site)!r})\n")
    return site


def wheel(folder: Path) -> Path:
    """A wheel, installed into a folder."""
    name = folder / "pack-1-py3-none-any.whl"
    folder.mkdir()
    with zipfile.ZipFile(name, "w") as file:
        file.writestr("pack/__init__.py", "")
        file.writestr("pack/kernels.py", KERNEL)
        for entry, text in INFO.items():
            file.writestr(f"pack-1.dist-info/{entry}", text)
        file.writestr("pack-1.dist-info/RECORD", "")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(folder / "in")]
    subprocess.run([*command, str(name)], check=True, capture_output=True)
    return folder / "in"


def archive(folder: Path, text: str = KERNEL) -> Path:
    """A zip on `sys.path`."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "pack.zip", "w") as file:
        file.writestr("pack/__init__.py", "")
        file.writestr("pack/kernels.py", text)
    return folder / "pack.zip"


def compiled_only(folder: Path) -> Path:
    """Nothing but `.pyc` files."""
    source(folder)
    compileall.compile_dir(folder, legacy=True, quiet=1)
    for file in folder.rglob("*.py"):
        os.unlink(file)
    return folder


FORMS = {"editable": editable, "wheel": wheel, "zip": archive}
