"""Bundles on a hub: pushed to, fetched from and run from a server of this machine that speaks the Hugging Face Hub's protocol."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusionblocks.converter.cli import main
from diffusionblocks.runtime import BadInput, BundleError, hub, manifest, open_bundle
from diffusionblocks.runtime.hub import local_folder, parsed
from diffusionblocks.runtime.installing import install

constants = pytest.importorskip("huggingface_hub.constants")
SMALL = 4096
"""Bytes below which a file is part of a commit; larger ones are uploaded by themselves (LFS)."""
LISTED = ("apache-2.0", "mit", "other")
"""Licences that the server knows."""


class Hub:
    """Repositories in memory: ``commits[repo]`` is a list of (sha, {name: content}), ``branches[repo]`` maps names to shas."""

    def __init__(self) -> None:
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.cut: str | None = None
        self.closed: tuple[int, str] | None = None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def tell(self, status: int, **said: Any) -> None:
                self.answer(status, json.dumps(said).encode(), Content_Type="application/json")

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.get(self)

            def do_POST(self) -> None:
                hub.post(self)

            def do_PUT(self) -> None:
                content = self.body()
                hub.blobs[hashlib.sha256(content).hexdigest()] = content
                self.answer(200)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        sha = self.branches.get(repo, {}).get(revision, revision)
        return next(((s, f) for s, f in self.commits.get(repo, []) if s == sha), None)

    def put(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(repr((repo, len(self.commits.get(repo, [])), sorted(files))).encode()).hexdigest()
        self.commits.setdefault(repo, []).append((sha, files))
        self.branches.setdefault(repo, {})[branch] = sha
        return sha

    def get(self, to: Any) -> None:
        path = to.path.partition("?")[0]
        self.asked.append(path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            repo, revision = found[1], (found[2] or "main").replace("%2F", "/")
            if self.closed is not None:
                return to.answer(self.closed[0], X_Error_Code=self.closed[1])
            if repo not in self.branches:
                return to.answer(404, X_Error_Code="RepoNotFound")
            at = self.files(repo, revision)
            if at is None:
                return to.answer(404, X_Error_Code="RevisionNotFound")
            names = [{"rfilename": name} for name in at[1]]
            return to.tell(200, id=repo, sha=at[0], siblings=names, private=False, tags=[], downloads=0, likes=0)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?.*", path):
            at = self.files(found[1], found[2])
            rows = [] if at is None else [self.row(name, content) for name, content in at[1].items()]
            return to.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            at = self.files(found[1], found[2])
            if at is None or found[3] not in at[1]:
                return to.answer(404, X_Error_Code="EntryNotFound")
            content = at[1][found[3]]
            if self.cut == found[3] and to.command == "GET":
                return to.answer(500)
            etag = hashlib.sha256(content).hexdigest()
            return to.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=at[0])
        return to.answer(404)

    @staticmethod
    def row(name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def post(self, to: Any) -> None:
        path, body = to.path.partition("?")[0], to.body()
        self.asked.append(path)
        if to.headers.get("Authorization") != "Bearer hf_secret":
            return to.answer(401)
        if path == "/api/validate-yaml":
            said = re.findall(r"^license: (.*)$", json.loads(body)["content"], re.MULTILINE)
            errors = [{"message": f'"license" must be one of {LISTED}'} for one in said if one not in LISTED]
            return to.tell(400 if errors else 200, errors=errors, warnings=[])
        if path == "/api/repos/create":
            said = json.loads(body)
            repo = f"{said.get('organization')}/{said['name']}"
            if repo in self.branches:
                return to.tell(409, url=f"{self.url}/{repo}")
            self.put(repo, {})
            return to.tell(200, url=f"{self.url}/{repo}", name=repo)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {"path": f["path"], "uploadMode": "regular" if f["size"] < SMALL else "lfs", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return to.tell(200, files=files)
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "authenticated": True, "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return to.tell(200, transfer="basic", objects=objects)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            self.branches[found[1]][found[2]] = self.branches[found[1]]["main"]
            return to.tell(200)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            repo, branch = found[1], found[2]
            at = self.files(repo, branch)
            files = dict(at[1]) if at else {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.blobs[value["oid"]]
            sha = self.put(repo, files, branch)
            return to.tell(200, success=True, commitOid=sha, commitUrl=f"{self.url}/{repo}/commit/{sha}")
        return to.answer(404)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    made = Hub()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("DIFFUSIONBLOCKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def pushed(server: Hub, bundles) -> Hub:
    assert command("push", bundles["frozen"][1], "me/blocks") == 0
    return server


def command(*args: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([*map(str, args)])
    return int(done.value.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_pushed_and_run_by_name(pushed: Hub, bundles, digits, tmp_path: Path) -> None:
    x, folder = digits[0][:5], bundles["frozen"][1]
    with open_bundle("hf:me/blocks") as there, open_bundle(folder) as here:
        for mode in ("exact", "denoise"):
            assert np.array_equal(there.run(x, mode=mode), here.run(x, mode=mode))
    np.save(tmp_path / "x.npy", x)
    assert command("run", "hf:me/blocks@main", "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy") == 0
    stored = pushed.files("me/blocks", "main")
    assert stored is not None
    assert {name: stored[1][name] for name in contents(folder)} == contents(folder)
    assert any(len(c) >= SMALL for c in stored[1].values())
    assert b"hf_secret" not in b"".join(stored[1].values())


def test_only_what_a_run_needs_is_fetched_and_once(pushed: Hub) -> None:
    folder = local_folder("hf:me/blocks")
    assert not (folder / "train").exists()
    assert not list(folder.rglob(".*"))
    assert not any(p.is_symlink() for p in folder.rglob("*"))
    before = len([path for path in pushed.asked if "/resolve/" in path])
    assert local_folder("hf:me/blocks") == folder
    assert len([path for path in pushed.asked if "/resolve/" in path]) == before


def test_pulled_it_verifies_and_is_the_same(pushed: Hub, bundles, tmp_path: Path) -> None:
    folder = tmp_path / "model.dblocks"
    assert command("pull", "hf:me/blocks", folder) == 0
    got, own = contents(folder), contents(bundles["frozen"][1])
    assert got.keys() == own.keys()
    assert {name for name in own if got[name] != own[name]} <= {"report.html"}  # which is written anew
    assert command("verify", folder) == 0
    assert command("verify", "hf:me/blocks") == 0
    assert command("pull", "hf:me/blocks", folder) == 2
    assert command("pull", "hf:me/blocks", folder, "--force") == 0
    assert not list(tmp_path.glob(".*"))
    assert command("report", "hf:me/blocks") == 2
    assert command("report", "hf:me/blocks", "--out", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").is_file()


def test_the_page_of_a_repository_is_not_taken(pushed: Hub, tmp_path: Path) -> None:
    at = pushed.files("me/blocks", "main")
    assert at is not None
    assert b"<h1>" in at[1]["report.html"]
    at[1]["report.html"] = b"<script>evil()</script>"
    assert command("pull", "hf:me/blocks", tmp_path / "pulled.dblocks") == 0
    shown = (tmp_path / "pulled.dblocks" / "report.html").read_text()
    assert "<h1>pulled.dblocks" in shown
    assert "evil" not in shown
    assert not (local_folder("hf:me/blocks") / "report.html").exists()


def test_pulling_needs_neither_torch_nor_onnx(pushed: Hub, tmp_path: Path) -> None:
    words = f"""
import sys
sys.modules |= dict.fromkeys(("torch", "onnx", "onnxscript", "jinja2"))
from diffusionblocks.converter.cli import main
main(["pull", "hf:me/blocks", {str(tmp_path / "b")!r}])
"""
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Without report.html" in done.stderr
    assert manifest.read(tmp_path / "b").context == "frozen"


def test_without_training_it_still_verifies(server: Hub, bundles, tmp_path: Path) -> None:
    folder = shutil.copytree(bundles["stem"][1], tmp_path / "own")
    said = json.loads((folder / "manifest.json").read_text())
    (folder / "train").mkdir(exist_ok=True)
    (folder / "train" / "recipe.json").write_text("{}")
    said["files"]["train/recipe.json"] = {"sha256": hashlib.sha256(b"{}").hexdigest(), "bytes": 2}
    (folder / "manifest.json").write_text(json.dumps(said))
    assert command("push", folder, "me/deploy", "--without-training", "--message", "first") == 0
    assert command("pull", "hf:me/deploy", tmp_path / "b") == 0
    assert not (tmp_path / "b" / "train").exists()
    assert command("verify", tmp_path / "b") == 0


def test_its_card_says_what_it_is(pushed: Hub, bundles) -> None:
    stored = pushed.files("me/blocks", "main")
    assert stored is not None
    card = stored[1]["README.md"].decode()
    assert card.startswith("---\nlibrary_name: diffusionblocks\n")
    assert "dbconvert run hf:me/blocks --input x.npy" in card
    assert 'with open_bundle("hf:me/blocks") as bundle:\n    y = bundle.run(x)' in card
    assert "https://" not in card
    for block in manifest.read(bundles["frozen"][1]).blocks:
        assert f"| {block.index} | {len(block.units)} | {block.parameters:,} |" in card
    assert not (bundles["frozen"][1] / "README.md").exists()


@pytest.mark.parametrize(
    ("licence", "lines"),
    [
        ("Apache-2.0", ["license: apache-2.0"]),
        ("My Own: Licence\nlicense: x", ["license: other", 'license_name: "my-own-licence-license-x"']),
        (None, []),
    ],
)
def test_the_hub_takes_the_card_of_every_licence(
    server: Hub, bundles, tmp_path: Path, licence: str | None, lines: list[str]
) -> None:
    folder = shutil.copytree(bundles["stem"][1], tmp_path / "own")
    said = json.loads((folder / "manifest.json").read_text())
    said["source"]["licence"] = licence
    (folder / "manifest.json").write_text(json.dumps(said))
    assert command("push", folder, "me/own") == 0
    stored = server.files("me/own", "main")
    assert stored is not None
    head = stored[1]["README.md"].decode().split("---\n")[1]
    assert [line for line in head.splitlines() if line.startswith("license")] == lines


def test_a_card_of_ones_own_is_kept(server: Hub, bundles, tmp_path: Path) -> None:
    folder = shutil.copytree(bundles["stem"][1], tmp_path / "own")
    (folder / "README.md").write_text("mine")
    (folder / "train" / "run").mkdir(parents=True, exist_ok=True)
    (folder / "train" / "run" / "state.bin").write_text("under way")
    assert command("push", folder, "me/own") == 0
    stored = server.files("me/own", "main")
    assert stored is not None
    assert stored[1]["README.md"] == b"mine"
    assert "train/run/state.bin" not in stored[1]


def test_offline_what_was_fetched_is_used(pushed: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(hub.log, "warning", lambda text, *args: said.append(text % args))
    folder = local_folder("hf:me/blocks")
    sha = pushed.branches["me/blocks"]["main"]
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert local_folder("hf:me/blocks") == folder
    assert said == ["no connection to the hub: me/blocks is taken as it was fetched before"]
    assert local_folder(f"hf:me/blocks@{sha}") == folder
    with pytest.raises(BadInput, match=r"cannot be reached for me/other, and it was not fetched"):
        local_folder("hf:me/other")


def test_offline_by_the_variable_of_the_hub(pushed: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_folder("hf:me/blocks")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(pushed.asked)
    assert local_folder("hf:me/blocks") == folder
    with pytest.raises(BadInput, match="only what a run needs of it was fetched") as refused:
        local_folder("hf:me/blocks", training=True)
    assert "HF_HUB_OFFLINE" in str(refused.value.hint)
    assert len(pushed.asked) == before


def test_offline_the_last_whole_one_is_used(pushed: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = local_folder("hf:me/blocks")
    at = pushed.files("me/blocks", "main")
    assert at is not None
    pushed.put("me/blocks", {**at[1], "README.md": b"new"})
    pushed.cut = "stem.bin"
    with pytest.raises(BadInput, match="cannot be fetched"):
        local_folder("hf:me/blocks")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local_folder("hf:me/blocks") == folder


def test_a_newer_commit_is_another_folder(pushed: Hub) -> None:
    first = local_folder("hf:me/blocks")
    at = pushed.files("me/blocks", "main")
    assert at is not None
    old = pushed.branches["me/blocks"]["main"]
    pushed.put("me/blocks", {**at[1], "README.md": b"new"})
    second = local_folder("hf:me/blocks")
    assert second != first
    assert local_folder(f"hf:me/blocks@{old}") == first


def test_a_branch(server: Hub, bundles) -> None:
    assert command("push", bundles["frozen"][1], "me/blocks") == 0
    assert command("push", bundles["carry"][1], "hf:me/blocks", "--revision", "trial") == 0
    assert manifest.read(local_folder("hf:me/blocks@trial")).context == "carry"
    assert manifest.read(local_folder("hf:me/blocks")).context == "frozen"


class TestRefused:
    @pytest.mark.parametrize(
        "name", ["hf:", "hf:a", "hf:a/b/c", "hf:../b", "hf:a/b@", "hf:a/..", "hf:a/b@../x", "hf:a/b c"]
    )
    def test_names_that_are_none(self, name: str) -> None:
        with pytest.raises(BadInput, match="no name of a bundle"):
            parsed(name)

    @pytest.mark.parametrize(
        ("name", "words"), [("hf:me/none", "is not there"), ("hf:me/blocks@none", "no revision 'none'")]
    )
    def test_what_is_not_there(self, pushed: Hub, name: str, words: str, capsys) -> None:
        assert command("verify", name) == 2
        said = capsys.readouterr().err
        assert words in said
        assert "Traceback" not in said

    @pytest.mark.parametrize(
        ("closed", "words"),
        [
            ((401, "RepoNotFound"), "not there, or not for you"),
            ((401, ""), "refuses"),
            ((403, ""), "refuses"),
            ((403, "GatedRepo"), "is gated"),
        ],
    )
    def test_what_is_not_for_you(self, pushed: Hub, closed: tuple[int, str], words: str, capsys) -> None:
        pushed.closed = closed
        assert command("verify", "hf:me/blocks") == 2
        said = capsys.readouterr().err
        assert words in said
        assert "log in" in said
        assert "hf_secret" not in said
        assert "Traceback" not in said

    def test_what_is_no_bundle(self, server: Hub) -> None:
        server.put("me/model", {f"{name}.json": b"{}" for name in "abcde"})
        with pytest.raises(BundleError, match=r"no bundle: .* a\.json, b\.json, c\.json and 2 more"):
            local_folder("hf:me/model")

    def test_a_disk_that_is_full(self, pushed: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any, **kinds: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(hub.hub(), "snapshot_download", full)
        with pytest.raises(BadInput, match="No space left") as refused:
            local_folder("hf:me/blocks")
        assert "Free some space" in str(refused.value.hint)
        assert not list((tmp_path / "cache" / "hub" / "me--blocks").iterdir())

    def test_a_file_that_was_altered(self, pushed: Hub, digits) -> None:
        at = pushed.files("me/blocks", "main")
        assert at is not None
        content = at[1]["block_00.bin"]
        at[1]["block_00.bin"] = content[:100] + bytes([content[100] ^ 1]) + content[101:]
        with open_bundle("hf:me/blocks") as bundle, pytest.raises(BundleError, match=r"block_00\.bin"):
            bundle.run(digits[0][:1], mode="exact")

    def test_a_file_that_is_missing(self, pushed: Hub) -> None:
        at = pushed.files("me/blocks", "main")
        assert at is not None
        del at[1]["stem.bin"]
        with pytest.raises(BundleError, match=r"lacks stem\.bin"):
            local_folder("hf:me/blocks")

    def test_names_that_leave_the_folder(self, pushed: Hub, tmp_path: Path) -> None:
        at = pushed.files("me/blocks", "main")
        assert at is not None
        said = json.loads(at[1]["manifest.json"])
        said["files"]["../evil"] = said["files"]["stem.bin"]
        at[1]["manifest.json"], at[1]["../evil"] = json.dumps(said).encode(), b"evil"
        with pytest.raises(BundleError, match="evil"):
            local_folder("hf:me/blocks")
        assert not list(tmp_path.rglob("evil"))

    def test_a_listing_that_leaves_the_folder(self, pushed: Hub, tmp_path: Path) -> None:
        at = pushed.files("me/blocks", "main")
        assert at is not None
        at[1].update({"../evil": b"evil", "a/../../evil": b"evil", "/evil": b"evil", "more.bin": b"evil"})
        folder = local_folder("hf:me/blocks", training=True)
        assert set(contents(folder)) == {*manifest.read(folder).files, "manifest.json"}
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == b"evil"]
        assert not [path for path in pushed.asked if "evil" in path]

    def test_half_a_download_is_none(self, pushed: Hub, tmp_path: Path) -> None:
        pushed.cut = "block_01.bin"
        with pytest.raises(BadInput, match="cannot be fetched"):
            local_folder("hf:me/blocks")
        place = tmp_path / "cache" / "hub" / "me--blocks"
        assert not list(place.iterdir())
        pushed.cut = None
        assert (local_folder("hf:me/blocks") / "block_01.bin").is_file()

    def test_what_a_killed_download_left_is_removed(self, pushed: Hub, tmp_path: Path) -> None:
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        place = tmp_path / "cache" / "hub" / "me--blocks"
        left = place / f".{socket.gethostname()}_{ended.pid}.x"
        other = place / f".elsewhere_{ended.pid}.x"
        for folder in (left, other):
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text("{")
        with open_bundle("hf:me/blocks") as bundle:
            assert bundle.manifest.trained
        assert not left.exists()
        assert other.exists()

    def test_training_by_name(self, pushed: Hub, capsys) -> None:
        assert command("train", "hf:me/blocks", "--data", "x.npz") == 2
        assert "dbconvert pull hf:me/blocks" in capsys.readouterr().err

    def test_a_damaged_bundle_is_not_pushed(self, server: Hub, bundles, tmp_path: Path, capsys) -> None:
        folder = shutil.copytree(bundles["frozen"][1], tmp_path / "b")
        with (folder / "stem.bin").open("r+b") as file:
            file.write(b"\xff\xff\xff")
        assert command("push", folder, "me/blocks") == 2
        assert "stem.bin" in capsys.readouterr().err
        assert "me/blocks" not in server.branches

    def test_without_a_token(self, server: Hub, bundles, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        assert command("push", bundles["frozen"][1], "me/blocks") == 2
        said = capsys.readouterr().err
        assert "log in" in said.lower()
        assert "hf_wrong" not in said

    def test_without_the_package(self, bundles, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
        monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
        assert command("push", bundles["frozen"][1], "me/blocks") == 2
        assert install("hub") in capsys.readouterr().err
        with pytest.raises(BadInput, match="huggingface_hub is not installed"):
            hub.hub()


def test_a_folder_is_itself(tmp_path: Path) -> None:
    assert local_folder(tmp_path) == tmp_path
    assert local_folder("some/folder") == Path("some/folder")
