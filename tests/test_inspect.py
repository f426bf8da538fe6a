"""``dbconvert inspect``: the drawing, the object of ``--json`` and its schema, kinds of branches, and refusals stage by stage."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import timm
import torch
from diffusionblocks.converter import cli, convert
from diffusionblocks.converter.capture import capture
from diffusionblocks.converter.drawing import draw, folded
from diffusionblocks.converter.inspect import STAGES, Inspection, Request, inspect
from diffusionblocks.converter.kinds import KINDS, branch_kinds
from diffusionblocks.converter.residual import find_trunk
from diffusionblocks.converter.settings import Settings
from diffusionblocks.converter.source import Source
from rich.console import Console
from torch import nn
from torch.nn import functional as F

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "inspect.schema.json").read_text())
DIM = 16


class Residual(nn.Module):
    """``x + f(norm(x))``, with what ``f`` reads besides."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(DIM), inner

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return x + self.inner(self.norm(x), *others)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))


class Branch(nn.Module):
    """One linear layer on each side of ``function``, so that nothing but the operators between tells the kind."""

    def __init__(self, function: Callable[..., torch.Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        self.a, self.b = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return self.b(self.function(self.a(x), *self.parts, *others))


class Mixed(nn.Module):
    """Two streams that read each other, of which one ends early; a layer applied twice; a skip over it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side = nn.Linear(6, DIM), nn.Linear(6, DIM)
        self.ab, self.ba = (nn.ModuleList(nn.Linear(2 * DIM, DIM) for _ in range(2)) for _ in range(2))
        self.tied, self.last = Residual(mlp()), Residual(mlp())
        self.mix, self.head = nn.Linear(3 * DIM, DIM), nn.Linear(DIM, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.stem(x), self.side(x)
        for ab, ba in zip(self.ab, self.ba, strict=True):
            joint = torch.cat([a, b], -1)
            a, b = a + torch.tanh(ab(joint)), b + torch.tanh(ba(joint))
        early = a
        a = self.tied(self.tied(a))
        return self.head(self.last(self.mix(torch.cat([a, early, b], -1))).mean(1))


def _hugging(name: str) -> Request:
    import transformers
    from diffusionblocks.converter.hugging import example_of

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if name == "t5":
        sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
        config = transformers.T5Config(**sizes, use_cache=False, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(config)
    else:
        text = {**small, "vocab_size": 50, "max_position_embeddings": 32, "eos_token_id": 2, "bos_token_id": 1}
        vision = {**small, "image_size": 16, "patch_size": 8}
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = transformers.CLIPModel(config)
    model.eval()
    return Request(Source("spec", name, model, example=example_of(model)), example_of(model), None, Settings())


def _request(name: str) -> Request:
    torch.manual_seed(0)
    if name in ("t5", "clip"):
        return _hugging(name)
    if name == "vit":
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 8, "num_heads": 2, "num_classes": 10}
        model, shape, settings = timm.create_model("vit_tiny_patch16_224", **sizes), (3, 32, 32), Settings(num_blocks=2)
    elif name == "resnet":
        model, shape, settings = timm.create_model("resnet18", num_classes=10), (3, 32, 32), Settings(num_blocks=4)
    else:
        model, shape, settings = Mixed(), (4, 6), Settings(num_blocks=5)
    return Request(Source("spec", name, model.eval()), None, shape, settings)


@cache
def inspected(name: str) -> Inspection:
    return inspect(name, lambda: _request(name))


def drawn(data: dict[str, Any], width: int = 80) -> str:
    file = io.StringIO()
    draw(data, Console(file=file, width=width, highlight=False))
    return file.getvalue()


def validate(data: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(data)))


NAMES = ("vit", "resnet", "t5", "clip", "mixed")
SHOWN = {
    "vit": ["blocks.0.attn", "blocks.7.mlp", "z + attention(z)", "4 more like these: blocks.1.attn to blocks.2.mlp", "[batch, 5, 32]", "sigma"],
    "resnet": ["layer1.0", "layer4.1", "z + convolution(z)", "p(z) + convolution(z)", "[batch, 64, 8, 8]", "[batch, 512, 1, 1]", "sigma"],
    "t5": ["trunk encoder.block, 4 units", "trunk decoder.block, 6 units", "decoder.block.1.layer.1.EncDecAttention", "z + cross-attention(z)", "(earlier trunk)", "relative_attention_bias", "No noise intervals"],
    "clip": ["trunk vision_model.encoder.layers", "text_model.encoder.layers.1.mlp", "z + attention(z)", "[batch, 5, 16]", "[batch, 16, 16]"],
    "mixed": ["tied.inner", "from block 0", "(long skip)", "(stream beside)", "Beside the trunk: 2 units", "Shared by block 2 and block 3", "tied.inner.0.weight"],
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_drawing_names_units_kinds_shapes_and_what_crosses(name: str) -> None:
    found = inspected(name)
    assert found.error is None
    text = drawn(found.data)
    assert not [part for part in SHOWN[name] if part not in text], text
    assert all(f"block {b} " in text for b in range(len(found.data["blocks"])))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("width", [40, 64, 80, 120])
def test_the_drawing_fits_and_has_no_colour_where_it_is_piped(name: str, width: int) -> None:
    text = drawn(inspected(name).data, width)
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text


def test_the_drawing_is_ascii_where_the_console_is() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
    draw(inspected("t5").data, Console(file=file, width=60))
    file.flush()
    assert all(part in raw.getvalue() for part in (b"+- enc", b"# block 0", b"|  < side"))


@pytest.mark.parametrize("name", NAMES)
def test_the_object_fits_its_schema(name: str) -> None:
    data = inspected(name).data
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validate(data)
    assert [u["name"] for u in data["units"]] == [n for b in data["blocks"] for n in b["units"]]
    assert sum(s["units"] for s in data["stages"]) == len(data["units"])
    assert all((b["sigma"] is None) == (data["schedule"]["reason"] is not None) for b in data["blocks"])


def test_the_schema_is_strict() -> None:
    data = inspected("resnet").data
    for key in data:
        with pytest.raises(jsonschema.ValidationError):
            validate({k: v for k, v in data.items() if k != key})
    for damage in ({"schema": 2}, {"surprise": 1}, {"units": []}, {"units": [data["units"][0] | {"kind": "odd"}]}):
        with pytest.raises(jsonschema.ValidationError):
            validate(data | damage)
    assert SCHEMA["$defs"]["unit"]["properties"]["branch_kinds"]["items"]["enum"] == list(KINDS)
    assert SCHEMA["properties"]["error"]["properties"]["stage"]["enum"] == list(STAGES)


def test_it_is_deterministic() -> None:
    assert json.dumps(inspect("mixed", lambda: _request("mixed")).data) == json.dumps(inspected("mixed").data)


def test_blocks_and_side_inputs_are_those_of_the_conversion() -> None:
    request, data = _request("mixed"), inspected("mixed").data
    shape, blocks = request.input_shape, request.settings.num_blocks
    network = convert(request.source.model, request.example, input_shape=shape, num_blocks=blocks)
    for block, context in zip(data["blocks"], network.contexts, strict=True):
        assert tuple(block["side_inputs"]) == network.input_names_of(context)[1:]
        assert block["parameters"] == sum(p.numel() for p in context.module.parameters())
    assert {v["name"] for v in data["side_values"]} >= set(data["side_inputs"])
    assert data["schedule"]["edges"] == (list(network.edges) or None)


def test_stages_of_a_resnet_and_shares_of_a_network() -> None:
    data = inspected("resnet").data
    assert [(s["units"], s["shape"][1:]) for s in data["stages"]] == [
        (2, [64, 8, 8]),
        (2, [128, 4, 4]),
        (2, [256, 2, 2]),
        (2, [512, 1, 1]),
    ]
    shares = [b["share"] for b in data["blocks"]] + [piece["share"] for piece in data["outside"].values()]
    assert sum(shares) == pytest.approx(1)
    assert all(b["bytes"] == 4 * b["parameters"] for b in data["blocks"])


def _heads(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def _attention(q: torch.Tensor, k: torch.Tensor | None = None) -> torch.Tensor:
    k = q if k is None else k
    return (q @ k.transpose(1, 2)).softmax(-1) @ k


def _experts(x: torch.Tensor, gate: nn.Module, up: nn.Module) -> torch.Tensor:
    weights, chosen = gate(x).softmax(-1).topk(2, -1)
    outputs = torch.stack([up(x), x, 2 * x, -x], 2)
    return (weights[..., None] * outputs.gather(2, chosen[..., None].expand(-1, -1, -1, DIM))).sum(2)


def _recurrence(x: torch.Tensor) -> torch.Tensor:
    states = [x[:, 0]]
    for t in range(1, x.shape[1]):
        states.append(torch.sigmoid(x[:, t]) * states[-1] + x[:, t])
    return torch.stack(states, 1)


def _channels_first(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, *parts: (parts[0] if parts else function)(x.transpose(1, 2)).transpose(1, 2)


class Bare(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


BRANCHES = {
    "fused attention": (lambda: Branch(lambda x: F.scaled_dot_product_attention(*(_heads(x),) * 3).transpose(1, 2).flatten(2)), "attention"),
    "attention by hand": (lambda: Branch(_attention), "attention"),
    "linear attention": (lambda: Branch(lambda x: F.relu(x) @ (F.relu(x).transpose(1, 2) @ x)), "attention"),
    "torch's attention": (lambda: Branch(lambda x, part: part(x, x, x, need_weights=False)[0], nn.MultiheadAttention(DIM, 2, batch_first=True)), "attention"),
    "one product": (lambda: Branch(lambda x: x @ (x.transpose(1, 2) @ x).softmax(-1)), "attention"),
    "a product alone": (lambda: Branch(lambda x: x @ torch.ones(DIM, DIM)), "mlp"),
    "experts": (lambda: Branch(_experts, nn.Linear(DIM, 4), nn.Linear(DIM, DIM)), "experts"),
    "a cumulative sum": (lambda: Branch(lambda x: x.cumsum(1)), "recurrent"),
    "a recurrence step by step": (lambda: Branch(_recurrence), "recurrent"),
    "a polynomial": (lambda: Branch(lambda x: ((x * 0.5 + 1) * x + 1) * x + 1), "mlp"),
    "a recurrent layer": (lambda: Branch(lambda x, part: part(x)[0], nn.GRU(DIM, DIM, batch_first=True)), "recurrent"),
    "a Fourier transform": (lambda: Branch(lambda x: torch.fft.fft(x, dim=1).real), "fourier"),
    "a convolution": (lambda: Branch(_channels_first(lambda x: x), nn.Conv1d(DIM, DIM, 3, padding=1)), "convolution"),
    "a convolution by a kernel of one": (lambda: Branch(_channels_first(lambda x: x), nn.Conv1d(DIM, DIM, 1)), "mlp"),
    "linear layers": (mlp, "mlp"),
    "a pooling": (lambda: nn.AvgPool2d(3, 1, 1), "pooling"),
    "a norm": (nn.Identity, "norm"),
    "a function of a norm": (Bare, "norm"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The tensor attributes")
@pytest.mark.parametrize("case", BRANCHES)
def test_kinds_come_from_operators(case: str) -> None:
    build, kind = BRANCHES[case]
    found = find_trunk(capture(Residual(build()).eval(), input_shape=(5, DIM)).graph)
    assert [branch_kinds(found.view, unit) for unit in found.trunk] == [(kind,)]


def test_attention_to_something_else_is_cross_attention() -> None:
    example = {"x": torch.randn(3, 5, DIM), "memory": torch.randn(3, 4, DIM)}

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hand, self.fused = Residual(Branch(_attention)), Residual(Branch(F.scaled_dot_product_attention))

        def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
            return self.fused(self.hand(x, memory), memory, memory)

    found = find_trunk(capture(Reader().eval(), example).graph)
    assert [branch_kinds(found.view, unit) for unit in found.trunk] == [("cross-attention",)] * 2


def _rows(*names: str) -> list[Any]:
    common = {"kind": "identity", "branch_kinds": ["mlp"], "fork_shape": ["batch", 4], "shape": ["batch", 4]}
    rows = folded([{"name": name, "parameters": 1, **common} for name in names])
    return [row if isinstance(row, str) else row["name"] for row in rows]


def test_runs_of_equal_units_are_folded() -> None:
    assert _rows("a.0", "a.1", "a.2", "a.3") == ["a.0", "a.1", "a.2", "a.3"]
    assert _rows(*(f"a.{i}" for i in range(6))) == ["a.0", "4 more like this one: a.1 to a.4", "a.5"]
    pairs = [f"{i}.{kind}" for i in range(4) for kind in "xy"]
    assert _rows("in", *pairs, "out") == ["in", "0.x", "0.y", "4 more like these: 1.x to 2.y", "3.x", "3.y", "out"]


# --- refusals, through the command ---

CODE = """
import torch
from torch import nn

class Picky(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1
        return x - 1

def branching():
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(Picky()))

def chain():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 5))

class Highway(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        gate = self.gate(x).sigmoid()
        return x * (1 - gate) + gate * self.value(x)

def highway():
    return nn.Sequential(Highway(), Highway())

class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.f(x)

def short():
    return nn.Sequential(Unit(), Unit())
"""


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run ``dbconvert inspect`` on a factory of CODE; returns (exit code, stdout, stderr)."""
    (tmp_path / "inspected_nets.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["inspect", *args])
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return run


REFUSED = {
    "missing.pt": ([], "load", "does not exist", []),
    "inspected_nets:nothing": ([], "load", "cannot be imported", []),
    "inspected_nets:branching": (["--input-shape", "8"], "capture", "cannot be captured", ["in 1.0 (Picky)", "line 7", "if x.sum() > 0:", "layers: 1 x Linear"]),
    "inspected_nets:chain": (["--input-shape", "3x6x6"], "find", "no chain of residual units", ["operators: 2 x conv2d", "0 residual units of 0 additions"]),
    "inspected_nets:highway": (["--input-shape", "8"], "find", "no chain of residual units", ["2 additions refused", "do not fork", "add in 0, add_1 in 1", "let its skip be the fork itself"]),
    "inspected_nets:short": (["--input-shape", "8"], "partition", "3 blocks were asked for, but the trunk has 2", ["0.f", "1.f", "z + mlp(z)"]),
}  # fmt: skip


@pytest.mark.parametrize("model", REFUSED)
def test_a_refusal_says_what_was_found_and_where_it_stopped(command, model: str) -> None:
    options, stage, message, shown = REFUSED[model]
    code, out, err = command(model, *options)
    assert (code, out) == (2, "")
    assert f"(stage {stage})" in err
    assert not [part for part in [message, *shown] if part not in err], err
    assert err.count("Error:") == 1
    assert "Traceback" not in err
    assert "def forward" not in err


@pytest.mark.parametrize("model", REFUSED)
def test_a_refusal_is_an_object_that_fits_the_schema(command, model: str) -> None:
    options, stage, message, _ = REFUSED[model]
    code, out, err = command(model, *options, "--json")
    data = json.loads(out)
    validate(data)
    assert code == 2
    assert data["error"]["stage"] == stage
    assert message in data["error"]["message"]
    assert data["error"]["hint"]
    assert message in err
    if stage in ("find", "partition"):
        assert data["operators"]
        assert len(data["refused"]) + len(data["units"]) == data["additions"]


def test_a_failing_model_is_placed_too(command) -> None:
    code, out, _ = command("inspected_nets:short", "--input-shape", "5", "--json")
    error = json.loads(out)["error"]
    assert (code, error["stage"], error["place"]["module"], error["place"]["type"]) == (2, "capture", "0.f", "Linear")
    assert error["place"]["code"] == "return x + self.f(x)"


def test_what_conditioning_refuses_keeps_the_blocks() -> None:
    found = inspect("mixed", lambda: replace(_request("mixed"), settings=Settings(context="stem")))
    validate(found.data)
    assert found.error is not None
    assert found.data["error"]["stage"] == "condition"
    assert "Use --context frozen" in found.data["error"]["hint"]
    assert len(found.data["blocks"]) == 3
    assert "(stage condition)" in drawn(found.data)
