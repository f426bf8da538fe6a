"""What the fuzz tests and the long run share: valid inputs, ways of damaging them, and the oracle.

A reader may work or raise a DiffusionBlocksError. Everything else counts as a crash: another exception, more than a second, more than 256 MiB, a write outside of the given folder, a process or
a connection. Writes are seen by Python's audit events, so those of native code are not; no reader has any.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.data import read_arrays
from diffusionblocks.converter.load import load_model
from diffusionblocks.converter.parts import load_training, network_parts, save_training
from diffusionblocks.converter.state import NAME as CHECKPOINT
from diffusionblocks.converter.state import BlockState
from diffusionblocks.converter.stored import array_file
from diffusionblocks.export import export_bundle
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime import open_bundle
from diffusionblocks.runtime.errors import DiffusionBlocksError
from diffusionblocks.runtime.files import FileRecord, checked_path, sha256_of
from diffusionblocks.runtime.graphs import checked_graph
from diffusionblocks.runtime.inputs import checked_inputs
from diffusionblocks.runtime.manifest import TensorSpec
from diffusionblocks.runtime.memory import peak_resident, restart_peak
from diffusionblocks.runtime.weights import Buffers, Held
from torch import nn

SECONDS, DEADLINE = 1.0, 20.0
"""Of the processor, for one input; of the clock, after which it is stopped. What took longer is read once more, and counts if it does again: a machine that is busy is not a slow reader."""
MEMORY, ADDRESSES = 256 << 20, 2 << 30
Draw = random.Random
SPECS = (TensorSpec("values", "float32", ("batch", 4)), TensorSpec("ids", "int64", ("batch", 2)))
NUMBERS = (
    0,
    1,
    -1,
    7,
    63,
    4096,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    -(2**63),
    2**64,
    10**15,
    10**30,
)
TEXTS = (
    *("", ".", "..", "../x", "/etc/passwd", "//x", "a/../b", "a//b", "a/", "a\\b", "C:x", "a\0b", "\ud800", "con", "nul", "\u202ex", "e\u0301", "\u00e9"),
    *("[/x]", "\x1b[2J", "x" * 5000, "stem.onnx", "STEM.onnx", "block_00.bin", "manifest.json", "float32", "bfloat16", "float8", "object", "batch", "NaN"),
)  # fmt: skip
RAW = (
    "1e400",
    "-1e400",
    "NaN",
    "-Infinity",
    "1" * 5000,
    "0.1e-5000",
    "[" * 200 + "]" * 200,
    '{"a": 1, "a": 2}',
    '"\\ud800"',
)
"""JSON that ``json.dumps`` does not write."""


class Hang(BaseException):
    """An input that took longer than the deadline."""


@dataclass(frozen=True)
class Outcome:
    """``kind``: ``read``, ``refused``, or what went wrong: ``crash``, ``hang``, ``memory``, ``outside``."""

    kind: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.kind in ("read", "refused")


@dataclass(frozen=True)
class Target:
    """One reader: ``make`` draws an input, ``read`` reads it (and may write below its folder alone), ``valid`` are inputs that it reads."""

    name: str
    make: Callable[[Draw], bytes]
    read: Callable[[bytes], None]
    valid: tuple[bytes, ...]


# The oracle


_WRITES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime"}  # fmt: skip
_NEVER = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.bind"}
_guarded: list[Path] = []
_seen: list[str] = []
_installed: list[bool] = []


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _guarded:
        return
    if event in _NEVER:
        _seen.append(f"{event} {args!r:.200}")
    elif event in _WRITES or (event == "open" and _for_writing(args)):
        for path in [a for a in args[:2] if isinstance(a, str | bytes)][
            : 2 if event in ("os.rename", "os.link") else 1
        ]:
            place = os.path.realpath(os.fsdecode(path))
            if place != os.devnull and not place.startswith(str(_guarded[-1]) + os.sep):
                _seen.append(f"{event} {place}")


def _for_writing(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Within this, writes outside of ``folder``, processes and connections are counted, and memory is bounded."""
    if not _installed:
        sys.addaudithook(_audit)
        _installed.append(True)
    before, bytecode = resource.getrlimit(resource.RLIMIT_AS), sys.dont_write_bytecode
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, before[1]))
    sys.dont_write_bytecode = True
    _guarded.append(folder.resolve())
    handler = signal.signal(signal.SIGALRM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, handler)
        _guarded.pop()
        sys.dont_write_bytecode = bytecode
        resource.setrlimit(resource.RLIMIT_AS, before)


def _stop(*_: object) -> None:
    raise Hang


def outcome_of(read: Callable[[bytes], None], data: bytes) -> Outcome:
    """What becomes of one input; within :func:`guarded`."""
    found = _read_once(read, data)
    return _read_once(read, data) if found.kind == "hang" else found


def _read_once(read: Callable[[bytes], None], data: bytes) -> Outcome:
    restart_peak()  # what the process once had would hide what it takes now
    _seen.clear()
    before, start = peak_resident() or 0, time.process_time()
    signal.setitimer(signal.ITIMER_REAL, DEADLINE)
    try:
        read(data)
        found = Outcome("read")
    except DiffusionBlocksError as error:
        said = str(error)
        found = (
            Outcome("refused") if 0 < len(said) < 20_000 and "Traceback" not in said else Outcome("crash", said[:500])
        )
    except KeyboardInterrupt:
        raise
    except Hang:
        found = Outcome("hang", f"more than {DEADLINE} s")
    except BaseException as error:
        found = Outcome("crash", "".join(traceback.format_exception(error)[-6:])[-2000:])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.process_time() - start
    grown = (peak_resident() or 0) - before
    if found.ok and grown > MEMORY:  # first: to fill so much takes its time too
        return Outcome("memory", f"{grown >> 20} MiB")
    if found.ok and seconds > SECONDS:
        return Outcome("hang", f"{seconds:.1f} s")
    return Outcome("outside", _seen[0]) if found.ok and _seen else found


# Ways of damaging


def damaged(draw: Draw, seeds: Sequence[bytes], tokens: Sequence[bytes] = ()) -> bytes:
    """One of the seeds after one to four edits: bits flipped, bytes cut out, put in, doubled, cut off, taken from another seed, or a number or word written over them."""
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randint(0, len(data)), draw.randint(0, 7)
        length = draw.choice((1, 2, 4, 8, 64, 1024))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randint(0, 7)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length]
        elif kind == 4:
            other = draw.choice(seeds)
            start = draw.randint(0, len(other))
            data[at : at + length] = other[start : start + length]
        elif kind == 5:
            size = draw.choice((1, 2, 4, 8))
            data[at : at + size] = (draw.choice(NUMBERS) % (1 << 8 * size)).to_bytes(
                size, draw.choice(("little", "big"))
            )
        elif kind == 6 and tokens:
            word = draw.choice(tokens)
            data[at : at + len(word) * draw.randint(0, 1)] = word
        else:
            data[at : at + length] = bytes([draw.choice((0, 0xFF, 0x7F, 0x80, draw.randint(0, 255)))]) * length
    return bytes(data)


def evil_value(draw: Draw) -> Any:
    """A value that has no business in a manifest."""
    kind = draw.randint(0, 5)
    if kind < 2:
        return draw.choice(NUMBERS)
    if kind == 2:
        return draw.choice(TEXTS)
    if kind == 3:
        return f"\0raw{draw.randint(0, len(RAW) - 1)}\0"
    return draw.choice((None, True, False, 0.5, -1.5, 1e308, [], {}, [[]], {"a": {}}, ["x"], [1, 2, 3], [1.0, 0.0]))


def evil_json(draw: Draw, value: Any, edits: int = 2) -> bytes:
    """JSON after edits at places that are drawn: a value replaced, copied from elsewhere, a key left out, added, doubled or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, edits)):
        places = list(_places(value))
        if not places:
            return json.dumps(evil_value(draw)).encode()
        holder, key = draw.choice(places)
        kind = draw.randint(0, 6)
        if kind <= 2 or not isinstance(holder, dict):
            holder[key] = evil_value(draw)
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            holder[draw.choice(TEXTS)] = evil_value(draw)
        elif kind == 5:
            other, name = draw.choice(places)
            holder[key] = json.loads(json.dumps(other.get(name) if isinstance(other, dict) else other))
        else:
            holder[draw.choice(TEXTS)] = holder.pop(key)
    text = json.dumps(value)
    for k, raw in enumerate(RAW):
        text = text.replace(json.dumps(f"\0raw{k}\0"), raw)
    if draw.randint(0, 19) == 0:
        text = text.replace("{", '{"format": 1, ', 1)
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    stack = [value]
    while stack:
        holder = stack.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        for key in keys:
            yield holder, key
            if isinstance(holder[key], dict | list):
                stack.append(holder[key])


def evil_npy(draw: Draw) -> bytes:
    """A ``.npy`` whose header and size were drawn apart from each other."""
    kinds = (
        "<f4",
        "<f8",
        "<i8",
        "|u1",
        "|b1",
        "<c8",
        "|O",
        "|V8",
        "|V1000000000",
        "<U3",
        "|S0",
        "<M8[ns]",
        ">f4",
        "<f2",
        "f16",
        "xx",
        "<f3",
    )
    descr: Any = draw.choice(
        (*kinds, *kinds[:6], [("a", "<f4")], [("a", "|O")], [("a", "<f4", (2**31, 2**31))], ("<f4", (2,)), 7, None)
    )
    shape: Any = tuple(draw.choice((0, 1, 2, 3, 4, *NUMBERS)) for _ in range(draw.choice((0, 1, 2, 2, 2, 3, 40))))
    header = repr(
        {
            "descr": descr,
            "fortran_order": draw.choice((False, True, 0, "x")),
            "shape": draw.choice((shape, shape, shape, list(shape), "x")),
        }
    )
    if draw.randint(0, 5) == 0:
        header = draw.choice(
            (
                "{" * 300,
                "(" * 9000,
                "[1,2",
                "__import__('os').mkdir('executed')",
                "{'descr': '<f4'}",
                header + "\0",
                "9" * 8000,
            )
        )
    text = header.encode() + b" " * draw.randint(0, 20) + b"\n"
    version = draw.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    length = draw.choice((len(text), len(text), len(text), 0, 65535, 2**31, 2**32 - 1))
    size = struct.pack("<H", length & 0xFFFF) if version[0] == 1 else struct.pack("<I", length)
    return b"\x93NUMPY" + bytes(version) + size + text + bytes(draw.choice((0, 4, 16, 24, 32, 64, 4096)))


def evil_zip(draw: Draw, members: Sequence[tuple[str, bytes]]) -> bytes:
    """A zip archive of these members, with names, methods and claimed sizes that were drawn."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members:
            chosen = name if draw.randint(0, 9) else draw.choice(TEXTS).encode("utf-8", "replace").decode() or "x"
            method = draw.choice(
                (zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
            )
            archive.writestr(zipfile.ZipInfo(chosen), data, method)
    made = bytearray(file.getvalue())
    for _ in range(draw.choice((0, 0, 1, 2))):  # a field of a header: flags, method, sizes, offsets
        signature = draw.choice((b"PK\x01\x02", b"PK\x03\x04", b"PK\x05\x06"))
        at = made.find(signature, draw.randint(0, len(made)))
        if at >= 0:
            size = draw.choice((2, 4))
            place = at + draw.randint(4, 44)
            made[place : place + size] = (draw.choice(NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(made)


def evil_safetensors(draw: Draw, seed: bytes) -> bytes:
    """A file of safetensors whose header was damaged as JSON, or whose length says something else."""
    length = int.from_bytes(seed[:8], "little")
    header = evil_json(draw, json.loads(seed[8 : 8 + length]), 3)
    said = len(header) if draw.randint(0, 4) else draw.choice(NUMBERS) % (1 << 64)
    return said.to_bytes(8, "little") + header + seed[8 + length :][: draw.choice((1 << 30, 1 << 30, 0, 7, 64))]


OPCODES = tuple(
    bytes([code])
    for code in b"()]}.0aebcdghijlmnopqrstuRQPNKMJIFGLSTUVX\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x93\x94\x95\x97\x98"
)
WORDS = (
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nbytearray\n", b"cbuiltins\nbytearray\n", b"ctorch\nTensor\n", b"ctorch._utils\n_rebuild_tensor_v2\n"),
    *(b"ctorch.nn.modules.linear\nLinear\n", b"X\x05\x00\x00\x00touch", b"(S'touch executed'\ntR.", b"J\xff\xff\xff\x7f\x85R", b"\x8a\x08" + b"\xff" * 8),
    *(b"ctorch.hub\nload\n", b"cargparse\nNamespace\n", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\xff", b"r\xff\xff\xff\xff"),
)  # fmt: skip


GRAPH_WORDS = (
    *(b"location", b"offset", b"length", b"../x", b"/etc/passwd", b"*/_ORT_MEM_ADDR_/", b"\x6a", b"\x2a\xff\xff\xff\xff\x0f", b"\x0b"),
    *(b"com.microsoft", b"EPContext", b"Loop", b"ConstantOfShape", b"Expand", b"MatMul", b"Gather", b"Reshape"),
)  # fmt: skip


# Valid inputs


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(self.norm(x))


def network() -> nn.Module:
    """The smallest that converts: two units of width 8 between two layers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), Unit(), Unit(), nn.Linear(8, 3)).eval()


class Text(nn.Module):
    """The smallest causal language model: tokens [N, 6] -> logits [N, 6, 9]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
        self.units = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.register_buffer("mask", torch.full((6, 6), -1e9).triu(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for unit in self.units:
            x = x + unit((x @ x.transpose(1, 2) + self.mask).softmax(-1) @ x)
        return self.head(x)


def plain() -> nn.Module:
    """A module whose classes are all of torch.nn."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))


def make_seeds(folder: Path) -> None:
    """Write valid files of every kind into ``folder``, a trained bundle and its program among them."""
    folder.mkdir(parents=True, exist_ok=True)
    model, draw = network(), np.random.default_rng(0)
    rows = draw.standard_normal((32, 4)).astype(np.float32)
    made = convert(model, input_shape=(4,), num_blocks=2)
    finetune(made, rows, draw.integers(0, 3, 32), steps=2, batch_size=8)
    export_bundle(
        network_parts(made, source={"name": "fuzz"}),
        folder / "model.dblocks",
        extra=lambda part: save_training(made, part / "train"),
    )
    text = convert(Text().eval(), (torch.zeros(2, 6, dtype=torch.int64),), num_blocks=2, task="lm")
    export_bundle(text, folder / "text.dblocks")
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.export.export(model, (torch.randn(3, 4),), dynamic_shapes=({0: batch},), strict=False)
    torch.export.save(program, folder / "model.pt2")
    torch.save(plain(), folder / "module.pt")
    torch.save(
        {"arch": "resnet18", "state_dict": plain().state_dict(), "args": {"lr": 0.1, "names": ["a", "b"]}},
        folder / "weights.pt",
    )
    torch.save(plain().state_dict(), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(plain().state_dict(), folder / "weights.safetensors", {"format": "pt"})
    np.save(folder / "x.npy", rows)
    np.savez(folder / "x.npz", values=rows, ids=np.zeros((32, 2), np.int64), y=np.zeros(32, np.int64))
    np.savez_compressed(folder / "packed.npz", values=rows, ids=np.zeros((32, 2), np.int64))
    _state().save(folder, {"updates": 1, "log": []})


def _state() -> BlockState:
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    named = dict(layer.named_parameters())
    return BlockState({n: t.detach() for n, t in named.items()}, named, optimizer, {})


# The readers


def targets(seeds: Path, scratch: Path) -> dict[str, Target]:
    """Every reader by name; ``scratch`` is the one folder they may write in."""
    scratch.mkdir(parents=True, exist_ok=True)
    kinds = (_bundle_targets, _text_targets, _array_targets, _model_targets, _run_targets)
    return {t.name: t for kind in kinds for t in kind(seeds, scratch)}


def _copied(seeds: Path, bundle: Path, name: str = "model.dblocks") -> Path:
    """The bundle as it was: an earlier process may have left a damaged one."""
    shutil.rmtree(bundle, ignore_errors=True)
    return Path(shutil.copytree(seeds / name, bundle))


def _bundle_targets(seeds: Path, scratch: Path) -> Iterator[Target]:
    bundle = _copied(seeds, scratch / "model.dblocks")
    text = (seeds / "model.dblocks" / "manifest.json").read_bytes()
    said, manifest = json.loads(text), manifests.read(bundle)
    names = (
        b'"sha256"',
        b"null",
        b"-1",
        b"1e400",
        b"NaN",
        b"[",
        b"{",
        b'"',
        b",",
        b"\\ud800",
        b"\xff\xfe",
        b"\0",
        b"9" * 40,
    )

    def read_manifest(data: bytes) -> None:
        (bundle / "manifest.json").write_bytes(data)
        with open_bundle(bundle) as opened:
            opened.plan(opened.manifest.graphs())

    def make_manifest(draw: Draw) -> bytes:
        return damaged(draw, [text], names) if draw.randint(0, 3) == 0 else evil_json(draw, said)

    yield Target("manifest", make_manifest, read_manifest, (text,))

    def make_layout(draw: Draw) -> bytes:
        value = json.loads(text)
        graphs = [g for b in value["blocks"] for g in (b["context"], b["block"])] + [
            value["stem"],
            value["head"],
            value["target"]["graph"],
        ]
        for _ in range(draw.randint(1, 3)):
            graph = draw.choice([g for g in graphs if g["tensors"]])
            tensor = draw.choice(graph["tensors"])
            key = draw.choice(("offset", "shape", "dtype", "file", "input"))
            if key == "shape":
                tensor[key] = [
                    draw.choice((*tensor[key], 0, 1, *NUMBERS[:12])) for _ in range(draw.choice((0, 1, 2, 3, 70)))
                ]
            elif key == "offset":
                tensor[key] = draw.choice((tensor[key] + 64, tensor[key] + 1, 64 * draw.randint(0, 40), *NUMBERS))
            elif key == "dtype":
                tensor[key] = draw.choice((*manifests.SIZES, "object", "U9", "float8"))
            else:
                tensor[key] = draw.choice((*value["files"], None, *TEXTS))
        return json.dumps(value).encode()

    def read_layout(data: bytes) -> None:
        (bundle / "manifest.json").write_bytes(data)
        found = manifests.read(bundle)
        for graph in found.graphs():
            for buffers in (None, Buffers()):
                held = Held(bundle, graph, found.files, buffers)
                sum(
                    int(array.view(np.uint8).sum())
                    for array in held.arrays.values()
                    if array.ndim and array.flags.c_contiguous
                )
                held.release()

    yield Target("layout", make_layout, read_layout, (text,))

    graphs = [path.read_bytes() for path in sorted((seeds / "model.dblocks").glob("*.onnx"))]

    def read_graph(data: bytes) -> None:
        path = bundle / "fuzzed.onnx"
        path.write_bytes(data)
        checked_graph(bundle, path.name, {**manifest.files, path.name: FileRecord(sha256_of(path), len(data))})

    yield Target("graph", lambda draw: damaged(draw, graphs, GRAPH_WORDS), read_graph, tuple(graphs))

    def read_names(data: bytes) -> None:
        name = data.decode("utf-8", "surrogatepass")
        checked_path(bundle, name, {name: FileRecord("0" * 64, 10)})

    def make_names(draw: Draw) -> bytes:
        return (
            draw.choice(("/", "", "\0", "\u202e", "\uff0f", "\ud800"))
            .join(draw.choice(TEXTS) for _ in range(draw.randint(1, 4)))
            .encode("utf-8", "surrogatepass")
        )

    yield Target("names", make_names, read_names, ())


def _array_targets(seeds: Path, scratch: Path) -> Iterator[Target]:
    path = scratch / "data.npz"
    npy, stored, packed = ((seeds / name).read_bytes() for name in ("x.npy", "x.npz", "packed.npz"))
    first = (TensorSpec("x", "float32", ("batch", 4)),)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        caught: list[DiffusionBlocksError] = []
        for step in (
            _read_whole,
            lambda p: array_file(p, SPECS, None).batch([0]),
            lambda p: array_file(p, first, None).batch([0]),
        ):
            try:
                step(path)
            except DiffusionBlocksError as error:
                caught.append(error)
        if len(caught) == 3:
            raise caught[0]

    def make_npz(draw: Draw) -> bytes:
        if draw.randint(0, 2) == 0:
            return damaged(draw, [stored, packed, npy])
        members = [
            (f"{name}.npy", evil_npy(draw) if draw.randint(0, 1) else npy)
            for name in ("values", "ids", "y")[: draw.randint(1, 3)]
        ]
        return evil_zip(draw, members)

    yield Target("npy", lambda draw: damaged(draw, [npy]) if draw.randint(0, 2) == 0 else evil_npy(draw), read, (npy,))
    yield Target("npz", make_npz, read, (stored, packed))

    valid = {"values": np.zeros((2, 4), np.float32), "ids": np.zeros((2, 2), np.int64)}

    def read_inputs(data: bytes) -> None:
        checked_inputs(SPECS, pickle.loads(data))  # made by this process

    yield Target("inputs", _make_inputs, read_inputs, (pickle.dumps(valid),))


def _read_whole(path: Path) -> None:
    for array in read_arrays(path).values():
        array.sum()


def _make_inputs(draw: Draw) -> bytes:
    values: dict[Any, Any] = {"values": np.zeros((2, 4), np.float32), "ids": np.zeros((2, 2), np.int64)}
    for name in ("values", "ids"):
        kind = draw.randint(0, 9)
        kinds = ("f2", "f8", "i1", "u8", "O", "U3", "M8[s]", "c8", "b1", "V4", "f4", "i8")
        shape = tuple(draw.choice((0, 1, 2, 4)) for _ in range(draw.randint(0, 3)))
        odd = (
            None,
            "x",
            3,
            [[1], [1, 2]],
            [[1, 2, 3, 4]] * 2,
            {"a": 1},
            [None],
            2**70,
            [2**63] * 2,
            b"",
            object,
            float("nan"),
        )
        if kind < 5:
            values[name] = (
                np.full(shape, draw.choice((0, 1)), draw.choice(kinds))
                if kind
                else np.full((2, 4), draw.choice((2**63, 2**64 - 1)), np.uint64)
            )
        elif kind < 8:
            values[name] = draw.choice(odd)
    if draw.randint(0, 5) == 0:
        values[draw.choice(("x", "y", 3, None, ("a",)))] = values.pop(draw.choice(("values", "ids")))
    return pickle.dumps(draw.choice(odd) if draw.randint(0, 19) == 0 else values)


def _model_targets(seeds: Path, scratch: Path) -> Iterator[Target]:
    arch = f"{__name__}:plain"
    tensors, checkpoint = (seeds / "weights.safetensors").read_bytes(), (seeds / CHECKPOINT).read_bytes()
    archives = [(seeds / name).read_bytes() for name in ("module.pt", "weights.pt")]
    legacy, program = (seeds / "legacy.pt").read_bytes(), (seeds / "model.pt2").read_bytes()

    def reader(name: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            (scratch / name).write_bytes(data)
            load_model(str(scratch / name), arch=arch)

        return read

    def make_tensors(draw: Draw) -> bytes:
        return damaged(draw, [tensors, checkpoint]) if draw.randint(0, 2) == 0 else evil_safetensors(draw, tensors)

    yield Target("safetensors", make_tensors, reader("weights.safetensors"), (tensors,))

    def read_checkpoint(data: bytes) -> None:
        (scratch / CHECKPOINT).write_bytes(data)
        _state().load(scratch)

    yield Target("checkpoint", lambda draw: evil_safetensors(draw, checkpoint), read_checkpoint, (checkpoint,))

    def make_archive(draw: Draw) -> bytes:
        if draw.randint(0, 2) == 0:
            return damaged(draw, archives, WORDS)
        return _repacked(draw, draw.choice(archives), ("data.pkl",))

    yield Target("pickle", make_archive, reader("model.pt"), (archives[0],))
    yield Target("legacy", lambda draw: damaged(draw, [legacy], (*WORDS, *OPCODES)), reader("model.bin"), (legacy,))

    def make_program(draw: Draw) -> bytes:
        return (
            damaged(draw, [program], WORDS)
            if draw.randint(0, 2) == 0
            else _repacked(draw, program, (".json", "weight_0", "sample_inputs"))
        )

    yield Target("program", make_program, reader("model.pt2"), (program,))


def _text_targets(seeds: Path, scratch: Path) -> Iterator[Target]:
    """What a language model's bundle says of what it keeps, and two pieces of a text by it."""
    bundle = _copied(seeds, scratch / "text.dblocks", "text.dblocks")
    text = (bundle / "manifest.json").read_bytes()
    tokens = np.zeros((2, 3), np.int64)

    def make(draw: Draw) -> bytes:
        value = json.loads(text)
        blocks = [graph for block in value["blocks"] for graph in (block["context"], block["block"])]
        whole = draw.choice([*blocks, value["stem"], value["head"]])
        own = whole["cached"]
        if own["caches"] and draw.randint(0, 3):
            cache = draw.choice(own["caches"])
            key = draw.choice(("shape", "shape", "dtype", "name"))
            sizes = (*cache["shape"], 0, 1, 2, *NUMBERS, "past", "batch", "2*batch", "-1*batch", "9" * 30 + "*batch")
            cache[key] = {
                "shape": [draw.choice(sizes) for _ in range(draw.choice((0, 2, 3, 3, 3, 70)))],
                "dtype": draw.choice((*manifests.SIZES, "object", "U9")),
                "name": draw.choice(("past.0", "past.1", "past.9", *TEXTS)),
            }[key]
            return json.dumps(value).encode()
        whole["cached"] = "what is kept"
        return json.dumps(value).encode().replace(b'"what is kept"', evil_json(draw, own))

    def read(data: bytes) -> None:
        (bundle / "manifest.json").write_bytes(data)
        with open_bundle(bundle, threads=1) as opened, opened.continuing(2, "exact") as growing:
            for _ in range(2 if growing is not None else 0):
                assert growing is not None
                growing({opened.manifest.inputs[0].name: tokens})

    yield Target("text", make, read, (text,))


def _run_targets(seeds: Path, scratch: Path) -> Iterator[Target]:
    """What is run: graphs by onnxruntime, the command, and a training that is loaded."""
    bundle, folder = _copied(seeds, scratch / "run.dblocks"), seeds / "model.dblocks"
    text = (folder / "manifest.json").read_bytes()
    graphs = {path.name: path.read_bytes() for path in sorted(folder.glob("*.onnx"))}
    names, rows = list(graphs), np.zeros((2, 4), np.float32)

    def make_session(draw: Draw) -> bytes:
        victim = draw.randint(0, len(names) - 1)
        return bytes([victim]) + damaged(draw, [graphs[names[victim]]], GRAPH_WORDS)

    def read_session(data: bytes) -> None:
        name, said = names[data[0]], json.loads(text)
        (bundle / name).write_bytes(data[1:])
        said["files"][name] = {"sha256": sha256_of(bundle / name), "bytes": len(data) - 1}
        (bundle / "manifest.json").write_text(json.dumps(said))
        caught: list[DiffusionBlocksError] = []
        try:
            for mode, budget in (("exact", None), ("denoise", None), ("exact", "1GiB")):
                try:
                    with open_bundle(bundle, threads=1, memory_budget=budget) as opened:
                        opened.run(rows, mode)
                except DiffusionBlocksError as error:
                    caught.append(error)
        finally:
            (bundle / name).write_bytes(graphs[name])
        if caught:
            raise caught[0]

    yield Target(
        "session", make_session, read_session, tuple(bytes([k]) + graphs[name] for k, name in enumerate(names))
    )

    commanded = _copied(seeds, scratch / "commanded.dblocks")
    np.save(scratch / "x.npy", rows)
    run = ("run", commanded, "--input", scratch / "x.npy", "--output", scratch / "y.npy", "--threads", 1)
    commands = ((*run, "--mode", "exact"), (*run, "--mode", "denoise"), run, ("verify", commanded))

    def read_command(data: bytes) -> None:
        (commanded / "manifest.json").write_bytes(data[1:])
        call(*commands[data[0]])

    yield Target(
        "command",
        lambda draw: bytes([draw.randint(0, 3)]) + evil_json(draw, json.loads(text), 1),
        read_command,
        tuple(bytes([k]) + text for k in range(4)),
    )

    training = scratch / "train"
    shutil.rmtree(training, ignore_errors=True)
    shutil.copytree(folder / "train", training)
    recipe = json.loads((training / "recipe.json").read_text())

    def read_recipe(data: bytes) -> None:
        (training / "recipe.json").write_bytes(data)
        load_training(training)

    yield Target("recipe", lambda draw: evil_json(draw, recipe, 1), read_recipe, (json.dumps(recipe).encode(),))


def call(*args: object) -> None:
    """The command in this process.

    Raises:
        DiffusionBlocksError: it ended with 1 or 2, and a message without a traceback.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            main([str(a) for a in args])
        except SystemExit as end:
            if end.code not in (0, 1, 2) or "Traceback" in said.getvalue():
                raise AssertionError(f"exit code {end.code}: {said.getvalue()}") from None
            if end.code:
                raise DiffusionBlocksError(said.getvalue()) from None


def _repacked(draw: Draw, data: bytes, chosen: tuple[str, ...]) -> bytes:
    """An archive with one of its members damaged."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    victim = draw.choice([k for k, (name, _) in enumerate(members) if any(part in name for part in chosen)])
    name, content = members[victim]
    if name.endswith(".json") and draw.randint(0, 3):
        content = evil_json(draw, json.loads(content))
    else:
        content = damaged(draw, [content], (*WORDS, *OPCODES))
    members[victim] = name, content
    if draw.randint(0, 3) == 0:
        return evil_zip(draw, members)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out:
        for name, content in members:
            out.writestr(name, content)
    return file.getvalue()
