"""Entries of an engine's own compile cache (vLLM's compiled models): files that go with a plan, and into a bundle.

The engine makes them while it is recorded, names them by a key of its own, and asks for them by that key. A recording puts them
into one file beside the plan (`beside`), in the format of bundles. No torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from aot_cache.artifact.plan import Plan
from aot_cache.errors import AotCacheError, BundleCorrupt, DeclarationError
from aot_cache.store import Bundle, JsonValue, json_in, read_bundle, write_bundle

KIND = "engine caches"
"""`manifest["kind"]` of the file beside a plan."""
COMPILED = "compiled model"
MODEL_INFO = "model info"


@dataclass(frozen=True, kw_only=True)
class EngineCache:
    """One entry of an engine's compile cache.

    Args:
        engine: the engine that makes and reads it.
        kind: what it is, in the engine's words: `COMPILED` or `MODEL_INFO`.
        key: the name under which the engine asks for it.
        factors: digest of a JSON object: what the key was made from, as name → text.
        files: path within the entry → digest of the file's bytes.
    """

    engine: str
    kind: str
    key: str
    factors: str
    files: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raises ValueError for a path that leads out of the entry."""
        for path in self.files:
            if "\\" in path or {"", ".", ".."} & set(path.split("/")):
                raise ValueError(f"a path within the entry was expected, found {path!r}")

    @property
    def identity(self) -> tuple[str, str, str]:
        return self.engine, self.kind, self.key

    def objects(self) -> set[str]:
        """Digests of all objects that it refers to."""
        return {self.factors, *self.files.values()}


@dataclass(frozen=True)
class Caches:
    """Entries, and the bytes of their objects by digest."""

    entries: Sequence[EngineCache] = ()
    objects: Mapping[str, bytes] = field(default_factory=dict)


NO_CACHES = Caches()


def one_entry(engine: str, kind: str, key: str, factors: Mapping[str, str], files: Mapping[str, bytes]) -> Caches:
    """An entry with its objects.

    Raises:
        ValueError: a path leads out of the entry.
    """
    objects: dict[str, bytes] = {}

    def digest(data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        objects[name] = data
        return name

    reasons = digest(json.dumps(factors, sort_keys=True).encode())
    digests = {path: digest(data) for path, data in files.items()}
    return Caches([EngineCache(engine=engine, kind=kind, key=key, factors=reasons, files=digests)], objects)


def factors_of(bundle: Bundle, entry: EngineCache) -> dict[str, str]:
    """What the entry's key was made from.

    Raises:
        BundleCorrupt: the object does not hash, or is no table of texts.
    """
    try:
        found = json_in(bundle.object(entry.factors))
        return {str(name): str(value) for name, value in found.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleCorrupt(f"bundle {bundle.path} is damaged: factors of a cache entry ({error})") from error


def beside(plan: Path) -> Path:
    """Path of the file with the entries that belong to the plan file: `server.plan.json` → `server.caches.safetensors`."""
    name = plan.name.removesuffix(".json").removesuffix(".plan")
    return plan.with_name(f"{name}.caches.safetensors")


def write_plan(plan: Plan, caches: Caches, path: Path) -> Plan:
    """Write a plan, and the entries beside it. Returns the plan, which then names their file's digest.

    Raises:
        StoreUnwritable: they cannot be written.
    """
    digest = write(beside(path), caches) if caches.entries else ""
    plan = replace(plan, caches=digest)
    plan.write(path)
    return plan


def of_plans(paths: Iterable[Path]) -> Caches:
    """The entries that belong to plan files.

    Raises:
        DeclarationError: a file is no plan, or the file beside it is missing or another one.
    """
    plans = [(path, Plan.read(path)) for path in paths]
    return merged(read(beside(path), plan.caches) for path, plan in plans if plan.caches)


def write(path: Path, caches: Caches) -> str:
    """Write entries to a file, and return its digest.

    Raises:
        StoreUnwritable: it cannot be written.
    """
    entries: list[JsonValue] = [to_json(entry) for entry in caches.entries]
    return write_bundle(path, {"kind": KIND, "entries": entries}, dict(caches.objects))


def read(path: Path, digest: str | None = None) -> Caches:
    """Read the entries of a file.

    Raises:
        DeclarationError: it is missing, is another file than the plan's, or holds no entries.
    """
    try:
        bundle = read_bundle(path, digest)
        if bundle.manifest.get("kind") != KIND:
            raise DeclarationError(f"{path} has no caches of an engine", hint="record again")
        entries = [from_json(entry) for entry in bundle.manifest["entries"]]
        return Caches(entries, {name: bundle.object(name) for entry in entries for name in entry.objects()})
    except DeclarationError:
        raise
    except (AotCacheError, KeyError, TypeError, ValueError) as error:
        hint = "keep the file beside its plan as `aot-cache record` wrote it, or record again"
        raise DeclarationError(f"cannot read the engine's caches of a plan: {error}", hint=hint) from error


def merged(parts: Iterable[Caches]) -> Caches:
    """The entries of several processes as one: of an entry that several have, the files of all. The first wins a disagreement,
    because ranks share files that any of them may have written last."""
    entries: dict[tuple[str, str, str], EngineCache] = {}
    objects: dict[str, bytes] = {}
    for part in parts:
        for entry in part.entries:
            known = entries.get(entry.identity, entry)
            entries[entry.identity] = replace(known, files={**entry.files, **known.files})
        objects.update(part.objects)
    kept = [entries[identity] for identity in sorted(entries)]
    used = {name for entry in kept for name in entry.objects()}
    return Caches(kept, {name: objects[name] for name in sorted(used)})


def to_json(entry: EngineCache) -> dict[str, JsonValue]:
    """The entry as JSON."""
    return {**entry.__dict__, "files": dict(entry.files)}


def from_json(data: Mapping[str, JsonValue]) -> EngineCache:
    """Raises KeyError, TypeError or ValueError if `data` is no entry."""
    files = data["files"]
    if not isinstance(files, Mapping):
        raise TypeError("an entry's files are no table")
    texts = {name: str(data[name]) for name in ("engine", "kind", "key", "factors")}
    return EngineCache(**texts, files={name: str(digest) for name, digest in files.items()})
