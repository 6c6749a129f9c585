"""Find the bundle for this host, at a path or in a folder, and check whether it may be loaded here."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from aot_cache import tested
from aot_cache.artifact.manifest import KIND, lacking, served
from aot_cache.errors import AotCacheError, BundleMissing, DeclarationError, Incompatible, Untrusted
from aot_cache.runtime import host_check, host_gpu, rank_agreement
from aot_cache.store import Bundle, bundles_in, in_header, looks_sound, peek, read_bundle, signature, trust
from aot_cache.store.signature import Key
from aot_cache.tested import UNTESTED, installed
from aot_cache.upstream.hooks import torch_capture

_LOG = logging.getLogger(__name__)


def listed(paths: str, digests: str | None) -> list[tuple[Path, str | None]]:
    """(bundle or folder, its digest) of what AOT_CACHE and AOT_CACHE_DIGEST list, as in PATH. None is pinned if that is not set.

    Raises:
        DeclarationError: there are not as many digests as bundles: it is not known which of them are meant. Or there is none in
            a variable that is set: whoever set it meant to pin something.
    """
    named = [Path(path) for path in paths.split(os.pathsep) if path]
    if digests is None:
        return [(path, None) for path in named]
    pinned = [digest for digest in digests.split(os.pathsep) if digest]
    if not pinned:
        raise DeclarationError(
            "a digest in AOT_CACHE_DIGEST", "an empty value", "set it to what `build` prints, or unset it"
        )
    if len(pinned) != len(named):
        expected = f"a digest in AOT_CACHE_DIGEST for each of the {len(named)} bundles in AOT_CACHE"
        raise DeclarationError(expected, str(len(pinned)), "list them in the order of the bundles")
    return list(zip(named, pinned))


def of_environment() -> Iterator[Bundle]:
    """The bundles that AOT_CACHE names, for a process that loads none: read, and their digests checked if they are pinned, and
    their signatures if keys are trusted.

    Those that cannot be read are left out: the process that loads them says why.
    """
    try:
        named = listed(os.environ.get("AOT_CACHE", ""), os.environ.get("AOT_CACHE_DIGEST"))
        keys = signature.trusted_keys()
    except DeclarationError:
        return
    for path, digest in named:
        for file in bundles_in(path) if path.is_dir() else [path]:
            with contextlib.suppress(AotCacheError):
                yield read(file, digest, keys)


def find(path: Path, digest: str | None, pinned: bool = True) -> Bundle:
    """Read the bundle at `path`; of a folder, the one bundle that is for this host. Files in it that are no sound bundles of this
    version, or not signed by a trusted key, are passed over, and named in the log.

    Args:
        pinned: whether the digest comes from outside, and so proves the bundle. That on which ranks agree does not.

    Raises:
        StoreError: the bundle cannot be read or is not signed by a trusted key, or none in the folder fits.
        Incompatible: several in the folder fit.
        DeclarationError: it is not known which keys are trusted.
    """
    keys = signature.trusted_keys()
    if not path.is_dir():
        return read(path, digest, keys, pinned, prefetch=True)
    files, untrusted = bundles_in(path), list[Path]()
    found = _sound(files, digest, keys, untrusted, pinned)
    fitting = [b for b in found if not host_check.differing(host_check.parts(served(b), look_at_gpu=False))]
    if torch_capture.cuda_is_up():  # a bundle for the target cpu fits every host
        fitting = [b for b in fitting if not served(b).on_cpu] or fitting
    if not fitting and untrusted:
        names = ", ".join(file.name for file in untrusted)
        what = f"no bundle for this host in {path} is signed by a key of AOT_CACHE_TRUSTED_KEYS; not signed by one"
        if keys is None:
            what = f"no bundle for this host in {path} is from this user alone; others can have written"
        raise Untrusted(f"{what}: {names}", hint="see `aot-cache verify BUNDLE`")
    if not fitting:
        raise BundleMissing(
            f"no bundle for this host in {path}: none of {len(files)} fits", hint="see `aot-cache explain BUNDLE`"
        )
    if len(fitting) > 1:
        named = ", ".join(b.path.name for b in fitting)
        raise Incompatible(f"one bundle for this host in {path}", named, "name the file")
    return fitting[0]


def read(
    path: Path, digest: str | None, keys: Sequence[Key] | None, pinned: bool = True, prefetch: bool = False
) -> Bundle:
    """Read a bundle; where keys are trusted, none of its objects before its signature is checked.

    Raises:
        StoreError: the bundle cannot be read, no trusted key has signed it, or others can have written it and nothing proves it.
    """
    if keys is None:
        bundle = read_bundle(path, digest, prefetch=prefetch)
        if digest is None or not pinned:
            bundle.proven = False
            trust.require_own(bundle.path, bundle.status())
        return bundle

    def accept(actual: str) -> None:
        _LOG.info("%s is signed by key %s", path, signature.require(path, actual, keys).id[: signature.SHORT])

    return read_bundle(path, digest, prefetch=prefetch, accept=accept)


def _sound(
    files: Iterable[Path], digest: str | None, keys: Sequence[Key] | None, untrusted: list[Path], pinned: bool
) -> Iterator[Bundle]:
    """The sound bundles among files that may be meant, and may be for this host. `untrusted` gets those that may be anybody's."""
    signs, ours = host_check.signs(), in_header(f'"kind":"{KIND}"')
    for file in files:
        header = peek(file)
        meant = digest is None or hashlib.sha256(header).hexdigest() == digest
        if (
            looks_sound(header)
            and ours in header
            and not (meant and any(all(part in header for part in sign) for sign in signs))
        ):
            continue
        try:
            bundle = read(file, digest, keys, pinned)
            check_form(bundle)
        except AotCacheError as error:
            _LOG.warning("passing over %s: %s", file, error)
            if isinstance(error, Untrusted):
                untrusted.append(file)
        else:
            yield bundle


def agreed(path: Path, digest: str | None, group: object) -> str:
    """The digest of the bundle that every rank of `group` found and can use.

    Raises:
        RankDisagreement: on every rank, if one rank found a different bundle, or none.
    """
    try:
        bundle = find(path, digest)
        check_form(bundle)
        check(bundle, look_at_gpu=False)
        mine = bundle.digest
    except Exception as error:  # told to the other ranks, so that they do not wait for this one
        mine = f"none ({error})"
    rank_agreement.agree_same(mine, "bundle", group=group)
    if mine.startswith("none"):
        raise BundleMissing(f"a bundle at {path} that every rank can use", mine, "see `aot-cache explain BUNDLE`")
    return mine


def check_form(bundle: Bundle) -> None:
    """Raise Incompatible for a bundle of another kind, or with another version's form."""
    kind = bundle.manifest.get("kind")
    hint = "build it with this version of aot-cache"
    if kind != KIND:
        raise Incompatible(f"a bundle of kind 'units' at {bundle.path}", f"kind {kind!r}", hint)
    missing = lacking(bundle.manifest)
    if missing:
        raise Incompatible(f"the manifest of {bundle.path} lacks {', '.join(missing)}", hint=hint)


def check(bundle: Bundle, look_at_gpu: bool) -> None:
    """Raise Incompatible if a bundle's kernels are not for this host."""
    if served(bundle).units and installed("triton"):
        _check_releases(bundle, tested.KERNELS)
    differing = host_check.differing(host_check.parts(served(bundle), look_at_gpu=look_at_gpu))
    if differing:
        raise Incompatible(
            f"bundle {bundle.path} is not for this host: {host_check.say(differing)}",
            hint="build one for this host (aot-cache build)",
        )


def check_gpu(bundle: Bundle) -> None:
    """Raise Incompatible if a bundle is for a GPU and this host has none: nothing of it would be used."""
    if not _on_cpu(bundle) and not torch_capture.cuda_is_up() and not host_gpu.gpu_here():
        name = served(bundle).target["name"]
        raise Incompatible(
            f"no GPU is visible here, and {bundle.path} is for {name}",
            hint="build for the target cpu, or serve where the GPU is",
        )


def check_torch(bundle: Bundle) -> None:
    """Raise Incompatible if a bundle's graphs are known to fail with the installed releases."""
    _check_releases(bundle, tested.GRAPHS)


def _check_releases(bundle: Bundle, what: str) -> None:
    why = tested.refused_here(what, _on_cpu(bundle))
    if why:
        text = f"the {what} of {bundle.path} cannot be served with the releases that are installed: {why}"
        raise Incompatible(text, hint=f"update aot-cache, or set {UNTESTED}=1 to try")


def doubt(bundle: Bundle) -> str:
    """One line that says why the installed releases are untested for this bundle; empty if they are tested."""
    said = tested.doubt_here(_on_cpu(bundle))
    return (
        f"{said}; the bundle may miss, or compile when it should not; set {UNTESTED}=1 to accept that" if said else ""
    )


def incomplete(bundle: Bundle) -> str:
    """One line that says so of a bundle from a build in which something failed; empty for others."""
    return "" if served(bundle).complete else f"{bundle.path} is incomplete: something in it could not be built"


def _on_cpu(bundle: Bundle) -> bool:
    return served(bundle).on_cpu
