"""Records what a build imported, so that the next build can tell without importing it (or torch) whether anything changed.

Installed packages are identified by their version and RECORD file, wherever on the path they are installed (a base image, and
layers on it); everything else (the recipe, editable installs) by the content of each imported file.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import sysconfig
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

# Variables that describe a shell session. Any other variable may change what host code does, and is part of the stamp.
_SHELL = frozenset(
    "PWD OLDPWD SHLVL _ TERM COLUMNS LINES LS_COLORS USER LOGNAME HOSTNAME PS1 LESSOPEN LESSCLOSE MAIL DISPLAY "
    "PYTEST_CURRENT_TEST GITHUB_RUN_ID TMPDIR".split()
    # Every worker has new folders for these: with them, no stored result would be found again.
    + "TRITON_CACHE_DIR TORCHINDUCTOR_CACHE_DIR".split()
    # Where results are shared, and how its doors open: with them, no two builders would ever find each other's.
    + "AOT_CACHE_REMOTE_STORE GOOGLE_APPLICATION_CREDENTIALS ORAS_USER ORAS_PASS DOCKER_CONFIG REGISTRY_AUTH_FILE".split()
)
_SHELL_PREFIXES = ("SSH_", "AWS_", "AZURE_STORAGE_")
_INSTALLED = frozenset(("site-packages", "dist-packages"))
_PATH = frozenset(map(os.path.realpath, sys.path))
"""As the process began: libraries add to the path."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the processes of a build imported.

    Args:
        python: Python's version; empty in `NO_INPUTS`.
        packages: name → version and digest of its RECORD.
        files: path → sha256.
    """

    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


NO_INPUTS = Inputs()


def inputs(also: Mapping[str, str] | None = None, read: Iterable[Path] = (), made: Path | None = None) -> Inputs:
    """What this process imported.

    Args:
        also: module → file of what its children imported.
        read: files that it has read, and on which what it made depends.
        made: a folder with modules that it has generated itself.
    """
    standard = tuple({f"{sysconfig.get_paths()[name]}{os.sep}" for name in ("stdlib", "platstdlib")})
    owners = _Owners()
    named: set[str] = set()
    files = {str(path.absolute()): _file_digest(str(path)) for path in read}
    mine = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    for name, path in {**(also or {}), **mine}.items():
        path = _on_disk(path)
        if path is None or (made is not None and Path(path).is_relative_to(made)):
            continue
        if found := owners.of(name.partition(".")[0], path):
            named.update(found)
        elif not path.startswith(standard) or not _INSTALLED.isdisjoint(path.split(os.sep)):
            files[path] = _file_digest(path)
    packages = {name: package_digest(name) for name in sorted(named)}
    return Inputs(python=platform.python_version(), packages=packages, files=dict(sorted(files.items())))


class _Owners:
    """Which installed packages have a file."""

    def __init__(self) -> None:
        self._names = metadata.packages_distributions()
        self._folders: dict[str, list[tuple[str, str]]] = {}

    def of(self, top: str, path: str) -> list[str]:
        """The packages with the module `top` in whose folder a file is. A namespace package belongs to several."""
        if top not in self._folders:
            found = [(name, _folder(name)) for name in dict.fromkeys(self._names.get(top, ()))]
            self._folders[top] = [(name, folder + os.sep) for name, folder in found if folder]
        real = os.path.realpath(path) if self._folders[top] else ""
        return [name for name, folder in self._folders[top] if real.startswith(folder)]


def _folder(name: str) -> str:
    """The folder that a package is installed in; empty if nothing there identifies its files, or the next process cannot find it.

    That is so for a checkout without a RECORD, and for what another package brings along (setuptools, in `_vendor`) and is found
    only while that has its folder on the path.
    """
    distribution: metadata.Distribution = metadata.distribution(name)
    folder = os.path.realpath(str(distribution.locate_file("")))
    if folder not in _PATH:
        return ""
    return folder if os.path.basename(folder) in _INSTALLED or distribution.read_text("RECORD") is not None else ""


def _on_disk(path: object) -> str | None:
    """The file of a module's `__file__`: the path itself, or the archive that has it, or None."""
    while isinstance(path, str) and path not in ("", os.path.dirname(path)):
        if os.path.isfile(path):
            return path
        path = os.path.dirname(path)
        if os.path.isdir(path):
            return None
    return None


def imported_since(before: Collection[str]) -> dict[str, str]:
    """Module → file of what this process has imported, without the modules in `before`."""
    new = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name not in before}
    return {name: path for name, path in new.items() if isinstance(path, str)}


def together(parts: Iterable[Inputs]) -> Inputs:
    """Merge what several processes of one build imported."""
    out = NO_INPUTS
    for part in parts:
        out = Inputs(
            python=out.python or part.python,
            packages={**out.packages, **part.packages},
            files={**out.files, **part.files},
        )
    return out


def environment() -> str:
    """Digest of the environment variables that could change what host code launches."""
    kept = sorted(f"{k}={v}" for k, v in os.environ.items() if k not in _SHELL and not k.startswith(_SHELL_PREFIXES))
    return hashlib.sha256("\n".join(kept).encode()).hexdigest()


def changed(before: Inputs) -> str:
    """What has changed since `before`, as text; empty if nothing has."""
    if before.python != platform.python_version():
        return "Python's version"
    for name, digest in before.packages.items():
        if str(package_digest(name)) != digest:
            return f"package {name}"
    for path, digest in before.files.items():
        try:
            if _file_digest(path) != digest:
                return path
        except OSError:
            return path
    return ""


def package_digest(name: str) -> str:
    """Version and digest of the RECORD of an installed package."""
    try:
        distribution: metadata.Distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return "gone"
    record = distribution.read_text("RECORD")
    recorded = hashlib.sha256(record.encode()).hexdigest()[:32] if record is not None else "(no record)"
    return f"{distribution.version} {recorded}"


def _file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
