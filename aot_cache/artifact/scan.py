"""Finds builder-only state in a bundle's graphs: the builder's types, addresses, paths.

A guard on such state fails for every call in a server. This check is independent of the code that writes graphs: it matches
text and disassembles pickles (`pickletools`) in what was written, and loads nothing. Imports neither torch nor Triton.
"""

from __future__ import annotations

import os
import pickletools
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from aot_cache.artifact.manifest import Graph

_BUILDERS = re.compile(
    r"\b(torch\._subclasses\.fake_tensor\b|torch\._subclasses\.functional_tensor\b|aot_cache\.builder\b"
    r"|aot_cache\.upstream\.(virtual\b|codec\.dynamo_package\b))"
)
"""Modules whose types never occur in a server."""
_OURS = re.compile(r"\baot_cache\.(builder\.\w+|upstream\.(virtual\.\w+|codec\.dynamo_package))\b")
_ADDRESS = re.compile(r"\b0x[0-9a-f]{8,16}\b|_\d{12,}_c\d+\b")
_OF_TYPES = frozenset(
    {"TYPE_MATCH", "TENSOR_MATCH", "SEQUENCE_LENGTH", "DICT_KEYS_MATCH", "EQUALS_MATCH", "CONSTANT_MATCH"}
)
"""Guards whose text describes a value of the call. An identity guard is not among them: it may be on a class that is another
module's global, which is fine."""


@dataclass(frozen=True)
class Finding:
    """A reference to builder-only state.

    Args:
        graph: number in the manifest.
        function: `module:qualname`.
        what: where it was found, and what it is.
    """

    graph: int
    function: str
    what: str


def findings(graphs: Sequence[Graph], read: Callable[[str], bytes]) -> list[Finding]:
    """All builder-only state in `graphs` (of a manifest).

    Args:
        read: returns the bytes of an object by its digest.
    """
    out = []
    for number, graph in enumerate(graphs):
        out += [Finding(number, graph.name, what) for what in dict.fromkeys(_in_graph(graph, read))]
    return out


def _in_graph(graph: Graph, read: Callable[[str], bytes]) -> Iterator[str]:
    for kind, expression, text in [*graph.identities, *graph.values]:
        about_the_call = kind in _OF_TYPES or expression.startswith("type(")
        if about_the_call and _BUILDERS.search(text):
            yield f"guard {kind} on {expression} compares with {text}"
        yield from _of_the_process(f"guard {kind} on {expression}", f"{expression} {text}")
    for expression in graph.guards:
        if ".fake_tensor." in expression or ", FakeTensor," in expression:
            yield f"guard {expression}"
        yield from _of_the_process("guard", expression)
    for module in graph.imports.values():
        if _BUILDERS.search(module):
            yield f"imports {module}"
    yield from _in_pickle("guards", read(graph.guard_state))
    for digest in graph.graphs.values():
        yield from _in_code("compiled code", read(digest))
    for what in ("bytecode", *graph.resumes):
        digest = graph.bytecode if what == "bytecode" else graph.resumes[what].code
        yield from _in_code(f"bytecode {what}", read(digest))


def _in_pickle(where: str, data: bytes) -> Iterator[str]:
    """Check the types and strings in a pickle's opcodes."""
    strings: list[str] = []
    for code, argument, _ in pickletools.genops(data):
        if code.name == "GLOBAL":
            yield from _type_of(where, str(argument).replace(" ", "."))
        elif code.name == "STACK_GLOBAL" and len(strings) > 1:
            yield from _type_of(where, ".".join(strings[-2:]))
        elif isinstance(argument, str):
            strings.append(argument)
            yield from _of_the_process(where, argument)


def _type_of(where: str, name: str) -> Iterator[str]:
    if _BUILDERS.search(name):
        yield f"{where} hold a {name}"


def _in_code(where: str, data: bytes) -> Iterator[str]:
    """Check code for module names only. Paths and addresses in code are harmless (Triton records its libraries' paths)."""
    found = _OURS.search(data.decode("latin-1"))
    if found:
        yield f"{where} names {found[0]}"


def _of_the_process(where: str, text: str) -> Iterator[str]:
    found = _ADDRESS.search(text)
    if found:
        yield f"{where} names an address ({found[0]})"
    for place in _places():
        at = text.find(place)
        if at >= 0:
            yield f"{where} names a folder of this machine ({text[max(0, at - 60) : at + len(place) + 40]})"


def _places() -> list[str]:
    """Folders that exist on this machine only."""
    paths = sysconfig.get_paths()
    folders = {os.getcwd(), os.path.join(tempfile.gettempdir(), "aot-cache-"), paths["purelib"], paths["platlib"]}
    return sorted(folder for folder in folders if folder.strip("/").count("/") >= 1 or "aot-cache-" in folder)
