"""Real architectures, without weights, against counts made by hand."""

from typing import Any

import pytest
import timm
import torch
import transformers
from torchvision import models as tv

from lightning_meansparse.sites import (
    find_sites,
)

# Counted by hand from the modules' source: role, and the number of axes of a statistic (3 for NCHW,
# 1 for channels last).


tiny = timm.create_model


def on_meta(build):
    with torch.device("meta"):
        return build().to_empty(device="cpu")


def vit(kind, **options):
    config = getattr(transformers, f"{kind}Config")(
        **{
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "image_size": 32,
            "patch_size": 16,
        }
        | options
    )
    return getattr(transformers, f"{kind}ForImageClassification")(config)


def hf(kind, **options):
    config = getattr(transformers, f"{kind}Config")(**options)
    return getattr(transformers, f"{kind}ForImageClassification")(config)


ARCHITECTURES = {
    # stem, 2 in each of 8 blocks
    "timm resnet18": (lambda: tiny("resnet18"), 32, {("activation", 3): 17}),
    # every block: ReLU and sigmoid of its squeeze-excite
    "timm seresnet18": (lambda: tiny("seresnet18"), 32, {("activation", 3): 17, ("gate", 3): 16}),
    # 2 pre-activations in each of 8 blocks, and the last norm's
    "timm resnetv2_18": (lambda: tiny("resnetv2_18"), 32, {("activation", 3): 17}),
    # stem, 1 in the first block, 2 in 15 blocks, head; 16 squeeze-excites
    "timm efficientnet_b0": (
        lambda: tiny("efficientnet_b0"),
        32,
        {("activation", 3): 33, ("gate", 3): 32},
    ),
    # stem, 1 + 2 x 10 in blocks, last block's conv, head; 9 squeeze-excites
    "timm mobilenetv3_small_100": (
        lambda: tiny("mobilenetv3_small_100"),
        32,
        {("activation", 3): 24, ("gate", 3): 18},
    ),
    # stem, 3 in each of 13 blocks; 13 squeeze-excites
    "timm regnety_002": (lambda: tiny("regnety_002"), 32, {("activation", 3): 40, ("gate", 3): 26}),
    # 2 + 2 + 6 + 2 blocks, convolutional MLPs
    "timm convnext_atto": (lambda: tiny("convnext_atto"), 32, {("activation", 3): 12}),
    # MLPs on channels last
    "timm test_convnext": (lambda: tiny("test_convnext"), 32, {("activation", 1): 9}),
    "timm test_vit": (lambda: tiny("test_vit", img_size=32), 32, {("activation", 1): 6}),
    "timm swin_tiny": (
        lambda: tiny(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            depths=(2, 2),
            num_heads=(3, 6),
            window_size=4,
        ),
        32,
        {("activation", 1): 4},
    ),
    # not the ReLU of the position MLP, a constant
    "timm swinv2_tiny": (
        lambda: tiny(
            "swinv2_tiny_window8_256", img_size=32, depths=(2, 2), num_heads=(3, 6), window_size=4
        ),
        32,
        {("activation", 1): 4},
    ),
    # an MLP over tokens and one over channels in each of 8 blocks
    "timm mixer": (
        lambda: tiny("mixer_s32_224", img_size=64),
        64,
        {("activation", 1): 16},
    ),
    # SwiGLU: all of them gates
    "timm eva02_tiny": (
        lambda: tiny("eva02_tiny_patch14_224", img_size=28, depth=2),
        28,
        {("gate", 1): 2},
    ),
    # 2 for each of 5 layers, first and last norm, 1 transition
    "timm densenet": (
        lambda: timm.models.densenet.DenseNet(growth_rate=4, block_config=(2, 3)),
        32,
        {("activation", 3): 13},
    ),
    "hf resnet": (
        lambda: hf("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        32,
        {("activation", 3): 7},
    ),
    "hf vit": (lambda: vit("ViT"), 32, {("activation", 1): 2}),
    "hf beit": (lambda: vit("Beit"), 32, {("activation", 1): 2}),
    "hf dinov2 swiglu": (lambda: vit("Dinov2", use_swiglu_ffn=True), 32, {("gate", 1): 2}),
    "hf swin": (
        lambda: hf(
            "Swin", image_size=32, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
        ),
        32,
        {("activation", 1): 4},
    ),
    "hf convnext": (
        lambda: hf("ConvNext", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]),
        32,
        {("activation", 1): 4},
    ),
    # stem, 2 in each of 7 inverted residuals, 3 x (3 convolutions and 2, 4, 3 MLPs), last 1x1
    "hf mobilevit": (
        lambda: hf(
            "MobileViT", image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8] * 6 + [16]
        ),
        64,
        {("activation", 3): 25, ("activation", 1): 9},
    ),
    "torchvision convnext": (
        lambda: tv.convnext.ConvNeXt(
            [tv.convnext.CNBlockConfig(8, 16, 2), tv.convnext.CNBlockConfig(16, None, 3)]
        ),
        32,
        {("activation", 1): 5},
    ),
    "torchvision swin": (
        lambda: tv.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4]),
        32,
        {("activation", 1): 4},
    ),
    "torchvision efficientnet_b0": (
        lambda: tv.efficientnet_b0(),
        32,
        {("activation", 3): 33, ("gate", 3): 32},
    ),
    # 8 convolutions, 2 linear layers; 133 million parameters: not initialised
    "torchvision vgg11": (
        lambda: on_meta(tv.vgg11),
        32,
        {("activation", 3): 8, ("activation", 1): 2},
    ),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_real_architectures(name):
    build, size, expected = ARCHITECTURES[name]
    model = build()
    example: Any = torch.rand(1, 3, size, size)
    if name.startswith("hf"):
        example = {"pixel_values": example}
    counts: dict[tuple[str, int], int] = {}
    for site in find_sites(model, example, where="activations+gates"):
        key = (site.role, len(site.shape))
        counts[key] = counts.get(key, 0) + 1
        assert len(site.axis) == 1
    assert counts == expected
