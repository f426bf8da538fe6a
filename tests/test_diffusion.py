"""Diffusion models: the network's own noisy input is z; parameterisations, schedulers, training on images or on the original, sampling in torch and in the runtime."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusionblocks.converter import convert, finetune
from diffusionblocks.converter.cli import main
from diffusionblocks.converter.denoiser_target import Denoiser, DenoiserTarget
from diffusionblocks.converter.generation import compared, generate, output
from diffusionblocks.converter.images_data import NoisyImages
from diffusionblocks.converter.network import ConvertedNetwork
from diffusionblocks.converter.scheduler import read_scheduler
from diffusionblocks.export import export_bundle
from diffusionblocks.export.verify import verify_bundle
from diffusionblocks.runtime import open_bundle, parameterisation
from diffusionblocks.runtime.errors import BadInput, BundleError
from diffusionblocks.runtime.schedule import block_of
from torch import nn

diffusers = pytest.importorskip("diffusers")

CLASSES, SIDE, WIDTH = 4, 8, 32
LINEAR = tuple(float(s) for s in np.sqrt(1 / np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)) - 1))


_spec = importlib.util.spec_from_file_location(
    "diffusion_example", Path(__file__).parents[1] / "examples" / "diffusion.py"
)
assert _spec is not None
assert _spec.loader is not None
_example = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_example)


def small(channels: int = 1, seed: int = 0) -> nn.Module:
    """The example's DiT, smaller: (x [N, 1, 8, 8], t [N], y [N]); class 4 stands for none."""
    torch.manual_seed(seed)
    model: nn.Module = _example.DiT(WIDTH, 4, 2, CLASSES, channels)
    return model


def example(time: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 1, SIDE, SIDE), "t": torch.tensor([1, 2, 3]).to(time), "y": torch.tensor([0, 1, 4])}


def dit(kind: str = "eps", num_blocks: int = 2, model: nn.Module | None = None, **settings: Any) -> ConvertedNetwork:
    denoiser = Denoiser(kind, () if kind == "edm" else LINEAR)
    given = small() if model is None else model
    return convert(given.eval(), example(), num_blocks=num_blocks, task="diffusion", denoiser=denoiser, **settings)


@pytest.fixture(scope="session")
def images(digits: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Digits 0 to 3 in [-1, 1]."""
    chosen = digits[1] < CLASSES
    return 2 * (digits[0][chosen].reshape(-1, 1, SIDE, SIDE) + 0.3) - 1, digits[1][chosen]


@pytest.mark.parametrize("kind", parameterisation.KINDS)
def test_the_true_output_gives_the_image_back(kind: str) -> None:
    """What each parameterisation predicts, written by its own definition, and D of it."""
    y, eps = torch.randn(5, 1, 4, 4, dtype=torch.float64), torch.randn(5, 1, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.01, 0.3, 1.0, 7.0, 80.0], dtype=torch.float64)[:, None, None, None]
    z = y + sigma * eps
    alpha = 1 / (1 + sigma**2).sqrt()
    beta = sigma * alpha
    torch.testing.assert_close(z * parameterisation.input_scale("eps", sigma), alpha * y + beta * eps)
    skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    f = {"eps": eps, "v": alpha * eps - beta * y, "x0": y, "edm": (y - skip * z) / out}[kind]
    torch.testing.assert_close(parameterisation.denoised(kind, z, f, sigma), y, atol=1e-7, rtol=1e-7)
    error = 0.1 * torch.randn_like(f)
    off = parameterisation.denoised(kind, z, f + error, sigma) - y
    weighted = off.square() * parameterisation.weight(kind, sigma)
    torch.testing.assert_close(weighted, error.square())


def test_time_is_the_place_among_the_noise_levels() -> None:
    found = parameterisation.time_of("eps", np.array([LINEAR[0], LINEAR[500], LINEAR[999]]), LINEAR)
    np.testing.assert_allclose(found, [0, 500, 999], atol=1e-6)
    assert parameterisation.as_time(np.array([3.6]), "int64").tolist() == [4]
    assert parameterisation.time_of("edm", np.array([1.0]), ()) == 0


@pytest.mark.parametrize(("name", "prediction", "kind"), [("DDPMScheduler", "epsilon", "eps"), ("DDIMScheduler", "v_prediction", "v"), ("DDPMScheduler", "sample", "x0")])  # fmt: skip
def test_schedulers_of_diffusers_are_read(tmp_path: Path, name: str, prediction: str, kind: str) -> None:
    """Noise is added as the scheduler itself adds it."""
    scheduler = getattr(diffusers, name)(
        prediction_type=prediction, beta_schedule="scaled_linear", num_train_timesteps=200
    )
    scheduler.save_pretrained(tmp_path)
    found = read_scheduler(tmp_path, None)
    assert found.parameterisation == kind
    y, eps, t = torch.randn(1, 3), torch.randn(1, 3), torch.tensor([77])
    sigma = found.sigmas[77]
    ours = (y + sigma * eps) * parameterisation.input_scale(kind, sigma)
    torch.testing.assert_close(ours, scheduler.add_noise(y, eps, t), atol=1e-5, rtol=1e-5)


def test_a_scheduler_without_signal_at_its_end_loses_that_step(tmp_path: Path) -> None:
    diffusers.DDIMScheduler(rescale_betas_zero_snr=True).save_pretrained(tmp_path)
    sigmas = read_scheduler(tmp_path, None).sigmas
    assert len(sigmas) == 999
    assert np.isfinite(sigmas).all()


def test_schedulers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="FlowMatchEulerDiscreteScheduler predicts"):
        read_scheduler(tmp_path, None)
    with pytest.raises(BadInput, match=r"holds no scheduler_config.json"):
        read_scheduler(tmp_path / "nowhere", None)
    with pytest.raises(BadInput, match="needs the noise levels"):
        Denoiser("v")
    with pytest.raises(BadInput, match="'score' is not known"):
        Denoiser("score")


def test_one_block_is_the_original_to_the_bit() -> None:
    model = small()
    network = dit(num_blocks=1, model=model)
    z, sigma = torch.randn(3, 1, SIDE, SIDE), torch.tensor([0.05, 1.0, 30.0])
    target = network.require_target()
    env = target.entered(example(), z, sigma)
    with torch.no_grad():
        expected = model(env["x"], env["t"], env["y"])
    assert torch.equal(network.exact(env)[0], expected)
    for original in (True, False):
        assert torch.equal(output(network, example(), 0, z, sigma, original=original), expected)


def test_nothing_is_added_to_a_diffusion_model() -> None:
    network = dit(num_blocks=2)
    assert network.settings.context == "stem"
    names = {n for block in network.blocks for n, _ in block.module.named_parameters()}
    assert not any("conditioner" in n for n in names)
    assert sum(p.numel() for b in network.blocks for p in b.module.parameters()) == sum(
        p.numel() for c in network.contexts for p in c.module.parameters()
    )


def test_blocks_share_the_time_steps_equally() -> None:
    network = dit(num_blocks=4, overlap=0.0)
    target = network.require_target()
    assert isinstance(target, DenoiserTarget)
    times = parameterisation.time_of("eps", np.array(network.edges), LINEAR)
    np.testing.assert_allclose(times, [999, 749.25, 499.5, 249.75, 0], atol=1e-6)
    u = np.linspace(0, 1, 1001)[:-1]
    for b, density in enumerate(network.densities):
        drawn = parameterisation.time_of("eps", density.sigma(u), LINEAR)
        assert abs(float(np.median(drawn)) - (999 - 249.75 * (b + 0.5))) < 15
    assert block_of(network.edges[0], network.edges) == 0  # the noisiest belong to the first layers
    edm = dit("edm", num_blocks=3)
    np.testing.assert_allclose(edm.edges, [80, 0.505, 0.1796, 0.002], rtol=2e-3)


@pytest.fixture(scope="session")
def trained(images: tuple[np.ndarray, np.ndarray]) -> nn.Module:
    """The small DiT after 250 updates on digits, EDM."""
    made: nn.Module = _example.train_whole(small(), *map(torch.from_numpy, images), 250, CLASSES)
    return made


@pytest.fixture(scope="session")
def blockwise(trained: nn.Module, images: tuple[np.ndarray, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> tuple[ConvertedNetwork, Path]:  # fmt: skip
    """Two blocks trained on digits, and their bundle."""
    network = dit("edm", model=trained)
    finetune(network, {"x": images[0], "y": images[1]}, steps=120, lr=2e-3, batch_size=32, null=CLASSES)
    return network, export_bundle(network, tmp_path_factory.mktemp("dit") / "dit.dblocks")


@pytest.mark.road
def test_blocks_learn_to_denoise_on_their_own_noise_levels(blockwise, trained, images) -> None:
    network, _ = blockwise
    untrained = dit("edm", model=trained)
    data = NoisyImages(_arrays(images), network, "y")
    before, after = compared(untrained, data), compared(network, data)
    assert before["exact"] == after["exact"]
    for b in range(2):
        assert after["denoise"]["blocks"][b] < before["denoise"]["blocks"][b]
    assert after["denoise"]["loss"] < 1.3 * after["exact"]["loss"]


def _arrays(images: tuple[np.ndarray, np.ndarray]) -> Any:
    from diffusionblocks.converter.dataset import ArrayDataset

    return ArrayDataset({"x": images[0][:100]}, images[1][:100])


def test_the_original_teaches_its_blocks(trained, images) -> None:
    """Against the original's D at the same z the loss goes down, and labels are conditions, not targets."""
    network = dit("edm", model=trained)
    logs = finetune(network, {"x": images[0], "y": images[1]}, steps=60, lr=2e-3, batch_size=32, targets="teacher")
    for log in logs:
        assert log.loss[-1] < 0.7 * log.loss[0]


@pytest.mark.parametrize("options", [{}, {"solver": "heun", "steps": 5}, {"guidance": 2.0, "null": {"y": np.array([CLASSES])}}, {"mode": "exact", "steps": 3}], ids=["euler", "heun", "guidance", "original"])  # fmt: skip
def test_the_runtime_samples_what_torch_samples(blockwise, options: dict[str, Any]) -> None:
    network, folder = blockwise
    labels = np.array([0, 1, 2, 3], np.int64)
    given = dict(options)
    mode = given.pop("mode", "denoise")
    with open_bundle(folder) as bundle:
        got = bundle.sample({"y": labels}, mode=mode, seed=3, **given)
        again = bundle.sample({"y": labels}, mode=mode, seed=3, **given)
        other = bundle.sample({"y": labels}, mode=mode, seed=4, **given)
    null = {n: torch.from_numpy(a) for n, a in given.pop("null", {}).items()}
    steps = given.pop("steps", network.num_blocks * 8)
    want = generate(
        network, {"y": torch.from_numpy(labels)}, seed=3, null=null, steps=steps, original=mode == "exact", **given
    )
    assert got.shape == (4, 1, SIDE, SIDE)
    np.testing.assert_allclose(got, want.numpy(), atol=2e-4)
    assert (got == again).all()
    assert not np.allclose(got, other)


def test_samples_are_nearer_to_digits_of_their_class(blockwise, images) -> None:
    _, folder = blockwise
    labels = np.repeat(np.arange(CLASSES), 25)
    with open_bundle(folder) as bundle:
        made = bundle.sample({"y": labels}, steps=16)
    means = np.stack([images[0][images[1] == k].mean(0) for k in range(CLASSES)])
    nearest = ((made[:, None] - means[None]) ** 2).sum((2, 3, 4)).argmin(1)
    assert (nearest == labels).mean() > 0.6  # by chance 0.25


def test_a_bundle_of_a_diffusion_model_is_verified_and_trained_further(blockwise, tmp_path: Path) -> None:
    from diffusionblocks.converter.parts import load_training, save_training

    network, folder = blockwise
    assert {c.name for c in verify_bundle(folder).checks if c.ok} >= {"exact.output", "denoise"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["target"]["denoiser"] == {"parameterisation": "edm", "input": "x", "time": "t", "sigmas": []}
    save_training(network, tmp_path / "train")
    again = load_training(tmp_path / "train")
    assert again.settings == network.settings
    assert again.edges == network.edges
    assert all(again.stems)
    assert all(again.heads)  # copies that were trained with their blocks
    assert not any(dit(ends="shared").stems)


def test_a_block_fits_a_budget_and_gives_the_same(blockwise) -> None:
    _, folder = blockwise
    labels = {"y": np.array([0, 3], np.int64)}
    with open_bundle(folder) as bundle:
        whole, peak = bundle.sample(labels), bundle.peak_weight_bytes
    with pytest.raises(BadInput, match="below") as error:
        open_bundle(folder, memory_budget=1)
    smallest = int(str(error.value).split("--memory-budget ")[1].split()[0])
    with open_bundle(folder, memory_budget=smallest) as bundle:
        assert np.abs(bundle.sample(labels) - whole).max() < 1e-4  # row by row
        assert bundle.last_plan.rows == 1
        assert bundle.peak_weight_bytes <= smallest <= peak + 3 * max(g.row_bytes for g in bundle.manifest.graphs())


REFUSED = {
    "no conditions": ({"conditions": {}}, "expected|takes y"),
    "a count besides": ({"conditions": {"y": np.array([1])}, "count": 3}, "3 samples were asked for, with conditions for 1"),
    "no such solver": ({"conditions": {"y": np.array([1])}, "solver": "rk4"}, "solver 'rk4' is not known"),
    "guidance without null": ({"conditions": {"y": np.array([1])}, "guidance": 3.0}, "null says no such condition"),
    "null of another name": ({"conditions": {"y": np.array([1])}, "guidance": 3.0, "null": {"text": 1}}, "null names text"),
    "null of other rows": ({"conditions": {"y": np.array([1, 2, 3])}, "guidance": 3.0, "null": {"y": np.array([4, 4])}}, "null has 2 rows"),
    "no such mode": ({"conditions": {"y": np.array([1])}, "mode": "fast"}, "mode 'fast' is not there"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_sampling_that_cannot_be_is_refused(blockwise, name: str) -> None:
    given, text = REFUSED[name]
    with open_bundle(blockwise[1]) as bundle, pytest.raises(BadInput, match=text):
        bundle.sample(**given)


def test_other_calls_say_what_to_do(blockwise, bundles) -> None:
    with open_bundle(blockwise[1]) as bundle, pytest.raises(BadInput, match=r"Bundle\.sample"):
        bundle.run({k: v.numpy() for k, v in example().items()}, "denoise")
    with open_bundle(bundles["stem"][1]) as bundle, pytest.raises(BadInput, match="no diffusion model"):
        bundle.sample(count=3)


def test_a_manifest_with_a_denoiser_that_does_not_fit_is_refused(blockwise, tmp_path: Path) -> None:
    import shutil

    for change in ({"input": "z"}, {"parameterisation": "score"}, {"parameterisation": "eps"}):
        copy = tmp_path / next(iter(change.values()))
        shutil.copytree(blockwise[1], copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["target"]["denoiser"] |= change
        (copy / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(BundleError, match="denoiser"):
            open_bundle(copy)


def test_conversions_that_cannot_be_are_refused(trained) -> None:
    for context in ("frozen", "carry"):
        with pytest.raises(BadInput, match=f"task diffusion with the context {context}"):
            dit(context=context)
    with pytest.raises(BadInput, match="keeps its own conditioning"):
        dit(tune="adaln")
    with pytest.raises(BadInput, match="equal-information is for classes"):
        dit(partition="equal-information")
    mlp = nn.Sequential(nn.Linear(8, 16), *(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2)))
    with pytest.raises(
        BadInput, match=r"needs a noisy input of the output's shape and a time.*takes input float32 \[5, 8\]"
    ):
        convert(mlp.eval(), input_shape=(5, 8), num_blocks=2, task="diffusion")
    with pytest.raises(BadInput, match="no prediction without z"):
        finetune(dit(), {"x": np.zeros((9, 1, 8, 8), np.float32), "y": np.zeros(9, np.int64)}, steps=1, clean=1.0)


def test_a_learned_variance_is_left_out(images) -> None:
    """Twice the channels, as DiT and PixArt have: the first half is the prediction."""
    network = dit(model=small(channels=2))
    target = network.require_target()
    assert target.shape == (1, SIDE, SIDE)
    finetune(network, {"x": images[0], "y": images[1]}, steps=2, batch_size=4)
    made = generate(network, {"y": torch.tensor([0, 1])}, steps=2)
    assert made.shape == (2, 1, SIDE, SIDE)


@pytest.mark.road
def test_a_pipeline_of_diffusers_from_folder_to_samples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DiT with its scheduler: converted, trained on a folder of images by class by the command, sampled with guidance."""
    from PIL import Image

    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=6, num_layers=4, sample_size=8,
        num_embeds_ada_norm=3,
    )  # fmt: skip
    pipeline = tmp_path / "pipeline"
    model.save_pretrained(pipeline / "transformer")
    diffusers.DDIMScheduler(num_train_timesteps=1000).save_pretrained(pipeline / "scheduler")
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    rng = np.random.default_rng(0)
    for k in range(3):
        (tmp_path / "images" / f"class{k}").mkdir(parents=True)
        for i in range(8):
            pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / f"class{k}" / f"{i}.png")

    def command(*arguments: str) -> None:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        assert end.value.code == 0

    command("inspect", str(pipeline), "--task", "diffusion", "-B", "2", "--json")
    edges = json.loads(capsys.readouterr().out)["schedule"]["edges"]
    assert edges[0] > 150  # of the pipeline's own scheduler
    bundle = str(tmp_path / "dit.dblocks")
    command(str(pipeline), "--task", "diffusion", "--out", bundle, "-B", "2")
    command("train", bundle, "--data", str(tmp_path / "images"), "--steps", "3", "--batch-size", "4", "--null", "3", "--quiet")  # fmt: skip
    np.savez(tmp_path / "classes.npz", class_labels=np.array([0, 1, 2]))
    command("run", bundle, "--input", str(tmp_path / "classes.npz"), "--output", str(tmp_path / "y.npy"), "--steps", "4", "--guidance", "2", "--null", "class_labels=3", "--solver", "heun")  # fmt: skip
    made = np.load(tmp_path / "y.npy")
    assert made.shape == (3, 3, 8, 8)
    assert np.isfinite(made).all()
    manifest = json.loads((Path(bundle) / "manifest.json").read_text())
    assert manifest["target"]["denoiser"]["parameterisation"] == "eps"
    assert len(manifest["target"]["denoiser"]["sigmas"]) == 1000
    assert manifest["class_names"] is None or manifest["class_names"] == ["class0", "class1", "class2"]


def test_what_is_for_diffusion_models_is_refused_elsewhere(
    trained_mlp, digits, capsys: pytest.CaptureFixture[str]
) -> None:
    network = convert(trained_mlp, input_shape=(64,), num_blocks=2)
    with pytest.raises(BadInput, match="stands for none is for diffusion models"):
        finetune(network, digits[0][:50], digits[1][:50], steps=1, null=3)
    with pytest.raises(SystemExit) as end:
        main(["inspect", "timm:resnet18", "--parameterisation", "v"])
    assert end.value.code == 2
    assert "--task diffusion" in capsys.readouterr().err
