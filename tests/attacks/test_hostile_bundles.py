"""Bundles that are damaged or made to mislead: each is refused with one clear line, and nothing else happens."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aot_cache.errors import BundleCorrupt, BundleMissing, DigestMismatch, StoreError
from aot_cache.store import read_bundle, write_bundle

ONE, TWO = b"the first object", b"the second one"
NAMES = sorted(hashlib.sha256(data).hexdigest() for data in (ONE, TWO))
BODY = b"".join(sorted((ONE, TWO), key=lambda data: hashlib.sha256(data).hexdigest()))
SIZES = {hashlib.sha256(data).hexdigest(): len(data) for data in (ONE, TWO)}
BOUNDARY = SIZES[NAMES[0]]
MANIFEST = {"complete": True, "units": [{"name": "kernel", "object": NAMES[0]}], "objects": SIZES}

Tree = dict[str, Any]

# --- builders ---


def dumps(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def metadata(of: Any = MANIFEST, text: str | None = None, **changes: Any) -> Tree:
    """A bundle's metadata around any manifest: the forger knows how to hash."""
    text = dumps(of) if text is None else text
    body = hashlib.sha256(BODY).hexdigest()
    check = hashlib.sha256((text + body).encode("utf-8", "surrogatepass")).hexdigest()
    hashes = {"manifest_sha256": check, "objects_sha256": body}
    return {"format": "aot-cache", "manifest": text, **hashes, "schema": "1", **changes}


def tensors() -> Tree:
    spans = [(0, BOUNDARY), (BOUNDARY, len(BODY))]
    return {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in zip(NAMES, spans, strict=True)
    }


def pack(header: bytes | str | Tree, body: bytes = BODY, pad: bool = True) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":"))
    if isinstance(header, str):
        header = header.encode()
    if pad:
        header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def with_tensors(change: Callable[[Tree], object], body: bytes = BODY) -> bytes:
    """A bundle whose manifest is right and whose tensors `change` has changed."""
    table = tensors()
    change(table)
    return pack({"__metadata__": metadata(), **table}, body)


def with_tensor(**changes: Any) -> bytes:
    return with_tensors(lambda table: table[NAMES[1]].update(changes))


def with_manifest(manifest: Any = None, text: str | None = None) -> bytes:
    """A bundle with another manifest, hashed as it should be."""
    return pack({"__metadata__": metadata(manifest, text), **tensors()})


def with_sizes(sizes: Any) -> bytes:
    return with_manifest({**MANIFEST, "objects": sizes})


def with_metadata(**changes: Any) -> bytes:
    return pack({"__metadata__": metadata(**changes), **tensors()})


def with_name(name: str) -> bytes:
    """A bundle that names an object `name` in its manifest and in its tensors alike."""
    table = tensors()
    table[name] = table.pop(NAMES[1])
    sizes = {NAMES[0]: SIZES[NAMES[0]], name: SIZES[NAMES[1]]}
    return pack({"__metadata__": metadata({**MANIFEST, "objects": sizes}), **table})


def good() -> bytes:
    return pack({"__metadata__": metadata(), **tensors()})


def good_header() -> str:
    return json.dumps({"__metadata__": metadata(), **tensors()}, separators=(",", ":"))


def length(value: int) -> bytes:
    return struct.pack("<Q", value) + good()[8:]


DEEP = "[" * 100_000 + "]" * 100_000
DEEP_SCHEMA = good_header().replace('"schema":"1"', '"schema":' + "[" * 400 + "]" * 400)
DOUBLE_TENSOR = good_header()[:-1] + f',"{NAMES[1]}":' + json.dumps(tensors()[NAMES[1]], separators=(",", ":")) + "}"
DOUBLE_METADATA = good_header()[:-1] + ',"__metadata__":' + json.dumps(metadata(), separators=(",", ":")) + "}"
DOUBLE_KEY = dumps(MANIFEST).replace('{"complete":true', '{"complete":false,"complete":true')
DOUBLE_DEEP = dumps(MANIFEST).replace('"name":"kernel"', '"name":"kernel","name":"other"')
HUGE_NUMBER = "9" * 4000
TWO_SIZES = dumps(MANIFEST).replace(f":{SIZES[NAMES[0]]}", f":{HUGE_NUMBER}").replace(f":{len(TWO)}", f":{HUGE_NUMBER}")

# what it is: (the file, a part of the message)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "0 bytes"),
    "seven bytes": (good()[:7], "7 bytes"),
    "only the length": (good()[:8], "the file has"),
    "zeros": (bytes(4096), "not JSON"),
    "cut in the header": (good()[:200], "the file has"),
    "cut before the objects": (good()[: -len(BODY)], "its manifest says"),
    "cut by one byte": (good()[:-1], "its manifest says"),
    "one byte too many": (good() + b"\0", "its manifest says"),
    "a second bundle behind": (good() + good(), "its manifest says"),
    "length 0": (length(0), "not JSON"),
    "length 2**63": (length(2**63), "the file has"),
    "length 2**64 - 1": (length(2**64 - 1), "the file has"),
    "length up to the end and one more": (length(len(good()) - 7), "the file has"),
    "length a little short": (length(len(good_header()) - 8), "not JSON"),
    "not JSON": (pack("this is no header"), "not JSON"),
    "a pickle": (pack(b"\x80\x04\x95\x1c\x00\x00\x00cposix\nsystem\n."), "not JSON"),
    "not UTF-8": (pack(good_header().encode().replace(b"kernel", b"ker\xffel")), "not JSON"),
    "UTF-16": (pack(good_header().encode("utf-16")), "not JSON"),
    "with a byte order mark": (pack(b"\xef\xbb\xbf" + good_header().encode()), "not JSON"),
    "deep lists": (pack(DEEP), "not JSON"),
    "deep objects": (pack('{"a":' * 100_000), "not JSON"),
    "a number without end": (pack("9" * 100_000), "not JSON"),
    "a list": (pack("[]"), "format"),
    "a number": (pack("1"), "format"),
    "null": (pack("null"), "format"),
    "no metadata": (pack(tensors()), "format"),
    "metadata that is a text": (pack({"__metadata__": "aot-cache", **tensors()}), "format"),
    "another safetensors file": (pack({"__metadata__": {"format": "pt"}, **tensors()}), "format"),
    "another format": (with_metadata(format="aot_cache"), "format"),
    "a later schema": (with_metadata(schema="2"), "schema '2'"),
    "schema as a number": (with_metadata(schema=1), "schema 1"),
    "schema true": (with_metadata(schema=True), "schema True"),
    "a deep schema": (pack(DEEP_SCHEMA), "schema"),
    "a schema with control characters": (with_metadata(schema="\x1b[2J\n1"), "schema"),
    "no manifest": (with_metadata(manifest=None), "no manifest"),
    "a manifest that is no text": (with_metadata(manifest=MANIFEST), "no manifest"),
    "a manifest beyond ASCII": (with_manifest(text=dumps(MANIFEST).replace("kernel", "kérnel")), "ASCII"),
    "a manifest with a lone surrogate": (with_manifest(text=dumps(MANIFEST).replace("kernel", "\ud800")), "ASCII"),
    "a manifest that is not JSON": (with_manifest(text="{"), "not JSON"),
    "a deep manifest": (with_manifest(text=f'{{"a":{DEEP}}}'), "not JSON"),
    "a manifest with NaN": (with_manifest(text=dumps(MANIFEST).replace("true", "NaN")), "NaN is no number"),
    "a manifest that is a list": (with_manifest([MANIFEST]), "lists no objects"),
    "a manifest without objects": (with_manifest({"complete": True}), "lists no objects"),
    "objects as a list": (with_sizes(NAMES), "lists no objects"),
    "a manifest with a key twice": (with_manifest(text=DOUBLE_KEY), "a key is there twice"),
    "a manifest with a key twice, deep": (with_manifest(text=DOUBLE_DEEP), "a key is there twice"),
    "a manifest that was changed": (with_metadata(manifest=dumps({**MANIFEST, "complete": False})), "does not hash"),
    "no hash of the objects": (with_metadata(objects_sha256=None), "no list of sha256"),
    "another hash of the objects, in capitals": (with_metadata(objects_sha256="A" * 64), "no list of sha256"),
    "one hash too many": (
        with_metadata(objects_sha256=f"{hashlib.sha256(BODY).hexdigest()},{'0' * 64}"),
        "does not hash",
    ),
    "no hash of the manifest": (with_metadata(manifest_sha256=None), "does not hash"),
    "more metadata": (with_metadata(pickle="gASVHAAAAA"), "not written as write_bundle"),
    "a size below zero": (with_sizes({**SIZES, NAMES[0]: -1}), "has -1 bytes"),
    "a size that is a text": (with_sizes({**SIZES, NAMES[0]: "16"}), "has '16' bytes"),
    "a size that is a fraction": (with_sizes({**SIZES, NAMES[0]: 16.0}), "has 16.0 bytes"),
    "a size that is true": (with_sizes({**SIZES, NAMES[0]: True}), "has True bytes"),
    "sizes too long to print when added": (with_manifest(text=TWO_SIZES), "bytes"),
    "another size": (with_sizes({**SIZES, NAMES[0]: SIZES[NAMES[0]] + 1}), "its manifest asks for"),
    "an object that has no tensor": (with_sizes({**SIZES, "0" * 64: 0}), f"lacks the object {'0' * 64}"),
    "a tensor that is no object": (with_sizes({NAMES[0]: SIZES[NAMES[0]]}), "does not list"),
    "one tensor less": (with_tensors(lambda table: table.pop(NAMES[1])), "lacks the object"),
    "one tensor more": (
        with_tensors(lambda table: table.update({"0" * 64: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}})),
        "does not list",
    ),
    "a tensor twice": (pack(DOUBLE_TENSOR), "a key is there twice"),
    "metadata twice": (pack(DOUBLE_METADATA), "a key is there twice"),
    "a tensor that is null": (with_tensors(lambda table: table.update({NAMES[1]: None})), "is None"),
    "a tensor that is deep": (
        pack(good_header().replace(f'"{NAMES[1]}":{{', f'"{NAMES[1]}":{{"x":' + "[" * 400 + "]" * 400 + ",")),
        "its manifest asks for",
    ),
    "another type": (with_tensor(dtype="F32"), "'F32'"),
    "a type of lower case": (with_tensor(dtype="u8"), "'u8'"),
    "two dimensions": (with_tensor(shape=[1, SIZES[NAMES[1]]]), "its manifest asks for"),
    "no dimension": (with_tensor(shape=[]), "its manifest asks for"),
    "a negative shape": (with_tensor(shape=[-1]), "its manifest asks for"),
    "another shape": (with_tensor(shape=[SIZES[NAMES[1]] - 1]), "its manifest asks for"),
    "a fraction for a shape": (with_tensor(shape=[float(SIZES[NAMES[1]])]), "not written as write_bundle"),
    "one more key in a tensor": (with_tensor(extra=1), "its manifest asks for"),
    "offsets below zero": (with_tensor(data_offsets=[-8, len(BODY)]), "its manifest asks for"),
    "offsets that overlap": (with_tensor(data_offsets=[0, SIZES[NAMES[1]]]), "its manifest asks for"),
    "offsets behind the end": (with_tensor(data_offsets=[BOUNDARY, 2**40]), "its manifest asks for"),
    "offsets that run backwards": (with_tensor(data_offsets=[len(BODY), BOUNDARY]), "its manifest asks for"),
    "offsets beyond 64 bits": (
        with_tensor(data_offsets=[2**64 + BOUNDARY, 2**64 + len(BODY)]),
        "its manifest asks for",
    ),
    "three offsets": (with_tensor(data_offsets=[BOUNDARY, len(BODY), len(BODY)]), "its manifest asks for"),
    "offsets that are texts": (with_tensor(data_offsets=["0", "1"]), "its manifest asks for"),
    "tensors exchanged": (
        with_tensors(lambda table: table.update({NAMES[0]: table[NAMES[1]], NAMES[1]: table[NAMES[0]]})),
        "its manifest asks for",
    ),
    "a hole between the objects": (
        with_tensors(
            lambda table: table[NAMES[1]].update(data_offsets=[BOUNDARY + 8, len(BODY) + 8]),
            BODY[:BOUNDARY] + bytes(8) + BODY[BOUNDARY:],
        ),
        "its manifest asks for",
    ),
    "tensors in another order": (
        pack({"__metadata__": metadata(), **dict(reversed(tensors().items()))}),
        "not written as write_bundle",
    ),
    "metadata at the end": (pack({**tensors(), "__metadata__": metadata()}), "not written as write_bundle"),
    "spaces in the header": (pack(good_header().replace('"shape":[', '"shape": [')), "not written as write_bundle"),
    "more padding": (pack(good_header() + " " * 64), "not written as write_bundle"),
    "no padding": (pack(good_header() + " " * (-len(good_header()) % 8 + 1), pad=False), "not written as write_bundle"),
    "line feeds as padding": (pack(good_header() + "\n" * 8), "not written as write_bundle"),
    "an escape for a letter": (pack(good_header().replace("aot-cache", "aot\\u002dcache")), "not written as"),
    "objects exchanged": (pack(good_header(), BODY[BOUNDARY:] + BODY[:BOUNDARY]), "bytes of object"),
    "a flipped bit in an object": (good()[:-1] + bytes([good()[-1] ^ 1]), "bytes of object"),
}
PATHS = [
    "../../../etc/passwd",
    "/etc/passwd",
    "C:\\x",
    "a\0b",
    "\ud800",
    "..",
    "",
    "a\nb",
    "A" * 64,
    "0" * 65,
    "٠" * 64,
]
HOSTILE |= {f"an object named {name!a}": (with_name(name), "is no sha256") for name in PATHS}


def use(path: Path, digest: str | None = None) -> None:
    """Read a bundle and all that is in it."""
    found = read_bundle(path, digest)
    bad = found.check_all()
    for name in found.manifest["objects"]:
        if name in bad:
            with pytest.raises(BundleCorrupt):
                found.object(name)
        else:
            assert hashlib.sha256(found.object(name)).hexdigest() == name
    if bad:
        raise BundleCorrupt(f"the bytes of object {bad[0]}")


# --- the attacks ---


def test_the_builders_build_what_write_bundle_writes(tmp_path: Path) -> None:
    """Otherwise every attack below could be refused for another reason than its own."""
    digest = write_bundle(tmp_path / "good", MANIFEST, {hashlib.sha256(data).hexdigest(): data for data in (ONE, TWO)})
    assert (tmp_path / "good").read_bytes() == good()
    use(tmp_path / "good", digest)
    assert with_tensors(lambda _: None) == with_manifest(MANIFEST) == with_sizes(SIZES) == with_metadata() == good()
    assert with_name(NAMES[1]) == good()
    assert pack(good_header()) == good()


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile(tmp_path: Path, what: str) -> None:
    content, words = HOSTILE[what]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleCorrupt) as caught:
        use(path)
    message = str(caught.value)
    assert words in message
    assert message.isprintable()
    assert len(message) < 1000
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == [path.name]


def test_no_depth_gets_past_the_parser_and_breaks_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "deep"
    limit = sys.getrecursionlimit()
    for depth in range(limit - 250, limit + 10):
        nested = "[" * depth + "]" * depth
        for content in (
            pack(good_header().replace('"schema":"1"', f'"schema":{nested}')),
            with_manifest(text=dumps(MANIFEST).replace(f":{BOUNDARY}", f":{nested}")),
        ):
            path.write_bytes(content)
            with pytest.raises(BundleCorrupt):
                use(path)


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_under_a_pin(tmp_path: Path, what: str) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(good())
    digest = read_bundle(path).digest
    path.write_bytes(HOSTILE[what][0])
    with pytest.raises((BundleCorrupt, DigestMismatch)):
        use(path, digest)


def test_a_perfect_forgery_is_stopped_by_the_pin_alone(tmp_path: Path) -> None:
    path = tmp_path / "bundle.safetensors"
    path.write_bytes(good())
    digest = read_bundle(path).digest
    path.write_bytes(with_manifest({**MANIFEST, "complete": False}))
    use(path)
    with pytest.raises(DigestMismatch):
        read_bundle(path, digest)


def test_every_byte_is_covered_without_a_pin(tmp_path: Path) -> None:
    """Each byte of a bundle changed in each of four ways: case, digit, highest bit, all bits."""
    path = tmp_path / "flipped"
    content = good()
    for position in range(len(content)):
        for mask in (0x01, 0x20, 0x80, 0xFF):
            flipped = bytearray(content)
            flipped[position] ^= mask
            path.write_bytes(flipped)
            with pytest.raises(BundleCorrupt):
                use(path)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_random_damage_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    content = bytearray(good())
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(content)))
        end = min(len(content), begin + data.draw(st.integers(0, 40)))
        content[begin:end] = data.draw(st.binary(max_size=40))
    path.write_bytes(content)
    if content == good():
        use(path)
    else:
        with pytest.raises(BundleCorrupt):
            use(path)


@given(content=st.binary(max_size=200), prefixed=st.booleans())
def test_anything_at_all_is_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, prefixed: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "anything"
    path.write_bytes(pack(content, b"") if prefixed else content)
    with pytest.raises(BundleCorrupt):
        use(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(NAMES),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
PLACES: list[list[Any]] = [["__metadata__"], ["__metadata__", "manifest"], ["__metadata__", "schema"], [NAMES[0]]]
PLACES += [["__metadata__", "format"], ["__metadata__", "manifest_sha256"], [NAMES[1], "dtype"], [NAMES[1], "shape"]]
PLACES += [[NAMES[1], "shape", 0], [NAMES[1], "data_offsets"], [NAMES[0], "data_offsets", 1]]


@given(place=st.sampled_from(PLACES), value=JSON)
def test_any_value_in_any_place(tmp_path_factory: pytest.TempPathFactory, place: list[Any], value: Any) -> None:
    table: Any = {"__metadata__": metadata(), **tensors()}
    inner = table
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    path = tmp_path_factory.getbasetemp() / "placed"
    path.write_bytes(pack(table))
    if path.read_bytes() != good():
        with pytest.raises(BundleCorrupt):
            use(path)


# --- what is no file ---


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleCorrupt, match="folder"):
        read_bundle(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleCorrupt, match="pipe"):
        read_bundle(tmp_path / "pipe")


def test_a_device() -> None:
    with pytest.raises(BundleCorrupt, match="device"):
        read_bundle("/dev/zero")


def test_links(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(BundleMissing):
        read_bundle(tmp_path / "dangling")
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(StoreError, match="circle"):
        read_bundle(tmp_path / "circle")
    (tmp_path / "out").symlink_to("/etc/passwd")
    with pytest.raises(BundleCorrupt):
        read_bundle(tmp_path / "out")


def test_a_file_of_a_terabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(good())
    os.truncate(path, 2**40)
    with pytest.raises(BundleCorrupt, match="1,099,511,6"):
        read_bundle(path)


def test_refused_bundles_leave_no_open_file(tmp_path: Path) -> None:
    path = tmp_path / "bad"
    before = len(os.listdir("/proc/self/fd"))
    for content in (b"", good()[:-1], pack("[]"), good()):
        path.write_bytes(content)
        for _ in range(10):
            for wanted in (path, tmp_path, tmp_path / "none"):
                with pytest.raises((BundleCorrupt, BundleMissing, DigestMismatch)):
                    read_bundle(wanted, "0" * 64)
    assert len(os.listdir("/proc/self/fd")) == before
