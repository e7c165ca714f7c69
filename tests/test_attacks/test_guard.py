"""An attack leaves no trace on the model, the generators or the mode around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_meansparse.attacks import (
    evaluate,
)
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.surgery import set_alpha
from tests.test_attacks.victims import EPS, FAB, QUICK, SHORT, own_labels, same, trace

# It calls backward() on the parameters' graph, which fills their gradients unless they are frozen.
THEIR_FAB = {"attack": "torchattacks.FAB", "name": "their-fab", "options": {"steps": 2}}


class Stubborn(nn.Module):
    """BatchNorm and dropout that would show if a module came out of eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)
        self.fail_after: int | None = None

    def forward(self, images: Tensor) -> Tensor:
        assert not self.norm.training
        assert not self.drop.training
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0:
                self.norm.running_mean += 1  # damage on the way out
                raise KeyboardInterrupt
        return self.head(self.drop(self.norm(self.conv(images))).mean((2, 3)))


@pytest.fixture
def stubborn() -> Stubborn:
    model = Stubborn().train()
    model.norm.eval()  # mixed modes, as in fine-tuning with frozen statistics
    model.head.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "around", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad]
)
def test_no_trace_is_left(stubborn: Stubborn, around: Callable[[], Any]) -> None:
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    with around():
        # Lightning makes its batches inside inference mode.
        given, classes = images.clone(), labels.clone()
        before = trace(stubborn)
        result = evaluate(stubborn, given, classes, attacks=[*QUICK, THEIR_FAB], eps=EPS)
        after = trace(stubborn)
    for key in before:
        assert same(before[key], after[key]), key
    assert result.backwards.sum() > 0
    assert torch.equal(given, images)
    assert torch.equal(classes, labels)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_no_trace_is_left_after_an_exception(stubborn: Stubborn, after: int) -> None:
    images, labels = torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    before = trace(stubborn)
    stubborn.fail_after = after
    with pytest.raises(KeyboardInterrupt):
        evaluate(stubborn, images, labels, attacks=QUICK, eps=EPS)
    for key, value in trace(stubborn).items():
        assert same(before[key], value), key


def test_what_a_module_does_besides_in_train_mode_is_done_again(images: Tensor) -> None:
    class Folding(nn.Linear):  # as layers do that fold their weights for inference
        folded = False

        def train(self, mode: bool = True) -> Folding:
            self.folded = not mode
            return super().train(mode)

        def forward(self, images: Tensor) -> Tensor:
            assert self.folded
            return super().forward(images.flatten(1))

    model = Folding(144, 3)
    evaluate(model, images[:4], torch.zeros(4, dtype=torch.int64), attacks="fgsm", eps=EPS)
    assert model.training
    assert not model.folded


def test_operators_come_back_after_an_exception(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    set_alpha(net, 0.4)
    before = trace(net)
    calls = [0]

    def forward(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls[0] += 1
        if calls[0] > 30:  # in the adaptive attack proper, after its start on the base model
            raise KeyboardInterrupt

    handle = net.register_forward_pre_hook(forward)
    with pytest.raises(KeyboardInterrupt):
        evaluate(net, images, labels, attacks=SHORT[4], eps=EPS / 10)
    handle.remove()
    for key, value in trace(net).items():
        assert same(before[key], value), key


def test_attack_results_are_the_same_in_every_grad_mode(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    flags = []
    for around in (nullcontext, torch.no_grad, torch.inference_mode):
        with around():
            flags.append(evaluate(net, images[:20], labels[:20], attacks=SHORT[:3], eps=EPS))
    assert 0 < flags[0].worst.sum() < 20
    assert all(torch.equal(flags[0].standing, other.standing) for other in flags[1:])


def test_a_model_made_in_inference_mode(images: Tensor) -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(144, 3))
        labels = own_labels(model, images)
        result = evaluate(model, images, labels, attacks="pgd", eps=0.3)
    assert result.worst.sum() < result.clean.sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_attacked_in_float32(
    net: ConvNet, images: Tensor, labels: Tensor, dtype: torch.dtype
) -> None:
    net.to(dtype)
    wide = copy.deepcopy(net).float()
    result = evaluate(net, images[:20], labels[:20], attacks=SHORT[:3], eps=EPS)
    expected = evaluate(wide, images[:20], labels[:20], attacks=SHORT[:3], eps=EPS)
    assert torch.equal(result.standing, expected.standing)
    assert {p.dtype for p in net.parameters()} == {dtype}


def test_autocast_does_not_reach_the_attack(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    plain = evaluate(net, images[:20], labels[:20], attacks=SHORT[:4], eps=EPS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evaluate(net, images[:20], labels[:20], attacks=SHORT[:4], eps=EPS)
    assert torch.equal(plain.margin, cast.margin)
    assert torch.equal(plain.standing, cast.standing)


def test_channels_last_images_and_models(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    three = nn.Sequential(nn.Conv2d(3, 1, 1), net).eval()
    rgb = F.interpolate(images[:6], 20).expand(-1, 3, -1, -1).contiguous()
    classes = own_labels(three, rgb)
    three.to(memory_format=torch.channels_last)
    last = rgb.contiguous(memory_format=torch.channels_last)
    suite = [SHORT[3], FAB, {"attack": "apgd-t", "options": {"steps": 2}}, "fgsm"]
    for norm, eps in (("Linf", 0.1), ("L2", 1.0)):
        given = evaluate(three, last, classes, attacks=suite, eps=eps, norm=norm)
        plain = evaluate(three, rgb, classes, attacks=suite, eps=eps, norm=norm)
        assert torch.equal(given.standing, plain.standing)
        assert given.attacked[:, 0].all()


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.3), ("L2", 4.0)])
@pytest.mark.parametrize("size", [(20, 14), (5, 40), (40, 5), (4, 4)])
def test_square_takes_any_shape(size: tuple[int, int], norm: str, eps: float) -> None:
    images = torch.rand(6, 1, *size)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(size[0] * size[1], 3))
    labels = own_labels(model, images)
    assert evaluate(model, images, labels, attacks=SHORT[3], eps=eps, norm=norm).worst.sum() < 6


def test_models_without_parameters_and_wrapped_ones(images: Tensor) -> None:
    class Brightness(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            half = pixels.flatten(1)
            return torch.stack([half[:, :72].mean(1), half[:, 72:].mean(1)], 1)

    labels = own_labels(Brightness(), images)
    result = evaluate(Brightness(), images, labels, attacks=[*SHORT[:4], FAB], eps=0.5)
    assert result.clean.all()
    assert not result.worst.any()
