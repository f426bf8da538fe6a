"""Reading an exported program (torch.export.save) without executing anything it says.

``torch.export.load`` alone unpickles members of the archive and parses strings of its JSON as Python expressions. Before it is called, here:

* every member that is not plain numbers by the archive's own tables must pass torch's weights-only reader; script objects and compiled libraries are refused;
* every symbolic expression must be an arithmetic expression over symbols (a small grammar), every guard a comparison of such;
* every operator must be an ATen, prims or torchvision one, or arithmetic on sizes.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from diffusionblocks.converter.saved import is_archive, open_archive
from diffusionblocks.runtime.errors import BadInput
from torch.export import ExportedProgram

CALLS = frozenset(
    [
        "Symbol",
        "Integer",
        "Rational",
        "Float",
        "Add",
        "Mul",
        "Pow",
        "Mod",
        "Max",
        "Min",
        "Abs",
        "floor",
        "ceiling",
        "FloorDiv",
        "ModularIndexing",
        "CleanDiv",
        "CeilDiv",
        "Where",
        "PythonMod",
        "IntTrueDiv",
        "FloatTrueDiv",
        "ToFloat",
        "TruncToInt",
        "Identity",
        "Equality",
        "Unequality",
        "Eq",
        "Ne",
        "Le",
        "Lt",
        "Ge",
        "Gt",
        "LessThan",
        "StrictLessThan",
        "GreaterThan",
        "StrictGreaterThan",
        "And",
        "Or",
        "Not",
        "oo",
    ]
)
EXPRESSIONS = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.keyword, ast.UnaryOp, ast.USub, ast.Not, ast.BinOp, ast.Add,
    ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div, ast.Pow, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    ast.BoolOp, ast.And, ast.Or,
)  # fmt: skip
GUARDS = (*EXPRESSIONS, ast.Subscript, ast.Attribute, ast.Is, ast.IsNot, ast.Tuple)
GUARD_NAMES = frozenset(
    {"L", "size", "stride", "storage_offset", "dtype", "device", "torch", "len", "requires_grad", "shape", "dim"}
)
OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|torchvision|higher_order)\.\w+(\.\w+)?"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|pow|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
    r"|torch\.(sym_\w+)|math\.(ceil|floor|trunc|sqrt|prod)"
)
REFUSED_OPERATORS = re.compile(r"torch\.ops\.aten\.(from_file|_from_file|set_data)\b")
LIMIT = 20_000
"""Longest expression that is parsed."""


def is_exported_program(path: Path) -> bool:
    """Whether a file's content is a torch.export archive."""
    if not is_archive(path):
        return False
    with open_archive(path) as archive:
        names = [PurePosixPath(n) for n in archive.namelist()]
    return any(len(n.parts) == 3 and n.parts[1] == "models" and n.suffix == ".json" for n in names) or any(
        n.name == "serialized_exported_program.json" for n in names
    )


def load_program(path: Path, *, allow_pickle: bool = False) -> ExportedProgram:
    """Load an exported program, after its members were checked (unless ``allow_pickle``).

    Raises:
        BadInput: a member, expression or operator that is refused (named), or an archive torch cannot read.
    """
    if not allow_pickle:
        try:
            _check_archive(path)
        except BadInput:
            raise
        except Exception as error:  # zipfile raises a dozen kinds on damaged files
            raise _refuse(path, f"it is a damaged archive ({_first_line(error)})") from error
    said = logging.getLogger("torch.export")  # where torch writes a traceback before it raises
    before, said.disabled = said.disabled, True
    try:
        with path.open("rb") as file:
            return torch.export.load(io.BytesIO(file.read()))
    except Exception as error:
        raise BadInput(
            f"{path} cannot be read as an exported program: {' '.join(str(error).split())[:300]}",
            hint=f"It may come from another version of torch (this is {torch.__version__}): export it again with this one.",
        ) from error
    finally:
        said.disabled = before


def _refuse(path: Path, found: str) -> BadInput:
    return BadInput(
        f"{path} is refused: {found}.",
        hint="Nothing in it was executed. If you trust the file, give --allow-pickle; otherwise ask for it to be made "
        "again by torch.export.save from a plain model.",
    )


def _check_archive(path: Path) -> None:
    with open_archive(path) as archive:
        raw = _raw_members(path, archive)
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            if name.is_absolute() or ".." in name.parts:
                raise _refuse(path, f"its member {info.filename!r} has an unsafe name")
            if info.is_dir() or info.filename in raw:
                continue
            data = archive.read(info)
            if name.suffix == ".json":
                _check_json(path, info.filename, data)
            elif (
                "weights" in name.parts
                or "constants" in name.parts
                or "sample_inputs" in name.parts
                or name.suffix in (".pt", ".pkl")
            ):
                _check_member(path, info.filename, data)
            elif "aotinductor" in name.parts or name.suffix in (".so", ".py", ".cpp", ".o"):
                raise _refuse(path, f"its member {info.filename} is compiled or source code")
            elif len(data) > 4096 or _holds_pickle(data):
                raise _refuse(path, f"its member {info.filename} is of an unknown kind")


def _raw_members(path: Path, archive: zipfile.ZipFile) -> set[str]:
    """Members that torch reads as plain numbers, and never unpickles: those that the archive's own tables of weights and constants say so of.

    (The first bytes do not tell: one tensor in 256 begins like a pickle.)
    """
    pickled: dict[str, bool] = {}
    for name in archive.namelist():
        if not name.endswith(("_weights_config.json", "_constants_config.json")):
            continue
        try:
            entries = json.loads(archive.read(name))["config"].values()
            for entry in entries:
                member = str(PurePosixPath(name).with_name(entry["path_name"]))
                pickled[member] = pickled.get(member, False) or entry["use_pickle"] is not False
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _refuse(path, f"its member {name} is no table of tensors") from error
    plain = {member for member, is_pickle in pickled.items() if not is_pickle}
    return {member for member in plain if re.fullmatch(r"(weight|tensor)_\d+", PurePosixPath(member).name)}


def _holds_pickle(data: bytes) -> bool:
    return data[:1] == b"\x80" or data[:2] == b"PK"


def _check_member(path: Path, name: str, data: bytes) -> None:
    base = PurePosixPath(name).name
    if base.startswith(("custom_obj", "opaque")):
        raise _refuse(path, f"its member {name} is a pickled script object")
    raw = re.fullmatch(r"(weight|tensor|buffer|param|constant)_?\d*", base) is not None
    if raw and not _holds_pickle(data):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of raw weights that begin like a pickle
            torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, AttributeError, KeyError) as error:
        if raw and data[:2] != b"PK" and not _names_globals(data):
            return
        raise _refuse(
            path, f"its member {name} is a pickle that the weights-only reader refuses ({_first_line(error)})"
        ) from error


def _names_globals(data: bytes) -> bool:
    """Whether bytes that begin like a pickle would import anything (raw weights can begin with any byte)."""
    import pickletools

    try:
        return any(
            op.name in ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE", "BUILD") for op, _, _ in pickletools.genops(data)
        )
    except Exception:
        return b"\x93" in data[:4096] or b"\nsystem\n" in data


def _first_line(error: BaseException) -> str:
    for line in str(error).splitlines():
        if "GLOBAL" in line or "global" in line:
            return " ".join(line.split())[:160]
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def _check_json(path: Path, name: str, data: bytes) -> None:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"its member {name} is not JSON") from error
    for key, value in _walk(content):
        if key == "expr_str" and not _within(value, EXPRESSIONS, CALLS):
            raise _refuse(path, f"the symbolic expression {str(value)[:80]!r} in {name} is no arithmetic")
        if key == "guards_code":
            bad = [g for g in value or [] if not _within(g, GUARDS, CALLS | GUARD_NAMES)]
            if bad:
                raise _refuse(path, f"the guard {str(bad[0])[:80]!r} in {name} is no comparison of sizes")
        if key == "range_constraints" and isinstance(value, dict):
            odd = [k for k in value if not re.fullmatch(r"\w+", k)]
            if odd:
                raise _refuse(path, f"the symbol {odd[0][:80]!r} in {name} is no name")
        if key == "target" and isinstance(value, str) and _is_operator_key(value) and not _is_allowed(value):
            raise _refuse(path, f"the operator {value[:80]!r} in {name} is not one of torch's own")


def _is_allowed(operator: str) -> bool:
    return OPERATOR.fullmatch(operator) is not None and REFUSED_OPERATORS.match(operator) is None


def _is_operator_key(value: str) -> bool:
    """A node's target, as against a signature's (which names a parameter or buffer)."""
    return value.startswith(("torch.", "_operator", "math", "#")) or "(" in value


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from item.items()
            stack += item.values()
        elif isinstance(item, list):
            stack += item


def _within(text: Any, nodes: tuple[type[ast.AST], ...], names: frozenset[str]) -> bool:
    """Whether ``text`` parses to the allowed syntax, calling and reading only the allowed names (and symbols like s12, u0)."""
    if not isinstance(text, str) or len(text) > LIMIT:
        return False
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    for node in ast.walk(tree):
        if not isinstance(node, nodes):
            return False
        if isinstance(node, ast.Name) and node.id not in names and not re.fullmatch(r"[suzf]\d+", node.id):
            return False
        if (
            isinstance(node, ast.Attribute)
            and node.attr not in names
            and not re.fullmatch(r"(float|int|uint|bool|bfloat)\d*", node.attr)
        ):
            return False
        if isinstance(node, ast.Pow) and len(text) > 200:
            return False
        if isinstance(node, ast.Constant) and not isinstance(node.value, int | float | str | bool | None):
            return False
    return True
