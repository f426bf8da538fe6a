"""Example inputs that do not fit and models that hold for one batch alone: exit code 2, the argument's name and the way out, no traceback."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from diffusionblocks.converter import cli
from diffusionblocks.converter.capture import capture
from diffusionblocks.runtime import BadInput
from torch import nn


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layer(self.norm(x))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.units, self.head = nn.Linear(8, 16), nn.Sequential(Unit(), Unit()), nn.Linear(16, 5)


class Two(Trunk):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 16)

    def forward(self, values: torch.Tensor, kinds: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = self.stem(values) + self.table(kinds)
        return self.head(self.units(x if scale is None else x * scale))


class OnlyFour(Trunk):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.head(self.units(self.stem(values.reshape(4, 8))))


class ThreeOrMore(Trunk):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        x = self.stem(values)
        return self.head(self.units(x + 1 if values.shape[0] > 2 else x))


class Even(Trunk):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        x = self.stem(values)
        return self.head(self.units(x if values.shape[0] % 2 else 2 * x))


class Constant(Trunk):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        rows = [self.stem(values[i]) / (1 + i) for i in range(int(values.shape[0]))]  # another graph for every batch
        return self.head(self.units(torch.stack(rows)))


class Harmless(Trunk):
    """Decides by the number of rows, but computes the same."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        x = self.stem(values)
        return self.head(self.units(x.contiguous() if values.shape[0] > 2 else x))


class Minus(Trunk):
    """An output that is not finite everywhere."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        x = self.head(self.units(self.stem(values)))
        return torch.where(torch.arange(5) > 3, -torch.inf, x)


MODELS = (Two, OnlyFour, ThreeOrMore, Even, Constant, Harmless, Minus)
F, K = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32), np.arange(3)


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that inspects a model on arrays and gives the exit code and what was said."""
    module = ModuleType("bad_examples")
    vars(module).update({m.__name__: m for m in MODELS})
    monkeypatch.setitem(sys.modules, "bad_examples", module)

    def run(model: str, example: Any = None, *options: str, command: tuple[str, ...] = ("inspect",)) -> tuple[Any, str]:
        if isinstance(example, dict):
            np.savez(tmp_path / "e.npz", **example)
        elif example is not None:
            np.save(tmp_path / "e.npy", example)
        given = (
            [] if example is None else ["--example", str(tmp_path / f"e.np{'z' if isinstance(example, dict) else 'y'}")]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, f"bad_examples:{model}", "--num-blocks", "2", *given, *options])
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return ended.value.code, said

    return run


REFUSED: dict[str, tuple[Any, list[str]]] = {
    "a wrong name": (
        {"value": F, "kinds": K},
        ["has value, which forward does not take, and lacks values", "Two takes values, kinds and may take scale"],
    ),
    "one missing": ({"values": F}, ["lacks kinds, which forward needs", "--example FILE.npz"]),
    "one too many": ({"values": F, "kinds": K, "more": F}, ["has more, which forward does not take"]),
    "one of two as .npy": (F, ["lacks kinds"]),
    "no arrays": ({}, ["lacks values, kinds"]),
    "batches that differ": ({"values": F, "kinds": np.arange(5)}, ["values has 3, kinds has 5 rows", "as many rows"]),
    "a batch of none": ({"values": F[:0], "kinds": K[:0]}, ["values has a batch of no rows"]),
    "no batch": ({"values": F, "kinds": np.int64(1)}, ["kinds has no batch dimension"]),
    "rank too low": ({"values": F[0, :3], "kinds": K}, ["values (3,) float32, kinds (3,) int64", "array of the shape"]),
    "a dimension missing": (
        {"values": F, "kinds": K, "scale": np.ones(3, "f")},
        ["It runs if scale has the shape (3, 1)"],
    ),
    "floats for integers": ({"values": F, "kinds": K.astype("f")}, ["It runs if kinds holds integers", "Change kinds"]),
    "integers for floats": ({"values": np.ones((3, 8), int), "kinds": K}, ["It runs if values is float32"]),
    "half precision": ({"values": F.astype(np.float16), "kinds": K}, ["It runs if values is float32"]),
    "integers out of range": ({"values": F, "kinds": K + 10}, ["It runs if kinds holds smaller integers"]),
    "another width": ({"values": F[:, :5], "kinds": K}, ["values (3, 5) float32", "of the shape and type it expects"]),
    "text": ({"values": F, "kinds": np.array(["a", "b", "c"])}, ["kinds in", "is an array of <U1"]),
    "NaN": ({"values": F * np.nan, "kinds": K}, ["values holds NaN"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_examples_that_do_not_fit(case: str, stopped: Any) -> None:
    example, said = REFUSED[case]
    code, error = stopped("Two", example)
    assert code == 2
    for part in said:
        assert part in " ".join(error.split())


def test_convert_refuses_them_too_and_writes_nothing(stopped: Any, tmp_path: Path) -> None:
    code, error = stopped("Two", {"values": F}, "--out", str(tmp_path / "b"), command=("convert",))
    assert code == 2
    assert "lacks kinds" in error
    assert not (tmp_path / "b").exists()


def test_a_shape_alone_for_two_inputs(stopped: Any) -> None:
    code, error = stopped("Two", None, "--input-shape", "8")
    assert code == 2
    assert "lacks kinds" in error


@pytest.mark.parametrize(
    "example", [{"values": F, "kinds": K}, {"x": F, "kinds": K}, {"values": F[:1], "kinds": K[:1]}]
)
def test_examples_that_fit(example: dict[str, Any], stopped: Any) -> None:
    """By name, with ``x`` for the first argument, and of one row."""
    code, error = stopped("Two", example)
    assert code == 0, error


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("OnlyFour", "It runs on 4 rows of values, but not on any number"),
        ("ThreeOrMore", "otherwise than one of 3: the graph would hold only where values.shape[0] > 2"),
        ("Even", "a batch of 2 otherwise than one of 3"),
        ("Constant", "the batch dimension of values became a constant"),
    ],
)
def test_models_that_hold_for_one_batch(model: str, said: str, stopped: Any) -> None:
    rows = F[:1].repeat(4 if model == "OnlyFour" else 3, 0)
    code, error = stopped(model, {"values": rows})
    assert code == 2
    assert said in " ".join(error.split())


@pytest.mark.parametrize("model", [Harmless(), Minus()])
def test_models_that_only_look_like_it(model: nn.Module) -> None:
    captured = capture(model.eval(), {"values": torch.from_numpy(F)})
    x = torch.randn(1, 8)
    with torch.no_grad():
        assert torch.equal(captured.graph(x)[0], model(x))


def test_positional_examples_are_checked() -> None:
    with pytest.raises(BadInput, match="has argument 3, which forward does not take"):
        capture(Two().eval(), (torch.from_numpy(F),) * 4)
    with pytest.raises(BadInput, match="values has 3, kinds has 2 rows"):
        capture(Two().eval(), (torch.from_numpy(F), torch.zeros(2, dtype=torch.long)))
