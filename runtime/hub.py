"""Bundles by name from a Hugging Face Hub: ``hf:ORG/NAME`` or ``hf:ORG/NAME@REVISION``, fetched once and kept as a folder of plain files.

The manifest comes first and is read as strictly as that of any bundle; then the files that it names, and no others, whatever the repository lists. What was fetched is a bundle like any
other: hashes are checked when its files are used. They are the repository's own, so a name should say a revision (a commit) where it matters who made it.
"""

from __future__ import annotations

import glob
import importlib
import logging
import os
import re
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote

from diffusionblocks.runtime import manifest as manifests
from diffusionblocks.runtime.caches import cache_folder
from diffusionblocks.runtime.errors import BadInput, BundleError
from diffusionblocks.runtime.installing import install
from diffusionblocks.runtime.processes import is_alive

log = logging.getLogger(__name__)

PREFIX = "hf:"
NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
COMMIT = re.compile(r"[0-9a-f]{40,64}")
TRAINING = "train/"
WHOLE = "-whole"
"""Ends the name of a folder that has what training reads, too."""
SHOWN = 3
HINT = "Check the name; for a private repository log in (hf auth login), or set HF_TOKEN."


def is_hub_name(bundle: str | Path) -> bool:
    """Whether a bundle is named as one of a hub."""
    return str(bundle).startswith(PREFIX)


def local_folder(bundle: str | Path, *, training: bool = False) -> Path:
    """The folder of a bundle: itself, or where the one of a hub lies after it was fetched.

    Args:
        bundle: a folder, or ``hf:ORG/NAME[@REVISION]`` (a branch, a tag or a commit; ``main`` where nothing is said).
        training: fetch also what only training and ``verify`` read.

    Raises:
        BadInput: huggingface_hub is not installed, a name that is none, no such repository or revision, no connection and nothing fetched before, a full disk.
        BundleError: the repository holds no bundle, or one that is damaged.
    """
    if not is_hub_name(bundle):
        return Path(bundle)
    repo, revision = parsed(str(bundle))
    folder = cache_folder() / "hub" / repo.replace("/", "--")
    commit = _commit(repo, revision, folder, training)
    found = _kept(folder, commit, training)
    if found is None:
        found = folder / (f"{commit}{WHOLE}" if training else commit)
        _fetch(repo, commit, found, training)
    _remember(folder, revision, commit)
    return found


def _kept(folder: Path, commit: str, training: bool) -> Path | None:
    """Where a commit lies that was fetched before."""
    ends = (WHOLE,) if training else (WHOLE, "")
    return next((path for end in ends if (path := folder / f"{commit}{end}").is_dir()), None)


def parsed(name: str) -> tuple[str, str]:
    """Repository and revision of ``hf:ORG/NAME[@REVISION]``.

    Raises:
        BadInput: it is no such name.
    """
    found = NAME.fullmatch(name)
    if found is None or ".." in name:
        raise BadInput(f"{name!r} is no name of a bundle on a hub.", hint="Write hf:ORG/NAME or hf:ORG/NAME@REVISION.")
    return found["repo"], found["revision"] or "main"


def hub() -> Any:
    """The package huggingface_hub.

    Raises:
        BadInput: it is not installed.
    """
    try:
        package = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise BadInput("huggingface_hub is not installed.", hint=f"Install it: {install('hub')}") from error
    if not sys.stderr.isatty():
        no_bars()
    return package


def no_bars() -> None:
    """No bars of huggingface_hub on the error stream."""
    importlib.import_module("huggingface_hub.utils").disable_progress_bars()


def endpoint() -> str | None:
    """The hub to ask: ``HF_ENDPOINT``, or huggingface_hub's own."""
    return os.environ.get("HF_ENDPOINT") or None


def explained(error: Exception, repo: str, revision: str = "main") -> BadInput | None:
    """What an error of huggingface_hub means to a user; None where it says nothing of the repository, as without a connection."""
    known = importlib.import_module("huggingface_hub.errors")
    where = f"{repo} on {endpoint() or 'the Hugging Face Hub'}"
    if isinstance(error, known.RevisionNotFoundError):
        return BadInput(
            f"{where} has no revision {revision!r}.", hint="Name a branch, a tag or a commit that is there."
        )
    if isinstance(error, known.GatedRepoError):
        return BadInput(
            f"{where} is gated: its owner has to let you in.", hint="Ask for access on its page, then log in."
        )
    if isinstance(error, known.RepositoryNotFoundError | known.HFValidationError):
        return BadInput(f"{where} is not there, or not for you.", hint=HINT)
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if status in (401, 403):
        return BadInput(f"{where} refuses: {_line(error)}", hint=HINT)
    return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _commit(repo: str, revision: str, folder: Path, training: bool) -> str:
    """The commit a revision is now; without a connection, the one it was when it was last fetched."""
    if COMMIT.fullmatch(revision) and _kept(folder, revision, training):
        return revision
    try:
        said = str(hub().HfApi(endpoint=endpoint()).model_info(repo, revision=revision, timeout=20).sha)
    except BadInput:
        raise
    except Exception as error:  # huggingface_hub raises its transport's own kinds
        wrong = explained(error, repo, revision)
        if wrong is not None:
            raise wrong from error
        last = _remembered(folder, revision)
        if last and _kept(folder, last, training):
            log.warning("no connection to the hub: %s is taken as it was fetched before", repo)
            return last
        before = "only what a run needs of it was fetched before" if last else "it was not fetched before"
        raise BadInput(
            f"The hub cannot be reached for {repo}, and {before}: {_line(error)}",
            hint="Check the connection (HF_HUB_OFFLINE forbids it), or give a bundle's folder.",
        ) from error
    if not COMMIT.fullmatch(said):
        raise BadInput(f"The hub says that {repo} is at {said[:80]!r}, which is no commit.", hint="Check HF_ENDPOINT.")
    return said


def _remembered(folder: Path, revision: str) -> str:
    """The commit a revision was when it was last fetched; empty where it never was."""
    try:
        last = _note(folder, revision).read_text("ascii").strip()
    except (OSError, ValueError):
        return ""
    return last if COMMIT.fullmatch(last) else ""


def _remember(folder: Path, revision: str, commit: str) -> None:
    if _remembered(folder, revision) == commit:
        return
    note = _note(folder, revision)
    made = note.with_name(f".{note.name}.{os.getpid()}")
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(commit, "ascii")
        os.replace(made, note)
    except OSError as error:
        raise _unkept(folder, error) from error


def _note(folder: Path, revision: str) -> Path:
    return folder / "revisions" / quote(revision, safe="")


def _unkept(folder: Path, error: OSError) -> BadInput:
    return BadInput(
        f"The cache {folder} cannot be written: {error}", hint="Free some space, or set DIFFUSIONBLOCKS_CACHE."
    )


def _fetch(repo: str, commit: str, target: Path, training: bool) -> None:
    """Fetch a commit's bundle under another name, then rename it."""
    listed = _listed(repo, commit)
    if manifests.NAME not in listed:
        others = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
        raise BundleError(
            f"{repo} is no bundle: it holds no {manifests.NAME}, but {', '.join(listed[:SHOWN]) or 'nothing'}{others}.",
            hint="Name a repository that dbconvert push wrote; a model's is fetched first, then converted.",
        )
    part: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _scratch(target.parent)
        _download(repo, commit, part, [manifests.NAME])
        files = manifests.read(part).files
        names = [name for name in files if training or not name.startswith(TRAINING)]
        missing = sorted(set(names) - set(listed))
        if missing:
            raise BundleError(
                f"{repo} lacks {', '.join(missing[:SHOWN])}, which its manifest names.",
                hint="Ask its owner to push it again.",
            )
        _download(repo, commit, part, names)
        shutil.rmtree(part / ".cache", ignore_errors=True)  # huggingface_hub's notes
        os.chmod(part, 0o755)
        try:
            os.rename(part, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
    except OSError as error:
        raise _unkept(target.parent, error) from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def _scratch(folder: Path) -> Path:
    """A new folder that says whose it is; those of processes that were killed are removed."""
    prefix = f".{socket.gethostname()}_"
    for path in [path for path in folder.iterdir() if path.name.startswith(prefix)]:
        process = path.name.removeprefix(prefix).partition(".")[0]
        if process.isdigit() and not is_alive(int(process)):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}.", dir=folder))


def _listed(repo: str, commit: str) -> list[str]:
    """Names of a commit's files, as the hub says them: not to be written to."""
    try:
        return sorted(hub().HfApi(endpoint=endpoint()).list_repo_files(repo, revision=commit))
    except BadInput:
        raise
    except Exception as error:
        raise _failed(error, repo, commit) from error


def _download(repo: str, commit: str, folder: Path, names: list[str]) -> None:
    """Fetch files that the hub lists."""
    patterns = [glob.escape(name) for name in names]
    try:
        hub().snapshot_download(
            repo, revision=commit, local_dir=folder, allow_patterns=patterns, endpoint=endpoint(), max_workers=4
        )
    except OSError as error:
        if error.errno is not None:
            raise
        raise _failed(error, repo, commit) from error
    except Exception as error:
        raise _failed(error, repo, commit) from error
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:  # older versions of huggingface_hub return without a word when the connection breaks
        raise _failed(FileNotFoundError(f"{absent[0]} did not arrive"), repo, commit)


def _failed(error: Exception, repo: str, commit: str) -> BadInput:
    return explained(error, repo, commit) or BadInput(
        f"{repo} cannot be fetched: {_line(error)}", hint="Check the connection, then give the same command again."
    )
