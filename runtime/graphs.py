"""What an ONNX graph refers to outside of itself, read from its bytes before onnxruntime sees them.

A graph may name files that hold its tensors (``external_data``). onnxruntime reads them wherever it is told to, and knows names that stand for addresses in memory, so each name is
looked up in the manifest first and its file hashed. Operators of other makers than ONNX are refused unless the graph defines them itself, as the exporter's do.

The bytes are protocol buffers (https://protobuf.dev/programming-guides/encoding), of which this reads the fields of onnx.proto that lead to tensors and nodes, and steps over all others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusionblocks.runtime.errors import BundleError, FileError
from diffusionblocks.runtime.files import FileRecord, Key, checked_path, key_of

MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""For each message of onnx.proto the fields that are followed, and what they hold."""
NAMES: Mapping[str, tuple[int, int]] = {"node": (7, 4), "function": (10, 1)}
"""The fields that hold the domain and the name of an operator that is used or made."""
KEY, VALUE = 1, 2
STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
DEPTH = 100
"""Messages inside one another, as protobuf's own readers allow."""
_read: dict[Key, Outside] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Outside:
    """What a graph refers to: ``files`` as (location, offset, length), the length None to the file's end; ``operators`` (domain, then name) that are not its own or ONNX's."""

    files: tuple[tuple[str, int, int | None], ...]
    operators: tuple[str, ...]


def checked_graph(folder: Path, name: str, files: Mapping[str, FileRecord]) -> Path:
    """Path of a graph of a bundle, after its hash and those of all files that it names were compared with the manifest.

    Raises:
        BundleError: a file that is missing, altered, a link or not in the manifest; a tensor that does not lie in its file; operators of other makers; bytes that are no ONNX graph.
    """
    path = checked_path(folder, name, files)
    key = key_of(path)
    with _lock:
        outside = _read.get(key)
    if outside is None:
        outside = outside_of(path)
        with _lock:
            _read[key] = outside
    if outside.operators:
        raise BundleError(
            f"{name} has the operators {', '.join(map(repr, outside.operators[:4]))}, which are not ONNX's own.",
            hint="Export the bundle again.",
        )
    for location, offset, length in outside.files:
        checked_path(folder, location, files)
        size = files[location].bytes
        if not 0 <= offset <= size or not 0 <= (length or 0) <= size - offset:
            raise BundleError(
                f"{name} places a tensor at {offset} of {location}, where it does not lie.",
                hint="Export the bundle again.",
            )
    return path


def outside_of(path: Path) -> Outside:
    """What a graph's file refers to.

    Raises:
        FileError: it cannot be read, or is no ONNX graph.
    """
    try:
        return _outside(path.read_bytes())
    except (OSError, ValueError, MemoryError) as error:
        raise FileError(f"{path.name} is no ONNX graph: {error}", hint="Export the bundle again.") from error


def _outside(data: bytes) -> Outside:
    found: dict[str, set[tuple[str, str]]] = {"node": set(), "function": set()}
    files: dict[tuple[str, int, int | None], None] = {}
    stack = [("model", 0, len(data), 0)]
    while stack:
        kind, start, end, depth = stack.pop()
        if depth > DEPTH:
            raise ValueError(f"more than {DEPTH} messages inside one another")
        followed, entries = MESSAGES[kind], list[tuple[int, int]]()
        names, texts = NAMES.get(kind, ()), dict[int, str]()
        for number, first, last in _fields(data, start, end):
            child = followed.get(number)
            if child == "entry":
                entries.append((first, last))
            elif child is not None:
                stack.append((child, first, last, depth + 1))
            elif number in names:
                texts[number] = data[first:last].decode()
        if entries:
            files[_place(data, entries)] = None
        if names:
            found[kind].add((texts.get(names[0], ""), texts.get(names[1], "")))
    foreign = {(domain, name) for domain, name in found["node"] - found["function"] if domain not in STANDARD}
    return Outside(tuple(files), tuple(f"{domain}.{name}" for domain, name in sorted(foreign)))


def _place(data: bytes, entries: list[tuple[int, int]]) -> tuple[str, int, int | None]:
    """A tensor's entries (location, offset, length, as text) as values; the last of a key counts, so that keys said twice are refused."""
    said: dict[str, str] = {}
    for start, end in entries:
        texts = {KEY: "", VALUE: ""}
        for number, first, last in _fields(data, start, end):
            texts[number] = data[first:last].decode()
        if texts[KEY] in said:
            raise ValueError(f"a tensor with two entries {texts[KEY]!r}")
        said[texts[KEY]] = texts[VALUE]
    if "location" not in said:
        raise ValueError("a tensor outside of the graph without a location")
    return said["location"], _number(said.get("offset", "0")), _number(said["length"]) if "length" in said else None


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 19:
        raise ValueError(f"the offset or length {text[:40]!r}")
    return int(text)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The fields of a message that have a length: number, first byte, last byte (exclusive); numbers are stepped over.

    Raises:
        ValueError: bytes that are no message.
    """
    while at < end:
        tag, at = _varint(data, at, end)
        number, wire = tag >> 3, tag & 7
        if number == 0 or tag >> 32:
            raise ValueError("a field without a number")
        if wire == 2:
            length, at = _varint(data, at, end)
            if length > end - at:
                raise ValueError("a field that ends behind the file")
            yield number, at, at + length
            at += length
        elif wire == 0:
            _, at = _varint(data, at, end)
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError("a field of an unknown kind")
    if at > end:
        raise ValueError("a field that ends behind the file")


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise ValueError("a number that does not end")
