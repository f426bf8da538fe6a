"""What the documentation says is true: its site builds without a dead link, and every command and every piece of Python it shows is run.

Commands run in the order of a page, in a folder that holds what the pages name (``model.pt``, ``images/``, ``GPT2_FOLDER``, ...), small. Training takes two updates in place of those shown.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusionblocks.converter
import diffusionblocks.export
import diffusionblocks.runtime
import numpy as np
import pytest
import torch
from diffusionblocks.converter.cli import main
from torch import nn

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))]
ELSEWHERE = {
    "python examples/": "tests/test_examples.py runs them",
    "python benchmarks/": "they take hours; their parts have tests of their own",
    "python3 -m venv": "CI makes the environment",
}
"""Beginnings of lines that are not run here, and why."""
BEFORE = {
    "dbconvert train elsewhere/model.dblocks": "copy model.dblocks elsewhere/model.dblocks",
    "dbconvert train model.dblocks --merge": "finish elsewhere/model.dblocks",
}
"""What is done by hand between two commands of a page."""
PREPARED = {
    "README.md": ["gpt2"],
    "docs/report.md": ["model"],
    "docs/howto-gpus.md": ["model"],
    "docs/bundle.md": ["model"],
    "docs/module.md": ["network"],
    "docs/hub.md": ["model"],
}
"""Bundles a page takes for granted."""


@dataclass(frozen=True)
class Shown:
    """A line of a command, or a block of Python, and where it stands."""

    page: str
    line: int
    kind: str
    text: str


def shown(page: str) -> Iterator[Shown]:
    """Commands and Python of a page, in order."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    fence, block, start = "", [], 0
    for number, line in enumerate(lines, 1):
        if line.startswith("```"):
            if fence == "python":
                yield Shown(page, start, "python", "\n".join(block))
            fence, block, start = (line[3:] or "text") if not fence else "", [], number
        elif fence:
            block.append(line)
        if (not fence and re.match(r" {4}\S", line)) or fence in ("bash", "sh", "console"):
            text = re.sub(r"\s+# .*$", "", line.strip())
            if re.match(r"(dbconvert|torchrun|python3?|eval) ", text):
                yield Shown(page, number, "command", text)


EVERY = [s for page in PAGES for s in shown(page)]


class Unit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Looped(nn.Module):
    """A language model whose unit is applied four times."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.unit, self.head = nn.Embedding(128, 16), Unit(16), nn.Linear(16, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for _ in range(4):
            x = self.unit(x)
        return self.head(x)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name, small."""
    import diffusers
    import timm
    import transformers

    folder = tmp_path_factory.mktemp("ground")
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    vit: Any = {"patch_size": 56, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 3}
    torch.save(timm.create_model("vit_tiny_patch16_224", **vit).eval(), folder / "model.pt")
    mine = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    torch.save(mine.state_dict(), folder / "my-model.pth")
    x = draw.normal(size=(12, 3, 224, 224)).astype(np.float32)
    np.savez(folder / "train.npz", x=x, y=np.arange(12) % 3)
    np.save(folder / "x.npy", x[:2])
    _pictures(folder / "images", draw, ("cat", "dog", "owl"))
    _pictures(folder / "unlabelled", draw, ("",))
    (folder / "elsewhere").mkdir()
    text = (ROOT / "docs" / "method.md").read_text("utf-8")
    for name in ("book.txt", "held-out.txt"):
        (folder / name).write_text(text.encode("ascii", "ignore").decode()[:3000])
    _tokenizer(folder / "tokenizer")
    gpt = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=128, n_positions=16, bos_token_id=0, eos_token_id=0)
    ).eval()  # fmt: skip
    gpt.save_pretrained(folder / "GPT2_FOLDER")
    shutil.copytree(folder / "tokenizer", folder / "GPT2_FOLDER", dirs_exist_ok=True)
    bert = transformers.BertForMaskedLM(
        transformers.BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16, vocab_size=128, max_position_embeddings=64)
    ).eval()  # fmt: skip
    _exported(_First(bert), torch.zeros(3, 64, dtype=torch.long), folder / "bert.pt2")
    _exported(Looped().eval(), torch.zeros(3, 16, dtype=torch.long), folder / "looped.pt2")
    units = nn.Sequential(nn.Linear(8, 16), *(Unit(16) for _ in range(4)), nn.LayerNorm(16)).eval()
    _exported(units, torch.zeros(3, 8), folder / "encoder.pt2")
    np.save(folder / "rows.npy", draw.normal(size=(24, 8)).astype(np.float32))
    dit = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=3, sample_size=8, num_embeds_ada_norm=10
    ).eval()  # fmt: skip
    dit.save_pretrained(folder / "PIPELINE_FOLDER" / "transformer")
    diffusers.DDIMScheduler().save_pretrained(folder / "PIPELINE_FOLDER" / "scheduler")
    (folder / "PIPELINE_FOLDER" / "model_index.json").write_text(
        '{"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"], "scheduler": ["diffusers", "DDIMScheduler"]}'
    )
    (folder / "llama-7b").mkdir()
    (folder / "llama-7b" / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4,'
        '"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 4096, "tie_word_embeddings": false}'
    )
    np.savez(folder / "classes.npz", class_labels=np.arange(3))
    latents = draw.normal(size=(12, 4, 8, 8)).astype(np.float32)
    np.savez(folder / "latents.npz", x=latents, y=np.arange(12) % 10)
    return folder


class _First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids)[0]
        return logits


def _exported(model: nn.Module, example: torch.Tensor, path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=4096)
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False), path)


def _pictures(folder: Path, draw: np.random.Generator, classes: tuple[str, ...]) -> None:
    from PIL import Image

    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(draw.integers(0, 255, (32, 32, 3), np.uint8)).save(folder / name / f"{i}.png")


def _tokenizer(folder: Path) -> None:
    """A token a letter; [MASK] is 103."""
    import transformers
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    letters = [chr(i) for i in range(128)]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    del vocabulary["g"]
    vocabulary |= {"[MASK]": 103}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="\x01"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, mask_token="[MASK]", eos_token="\x00", unk_token="\x01", pad_token="\x02"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def stock(ground: Path) -> Path:
    """Bundles that pages take for granted, made once."""
    folder = ground.parent / "stock"
    folder.mkdir(exist_ok=True)
    command(ground, f"dbconvert model.pt --input-shape 3x224x224 --out {folder / 'model.dblocks'} -q")
    command(ground, f"dbconvert transformers:GPT2_FOLDER --task lm --out {folder / 'gpt2.dblocks'} -q")
    return folder


def command(folder: Path, line: str) -> None:
    """Run a line as the shell would, in ``folder``; it must end with 0."""
    words = shlex.split(line)
    if words[0] == "eval":
        inner = re.fullmatch(r"\$\((.*)\)", words[1])
        assert inner is not None
        words = shlex.split(inner[1])
    if words[0] == "torchrun":
        program = [sys.executable, "-m", "torch.distributed.run", *short(words[1:])]
        bin_folder = str(Path(sys.executable).parent)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return
    assert words[0] == "dbconvert"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as ended:
            main(short(words[1:]))
    assert not ended.value.code, line


def short(words: list[str]) -> list[str]:
    """The same command with two updates in place of those it has."""
    trains = "train" in words and "--merge" not in words
    converts = "--data" in words and not {"train", "score"} & set(words)
    if not (trains or converts):
        return words
    if "--steps" in words:
        words = [w for i, w in enumerate(words) if w != "--steps" and (i == 0 or words[i - 1] != "--steps")]
    if "--validate-every" in words:
        place = words.index("--validate-every")
        words = [*words[: place + 1], "1", *words[place + 2 :]]
    return [*words, "--steps", "2", "--batch-size", "4"]


@pytest.mark.parametrize("page", [p for p in PAGES if any(s.page == p for s in EVERY)])
def test_what_a_page_shows_runs(
    page: str, ground: Path, stock: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    if any(s.page == page and re.search(r"dbconvert push|hf:", s.text) for s in EVERY):
        _hub(monkeypatch, tmp_path)
    place = tmp_path / "place"
    shutil.copytree(ground, place)
    needed = PREPARED.get(page, [])
    for name in ("model", "gpt2"):
        if name in needed:
            shutil.copytree(stock / f"{name}.dblocks", place / f"{name}.dblocks")
    names: dict[str, Any] = {}
    if any(s.kind == "python" for s in shown(page)):
        names = _names(place, needed)
    for one in shown(page):
        where = f"{one.page}:{one.line}: {one.text}"
        if one.kind == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(place)
                exec(compile(_short_python(one.text), where, "exec"), names)
            continue
        if one.text.startswith(tuple(ELSEWHERE)):
            continue
        _by_hand(place, next((what for start, what in BEFORE.items() if one.text.startswith(start)), ""))
        try:
            command(place, one.text)
        except (AssertionError, Exception) as error:
            raise AssertionError(f"{where}\n{capsys.readouterr().err[-3000:]}") from error
        for out in re.findall(r"--out(?:put)? (\S+)", one.text):
            assert (place / out).exists(), where


def _hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub of this machine, as tests/test_hub.py has it."""
    import huggingface_hub.constants

    spec = importlib.util.spec_from_file_location("test_hub", Path(__file__).with_name("test_hub.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("HF_ENDPOINT", module.Hub().url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("DIFFUSIONBLOCKS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


def _names(place: Path, needed: list[str]) -> dict[str, Any]:
    """What a page's Python takes for granted."""
    from diffusionblocks.converter import convert

    model = torch.load(place / "model.pt", weights_only=False)
    with np.load(place / "train.npz") as data:
        names: dict[str, Any] = {"model": model, "images": data["x"], "labels": data["y"], "x": data["x"][:2]}
    if "network" in needed:
        names["network"] = convert(model, input_shape=(3, 224, 224), num_blocks=2, context="stem")
        names["x"] = torch.from_numpy(names["x"])
        names |= {"z": torch.randn(2, *names["network"].target.shape), "sigma": torch.full((2,), 0.5)}
    return names


def _short_python(text: str) -> str:
    return re.sub(r"steps=\d{3,}", "steps=2, batch_size=4", text).replace('device="cuda"', 'device="cpu"')


def _by_hand(place: Path, what: str) -> None:
    if what.startswith("copy"):
        _, source, target = what.split()
        shutil.copytree(place / source, place / target)
    elif what.startswith("finish"):
        other = place / what.split()[1]
        if not other.exists():  # the page only names it: another machine trained there
            shutil.copytree(place / "model.dblocks", other)
            command(place, f"dbconvert train {what.split()[1]} --data images/ --blocks 1 -q")


def test_nothing_is_left_out_without_a_reason() -> None:
    lines = [s.text for s in EVERY if s.kind == "command"]
    assert len(lines) > 60
    for start in ELSEWHERE:
        assert any(line.startswith(start) for line in lines), f"{start} is shown nowhere any more"
    for start in BEFORE:
        assert any(line.startswith(start) for line in lines), f"{start} is shown nowhere any more"
    allowed = ("dbconvert ", "torchrun ", "eval ", *ELSEWHERE)
    assert not [line for line in lines if not line.startswith(allowed)]


def test_every_command_has_an_example_in_its_help() -> None:
    from diffusionblocks.converter.cli import cli

    for name, own in cli.commands.items():
        assert re.search(rf"Examples?:(.|\n)*dbconvert {name}\b", own.help or ""), name


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for room in ("converter", "export", "runtime"):  # where mkdocstrings reads the code
        link = ROOT / "build" / "links" / "diffusionblocks" / room
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(ROOT / room)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {
        p.relative_to(tmp_path / "site").as_posix(): p.read_text("utf-8") for p in (tmp_path / "site").rglob("*.html")
    }
    assert "dbconvert report" in pages["commands.html"]
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"(https?:|//)", text)
        loaded += re.findall(r"<link[^>]*rel=\"stylesheet\"[^>]*href=\"(https?:|//)", text)
        assert not loaded, name  # nothing from elsewhere
    for room in (diffusionblocks.converter, diffusionblocks.export, diffusionblocks.runtime):
        for public in room.__all__:
            assert re.search(rf"id=\"[\w.]*\.{public}\"", pages["classes.html"]), public


def test_public_names_say_what_they_take_and_raise() -> None:
    for room in (diffusionblocks.converter, diffusionblocks.export, diffusionblocks.runtime):
        for name in room.__all__:
            own = getattr(room, name)
            text = inspect.getdoc(own) or ""
            assert len(text) > 20, name
            if inspect.isfunction(own) and "raise " in inspect.getsource(own):
                assert "Raises:" in text, name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """As GitHub shows the pages, beside the site."""
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), target
        if anchor and found.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.MULTILINE)
            assert (
                anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
                or "classes.md" in target
            )


def test_pictures_are_those_of_the_script(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs" / "pictures.py", tmp_path / "pictures.py")
    subprocess.run([sys.executable, "pictures.py"], cwd=tmp_path, check=True)
    made = {p.name: p.read_text() for p in (tmp_path / "pictures").glob("*.svg")}
    assert made == {p.name: p.read_text() for p in (ROOT / "docs" / "pictures").glob("*.svg")}
