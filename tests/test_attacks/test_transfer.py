"""Transfer follows a neighbour's loss and judges by the network itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import lightning_meansparse.demo
from lightning_meansparse import calibrate_, find_sites, load_classifier, sparsify_
from lightning_meansparse.attacks import AttackSpec, evaluate, resolve_attacks
from lightning_meansparse.attacks.apgd import APGD
from lightning_meansparse.attacks.guard import Watched
from lightning_meansparse.attacks.transfer import Narrowing, Transfer
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.surgery import alpha_set, alphas, operators, set_alpha
from lightning_meansparse.surgery.control import alpha_scaled
from tests.test_attacks.victims import EPS, same, trace

DEMO = Path(lightning_meansparse.demo.__file__).parent


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


def test_an_alpha_that_operators_share_is_scaled_once(net: ConvNet) -> None:
    one = torch.tensor(0.25)
    for op in operators(net).values():
        op.alpha = one
    with alpha_scaled(net, 2.0):
        assert set(alphas(net).values()) == {0.5}
    assert set(alphas(net).values()) == {0.25}


def test_a_negative_factor_is_refused(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    (spec,) = resolve_attacks({"attack": "transfer-base", "options": {"factor": -1.0}})
    assert isinstance(spec, AttackSpec)
    with pytest.raises(RuntimeError, match="factor must be at least 0, got -1"):
        evaluate(net, images, labels, attacks=spec, eps=EPS)


def test_narrowing_goes_on_where_the_wider_bands_led(
    net: ConvNet, images: Tensor, labels: Tensor
) -> None:
    """Two stages are two transfers and a run of APGD, one after the other, each at its alpha."""
    set_alpha(net, 0.3)
    door = Watched(net, torch.device("cpu"))
    options = {"eps": EPS / 4, "seed": 3}
    mine = Narrowing(door, factor=4.0, stages=2, stage_steps=5, steps=7, **options)
    found = mine.perturb_from(images, labels)
    assert door.forwards == int(found.forwards.sum())
    assert door.backwards == int(found.backwards.sum())
    far = Transfer(door, factor=4.0, steps=5, **options).perturb_from(images, labels)
    near = Transfer(door, factor=2.0, steps=5, **options)
    near = near.perturb_from(images, labels, starts=far.examples)
    last = APGD(door, steps=7, **options).perturb_from(images, labels, starts=near.examples)
    fallen = far.fooled | near.fooled | last.fooled
    assert 0 < int(fallen.sum()) < len(images)
    assert torch.equal(found.fooled, fallen)
    assert torch.equal(found.examples[~fallen], last.examples[~fallen])
    with torch.no_grad():
        assert torch.equal(net(found.examples).argmax(1) != labels, fallen)


def test_narrowing_finds_what_restarts_do_not() -> None:
    """Under L2 the bands of a robust network make many hills: at no greater cost it breaks more."""
    data = ImageDataModule(DEMO / "fashion_mnist", batch_size=40, calibration=500)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    classifier = load_classifier(DEMO / "checkpoint")
    sparsify_(classifier, find_sites(classifier, images[:2]), alpha=0.4)
    calibrate_(classifier, (images for images, _ in data.calibration_dataloader()))
    stages = {"n_restarts": 1, "stages": 8, "steps": 30}
    narrowing = {"attack": "adaptive-narrowing", "options": stages}
    restarts = {"attack": "adaptive-ce", "start": "random", "options": {"n_restarts": 4}}
    one, other = (
        evaluate(classifier, images, labels, attacks=attack, eps=0.8, norm="L2")
        for attack in (narrowing, restarts)
    )
    spent, allowed = (int((r.forwards + r.backwards).sum()) for r in (one, other))
    assert spent <= allowed
    assert int(one.worst.sum()) <= int(other.worst.sum()) - 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0.5}, "factor must be at least 1: bands narrow, got 0.5"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"stage_steps": 0}, "steps must be at least 1, got 0"),
    ],
)
def test_narrowing_refuses_what_does_not_narrow(
    net: ConvNet, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Narrowing(net, **options)
