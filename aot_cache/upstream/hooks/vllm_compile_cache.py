"""vLLM's own compile cache: where it looks for a model that it compiled before, and what its key is made from.

Upstream, all in vLLM:

- `vllm/compilation/decorators.py`: `_try_load_aot_compiled_fn`, called before vLLM compiles with the path
  VLLM_CACHE_ROOT/torch_compile_cache/torch_aot_compile/KEY/rank_R_D/model
- `vllm/compilation/caching.py`: `aot_compile_hash_factors`; `vllm/compilation/compiler_interface.py`: `get_inductor_factors`;
  `vllm/config/utils.py`: `get_hash_factors`
- `vllm/compilation/backends.py`: `VllmBackend.__call__`. Compiled subgraphs are below `compilation_config.cache_dir`, the rank
  and the model's prefix, unless they are inside the file `model`. `CompilerManager.compile` recognises equal subgraphs by
  AOTAutograd's key
- `vllm/model_executor/models/registry.py`: `_LazyRegisteredModel`, what a model's class can do, found out in a child process
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import os
import pprint
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from aot_cache.upstream import patch
from aot_cache.upstream.hooks import inductor_choices, inductor_keys

MODULE = "vllm.compilation.decorators"
REGISTRY = "vllm.model_executor.models.registry"
_LOAD = "_try_load_aot_compiled_fn"
_SUBGRAPHS = "vllm_compile_cache.py"
"""A table of the compiled subgraphs, a Python literal: where each file is."""
_TUNED = f"*{inductor_choices.SUFFIX}"
"""What Inductor's autotuners have chosen."""
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
_LONGEST = 120
WHOLE_CONFIG = "config.all"
"""The factor that covers all parts of the configuration."""

Load = Callable[[Path], Any]
"""Loads the compiled model from a file. Returns None if vLLM could not."""


# --- compiled models --------------------------------------------------------------------------------------------------


def around_load(answer: Callable[[Any, Path, Load], Any]) -> patch.Undo:
    """Call `answer(model, path, load)` where vLLM would load a compiled model from `path`.

    Returns a function that takes the hook out.

    Raises:
        AttributeError, ImportError: this vLLM has no such step; nothing is hooked then.
    """

    def _try_load_aot_compiled_fn(original: Any, model: Any, aot_compilation_path: str) -> Any:
        return answer(model, Path(aot_compilation_path), lambda path: original(model, str(path)))

    return patch.replace(importlib.import_module(MODULE), _LOAD, _try_load_aot_compiled_fn)


def name_of(model: Any) -> str:
    """`module:Class.forward` of a model."""
    return f"{type(model).__module__}:{model.forward.__qualname__}"


def rank_of(path: Path) -> str:
    """The rank's part of the path at which vLLM looks: `rank_0_0`."""
    return path.parent.name


def key_of(path: Path) -> str:
    """vLLM's key in the path at which it looks."""
    return path.parents[1].name


def factors(model: Any) -> dict[str, str]:
    """What vLLM's key for a compiled model is made from, by name.

    Names with a second dot (`config.cache_config.block_size`) do not decide: they say what is inside a part that does.
    Values that may be secret are left out.
    """
    envs = importlib.import_module("vllm.envs")
    config = model.vllm_config
    code = model.forward.__code__
    out = {
        "vllm": importlib.import_module("vllm").__version__,
        "model": name_of(model),
        "line": str(code.co_firstlineno),
        WHOLE_CONFIG: str(config.compute_hash()),
    }
    for name, value in envs.compile_factors().items():
        if not any(part in name for part in _SECRET):
            out[f"env.{name}"] = _short(repr(value))
    for one in fields(config):
        part = getattr(config, one.name)
        if hasattr(part, "compute_hash"):
            out |= _part_of_config(f"config.{one.name}", part)
    parts = importlib.import_module("vllm.compilation.compiler_interface").get_inductor_factors()
    for label, part in zip(("system", "torch", "inductor", "functorch"), parts):
        table = part if isinstance(part, Mapping) else {"key": part}
        out |= {f"{label}.{name}": _short(repr(value)) for name, value in table.items()}
    return out


def _part_of_config(name: str, part: Any) -> dict[str, str]:
    """A part's hash, and by its fields' names what is in it. vLLM leaves out fields that change nothing: those are not here."""
    hashed: dict[str, Any] = {}

    def get_hash_factors(original: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        hashed.update(found)
        return found

    with _hashed_fields().replaced(get_hash_factors):
        digest = str(part.compute_hash())
    if not hashed and hasattr(part, "__dataclass_fields__"):  # it is not hashed field by field
        hashed = {one.name: getattr(part, one.name, None) for one in fields(part)}
    return {name: digest, **_flat(name, hashed)}


@functools.cache
def _hashed_fields() -> patch.OnThisThread:
    return patch.OnThisThread(importlib.import_module("vllm.config.utils"), "get_hash_factors")


def _flat(name: str, values: Mapping[Any, Any]) -> dict[str, str]:
    """Names and texts of values, also of those inside tables, which vLLM writes as tuples of pairs."""
    out: dict[str, str] = {}
    for key, value in values.items():
        pairs = isinstance(value, tuple) and value and all(isinstance(one, tuple) and len(one) == 2 for one in value)
        if pairs and all(isinstance(first, str) for first, _ in value):
            out |= _flat(f"{name}.{key}", dict(value))
        else:
            out[f"{name}.{key}"] = _short(repr(value))
    return out


def decides(name: str) -> bool:
    """Whether a factor is part of vLLM's key itself."""
    return not (name.startswith("config.") and name.count(".") > 1)


def traced_sources(compiled: Any) -> dict[str, str]:
    """Module → digest of its source, for all code that a compiled model was traced through."""
    found = compiled.source_info().inlined_sources
    return {source.module: _digest(source.content) for source in found}


def changed_sources(sources: Mapping[str, str]) -> list[str]:
    """Files of traced modules whose traced code is another one here, or is gone."""
    out = []
    for name, digest in sources.items():
        module = sys.modules.get(name)
        try:
            path = inspect.getfile(module) if module is not None else ""
            same = bool(path) and _digest(Path(path).read_text()) == digest
        except (OSError, TypeError, UnicodeDecodeError):
            path, same = "", False
        if not same:
            out.append(path or f"module {name}")
    return out


def files_of(model: Any, path: Path) -> Iterator[tuple[str, bytes]]:
    """(path within the entry, bytes) of all that vLLM needs to load a model that it compiled and saved at `path`."""
    rank = rank_of(path)
    yield f"{rank}/model", path.read_bytes()
    subgraphs = Path(model.compilation_config.cache_dir or os.devnull, rank)
    for file in sorted(subgraphs.rglob("*")):
        if file.is_file() and not file.name.endswith((".tmp", ".lock")):
            yield f"subgraphs/{rank}/{file.relative_to(subgraphs)}", file.read_bytes()
    tuned = path.parents[1] / "inductor_cache"
    for file in sorted(tuned.rglob(_TUNED)):
        yield f"inductor_cache/{file.relative_to(tuned)}", file.read_bytes()


def load_from(folder: Path, model: Any, path: Path, load: Load, settings: Mapping[str, Any]) -> Any:
    """Let vLLM load a model from a folder with the files of an entry, in place of `path`. The folder may be removed after it.

    Where vLLM keeps compiled subgraphs is set for this load only. What Inductor's tuners chose is served from memory, and
    stays there for kernels that Inductor loads later.

    Args:
        settings: settings of Inductor that differ here, with the values of the machine that compiled. Equal subgraphs are in the
            entry once, and vLLM recognises the others by Inductor's key, which contains all settings.
    """
    config = model.compilation_config
    before, subgraphs, tuned = config.cache_dir, folder / "subgraphs", folder / "inductor_cache"
    for table in subgraphs.rglob(_SUBGRAPHS):
        _relocate(table)
    choices = {choice.name: choice.read_bytes() for choice in tuned.rglob(_TUNED)}
    if choices:
        inductor_choices.serve(choices)
    try:
        if subgraphs.is_dir():
            config.cache_dir = str(subgraphs)
        with inductor_keys.with_settings(settings):
            return load(folder / rank_of(path) / "model")
    finally:
        config.cache_dir = before


def _relocate(table: Path) -> None:
    """Name the files of compiled subgraphs where they are now. vLLM writes absolute paths, each to a file beside the table."""
    entries = ast.literal_eval(table.read_text())
    for entry in entries.values():
        name, _ = entry["graph_handle"]
        entry["graph_handle"] = (name, str(table.parent / name))
    table.write_text(pprint.pformat(entries))


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… {_digest(text)[:16]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- what a model's class can do --------------------------------------------------------------------------------------


def when_model_info_is_missing(find: Callable[[str, str], Mapping[str, Any] | None]) -> patch.Undo:
    """Call `find(name of vLLM's file, hash of the model's source)` where vLLM's cache has no facts about a model's class.

    What it returns is used as the file's content; None lets vLLM find out in a child process, which takes many seconds.

    Raises:
        AttributeError, ImportError: this vLLM has no such step; nothing is hooked then.
    """
    registry = importlib.import_module(REGISTRY)

    def _load_modelinfo_from_cache(original: Any, self: Any, module_hash: str) -> Any:
        known = original(self, module_hash)
        if known is not None:
            return known
        found = find(self._get_cache_filename(), module_hash)
        return registry._ModelInfo(**found["modelinfo"]) if found is not None else None

    return patch.replace(registry._LazyRegisteredModel, "_load_modelinfo_from_cache", _load_modelinfo_from_cache)


def when_model_info_is_known(keep: Callable[[Path], None]) -> patch.Undo:
    """Call `keep(path of vLLM's file)` where vLLM has read facts about a model's class from its cache, or written them.

    Raises:
        AttributeError, ImportError: this vLLM has no such steps; nothing is hooked then.
    """
    registry = importlib.import_module(REGISTRY)

    def kept(self: Any) -> None:
        path = self._get_cache_dir() / self._get_cache_filename()
        if path.is_file():
            keep(path)

    def _load_modelinfo_from_cache(original: Any, self: Any, module_hash: str) -> Any:
        known = original(self, module_hash)
        if known is not None:
            kept(self)
        return known

    def _save_modelinfo_to_cache(original: Any, self: Any, mi: Any, module_hash: str) -> Any:
        result = original(self, mi, module_hash)
        kept(self)
        return result

    return patch.replace_all(
        registry._LazyRegisteredModel,
        {
            "_load_modelinfo_from_cache": _load_modelinfo_from_cache,
            "_save_modelinfo_to_cache": _save_modelinfo_to_cache,
        },
    )
