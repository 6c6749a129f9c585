"""vLLM's compiled models, from the bundle: what vLLM would compile for half a minute is loaded by vLLM itself.

vLLM looks for a model that it compiled before under a key. Where its own folder has nothing, we let it load the bundle's entry,
from a private folder. The key has factors that name folders (VLLM_CONFIG_ROOT), so it differs from user to user; we compare the
factors, and pass over those that compiled code cannot depend on. If others differ, one warning names them, and vLLM compiles.
"""

from __future__ import annotations

import ast
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aot_cache.artifact import engine_cache
from aot_cache.artifact.engine_cache import COMPILED, MODEL_INFO, Caches
from aot_cache.errors import one_line
from aot_cache.runtime import bundle_lookup, engine_caches
from aot_cache.runtime.engine_caches import Cached
from aot_cache.store import Bundle, json_in
from aot_cache.upstream.hooks import vllm_compile_cache as hook

ENGINE = "vllm"
MOVES = ("env.VLLM_CONFIG_ROOT", "env.VLLM_XLA_CACHE_PATH", "inductor.cpp.cxx", "inductor.cuda.cuda_cxx")
"""Factors of vLLM's key that differ from machine to machine, and that no compiled code depends on: folders, and the names of the
compilers of C++, of which a server has none."""
_SOURCE = "source."
_FILE = "info.json"
_MOST_NAMED = 5
_LOG = logging.getLogger("vllm.aot_cache")


# --- serving ----------------------------------------------------------------------------------------------------------


@dataclass
class Served:
    """How often vLLM asked for a compiled model that its own folder does not have, and got one from a bundle."""

    asked: int = 0
    found: int = 0


def serve(bundles: Callable[[], list[Bundle]], count: Callable[[str], None]) -> Served:
    """Let vLLM load compiled models from bundles.

    Args:
        bundles: returns the bundles of this process.
        count: called with the name of each model that was loaded.

    Raises:
        AttributeError, ImportError: this vLLM has no such step; nothing is hooked then.
    """
    served = Served()

    def answer(model: Any, path: Path, load: hook.Load) -> Any:
        if path.exists():  # vLLM compiled it itself, for this very key
            return load(path)
        served.asked += 1
        try:
            cached = _fitting(bundles(), model, path)
            if cached is None:
                return load(path)
            with engine_caches.unpacked(cached) as folder:
                loaded = hook.load_from(folder, model, path, load, _moved_settings(cached))
            if loaded is None:
                _say_why_not(cached)
                return None
        except Exception as error:
            _LOG.warning("aot-cache: vLLM compiles its model itself: %s", one_line(error))
            return load(path)
        served.found += 1
        count(hook.name_of(model))
        return loaded

    hook.around_load(answer)
    return served


def _fitting(bundles: list[Bundle], model: Any, path: Path) -> Cached | None:
    """The entry for a model; None if there is none, after a warning that names what differs in the nearest one."""
    file = f"{hook.rank_of(path)}/model"
    known = [one for one in engine_caches.entries(bundles, ENGINE, COMPILED) if file in one.entry.files]
    if not known:
        return None
    here = hook.factors(model)
    compared = [(one, engine_cache.factors_of(*one)) for one in known]
    same_model = [(one, there) for one, there in compared if there.get("model") == here["model"]]
    if not same_model:
        names = ", ".join(sorted({there.get("model", "?") for _, there in compared}))
        _LOG.warning("aot-cache: vLLM compiles %s itself: the bundle has %s", here["model"], names)
        return None
    one, there = min(same_model, key=lambda pair: len(_differing(here, pair[1])))
    differing = _differing(here, there)
    if not differing:
        return one
    _LOG.warning("aot-cache: vLLM compiles %s itself: %s", here["model"], _named(differing, here, there))
    return None


def _moved_settings(cached: Cached) -> dict[str, Any]:
    """The settings of Inductor in `MOVES`, as they were where the entry was compiled. A text that was shortened is left out."""
    factors = engine_cache.factors_of(*cached)
    prefix = "inductor."
    found: dict[str, Any] = {}
    for name in MOVES:
        if name.startswith(prefix) and name in factors:
            with contextlib.suppress(ValueError, SyntaxError):
                found[name.removeprefix(prefix)] = ast.literal_eval(factors[name])
    return found


def _differing(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Factors that decide and differ."""
    names = sorted(name for name in {*here, *there} if hook.decides(name) and not name.startswith(_SOURCE))
    differing = [name for name in names if name not in MOVES and here.get(name) != there.get(name)]
    parts = [name for name in differing if name != hook.WHOLE_CONFIG]
    return parts if any(name.startswith("config.") for name in parts) else differing


def _named(differing: list[str], here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """What differs, in one line; of a part of the configuration, its fields."""
    words: list[str] = []
    for name in differing:
        inside = [one for one in sorted({*here, *there}) if one.startswith(f"{name}.") and not hook.decides(one)]
        unequal = [one for one in inside if here.get(one) != there.get(one)]
        words += [f"{one} is {here.get(one)}, it was compiled with {there.get(one)}" for one in unequal or [name]]
    more = len(words) - _MOST_NAMED
    return "; ".join(words[:_MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")


def _say_why_not(cached: Cached) -> None:
    """vLLM has said that it could not load the entry. If code has changed, name the files."""
    factors = engine_cache.factors_of(*cached)
    sources = {name.removeprefix(_SOURCE): value for name, value in factors.items() if name.startswith(_SOURCE)}
    changed = hook.changed_sources(sources)
    if changed:
        files = ", ".join(changed[:_MOST_NAMED])
        _LOG.warning(
            "aot-cache: vLLM compiles %s itself: other source than it was compiled from: %s", factors["model"], files
        )


def serve_model_info() -> None:
    """Give vLLM what it knows of a model's class from a bundle, in any of its processes.

    Raises:
        AttributeError, ImportError: this vLLM has no such step; nothing is hooked then.
    """

    def find(name: str, module_hash: str) -> Mapping[str, Any] | None:
        try:
            for bundle, entry in engine_caches.entries(bundle_lookup.of_environment(), ENGINE, MODEL_INFO):
                if entry.key == name:
                    found = json_in(bundle.object(entry.files[_FILE]))
                    if found["hash"] == module_hash:
                        return dict(found)
        except Exception as error:  # vLLM finds it out
            _LOG.warning("aot-cache: no facts about a model's class from the bundle: %s", one_line(error))
        return None

    hook.when_model_info_is_missing(find)


# --- recording --------------------------------------------------------------------------------------------------------


class Recorder:
    """Remembers for which models vLLM asked, and keeps what it has compiled for them.

    Args:
        keep: puts entries into the recording.
    """

    def __init__(self, keep: Callable[[Caches], None]) -> None:
        self._keep = keep
        self._models: list[tuple[Any, Path, dict[str, str]]] = []

    def start(self) -> None:
        """Raises AttributeError or ImportError if this vLLM has no such step; nothing is hooked then."""

        def answer(model: Any, path: Path, load: hook.Load) -> Any:
            try:
                self._models.append((model, path, hook.factors(model)))
            except Exception as error:
                _LOG.warning("aot-cache: not recorded what vLLM compiles: %s", one_line(error))
            return load(path)

        hook.around_load(answer)

    def finish(self) -> None:
        """All models are compiled, saved and tuned. Called once per process."""
        models, self._models = self._models, []
        for model, path, factors in models:
            if path.is_file():
                sources = hook.traced_sources(model.aot_compiled_fn)
                factors |= {f"{_SOURCE}{name}": digest for name, digest in sources.items()}
                files = dict(hook.files_of(model, path))
                self._keep(engine_cache.one_entry(ENGINE, COMPILED, hook.key_of(path), factors, files))


def record_model_info(keep: Callable[[Caches], None]) -> None:
    """Keep what vLLM knows of a model's class, in any of its processes.

    Raises:
        AttributeError, ImportError: this vLLM has no such steps; nothing is hooked then.
    """

    def known(path: Path) -> None:
        try:
            content = path.read_bytes()
            factors = {"hash": str(json_in(content)["hash"])}
            keep(engine_cache.one_entry(ENGINE, MODEL_INFO, path.name, factors, {_FILE: content}))
        except Exception as error:
            _LOG.warning("aot-cache: not recorded what vLLM knows of a model's class: %s", one_line(error))

    hook.when_model_info_is_known(known)
