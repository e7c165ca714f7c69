"""The attacks are as strong as the library they stand beside, and stronger where it is blind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_meansparse.attacks import (
    AttackSpec,
    Evaluation,
    apgd,
    evaluate,
)
from lightning_meansparse.attacks.guard import Watched
from lightning_meansparse.attacks.losses import margin_loss
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.surgery import set_alpha
from tests.test_attacks.victims import APGD, EPS, SHORT, Linear, N, own_labels


def test_a_weak_net_falls(short: Evaluation) -> None:
    assert short.clean.sum() >= 0.95 * N
    assert short.standing[:, 0].sum() < short.clean.sum()


def test_a_weak_net_falls_to_nothing_at_a_large_radius(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    result = evaluate(net, images, labels, attacks=SHORT[2:3], eps=0.3)
    assert result.worst.sum() == 0


def test_adaptive_sees_through_masking(short: Evaluation) -> None:
    """Wide bands hide the gradient: exact APGD leaves many more standing than the adaptive one."""
    assert short.apparent is not None
    assert short.apparent.sum() - short.worst.sum() >= 0.15 * N


def test_adaptive_alone_beats_exact_at_equal_steps(
    net: ConvNet, images: Tensor, labels: Tensor, short: Evaluation
) -> None:
    set_alpha(net, 0.6)
    alone = evaluate(net, images, labels, attacks=SHORT[4], eps=EPS)
    assert alone.apparent is None
    assert alone.worst.sum() <= short.standing[:, 2].sum() - 0.15 * N


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_agrees_with_torchattacks(
    net: ConvNet, images: Tensor, labels: Tensor, norm: str
) -> None:
    import torchattacks

    from lightning_meansparse.attacks.apgd import APGD as Ours

    eps, steps = (EPS, 50) if norm == "Linf" else (0.6, 50)
    net.requires_grad_(False)
    reference = torchattacks.APGD(net, norm=norm, eps=eps, steps=steps, seed=0)
    theirs = net(reference(images, labels)).argmax(1) == labels
    ours = net(Ours(net, eps=eps, norm=norm, steps=steps)(images, labels)).argmax(1) == labels
    assert 0.1 * N < theirs.sum() < 0.95 * N
    assert (ours != theirs).sum() <= max(1, 0.02 * N)


def test_fgsm_is_torchattacks_fgsm(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    import torchattacks

    ours = evaluate(net, images, labels, attacks="fgsm", eps=EPS)
    theirs = evaluate(net, images, labels, attacks="torchattacks.FGSM", eps=EPS)
    assert torch.equal(ours.worst, theirs.worst)
    assert 0 < ours.worst.sum() < ours.clean.sum()
    assert issubclass(type(torchattacks.FGSM(net)), torchattacks.attack.Attack)


def test_confident_models_are_not_robust_models(images: Tensor) -> None:
    """Huge logits saturate cross-entropy in float32; the attack must not notice."""
    torch.manual_seed(0)
    meek = Linear(4)
    proud = copy.deepcopy(meek)
    proud.scale = 1e4
    labels = own_labels(meek, images)
    meek_left, proud_left = (
        int(evaluate(m, images, labels, attacks=["pgd", SHORT[2]], eps=0.03).worst.sum())
        for m in (meek, proud)
    )
    assert meek_left < N
    assert abs(meek_left - proud_left) <= 2


def test_our_cross_entropy_has_the_direction_and_order_of_the_usual_one() -> None:
    from lightning_meansparse.attacks.losses import cross_entropy

    logits = (3 * torch.randn(50, 6, dtype=torch.float64)).requires_grad_()
    labels = torch.randint(6, (50,))
    usual = F.cross_entropy(logits, labels, reduction="none")
    ours = cross_entropy(labels)(logits)
    assert torch.equal(usual.argsort(), ours.argsort())
    slopes = [torch.autograd.grad(v.sum(), logits, retain_graph=True)[0] for v in (usual, ours)]
    parallel = F.cosine_similarity(slopes[0], slopes[1])
    torch.testing.assert_close(parallel, torch.ones_like(parallel))


@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted", "margin"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_apgd_solves_linear_models(images: Tensor, loss: str, norm: str) -> None:
    """The robust accuracy of a two-class linear model is known in closed form."""
    torch.manual_seed(0)
    model = Linear(2)
    inner = images.clamp(0.3, 0.7)  # far from the borders of [0, 1]
    labels = own_labels(model, inner)
    model.requires_grad_(False)
    weight = model.head.weight[0] - model.head.weight[1]
    dual = weight.abs().sum() if norm == "Linf" else weight.norm()
    logits = model(inner)
    distance = (logits[:, 0] - logits[:, 1]).abs() / dual
    eps = float(distance.median())
    spec = AttackSpec("apgd", APGD, {"steps": 20, "loss": loss})
    result = evaluate(model, inner, labels, attacks=spec, eps=eps, norm=norm)
    clear = (distance - eps).abs() > 0.02 * eps
    assert torch.equal(result.worst[clear], distance[clear] > eps)


@pytest.mark.parametrize("classes", [2, 3, 4, 5, 10, 30, 1000])
def test_any_number_of_classes(images: Tensor, classes: int) -> None:
    torch.manual_seed(classes)
    model = Linear(classes)
    few = images[:6]
    suite = [
        {"attack": name, "options": {"steps": 3}}
        for name in ("pgd", "apgd-ce", "apgd-dlr", "apgd-t", "fab-t")
    ]
    suite += [{"attack": "square", "options": {"n_queries": 3}}]
    result = evaluate(model, few, own_labels(model, few), attacks=suite, eps=1e-4)
    assert result.clean.all()
    assert result.attacked[:, 0].all()
    result = evaluate(model, few, own_labels(model, few), attacks=suite[2:4], eps=0.9)
    assert not result.worst.any()


def test_restarts_go_to_the_samples_that_are_close(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    """Each sample costs one run, and the close ones, by their margin after it, all of them."""
    options = {"eps": EPS / 4, "steps": 8, "loss": "margin", "seed": 5}
    door = Watched(net, torch.device("cpu"))
    once = apgd.APGD(door, **options).perturb_from(images, labels)
    with torch.no_grad():
        left = margin_loss(net(once.examples), labels) / margin_loss(net(images), labels)
    close = float(left[~once.fooled].quantile(0.3))
    focused = apgd.APGD(door, **options, n_restarts=4, close=close).perturb_from(images, labels)
    never = ~focused.fooled
    assert torch.equal(focused.fooled & once.fooled, once.fooled)
    insisted = focused.backwards > once.backwards
    assert torch.equal(insisted[~once.fooled], left[~once.fooled] < close)
    assert bool((focused.backwards[never & insisted] == 4 * once.backwards[never & insisted]).all())
