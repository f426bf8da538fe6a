"""``--data``: whatever it names, told by its content, as rows of the model's inputs.

Images and texts are read when a batch asks for them, tables are memory-mapped, and arrays are mapped where their file allows it; what is kept in memory is one
number a row. Every row is read once before anything is trained on, so that what cannot be read is named and counted then.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from diffusionblocks.converter.bad_rows import Progress, scan
from diffusionblocks.converter.columns import image_reader, input_readers, target_reader, text_column
from diffusionblocks.converter.content import Found, digest_files, files_below, kind_of
from diffusionblocks.converter.data_function import from_function
from diffusionblocks.converter.dataset import Dataset
from diffusionblocks.converter.folders import classes_of, image_folder, report_left_out, text_folder
from diffusionblocks.converter.hub_data import cache_folder, load, load_saved
from diffusionblocks.converter.packed import packed, texts_of_files
from diffusionblocks.converter.preprocessing import Preprocessing
from diffusionblocks.converter.stored import array_file
from diffusionblocks.converter.tables import Reader, TableDataset, TextReader, need_data_package
from diffusionblocks.converter.texts import Tokens
from diffusionblocks.runtime.errors import BadInput
from diffusionblocks.runtime.manifest import TensorSpec

log = logging.getLogger(__name__)

KINDS = (
    "a .npy or .npz, a folder of images by class, parquet, csv or json lines, a folder that datasets' save_to_disk wrote, text files, "
    "or package.module:function"
)
SAMPLED = 64
TABLES = {"parquet": "parquet", "csv": "csv", "json": "json"}


@dataclass(frozen=True)
class Wanted:
    """What the data is read for: the model's inputs, how they are prepared, and whether targets are needed (None: taken where there are any).

    ``windows``: texts one after another, cut where the model's length ends, in place of one a sample."""

    inputs: tuple[TensorSpec, ...]
    preparing: Preprocessing
    tokenizer: Path | None
    labelled: bool | None
    class_names: tuple[str, ...] | None
    windows: bool = False
    skip_bad: bool = False

    def fingerprint(self, content: str, readers: Sequence[Reader], names: tuple[str, ...] | None, target: bool) -> str:
        """Of the data's content and of all that decides how it is prepared; of a tokenizer its content, not its place."""
        said = {
            "content": content,
            "inputs": [asdict(s) for s in self.inputs],
            "preparing": replace(self.preparing, tokenizer=None).to_json(),
            "tokens": [r.tokens.digest for r in readers if isinstance(r, TextReader)],
            "columns": [[r.column, *r.names] for r in readers],
            "class_names": names,
            "target": target,
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def open_data(
    spec: str,
    inputs: Sequence[TensorSpec],
    preprocessing: dict[str, Any] | None,
    *,
    skip_bad: bool = False,
    labelled: bool | None = None,
    tokenizer: Path | None = None,
    class_names: Sequence[str] | None = None,
    progress: Progress | None = None,
    windows: bool = False,
) -> Dataset:
    """The rows ``spec`` names, each read once, so that all can be read.

    Args:
        spec: a path, a pattern of files, or ``package.module:function``.
        inputs: the model's in the order of forward's arguments, ``shape[0]`` the batch.
        preprocessing: what a source or a bundle has (:class:`preprocessing.Preprocessing` as JSON).
        skip_bad: leave rows out that cannot be read, in place of refusing the data.
        labelled: True where targets are needed, False where they are to be left out, None for what there is.
        tokenizer: a folder or a ``tokenizer.json`` in place of the model's own.
        class_names: those of a bundle, by class number; without them classes are numbered in the order of their names, or as a ClassLabel has them.
        progress: told how many rows of how many were read.
        windows: texts are put one after another and cut into windows of the model's length, for a language model.

    Raises:
        BadInput: no such data, data of a kind that is not read, that does not fit the model, or with rows that cannot be read.
    """
    preparing = Preprocessing.from_json(preprocessing) if preprocessing else Preprocessing()
    own = Path(preparing.tokenizer) if preparing.tokenizer else None
    known = None if class_names is None else tuple(class_names)
    wanted = Wanted(tuple(inputs), preparing, tokenizer or own, labelled, known, windows, skip_bad)
    path = Path(spec).expanduser()
    if path.is_dir():
        data = _from_folder(path, wanted)
    elif path.exists():
        data = _from_files([path], path, wanted)
    elif matching := [Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file()]:
        data = _from_files(matching, path, wanted)
    elif re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", spec):
        data = from_function(spec, wanted.inputs, labelled)
    else:
        raise BadInput(f"{spec} does not exist.", hint=f"Give {KINDS}.")
    return scan(
        data, skip_bad, progress, memory=cache_folder() / "scans" if getattr(data, "by_content", False) else None
    )[0]


def _from_folder(folder: Path, wanted: Wanted) -> Dataset:
    if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
        table = load_saved(folder)
        parts = [Path(f["filename"]) for f in table.cache_files]
        return _table(table, digest_files([(p.name, p) for p in parts]), folder, wanted)
    files = files_below(folder)
    if not files:
        raise BadInput(f"{folder} holds no files.", hint=f"Give {KINDS}.")
    kind = _kind_of_folder(folder, files)
    if kind == "image":
        return _images(folder, files, wanted)
    if kind in TABLES:
        chosen = [f for f in files if kind_of(folder / f.path) == kind]
        return _rows_of(kind, [folder / f.path for f in _for_training(chosen, folder)], folder, wanted)
    if kind == "text":
        texts = [f for f in files if f.path.lower().endswith(".txt")] or files
        if wanted.windows:
            return _windows([folder / f.path for f in texts], wanted)
        classes = classes_of(folder, texts)
        if classes is None:
            return _rows_of("text", [folder / f.path for f in texts], folder, wanted)
        return _texts(folder, texts, wanted)
    raise BadInput(f"{folder} holds {kind} files.", hint=f"Give {KINDS}.")


def _kind_of_folder(folder: Path, files: Sequence[Found]) -> str:
    """The kind of most of a folder's files, as some of them show; parquet where there is any."""
    chosen = np.unique(np.linspace(0, len(files) - 1, SAMPLED).astype(int))
    counts = Counter(kind_of(folder / files[i].path) for i in chosen)
    if counts["parquet"]:
        return "parquet"
    known = [k for k in ("image", "json", "csv", "text", "npz", "npy", "arrow") if counts[k]]
    return max(known, key=lambda k: counts[k]) if known else next(iter(counts))


def _for_training(files: Sequence[Found], folder: Path) -> list[Found]:
    """Those whose names say ``train``, where some do."""
    named = [f for f in files if re.search(r"(^|[^a-z])train(ing)?([^a-z]|$)", f.path.lower())]
    if named and len(named) < len(files):
        log.warning("%s: %d files named train are used, %d others are not", folder, len(named), len(files) - len(named))
    return named or list(files)


def _from_files(files: Sequence[Path], where: Path, wanted: Wanted) -> Dataset:
    kinds = Counter(kind_of(f) for f in files)
    if len(kinds) > 1:
        found = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        raise BadInput(f"{where} names files of several kinds: {found}.", hint="Give files of one kind.")
    kind = next(iter(kinds))
    if kind in ("npy", "npz") and len(files) == 1:
        return array_file(files[0], wanted.inputs, wanted.labelled)
    if kind == "text" and wanted.windows:
        return _windows(files, wanted)
    if kind in TABLES or kind == "text":
        return _rows_of(kind, files, where, wanted)
    what = {
        "image": "an image; a folder of images is read",
        "arrow": "an Arrow file; the folder that save_to_disk wrote is read",
        "empty": "empty",
        "unknown": "of an unknown kind",
    }
    raise BadInput(f"{where} is {what.get(kind, f'several {kind} files; one is read')}.", hint=f"Give {KINDS}.")


def _rows_of(kind: str, files: Sequence[Path], where: Path, wanted: Wanted) -> Dataset:
    """Rows of tables, or lines of text."""
    names = [glob.escape(str(f.resolve())) for f in files]
    content = digest_files([(str(i), f) for i, f in enumerate(files)])
    if kind != "text":
        options = {"sep": "\t"} if kind == "csv" and files[0].suffix.lower() == ".tsv" else {}
        return _table(load(TABLES[kind], names, where, **options), content, files[0].resolve().parent, wanted)
    if wanted.labelled:
        raise BadInput(
            f"{where} is text, a sample a line, without labels.",
            hint="Give a folder a class, a table with the columns text and label, or train with --targets teacher.",
        )
    reader = TextReader("text", Tokens(wanted.tokenizer, wanted.inputs))
    _only(wanted, reader, where)
    table = load("text", names, where, encoding_errors="replace")
    order = _with_text(table)
    return TableDataset(
        table,
        [reader],
        None,
        wanted.inputs,
        fingerprint=wanted.fingerprint(content, [reader], None, False),
        order=order,
        unit="lines",
        name=_line_name(order, len(files) == 1),
    )


def _windows(files: Sequence[Path], wanted: Wanted) -> Dataset:
    content = digest_files([(str(i), f) for i, f in enumerate(files)])
    tokens = Tokens(wanted.tokenizer, wanted.inputs)
    return packed(
        texts_of_files(files, skip_bad=wanted.skip_bad),
        f"{content}/{wanted.skip_bad}",
        tokens,
        wanted.inputs,
        cache_folder() / "tokens",
    )


def _line_name(order: np.ndarray[Any, Any], single: bool) -> Callable[[int], str] | None:
    """The line of a row, counted from 1, where all lie in one file."""
    return (lambda row: f"line {int(order[row]) + 1}") if single else None


def _with_text(table: Any) -> np.ndarray[Any, Any]:
    """The rows of a table of lines that are not blank."""
    compute = need_data_package("pyarrow.compute")
    column = table.with_format("arrow")[:].column("text")
    filled = [
        compute.greater(compute.utf8_length(compute.utf8_trim_whitespace(part)), 0).to_numpy(zero_copy_only=False)
        for part in column.chunks
    ]
    return np.flatnonzero(np.concatenate([np.zeros(0, bool), *filled]))


def _table(table: Any, content: str, root: Path, wanted: Wanted) -> Dataset:
    if wanted.windows and wanted.inputs[0].name not in table.column_names:
        column = text_column(table.features, table.column_names)
        if column is not None:
            texts = ([str(row[column] or "")] for row in table.with_format(None).select_columns([column]))
            tokens = Tokens(wanted.tokenizer, wanted.inputs)
            return packed(texts, f"{content}/{column}", tokens, wanted.inputs, cache_folder() / "tokens")
    readers = input_readers(table, wanted.inputs, wanted.preparing, wanted.tokenizer, root)
    target, names = target_reader(table, wanted.inputs, wanted.class_names, wanted.labelled)
    content = hashlib.sha256(f"{content}/{table.features}".encode()).hexdigest()
    every = readers if target is None else [*readers, target]
    return TableDataset(
        table,
        readers,
        target,
        wanted.inputs,
        fingerprint=wanted.fingerprint(content, every, names, target is not None),
        class_names=names,
    )


def _images(folder: Path, files: Sequence[Found], wanted: Wanted) -> Dataset:
    need_data_package("PIL")
    reader = image_reader("image", wanted.inputs[0], wanted.preparing, folder)
    _only(wanted, reader, folder)
    report_left_out(folder, files, len(files))
    listing = image_folder(folder, wanted.class_names)
    report_left_out(folder, files, len(listing.order))
    return _of_listing(listing, reader, "images", wanted)


def _texts(folder: Path, files: Sequence[Found], wanted: Wanted) -> Dataset:
    reader = TextReader("file", Tokens(wanted.tokenizer, wanted.inputs), files=True)
    _only(wanted, reader, folder)
    return _of_listing(text_folder(folder, files, wanted.class_names), reader, "texts", wanted)


def _of_listing(listing: Any, reader: Reader, unit: str, wanted: Wanted) -> Dataset:
    if wanted.labelled and listing.labels is None:
        raise BadInput(
            f"{listing.folder} holds {unit} without classes.",
            hint="Put them into a folder a class, or train with --targets teacher.",
        )
    labels = None if wanted.labelled is False else listing.labels
    names = None if labels is None else listing.class_names
    content = digest_files([(name, listing.folder / name) for name in listing.names()])
    return TableDataset(
        listing.table,
        [reader],
        labels,
        wanted.inputs,
        fingerprint=wanted.fingerprint(content, [reader], names, labels is not None),
        class_names=names,
        order=listing.order,
        unit=unit,
        name=listing.name,
    )


def _only(wanted: Wanted, reader: Reader, where: Path) -> None:
    """Refuse a model with inputs that ``reader`` does not make."""
    missing = [s.name for s in wanted.inputs if s.name not in reader.names]
    if missing:
        raise BadInput(
            f"{where} gives the model's {', '.join(reader.names)}; it also takes {', '.join(missing)}.",
            hint="Give a table with a column for each input, or a .npz.",
        )
