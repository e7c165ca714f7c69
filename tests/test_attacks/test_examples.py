"""Every example is legal and scored by the exact forward."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_meansparse.attacks import (
    AttackSpec,
    Evaluation,
    evaluate,
)
from lightning_meansparse.attacks.ball import Ball
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.surgery import set_alpha
from tests.test_attacks.victims import EPS, SHORT, N, own_labels


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_examples_stay_in_the_ball(net: ConvNet, images: Tensor, labels: Tensor, norm: str) -> None:
    eps = EPS if norm == "Linf" else 0.5
    suite = [*SHORT[:3], {"attack": "fab-t", "options": {"steps": 5}}, SHORT[4]]
    suite += SHORT[3:4] if norm == "Linf" else []  # its grid does not fit 12 pixels under L2
    result = evaluate(
        net, images[:24], labels[:24], attacks=suite, eps=eps, norm=norm, keep_examples=True
    )
    assert result.examples is not None
    delta = result.examples.double() - images[:24].double()
    size = delta.abs().amax((1, 2, 3)) if norm == "Linf" else delta.flatten(1).norm(dim=1)
    assert size.max() <= eps
    assert size[~result.worst & result.clean].min() > 0
    assert result.examples.min() >= 0
    assert result.examples.max() <= 1


def test_flags_are_those_of_the_exact_forward(
    task: tuple[ConvNet, Tensor, Tensor], short: Evaluation
) -> None:
    model = copy.deepcopy(task[0])
    set_alpha(model, 0.6)
    assert short.examples is not None
    with torch.no_grad():
        right = model(short.examples).argmax(1) == task[2]
    assert torch.equal(right, short.worst)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_clip_makes_anything_legal(norm: str) -> None:
    center = torch.rand(16, 3, 5, 5)
    center[0] = 0
    center[1] = 1
    eps = 8 / 255
    wild = center + torch.randn_like(center)
    wild[2, 0, 0, 0], wild[3, 0, 0, 0], wild[4] = float("nan"), float("inf"), float("-inf")
    legal = Ball(center, eps, norm).clip(wild)
    delta = legal.double() - center.double()
    size = delta.abs().amax((1, 2, 3)) if norm == "Linf" else delta.flatten(1).norm(dim=1)
    assert legal.isfinite().all()
    assert legal.min() >= 0
    assert legal.max() <= 1
    assert size.max() <= eps
    inside = center + 0.1 * (legal - center)
    assert torch.equal(Ball(center, eps, norm).clip(inside), inside)


@pytest.mark.parametrize("eps", [1e-7, 1e-5, 1e-3, 0.5])
def test_clip_is_exact_however_small_the_ball(eps: float) -> None:
    """Where float32 has few numbers inside, the nearest to a point of the ball is often outside."""
    generator = torch.Generator().manual_seed(0)
    center = 0.25 + 0.5 * torch.rand(32, 3, 16, 16, generator=generator)
    wild = center + eps * torch.randn(center.shape, generator=generator)
    delta = Ball(center, eps, "L2").clip(wild).double() - center.double()
    size = delta.flatten(1).norm(dim=1)
    assert size.max() <= eps
    assert eps < 1e-3 or size.min() > 0.998 * eps


def _attack(found: Callable[[Tensor, Tensor], Any]) -> type:
    from torchattacks.attack import Attack

    class Custom(Attack):
        def __init__(self, model: nn.Module) -> None:
            super().__init__("custom", model)

        def forward(self, images: Tensor, labels: Tensor) -> Any:
            return found(images, labels)

    return Custom


def _run_custom(
    monkeypatch: pytest.MonkeyPatch, found: Callable[[Tensor, Tensor], Any], *args: Any, **kw: Any
) -> Evaluation:
    monkeypatch.setattr(sys.modules[__name__], "Custom", _attack(found), raising=False)
    return evaluate(*args, attacks=AttackSpec("custom", f"{__name__}.Custom"), eps=EPS, **kw)


def test_an_attack_outside_the_ball_is_pulled_back(
    net: ConvNet, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = images.flip(0)  # an image of another class fools every model, but is far away
    result = _run_custom(
        monkeypatch, lambda x, y: other[: len(x)], net, images, labels, keep_examples=True
    )
    assert result.examples is not None
    assert (result.examples.double() - images.double()).abs().max() <= EPS
    assert result.worst.sum() > 0.3 * N


def test_nan_examples_fool_nobody(
    net: ConvNet, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _run_custom(monkeypatch, lambda x, y: x * float("nan"), net, images, labels)
    assert torch.equal(result.worst, result.clean)


def test_an_attack_that_repairs_wrong_samples_gains_nothing(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    wrong = (labels + 1) % 4
    result = evaluate(net, images, wrong, attacks="pgd", eps=0.3)
    assert not (result.worst & ~result.clean).any()
    assert torch.equal(result.attacked[:, 0], result.clean)


def test_failing_attacks_are_named(
    net: ConvNet, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match=r"attack 'custom' .* failed: .*returned NoneType"):
        _run_custom(monkeypatch, lambda x, y: None, net, images, labels)


class NaNLogits(nn.Module):
    """NaN for the true class where the first pixel is bright: argmax would call that right."""

    def forward(self, images: Tensor) -> Tensor:
        logits = images.flatten(1)[:, :3].clone()
        return torch.where(logits[:, :1] > 0.5, torch.nan, logits)


def test_nan_logits_count_as_wrong() -> None:
    images = torch.rand(10, 1, 4, 4)
    images[:5, 0, 0, 0], images[5:, 0, 0, 0] = 0.9, 0.1
    labels = own_labels(NaNLogits(), images)
    result = evaluate(NaNLogits(), images, labels, attacks="fgsm", eps=1e-6)
    assert result.clean.tolist() == [False] * 5 + [True] * 5


def test_an_overflow_counts_as_wrong() -> None:
    class Overflowing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3] * torch.inf

    result = evaluate(
        Overflowing(),
        torch.rand(4, 1, 4, 4),
        torch.zeros(4, dtype=torch.int64),
        attacks="fgsm",
        eps=0.1,
    )
    assert not result.clean.any()
