"""Attacks that `full` does not hold, on the images that `full` has left standing.

    python -m tests.benchmarks.hostile --records docs/records/fashion_mnist_sweep \
        --output docs/records/hostile.json

Per alpha it takes the first n test images of the records, and of those that stand the ones whose
margin fifty steps of APGD have brought closest to 0: what these attacks cannot break, further away
is hopeless. Every example is clipped to the ball and scored again by the exact forward.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_meansparse import load_adapter, load_classifier, set_alpha
from lightning_meansparse.attacks.apgd import APGD
from lightning_meansparse.attacks.ball import Ball
from lightning_meansparse.attacks.guard import attackable
from lightning_meansparse.attacks.library import load_torchattacks
from lightning_meansparse.attacks.losses import margin_loss
from lightning_meansparse.attacks.square import Square
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.records import TEST, read_records
from lightning_meansparse.surgery import backward_rule
from lightning_meansparse.surgery.control import alpha_scaled

EPS = 0.1


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
        for _ in range(8):
            near = images + self.eps / 8 * torch.randn_like(images)
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


def main() -> None:
    """Try everything, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, help="default: adapter/ beside the records")
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6])
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--closest", type=int, default=100)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    classifier = load_classifier("lightning_meansparse/demo/checkpoint")
    load_adapter(classifier, args.adapter or args.records / "adapter")
    data = ImageDataModule(args.data, holdout=0.1)
    data.setup("test")
    whole = data.test_dataloader().dataset
    place = {int(row): i for i, row in enumerate(whole.rows)}
    records, _ = read_records(args.records)
    found: dict[str, dict[str, int]] = {}
    for alpha in args.alphas:
        standing, count = left_standing(records, alpha, args.n)
        images = torch.stack([whole[place[i]][0] for i in standing])
        labels = torch.tensor([int(whole[place[i]][1]) for i in standing])
        set_alpha(classifier, alpha)
        with attackable(classifier) as (model, _):
            found[f"{alpha:g}"] = {"n": count, "standing": len(standing)}
            for name, fell in tried(model, images, labels, args.closest):
                found[f"{alpha:g}"][name] = fell
                console.log(f"alpha = {alpha:g}: {name}: {fell} of {len(standing)} fell")
    table = Table("attack", *(f"α = {alpha}" for alpha in found))
    for name in next(iter(found.values())):
        table.add_row(name, *(str(row[name]) for row in found.values()))
    console.print(table)
    if args.output is not None:
        temporary = args.output.with_name(f".{args.output.name}.tmp")
        temporary.write_text(json.dumps({"closest": args.closest, "alphas": found}, indent=1))
        os.replace(temporary, args.output)


def left_standing(records: Any, alpha: float, n: int) -> tuple[list[int], int]:
    """Numbers of the images that stand after all attacks, among the first n of the test split."""
    rows = [
        row
        for row in records.select(
            ["split", "round", "alpha", "index", "order", "standing"]
        ).to_pylist()
        if (row["split"], row["round"], row["alpha"]) == (TEST, "main", alpha)
    ]
    indices = sorted({row["index"] for row in rows})[:n]
    last = max(row["order"] for row in rows)
    stand = {row["index"] for row in rows if row["order"] == last and row["standing"]}
    return [index for index in indices if index in stand], len(indices)


def tried(
    model: nn.Module, images: Tensor, labels: Tensor, closest: int
) -> Iterator[tuple[str, int]]:
    """Run every idea on the closest images; yield its name and how many of them fell."""

    def apgd(cls: type[APGD] = APGD, seed: int = 100, **options: Any) -> APGD:
        return cls(model, eps=EPS, seed=seed, **{"loss": "margin", **options})

    with smooth(model):
        first = apgd(steps=50).perturb_from(images, labels).examples
    with torch.no_grad():
        rows = margin_loss(model(first), labels).argsort(descending=True)[:closest]
    images, labels, first = images[rows], labels[rows], first[rows]
    ball, fallen = Ball(images, EPS, "Linf"), torch.zeros(len(rows), dtype=torch.bool)
    theirs = load_torchattacks()

    def started(attack: Any) -> Callable[[], Tensor]:
        return lambda: attack.perturb_from(images, labels, starts=first).examples

    def plain(attack: Any) -> Callable[[], Tensor]:
        return lambda: attack.perturb_from(images, labels).examples

    def library(name: str, **options: Any) -> Callable[[], Tensor]:
        return lambda: getattr(theirs, name)(model, eps=EPS, **options)(images.clone(), labels)

    ideas: dict[str, Callable[[], Tensor]] = {
        "20 more restarts on the margin, smooth 1/16": plain(apgd(n_restarts=20, steps=50)),
        "500 short steps from the closest point so far": started(apgd(steps=500, step_size=0.25)),
        "9 targets, smooth 1/16": plain(apgd(loss="dlr-targeted", n_targets=9, steps=50)),
        "gate that sharpens from 1/2 to 1/64": plain(apgd(Annealed)),
        "gradient averaged over noise": plain(apgd(Averaged, steps=50)),
        "gradient averaged over four alphas": plain(apgd(Crowd, steps=50)),
        "Square, 2,000 queries from the closest point": started(
            Square(model, eps=EPS, n_queries=2000, p_init=0.05, seed=7)
        ),
        "MI-FGSM through the gate": library("MIFGSM", alpha=EPS / 10, steps=50),
        "VMI-FGSM through the gate": library("VMIFGSM", alpha=EPS / 10, steps=20),
        "PGD-100 through the gate": library("PGD", alpha=EPS / 20, steps=100),
        "Jitter through the gate": library("Jitter", alpha=EPS / 10, steps=50),
    }
    for name, idea in ideas.items():
        torch.manual_seed(0)
        with smooth(model):
            examples = ball.clip(idea().detach())
        with torch.no_grad():
            fell = model(examples).argmax(1) != labels
        fallen |= fell
        yield name, int(fell.sum())
    yield "any of these", int(fallen.sum())


@contextmanager
def smooth(model: nn.Module) -> Iterator[None]:
    """The gate of the package's sharpest attacks."""
    with backward_rule(model, "smooth", temperature=1 / 16):
        yield


if __name__ == "__main__":
    main()
