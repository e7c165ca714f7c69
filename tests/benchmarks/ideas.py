"""What a hostile evaluator tries beyond `full`: each idea is a function from a target to examples.

No idea is believed: `tests.benchmarks.hostile` clips what they give and asks the exact network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks.apgd import APGD
from lightning_meansparse.attacks.ball import Ball
from lightning_meansparse.attacks.fab import FAB
from lightning_meansparse.attacks.library import load_torchattacks
from lightning_meansparse.attacks.losses import cross_entropy, margin_loss
from lightning_meansparse.attacks.pgd import Loss
from lightning_meansparse.attacks.square import Square
from lightning_meansparse.attacks.transfer import Narrowing
from lightning_meansparse.layer import MeanSparse
from lightning_meansparse.surgery import backward_rule, operators
from lightning_meansparse.surgery.control import alpha_scaled

Gate = Callable[[Tensor, Tensor], Tensor]
"""Distance to the centre and half-width of the band, to how far the gate is open."""


@dataclass
class Target:
    """Images that still stand, and what an attacker knows."""

    model: nn.Module
    stranger: nn.Module
    images: Tensor
    labels: Tensor
    nearest: Tensor
    others: Tensor
    other_labels: Tensor
    eps: float
    norm: str

    @property
    def ball(self) -> Ball:
        """What is within reach."""
        return Ball(self.images, self.eps, self.norm)

    def apgd(
        self, cls: type[APGD] | None = None, starts: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Examples of APGD on the margin with these options, through whatever rule is set."""
        options = {"loss": "margin", "steps": 50, "seed": 100, "eps": self.eps, **options}
        attack = (cls or APGD)(self.model, norm=self.norm, **options)
        return attack.perturb_from(self.images, self.labels, starts=starts).examples

    def gates(self, temperature: float = 1 / 16) -> Any:
        """See through the operators."""
        return backward_rule(self.model, "smooth", temperature=temperature)


class Annealed(APGD):
    """The gate sharpens while the attack runs, from half the band to a sixty-fourth."""

    calls = 0

    def gradient(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient at the width that is due."""
        width = 2.0 ** -(1 + 5 * min(self.calls / self.steps, 1))
        self.calls += 1
        with backward_rule(self.model, "smooth", temperature=width):
            return super().gradient(images, labels, loss)


class Averaged(APGD):
    """The mean gradient at eight points around the image: a smoothed loss surface."""

    def gradient(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of nine."""
        values, slope, standing = super().gradient(images, labels, loss)
        length = self.eps / (8 if self.norm == "Linf" else 8 * images[0].numel() ** 0.5)
        for _ in range(8):
            near = images + length * torch.randn_like(images)
            slope = slope + super().gradient(near, labels, loss)[1]
        return values, slope, standing


class Crowd(APGD):
    """The mean gradient of the network at 0.7, 0.85, 1 and 1.15 times alpha."""

    def gradient(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The mean of four."""
        values, slope, standing = super().gradient(images, labels, loss)
        for factor in (0.7, 0.85, 1.15):
            with alpha_scaled(self.model, factor):
                slope = slope + super().gradient(images, labels, loss)[1]
        return values, slope, standing


class Mixed(APGD):
    """Every site looks through another rule at every step: the identity, or some gate."""

    def gradient(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient through rules that are drawn anew."""
        found = operators(self.model).values()
        before = [(op.backward, op.temperature) for op in found]
        for op in found:
            op.temperature = 2.0 ** -int(torch.randint(0, 7, ()))
            op.backward = "smooth" if torch.rand(()) < 0.85 else "identity"
        try:
            return super().gradient(images, labels, loss)
        finally:
            for op, (rule, temperature) in zip(found, before, strict=True):
                op.backward, op.temperature = rule, temperature


class Scaled(APGD):
    """Cross-entropy of logits that are divided by a temperature."""

    heat = 10.0

    def _loss(self, labels: Tensor, targets: Tensor) -> Loss:
        return lambda logits: cross_entropy(labels)(logits / self.heat)


class Cool(Scaled):
    """The same, sharper."""

    heat = 0.2


class Decomposed(APGD):
    """The true logit alone falls, or the others alone rise, by turns; then the margin."""

    calls = 0

    def gradient(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
        """One half of the margin in the first half of the steps."""
        self.calls += 1
        if self.calls > self.steps // 2:
            return super().gradient(images, labels, loss)
        true = self.calls % 2 == 0

        def half(logits: Tensor) -> Tensor:
            if true:
                return -logits.gather(1, labels[:, None]).squeeze(1)
            return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1)

        _, slope, standing = super().gradient(images, labels, half)
        return self.judge(images, labels, loss)[0], slope, standing


@contextmanager
def reshaped(model: nn.Module, soft: Callable[[MeanSparse, Tensor], Tensor]) -> Iterator[None]:
    """Replace what every operator computes inside the ``with`` block."""
    found = list(operators(model).values())
    for op in found:
        op.forward = lambda x, op=op, **how: soft(op, x)  # type: ignore[method-assign,misc]
    try:
        yield
    finally:
        for op in found:
            del op.forward


def gated(gate: Gate, *, exact: bool = True) -> Callable[[MeanSparse, Tensor], Tensor]:
    """An operator with the gradient of another gate; with its values, too, unless ``exact``."""

    def soft(op: MeanSparse, x: Tensor) -> Tensor:
        distance = x - op.reference
        width = op.alpha * op.var.sqrt()
        y = torch.where(width > 0, op.reference + distance * gate(distance.abs(), width), x)
        if not exact:
            return y
        truth = torch.where(distance.abs() < width, op.reference, x)
        return y + (truth - y).detach()

    return soft


def _sigmoid(distance: Tensor, width: Tensor, temperature: float) -> Tensor:
    return torch.sigmoid((distance - width) / (temperature * width).clamp_min(1e-12))


GATES: dict[str, tuple[Gate, bool]] = {
    "gate without its slope": (lambda d, c: _sigmoid(d, c, 1 / 4).detach(), True),
    "ramp": (lambda d, c: (d / c.clamp_min(1e-12) - 0.5).clamp(0, 1), True),
    "mean of four gates": (
        lambda d, c: sum(_sigmoid(d, c, t) for t in (1, 1 / 4, 1 / 16, 1 / 64)) / 4,
        True,
    ),
    "threshold drawn per value": (
        lambda d, c: _sigmoid(d, c * (0.7 + 0.6 * torch.rand_like(d)), 1 / 16),
        True,
    ),
    "soft network, 1/4": (lambda d, c: _sigmoid(d, c, 1 / 4), False),
    "soft network, 1/16": (lambda d, c: _sigmoid(d, c, 1 / 16), False),
    "network without operators, other path": (lambda d, c: torch.ones_like(d), False),
}


class OnSurrogate(APGD):
    """APGD on a network with other operators; every point is tried on the network itself."""

    soft: Callable[[MeanSparse, Tensor], Tensor]

    def gradient(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The surrogate's loss and gradient, and what the network says."""
        with reshaped(self.model, self.soft):
            values, slope, _ = super().gradient(images, labels, loss)
        return values, slope, super().judge(images, labels, loss)[1]

    def judge(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
        """The surrogate's loss, and what the network says."""
        with reshaped(self.model, self.soft):
            values, _ = super().judge(images, labels, loss)
        return values, super().judge(images, labels, loss)[1]


def _surrogate(name: str) -> Callable[[Target], list[Tensor]]:
    gate, exact = GATES[name]
    cls = type("Surrogate", (OnSurrogate,), {"soft": staticmethod(gated(gate, exact=exact))})

    def idea(target: Target) -> list[Tensor]:
        return [
            target.apgd(cls, loss=loss, seed=seed)
            for seed, loss in enumerate(("margin", "ce", "dlr-targeted"))
        ]

    return idea


def _diverse_starts(target: Target) -> list[Tensor]:
    """Output-diversified starts: five steps along a random direction of the logits."""
    found, ball = [], target.ball
    for run in range(10):
        points = ball.random(run, torch.arange(len(target.images)), 77)
        direction: Tensor | None = None
        for _ in range(5):
            points = points.detach().requires_grad_()
            with target.gates():
                logits = target.model(points)
                if direction is None:
                    direction = 2 * torch.rand_like(logits) - 1
                slope = torch.autograd.grad((logits * direction).sum(), points)[0]
            points = ball.project(points.detach() + target.eps / 2 * ball.direction(slope))
        with target.gates():
            found.append(target.apgd(starts=points.detach(), steps=30))
    return found


def _from_further(target: Target) -> list[Tensor]:
    """From examples of larger balls, which shrink to the right one."""
    found = []
    for factor in (4.0, 2.0, 1.5, 1.2):
        with target.gates():
            wide = target.apgd(eps=factor * target.eps, loss="ce")
            found.append(target.apgd(starts=wide))
            found.append(target.apgd(starts=wide, step_size=0.5))
    return found


def _from_other_alphas(target: Target) -> list[Tensor]:
    found = []
    for factor in (0.25, 0.5, 0.75, 0.9, 1.1, 1.25, 1.5, 2.0):
        with target.gates():
            with alpha_scaled(target.model, factor):
                start = target.apgd(loss="ce")
            found += [start, target.apgd(starts=start)]
    return found


def _narrowing_otherwise(target: Target) -> list[Tensor]:
    """Bands that narrow from other widths, through other gates, up other losses, from elsewhere."""
    found = []
    for width, options in (
        (1 / 16, {"factor": 2.0}),
        (1 / 16, {"factor": 3.0, "loss": "margin"}),
        (1 / 16, {"factor": 6.0, "stages": 20}),
        (1 / 4, {"factor": 3.0}),
        (1 / 32, {"factor": 4.0}),
        (1 / 16, {"factor": 3.0, "loss": "dlr-targeted", "n_targets": 3}),
    ):
        with target.gates(width):
            start = target.apgd(Narrowing, **{"loss": "ce", **options})
        with target.gates():
            found += [start, target.apgd(starts=start, steps=100)]
    return found


def _from_another_network(target: Target) -> list[Tensor]:
    there = replace(target, model=target.stranger)
    found = []
    for loss in ("ce", "margin", "dlr-targeted"):
        start = there.apgd(loss=loss)
        with target.gates():
            found += [start, target.apgd(starts=start)]
    return found


def _from_other_images(target: Target) -> list[Tensor]:
    """From images of other classes, pulled into the ball."""
    found = []
    for run in range(8):
        order = torch.randperm(len(target.others))
        differ = target.other_labels[order][None, :] != target.labels[:, None]
        start = target.others[order][differ.int().argmax(dim=1)]
        with target.gates():
            found.append(target.apgd(starts=start, seed=run))
    return found


def _features(target: Target) -> list[Tensor]:
    """Towards the features of images of other classes, then up the margin from there."""
    head = [m for m in target.model.modules() if isinstance(m, nn.Linear)][-1]
    kept: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    found, ball = [], target.ball
    try:
        with torch.no_grad():
            target.model(target.others)
            there = kept.pop().flatten(1)
            target.model(target.images)
            here = kept.pop().flatten(1)
        distance = torch.cdist(here, there)
        distance[target.labels[:, None] == target.other_labels[None, :]] = torch.inf
        nearest = distance.argsort(dim=1)
        for guide in range(6):
            goal, points = there[nearest[:, guide]], target.images.clone()
            for step in range(30):
                points = points.detach().requires_grad_()
                with target.gates():
                    target.model(points)
                    loss = (kept.pop().flatten(1) - goal).square().sum()
                    slope = torch.autograd.grad(-loss, points)[0]
                length = target.eps * (0.5 if step < 10 else 0.1)
                points = ball.project(points.detach() + length * ball.direction(slope))
            kept.clear()
            with target.gates():
                found += [points.detach(), target.apgd(starts=points.detach(), steps=30)]
            kept.clear()
    finally:
        handle.remove()
    return found


def _boundary(target: Target) -> list[Tensor]:
    """HopSkipJump from examples of twice the radius: decisions alone, 40 rounds of 50 queries."""
    with target.gates():
        far = target.apgd(eps=2 * target.eps)
    wrong = _wrong(target, far)
    center = target.images
    shape = (-1, 1, 1, 1)
    best = torch.where(wrong.view(shape), far, target.nearest)

    def length_of(delta: Tensor) -> Tensor:
        flat = delta.flatten(1)
        return flat.abs().amax(1) if target.norm == "Linf" else flat.norm(dim=1)

    def length(points: Tensor) -> Tensor:
        return length_of(points - center)

    def toward(points: Tensor, share: Tensor) -> Tensor:
        if target.norm == "L2":
            return center + share.view(shape) * (points - center)
        radius = (share * length(points)).view(shape)
        return center + (points - center).clamp(-radius, radius)

    for round_number in range(40):
        low, high = torch.zeros(len(center)), torch.ones(len(center))
        for _ in range(10):
            middle = (low + high) / 2
            falls = _wrong(target, toward(best, middle))
            low, high = torch.where(falls, low, middle), torch.where(falls, middle, high)
        best = torch.where(wrong.view(shape), toward(best, high), best)
        votes = torch.zeros_like(best)
        for _ in range(50):
            noise = torch.randn_like(best)
            noise = noise.sign() if target.norm == "Linf" else noise / length_of(noise).view(shape)
            near = (best + 0.1 * length(best).view(shape) * noise).clamp(0, 1)
            sign = 2.0 * _wrong(target, near) - 1
            votes += sign.view(shape) * noise
        way = target.ball.direction(votes)
        step = length(best) / (round_number + 1) ** 0.5
        for _ in range(8):
            tried = (best + step.view(shape) * way).clamp(0, 1)
            falls = _wrong(target, tried)
            best = torch.where((falls & wrong).view(shape), tried, best)
            step = torch.where(falls, 0.0, step / 2)
        if bool((length(best)[wrong] <= target.eps).all()):
            break
    return [best]


def _wrong(target: Target, points: Tensor) -> Tensor:
    with torch.no_grad():
        return target.model(points).argmax(dim=1) != target.labels


def _squares(target: Target) -> list[Tensor]:
    found = []
    for seed, (p_init, loss) in enumerate(((0.3, "margin"), (0.1, "margin"), (0.8, "ce"))):
        attack = Square(
            target.model,
            eps=target.eps,
            norm=target.norm,
            n_queries=3000,
            p_init=p_init,
            loss=loss,
            seed=50 + seed,
        )
        found.append(attack.perturb_from(target.images, target.labels).examples)
    return found


def _square_from_nearest(target: Target) -> list[Tensor]:
    attack = Square(
        target.model, eps=target.eps, norm=target.norm, n_queries=3000, p_init=0.05, seed=7
    )
    return [attack.perturb_from(target.images, target.labels, starts=target.nearest).examples]


def _fab_through_gates(target: Target) -> list[Tensor]:
    found = []
    for width in (1 / 4, 1 / 16):
        attack = FAB(target.model, eps=target.eps, norm=target.norm, steps=50, n_restarts=2)
        with target.gates(width):
            found.append(attack.perturb_from(target.images, target.labels).examples)
    return found


def _gated(*, widths: tuple[float, ...] = (1 / 16,), **options: Any) -> Any:
    def idea(target: Target) -> list[Tensor]:
        found = []
        for width in widths:
            with target.gates(width):
                found.append(target.apgd(**options))
        return found

    return idea


def _short_steps(target: Target) -> list[Tensor]:
    found = []
    for size in (0.05, 0.25):
        with target.gates():
            found.append(target.apgd(starts=target.nearest, steps=500, step_size=size))
    return found


def _library(**runs: Mapping[str, Any]) -> Any:
    """Classes of torchattacks through the gate; lengths are shares of eps."""

    def idea(target: Target) -> list[Tensor]:
        theirs, found = load_torchattacks(), []
        for name, options in runs.items():
            arguments = dict(options)
            if "alpha" in arguments:
                arguments["alpha"] *= target.eps
            if name != "CW":
                arguments["eps"] = target.eps
            with target.gates():
                attack = getattr(theirs, name)(target.model, **arguments)
                found.append(attack(target.images.clone(), target.labels).detach())
        return found

    return idea


EVERYWHERE: dict[str, Callable[[Target], list[Tensor]]] = {
    "20 restarts on the margin": _gated(n_restarts=20),
    "500 short steps from the nearest point": _short_steps,
    "all targets": _gated(loss="dlr-targeted", n_targets=9),
    "gates of 1, 1/2, 1/8, 1/64, 1/256": _gated(widths=(1.0, 0.5, 0.125, 2.0**-6, 2.0**-8)),
    "gate that sharpens": _gated(cls=Annealed, steps=100),
    "rules drawn per site and step": _gated(cls=Mixed, n_restarts=5),
    "gradient averaged over noise": _gated(cls=Averaged),
    "gradient averaged over alphas": _gated(cls=Crowd),
    "cross-entropy at other temperatures": lambda t: [
        *_gated(cls=Scaled)(t),
        *_gated(cls=Cool)(t),
    ],
    "margin taken apart": _gated(cls=Decomposed, n_restarts=5),
    "first steps of 4, 1 and 1/2 radii": lambda t: [
        example for size in (4.0, 1.0, 0.5) for example in _gated(step_size=size, steps=100)(t)
    ],
    **{name: _surrogate(name) for name in GATES},
    "output-diversified starts": _diverse_starts,
    "starts from larger balls": _from_further,
    "starts from other alphas": _from_other_alphas,
    "bands that narrow otherwise": _narrowing_otherwise,
    "starts from another network": _from_another_network,
    "starts from images of other classes": _from_other_images,
    "features of other classes": _features,
    "FAB-T through gates": _fab_through_gates,
    "Square, other sizes and loss": _squares,
    "Square from the nearest point": _square_from_nearest,
    "decisions alone (HopSkipJump)": _boundary,
}
"""Under both norms."""

IDEAS: dict[str, dict[str, Callable[[Target], list[Tensor]]]] = {
    "Linf": {
        **EVERYWHERE,
        "MI-FGSM, VMI-FGSM, NI-FGSM, PGD-100, Jitter": _library(
            MIFGSM={"alpha": 0.1, "steps": 50},
            VMIFGSM={"alpha": 0.1, "steps": 20},
            NIFGSM={"alpha": 0.1, "steps": 50},
            PGD={"alpha": 0.05, "steps": 100},
            Jitter={"alpha": 0.1, "steps": 50},
        ),
    },
    "L2": {
        **EVERYWHERE,
        "CW, PGD-100": _library(
            CW={"c": 10.0, "steps": 200, "lr": 0.01}, PGDL2={"alpha": 0.1, "steps": 100}
        ),
    },
}


def nearest_points(target: Target) -> Tensor:
    """Where fifty steps up the margin lead, and how near that is to the boundary."""
    with target.gates():
        return target.apgd()


def margins(target: Target, points: Tensor) -> Tensor:
    """Best other logit minus the true one by the exact network."""
    with torch.no_grad():
        logits: Tensor = target.model(points)
    return margin_loss(logits, target.labels)
