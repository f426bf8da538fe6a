"""What people and programs see: help with examples that parse, quiet, JSON, colours, completion, and a command that starts fast."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.shell_completion import BashComplete
from diffusionblocks.converter.cli import cli, main
from diffusionblocks.converter.completion_cli import VARIABLE
from diffusionblocks.runtime import open_bundle
from torch import nn

COMMANDS = sorted(cli.commands)


def called(*arguments: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == code


def examples(command: click.Command) -> list[str]:
    """The command lines in a command's help."""
    found = (line.strip().removeprefix("Example: ") for line in (command.help or "").splitlines())
    return [line for line in found if re.match(r"(eval .*)?(torchrun .*)?\W*dbconvert ", line)]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_whose_options_parse(name: str):
    command = cli.commands[name]
    lines = examples(command)
    assert lines, f"{name} has no example"
    for line in lines:
        for part in re.split(r"&&|\s#|[|>]", line.removeprefix('eval "$(').replace(')"', "")):
            words = shlex.split(part)
            if "dbconvert" not in words:
                continue
            arguments = words[words.index("dbconvert") + 1 :]
            with click.Context(cli) as group:
                chosen, found, rest = cli.resolve_command(
                    group, arguments if arguments[0] in COMMANDS else ["convert", *arguments]
                )
            assert found is not None
            for option in found.params:  # that a file is there is not asked
                if isinstance(option.type, click.Path):
                    option.type.exists = False
            found.make_context(chosen, list(rest))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_says_what_it_is(name: str):
    for option in cli.commands[name].params:
        if isinstance(option, click.Option):
            told = option.help or option.show_default or isinstance(option.type, click.Choice)
            assert told, f"{name} {option.opts[0]}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(self.norm(x))

    torch.manual_seed(0)
    network = nn.Sequential(Unit(), Unit(), nn.Linear(8, 3)).eval()
    folder = tmp_path_factory.mktemp("model")
    program = torch.export.export(network, (torch.randn(3, 8),), dynamic_shapes=({0: torch.export.Dim("n")},))
    torch.export.save(program, folder / "model.pt2")
    x = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    np.savez(folder / "train.npz", x=x, y=np.arange(40) % 3)
    np.save(folder / "x.npy", x)
    return folder


@pytest.mark.road
def test_quiet_and_json(model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """With --quiet nothing is on the error stream; with --json one object is on the other."""
    monkeypatch.chdir(model)
    called("model.pt2", "-B", "2", "--out", "loud")
    said = capsys.readouterr()
    assert not said.out
    assert "Wrote loud" in said.err
    called("convert", "model.pt2", "-B", "2", "--out", "b", "-q", "--json")
    said = capsys.readouterr()
    assert not said.err
    made = json.loads(said.out)
    assert made["bundle"] == "b"
    assert made["trained"] is False
    assert [b["index"] for b in made["blocks"]] == [0, 1]
    assert all(c["ok"] for c in made["checks"])
    called("-q", "train", "b", "--data", "train.npz", "--steps", "2", "--json")
    said = capsys.readouterr()
    assert not said.err
    trained = json.loads(said.out)
    assert trained["trained"] is True
    assert {c["name"] for c in trained["checks"]} >= {"exact.output", "denoise"}
    called("run", "b", "--input", "x.npy", "--output", "y.npy", "--mode", "exact", "--json", "--quiet")
    said = capsys.readouterr()
    assert not said.err
    run = json.loads(said.out)
    assert run["shape"] == [40, 3]
    assert run["output"] == "y.npy"
    with open_bundle("b") as bundle:
        assert np.allclose(np.load("y.npy"), bundle.run(np.load("x.npy"), "exact"), atol=1e-6)
    called("run", "b", "--input", "none.npy", "--output", "y.npy", "--quiet", code=2)
    assert "none.npy" in capsys.readouterr().err  # errors are said all the same
    for command in (["inspect", "model.pt2", "-B", "2", "-q", "--json"], ["verify", "b", "-q", "--json"]):
        called(*command)
        said = capsys.readouterr()
        assert not said.err
        json.loads(said.out)
    called("inspect", "model.pt2", "-B", "2", "-q")
    assert not capsys.readouterr().err


def shown(model: Path, **environment: str) -> str:
    """What a process whose streams are pipes writes while it converts."""
    clean = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    made = subprocess.run(
        [sys.executable, "-m", "diffusionblocks.converter", "inspect", "model.pt2", "-B", "2"],
        cwd=model,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert not made.stdout
    return made.stderr


@pytest.mark.road
def test_colours_are_for_terminals_that_want_them(model: Path):
    assert "\x1b" not in shown(model)
    assert "\x1b[" in shown(model, FORCE_COLOR="1")
    assert "\x1b[3" not in shown(model, FORCE_COLOR="1", NO_COLOR="1")  # no colour; bold may stay


def completed(words: list[str], incomplete: str) -> list[Any]:
    return BashComplete(cli, {}, "dbconvert", VARIABLE).get_completions(words, incomplete)


def test_completion():
    assert {"run", "report"} & {c.value for c in completed([], "r")} >= {"run"}
    assert [c.value for c in completed(["run", "b"], "--mem")] == ["--memory-budget"]
    assert [c.value for c in completed(["model.pt"], "--scra")] == [
        "--scratch"
    ]  # MODEL in a command's place is convert
    assert [c.value for c in completed(["run", "b", "--mode"], "")] == ["exact", "denoise"]
    assert [(c.type, c.value) for c in completed([], "mod")] == [("file", "mod")]
    assert [c.type for c in completed(["verify"], "")] == ["file"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell(shell: str, capsys: pytest.CaptureFixture[str]):
    called("completion", shell)
    script = capsys.readouterr().out
    assert f"{VARIABLE}={shell}_complete" in script
    assert "dbconvert" in script
    called("completion", "sh", code=2)


def test_the_script_asks_the_command_itself():
    """As a shell does: the words in the environment, the answers on the output."""
    environment = {**os.environ, VARIABLE: "bash_complete", "COMP_WORDS": "dbconvert ver", "COMP_CWORD": "1"}
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.argv[0] = 'dbconvert'; from diffusionblocks.converter.cli import main; main()",
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert made.stdout == "plain,verify\n"


def test_the_command_starts_without_the_heavy_packages():
    program = (
        "import sys; import diffusionblocks.converter.cli;"
        "print(*sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'onnx', 'onnxscript', 'onnxruntime', 'transformers', 'timm', 'matplotlib'}))"
    )
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert made.stdout.strip() == ""
