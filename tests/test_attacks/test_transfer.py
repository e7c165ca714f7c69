"""Transfer follows a neighbour's loss and judges by the network itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_meansparse.attacks import AttackSpec, evaluate, resolve_attacks
from lightning_meansparse.attacks.apgd import APGD
from lightning_meansparse.attacks.guard import Watched
from lightning_meansparse.attacks.transfer import Transfer
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.surgery import alpha_set, set_alpha
from tests.test_attacks.victims import EPS, same, trace

TRANSFER = "lightning_meansparse.attacks.transfer.Transfer"


def test_a_neighbour_at_the_same_alpha_is_the_network(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    set_alpha(net, 0.6)
    door = Watched(net, torch.device("cpu"))
    options = {"eps": EPS, "steps": 10, "seed": 3}
    mine = Transfer(door, factor=1.0, **options).perturb_from(images, labels)
    plain = APGD(door, **options).perturb_from(images, labels)
    assert torch.equal(mine.examples, plain.examples)
    assert torch.equal(mine.forwards, 2 * plain.forwards)


def test_the_base_models_loss_decides_where_to_go(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    """Samples that fall on the network nowhere on the way end where the base model's loss is."""
    set_alpha(net, 0.2)
    door = Watched(net, torch.device("cpu"))
    options = {"eps": EPS / 8, "steps": 10, "seed": 3}
    mine = Transfer(door, factor=0.0, **options).perturb_from(images, labels)
    with alpha_set(net, 0.0):
        base = APGD(door, **options).perturb_from(images, labels)
    both = ~mine.fooled & ~base.fooled
    assert int(both.sum()) > 10
    assert torch.equal(mine.examples[both], base.examples[both])


def test_transfer_beats_the_exact_gradient_where_the_operator_hides_it(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    set_alpha(net, 1.2)
    exact = {"attack": "apgd-ce", "options": {"steps": 20}}
    base = {"attack": "transfer-base", "options": {"steps": 20}}
    result = evaluate(net, images, labels, attacks=[exact, base], eps=EPS)
    assert result.kinds == ("gradient", "transfer")
    assert int(result.standing[:, 1].sum()) < int(result.standing[:, 0].sum())


def test_everything_is_put_back_also_after_an_error(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    set_alpha(net, {"stage1*": 0.3, "stage2*": 0.1})
    before = trace(net)
    evaluate(net, images, labels, attacks="transfer", eps=EPS)
    assert same(trace(net), before)
    calls = 0

    def fail(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 6:
            raise RuntimeError("broken")

    handle = net.stage2.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(net, images, labels, attacks="transfer", eps=EPS)
    handle.remove()
    assert same(trace(net), before)


def test_a_negative_factor_is_refused(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    (spec,) = resolve_attacks({"attack": "transfer-base", "options": {"factor": -1.0}})
    assert isinstance(spec, AttackSpec)
    with pytest.raises(RuntimeError, match="factor must be at least 0, got -1"):
        evaluate(net, images, labels, attacks=spec, eps=EPS)
