"""The published MeanSparse classes, out of checkouts of RobustBench and of the authors' code.

They are for running side by side with ours, see `parity`. What they import besides and is not
installed is stubbed.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
from torch import nn

ZOO, AUTHORS = "RobustBench", "authors"
CIFAR100 = {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Size:
    """A small and the published size of a class, as its arguments, and ours for the small one."""

    small: Mapping[str, Any]
    full: Mapping[str, Any]
    ours: Mapping[str, Any]
    pixels: tuple[int, int] = (32, 32)


WRN_70 = Size({"depth": 16, "width": 2}, {"depth": 70, "width": 16}, {"depth": 16, "width": 2})
WRN_94 = Size(WRN_70.small, {"depth": 94, "width": 16}, WRN_70.ours)
RA_WRN = Size(
    {"stem_width": 8, "depth": [2, 2, 1], "stage_width": [12, 24, 32]},
    {"stem_width": 96, "depth": [30, 31, 10], "stage_width": [216, 432, 864]},
    {"stem_width": 8, "depths": [2, 2, 1], "widths": [12, 24, 32]},
)
RA_WRN_101 = Size(
    {
        "stage_widths": [32, 64, 96],
        "group_widths": [4, 8, 12],
        "depths": [2, 1, 1],
        "stem_width": 16,
    },
    {
        "stage_widths": [512, 1024, 2016, 4032],
        "group_widths": [64, 128, 252, 504],
        "depths": [7, 11, 18, 1],
        "stem_width": 96,
    },
    {"widths": [32, 64, 96], "group_widths": [4, 8, 12], "depths": [2, 1, 1], "stem_width": 16},
    (64, 224),
)
# The published code has the four widths of ConvNeXt-L typed in.
CONVNEXT = Size({"depths": (1, 1, 2, 1)}, {}, {"depths": (1, 1, 2, 1)}, (64, 224))
_SWIN = {
    "img_size": 64,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2, 2, 1),
    "num_heads": (1, 2, 2, 4),
}
SWIN = Size(_SWIN, {}, _SWIN, (64, 224))


@dataclass(frozen=True)
class Published:
    """A published class, how it is built, and the base network that its checkpoints go into."""

    name: str
    code: str
    base: str
    size: Size
    build: Callable[..., nn.Module]


def published(robustbench: Path, authors: Path | None) -> list[Published]:
    """Every published class of the checkouts."""
    _open_robustbench(robustbench)
    zoo = f"{ZOO}, model_zoo/architectures/"
    found = [
        Published(
            "WRN-94-16",
            zoo + "Meansparse_wrn_94_16.py",
            "wide_resnet94_16",
            WRN_94,
            lambda **size: _zoo("Meansparse_wrn_94_16").MeanSparse_DMWideResNet(
                activation_fn=nn.SiLU, **size
            ),
        ),
        Published(
            "WRN-70-16",
            zoo + "Meansparse_wrn_70_16.py",
            "wide_resnet70_16.cifar100",
            WRN_70,
            lambda **size: _zoo("Meansparse_wrn_70_16").DMWideResNet(
                num_classes=100, activation_fn=nn.SiLU, **CIFAR100, **size
            ),
        ),
        Published(
            "RaWRN-70-16",
            zoo + "Meansparse_ra_wrn_70_16.py",
            "ra_wide_resnet70_16",
            RA_WRN,
            lambda **size: _ra_wrn(_zoo("Meansparse_ra_wrn_70_16"), **size),
        ),
        Published(
            "ConvNeXt-L",
            zoo + "sparsified_model.py",
            "convnext_large",
            CONVNEXT,
            lambda **size: _zoo("sparsified_model").get_sparse_model(
                _convnext(**size), "imagenet-Linf"
            ),
        ),
        Published(
            "Swin-L",
            zoo + "Meansparse_swin_L.py",
            "swin_large_patch4_window7_224",
            SWIN,
            lambda **size: _swin(_zoo("Meansparse_swin_L"), **size),
        ),
    ]
    return found if authors is None else [*found, *_published_by_authors(authors)]


def _published_by_authors(root: Path) -> list[Published]:
    """The networks with operators built in, and those whose activations are replaced later."""
    cifar = "CIFAR10_Linfinity/Other Models/utils_sparse_cifar.py"
    imagenet = "ImageNet_Linfinity/Other Models/utils_sparse_imagenet.py"
    wrn_94 = "CIFAR10_Linfinity/WRN-94-16/dm_wide_resnet.py"
    wrn_70 = "CIFAR10_L2/MeanSparse_dm_wide_resnet.py"
    ra_wrn = "CIFAR10_Linfinity/RaWRN-70-16/MeanSparse_robustarch_wide_resnet.py"
    swin = "ImageNet_Linfinity/Swin_L/MeanSparse_swin_transformer.py"
    load = partial(_authors, root)
    rows: list[tuple[str, str, str, Size, Callable[..., nn.Module]]] = [
        (
            "RaWRN-101-2",
            imagenet,
            "ra_wide_resnet101_2",
            RA_WRN_101,
            lambda **size: _in_place(_ra_wrn_101(**size), load(imagenet), "_RaWideResNet"),
        ),
        (
            "WRN-70-16, activations alone",
            cifar,
            "wide_resnet70_16",
            WRN_70,
            lambda **size: _in_place(
                _zoo("dm_wide_resnet").DMWideResNet(activation_fn=nn.SiLU, **size), load(cifar)
            ),
        ),
        (
            "RaWRN-70-16, activations alone",
            cifar,
            "ra_wide_resnet70_16",
            RA_WRN,
            lambda **size: _in_place(_ra_wrn(_zoo("robustarch_wide_resnet"), **size), load(cifar)),
        ),
        (
            "WRN-94-16",
            wrn_94,
            "wide_resnet94_16",
            WRN_94,
            lambda **size: load(wrn_94).MeanSparse_DMWideResNet(activation_fn=nn.SiLU, **size),
        ),
        (
            "WRN-70-16",
            wrn_70,
            "wide_resnet70_16",
            WRN_70,
            lambda **size: load(wrn_70).DMWideResNet(activation_fn=nn.SiLU, **size),
        ),
        (
            "RaWRN-70-16",
            ra_wrn,
            "ra_wide_resnet70_16",
            RA_WRN,
            lambda **size: _ra_wrn(load(ra_wrn), **size),
        ),
        (
            "ConvNeXt-L",
            imagenet,
            "convnext_large",
            CONVNEXT,
            lambda **size: _in_place(_convnext(**size), load(imagenet), "_ConvNeXt_L"),
        ),
        (
            "Swin-L",
            swin,
            "swin_large_patch4_window7_224",
            SWIN,
            lambda **size: _swin(load(swin), **size),
        ),
    ]
    return [
        Published(name, f"{AUTHORS}, {file}", base, size, build)
        for name, file, base, size, build in rows
    ]


def _ra_wrn(module: Any, **size: Any) -> nn.Module:
    model: nn.Module = module.NormalizedWideResNet(
        module.CIFAR10_MEAN,
        module.CIFAR10_STD,
        groups=[1, 1, 1],
        activation_fn=nn.SiLU,
        se_ratio=0.25,
        se_activation=nn.ReLU,
        se_order=2,
        **size,
    )
    return model


def _ra_wrn_101(**size: Any) -> nn.Module:
    module = _zoo("robustarch_wide_resnet")
    stages = len(size["depths"])
    model: nn.Module = module.NormalizedConfigurableModel(
        **IMAGENET,
        kernel=3,
        strides=[2] * stages,
        dilation=1,
        norm_layer=[nn.Identity, nn.BatchNorm2d, nn.BatchNorm2d],
        activation_layer=[nn.SiLU] * 3,
        bottleneck_multipliers=[0.25] * stages,
        downsample_norm=nn.BatchNorm2d,
        dense_ratio=None,
        stem_type=module.Stem,
        stem_kernel=7,
        stem_downsample_factor=2,
        stem_patch_size=None,
        se_ratio=0.25,
        se_activation=nn.ReLU,
        **size,
    )
    return model


def _convnext(**size: Any) -> nn.Module:
    model = timm.create_model("convnext_large", **size)
    wrapped: nn.Module = _zoo("utils_architectures").normalize_model(model, **IMAGENET)
    return wrapped


def _swin(module: Any, **size: Any) -> nn.Module:
    model: nn.Module = module.swin_large_patch4_window7_224_with_MeanSparse(
        pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **size
    )
    return model


def _in_place(model: nn.Module, module: Any, suffix: str = "") -> nn.Module:
    """Let the authors' function put their operators into a base network."""
    getattr(module, f"add_custom_layer{suffix}")(model, getattr(module, f"MeanSparse{suffix}"))
    return model


def _open_robustbench(checkout: Path) -> None:
    """Make RobustBench's modules importable, without what its packages import first."""
    for name, folder in (("robustbench", ""), ("robustbench.model_zoo", "model_zoo")):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / "robustbench" / folder)]
        sys.modules[name] = package


def _zoo(name: str) -> Any:
    return importlib.import_module(f"robustbench.model_zoo.architectures.{name}")


def _authors(root: Path, file: str) -> Any:
    """Import one of the authors' files, whose folders repeat each other's names."""
    path = root / file
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: is {root} a checkout of SPIN-UMass/MeanSparse?")
    for name in ("autoattack", "easydict", "foolbox"):
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            sys.modules[name] = _Stub(name)
    for repeated in ("utils_sparse", path.stem):
        sys.modules.pop(repeated, None)
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))


class _Stub(types.ModuleType):
    """Has every name; nothing of it is called."""

    def __getattr__(self, name: str) -> Any:
        return object
