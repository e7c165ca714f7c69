"""The networks are the ones of the papers: by name, by size, by hand-written formulas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_meansparse import find_sites, load_classifier
from lightning_meansparse.classifier import save_classifier
from lightning_meansparse.networks import CifarResNet, PSSiLU, RaWideResNet, WideResNet
from lightning_meansparse.networks.activations import make_activation

ROOT = Path(__file__).parent.parent
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = {
    "resnet18_cifar": {"depths": (1, 2), "width": 8},
    "wide_resnet28_10": {"depth": 10, "width": 1},
    "wide_resnet70_16": {"depth": 16, "width": 2},
    "wide_resnet82_8": {"depth": 10, "width": 2},
    "wide_resnet94_16": {"depth": 10, "width": 1},
    "ra_wide_resnet70_16": {"depths": (1, 2, 1), "widths": (8, 12, 16), "stem_width": 8},
    "ra_wide_resnet101_2": {
        "depths": (1, 2),
        "widths": (16, 32),
        "group_widths": (2, 4),
        "stem_width": 8,
    },
}
ACTIVATIONS = ("relu", "gelu", "silu", "elu", "pssilu")


def small(name: str, **options: object) -> nn.Module:
    """A small one in double precision, with random numbers wherever a new network has 0 or 1."""
    net = timm.create_model(name, **(SMALL[name.partition(".")[0]] | options)).double().eval()
    for value in net.parameters():
        nn.init.normal_(value, std=0.5 if value.ndim == 1 else value[0].numel() ** -0.5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


# ------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("name", SMALL)
def test_timm_and_load_classifier_make_it_by_name(name):
    assert name in timm.list_models()
    size, classes, numbers = ((3, 32, 32), 10, CIFAR10)
    if name == "ra_wide_resnet101_2":
        size, classes, numbers = ((3, 224, 224), 1000, IMAGENET)
    classifier = load_classifier(f"timm/{name}", pretrained=False, **SMALL[name])
    assert (classifier.input_size, classifier.num_classes) == (size, classes)
    assert torch.equal(classifier.mean.flatten(), torch.tensor(numbers[0]))
    assert torch.equal(classifier.std.flatten(), torch.tensor(numbers[1]))
    assert classifier(torch.rand(2, 3, 32, 32)).shape == (2, classes)
    with pytest.raises(ValueError, match="no weights for"):
        load_classifier(f"timm/{name}")


@pytest.mark.parametrize("name", [name for name in SMALL if name != "ra_wide_resnet101_2"])
def test_a_tag_chooses_the_data_set(name):
    classifier = load_classifier(f"timm/{name}.cifar100", pretrained=False, **SMALL[name])
    assert classifier.num_classes == 100
    assert torch.equal(classifier.mean.flatten(), torch.tensor(CIFAR100[0]))
    assert torch.equal(classifier.std.flatten(), torch.tensor(CIFAR100[1]))


@pytest.mark.parametrize("name", SMALL)
def test_other_images_other_classes_and_other_sizes(name):
    net = small(name, num_classes=7, in_chans=1).float()
    assert net(torch.rand(3, 1, 48, 40)).shape == (3, 7)
    assert net.forward_features(torch.rand(3, 1, 32, 32)).shape[:2] == (3, net.num_features)


def test_load_classifier_needs_no_import_of_the_networks():
    name = "timm/wide_resnet28_10"
    code = (
        "from lightning_meansparse import load_classifier;"
        f"print(load_classifier({name!r}, pretrained=False, depth=10, width=1).source)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == name, done.stderr


@pytest.mark.parametrize("name", SMALL)
def test_a_saved_classifier_is_built_again(name, tmp_path):
    options = SMALL[name] | {"act_layer": "pssilu"}
    classifier = load_classifier(f"timm/{name}", pretrained=False, **options)
    again = load_classifier(save_classifier(classifier, tmp_path))
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(pixels), classifier(pixels))


# ---------------------------------------------------------------------------- sizes that are known


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18_cifar", 11_173_962),
        ("wide_resnet28_10", 36_479_194),
        ("wide_resnet70_16", 266_796_506),
    ],
)
def test_numbers_of_parameters(name, parameters):
    with torch.device("meta"):
        net = timm.create_model(name)
    assert sum(value.numel() for value in net.parameters()) == parameters


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{key}": (width,) for key in vectors} | {f"{name}.num_batches_tracked": ()}


def test_keys_and_shapes_of_a_wide_resnet():
    expected: dict[str, tuple[int, ...]] = {"init_conv.weight": (16, 3, 3, 3)}
    for group, (before, width) in enumerate(((16, 32), (32, 64), (64, 128))):
        block = f"layer.{group}.block.0"
        expected |= _norm(f"{block}.batchnorm_0", before) | _norm(f"{block}.batchnorm_1", width)
        expected |= {
            f"{block}.conv_0.weight": (width, before, 3, 3),
            f"{block}.conv_1.weight": (width, width, 3, 3),
            f"{block}.shortcut.weight": (width, before, 1, 1),
        }
    expected |= _norm("batchnorm", 128) | {"logits.weight": (10, 128), "logits.bias": (10,)}
    net = timm.create_model("wide_resnet94_16", depth=10, width=2)
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == expected


def test_keys_and_shapes_of_a_ra_wide_resnet_for_imagenet():
    net = RaWideResNet((1,), (32,), 8, group_widths=(4,), num_classes=5)
    block = "stages.stage1.stage1-block0"
    expected = {
        "stem.stem.stem.0.weight": (8, 3, 7, 7),
        **_norm("stem.stem.stem.1", 8),
        f"{block}.proj.0.weight": (32, 8, 1, 1),
        **_norm(f"{block}.proj.1", 32),
        f"{block}.F.a.0.weight": (8, 8, 1, 1),
        f"{block}.F.b.0.weight": (8, 4, 3, 3),
        **_norm(f"{block}.F.b.1", 8),
        f"{block}.F.se.fc1.weight": (2, 8, 1, 1),
        f"{block}.F.se.fc1.bias": (2,),
        f"{block}.F.se.fc2.weight": (8, 2, 1, 1),
        f"{block}.F.se.fc2.bias": (8,),
        f"{block}.F.c.0.weight": (32, 8, 1, 1),
        **_norm(f"{block}.F.c.1", 32),
        "fc.weight": (5, 32),
        "fc.bias": (5,),
    }
    assert {key: tuple(value.shape) for key, value in net.state_dict().items()} == expected


def test_the_published_ra_wide_resnet_loads_strictly_though_it_normalises():
    net = RaWideResNet((1,), (32,), 8, group_widths=(4,))
    published = net.state_dict()
    for name, numbers in zip(("mean", "std"), IMAGENET, strict=True):
        published[f"normalization.{name}"] = torch.tensor(numbers)
    net.load_state_dict(published)
    assert "normalization.mean" in published
    published["normalization.mean"] = torch.tensor(CIFAR10[0])
    with pytest.raises(RuntimeError, match=r"normalization\.mean is"):
        net.load_state_dict(published)


# ------------------------------------------------------------------------ formulas, written by hand


class Weights:
    """A network's weights as layers: `Weights(net).norm("bn1", x)`."""

    def __init__(self, net: nn.Module) -> None:
        self.all = net.state_dict()

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.all

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, var, weight, bias = (
            self.all[f"{name}.{key}"][:, None, None]
            for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def conv(self, name: str, x: Tensor, **how: int) -> Tensor:
        weight = self.all[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        bias = self.all.get(f"{name}.bias")
        return functional.conv2d(x, weight, bias, groups=groups, **how)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x.mean((2, 3)) @ self.all[f"{name}.weight"].T + self.all[f"{name}.bias"]

    def excite(self, name: str, x: Tensor) -> Tensor:
        scale = self.conv(f"{name}.fc1", x.mean((2, 3), keepdim=True)).relu()
        return x * self.conv(f"{name}.fc2", scale).sigmoid()


FORMULAS = {
    "relu": lambda x: x.clamp(min=0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "silu": lambda x: x / (1 + (-x).exp()),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
}


def resnet(w, act, x, depths=(1, 2)):
    x = act(w.norm("bn1", w.conv("conv1", x, padding=1)))
    for name in (f"layer{s + 1}.{b}" for s, depth in enumerate(depths) for b in range(depth)):
        stride = 2 if w.has(f"{name}.shortcut.0") else 1
        out = w.conv(f"{name}.conv1", x, padding=1, stride=stride)
        out = w.conv(f"{name}.conv2", act(w.norm(f"{name}.bn1", out)), padding=1)
        if w.has(f"{name}.shortcut.0"):
            x = w.norm(f"{name}.shortcut.1", w.conv(f"{name}.shortcut.0", x, stride=2))
        x = act(w.norm(f"{name}.bn2", out) + x)
    return w.linear("linear", x)


def wide_resnet(w, act, x, depths):
    x = w.conv("init_conv", x, padding=1)
    for group, depth in enumerate(depths):
        for block in range(depth):
            name = f"layer.{group}.block.{block}"
            stride = 2 if group and not block else 1
            out = act(w.norm(f"{name}.batchnorm_0", x))
            if w.has(f"{name}.shortcut"):
                x = w.conv(f"{name}.shortcut", out, stride=stride)
            # SAME: with a stride of 2, one row and one column of zeros at the end.
            before = 1 if stride == 1 else 0
            out = functional.pad(out, (before, 1, before, 1))
            out = act(w.norm(f"{name}.batchnorm_1", w.conv(f"{name}.conv_0", out, stride=stride)))
            out = w.conv(f"{name}.conv_1", out, padding=1)
            x = x + (w.excite(f"{name}.se", out) if w.has(f"{name}.se.fc1") else out)
    return w.linear("logits", act(w.norm("batchnorm", x)))


def ra_wide_resnet(w, act, x, depths=(1, 2)):
    x = w.norm("stem.stem.stem.1", w.conv("stem.stem.stem.0", x, stride=2, padding=3)).relu()
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            name = f"stages.stage{stage}.stage{stage}-block{block}"
            stride = 1 if block else 2
            out = act(w.conv(f"{name}.F.a.0", x))
            out = w.norm(f"{name}.F.b.1", w.conv(f"{name}.F.b.0", out, stride=stride, padding=1))
            out = w.conv(f"{name}.F.c.0", w.excite(f"{name}.F.se", act(out)))
            if w.has(f"{name}.proj.0"):
                x = w.norm(f"{name}.proj.1", w.conv(f"{name}.proj.0", x, stride=stride))
            x = act(x + w.norm(f"{name}.F.c.1", out))
    return w.linear("fc", x)


@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize("name", SMALL)
def test_a_network_computes_the_formula(name, activation):
    net = small(name, act_layer=activation)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weights, act = Weights(net), FORMULAS[activation]
    if name == "resnet18_cifar":
        expected = resnet(weights, act, images)
    elif name == "ra_wide_resnet101_2":
        expected = ra_wide_resnet(weights, act, images)
    else:
        depth = SMALL[name].get("depth", 10)
        depths = SMALL[name].get("depths", ((depth - 4) // 6,) * 3)
        expected = wide_resnet(weights, act, images, depths)
    torch.testing.assert_close(net(images), expected, rtol=1e-10, atol=1e-10)


def test_defaults_are_the_published_activations():
    assert isinstance(timm.create_model("resnet18_cifar").act1, nn.ReLU)
    assert isinstance(small("wide_resnet70_16").relu, nn.SiLU)
    net = small("ra_wide_resnet101_2")
    assert isinstance(net.stem.stem.stem[2], nn.ReLU)
    assert isinstance(net.stages.stage1.get_submodule("stage1-block0.F.a.2"), nn.SiLU)


# ------------------------------------------------------------------------------------------- sites


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", SMALL)
def test_every_activation_is_a_module_of_its_own(name, activation):
    """All are found, once each, where an operator can stand; squeeze-excitation is a gate."""
    net = small(name, act_layer=activation).float()
    kinds = {type(make_activation(activation)), nn.ReLU, nn.Sigmoid}
    modules = {key for key, module in net.named_modules() if type(module) in kinds}
    images = torch.rand(2, 3, 32, 32)
    sites = [str(site) for site in find_sites(net, images, where="activations+gates")]
    assert sorted(sites) == sorted(f"{key}@in" for key in modules)
    assert len(modules) >= 7
    plain = {str(site) for site in find_sites(net, images)}
    assert plain == {site for site in sites if ".se." not in site}


@pytest.mark.parametrize("name", ["wide_resnet70_16", "ra_wide_resnet70_16"])
def test_residual_sums_leave_at_the_border_of_a_block(name):
    net = small(name).float()
    found = find_sites(net, torch.rand(2, 3, 32, 32), where="activations+residual")
    sums = [site for site in found if site.role == "residual"]
    blocks = [(g, b) for g, group in enumerate(net.layer) for b in range(len(group.block))]
    assert [str(site) for site in sums] == [f"layer.{g}.block.{b}@out" for g, b in blocks]
    widths = [net.layer[g].block[b].conv_1.out_channels for g, b in blocks]
    assert [site.shape for site in sums] == [(width, 1, 1) for width in widths]


# ------------------------------------------------------------------------------------- activations


def test_pssilu_is_its_formula_and_learns():
    act = PSSiLU().double()
    x = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(act(x), FORMULAS["silu"](x), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        act.alpha.fill_(-2.0)  # its magnitude counts
        act.beta.fill_(0.3)
    torch.testing.assert_close(act(x), x * (1 / (1 + (-2 * x).exp()) - 0.3) / 0.7)
    act(x).sum().backward()
    assert bool(act.alpha.grad)
    assert bool(act.beta.grad)
    net = CifarResNet((1,), 4, act_layer="pssilu")
    acts = [module for module in net.modules() if isinstance(module, PSSiLU)]
    assert len(acts) == len({id(module.alpha) for module in acts}) == 3


@pytest.mark.parametrize("act_layer", [nn.Tanh, lambda: nn.LeakyReLU(0.2), "leaky_relu", "GELU"])
def test_any_activation_will_do(act_layer):
    net = WideResNet((1, 1, 1), (4, 4, 4), 4, act_layer=act_layer)
    assert isinstance(net.layer[0].block[0].relu_1, nn.Tanh | nn.LeakyReLU | type(net.relu))
    assert net.relu is not net.layer[0].block[0].relu_0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"act_layer": "swoosh"}, ValueError, "act_layer='swoosh' is unknown: give 'relu'"),
        ({"act_layer": nn.ReLU()}, TypeError, "act_layer must be a name .* got ReLU"),
        ({"act_layer": 3}, TypeError, "act_layer must be a name .* got 3"),
        ({"act_layer": dict}, TypeError, "act_layer must be a name"),
        ({"depth": 29}, ValueError, r"depth must be 10, 16, .* got 29"),
        ({"depth": 4}, ValueError, r"depth must be 10, 16, .* got 4"),
        ({"depth": 28.0}, ValueError, r"depth must be 10, 16, .* got 28.0"),
        ({"width": 0}, ValueError, r"widths must be a list of positive integers, got \(0, 0, 0\)"),
        ({"depths": ()}, ValueError, r"depths must be a list of positive integers, got \(\)"),
        ({"depths": 3}, ValueError, "depths must be a list of positive integers, got 3"),
        (
            {"widths": (8,)},
            ValueError,
            r"one number per stage .* depths=\(1, 1, 1\), widths=\(8,\)",
        ),
        ({"wide": 3}, TypeError, "wide"),
    ],
)
def test_options_that_make_no_network(options, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("wide_resnet28_10", **({"depth": 10, "width": 1} | options))
