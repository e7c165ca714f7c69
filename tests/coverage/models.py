"""The models of the sweep: shrunk, with random weights, nothing is downloaded.

timm: every module file that has models, the smallest of each kind of network in it (where a file
holds networks that differ in more than their sizes, one of each). transformers: every class of the
image-classification mapping. torchvision: every family of classifiers. Sizes of images are the
smallest that a model makes sense at; where a network has a depth or a width to choose, it is small.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .check import wake

BATCH = 2


@dataclass(frozen=True)
class Model:
    """One model of the sweep.

    Attributes:
        name: `timm/resnet18`, `hf/ViTForImageClassification`, `torchvision/resnet18`.
        size: Height and width of the images.
        options: What its constructor or its config is given.
        left_out: Why it is not run, or `""`.
    """

    name: str
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    left_out: str = ""

    @property
    def library(self) -> str:
        return self.name.partition("/")[0]

    @property
    def short(self) -> str:
        return self.name.partition("/")[2]

    def build(self) -> tuple[nn.Module, Tensor | dict[str, Tensor]]:
        """The model in eval mode, with random weights, and a batch for it."""
        torch.manual_seed(0)
        images = torch.randn(BATCH, 3, self.size, self.size)
        if self.library == "timm":
            import timm

            model = timm.create_model(self.short, **self.options)
        elif self.library == "torchvision":
            from torchvision import models

            model = models.get_model(self.short, weights=None, **self.options)
        else:
            model = _from_transformers(self.short, self.options)
        model.eval()
        wake(model)
        if self.library != "hf":
            return model, images
        return model, _example(self.short, model, images)


def _read(library: str, text: str) -> Iterator[Model]:
    """Lines such as `vit_tiny 32 img_size=32 depth=2  # why`."""
    for line in text.splitlines():
        name, *rest = line.partition("#")[0].split() or [""]
        if name:
            size = int(rest.pop(0)) if rest and rest[0].isdigit() else 64
            pairs = (word.split("=", 1) for word in rest)
            options = {key: ast.literal_eval(value) for key, value in pairs}
            yield Model(f"{library}/{name}", size, options)


TIMM = """
    beit_base_patch16_224 32 img_size=32 depth=2
    beitv2_base_patch16_224 32 img_size=32 depth=2
    botnet26t_256 128 img_size=128
    eca_botnext26ts_256 128 img_size=128
    eca_halonext26ts 256
    halonet26t 256
    haloregnetz_b 224
    lambda_resnet26t 128 img_size=128
    lamhalobotnet50ts_256 256
    sebotnet33ts_256 128 img_size=128
    bat_resnext26ts 256
    eca_resnet33ts
    gcresnet33ts
    gcresnext26ts
    gernet_s
    mobileone_s1
    mobileone_s4
    regnetz_b16
    regnetz_b16_evos
    regnetz_c16_evos
    regnetz_d8_evos
    repvgg_a0
    repvgg_d2se
    resnet32ts
    resnet50_clip
    resnext26ts
    seresnet33ts
    test_byobnet
    cait_xxs24_224 32 img_size=32 depth=2
    coat_lite_tiny 64 img_size=64
    coat_tiny 64 img_size=64
    convit_tiny 32 img_size=32
    convmixer_768_32 56
    convnext_atto
    convnext_atto_ols
    convnext_atto_rms
    convnext_zepto_rms_ols
    convnext_tiny depths=(2,1,1,1)
    convnext_tiny_hnf depths=(1,1,1,1)
    convnext_large_mlp depths=(1,1,1,1) dims=(24,48,96,192)
    convnextv2_atto
    test_convnext
    cpubone_nano
    crossvit_9_240 240
    csatv2 128
    cs3darknet_focus_s
    cs3sedarknet_x
    cs3edgenet_x
    cspdarknet53
    cspresnet50
    cspresnet50d
    cspresnext50
    darknet17
    darknetaa53
    sedarknet21
    cspnext_tiny
    davit_tiny depths=(1,1,1,1)
    davit_base_fl depths=(1,1,1,1)
    deepseek_vit_412m 56 img_size=56 depth=2
    deit3_small_patch16_224 32 img_size=32 depth=2
    deit_tiny_patch16_224 32 img_size=32 depth=2
    deit_tiny_distilled_patch16_224 32 img_size=32 depth=2
    densenet121
    densenetblur121d
    dla34
    dla46x_c
    dla60_res2net
    dla60_res2next
    dpn48b
    dpn68
    dpn98
    edgenext_small
    edgenext_small_rw
    edgenext_xx_small
    efficientformer_l1 224
    efficientformerv2_s0 224
    efficientnet_b0
    efficientnet_blur_b0
    efficientnet_cc_b0_4e
    efficientnet_es
    efficientnet_h_b5
    efficientnet_lite0
    efficientnet_x_b3
    efficientnetv2_rw_t
    fbnetc_100
    gc_efficientnetv2_rw_t
    mixnet_s
    mnasnet_small
    mobilenet_edgetpu_v2_xs
    mobilenetv1_100
    mobilenetv2_035
    mobilenetv4_conv_small
    mobilenetv4_conv_blur_medium
    mobilenetv4_hybrid_medium 128
    semnasnet_050
    spnasnet_100
    test_efficientnet
    test_efficientnet_evos
    test_efficientnet_gn
    test_efficientnet_ln
    tf_efficientnetv2_b0
    tf_mixnet_s
    tinynet_e
    efficientvim_m1 128
    efficientvit_b0
    efficientvit_l1
    efficientvit_m0 224
    eva02_tiny_patch14_224 28 img_size=28 depth=2
    eva_giant_patch14_224 28 img_size=28 depth=2 embed_dim=176
    vit_base_patch16_dinov3 32 img_size=32 depth=2
    vit_small_plus_patch16_dinov3 32 img_size=32 depth=2
    vit_medium_patch16_rope_reg1_gap_256 32 img_size=32 depth=2
    vit_small_patch16_rope_mixed_224 32 img_size=32 depth=2
    vit_pe_core_tiny_patch16_384 32 img_size=32 depth=2
    vit_pe_spatial_tiny_patch16_512 32 img_size=32 depth=2
    fasternet_t0
    fasternet_s
    fastvit_t8
    fastvit_sa12
    fastvit_mci0
    focalnet_tiny_srf
    focalnet_tiny_lrf
    focalnet_large_fl3
    gcvit_xxtiny 64 img_size=64
    gemma4_vit_167m 96 img_size=96 depth=2
    ghostnet_050
    ghostnetv2_100
    ghostnetv3_050
    hardcorenas_a
    hgnet_tiny
    hgnetv2_b0
    hiera_tiny_224 64 img_size=(64,64)
    hiera_small_abswin_256 64 img_size=(64,64)
    sam2_hiera_tiny 224
    hieradet_small 224
    hrnet_w18_small
    hrnet_w18_ssld
    iformer_t 128
    iformer_l_distilled 128
    inception_next_atto
    inception_resnet_v2 128
    inception_v3 128
    inception_v4 128
    lcnetv2_small
    levit_128s 224
    levit_conv_128s 224
    lowformer_b0
    lowformer_e1
    mambaout_femto
    mambaout_small_rw
    test_mambaout
    coatnet_0_224 64 img_size=64
    coatnet_nano_cc_224 64 img_size=64
    coatnet_bn_0_rw_224 64 img_size=64
    coatnet_rmlp_nano_rw_224 64 img_size=64
    coatnext_nano_rw_224 64 img_size=64
    maxvit_pico_rw_256 64 img_size=64
    maxvit_rmlp_pico_rw_256 64 img_size=64
    maxvit_tiny_tf_224 64 img_size=64
    maxvit_tiny_pm_256 64 img_size=64
    maxxvit_rmlp_nano_rw_256 64 img_size=64
    maxxvitv2_nano_rw_256 64 img_size=64
    test_maxvit 64 img_size=64
    caformer_s18
    convformer_s18
    poolformer_s12
    poolformerv2_s12
    gmixer_12_224 64 img_size=64
    gmlp_ti16_224 64 img_size=64
    mixer_s32_224 64 img_size=64
    resmlp_12_224 64 img_size=64
    fbnetv3_b
    lcnet_035
    mobilenetv3_small_050
    mobilenetv3_rw
    tf_mobilenetv3_small_minimal_100
    mobilenetv5_base
    mobilevit_xxs
    mobilevitv2_050 128
    mvitv2_tiny 64 img_size=64
    naflexvit_base_patch16_gap 64 depth=2
    naflexvit_so150m2_patch16_reg1_gap 64 depth=2
    nasnetalarge 128
    nest_tiny 64 img_size=64
    jx_nest_tiny 64 img_size=64
    nextvit_small
    dm_nfnet_f0
    eca_nfnet_l0
    nf_ecaresnet26
    nf_regnet_b0
    nf_resnet26
    nf_seresnet26
    nfnet_l0
    test_nfnet
    pit_ti_224 64 img_size=64
    pit_ti_distilled_224 64 img_size=64
    pnasnet5large 128
    pvt_v2_b0
    pvt_v2_b2_li 64 depths=(1,1,1,1)
    qwen3_vit_88m 64 img_size=64 depth=2
    rdnet_tiny
    regnetx_002
    regnety_002
    regnetv_040
    regnetz_005
    repghostnet_050
    repvit_m1
    res2net50_14w_8s
    res2next50
    res2net50d
    resnest14d
    resnest50d_4s2x40d
    resnet18
    resnet26t
    resnet10t
    resnetaa34d
    resnetblur18
    resnetrs50
    resnext50_32x4d
    ecaresnet26t
    ecaresnext26t_32x4d
    seresnet18
    seresnext26t_32x4d
    seresnextaa101d_32x8d 64 layers=(1,1,1,1)
    senet154 64 layers=(1,1,1,1)
    wide_resnet50_2 64 layers=(1,1,1,1)
    resnetv2_18
    resnetv2_18d
    resnetv2_50x1_bit
    resnetv2_50d_evos
    resnetv2_50d_frn
    resnetv2_50d_gn
    rexnet_100
    rexnetr_100
    selecsls42
    selecsls60b
    legacy_seresnet18
    legacy_seresnext26_32x4d
    legacy_senet154
    sequencer2d_s 64 img_size=64 layers=(1,1,1,1)
    shvit_s1 128
    skresnet18
    skresnext50_32x4d
    starnet_s050
    swiftformer_xs 224
    swin_tiny_patch4_window7_224 32 img_size=32 depths=(2,2) num_heads=(3,6) window_size=4
    swin_s3_tiny_224 224 depths=(1,1,1,1)
    swinv2_tiny_window8_256 32 img_size=32 depths=(2,2) num_heads=(3,6) window_size=4
    swinv2_cr_tiny_224 64 img_size=64 depths=(2,2) num_heads=(3,6) window_size=4
    swinv2_cr_tiny_ns_224 64 img_size=64 depths=(2,2) num_heads=(3,6) window_size=4
    tiny_vit_5m_224
    tnt_s_patch16_224 64 img_size=64 depth=2
    tnt_s_legacy_patch16_224 64 img_size=64 depth=2
    tresnet_m
    tresnet_v2_l
    twins_pcpvt_small 64 img_size=64 depths=(1,1,1,1)
    twins_svt_small 64 img_size=64 depths=(1,1,1,1)
    vgg11 32
    vgg11_bn 32
    visformer_tiny 64 img_size=64
    aimv2_large_patch14_224 28 img_size=28 depth=2
    beit3_base_patch16_224 32 img_size=32 depth=2
    flexivit_small 32 img_size=32 depth=2
    test_vit 32 img_size=32
    test_vit2 32 img_size=32
    test_vit3 32 img_size=32
    vit_tiny_patch16_224 32 img_size=32 depth=2
    vit_base_patch16_clip_quickgelu_224 32 img_size=32 depth=2
    vit_base_patch16_siglip_gap_224 32 img_size=32 depth=2
    vit_base_patch16_siglip_224 32 img_size=32 depth=2
    vit_dlittle_patch16_reg1_gap_256 32 img_size=32 depth=2
    vit_dpwee_patch16_reg1_gap_256 32 img_size=32 depth=2
    vit_giant_patch14_dinov2 28 img_size=28 depth=2 embed_dim=192 num_heads=4
    vit_intern300m_patch14_448 28 img_size=28 depth=2
    vit_base_mci_224 64 img_size=64 depth=2
    vit_tiny_r_s16_p8_224 64 img_size=64 depth=2
    vit_small_r26_s32_224 64 img_size=64 depth=2
    vit_small_resnet50d_s16_224 64 img_size=64 depth=2
    test_vit_relpos 64 img_size=64
    vit_relpos_small_patch16_rpn_224 64 img_size=64 depth=2
    vit_srelpos_small_patch16_224 64 img_size=64 depth=2
    samvit_base_patch16_224 64 img_size=64
    vitamin_small_224 64 img_size=64
    volo_d1_224 64 img_size=64
    eca_vovnet39b
    ese_vovnet19b_slim_dw
    ese_vovnet39b_evos
    vovnet39a
    xception 128
    legacy_xception 128
    xception41p 128
    xception41 128
    xcit_nano_12_p8_224 64 img_size=64
    xcit_tiny_12_p16_224 64 img_size=64 depth=2
"""

TORCHVISION = """
    alexnet 64
    convnext_tiny
    densenet121
    efficientnet_b0
    efficientnet_v2_s
    googlenet init_weights=False
    inception_v3 128 init_weights=False
    maxvit_t 224
    mnasnet0_5
    mobilenet_v2
    mobilenet_v3_small
    mobilenet_v3_large
    regnet_x_400mf
    regnet_y_400mf
    resnet18
    resnet50
    resnext50_32x4d
    wide_resnet50_2
    shufflenet_v2_x0_5
    squeezenet1_0
    squeezenet1_1
    swin_t
    swin_v2_t
    vgg11 32
    vgg11_bn 32
    vit_b_32 224
"""

_VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
_SWIN = {
    "image_size": 32,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
_TOWERS = {"vision_config": _VIT, "text_config": {**_VIT, "vocab_size": 99}}
_SHIELD = {
    "vision_config": _VIT,
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": 99,
    },
    "mm_tokens_per_image": 4,
    "image_token_index": 98,
    "yes_token_index": 10,
    "no_token_index": 11,
    "boi_token_index": 96,
    "eoi_token_index": 97,
}
_PERCEIVER = {
    "num_latents": 8,
    "d_latents": 32,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 1,
}
_LEVIT = {"hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [2, 2, 2]}

TRANSFORMERS: dict[str, tuple[int, dict[str, Any]]] = {
    "BeitForImageClassification": (32, {**_VIT, "use_relative_position_bias": True}),
    "BitForImageClassification": (64, {**_STAGES, "embedding_size": 16, "num_groups": 4}),
    "CLIPForImageClassification": (32, _TOWERS),
    "ConvNextForImageClassification": (64, _STAGES),
    "ConvNextV2ForImageClassification": (64, _STAGES),
    "CvtForImageClassification": (
        64,
        {"embed_dim": [16, 24, 36], "depth": [1, 2, 3], "num_heads": [1, 3, 6]},
    ),
    "Data2VecVisionForImageClassification": (32, {**_VIT, "use_relative_position_bias": True}),
    "DeiTForImageClassification": (32, _VIT),
    "DeiTForImageClassificationWithTeacher": (32, _VIT),
    "Dinov2ForImageClassification": (32, _VIT),
    "Dinov2WithRegistersForImageClassification": (32, _VIT),
    "DonutSwinForImageClassification": (32, _SWIN),
    "EfficientNetForImageClassification": (
        64,
        {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 64, "hidden_dim": 1280},
    ),
    "FocalNetForImageClassification": (64, {"image_size": 64, "embed_dim": 16}),
    "HGNetV2ForImageClassification": (64, {}),
    "HieraForImageClassification": (64, {"image_size": [64, 64], "embed_dim": 16}),
    "IJepaForImageClassification": (32, _VIT),
    "ImageGPTForImageClassification": (
        8,
        {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64},
    ),
    "LevitForImageClassification": (224, _LEVIT),
    "LevitForImageClassificationWithTeacher": (224, _LEVIT),
    "MetaClip2ForImageClassification": (32, _TOWERS),
    "MobileNetV1ForImageClassification": (64, {"depth_multiplier": 0.5}),
    "MobileNetV2ForImageClassification": (64, {"depth_multiplier": 0.5}),
    "MobileViTForImageClassification": (
        64,
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": 2},
    ),
    "MobileViTV2ForImageClassification": (128, {"image_size": 128, "width_multiplier": 0.25}),
    "PerceiverForImageClassificationLearned": (32, {**_PERCEIVER, "image_size": 32}),
    "PerceiverForImageClassificationFourier": (224, _PERCEIVER),
    "PerceiverForImageClassificationConvProcessing": (224, _PERCEIVER),
    "PoolFormerForImageClassification": (64, {**_STAGES}),
    "PPLCNetForImageClassification": (64, {}),
    "PvtForImageClassification": (64, {"image_size": 64, "hidden_sizes": [16, 32, 40, 64]}),
    "PvtV2ForImageClassification": (
        64,
        {"image_size": 64, "hidden_sizes": [16, 32, 40, 64], "linear_attention": True},
    ),
    "RegNetForImageClassification": (64, {**_STAGES, "groups_width": 8, "embedding_size": 16}),
    "ResNetForImageClassification": (64, {**_STAGES, "embedding_size": 16}),
    "SegformerForImageClassification": (64, {"hidden_sizes": [16, 32, 40, 64]}),
    "ShieldGemma2ForImageClassification": (32, _SHIELD),
    "SiglipForImageClassification": (32, _TOWERS),
    "Siglip2ForImageClassification": (32, _TOWERS),
    "SwiftFormerForImageClassification": (
        64,
        {"image_size": 64, "embed_dims": [16, 24, 32, 48], "depths": [1, 1, 2, 1]},
    ),
    "SwinForImageClassification": (32, _SWIN),
    "Swinv2ForImageClassification": (32, _SWIN),
    "TextNetForImageClassification": (64, {}),
    "TimmWrapperForImageClassification": (64, {"architecture": "resnet18"}),
    "ViTForImageClassification": (32, _VIT),
    "ViTMSNForImageClassification": (32, _VIT),
}

LEFT_OUT = {
    "DinatForImageClassification": "needs the package natten, which this project does not install",
}
"""Classes of transformers' mapping that cannot be run here, with the reason."""


def _from_transformers(name: str, options: dict[str, Any]) -> nn.Module:
    import transformers
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    (kind,) = (k for k, v in names.items() if name == v or (isinstance(v, tuple) and name in v))
    config = transformers.CONFIG_MAPPING[kind](**options)
    config.num_labels = 10
    return getattr(transformers, name)(config)


def _example(name: str, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    if name.startswith("ImageGPT"):  # reads tokens of pixels; their embeddings are its floats
        return {"inputs_embeds": torch.randn(BATCH, 16, model.config.n_embd)}
    if name.startswith("ShieldGemma2"):  # a question about an image, in tokens
        image = model.config.image_token_index
        tokens = torch.tensor([[2, *[image] * model.config.mm_tokens_per_image, 5, 7]] * BATCH)
        return {"pixel_values": images, "input_ids": tokens}
    if name.startswith("Siglip2"):  # patches of images of different forms
        patch = model.config.vision_config.patch_size
        side = 4
        return {
            "pixel_values": torch.randn(BATCH, side * side, 3 * patch * patch),
            "pixel_attention_mask": torch.ones(BATCH, side * side, dtype=torch.long),
            "spatial_shapes": torch.full((BATCH, 2), side),
        }
    return {"pixel_values": images}


def models() -> list[Model]:
    """All models of the sweep, those that are left out among them."""
    found = [*_read("timm", TIMM), *_read("torchvision", TORCHVISION)]
    found += [Model(f"hf/{n}", size, options) for n, (size, options) in TRANSFORMERS.items()]
    found += [Model(f"hf/{name}", left_out=reason) for name, reason in LEFT_OUT.items()]
    return found


def chosen(pattern: str) -> list[Model]:
    """The models whose name holds a regular expression."""
    return [model for model in models() if re.search(pattern, model.name)]
