"""What cannot give a true number is refused, with a remedy."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_meansparse.attacks import (
    evaluate,
    resolve_attacks,
)
from lightning_meansparse.demo.network import ConvNet
from tests.test_attacks.victims import EPS, Linear, N, own_labels, same, trace


@pytest.mark.parametrize("norm", ["linf", "l2", "L1", "inf"])
def test_wrong_norms(net: ConvNet, images: Tensor, labels: Tensor, norm: str) -> None:
    message = "'Linf'" if norm == "linf" else "norm must be one of"
    with pytest.raises(ValueError, match=message):
        evaluate(net, images, labels, attacks="pgd", eps=EPS, norm=norm)


@pytest.mark.parametrize(
    ("attack", "norm", "message"),
    [
        ("torchattacks.PGD", "L2", r"not sound under norm='L2' \(but is under Linf\)"),
        ("torchattacks.PGDL2", "Linf", r"not sound under norm='Linf' \(but is under L2\)"),
        ("torchattacks.APGDT", "L2", "'apgd-t' is sound"),
        ("torchattacks.AutoAttack", "Linf", "attacks='standard' spells them out"),
        ("torchattacks.JSMA", "Linf", "not sound"),
        ({"attack": "torchattacks.PGD", "options": {"step": 3}}, "Linf", "takes no 'step'"),
        (
            {"attack": "torchattacks.PGD", "start": "base", "kind": "adaptive"},
            "Linf",
            "cannot start",
        ),
        ("torchattacks.Nothing", "Linf", "must be a class derived from torchattacks.Attack"),
        ("torch.nn.Linear", "Linf", "must be a class derived from torchattacks.Attack"),
    ],
)
def test_unsound_attacks(
    net: ConvNet, images: Tensor, labels: Tensor, attack: Any, norm: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(net, images, labels, attacks=attack, eps=EPS, norm=norm)


def test_any_torchattacks_class_with_options(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    spec = {"attack": "torchattacks.PGDL2", "options": {"alpha": 0.3, "steps": 10}}
    result = evaluate(net, images, labels, attacks=spec, eps=1.0, norm="L2")
    assert result.attacks == ("pgdl2",)
    assert result.worst.sum() < 0.5 * N


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x, y: (x * 4 - 2, y), ValueError, "looks normalised"),
        (lambda x, y: (x + 0.2, y), ValueError, r"images must lie in \[0, 1\]"),
        (lambda x, y: (x * float("nan"), y), ValueError, r"images must lie in \[0, 1\]"),
        (lambda x, y: ((x * 255).byte(), y), TypeError, "divide by 255"),
        (lambda x, y: (x[0], y), ValueError, r"shape \(N, C, H, W\)"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "must not be empty"),
        (lambda x, y: (x.numpy(), y), TypeError, "images must be a torch.Tensor"),
        (lambda x, y: (x, y.int()), TypeError, "labels must be an int64 tensor"),
        (lambda x, y: (x, F.one_hot(y)), ValueError, "labels must have shape"),
        (lambda x, y: (x, y + 3), ValueError, "below the number of classes 4"),
        (lambda x, y: (x, y - 1), ValueError, "class numbers >= 0"),
    ],
)
def test_wrong_batches(
    net: ConvNet,
    images: Tensor,
    labels: Tensor,
    change: Callable[[Tensor, Tensor], Any],
    error: type[Exception],
    message: str,
) -> None:
    before = trace(net)
    with pytest.raises(error, match=message):
        evaluate(net, *change(images, labels), attacks="fgsm", eps=EPS)
    assert all(same(before[key], value) for key, value in trace(net).items())


class Output(dict[str, Tensor]):
    """Looks like a Hugging Face output object."""


class Odd(nn.Module):
    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, images: Tensor) -> Any:
        return self.make(images.flatten(1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: Output(logits=x), TypeError, r"load_classifier\(model\) unwraps Hugging Face"),
        (lambda x: (x, x), TypeError, "must return a tensor of logits"),
        (lambda x: x[:, :1], ValueError, "2 to 1000 classes"),
        (lambda x: x.repeat(1, 7), ValueError, "2 to 1000 classes"),
        (lambda x: x.view(len(x), 12, 12), ValueError, "must return logits of shape"),
        (lambda x: x.long(), TypeError, "floating-point logits"),
        (lambda x: x.detach(), RuntimeError, "no gradient with respect to the pixels"),
    ],
)
def test_what_is_no_classifier(
    images: Tensor, make: Callable[[Tensor], Any], error: type[Exception], message: str
) -> None:
    few, labels = images[:8], torch.zeros(8, dtype=torch.int64)
    labels = few.flatten(1).argmax(1)
    with pytest.raises(error, match=message):
        evaluate(Odd(make), few, labels, attacks="fgsm", eps=EPS)


def test_functions_are_no_classifiers(images: Tensor, labels: Tensor) -> None:
    with pytest.raises(TypeError, match=r"classifier must be a torch\.nn\.Module"):
        evaluate(lambda x: x, images, labels, attacks="fgsm", eps=EPS)  # type: ignore[arg-type]


@pytest.fixture
def without_torchattacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = builtins.__import__
    gone = ("torchattacks", "scipy")

    def fake(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in gone:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)
    for name in [name for name in sys.modules if name.partition(".")[0] in gone]:
        monkeypatch.setitem(sys.modules, name, None)
    return


@pytest.mark.usefixtures("without_torchattacks")
def test_missing_torchattacks_names_the_extra(net: ConvNet, images: Tensor, labels: Tensor) -> None:
    assert resolve_attacks("standard")
    with pytest.raises(ImportError, match=r'pip install "lightning_meansparse\[attacks\]"'):
        evaluate(net, images, labels, attacks="pgd", eps=EPS)


def test_under_l1_the_library_has_no_sound_attack() -> None:
    """On a linear model the shortest way is known: along the largest weights, to the pixels' ends.

    As soon as EADL1 finds it, L1 can be offered.
    """
    from torchattacks import EADL1

    torch.manual_seed(0)
    model, images = Linear(2).eval(), 0.2 + 0.6 * torch.rand(16, 1, 12, 12)
    labels = own_labels(model, images)
    weight = (model.head.weight[0] - model.head.weight[1]).detach()
    needed = model(images).detach().diff(dim=1).squeeze(1).abs()
    toward = torch.where((labels == 0)[:, None], -weight, weight).sign()
    room = torch.where(toward > 0, 1 - images.flatten(1), images.flatten(1))
    order = weight.abs().argsort(descending=True)
    room, steep = room[:, order], weight.abs()[order]
    won = (room * steep).cumsum(1)
    used = torch.where(won <= needed[:, None], room, 0).sum(1)
    last = (won <= needed[:, None]).sum(1)
    before = torch.where(won <= needed[:, None], room * steep, 0).sum(1)
    shortest = used + (needed - before) / steep[last]
    found = EADL1(model)(images.clone(), labels)
    assert bool((model(found).argmax(1) != labels).all())
    assert float(((found - images).abs().flatten(1).sum(1) / shortest).median()) > 2
    with pytest.raises(ValueError, match="Under L1 no attack of torchattacks is sound"):
        evaluate(model, images, labels, attacks="quick", eps=5.0, norm="L1")
