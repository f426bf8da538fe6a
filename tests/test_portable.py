"""A converted network as a module of torch: equal to the bit before and after it is saved, trained on, and read in a process without the converter's model."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusionblocks.converter import convert, finetune, load_network, module_of, save_network
from diffusionblocks.converter.portable import PLAN, STATE, BlockNetwork
from diffusionblocks.runtime import BadInput, BundleError
from safetensors.torch import load_file, save_file
from torch import nn


@pytest.fixture(scope="module")
def saved(bundles, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("saved")
    return {name: save_network(network, folder / name) for name, (network, _) in bundles.items()}


@pytest.mark.parametrize("context", ["frozen", "carry", "stem"])
def test_it_is_the_network_to_the_bit(bundles, saved, digits, context: str) -> None:
    network, _ = bundles[context]
    x = torch.from_numpy(digits[0][:5])
    for module in (module_of(network), load_network(saved[context])):
        assert isinstance(module, nn.Module)
        assert torch.equal(module(x)[0], network.exact((x,))[0])
        for steps, read, start in ((3, "last", "mean"), (5, "mean", "mean"), (4, "last", "noise")):
            expected = network.denoise((x,), steps=steps, read=read, start=start)
            assert torch.equal(module.denoise(x, steps=steps, read=read, start=start), expected)
        assert torch.equal(module(x[:1])[0], network.exact((x[:1],))[0])


@pytest.mark.parametrize("context", ["frozen", "carry", "stem"])
def test_its_state_dict_is_the_file(bundles, saved, context: str) -> None:
    module, loaded = module_of(bundles[context][0]), load_network(saved[context])
    assert set(module.state_dict()) == set(loaded.state_dict())
    stored = load_file(saved[context] / STATE)
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name])
        assert name not in stored or torch.equal(tensor, stored[name])
    assert set(stored) <= set(loaded.state_dict())
    distinct = {t.data_ptr() for t in loaded.state_dict().values()}
    assert len(distinct) == len(stored)  # what parts have in common is stored, and read, once
    other = load_network(saved[context])
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(loaded.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(other(x)[0], loaded(x)[0])


def test_it_is_read_where_the_model_is_unknown(bundles, saved, digits, tmp_path: Path) -> None:
    """In a process that has neither the model's classes nor a conversion."""
    x = torch.from_numpy(digits[0][:4])
    torch.save(x, tmp_path / "x.pt")
    program = f"""
import sys, torch
from diffusionblocks.converter import load_network
module = load_network({str(saved["frozen"])!r})
torch.save(module.denoise(torch.load({str(tmp_path / "x.pt")!r})), {str(tmp_path / "y.pt")!r})
assert not {{"conftest", "sklearn", "timm"}} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=tmp_path
    )
    expected = load_network(saved["frozen"]).denoise(x)
    assert torch.allclose(torch.load(tmp_path / "y.pt"), expected, atol=1e-5)


def test_a_block_of_it_learns(saved, digits) -> None:
    module = load_network(saved["frozen"])
    x, y = (torch.from_numpy(a[:64]) for a in digits)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    owned = [p for name, p in module.named_parameters() if name.startswith("parts.block_01.")]
    optimizer = torch.optim.AdamW(owned, 1e-3)
    z, sigma = torch.randn(64, *module.plan.shape), torch.full((64,), 0.5)
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(module.apply_block(1, z, sigma, x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = {n for n, t in module.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(name.startswith(("parts.block_01.", "parts.context_01.")) for name in changed)  # tied to the original's


def test_it_goes_where_modules_go(saved) -> None:
    module = load_network(saved["stem"])
    assert not module.training
    assert module.train().training
    copied = copy.deepcopy(module.eval())
    x = torch.randn(3, 64)
    assert torch.equal(copied(x)[0], module(x)[0])
    assert module.double()(x.double())[0].dtype == torch.float64


def test_weights_of_several_blocks_are_stored_once(trained_mlp: nn.Module, tmp_path: Path) -> None:
    class Twice(nn.Module):
        """Every unit is applied again, in the second block."""

        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(trained_mlp)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, *units, norm, last = self.model
            for layer in (first, *units, *units, norm, last):
                x = layer(x)
            return x

    model = Twice().eval()
    folder = save_network(convert(model, input_shape=(64,), num_blocks=2), tmp_path / "twice")
    loaded, x = load_network(folder), torch.randn(3, 64)
    assert torch.equal(loaded(x)[0], model(x))
    stored = load_file(folder / STATE)
    assert sum(t.numel() for name, t in stored.items() if "context_01" in name) == 0
    a, b = (dict(loaded.parts[f"context_{i:02d}"].named_parameters()) for i in (0, 1))
    assert {t.data_ptr() for t in a.values()} == {t.data_ptr() for t in b.values()}


def test_one_from_scratch_has_no_original(trained_mlp, digits, tmp_path: Path) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2, context="stem", scratch=True)
    finetune(network, *(a[:64] for a in digits), steps=2)
    module = load_network(save_network(network, tmp_path / "n"))
    x = torch.from_numpy(digits[0][:3])
    assert torch.equal(module.denoise(x, read="mean"), network.denoise((x,), read="mean"))
    with pytest.raises(BadInput, match="from scratch"):
        module(x)


@pytest.mark.parametrize("given", [(), (torch.zeros(1, 64),) * 2])
def test_wrong_inputs(saved, given: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(BadInput, match="takes"):
        load_network(saved["frozen"])(*given)


def test_an_existing_folder_is_kept(bundles, saved) -> None:
    with pytest.raises(BadInput, match="exists already"):
        save_network(bundles["frozen"][0], saved["frozen"])


class TestDamage:
    @pytest.fixture
    def folder(self, saved, tmp_path: Path) -> Path:
        import shutil

        return shutil.copytree(saved["stem"], tmp_path / "n")

    @pytest.mark.parametrize("name", [PLAN, STATE, "block_01.pt2"])
    def test_a_file_is_missing(self, folder: Path, name: str) -> None:
        (folder / name).unlink()
        with pytest.raises(BundleError, match=name.replace(".", r"\.")):
            load_network(folder)

    @pytest.mark.parametrize(
        "change",
        [
            lambda plan: plan.update(format=99),
            lambda plan: plan["parts"].update({"../x": plan["parts"]["stem"]}),
            lambda plan: plan.update(edges=[1.0]),
            lambda plan: plan.update(blocks=9),
            lambda plan: plan.update(unknown=1),
            lambda plan: plan.pop("kind"),
            lambda plan: plan.update(parts=3),
        ],
    )
    def test_a_plan_that_does_not_fit(self, folder: Path, change) -> None:
        plan = json.loads((folder / PLAN).read_text())
        change(plan)
        (folder / PLAN).write_text(json.dumps(plan))
        with pytest.raises(BundleError):
            load_network(folder)

    def test_a_weight_that_does_not_fit(self, folder: Path) -> None:
        stored = load_file(folder / STATE)
        name = next(n for n, t in stored.items() if t.dim() == 2)
        stored[name] = stored[name][:1].clone()
        save_file(stored, folder / STATE)
        with pytest.raises(BundleError, match=STATE.replace(".", r"\.")):
            load_network(folder)


def test_a_module_of_torch_alone(saved) -> None:
    assert isinstance(load_network(saved["carry"]), BlockNetwork)
