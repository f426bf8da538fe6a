"""The command ``dbconvert report``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from diffusionblocks.converter import terminal
from diffusionblocks.runtime.errors import BadInput, BundleError
from diffusionblocks.runtime.hub import is_hub_name, local_folder


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--out", type=click.Path(), metavar="FILE.html", help="Where to write it.  [default: BUNDLE/report.html]")
@click.option("--bench", is_flag=True, help="Measure time and memory of one block at a time against all at once, too.")
@click.option("--json", "as_json", is_flag=True, help="Where the page is and what was checked, as one JSON object.")
def report(bundle: str, out: str | None, bench: bool, as_json: bool) -> None:
    """Verify BUNDLE and write its page: trunk, noise, training, memory, parity, provenance, in one file of HTML that loads nothing.

    \b
    Examples:
    dbconvert report model.dblocks
    dbconvert report model.dblocks --bench --out model.html
    """
    from diffusionblocks.export.report import gather
    from diffusionblocks.export.report_page import NAME, UNUSUAL, write_page
    from diffusionblocks.export.verify import verify_bundle
    from diffusionblocks.runtime import manifest as manifests

    folder = local_folder(bundle, training=True)
    if out is None and is_hub_name(bundle):
        raise BadInput("Where is the page to be written?", hint="Give --out FILE.html: a bundle of a hub is only read.")
    path = folder / NAME if out is None else Path(out)
    found = verify_bundle(folder)
    measured = None
    if bench:
        from diffusionblocks.converter.bench import Request, compare

        measured = compare(Request(folder, rows=("whole", "block"))).to_json()
    try:
        made = gather(folder, manifests.read(folder), [vars(check) for check in found.checks], measured)
    except UNUSUAL as error:
        raise BundleError(
            f"The manifest of {folder} records its schedule or training in another way than this version shows: {error!r}",
            hint="Export the bundle again, or upgrade diffusionblocks.",
        ) from error
    try:
        write_page(made, path)
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error}", hint="Give --out a file you may write.") from error
    if as_json:
        click.echo(json.dumps({"page": str(path), "checks": [vars(check) for check in found.checks]}, indent=1))
    terminal.console().print(f"Wrote {path}", soft_wrap=True)
    found.raise_for_failures()
