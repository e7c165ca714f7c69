"""A result depends on the seed and the sample, and its parts agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_meansparse.attacks import ATTACKS, BaseExamples, Evaluation, evaluate, evaluation
from lightning_meansparse.attacks.ball import Ball, sample_seed
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.surgery import alphas, operators, set_alpha
from tests.test_attacks.victims import EPS, SHORT, Linear, N, own_labels


def test_standing_only_falls(short: Evaluation) -> None:
    flags = torch.cat([short.clean[:, None], short.standing], dim=1).int()
    assert (flags.diff(dim=1) <= 0).all()
    assert torch.equal(short.attacked, flags[:, :-1].bool())
    assert torch.equal(short.worst, flags[:, -1].bool())
    assert ((short.forwards > 0) == short.attacked).all()
    assert (short.backwards[~short.attacked] == 0).all()
    assert torch.equal(short.clean, short.predictions == short.labels)
    assert torch.equal(short.clean, short.margin > 0)


def test_counts_are_those_of_the_model(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    seen = [0, 0]

    def forward(module: nn.Module, args: tuple[Tensor, ...], logits: Tensor) -> None:
        seen[0] += len(logits)
        if logits.requires_grad:
            logits.register_hook(lambda g: seen.__setitem__(1, seen[1] + len(g)))

    net.register_forward_hook(forward)
    suite = [*SHORT, {"attack": "apgd-t", "options": {"steps": 4}}, "torchattacks.BIM"]
    suite += [{"attack": "transfer-below", "options": {"steps": 3}}]
    suite += [{"attack": "transfer-above", "options": {"steps": 2, "loss": "dlr-targeted"}}]
    set_alpha(net, 0.3)
    result = evaluate(net, images[:16], labels[:16], attacks=suite, eps=EPS / 2)
    assert seen[0] == result.forwards.sum() + 2 * 16  # the clean accuracy, and the symptoms
    assert seen[1] == result.backwards.sum() + 16


def test_the_order_of_samples_does_not_matter(
    net: ConvNet, images: Tensor, labels: Tensor, short: Evaluation
) -> None:
    """Another order and other batch sizes: float32 sums differ, so a few flags on the edge may."""
    set_alpha(net, 0.6)
    order = torch.randperm(N)
    result = evaluate(
        net, images[order], labels[order], attacks=SHORT, eps=EPS, indices=order, batch_size=17
    )
    back = order.argsort()
    assert torch.equal(result.indices[back], torch.arange(N))
    assert torch.equal(result.clean[back], short.clean)
    assert (result.standing[back] != short.standing).float().mean() <= 0.02


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.08), ("L2", 0.8)])
def test_square_does_not_depend_on_the_batch(norm: str, eps: float) -> None:
    torch.manual_seed(0)
    model, images = Linear(4, size=16), torch.rand(40, 1, 16, 16)
    labels = own_labels(model, images)
    whole = evaluate(model, images, labels, attacks=SHORT[3], eps=eps, norm=norm)
    parts = evaluate(model, images, labels, attacks=SHORT[3], eps=eps, norm=norm, batch_size=7)
    assert 5 < whole.worst.sum() < 35
    assert torch.equal(whole.worst, parts.worst)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_noise_belongs_to_the_sample(norm: str) -> None:
    center = torch.rand(6, 1, 5, 5)
    numbers = torch.tensor([3, 1, 4, 1, 5, 9])
    whole = Ball(center, 0.1, norm).random(7, numbers)
    part = Ball(center[4:5], 0.1, norm).random(7, numbers[4:5])
    assert torch.equal(whole[4:5], part)
    assert not torch.equal(whole, Ball(center, 0.1, norm).random(8, numbers))
    assert not torch.equal(whole, Ball(center, 0.1, norm).random(7, numbers, run=1))
    many = {sample_seed(s, i, r) for s in range(4) for i in range(50) for r in range(4)}
    assert len(many) == 800


def test_the_same_seed_gives_the_same_result(
    net: ConvNet, images: Tensor, labels: Tensor, short: Evaluation
) -> None:
    set_alpha(net, 0.6)
    torch.manual_seed(123)
    again = evaluate(net, images, labels, attacks=SHORT, eps=EPS, keep_examples=True)
    assert torch.equal(again.standing, short.standing)
    assert again.examples is not None
    assert short.examples is not None
    assert torch.equal(again.examples, short.examples)


def test_base_examples_are_made_once(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    base = BaseExamples()
    spent = []
    for alpha in (0.2, 0.4):
        set_alpha(net, alpha)
        alone = evaluate(net, images, labels, attacks=SHORT[4], eps=EPS)
        shared = evaluate(net, images, labels, attacks=SHORT[4], eps=EPS, base=base)
        assert torch.equal(alone.standing, shared.standing)
        spent.append((int(alone.backwards.sum()), int(shared.backwards.sum())))
        assert alphas(net) == dict.fromkeys(operators(net), alpha)
    assert spent[0][0] == spent[0][1]
    assert spent[1][1] < spent[1][0]
    with pytest.raises(ValueError, match=r"make a new BaseExamples\(\) per batch"):
        evaluate(net, images.flip(0), labels, attacks=SHORT[4], eps=EPS, base=base)
    with pytest.raises(ValueError, match="eps, norm, seed"):
        evaluate(net, images, labels, attacks=SHORT[4], eps=EPS / 2, base=base)


def test_progress_names_each_attack(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    said: list[str] = []
    evaluate(net, images[:4], labels[:4], attacks=SHORT[:2], eps=EPS, progress=said.append)
    assert [text.partition(":")[0] for text in said[1:]] == ["fgsm", "pgd"]
    assert "of 4 images" in said[1]


def test_no_attack_repeats_another_on_the_base_model(
    net: ConvNet, images: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At alpha 0 all backward rules are one; only other noise makes an attack a restart."""
    drawn = []

    def build(*args: object, seed: int, **kwargs: object) -> None:
        drawn.append(seed)
        raise RuntimeError("seen enough")

    monkeypatch.setattr(evaluation, "build_attack", build)
    for spec in ATTACKS.values():
        with pytest.raises(RuntimeError, match="seen enough"):
            evaluate(net, images[:2], labels[:2], attacks=spec, eps=EPS)
    assert len(set(drawn)) == len(ATTACKS)
