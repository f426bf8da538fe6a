"""Every transformer and U-Net of diffusers with a tiny configuration, its residual branches counted from the source."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from zoo.entry import Entry, Inputs

UNINITIALISED = ("experts.gate_up_proj", "experts.down_proj", "pad_token")
DEAD = "the last block's {} never reaches the output and is left out"


def inputs(**specs: tuple[int, ...] | Callable[[int], torch.Tensor]) -> Inputs:
    """Arguments by name: a shape without its batch dimension for a normal tensor, or a function of the batch size."""
    return lambda b: {k: s(b) if callable(s) else torch.randn(b, *s) for k, s in specs.items()}


def steps(b: int) -> torch.Tensor:
    """Integer timesteps."""
    return torch.randint(1, 900, (b,))


def times(b: int) -> torch.Tensor:
    """Float timesteps in (0, 1)."""
    return torch.rand(b) * 0.9 + 0.05


def ints(*shape: int, high: int = 9) -> Callable[[int], torch.Tensor]:
    """Integers in [0, high)."""
    return lambda b: torch.randint(0, high, (b, *shape))


def ones(*shape: int, dtype: torch.dtype = torch.long) -> Callable[[int], torch.Tensor]:
    """An all-ones mask."""
    return lambda b: torch.ones(b, *shape, dtype=dtype)


def grid_ids(tokens: int, axes: int, width: int = 4) -> torch.Tensor:
    """Position ids of image tokens on a grid, ``[tokens, axes]``."""
    ids = torch.zeros(tokens, axes)
    ids[:, 1], ids[:, 2] = torch.arange(tokens) // width, torch.arange(tokens) % width
    return ids


class Fixed(nn.Module):
    """A model some of whose arguments are fixed: python values here, tensors without a batch dimension as buffers."""

    def __init__(self, model: nn.Module, **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.fixed = {k: v for k, v in fixed.items() if not isinstance(v, torch.Tensor)}
        self.names = [k for k, v in fixed.items() if isinstance(v, torch.Tensor)]
        for name in self.names:
            self.register_buffer(name, fixed[name], persistent=False)

    def run(self, **tensors: Any) -> Any:
        return self.model(**tensors, **self.fixed, **{name: getattr(self, name) for name in self.names})


class TextImage(Fixed):
    """``hidden_states``, ``encoder_hidden_states`` and ``timestep``."""

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor
    ) -> Any:
        return self.run(hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, timestep=timestep)


class TextImagePooled(Fixed):
    """As ``TextImage`` with a pooled text embedding."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        pooled_projections: torch.Tensor,
        timestep: torch.Tensor,
    ) -> Any:
        return self.run(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            pooled_projections=pooled_projections,
            timestep=timestep,
        )


class TextMaskImage(Fixed):
    """As ``TextImage`` with a text mask, named as the model names it."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
    ) -> Any:
        return self.run(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            encoder_attention_mask=encoder_attention_mask,
        )


class ConsisIDFaces(nn.Module):
    """ConsisID's list of face features as one stacked tensor ``[batch, scales, tokens, dim]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        id_cond: torch.Tensor,
        id_vit_hidden: torch.Tensor,
    ) -> Any:
        faces = list(id_vit_hidden.unbind(1))
        return self.model(hidden_states, encoder_hidden_states, timestep, id_cond=id_cond, id_vit_hidden=faces)


class LuminaNext(Fixed):
    """Lumina-Next with its rotary table and empty attention arguments."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_mask: torch.Tensor,
    ) -> Any:
        return self.run(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            encoder_mask=encoder_mask,
            cross_attention_kwargs={},
        )


class FilmDecoder(nn.Module):
    """T5FilmDecoder with one encoding instead of a list of pairs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        encodings: torch.Tensor,
        encodings_mask: torch.Tensor,
        decoder_input_tokens: torch.Tensor,
        decoder_noise_time: torch.Tensor,
    ) -> Any:
        return self.model([(encodings, encodings_mask)], decoder_input_tokens, decoder_noise_time)


class FarFrames(Fixed):
    """AnyFlow FAR with a fixed chunk partition."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        r_timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
    ) -> Any:
        return self.run(
            hidden_states=hidden_states,
            timestep=timestep,
            r_timestep=r_timestep,
            encoder_hidden_states=encoder_hidden_states,
        )


class LayeredText(Fixed):
    """Bria FIBO with its list of text layers as ``[batch, layers, tokens, dim]``."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        text_encoder_layers: torch.Tensor,
    ) -> Any:
        return self.run(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            text_encoder_layers=list(text_encoder_layers.unbind(1)),
        )


class HiDream(nn.Module):
    """HiDream with its Llama layers as ``[batch, layers, tokens, dim]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        timesteps: torch.Tensor,
        encoder_hidden_states_t5: torch.Tensor,
        encoder_hidden_states_llama3: torch.Tensor,
        pooled_embeds: torch.Tensor,
    ) -> Any:
        llama = encoder_hidden_states_llama3.unbind(1)
        return self.model(hidden_states, timesteps, encoder_hidden_states_t5, llama, pooled_embeds)


class Framepack(Fixed):
    """HunyuanVideo-Framepack with its frame indices."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        pooled_projections: torch.Tensor,
        image_embeds: torch.Tensor,
        latents_clean: torch.Tensor,
        latents_history_2x: torch.Tensor,
        latents_history_4x: torch.Tensor,
    ) -> Any:
        return self.run(
            hidden_states=hidden_states,
            timestep=timestep,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            pooled_projections=pooled_projections,
            image_embeds=image_embeds,
            latents_clean=latents_clean,
            latents_history_2x=latents_history_2x,
            latents_history_4x=latents_history_4x,
        )


class Shapes(nn.Module):
    """A model that takes a list of image shapes, one item a sample, under ``name``."""

    def __init__(self, model: nn.Module, name: str, shapes: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.model, self.name, self.shapes = model, name, shapes

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor
    ) -> Any:
        copies = hidden_states.shape[0] if self.name == "shape_list" else 1  # the others read the first sample's
        shapes = {self.name: [self.shapes] * copies}
        return self.model(
            hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, timestep=timestep, **shapes
        )


class Qwen21(nn.Module):
    """Qwen-Image 2.1: text tokens, then the slots of one 4 x 4 image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor
    ) -> Any:
        batch, text = encoder_hidden_states.shape[:2]
        mask = torch.cat([torch.zeros(batch, text), torch.ones(batch, 4)], 1).bool()
        return self.model(hidden_states, encoder_hidden_states, timestep, [[(1, 4, 4)]], mask)


class Kandinsky(Fixed):
    """Kandinsky 5 with its rotary positions made here."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        pooled_projections: torch.Tensor,
    ) -> Any:
        _, frames, height, width, _ = hidden_states.shape
        visual = [torch.arange(frames), torch.arange(height // 2), torch.arange(width // 2)]
        text = torch.arange(encoder_hidden_states.shape[1])
        return self.run(
            hidden_states=hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=timestep,
            pooled_projections=pooled_projections,
            visual_rope_pos=visual,
            text_rope_pos=text,
        )


class AudioVideo(Fixed):
    """LTX-2 with its video and audio sizes."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        audio_hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        audio_encoder_hidden_states: torch.Tensor,
        timestep: torch.Tensor,
    ) -> Any:
        return self.run(
            hidden_states=hidden_states,
            audio_hidden_states=audio_hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            audio_encoder_hidden_states=audio_encoder_hidden_states,
            timestep=timestep,
        )


class MiniMaxH3(Fixed):
    """MiniMax H3 with the packing of its sequence."""

    def forward(
        self, hidden_states: torch.Tensor, audio_hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> Any:
        return self.run(
            hidden_states=hidden_states,
            audio_hidden_states=audio_hidden_states,
            encoder_hidden_states=encoder_hidden_states,
        )


class OmniGen(nn.Module):
    """OmniGen without input images."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> Any:
        return self.model(hidden_states, timestep, input_ids, [], {}, attention_mask, position_ids)


class Frames(nn.Module):
    """A temporal transformer over ``[batch, frames, channels, height, width]``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, frames = hidden_states.shape[:2]
        flat = self.model(hidden_states.flatten(0, 1), num_frames=frames, return_dict=False)[0]
        return flat.reshape(batch, frames, *flat.shape[1:])


class MotionFrames(nn.Module):
    """UNetMotionModel with one text embedding a sample, which it wants once a frame."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        text = encoder_hidden_states.repeat_interleave(sample.shape[2], dim=0)
        return self.model(sample, timestep, text)


class Listed(nn.Module):
    """Z-Image, which takes and returns lists of samples."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, t: torch.Tensor, cap_feats: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.model(list(x.unbind(0)), t, list(cap_feats.unbind(0)), return_dict=False)[0])


class Refiner(nn.Module):
    """SANA-WM's LTX-2 refiner with the rotary embedding of a 2 x 4 x 4 latent."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, timestep: torch.Tensor
    ) -> Any:
        rotary = self.model.build_rotary_emb_for_absolute_positions(
            hidden_states.shape[0], [0, 1], 4, 4, hidden_states.device, 24.0
        )
        return self.model(hidden_states, encoder_hidden_states, timestep, rotary)


class AddedConditions(nn.Module):
    """A U-Net with SDXL's added conditions as tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        text_embeds: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> Any:
        added = {"text_embeds": text_embeds, "time_ids": time_ids}
        return self.model(sample, timestep, encoder_hidden_states, added_cond_kwargs=added)


def D(
    cls: str,
    branches: int,
    why: str,
    args: Inputs,
    *,
    label: str = "",
    module: str = "",
    wrap: Callable[[nn.Module], nn.Module] | None = None,
    refused: str = "",
    **config: Any,
) -> Entry:
    """One diffusers class with its configuration."""

    def build() -> nn.Module:
        owner = importlib.import_module(module or "diffusers")
        model = getattr(owner, cls)(**config)
        for name, parameter in model.named_parameters():  # zeros would mute their branch; some are never initialised
            if not parameter.any() or name.endswith(UNINITIALISED):
                nn.init.normal_(parameter, std=0.05)
        return (wrap(model) if wrap else model).eval()

    return Entry(f"diffusers/{cls}{'_' + label if label else ''}", build, args, branches, why, refused)


def ids(image: int = 16, text: int = 5, axes: int = 3) -> Callable[[nn.Module], nn.Module]:
    """Wrap a Flux-like model with its image and text position ids."""
    return lambda m: TextImage(m, img_ids=grid_ids(image, axes), txt_ids=torch.zeros(text, axes))


def fixed(kind: type[Fixed], **values: Any) -> Callable[[nn.Module], nn.Module]:
    """Wrap a model with fixed arguments."""
    return lambda m: kind(m, **values)


def lumina_rope(m: nn.Module) -> nn.Module:
    """Lumina-Next's complex rotary table."""
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

    return LuminaNext(m, image_rotary_emb=get_2d_rotary_pos_embed_lumina(8, 16, 16))


def packed(m: nn.Module) -> nn.Module:
    """MiniMax H3's packed sequence: 5 text, 8 video and 3 audio tokens."""
    index = torch.arange(16)
    return MiniMaxH3(
        m,
        timestep=torch.tensor([500.0, 0.0]),
        timestep_indices=(index < 5).long(),
        token_tags=(index >= 5).long() + (index >= 13).long(),
        position_ids=torch.stack([index, index // 4, index % 4], 1).float(),
        text_indices=index[:5],
        video_indices=index[5:13],
        audio_indices=index[13:],
    )


def framepack_ids(m: nn.Module) -> nn.Module:
    """Framepack's indices of the history frames (4x, 2x, clean) and the new frames."""
    return Framepack(
        m,
        indices_latents_history_4x=torch.arange(0, 4),
        indices_latents_history_2x=torch.arange(4, 6),
        indices_latents_clean=torch.arange(6, 8),
        indices_latents=torch.arange(8, 10),
    )


IMG = (4, 8, 8)
VID = (4, 2, 8, 8)
T2I = inputs(hidden_states=IMG, encoder_hidden_states=(5, 12), timestep=steps)
TOK = inputs(hidden_states=(16, 4), encoder_hidden_states=(5, 32), timestep=times)
TOK12 = inputs(hidden_states=(16, 4), encoder_hidden_states=(5, 12), timestep=times)
T2V = inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 16))
FLUX = dict(
    patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
)  # fmt: skip
WAN = dict(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=2,
)  # fmt: skip
COG = dict(
    num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
    num_layers=2, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=5,
)  # fmt: skip
COGVIEW = dict(
    patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
    time_embed_dim=16, condition_dim=4,
)  # fmt: skip
HUNYUAN = dict(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
    num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=12,
)  # fmt: skip
UNET3D = dict(
    block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=12, attention_head_dim=4,
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
)  # fmt: skip
CONTROL = "data-dependent control flow"

TRANSFORMERS: tuple[Entry, ...] = (
    D("AceStepTransformer1DModel", 6, "2 layers x (self attn, cross attn, mlp)",
      inputs(hidden_states=(8, 4), timestep=times, timestep_r=times, encoder_hidden_states=(5, 32),
      context_latents=(8, 8)),
      hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
      head_dim=8,
      in_channels=12, audio_acoustic_hidden_dim=4, sliding_window=4),
    D("AllegroTransformer3DModel", 6, "2 layers x (self attn, cross attn, ff)",
      inputs(hidden_states=VID, encoder_hidden_states=(5, 12), timestep=steps),
      num_attention_heads=4, attention_head_dim=8, num_layers=2, cross_attention_dim=32, caption_channels=12,
      sample_height=8, sample_width=8, sample_frames=2),
    D("AnyFlowTransformer3DModel", 6, "2 layers x (self attn, cross attn, ff)",
      inputs(hidden_states=(2, 4, 8, 8), timestep=ints(2, high=900), r_timestep=ints(2, high=900),
             encoder_hidden_states=(5, 16)),
      rope_max_seq_len=32, **WAN),
    D("AnyFlowFARTransformer3DModel", 6, "2 layers x (self attn, cross attn, ff)",
      inputs(hidden_states=(2, 4, 8, 8), timestep=ints(2, high=900), r_timestep=ints(2, high=900),
             encoder_hidden_states=(5, 16)),
      wrap=fixed(FarFrames, chunk_partition=[1, 1]), rope_max_seq_len=32, chunk_partition=(1, 1), **WAN),
    D("AuraFlowTransformer2DModel", 6, "2 joint blocks x (img, txt) + 2 single blocks: "
      "r + ff(norm(r + attn(r))) is one nested unit a stream",
      inputs(hidden_states=IMG, encoder_hidden_states=(5, 16), timestep=times),
      sample_size=8, num_mmdit_layers=2, num_single_dit_layers=2, attention_head_dim=8, num_attention_heads=4,
      joint_attention_dim=16, caption_projection_dim=32, pos_embed_max_size=256),
    D("BriaTransformer2DModel", 10, "2 double x 4 + 2 single (attn and mlp share proj_out)", TOK, wrap=ids(), **FLUX),
    D("BriaFiboTransformer2DModel", 10, "2 double x 4 + 2 single (attn and mlp share proj_out)",
      inputs(hidden_states=(16, 4), encoder_hidden_states=(5, 32), timestep=times, text_encoder_layers=(4, 5, 12)),
      wrap=fixed(LayeredText, img_ids=grid_ids(16, 3), txt_ids=torch.zeros(5, 3)), text_encoder_dim=12, **FLUX),
    D("BriaFibo2Transformer2DModel", 12, "1 refiner x 2 + 1 perceiver layer x 3 + 3 layers x 2 + 1 injected cross attn",
      inputs(hidden_states=IMG, timestep=times, encoder_hidden_states=(2, 5, 16)),
      in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=4, cap_feat_dim=16, injection_layer_ids=(1,),
      perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=2, gist_min_text_len=4,
      gist_max_text_len=16, axes_dims=(4, 2, 2), axes_lens=(64, 32, 32)),
    D("ChromaTransformer2DModel", 12, "2 approximator layers + 2 double x 4 + 2 single", TOK, wrap=ids(),
      approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=2, **FLUX),
    D("ChronoEditTransformer3DModel", 6, "2 layers x (self attn, cross attn, ff)", T2V, rope_max_seq_len=32, **WAN),
    D("CogVideoXTransformer3DModel", 7, "2 blocks x (video attn, ff; text attn, ff); " + DEAD.format("text ff addition") + " (borderline)",
      inputs(hidden_states=(3, 4, 8, 8), encoder_hidden_states=(5, 16), timestep=steps), **COG),
    D("CogView3PlusTransformer2DModel", 7,
      "2 blocks x (img attn, ff; txt attn, ff); " + DEAD.format("text ff addition") + " (borderline)",
      inputs(hidden_states=IMG, encoder_hidden_states=(5, 16), timestep=steps, original_size=(2,), target_size=(2,),
             crop_coords=(2,)),
      text_embed_dim=16, pos_embed_max_size=8, sample_size=8, **COGVIEW),
    D("CogView4Transformer2DModel", 6, "2 blocks x (img attn, ff; txt attn, ff); " + DEAD.format("text stream (2)"),
      inputs(hidden_states=IMG, encoder_hidden_states=(5, 16), timestep=steps, original_size=(2,), target_size=(2,),
             crop_coords=(2,)),
      text_embed_dim=16, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(16, 16), **COGVIEW),
    D("ConsisIDTransformer3DModel", 14, "2 face extractor layers x (attn, ff) + 2 blocks x 4 + 2 face cross attns (borderline)",
      inputs(hidden_states=(3, 4, 8, 8), encoder_hidden_states=(5, 16), timestep=steps, id_cond=(8,),
             id_vit_hidden=(2, 6, 8)),
      wrap=ConsisIDFaces, is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=8, cross_attn_num_heads=2,
      LFE_id_dim=8, LFE_vit_dim=8, LFE_depth=2, LFE_dim_head=4, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=4,
      LFE_output_dim=32, LFE_num_scale=2, **(COG | {"num_attention_heads": 6})),
    D("CosmosTransformer3DModel", 6, "2 layers x (self attn, cross attn, ff)",
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 32)),
      wrap=fixed(TextImage, padding_mask=torch.zeros(1, 1, 8, 8)), in_channels=4, out_channels=4, num_attention_heads=2,
      attention_head_dim=16, num_layers=2, mlp_ratio=2.0, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32)),
    D("DiTTransformer2DModel", 6, "3 layers x (attn, ff)",
      inputs(hidden_states=IMG, timestep=steps, class_labels=ints()),
      num_attention_heads=2, attention_head_dim=16, out_channels=8, num_layers=3, sample_size=8),
    D("DreamLiteTransformer2DModel", 1, "the outer proj_in ... proj_out residual",
      inputs(hidden_states=(16, 4, 4), encoder_hidden_states=(5, 12)),
      num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=2, norm_num_groups=4,
      cross_attention_dim=12),
    D("DualTransformer2DModel", 2, "z + mix * f0(z) + (1 - mix) * f1(z), each f with its own outer residual (borderline)",
      inputs(hidden_states=(16, 4, 4), encoder_hidden_states=(334, 12)),
      module="diffusers.models.transformers.dual_transformer_2d",
      num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=1, norm_num_groups=4,
      cross_attention_dim=12),
    D("EasyAnimateTransformer3DModel", 6,
      "2 blocks x (video attn, ff; text attn, ff); " + DEAD.format("text stream (2)"),
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 16)),
      num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=2,
      mmdit_layers=1, time_embed_dim=8, text_embed_dim=16),
    D("ErnieImageTransformer2DModel", 4, "2 layers x (attn, mlp)",
      inputs(hidden_states=IMG, timestep=steps, text_bth=(5, 12), text_lens=lambda b: torch.full((b,), 5)),
      hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=64, in_channels=4, out_channels=4,
      patch_size=2,
      text_in_dim=12, rope_axes_dim=(4, 6, 6)),
    D("FluxTransformer2DModel", 10, "2 double x 4 + 2 single (attn and mlp share proj_out)",
      inputs(hidden_states=(16, 4), encoder_hidden_states=(5, 32), pooled_projections=(16,), timestep=times),
      wrap=fixed(TextImagePooled, img_ids=grid_ids(16, 3), txt_ids=torch.zeros(5, 3)), pooled_projection_dim=16,
      **FLUX),
    D("Flux2Transformer2DModel", 10, "2 double x 4 + 2 single (fused attn and mlp)", TOK, wrap=ids(axes=4),
      timestep_guidance_channels=16, mlp_ratio=2.0, guidance_embeds=False,
      **(FLUX | {"axes_dims_rope": (4, 4, 4, 4)})),
    D("Flux3Transformer2DModel", 10, "text and image mode block x (attn, ff) + 2 single x 2 streams x (attn, ff); "
      + DEAD.format("text stream (2)") + "; z + gate * (attn + ff) read as 2 (borderline)",
      TOK12, wrap=ids(axes=4), in_channels=4, cond_in_channels=4, num_layers=1, num_single_layers=2,
      attention_head_dim=16,
      num_attention_heads=2, joint_attention_dim=12, timestep_channels=16, mlp_ratio=2.0, axes_dims_rope=(4, 4, 4, 4)),
    D("GlmImageTransformer2DModel", 6, "2 blocks x (img attn, ff; txt attn, ff); " + DEAD.format("text stream (2)"),
      inputs(hidden_states=IMG, encoder_hidden_states=(5, 12), prior_token_id=ints(16), timestep=steps,
      target_size=(2,),
             prior_token_drop=lambda b: torch.zeros(b, 16, dtype=torch.bool), crop_coords=(2,)),
      text_embed_dim=12, prior_vq_quantizer_codebook_size=32, **COGVIEW),
    D("HeliosTransformer3DModel", 6, "2 layers x (self attn, cross attn on the new frames, ff)",
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 16), latents_history_short=VID,
             indices_hidden_states=lambda b: torch.arange(2, 4).expand(b, -1),
             indices_latents_history_short=lambda b: torch.arange(2).expand(b, -1)),
      rope_dim=(4, 4, 4), **WAN),
    *(D("HiDreamImageTransformer2DModel", 12, "2 double x 4 + 2 single x (attn, ff)",
        inputs(hidden_states=IMG, timesteps=steps, encoder_hidden_states_t5=(5, 12), pooled_embeds=(8,),
               encoder_hidden_states_llama3=(2, 5, 10)),
        label=label, wrap=HiDream, refused=refused, patch_size=2, in_channels=4, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, caption_channels=(12, 10), text_emb_dim=8,
      num_routed_experts=experts,
        axes_dims_rope=(8, 4, 4), max_resolution=(16, 16), llama_layers=(0, 1, 0, 1))
      for label, experts, refused in (("dense", 0, ""), ("", 2, "data-dependent expert routing through numpy"))),
    D("HunyuanDiT2DModel", 12, "4 blocks x (self attn, cross attn, ff); the long skip is a concatenation",
      inputs(hidden_states=IMG, timestep=times, encoder_hidden_states=(5, 16), text_embedding_mask=ones(5),
             encoder_hidden_states_t5=(4, 16), text_embedding_mask_t5=ones(4)),
      num_attention_heads=4, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
      num_layers=4,
      mlp_ratio=2.0, cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8, text_len=5,
      text_len_t5=4,
      use_style_cond_and_image_meta_size=False),
    D("HunyuanImageTransformer2DModel", 12, "1 refiner layer x 2 + 2 double x 4 + 2 single",
      inputs(hidden_states=IMG, timestep=times, encoder_hidden_states=(5, 12), encoder_attention_mask=ones(5)),
      patch_size=(2, 2), rope_axes_dim=(8, 8), **HUNYUAN),
    D("HunyuanVideoTransformer3DModel", 12, "1 refiner layer x 2 + 2 double x 4 + 2 single",
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 12), encoder_attention_mask=ones(5),
             pooled_projections=(8,)),
      pooled_projection_dim=8, guidance_embeds=False, rope_axes_dim=(4, 6, 6), **HUNYUAN),
    D("HunyuanVideo15Transformer3DModel", 8, "1 refiner layer x 2 + 2 double x 4; " + DEAD.format("text stream (2)"),
      inputs(hidden_states=(4, 2, 4, 4), timestep=times, encoder_hidden_states=(5, 12), encoder_attention_mask=ones(5),
             encoder_hidden_states_2=(3, 10), encoder_attention_mask_2=ones(3), image_embeds=(2, 8)),
      refused=CONTROL, text_embed_2_dim=10, image_embed_dim=8, rope_axes_dim=(4, 6, 6), target_size=16,
      **{k: v for k, v in HUNYUAN.items() if k != "num_single_layers"}),
    D("HunyuanVideoFramepackTransformer3DModel", 12, "1 refiner layer x 2 + 2 double x 4 + 2 single",
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 12), encoder_attention_mask=ones(5),
             pooled_projections=(8,), image_embeds=(2, 8), latents_clean=VID, latents_history_2x=VID,
             latents_history_4x=(4, 4, 8, 8)),
      wrap=framepack_ids, refused="data-dependent slices (text lengths)", pooled_projection_dim=8,
      guidance_embeds=False,
      rope_axes_dim=(4, 6, 6), has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True, **HUNYUAN),
    D("Ideogram4Transformer2DModel", 4, "2 layers x (attn, ff)",
      inputs(hidden_states=(9, 4), timestep=times, encoder_hidden_states=(9, 12), position_ids=ints(9, 3),
             segment_ids=lambda b: torch.zeros(b, 9, dtype=torch.long),
             indicator=lambda b: torch.tensor([3] * 5 + [2] * 4).expand(b, -1)),
      in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, intermediate_size=64, adaln_dim=8,
      llm_features_dim=12, mrope_section=(4, 2, 2)),
    D("JoyImageEditTransformer3DModel", 6,
      "2 blocks x (img attn, mlp; txt attn, mlp); " + DEAD.format("text stream (2)"),
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 12)),
      in_channels=4, hidden_size=32, num_attention_heads=2, text_dim=12, mlp_width_ratio=2.0, num_layers=2,
      rope_dim_list=[4, 6, 6]),
    D("JoyImageEditPlusTransformer3DModel", 6, "2 blocks x (img attn, mlp; txt attn, mlp); "
      + DEAD.format("text stream (2)"),
      inputs(hidden_states=(16, 4, 1, 2, 2), timestep=steps, encoder_hidden_states=(5, 12)),
      wrap=lambda m: Shapes(m, "shape_list", [(1, 4, 4)]), in_channels=4, hidden_size=32, num_attention_heads=2,
      text_dim=12,
      mlp_width_ratio=2.0, num_layers=2, rope_dim_list=[4, 6, 6]),
    D("Kandinsky5Transformer3DModel", 8, "1 text block x (attn, ff) + 2 visual blocks x (self attn, cross attn, ff)",
      inputs(hidden_states=(2, 8, 8, 4), encoder_hidden_states=(5, 12), timestep=steps, pooled_projections=(8,)),
      wrap=fixed(Kandinsky), in_text_dim=12, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=64, num_text_blocks=1,
      num_visual_blocks=2, axes_dims=(4, 6, 6)),
    D("Kandinsky6Transformer3DModel", 20, "video and audio text block x (attn, ff) + 2 fused blocks x 2 streams x "
      "(self attn, text attn, other stream's attn, ff)",
      inputs(hidden_states=(2, 8, 8, 4), encoder_hidden_states=(5, 12), pooled_projections=(8,), timestep=steps,
             audio_hidden_states=(6, 4)),
      in_visual_dim=4, out_visual_dim=4, in_text_dim=12, in_text_dim2=8, time_dim=16, model_dim=32, ff_dim=64,
      num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 6, 6), visual_cond=False, in_audio_dim=4, out_audio_dim=4),
    D("Kandinsky6SRTransformer3DModel", 4, "2 layers x (attn, ff)",
      inputs(hidden_states=(1, 16, 16, 9), timestep=steps),
      in_visual_dim=4, out_visual_dim=4, time_dim=16, model_dim=32, ff_dim=64, num_visual_blocks=2, axes_dims=(4, 6,
      6)),
    D("Krea2Transformer2DModel", 8, "1 layerwise and 1 refiner text block x 2 + 2 layers x (attn, ff)",
      inputs(hidden_states=(16, 4), encoder_hidden_states=(5, 3, 16), timestep=times),
      wrap=fixed(TextImage, position_ids=torch.cat([torch.zeros(5, 3), grid_ids(16, 3)])), in_channels=4, num_layers=2,
      attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64, timestep_embed_dim=16,
      text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2, text_num_key_value_heads=2,
      text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6)),
    D("LatteTransformer3DModel", 10, "2 x (spatial self attn, cross attn, ff + temporal attn, ff)",
      inputs(hidden_states=(4, 3, 8, 8), timestep=steps, encoder_hidden_states=(5, 12)),
      num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, cross_attention_dim=32, sample_size=8,
      patch_size=2, norm_type="ada_norm_single", num_embeds_ada_norm=1000, norm_elementwise_affine=False,
      caption_channels=12, video_length=3, attention_bias=True, activation_fn="gelu-approximate"),
    D("LongCatAudioDiTTransformer", 10, "4 text ConvNeXt blocks + 2 layers x (self attn, cross attn, ff); "
      "the long skip starts at the first unit's fork",
      inputs(hidden_states=(8, 4), encoder_hidden_states=(5, 12), encoder_attention_mask=ones(5), timestep=times,
             latent_cond=(8, 4)),
      dit_dim=32, dit_depth=2, dit_heads=4, dit_text_dim=12, latent_dim=4, ff_mult=2.0),
    D("LongCatImageTransformer2DModel", 10, "2 double x 4 + 2 single (attn and mlp share proj_out)", TOK, wrap=ids(),
      pooled_projection_dim=16, **FLUX),
    D("LTXVideoTransformer3DModel", 6, "2 layers x (self attn, cross attn, ff)",
      inputs(hidden_states=(32, 4), encoder_hidden_states=(5, 12), timestep=steps, encoder_attention_mask=ones(5)),
      wrap=fixed(TextMaskImage, num_frames=2, height=4, width=4), in_channels=4, out_channels=4, num_attention_heads=2,
      attention_head_dim=16, cross_attention_dim=32, num_layers=2, caption_channels=12),
    D("LTX2VideoTransformer3DModel", 16, "2 layers x 2 streams x (self attn, text attn, other stream's attn, ff)",
      inputs(hidden_states=(32, 4), audio_hidden_states=(6, 4), encoder_hidden_states=(5, 12),
             audio_encoder_hidden_states=(5, 12), timestep=steps),
      wrap=fixed(AudioVideo, num_frames=2, height=4, width=4, audio_num_frames=6), in_channels=4, out_channels=4,
      num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32, audio_in_channels=4, audio_out_channels=4,
      audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16, num_layers=2,
      caption_channels=12),
    D("Lumina2Transformer2DModel", 8, "1 noise and 1 context refiner x 2 + 2 layers x (attn, ff)",
      inputs(hidden_states=IMG, timestep=times, encoder_hidden_states=(5, 12),
             encoder_attention_mask=ones(5, dtype=torch.bool)),
      refused="data-dependent text lengths (tolist)", sample_size=8, in_channels=4, hidden_size=32, num_layers=2,
      num_refiner_layers=1, num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(4, 2, 2),
      axes_lens=(32, 16, 16), cap_feat_dim=12),
    D("LuminaNextDiT2DModel", 4, "2 layers x (self and cross attn with one output projection, ff)",
      inputs(hidden_states=IMG, timestep=times, encoder_hidden_states=(5, 16), encoder_mask=ones(5)),
      wrap=lumina_rope, sample_size=8, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=4,
      multiple_of=16,
      cross_attention_dim=16),
    D("MiniMaxH3Transformer3DModel", 6, "1 text refiner block x 2 + 2 layers x (attn, ff)",
      inputs(hidden_states=(8, 16), audio_hidden_states=(3, 4), encoder_hidden_states=(5, 12)),
      wrap=packed, num_attention_heads=2, attention_head_dim=16, hidden_size=32, num_layers=2, num_refiner_layers=1,
      ffn_dim=64, in_channels=4, audio_in_channels=4, text_dim=12, freq_dim=16, time_embed_hidden_dim=16,
      time_embed_dim=16,
      rope_freq_dim=2),
    D("MiniMaxMusic3Transformer1DModel", 6, "pre- and postprocessing conv + 2 layers x (attn, ff)",
      inputs(hidden_states=(4, 8), timestep=times, encoder_hidden_states=(8, 8)),
      in_channels=4, condition_dim=8, num_layers=2, num_attention_heads=4, attention_head_dim=8, ff_inner_dim=64,
      rotary_dim=4, fourier_embedding_dim=16),
    D("MiniMaxMusic3RVQDepthDecoder", 4, "2 layers x (attn, mlp)", inputs(inputs_embeds=(6, 32)),
      module="diffusers.models.transformers.minimax_music3_rvq_depth_decoder", hidden_size=32, num_layers=2,
      num_attention_heads=4, intermediate_size=64, audio_vocab_size=16, num_codebooks=3),
    D("MochiTransformer3DModel", 6, "2 blocks x (video attn, ff; text attn, ff), the last is context_pre_only",
      inputs(hidden_states=VID, encoder_hidden_states=(5, 16), timestep=steps,
             encoder_attention_mask=ones(5, dtype=torch.bool)),
      refused="data-dependent text lengths (nonzero)", num_attention_heads=2, attention_head_dim=8, num_layers=2,
      pooled_projection_dim=16, in_channels=4, text_embed_dim=16, time_embed_dim=8),
    D("MotifVideoTransformer3DModel", 10, "2 double x 4 + 2 single (attn and mlp share proj_out)",
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 12), encoder_attention_mask=ones(5)),
      in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
      mlp_ratio=2.0, text_embed_dim=12, rope_axes_dim=(4, 6, 6)),
    *(D("NucleusMoEImageTransformer2DModel", 4, "2 layers x (attn, mlp)", TOK12, label=label, refused=refused,
        wrap=lambda m: Shapes(m, "img_shapes", [(1, 4, 4)]), patch_size=1, in_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6), mlp_ratio=12.0,
        moe_enabled=not label, dense_moe_strategy="all_moe", num_experts=2, moe_intermediate_dim=16,
      capacity_factors=1.0)
      for label, refused in (("dense", ""), ("", "data-dependent split by expert (tolist)"))),
    D("OmniGenTransformer2DModel", 4, "2 layers x (attn, mlp)",
      inputs(hidden_states=IMG, timestep=times, input_ids=ints(5, high=32), attention_mask=ones(22, 22),
             position_ids=lambda b: torch.arange(22).expand(b, -1)),
      wrap=OmniGen, refused=CONTROL + " (rotary scaling by the largest position)", in_channels=4, hidden_size=32,
      num_attention_heads=4, num_key_value_heads=4, intermediate_size=64, num_layers=2, pad_token_id=0, vocab_size=32,
      rope_scaling={"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}, pos_embed_max_size=8, time_step_dim=16),
    D("OvisImageTransformer2DModel", 10, "2 double x 4 + 2 single (attn and mlp share proj_out)", TOK, wrap=ids(),
      **(FLUX | {"out_channels": 4})),
    D("PixArtTransformer2DModel", 9, "3 layers x (self attn, cross attn, ff)", T2I,
      num_attention_heads=2, attention_head_dim=16, num_layers=3, sample_size=8, cross_attention_dim=32,
      caption_channels=12, use_additional_conditions=False),
    D("PriorTransformer", 4, "2 layers x (attn, ff)",
      inputs(hidden_states=(16,), timestep=steps, proj_embedding=(16,), encoder_hidden_states=(5, 16)),
      num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=16, num_embeddings=5),
    D("PRXTransformer2DModel", 4, "2 layers x (attn, mlp)",
      inputs(hidden_states=IMG, timestep=times, encoder_hidden_states=(5, 12)),
      in_channels=4, context_in_dim=12, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8]),
    D("QwenImageTransformer2DModel", 6, "2 blocks x (img attn, mlp; txt attn, mlp); " + DEAD.format("text stream (2)"),
      TOK12, wrap=lambda m: Shapes(m, "img_shapes", [(1, 4, 4)]), in_channels=4, out_channels=1, num_layers=2,
      attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6)),
    D("QwenImage21Transformer2DModel", 4, "2 layers x (attn, mlp)", TOK12, wrap=Qwen21,
      refused="data-dependent image slots (repeat_interleave, nonzero)", in_channels=4, out_channels=4, num_layers=2,
      attention_head_dim=16, num_attention_heads=2, context_in_dim=12, mlp_ratio=2, axes_dims_rope=(4, 6, 6)),
    D("SanaTransformer2DModel", 6, "2 layers x (linear attn, cross attn, glu conv)", T2I,
      in_channels=4, out_channels=4, num_attention_heads=4, attention_head_dim=8, num_layers=2,
      num_cross_attention_heads=4,
      cross_attention_head_dim=8, cross_attention_dim=32, caption_channels=12, sample_size=8),
    D("SanaVideoTransformer3DModel", 6, "2 layers x (linear attn, cross attn, glu conv)",
      inputs(hidden_states=VID, encoder_hidden_states=(5, 12), timestep=steps),
      in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
      num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=12,
      sample_size=8, rope_max_seq_len=32),
    D("SanaWMTransformer3DModel", 6, "2 layers x (attn, cross attn, glu conv)",
      inputs(hidden_states=(4, 2, 4, 4), timestep=ints(1, 2, high=900), encoder_hidden_states=(1, 5, 12),
             encoder_attention_mask=ones(5)),
      in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
      caption_channels=12, image_size=32),
    D("SanaWMLTX2RefinerTransformer3DModel", 6, "2 layers x (self attn, cross attn, ff)",
      inputs(hidden_states=(32, 4), encoder_hidden_states=(5, 12), timestep=steps),
      wrap=Refiner, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
      audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
      audio_cross_attention_dim=16, num_layers=2, caption_channels=12),
    D("SD3Transformer2DModel", 10, "3 blocks x (img attn, ff; txt attn, ff), the last is context_pre_only",
      inputs(hidden_states=IMG, encoder_hidden_states=(5, 32), pooled_projections=(16,), timestep=steps),
      sample_size=8, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=4, joint_attention_dim=32,
      caption_projection_dim=32, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=16),
    D("SD3Transformer2DModel", 7, "2 blocks x (img attn, ff; txt attn, ff), the last context_pre_only, + 1 parallel second "
      "img attn", inputs(hidden_states=IMG, encoder_hidden_states=(5, 32), pooled_projections=(16,), timestep=steps),
      label="dual_attention", sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
      joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=16, out_channels=4,
      pos_embed_max_size=16,
      dual_attention_layers=(0,), qk_norm="rms_norm"),
    D("SkyReelsV2Transformer3DModel", 6, "2 layers x (self attn, cross attn, ff)", T2V, rope_max_seq_len=32, **WAN),
    D("StableAudioDiTModel", 8, "pre- and postprocessing conv + 2 layers x (self attn, cross attn, ff)",
      inputs(hidden_states=(4, 8), timestep=times, encoder_hidden_states=(5, 10), global_hidden_states=(1, 12)),
      sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
      num_key_value_attention_heads=2, out_channels=4, cross_attention_dim=16, time_proj_dim=16,
      global_states_input_dim=12,
      cross_attention_input_dim=10),
    D("StableAudio3DiTModel", 8, "pre- and postprocessing conv + 2 layers x (self attn, cross attn, ff)",
      inputs(hidden_states=(4, 8), timestep=times, encoder_hidden_states=(5, 12), global_hidden_states=(10,),
             local_add_cond=(6, 8)),
      module="diffusers.models.transformers.transformer_stable_audio3", io_channels=4, embed_dim=32, depth=2,
      num_heads=4,
      cond_token_dim=12, global_cond_dim=10, local_add_cond_dim=6, timestep_features_dim=16, num_memory_tokens=2),
    D("T5FilmDecoder", 6, "2 layers x (self attn, cross attn, ff)",
      inputs(encodings=(5, 32), encodings_mask=ones(5), decoder_input_tokens=(6, 8), decoder_noise_time=times),
      wrap=FilmDecoder, input_dims=8, targets_length=6, d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64),
    D("Transformer2DModel", 1, "the outer proj_in ... proj_out residual",
      inputs(hidden_states=(16, 4, 4), encoder_hidden_states=(5, 12)),
      num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=2, norm_num_groups=4,
      cross_attention_dim=12),
    D("Transformer2DModel", 6, "2 layers x (self attn, cross attn, ff), no outer residual",
      inputs(hidden_states=ints(16), encoder_hidden_states=(5, 12)), label="vectorized",
      num_attention_heads=2, attention_head_dim=8, num_layers=2, num_vector_embeds=10, sample_size=4,
      cross_attention_dim=12),
    D("TransformerTemporalModel", 1, "the outer proj_in ... proj_out residual", inputs(hidden_states=(3, 16, 4, 4)),
      wrap=Frames, num_attention_heads=2, attention_head_dim=8, in_channels=16, num_layers=2, norm_num_groups=4),
    D("WanTransformer3DModel", 6, "2 layers x (self attn, cross attn, ff)", T2V, rope_max_seq_len=32, **WAN),
    D("WanTransformer3DModel", 6, "2 layers x (self attn, text and image cross attn, ff)",
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 16), encoder_hidden_states_image=(3, 8)),
      label="i2v", rope_max_seq_len=32, image_dim=8, added_kv_proj_dim=24, **WAN),
    D("WanAnimateTransformer3DModel", 10, "2 layers x (self attn, cross attn, ff) + 2 face adapters + 2 motion encoder "
      "blocks, whose skip is a fixed blur and one conv (borderline)",
      inputs(hidden_states=(12, 2, 8, 8), timestep=steps, encoder_hidden_states=(5, 16),
      encoder_hidden_states_image=(3, 8),
             pose_hidden_states=(4, 1, 8, 8), face_pixel_values=(3, 4, 16, 16)),
      rope_max_seq_len=32, latent_channels=4, image_dim=8, added_kv_proj_dim=24, motion_encoder_size=16,
      motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8,
      face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=1, motion_encoder_batch_size=64,
      **(WAN | {"in_channels": 12})),
    D("WanVACETransformer3DModel", 12, "2 layers and 2 control blocks x (self attn, cross attn, ff); "
      "adding the control hints is no unit (borderline)",
      inputs(hidden_states=VID, timestep=steps, encoder_hidden_states=(5, 16), control_hidden_states=(6, 2, 8, 8)),
      rope_max_seq_len=32, vace_layers=[0, 1], vace_in_channels=6, **WAN),
    D("ZImageTransformer2DModel", 8, "1 noise and 1 context refiner x 2 + 2 layers x (attn, ff)",
      inputs(x=(4, 1, 8, 8), t=times, cap_feats=(5, 12)), wrap=Listed, in_channels=4, dim=32, n_layers=2,
      n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12, axes_dims=[4, 6, 6], axes_lens=[128, 32, 32]),
)  # fmt: skip

UNETS: tuple[Entry, ...] = (
    D("UNet2DModel", 12, "resnets 1+1, 2, 2+2 and attns 0+1, 1, 2+0",
      inputs(sample=(3, 16, 16), timestep=steps), sample_size=16, block_out_channels=(16, 32), layers_per_block=1,
      down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
      norm_num_groups=8, attention_head_dim=8),
    D("UNet2DModel", 14, "resnets 1+1, 2, 2+2, attns 0+1, 1, 0+2 and one resampling resnet each way, whose skip is a pool or "
      "an upsampling (borderline)",
      inputs(sample=(3, 16, 16), timestep=steps), label="resample", sample_size=16, block_out_channels=(16, 32),
      layers_per_block=1, down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"), norm_num_groups=8,
      up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"), attention_head_dim=8),
    D("UNet2DConditionModel", 18, "resnets 2+2, 2, 3+3 and transformers 2+0, 1, 0+3 (one outer residual each)",
      inputs(sample=(4, 8, 8), timestep=steps, encoder_hidden_states=(5, 12)), sample_size=8, block_out_channels=(16,
      32),
      down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
      norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2),
    D("UNet2DConditionModel", 12, "resnets 1+1, 2, 2+2 and transformers 0+1, 1, 2+0 (one outer residual each)",
      inputs(sample=(4, 8, 8), timestep=steps, encoder_hidden_states=(5, 12), text_embeds=(8,), time_ids=(6,)),
      label="sdxl", wrap=AddedConditions, sample_size=8, block_out_channels=(16, 32), layers_per_block=1,
      down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
      norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2, transformer_layers_per_block=(1, 2),
      use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=4,
      projection_class_embeddings_input_dim=32),
    D("UNet1DModel", 36, "residual convs 3+3+3, 6, 3+3+3 and attns 0+0+3, 6, 3+0+0",
      inputs(sample=(2, 64), timestep=times), sample_size=64, time_embedding_dim=16, extra_in_channels=16,
      block_out_channels=(32, 32, 64)),
    D("UNet1DModel", 8, "temporal resnets 2+2, 2, 2", inputs(sample=(6, 16), timestep=steps), label="temporal",
      sample_size=16, in_channels=6, out_channels=6, time_embedding_type="positional", use_timestep_embedding=True,
      freq_shift=1.0, flip_sin_to_cos=False, act_fn="swish", block_out_channels=(8, 16), layers_per_block=1,
      down_block_types=("DownResnetBlock1D", "DownResnetBlock1D"), up_block_types=("UpResnetBlock1D",),
      mid_block_type="MidResTemporalBlock1D", out_block_type="OutConv1DBlock", downsample_each_block=False),
    D("UNet3DConditionModel", 25, "input temporal transformer; (resnet, temporal conv) 1+1, 2, 2+2 and (transformer, temporal "
      "transformer) 1+0, 1, 0+2", inputs(sample=(4, 2, 8, 8), timestep=steps, encoder_hidden_states=(5, 12)), **UNET3D),
    D("I2VGenXLUNet", 27, "UNet3DConditionModel's 25 + image latents' temporal encoder (attn, ff)",
      inputs(sample=(4, 2, 8, 8), timestep=steps, fps=ints(), image_latents=(4, 2, 8, 8), image_embeddings=(12,),
             encoder_hidden_states=(5, 12)), **UNET3D),
    D("UNetMotionModel", 19, "resnets 1+1, 2, 2+2; transformers 1+0, 1, 0+2; motion modules 1+1, 1, 2+2 (one residual each)",
      inputs(sample=(4, 2, 8, 8), timestep=steps, encoder_hidden_states=(5, 12)), wrap=MotionFrames,
      block_out_channels=(16, 32), layers_per_block=1, down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
      up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"), norm_num_groups=4, cross_attention_dim=12,
      num_attention_heads=2, motion_num_attention_heads=2),
    D("UNetSpatioTemporalConditionModel", 20,
      "(spatial resnet, blended temporal resnet) 1+1, 2, 2+2 and transformers 1+0, 1, "
      "0+2 (borderline)",
      inputs(sample=(2, 8, 8, 8), timestep=steps, encoder_hidden_states=(1, 12), added_time_ids=(3,)),
      block_out_channels=(32, 64), layers_per_block=1,
      down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
      up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), addition_time_embed_dim=8,
      projection_class_embeddings_input_dim=24, cross_attention_dim=12, num_attention_heads=(2, 4)),
    D("Kandinsky3UNet", 68, "2 x (level without attention: 4 resnets; 3 levels x (4 resnets, 2 cross and 1 self attention "
      "block of (attn, ff)))",
      inputs(sample=(4, 16, 16), timestep=steps, encoder_hidden_states=(5, 12), encoder_attention_mask=ones(5)),
      time_embedding_dim=16, groups=4, attention_head_dim=8, layers_per_block=2, block_out_channels=(16, 16, 32, 32),
      cross_attention_dim=16, encoder_hid_dim=12),
    D("StableCascadeUNet", 8, "4 level passes x (resblock, attn)",
      inputs(sample=(4, 8, 8), timestep_ratio=times, clip_text_pooled=(1, 12)),
      in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16, block_out_channels=(16, 16),
      num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1),
      clip_text_pooled_in_channels=12, clip_seq=2),
    D("UVit2DModel", 12, "2 x (ConvNeXt block, 2 cross attns) + 2 layers x (self attn, cross attn, ff)",
      inputs(input_ids=ints(4, 4), encoder_hidden_states=(5, 12), pooled_text_emb=(8,), micro_conds=(5,)),
      hidden_size=32, cond_embed_dim=8, micro_cond_encode_dim=4, micro_cond_embed_dim=20, encoder_hidden_size=12,
      vocab_size=32, codebook_size=16, in_channels=32, block_out_channels=32, num_res_blocks=1, block_num_heads=4,
      num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, sample_size=4),
    D("DreamLiteUNetModel", 19, "resnets 1+1+1, 2, 2+2+2 and transformers 1+1+1, 1, 2+2+0 (one outer residual each)",
      inputs(sample=(4, 8, 8), timestep=steps, encoder_hidden_states=(5, 12)), sample_size=8, layers_per_block=1,
      block_out_channels=(16, 32, 32), norm_num_groups=4, cross_attention_dim=12, attention_head_dim=2, ff_mult=2),
)  # fmt: skip

ENTRIES: tuple[Entry, ...] = TRANSFORMERS + UNETS
