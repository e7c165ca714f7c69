"""The building blocks of AutoAttack beside torchattacks' and beside the papers' formulas.

How they compare with the authors' own code on real images is measured by
`python -m tests.benchmarks.agreement` and kept in docs/records/agreement.json.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torchattacks
from torch import Tensor
from torch.nn import functional as F

from lightning_meansparse.attacks import square
from lightning_meansparse.attacks.apgd import APGD, checkpoints
from lightning_meansparse.attacks.ball import Ball
from lightning_meansparse.attacks.fab import FAB
from lightning_meansparse.attacks.guard import Watched
from lightning_meansparse.attacks.pgd import PGD
from lightning_meansparse.attacks.square import Square
from lightning_meansparse.attacks.transfer import Narrowing
from lightning_meansparse.demo.network import ConvNet
from lightning_meansparse.surgery import set_alpha
from tests.test_attacks.victims import EPS, Linear, N, own_labels

RADII = {"Linf": EPS, "L2": 0.6}
RECORD = Path(__file__).parents[2] / "docs/records/agreement.json"


@pytest.fixture
def watched(net: ConvNet) -> Watched:
    set_alpha(net.requires_grad_(False), 0.2)
    return Watched(net, torch.device("cpu"))


def _stands(model: Watched, examples: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return model(examples).argmax(1) == labels


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 100, 300])
def test_checkpoints_are_the_papers(steps: int) -> None:
    """Sec. 3.1: p_0 = 0, p_1 = 0.22, then gaps that shrink by 0.03 down to 0.06."""
    places = [Fraction(0), Fraction(22, 100)]
    while places[-1] <= 1:
        gap = max(places[-1] - places[-2] - Fraction(3, 100), Fraction(6, 100))
        places.append(places[-1] + gap)
    assert checkpoints(steps) == {math.ceil(p * steps) for p in places[1:-1]}


def test_targeted_apgd_agrees_with_torchattacks(
    watched: Watched, images: Tensor, labels: Tensor
) -> None:
    set_alpha(watched, 0.0)  # with the band the same library's flags change from seed to seed
    theirs = torchattacks.APGDT(watched, eps=EPS, steps=50, n_classes=4)
    ours = APGD(watched, eps=EPS, steps=50, loss="dlr-targeted")
    one, other = (_stands(watched, attack(images, labels), labels) for attack in (ours, theirs))
    assert 0.1 * N < other.sum() < 0.9 * N
    assert (one != other).sum() <= 0.02 * N


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_fab_does_what_torchattacks_fab_does(
    watched: Watched, images: Tensor, labels: Tensor, norm: str
) -> None:
    eps = RADII[norm]
    theirs = torchattacks.FAB(
        watched, norm=norm, eps=eps, steps=20, multi_targeted=True, n_classes=4
    )
    other = _stands(watched, theirs(images, labels), labels)
    spent = watched.forwards, watched.backwards
    watched.reset()
    found = FAB(watched, eps=eps, norm=norm, steps=20).perturb_from(images, labels)
    assert 0.1 * N < other.sum() < 0.9 * N
    right = _stands(watched, images, labels)
    assert torch.equal(~found.fooled[right], other[right])
    assert (_stands(watched, found.examples, labels) != ~found.fooled)[right].sum() == 0
    assert watched.forwards < spent[0]  # what has fallen is dropped
    assert watched.backwards < spent[1]


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.03), ("L2", 0.8)])
def test_square_is_as_strong_as_torchattacks_square(
    watched: Watched, images: Tensor, norm: str, eps: float
) -> None:
    """Different random numbers: the shares are compared, over two seeds each."""
    images = F.interpolate(images, 28)  # under L2 torchattacks takes few sizes
    labels = own_labels(watched, images)
    options: dict[str, Any] = {"norm": norm, "eps": eps, "n_queries": 150}
    theirs, ours = 0, 0
    for seed in (0, 1):
        other = torchattacks.Square(watched, resc_schedule=False, seed=seed, **options)
        theirs += int(_stands(watched, other(images, labels), labels).sum())
        found = Square(watched, seed=seed, **options).perturb_from(images, labels)
        ours += int((~found.fooled).sum())
    assert 0.2 * 2 * N < theirs < 0.8 * 2 * N
    assert abs(ours - theirs) <= 0.05 * 2 * N


def test_the_schedule_of_square_is_torchattacks(watched: Watched) -> None:
    theirs = torchattacks.Square(watched, n_queries=5000, resc_schedule=False)
    for query in range(10_000):
        assert square.share(0.8, query) == theirs.p_selection(query)


@pytest.mark.parametrize("side", [1, 2, 3, 5, 6, 25])
def test_the_pattern_of_square_is_torchattacks(watched: Watched, side: int) -> None:
    theirs = torchattacks.Square(watched, norm="L2")
    upright, lying = square._patterns(side, torch.tensor([0.9, 0.1]))[:, 0]
    for _ in range(8):
        drawn = theirs.eta(side)
        assert min((drawn - ours).abs().max() for ours in (upright, lying)) < 1e-6
    assert side == 1 or not torch.equal(upright, lying)


def _drawn_square(draws: Tensor, size: int, side: int) -> tuple[slice, slice]:
    top, left = (int(number * (size - side + 1)) for number in draws.tolist())
    return slice(top, top + side), slice(left, left + side)


def test_a_step_of_square_under_linf() -> None:
    """Literally Algorithm 2, one sample after the other, on colour images."""
    torch.manual_seed(0)
    center, draws = torch.rand(5, 3, 10, 10), torch.rand(5, 5)
    ball = Ball(center, 0.1, "Linf")
    points = square._stripes(ball, torch.rand(5, 30))
    assert torch.equal(points, ball.project(points))
    expected = points.clone()
    for row in range(5):
        window = _drawn_square(draws[row, :2], 10, side=4)  # round(sqrt(0.2 * 100))
        for channel in range(3):
            sign = -1 if draws[row, 2 + channel] < 0.5 else 1
            expected[row, channel][window] = center[row, channel][window] + sign * 0.1
    new = square._square(ball, points, 0.2, draws)
    torch.testing.assert_close(new, expected.clamp(0, 1))
    assert not torch.equal(new, points)


def test_a_step_of_square_under_l2() -> None:
    """Literally Algorithm 3, one sample after the other, on colour images."""
    torch.manual_seed(0)
    size, side, eps = 12, 5, 0.7  # side: round(sqrt(0.15 * 144)), made odd
    center, draws = torch.rand(5, 3, size, size), torch.rand(5, 8)
    ball = Ball(center, eps, "L2")
    points = square._tiles(ball, torch.rand(5, 4 * 36))
    delta = (points - center).double()
    patterns = square._patterns(side, draws[:, 4])[:, 0].double()
    for row in range(5):
        one = _drawn_square(draws[row, 0:2], size, side)
        two = _drawn_square(draws[row, 2:4], size, side)
        unused = max(eps**2 - delta[row].square().sum(), 0) / 3
        for channel in range(3):
            old = delta[row, channel].clone()
            union = torch.zeros(size, size)
            union[one] = union[two] = 1
            sign = -1 if draws[row, 5 + channel] < 0.5 else 1
            new = sign * patterns[row] + old[one] / old[one].norm()
            budget = (unused + (old * union).square().sum()).sqrt()
            delta[row, channel][two] = 0
            delta[row, channel][one] = budget * new / new.norm()
        delta[row] *= eps / delta[row].norm()
    new = square._moved_mass(ball, points, 0.15, draws)
    torch.testing.assert_close(new, (center + delta.float()).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(12, 12), (20, 14), (5, 40), (3, 3), (28, 28)])
def test_tiles_of_square_fill_any_image(size: tuple[int, int]) -> None:
    ball = Ball(torch.full((2, 3, *size), 0.5), 0.3, "L2")
    side = max(min(size) // 5, 1)
    count = (size[0] // side) * (size[1] // side)
    delta = square._tiles(ball, torch.rand(2, 4 * count)) - 0.5
    torch.testing.assert_close(delta.flatten(1).norm(dim=1), torch.full((2,), 0.3))
    empty = (delta == 0).all(1).sum(dim=(1, 2))
    assert (empty <= size[0] * size[1] - count * side * side).all()


ATTACKS: dict[str, tuple[type, dict[str, Any]]] = {
    "pgd": (PGD, {"steps": 4}),
    "apgd": (APGD, {"steps": 6, "n_restarts": 2}),
    "apgd-t": (APGD, {"steps": 4, "loss": "dlr-targeted", "n_restarts": 2}),
    "apgd-close": (APGD, {"steps": 6, "n_restarts": 3, "close": 0.5}),
    "narrowing": (Narrowing, {"steps": 4, "stages": 2, "stage_steps": 2, "n_restarts": 2}),
    "fab": (FAB, {"steps": 4, "n_restarts": 2}),
    "square": (Square, {"n_queries": 20, "n_restarts": 2}),
    "square-ce": (Square, {"n_queries": 20, "loss": "ce"}),
}


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_sample_is_attacked_alone(name: str, norm: str) -> None:
    """What is found and what is spent belongs to a sample's index, not to its batch."""
    torch.manual_seed(0)
    model, images = Linear(4).requires_grad_(False), torch.rand(24, 1, 12, 12)
    watched, labels = Watched(model, torch.device("cpu")), own_labels(model, images)
    cls, options = ATTACKS[name]
    eps = {"Linf": 0.04, "L2": 0.3}[norm] * (3 if cls is Square else 1)
    attack = cls(watched, eps=eps, norm=norm, **options)
    whole = attack.perturb_from(images, labels)
    assert watched.forwards == whole.forwards.sum()
    assert watched.backwards == whole.backwards.sum()
    assert 0 < whole.fooled.sum() < 24
    for order in (torch.randperm(24)[:9], whole.fooled.nonzero().squeeze(1)):
        part = attack.perturb_from(images[order], labels[order], indices=order)
        torch.testing.assert_close(part.examples, whole.examples[order], rtol=0, atol=1e-5)
        assert torch.equal(part.fooled, whole.fooled[order])
        assert torch.equal(part.forwards, whole.forwards[order])
        assert torch.equal(part.backwards, whole.backwards[order])


def test_budgets_of_what_stands() -> None:
    model, images = Linear(4).requires_grad_(False), torch.rand(3, 1, 12, 12)
    labels = own_labels(model, images)
    for attack, forwards, backwards in (
        (APGD(model, eps=1e-6, steps=10), 11, 10),
        (APGD(model, eps=1e-6, steps=10, loss="dlr-targeted"), 1 + 3 * 11, 3 * 10),
        (FAB(model, eps=1e-6, steps=10), 1 + 3 * 20, 3 * 10),
        (Square(model, eps=1e-6, n_queries=10), 11, 0),
    ):
        found = attack.perturb_from(images, labels)
        assert not found.fooled.any()
        assert found.forwards.tolist() == [forwards] * 3
        assert found.backwards.tolist() == [backwards] * 3


def test_square_starts_where_it_is_told() -> None:
    torch.manual_seed(0)
    model, images = Linear(4), torch.rand(4, 1, 12, 12)
    labels = own_labels(model, images)
    attack = Square(model, eps=0.01, n_queries=1)
    starts = images + 0.005
    found = attack.perturb_from(images, labels, starts=starts).examples
    changed = (found != Ball(images, 0.01, "Linf").project(starts)).flatten(1).sum(1)
    assert (changed <= 11 * 11).all()  # one square, kept or not


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (Square, {"n_queries": 0}, "n_queries must be at least 1, got 0"),
        (Square, {"n_restarts": 0}, "n_restarts must be at least 1"),
        (Square, {"loss": "dlr"}, "loss must be 'margin' or 'ce', got 'dlr'"),
        (Square, {"p_init": 1.5}, "p_init must be a share of the image"),
        (FAB, {"steps": 0}, "steps must be at least 1, got 0"),
        (FAB, {"n_targets": 0}, "n_targets must be at least 1, got 0"),
    ],
)
def test_budgets_of_nothing_are_refused(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(Linear(3), **options)


def test_the_record_agrees() -> None:
    record = json.loads(RECORD.read_text())
    assert record["settings"]["n"] >= 500
    assert set(record["attacks"]) == {"apgd-ce", "apgd-t", "fab-t", "square"}
    for name, comparisons in record["summary"].items():
        assert comparisons["ours / reference"]["agreement"] >= 0.99, name
    worst = record["summary"]["worst case"]["ours / reference"]
    assert worst["accuracy of the first"] <= worst["accuracy of the second"] + 0.005
