"""The errors of aot-cache, in one tree.

    AotCacheError
    ├── DeclarationError        a recipe, range or dimension is wrong, or a recipe's own code raised
    ├── UnknownName             there is no such model, target or dimension
    ├── TargetError             a target cannot be used here (or differs from the device)
    ├── TraceError              host code could not be run on the virtual device
    │   └── DataDependent       host code read values of a tensor that has none
    ├── CompileFailed           one or more units did not compile
    ├── StoreError              bytes on disk
    │   ├── StoreUnwritable     no permission, no space, not a folder
    │   ├── StoreInUse          somebody builds with the store that is to be cleaned up
    │   ├── StoreChanged        what a build has stored is gone or damaged before its bundle is written
    │   ├── BundleCorrupt       a hash, the header or the layout is wrong
    │   ├── BundleMissing       no such bundle
    │   ├── DigestMismatch      the bundle is not the one that was pinned
    │   └── Untrusted           others can have written the bundle or the trusted keys, or no such key has signed it
    ├── RemoteError             a registry or an object store cannot be reached, or does not do what was asked
    │   ├── RemoteDenied        it wants other credentials, or none may do that
    │   └── RemoteMissing       there is nothing of that name
    ├── Incompatible            the bundle is sound but not for this host
    ├── NotReady                something declared is not installed, or a sealed process missed
    ├── CacheMiss               policy `error`: a call would compile, tune or load inside a capture or after `seal()`
    ├── RankDisagreement        the ranks of a job would not do the same thing, or one of them does not answer
    ├── RehearsalFailed         a bundle does not hit, or is not close to eager, at a rehearsed point
    └── TuneError               tuning could not run

A message is `expected X, found Y`, or one sentence where that is clearer ("no bundle at P"); the hint says what to do.
The command line prints `error: …` and `hint: …` and exits with `exit_code`. It shows no traceback for these errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class AotCacheError(Exception):
    """Base of every error that aot-cache raises on purpose.

    Args:
        expected: what was expected; without `found`, the whole message as one sentence.
        found: what was found instead.
        hint: what the user can do about it.

    Attributes:
        expected, found: both empty if the message is one sentence.
        message: the message without the hint.
    """

    exit_code = 3

    def __init__(self, expected: str, found: str = "", hint: str = "") -> None:
        self.message = f"expected {expected}, found {found}" if found else expected
        self.expected, self.found, self.hint = expected if found else "", found, hint
        super().__init__(f"{self.message}; hint: {hint}" if hint else self.message)

    def __reduce__(self) -> tuple[type[AotCacheError], tuple[str, ...]]:
        # Errors are pickled across processes (the builder's workers), and the default would lose `found` and `hint`.
        return (type(self), tuple(self.parts().values()))

    def parts(self) -> dict[str, str]:
        """The constructor's arguments by name, to send the error to another process."""
        return {"expected": self.expected or self.message, "found": self.found, "hint": self.hint}

    def within(self, where: str) -> AotCacheError:
        """The same error, with where it occurred (such as a case and a point) in front of its message."""
        return type(self)(f"{where}: {self.message}", hint=self.hint)

    def to_json(self) -> dict[str, str | int]:
        """The error as JSON, for `--json`."""
        parts = {"message": self.message, "expected": self.expected, "found": self.found, "hint": self.hint}
        return {"type": type(self).__name__, **parts, "exit_code": self.exit_code}


class DeclarationError(AotCacheError):
    """Raised when a recipe, range or dimension is wrong, or the recipe's own code raises."""


class UnknownName(AotCacheError):
    """Raised for a model, target or dimension that does not exist."""


class TargetError(AotCacheError):
    """Raised when a target cannot be used on this machine."""


class TraceError(AotCacheError):
    """Raised when host code cannot be run on the virtual device."""


class DataDependent(TraceError):
    """Raised when host code reads the values of a virtual tensor that has none."""


class CompileFailed(AotCacheError):
    """Raised after a build in which units failed to compile; the others were kept."""

    exit_code = 4


class RehearsalFailed(AotCacheError):
    """Raised after a rehearsal in which some chosen point missed or was not close to eager, or whose process died."""

    exit_code = 5


class StoreError(AotCacheError):
    """Raised when the store's bytes cannot be read or written."""


class StoreUnwritable(StoreError):
    """Raised when the store cannot be written: no permission, no space, or not a folder."""


class StoreInUse(StoreError):
    """Raised when housekeeping would have to remove files from a store that somebody builds with."""


class StoreChanged(StoreError):
    """Raised when what a build has stored is gone or damaged before its bundle is written: something else changes the store."""


class BundleCorrupt(StoreError):
    """Raised when a bundle's header, layout or one of its hashes is wrong."""

    exit_code = 8


class BundleMissing(StoreError):
    """Raised when there is no bundle at the given path."""


class DigestMismatch(StoreError):
    """Raised when a sound bundle is not the one that was pinned by its digest."""

    exit_code = 8


class Untrusted(StoreError):
    """Raised when a sound bundle may be anybody's: others can write it or the trusted keys, or no such key has signed it."""

    exit_code = 8


class RemoteError(AotCacheError):
    """Raised when a registry or an object store cannot be reached, or does not do what was asked."""


class RemoteDenied(RemoteError):
    """Raised when a registry or an object store wants other credentials, or forbids what was asked."""


class RemoteMissing(RemoteError):
    """Raised when a registry or an object store has nothing of the given name."""


class Incompatible(AotCacheError):
    """Raised when a bundle is sound but not for this host; the message names the parts of the key that differ."""

    exit_code = 16


class NotReady(AotCacheError):
    """Raised by `ready(strict=True)` when something declared is not installed."""

    exit_code = 32


class CacheMiss(AotCacheError):
    """Raised under policy `error` instead of compiling, tuning or loading inside a capture or after `seal()`.

    Also raised on ROCm for a Triton kernel that would compile inside a capture and has no eager fallback: the capture would be
    silently wrong.
    """

    exit_code = 64


class RankDisagreement(AotCacheError):
    """Raised on every rank that can still raise, when the ranks of a job would not do the same thing."""


class TuneError(AotCacheError):
    """Raised when a bundle cannot be tuned here."""


_ADVICE = "Set TORCH"  # many torch messages end with such advice: variables for more output


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """A hint that names the word of `known` closest to `word`; `otherwise` if none is close."""
    near = get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def first_cause(error: BaseException) -> BaseException:
    """The root of an error's causes: the error of a lazy module itself says only that one of its modules failed to import."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    """Any error as one line of at most 600 characters: its type, and the first and last line of its message.

    Compiler messages have the reason in the first line (ptxas) or the last (Triton), and the location in the other.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(_ADVICE)] or lines
    text = " / ".join([lines[0], lines[-1]] if len(lines) > 1 else lines)
    return f"{type(error).__name__}: {text}"[:600]


def at_line_of(package: str, error: BaseException) -> str:
    """The error as one line, with the innermost line of `package`'s code that it went through."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if f"/{package}/" in file:
            place = f" ({file.rpartition(f'/{package}/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{one_line(error)}{place}"
