"""timm architectures with the number of residual branches read off their sources (timm 1.0.31)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.entry import Entry


def _timm(name: str, branches: int, why: str, size: int = 64, **options: Any) -> Entry:
    """The registered timm model ``name`` with ten classes, on square images of ``size``."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=10, **options).eval()

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))}

    return Entry(f"timm/{name}", build, inputs, branches, why)


def _sized(name: str, branches: int, why: str, size: int = 64, **options: Any) -> Entry:
    """As ``_timm``, for models whose constructor must be told the image size."""
    return _timm(name, branches, why, size, img_size=size, **options)


_SLIM: dict[str, Any] = {"embed_dim": 96, "num_heads": 3}

ENTRIES: tuple[Entry, ...] = (
    # beit
    _sized("beit_base_patch16_224", 8, "4 layers x (attn, mlp)", depth=4, **_SLIM),
    # byoanet: a bottleneck whose 3x3 conv is self-attention is still one unit
    _sized("botnet26t_256", 8, "2+2+2+2 bottlenecks, 3 of them with self-attention"),
    _timm("eca_halonext26ts", 8, "2+2+2+2 bottlenecks, 3 of them with halo attention", 256),
    _timm("haloregnetz_b", 18, "2+6+12+2 blocks less the first of each of 4 stages (no shortcut there)", 224),
    _timm("lambda_resnet26t", 8, "2+2+2+2 bottlenecks, 3 of them with lambda layers"),
    # byobnet: in rep blocks the batch norm path is the skip; strided or widening ones have none
    _timm("gernet_s", 14, "1+3 basic blocks, 7+2+1 bottlenecks"),
    _timm("repvgg_a0", 17, "2+4+14+1 rep blocks less the first of each of 4 stages (no bn path there)"),
    _timm("gcresnext26ts", 8, "2+2+2+2 bottlenecks"),
    _timm("bat_resnext26ts", 8, "2+2+2+2 bottlenecks; the sum in BAT lies inside them", 256),
    _timm("regnetz_b16", 18, "2+6+12+2 blocks less the first of each of 4 stages (no shortcut there)"),
    _timm("regnetz_d8", 21, "3+6+12+3 blocks less the first of 3 stages (no shortcut there)"),
    _timm("mobileone_s0", 35, "1+7+9+0 (dw, pw) pairs with bn path, none in first pairs but stage 1's pw"),
    _sized("resnet50_clip", 16, "3+4+6+3 bottlenecks; attention pool has no skip"),
    _timm("test_byobnet", 4, "one edge, dark, basic and bottleneck block each"),
    # cait
    _sized("cait_xxs24_224", 52, "24 layers x (attn, mlp), 2 class layers x (attn, mlp)"),
    # coat
    _sized("coat_lite_mini", 24, "4x2 serial blocks x (conv position, attn, mlp)"),
    _sized("coat_tiny", 78, "8 serial x 3; 6 parallel x 3 scales x (conv position, attn, mlp) (borderline)"),
    # convit, convmixer, convnext
    _sized("convit_tiny", 24, "12 layers x (attn, mlp)"),
    _timm("convmixer_768_32", 32, "32 depthwise residuals", 56),
    _timm("convnext_atto", 12, "2+2+6+2 blocks"),
    _timm("convnextv2_atto", 12, "2+2+6+2 blocks; the sum in GRN lies inside them"),
    # cpubone
    _timm("cpubone_nano", 9, "1+2 blocks x (attn, mlp, local); other stages hold one strided block each"),
    # crossvit
    _sized("crossvit_9_240", 30, "3 multi-scale blocks x ((1+3) layers x 2 + 2 cross attentions)", 120),
    # csatv2
    _timm("csatv2", 22, "2+2+6+4 conv blocks, 2+2 transformer blocks x (attn, mlp)", 128),
    # cspnet: partial stages concatenate, only their inner blocks add
    _timm("cspresnet50", 13, "3+3+5+2 bottlenecks"),
    _timm("darknet17", 5, "5 dark blocks"),
    _timm("cs3darknet_s", 9, "1+3+4+1 dark blocks"),
    _timm("cs3edgenet_x", 24, "3+7+11+3 edge blocks"),
    # cspnext
    _timm("cspnext_s", 5, "1+2+2 blocks; the last stage adds no identity"),
    # davit
    _timm("davit_tiny", 48, "1+1+3+1 (spatial, channel) pairs x (conv position, attn, conv position, mlp)"),
    # deepseek_vit
    _sized("deepseek_vit_412m", 6, "3 layers x (attn, mlp)", 56, depth=3, **_SLIM),
    # deit
    _sized("deit_tiny_patch16_224", 24, "12 layers x (attn, mlp)"),
    _sized("deit_tiny_distilled_patch16_224", 24, "12 layers x (attn, mlp); the mean of two heads is no unit"),
    _sized("deit3_small_patch16_224", 8, "4 layers x (attn, mlp)", depth=4),
    # densenet
    _timm("densenet121", 0, "dense blocks concatenate"),
    # dla
    _timm("dla34", 12, "2+4+4+2 basic blocks"),
    _timm("dla46x_c", 12, "2+4+4+2 bottlenecks"),
    _timm("dla60_res2net", 16, "2+4+8+2 Res2Net bottlenecks"),
    _timm("dla102", 42, "2+8+16+2 bottlenecks, 14 residual roots"),
    # dpn
    _timm("dpn48b", 16, "3+4+6+3 dual path blocks, their residual halves"),
    # edgenext: a split-transpose block's attention sum lies inside the block's own branch
    _timm("edgenext_xx_small", 12, "2+2+6+2 blocks"),
    _timm("edgenext_small_rw", 18, "3+3+9+3 blocks"),
    # efficientformer
    _timm("efficientformer_l1", 30, "3+2+6+4 blocks x (mixer, mlp); 14 mixers only pool and scale (borderline)", 224),
    # efficientformer_v2
    _sized("efficientformerv2_s0", 19, "2+2+6+4 mlps, 2+2 attns, 1 attn downsampling beside a conv (borderline)"),
    # efficientnet
    _timm("mnasnet_small", 10, "DS 1 + IR 0+1+3+2+2+1 with equal channels and stride 1"),
    _timm("mobilenetv1_100", 0, "no skips"),
    _timm("mobilenetv2_035", 10, "IR 0+1+2+3+2+2+0 with equal channels and stride 1"),
    _timm("fbnetc_100", 15, "IR with equal channels and stride 1"),
    _timm("efficientnet_b0", 9, "IR 0+1+1+2+2+3+0 with equal channels and stride 1"),
    _timm("efficientnet_es", 12, "4 edge and 8 inverted residuals with equal channels and stride 1"),
    _timm("efficientnet_cc_b0_4e", 9, "4 inverted and 5 conditional-conv residuals with skip"),
    _timm("tf_efficientnetv2_b0", 15, "2 edge and 13 inverted residuals with skip"),
    _timm("mixnet_s", 11, "DS 1 + IR 1+3+2+2+2 with equal channels and stride 1"),
    _timm("tinynet_e", 3, "IR with equal channels and stride 1"),
    _timm("mobilenet_edgetpu_v2_xs", 13, "4 edge and 9 inverted residuals with skip"),
    _timm("test_efficientnet", 0, "every block strides or widens"),
    # efficientvim: z + a * (f(z) - z)
    _timm("efficientvim_m1", 28, "6 blocks x (dwconv, mixer, dwconv, ffn), 2 downsamplings x 2 dwconvs"),
    # efficientvit_mit, efficientvit_msra
    _timm("efficientvit_b0", 11, "1 in stem, 1+1 MBConv, 2+2 blocks x (attn, MBConv)"),
    _timm("efficientvit_l1", 21, "1 in stem, 1+1+6 conv blocks, 6 blocks x (attn, MBConv)"),
    _sized("efficientvit_m0", 38, "1+2+3 blocks x (dw, ffn, attn, dw, ffn), 2 downsamplings x 2 x (dw, ffn)"),
    # eva
    _sized("eva02_tiny_patch14_224", 24, "12 layers x (attn, mlp)", 56),
    _sized("eva02_enormous_patch14_clip_224", 8, "4 post-norm layers x (attn, mlp)", 56, depth=4, **_SLIM),
    _sized("vit_pe_core_tiny_patch16_384", 25, "12 layers x (attn, mlp), mlp of the attention pool"),
    _sized("vit_small_patch16_rope_mixed_224", 8, "4 layers x (attn, mlp)", depth=4),
    _sized("vit_tiny_patch16_dinov3_qkvb", 24, "12 layers x (attn, mlp)"),
    # fasternet
    _timm("fasternet_t0", 13, "1+2+8+2 blocks"),
    # fastvit: MobileOne blocks with a bn path are units where no RepMixer holds them
    _timm("fastvit_t8", 24, "2+2+4+2 blocks x (mixer, mlp), 4 pointwise rep blocks with bn path"),
    _timm("fastvit_sa12", 29, "2+2+6+2 blocks x (mixer, mlp), 1 position conv, 4 pointwise rep blocks with bn path"),
    _timm(
        "fastvit_mci3",
        19,
        "1+1+2+1+1 blocks x (mixer, mlp), 2 position convs, 5 pointwise rep blocks with bn path",
        embed_dims=(32, 64, 128, 256, 512),
        layers=(1, 1, 2, 1, 1),
    ),
    # focalnet
    _timm("focalnet_tiny_srf", 24, "2+2+6+2 blocks x (modulation, mlp)"),
    # gcvit
    _sized("gcvit_xxtiny", 35, "2+2+6+2 blocks x (attn, mlp), MBConv: 1 stem, 3 downsamplings, 3+2+1+1 global query"),
    # gemma4_vit
    _sized("gemma4_vit_167m", 6, "3 layers x (attn, mlp)", 96, depth=3, **_SLIM),
    # ghostnet: 11 of 16 blocks have an identity skip, the others a skip of two convs
    _timm("ghostnet_050", 11, "11 of 16 blocks with identity skip"),
    _timm("ghostnetv2_100", 11, "11 of 16 blocks with identity skip"),
    _timm("ghostnetv3_050", 21, "11 of 16 blocks; 5 others x 2 ghost modules with bn path (borderline)"),
    # hardcorenas
    _timm("hardcorenas_a", 5, "IR with equal channels and stride 1"),
    # hgnet
    _timm("hgnet_tiny", 1, "stages of 1+1+2+1 blocks, all but the first of each add"),
    _timm("hgnetv2_b4", 2, "stages of 1+1+3+1 blocks, all but the first of each add"),
    # hiera
    _sized("hiera_tiny_224", 24, "1+2+7+2 layers x (attn, mlp)"),
    _sized("hiera_small_abswin_256", 32, "1+2+11+2 layers x (attn, mlp); 3 skips are max and mean pools (borderline)"),
    # hieradet_sam2
    _timm("sam2_hiera_tiny", 24, "1+2+7+2 layers x (attn, mlp)", 128),
    # hrnet
    _timm("hrnet_w18_small", 23, "1 bottleneck, 2x(2+3+4) basic blocks, 4 bottlenecks in head; fusions are no units"),
    # iformer
    _timm("iformer_t", 26, "2+2+16+6 residual blocks"),
    # inception_next, inception_resnet_v2, inception_v3, inception_v4
    _timm("inception_next_atto", 12, "2+2+6+2 blocks"),
    _timm("inception_resnet_v2", 40, "10 block35, 20 block17, 10 block8", 96),
    _timm("inception_v3", 0, "inception blocks concatenate", 96),
    _timm("inception_v4", 0, "inception blocks concatenate", 96),
    # lcnetv2
    _timm("lcnetv2_small", 1, "only the second block of the last stage has a shortcut"),
    # levit
    _sized("levit_128s", 20, "2+3+4 blocks x (attn, mlp), 2 downsamplings x mlp"),
    _sized("levit_conv_128s", 20, "2+3+4 blocks x (attn, mlp), 2 downsamplings x mlp"),
    # lowformer
    _timm("lowformer_b0", 21, "3+4 blocks x (attn, mlp, local); other stages hold one strided block each"),
    _timm("lowformer_e1", 8, "4+4 blocks, local only; other stages hold one strided block each"),
    # mambaout
    _timm("mambaout_femto", 18, "3+3+9+3 gated conv blocks"),
    # maxxvit
    _sized("coatnet_pico_rw_224", 19, "2+3 MBConv, 5+2 layers x (attn, mlp)"),
    _sized("coatnext_nano_rw_224", 25, "3+4 ConvNeXt blocks, 6+3 layers x (attn, mlp)"),
    _sized("maxvit_pico_rw_256", 55, "2+2+5+2 blocks x (MBConv, block attn, mlp, grid attn, mlp)"),
    _sized("maxxvitv2_nano_rw_256", 21, "1+2+3+1 blocks x (ConvNeXt, grid attn, mlp)"),
    _sized("maxvit_tiny_pm_256", 44, "2+2+5+2 blocks x (MBConv, MBConv, joint block and grid attn, mlp)"),
    # metaformer
    _timm("poolformer_s12", 24, "2+2+6+2 blocks x (pooling behind a norm, mlp)"),
    _timm("convformer_s18", 36, "3+3+9+3 blocks x (separable conv, mlp)"),
    _timm("caformer_s18", 36, "3+3 blocks x (separable conv, mlp), 9+3 blocks x (attn, mlp)"),
    # mlp_mixer
    _sized("mixer_s32_224", 16, "8 blocks x (tokens, channels)"),
    _sized("resmlp_12_224", 24, "12 blocks x (tokens, channels)"),
    _sized("gmlp_ti16_224", 30, "30 spatial gating blocks"),
    # mobilenetv3
    _timm("mobilenetv3_small_050", 7, "IR 0+1+2+2+2 with equal channels and stride 1"),
    _timm("mobilenetv3_large_075", 10, "DS 1 + IR 1+2+3+1+2 with equal channels and stride 1"),
    _timm("fbnetv3_b", 23, "2 DS and 21 IR with equal channels and stride 1"),
    _timm("lcnet_035", 0, "no skips"),
    _timm("mobilenetv4_conv_small_035", 10, "universal IR 5+5 with equal channels and stride 1"),
    _timm("mobilenetv4_hybrid_medium_075", 27, "19 universal IR with skip, 8 attns"),
    # mobilenetv5
    _timm("mobilenetv5_base", 35, "2 edge residuals and 20 universal IR with skip, 13 attns", channel_multiplier=0.25),
    # mobilevit
    _timm("mobilevit_xxs", 21, "3 bottlenecks with skip, 2+4+3 layers x (attn, mlp)"),
    _timm("mobilevitv2_050", 19, "1 bottleneck with skip, 2+4+3 layers x (attn, mlp)"),
    # mvitv2
    _sized("mvitv2_tiny", 20, "1+2+5+2 layers x (attn, mlp); pooled-query sums lie inside attn"),
    # naflexvit
    _timm("naflexvit_base_patch16_gap", 8, "4 layers x (attn, mlp)", depth=4, **_SLIM),
    _timm("naflexvit_base_patch16_map", 9, "4 layers x (attn, mlp), mlp of the attention pool", depth=4, **_SLIM),
    # nasnet, pnasnet: a cell is a graph of sums, few of them of a tensor and its own image
    _timm("nasnetalarge", 24, "18 cells x (z + sep(z)), 3+1+1+1 pooled skips in strided cells (borderline)", 96),
    _timm("pnasnet5large", 12, "4 strided cells x 3 pooled skips; unstrided max pools are no skips (borderline)", 96),
    # nest
    _sized("nest_tiny", 24, "2+2+8 layers x (attn, mlp)"),
    # nextvit
    _timm("nextvit_small", 44, "16 conv blocks x (attn, mlp), 4 transformer blocks x (attn, conv attn, mlp)"),
    # nfnet
    _timm("eca_nfnet_l0", 12, "1+2+6+3 blocks"),
    _timm("nf_regnet_b0", 16, "1+3+6+6 blocks"),
    # pit
    _sized("pit_ti_224", 24, "2+6+4 layers x (attn, mlp)"),
    # pvt_v2
    _timm("pvt_v2_b0", 16, "2+2+2+2 layers x (attn, mlp)"),
    _timm("pvt_v2_b2_li", 32, "3+4+6+3 layers x (linear attn, mlp)"),
    # qwen3_vit
    _sized("qwen3_vit_88m", 6, "3 layers x (attn, mlp)", depth=3, **_SLIM),
    # rdnet
    _timm("rdnet_tiny", 0, "dense blocks concatenate"),
    # regnet
    _timm("regnetx_002", 13, "1+1+4+7 bottlenecks"),
    _timm("regnety_002", 13, "1+1+4+7 bottlenecks"),
    _timm("regnetz_005", 17, "21 bottlenecks less the first of each of 4 stages (no shortcut there)"),
    _timm("regnetv_040", 22, "2+6+12+2 pre-activation bottlenecks"),
    # repghost: as ghostnet
    _timm("repghostnet_050", 21, "11 of 16 blocks; 5 others x 2 ghost modules with bn path (borderline)"),
    # repvit
    _timm("repvit_m0_9", 49, "23 blocks x (rep depthwise conv, mlp), 3 downsamplings x mlp"),
    # res2net, resnest
    _timm("res2net50_14w_8s", 16, "3+4+6+3 bottlenecks"),
    _timm("resnest14d", 4, "1+1+1+1 bottlenecks"),
    # resnet
    _timm("resnet10t", 4, "1+1+1+1 basic blocks"),
    _timm("resnet18", 8, "2+2+2+2 basic blocks"),
    _timm("resnet26d", 8, "2+2+2+2 bottlenecks"),
    _timm("resnet50_gn", 16, "3+4+6+3 bottlenecks"),
    _timm("resnext50_32x4d", 16, "3+4+6+3 bottlenecks"),
    _timm("seresnet18", 8, "2+2+2+2 basic blocks"),
    _timm("resnetblur18", 8, "2+2+2+2 basic blocks"),
    # resnetv2
    _timm("resnetv2_18", 8, "2+2+2+2 pre-activation basic blocks"),
    _timm("resnetv2_50x1_bit", 16, "3+4+6+3 pre-activation bottlenecks"),
    # rexnet
    _timm("rexnet_100", 11, "16 blocks less 4 strided and 1 narrowing; sums on the first channels (borderline)"),
    # selecsls
    _timm("selecsls42b", 0, "blocks concatenate"),
    # senet
    _timm("legacy_seresnet18", 8, "2+2+2+2 basic blocks"),
    # sequencer
    _sized("sequencer2d_s", 36, "4+3+8+3 blocks x (lstm, mlp)", 56),
    # shvit
    _timm("shvit_s1", 39, "2 conv-only blocks x (dw, ffn), 4+5 x (dw, attn, ffn), 2 downsamplings x 2 x (dw, ffn)"),
    # sknet
    _timm("skresnet18", 8, "2+2+2+2 basic blocks"),
    # starnet
    _timm("starnet_s050", 6, "1+1+3+1 blocks"),
    # swiftformer
    _timm("swiftformer_xs", 24, "12 conv blocks, 4 blocks x (local, attn, mlp)"),
    # swin_transformer, _v2, _v2_cr
    _sized("swin_tiny_patch4_window7_224", 24, "2+2+6+2 layers x (attn, mlp)"),
    _sized("swinv2_tiny_window8_256", 24, "2+2+6+2 post-norm layers x (attn, mlp)"),
    _sized("swinv2_cr_tiny_ns_224", 24, "2+2+6+2 post-norm layers x (attn, mlp)"),
    # tiny_vit
    _timm("tiny_vit_5m_224", 22, "2 MBConv, 2+6+2 layers x (attn, mlp)"),
    # tnt
    _sized("tnt_s_patch16_224", 48, "12 x (attn, mlp) of pixels and of patches; pixels to patches not (borderline)"),
    # tresnet
    _timm("tresnet_m", 21, "3+4 basic blocks, 11+3 bottlenecks"),
    # twins
    _sized("twins_pcpvt_small", 36, "3+4+6+3 layers x (attn, mlp), 4 position convs"),
    _sized("twins_svt_small", 40, "2+2+10+4 layers x (attn, mlp), 4 position convs"),
    # vgg
    _timm("vgg11_bn", 0, "no skips"),
    # visformer
    _sized("visformer_tiny", 23, "7 conv mlps, 4+4 layers x (attn, mlp)"),
    # vision_transformer
    _sized("vit_tiny_patch16_224", 24, "12 layers x (attn, mlp)"),
    _sized("vit_base_patch16_rpn_224", 8, "4 post-norm layers x (attn, mlp)", depth=4, **_SLIM),
    _sized("vit_small_patch16_18x2_224", 24, "6 layers x (2 parallel attns, 2 parallel mlps) (borderline)", depth=6),
    _sized("vit_base_patch16_xp_224", 8, "4 x parallel (attn, mlp), summed first (borderline)", depth=4, **_SLIM),
    _sized("vit_pwee_patch16_reg1_gap_256", 32, "16 x parallel (attn, mlp), summed and scaled first (borderline)"),
    _sized("vit_dwee_patch16_reg1_gap_256", 28, "14 layers x (attn, mlp)"),
    _sized("vit_dpwee_patch16_reg1_gap_256", 16, "16 layers, attn and mlp share one output projection"),
    _sized("vit_base_patch16_siglip_224", 9, "4 layers x (attn, mlp), mlp of the attention pool", depth=4, **_SLIM),
    _sized("vit_small_patch14_reg4_dinov2", 8, "4 layers x (attn, mlp)", 56, depth=4),
    _sized("aimv2_large_patch14_224", 8, "4 layers x (attn, mlp)", 56, depth=4, **_SLIM),
    _sized("beit3_base_patch16_224", 8, "4 layers x (attn, mlp)", depth=4, **_SLIM),
    # vision_transformer_hybrid
    _sized("vit_tiny_r_s16_p8_224", 24, "12 layers x (attn, mlp) on a conv stem"),
    _sized("vit_small_r26_s32_224", 32, "2+2+2+2 bottlenecks, 12 layers x (attn, mlp)"),
    # vision_transformer_relpos
    _sized("vit_relpos_small_patch16_224", 24, "12 layers x (attn, mlp)"),
    _sized("vit_srelpos_small_patch16_224", 24, "12 layers x (attn, mlp)"),
    _sized("vit_relpos_small_patch16_rpn_224", 24, "12 post-norm layers x (attn, mlp)"),
    # vision_transformer_sam
    _sized("samvit_base_patch16_224", 8, "4 layers x (attn, mlp)", depth=4, **_SLIM),
    # vitamin
    _sized("vitamin_small_224", 34, "2+4 MBConv, 14 layers x (attn, mlp)"),
    # volo
    _sized("volo_d1_224", 40, "4 outlookers, 4+8+2 transformers, 2 class layers, each x (attn, mlp)"),
    # vovnet
    _timm("vovnet39a", 0, "one-shot aggregation concatenates"),
    _timm("ese_vovnet39b", 2, "stages of 1+1+2+2 blocks, all but the first of each add"),
    # xception, xception_aligned
    _timm("legacy_xception", 12, "12 blocks"),
    _timm("xception41", 12, "3+8+1 blocks; the last has no skip"),
    _timm("xception41p", 12, "3+8+1 pre-activation blocks; the last has no skip"),
    # xcit
    _sized("xcit_nano_12_p16_224", 40, "12 layers x (attn, local, mlp), 2 class layers x (attn, mlp)"),
)
