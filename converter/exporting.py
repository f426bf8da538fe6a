"""A converted network written as a bundle and verified, as the commands do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusionblocks.converter.licences import keep_licence
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.parts import network_parts, save_training
from diffusionblocks.converter.texts import copy_tokenizer
from diffusionblocks.export.bundle import export_bundle
from diffusionblocks.export.report_page import add_page
from diffusionblocks.export.verify import VerifyReport, verify_bundle
from diffusionblocks.runtime.errors import printable
from diffusionblocks.runtime.manifest import Decoding
from rich.console import Console

TOKENIZER = "tokenizer"


def _with_tokenizer(preprocessing: dict[str, Any] | None, bundle: Path) -> tuple[dict[str, Any] | None, Path | None]:
    """The preprocessing with the tokenizer's place in the bundle, and where it lies now."""
    stored = (preprocessing or {}).get("tokenizer")
    if preprocessing is None or stored is None:
        return preprocessing, None
    return {**preprocessing, "tokenizer": TOKENIZER}, bundle / str(stored)


def export_network(
    network: ConvertedNetwork,
    out: Path,
    console: Console,
    *,
    source: dict[str, Any],
    preprocessing: dict[str, Any] | None = None,
    class_names: Sequence[str] | None = None,
    training: dict[str, Any] | None = None,
    decoding: Decoding | None = None,
    probe: Any = None,
    force: bool = False,
    deploy: bool = False,
    dtype: str = "float32",
    extra: Callable[[Path], None] | None = None,
    licence: tuple[Path, ...] = (),
) -> VerifyReport:
    """Write the bundle ``out`` and check it; ``extra`` writes further files into the folder before it is whole; ``licence``: files it keeps.

    Raises:
        BadInput: it cannot be written.
        VerificationError: a check failed.
    """
    said, tokenizer = _with_tokenizer(preprocessing, out)
    parts = network_parts(
        network,
        decoding=decoding,
        source=source,
        training=training,
        preprocessing=said,
        class_names=class_names,
        probe_inputs=probe,
    )

    def further(folder: Path) -> None:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder / TOKENIZER)
        keep_licence(licence, folder)
        if not deploy:
            save_training(network, folder / "train")
        if extra is not None:
            extra(folder)

    with console.status("exporting") as status:
        folder = export_bundle(
            parts,
            out,
            force=force,
            extra=further,
            progress=lambda name: status.update(f"exporting {name}"),
            dtype=dtype,
        )
    report = verify_bundle(folder)
    for check in report.checks:
        console.print(printable(f"{'ok ' if check.ok else 'FAILED'} {check.name}: {check.detail}"))
    add_page(folder, [vars(c) for c in report.checks])
    report.raise_for_failures()
    console.print(f"Wrote {folder}")
    return report
