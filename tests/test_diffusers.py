"""Folders of diffusers: the class from the config, safetensors alone, inputs found by running the model; what does not fit is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert
from diffusionblocks.converter.diffusion import from_diffusers
from diffusionblocks.converter.load import load_model
from diffusionblocks.converter.parts import save_training
from diffusionblocks.converter.prepared import Prepared
from diffusionblocks.runtime import BadInput, open_bundle
from diffusionblocks.runtime.installing import install
from torch import nn

diffusers = pytest.importorskip("diffusers")

DIT = {"num_attention_heads": 2, "attention_head_dim": 16, "out_channels": 8, "num_layers": 3, "sample_size": 8}
PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "sample_size": 8,
    "cross_attention_dim": 24,
}
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "out_channels": 4,
    "pos_embed_max_size": 16,
}
FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 4, 8),
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
# class, config, inputs expected with their shapes (batch left out)
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "dit": ("DiTTransformer2DModel", DIT, {"hidden_states": (4, 8, 8), "timestep": (), "class_labels": ()}),
    "pixart": (
        "PixArtTransformer2DModel",
        {**PIXART, "caption_channels": 12, "use_additional_conditions": True},
        {
            "hidden_states": (4, 8, 8),
            "encoder_hidden_states": (16, 12),
            "timestep": (),
            "resolution": (2,),
            "aspect_ratio": (1,),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        SD3,
        {"hidden_states": (4, 8, 8), "encoder_hidden_states": (16, 24), "pooled_projections": (16,), "timestep": ()},
    ),
    "flux": (
        "FluxTransformer2DModel",
        FLUX,
        {"hidden_states": (256, 4), "encoder_hidden_states": (16, 24), "pooled_projections": (12,), "timestep": ()},
    ),
    "wan": (
        "WanTransformer3DModel",
        {**WAN, "image_dim": 8, "added_kv_proj_dim": 24},
        {
            "hidden_states": (4, 2, 16, 16),
            "timestep": (),
            "encoder_hidden_states": (16, 16),
            "encoder_hidden_states_image": (16, 8),
        },
    ),
    "unet": ("UNet2DConditionModel", UNET, {"sample": (4, 8, 8), "timestep": (), "encoder_hidden_states": (16, 12)}),
    "sdxl": (
        "UNet2DConditionModel",
        {**UNET, **SDXL},
        {
            "sample": (4, 8, 8),
            "timestep": (),
            "encoder_hidden_states": (16, 12),
            "text_embeds": (8,),
            "time_ids": (6,),
        },
    ),
    "class projection": (
        "UNet2DConditionModel",
        {**UNET, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 20},
        {"sample": (4, 8, 8), "timestep": (), "encoder_hidden_states": (16, 12), "class_labels": (20,)},
    ),
    "cross attention of its own width": (
        "Transformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 4}
        | {"cross_attention_dim": 16},
        {"hidden_states": (16, 16, 16), "encoder_hidden_states": (16, 16)},
    ),
}


def _model(name: str, **changes: Any) -> Any:
    class_name, config, _ = MODELS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, class_name)(**{**config, **changes})
    for parameter in model.parameters():  # zeros would mute what is behind them
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    _model("dit").save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_gives_the_same_weights_and_inputs_that_run(name: str, tmp_path: Path) -> None:
    model = _model(name)
    model.save_pretrained(tmp_path)
    source = load_model(str(tmp_path))
    assert source.kind == "diffusers"
    assert {n: tuple(t.shape[1:]) for n, t in source.example.items()} == MODELS[name][2]
    assert all(t.shape[0] == 3 for t in source.example.values())
    inner = source.model.model if isinstance(source.model, Prepared) else source.model
    own, loaded = model.state_dict(), inner.state_dict()
    assert own.keys() == loaded.keys()
    assert all(torch.equal(own[k], loaded[k]) for k in own)
    with torch.no_grad():
        assert source.model(**source.example)[0].shape[0] == 3


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_it_converts_to_the_bit(name: str, tmp_path: Path) -> None:
    _model(name).save_pretrained(tmp_path)
    source = load_model(f"diffusers:{tmp_path}")
    network = convert(source.model, source.example, num_blocks=2)
    for batch in (1, 3):
        x = {k: v[:batch] for k, v in source.example.items()}
        with torch.no_grad():
            expected = source.model(**x)[0]
            captured = network.analysis.captured.graph(*(x[n] for n in network.input_names))[0]
        assert torch.equal(network.exact(x)[0], captured)
        assert (captured - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.road
def test_the_command_runs_a_folder(dit: Path, tmp_path: Path) -> None:
    from diffusionblocks.converter import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main([str(dit), "--out", str(tmp_path / "b"), "--num-blocks", "1", "--deploy"])
    assert stopped.value.code == 0
    rng = np.random.default_rng(0)
    inputs = {
        "hidden_states": rng.standard_normal((2, 4, 8, 8)).astype(np.float32),
        "timestep": np.array([3.0, 800.0], np.float32),
        "class_labels": np.array([1, 7]),
    }
    with open_bundle(tmp_path / "b") as bundle, torch.no_grad():
        expected = _model("dit")(**{k: torch.from_numpy(v) for k, v in inputs.items()}).sample.numpy()
        assert np.abs(bundle.run(inputs, mode="exact") - expected).max() < 1e-4


def test_what_is_fixed_can_be_given(tmp_path: Path) -> None:
    """Flux' positions belong to its tokens: other tokens need others."""
    model = _model("flux")
    model.save_pretrained(tmp_path)
    prepared = load_model(str(tmp_path)).model
    assert isinstance(prepared, Prepared)
    given = {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.rand(2),
    }
    ids = {"img_ids": torch.rand(9, 3), "txt_ids": torch.zeros(5, 3)}
    with torch.no_grad():
        assert torch.equal(prepared(**given, **ids)[0], model(**given, **ids)[0])


def test_a_pipeline_gives_its_denoiser_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = _model("dit")
    pipeline = diffusers.DiTPipeline(model, diffusers.AutoencoderKL(), diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    source = load_model(str(tmp_path))
    assert f"its transformer is taken ({tmp_path / 'transformer'})" in caplog.text
    assert torch.equal(source.model.proj_out_2.weight, model.proj_out_2.weight)
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(BadInput, match=r"neither a transformer nor a unet: it holds scheduler, vae"):
        load_model(str(tmp_path))


def _small() -> type:
    """A denoiser with a small default config."""

    class SmallDenoiser(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]
        @diffusers.configuration_utils.register_to_config
        def __init__(self, in_channels: int = 2, sample_size: int = 8) -> None:
            super().__init__()
            self.mix = nn.Conv2d(in_channels, in_channels, 3, padding=1)

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return sample + self.mix(sample) * timestep[:, None, None, None]

    return SmallDenoiser


def test_a_class_has_random_weights_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(diffusers, "SmallDenoiser", _small(), raising=False)
    source = load_model("diffusers:SmallDenoiser")
    assert "random weights" in caplog.text
    assert {n: tuple(t.shape) for n, t in source.example.items()} == {"sample": (3, 2, 8, 8), "timestep": (3,)}


def test_architecture_and_weights_apart(dit: Path, tmp_path: Path) -> None:
    weights = shutil.copy(dit / "diffusion_pytorch_model.safetensors", tmp_path / "w.safetensors")
    (dit / "diffusion_pytorch_model.safetensors").unlink()
    source = load_model(str(weights), arch=f"diffusers:{dit}")
    assert torch.equal(source.model.proj_out_2.weight, _model("dit").proj_out_2.weight)


def test_shards_and_half_precision(tmp_path: Path) -> None:
    model = _model("dit")
    model.half().save_pretrained(tmp_path, max_shard_size="100KB", variant="fp16")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    source = load_model(str(tmp_path))
    assert source.model.proj_out_2.weight.dtype == torch.float32
    assert torch.equal(source.model.proj_out_2.weight, model.proj_out_2.weight.float())
    next(iter(tmp_path.glob("*.safetensors"))).unlink()
    with pytest.raises(BadInput, match="not beside it"):
        load_model(str(tmp_path))


# --- refusals ---


def _changed(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("name", "reason"), [("DiTTransformer3DModel", "does not exist"), ("DDIMScheduler", "is not a model")]
)
def test_a_class_that_is_no_model(dit: Path, name: str, reason: str) -> None:
    _changed(dit, _class_name=name)
    with pytest.raises(BadInput, match=rf"names the class {name}, which {reason} in diffusers"):
        load_model(str(dit))
    with pytest.raises(BadInput, match=rf"{name} is no folder, and as a class it {reason}"):
        load_model(f"diffusers:{name}")


def test_a_name_of_the_hub_is_not_downloaded() -> None:
    with pytest.raises(BadInput, match="is no folder") as error:
        from_diffusers("someone/some-model")
    assert "downloaded first" in str(error.value)


def test_a_config_that_cannot_be_read(dit: Path) -> None:
    _changed(dit, num_layers="three")
    with pytest.raises(BadInput, match=r"cannot be built for [\s\S]*Check its config"):
        load_model(str(dit))
    (dit / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json cannot be read"):
        load_model(str(dit))


def test_folders_of_neither_library(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"without a config\.json \(transformers, diffusers\)"):
        load_model(str(tmp_path))
    with pytest.raises(BadInput, match=r"without a config\.json"):
        load_model(f"diffusers:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"width": 3}))
    with pytest.raises(BadInput, match=r"neither transformers .* nor diffusers"):
        load_model(str(tmp_path))
    with pytest.raises(BadInput, match="names no class"):
        load_model(f"diffusers:{tmp_path}")


def test_weights_that_do_not_fit_are_named(dit: Path) -> None:
    _changed(dit, num_layers=4, num_embeds_ada_norm=10)
    with pytest.raises(BadInput) as error:
        load_model(str(dit))
    said = str(error.value)
    assert "do not fit DiTTransformer2DModel" in said
    assert "missing 19: transformer_blocks.3." in said
    assert "misshapen" in said
    assert "class_embedder.embedding_table.weight (1001, 32) for (11, 32)" in said
    _changed(dit, num_layers=2, num_embeds_ada_norm=1000)
    with pytest.raises(BadInput, match=r"unexpected 19: transformer_blocks\.2\."):
        load_model(str(dit))


def test_pickled_weights_are_not_read(dit: Path) -> None:
    (dit / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(_model("dit").state_dict(), dit / "diffusion_pytorch_model.bin")
    with pytest.raises(BadInput, match="no weights in safetensors"):
        load_model(str(dit))


def test_truncated_and_quantised_weights(dit: Path) -> None:
    file = dit / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        load_model(str(dit))
    _changed(dit, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(BadInput, match="are quantised"):
        load_model(str(dit))


def test_diffusers_is_not_installed(dit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(BadInput, match="diffusers is not installed") as error:
        load_model(str(dit))
    assert install("diffusers") in str(error.value)


# --- models whose inputs cannot be found ---


class _Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor, phases: tuple[int, int]) -> torch.Tensor:
        return self.layer(hidden_states)


class _Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.layer(hidden_states) - hidden_states.mean(0)


@pytest.mark.parametrize(("model", "said"), [(_Unknown(), "it needs phases"), (_Mixing(), "reads hidden_states")])
def test_why_there_are_no_inputs_is_kept(model: nn.Module, said: str) -> None:
    """Not raised: the user may have inputs."""
    from diffusionblocks.converter.prepared import prepare
    from diffusionblocks.converter.source import Source

    source = prepare(Source("diffusers", "diffusers:x", model), {"in_channels": 4})
    assert source.example is None
    assert source.model is model
    assert said in str(source.no_example)
    assert "--example FILE.npz" in str(source.no_example)


def test_the_command_names_the_argument_or_takes_the_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusionblocks.converter import cli

    class NeedsPhases(_small()):  # type: ignore[misc]
        def forward(self, sample: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
            for _ in range(3):
                sample = sample + self.mix(sample) * phases[:, None, None, None]
            return sample

    monkeypatch.setattr(diffusers, "NeedsPhases", NeedsPhases, raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", "diffusers:NeedsPhases"])
    assert stopped.value.code == 2
    assert "it needs phases" in capsys.readouterr().err
    np.savez(tmp_path / "e.npz", sample=np.zeros((2, 2, 8, 8), np.float32), phases=np.ones(2, np.float32))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["inspect", "diffusers:NeedsPhases", "--example", str(tmp_path / "e.npz")])
    assert stopped.value.code == 0


def test_a_bundle_is_trained_further_where_nothing_imported_diffusers(tmp_path: Path) -> None:
    """Its program gives no class of diffusers', which a new process could not read."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8}
    model = diffusers.DiTTransformer2DModel(**sizes, num_embeds_ada_norm=10, dropout=0.0).eval()
    example = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.tensor([3.0, 7.0]), "class_labels": torch.tensor([1, 2])}  # fmt: skip
    network = convert(model, example, num_blocks=2, task="diffusion")
    save_training(network, tmp_path / "train")
    says = (
        "import sys, pathlib; from diffusionblocks.converter.parts import load_training; "
        "n = load_training(pathlib.Path(sys.argv[1])); assert 'diffusers' not in sys.modules; print(n.num_blocks)"
    )
    done = subprocess.run([sys.executable, "-c", says, str(tmp_path / "train")], capture_output=True, text=True)
    assert done.stdout.split() == ["2"], done.stderr
