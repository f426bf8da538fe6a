"""The commands ``dbconvert push`` and ``dbconvert pull``."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from diffusionblocks.converter import terminal
from diffusionblocks.runtime import hub
from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.budget import format_bytes
from diffusionblocks.runtime.errors import BadInput, BundleError, printable
from diffusionblocks.runtime.files import checked_path
from diffusionblocks.runtime.manifest import Manifest

CARD = "README.md"
PAGE = "report.html"
LICENCES = re.compile(
    r"apache-2\.0|mit|isc|zlib|unlicense|bsd-[23]-clause|mpl-2\.0|epl-[12]\.0|gpl-[23]\.0|agpl-3\.0|lgpl-2\.1|lgpl-3\.0|cc0-1\.0|cc-by(-sa|-nc|-nd|-nc-sa|-nc-nd)?-4\.0"
    r"|openrail|(bigscience|creativeml)-openrail-m|bigcode-openrail-m|bigscience-bloom-rail-1\.0|llama2|llama3(\.[123])?|gemma|unknown|other"
)
"""What a card's ``license`` may say: the Hugging Face Hub refuses a card with a name that it does not list, and lists these among others (its page "Licenses")."""


@click.command()
@click.argument("bundle", type=click.Path())
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="A new repository is private.")
@click.option("--revision", metavar="BRANCH", help="The branch to write to.  [default: main]")
@click.option("--message", metavar="TEXT", help="Of the commit.")
@click.option("--without-training", is_flag=True, help="Leave out what only further training needs.")
@click.option("--json", "as_json", is_flag=True, help="What was written, as one JSON object on stdout.")
def push(
    bundle: str,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    without_training: bool,
    as_json: bool,
) -> None:
    """Write BUNDLE to a repository of the Hugging Face Hub, in one commit, with a card where it has none.

    Log in first (hf auth login), or set HF_TOKEN; HF_ENDPOINT names another hub.

    \b
    Examples:
    dbconvert push model.dblocks me/model-blocks --private
    dbconvert push model.dblocks me/model-blocks --without-training
    """
    folder, repo = Path(bundle), hub.parsed(f"{hub.PREFIX}{repository.removeprefix(hub.PREFIX)}")[0]
    manifest = manifests.read(folder)
    if without_training:
        kept = {name: of for name, of in manifest.files.items() if not name.startswith(hub.TRAINING)}
        manifest = dataclasses.replace(manifest, files=kept)
    for name in manifest.files:
        checked_path(folder, name, manifest.files, again=True)
    package = hub.hub()
    screen = terminal.console()
    if screen.quiet:
        hub.no_bars()
    with tempfile.TemporaryDirectory() as made:
        paths = {name: folder / name for name in (*manifest.files, manifests.NAME)}
        if without_training:
            manifests.write(manifest, Path(made))
            paths[manifests.NAME] = Path(made) / manifests.NAME
        if (folder / PAGE).is_file():
            paths[PAGE] = folder / PAGE
        card = folder / CARD
        if not card.is_file():
            card = Path(made) / CARD
            card.write_text(card_of(manifest, repo), encoding="utf-8")
        paths[CARD] = card
        size = sum(path.stat().st_size for path in paths.values())
        screen.print(f"{len(paths)} files, {format_bytes(size)}, to {repo}")
        said = _committed(package, repo, paths, private, revision, message or "DiffusionBlocks bundle")
    screen.print(f"Wrote {printable(said)}", soft_wrap=True)
    if as_json:
        click.echo(json.dumps({"repository": repo, "commit": said, "files": len(paths), "bytes": size}, indent=1))


def _committed(
    package: Any, repo: str, paths: Mapping[str, Path], private: bool, revision: str | None, message: str
) -> str:
    """The address of the commit that was made."""
    api = package.HfApi(endpoint=hub.endpoint())
    operations = [package.CommitOperationAdd(name, str(path)) for name, path in paths.items()]
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None and revision != "main":
            api.create_branch(repo, branch=revision, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message, revision=revision).commit_url)
    except Exception as error:  # huggingface_hub raises its transport's own kinds
        raise hub.explained(error, repo, revision or "main") or BadInput(
            f"{repo} cannot be written: {' '.join(str(error).split())[:200]}",
            hint="Log in (hf auth login) or set HF_TOKEN, check the connection, then give the same command again.",
        ) from error


def card_of(manifest: Manifest, repo: str) -> str:
    """The card of a bundle's repository: what it is, its blocks, how it is run."""
    name = _plain(str(manifest.source.get("name") or repo))
    lines = [
        "---",
        "library_name: diffusionblocks",
        "tags: [diffusionblocks, onnx]",
        *_licence(manifest.source.get("licence")),
        "---",
        "",
        f"# {name} as DiffusionBlocks",
        "",
        f"A network ({manifest.task}) in {len(manifest.blocks)} blocks, each an ONNX graph of its own: it runs in the memory of one block"
        + (", and its blocks are fine-tuned to denoise." if manifest.trained else "."),
        "",
        "| block | units | parameters | bytes | noise levels |",
        "|---|---|---|---|---|",
    ]
    for block in manifest.blocks:
        levels = f"{block.sigma[0]:.4g} to {block.sigma[-1]:.4g}" if block.sigma else ""
        row = (block.index, len(block.units), f"{block.parameters:,}", format_bytes(block.bytes), levels)
        lines.append(f"| {' | '.join(map(str, row))} |")
    inputs = ", ".join(f"`{_plain(s.name)}` {s.dtype} [{', '.join(map(str, s.shape))}]" for s in manifest.inputs)
    arguments, call = _use(manifest)
    lines += [
        "",
        f"Inputs: {inputs}.",
        "",
        "```",
        'pip install "diffusionblocks[cpu,hub]"',
        f"dbconvert run hf:{repo} {arguments} --output y.npy",
        "```",
        "",
        "```python",
        "from diffusionblocks.runtime import open_bundle",
        "",
        f'with open_bundle("hf:{repo}") as bundle:',
        f"    y = bundle.{call}",
        "```",
        "",
        "`report.html` in this repository shows its blocks, noise levels, training and checks.",
    ]
    kept = [f"`{_plain(file)}`" for file in manifest.files if file.startswith("licence/")]
    if kept:
        lines += ["", f"The original's licence: {', '.join(kept)}."]
    return "\n".join(lines) + "\n"


def _licence(said: object) -> list[str]:
    """Lines of a card's head; a licence that may not be listed is ``other``, with its name."""
    known = str(said or "").strip().lower()
    if LICENCES.fullmatch(known):
        return [f"license: {known}"]
    name = re.sub(r"[^a-z0-9.]+", "-", known)[:100].strip("-.")
    return ["license: other", f"license_name: {json.dumps(name)}"] if name else []


def _use(manifest: Manifest) -> tuple[str, str]:
    """How a bundle is run: options of the command, and a call in Python."""
    denoiser = None if manifest.target is None else manifest.target.denoiser
    if denoiser is None:
        return ("--input x.npy", "run(x)") if len(manifest.inputs) == 1 else ("--input x.npz", "run(arrays)")
    if all(s.name in (denoiser.input, denoiser.time) for s in manifest.inputs):
        return "--count 4", "sample(count=4)"
    return "--input conditions.npz", "sample(conditions)"


def _plain(text: str) -> str:
    """A name without what Markdown or HTML would read."""
    return "".join(c for c in printable(text) if c not in "<>`|[]*\n")[:200]


@click.command()
@click.argument("name", metavar="hf:ORG/NAME[@REVISION]")
@click.argument("folder", type=click.Path())
@click.option("--force", is_flag=True, help="Replace FOLDER if it exists.")
def pull(name: str, folder: str, force: bool) -> None:
    """Fetch a bundle from a hub into FOLDER, whole, so that it can be trained further; every file's hash is checked.

    \b
    Examples:
    dbconvert pull hf:me/model-blocks model.dblocks
    dbconvert pull hf:me/model-blocks@v1.0 model.dblocks --force
    """
    from diffusionblocks.export.replacing import clear_litter, replace, scratch_folder

    target = Path(folder)
    if not hub.is_hub_name(name):
        raise BadInput(f"{name} is no name of a hub.", hint="Write hf:ORG/NAME.")
    if target.exists() and not force:
        raise BadInput(f"{target} exists already.", hint="Give another FOLDER, or --force to replace it.")
    source = hub.local_folder(name, training=True)
    made: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_litter(target)
        made = scratch_folder(target)
        _copy(source, made)
        os.chmod(made, 0o755)
        replace(made, target)
    except OSError as error:
        raise BadInput(
            f"{target} cannot be written: {error}", hint="Free some space, or give a FOLDER that you may write to."
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    terminal.console().print(f"Wrote {target}", soft_wrap=True)
    if not _page(target):
        terminal.console().print(f"Without {PAGE}: dbconvert report {target} says why.", soft_wrap=True)


def _copy(source: Path, made: Path) -> None:
    """Copy a bundle's files, the manifest last.

    Raises:
        BundleError: a file is missing or altered.
        OSError: it cannot be written.
    """
    files = manifests.read(source).files
    for file in files:
        (made / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checked_path(source, file, files, again=True), made / file)
    shutil.copyfile(source / manifests.NAME, made / manifests.NAME)


def _page(folder: Path) -> bool:
    """Write a bundle's page anew: no hash holds for the one in a repository. False where it cannot be made."""
    try:
        from diffusionblocks.export.report import gather
        from diffusionblocks.export.report_page import write_page

        write_page(gather(folder, manifests.read(folder)), folder / PAGE)
    except (
        ModuleNotFoundError,
        OSError,
        BundleError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
    ):
        return False
    return True
