"""Attacks that `full` does not hold, on the images that `full` has left standing.

    python -m tests.benchmarks.hostile --output docs/records/hostile.json
    python -m tests.benchmarks.networks resnet vit resnet-l2 --output outputs/networks
    python -m tests.benchmarks.hostile --networks outputs/networks --network resnet \
        --output docs/records/hostile_resnet.json

Per alpha it runs `full` on n test images, and the ideas of `tests.benchmarks.ideas` on those that
stand and whose margin fifty steps of APGD bring closest to 0: what these attacks cannot break,
further away is hopeless. Every example is clipped to the ball and scored again by the exact
forward. The attacks in `LATE` cost nine tenths of `full`; the order in which attacks run changes no
union, so they meet only what fell to an idea, and take away from it what falls to them. What is
done is written as it is done, and the same command goes on after it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_meansparse import (
    calibrate_,
    find_sites,
    load_classifier,
    set_alpha,
    sparsify_,
)
from lightning_meansparse.attacks import SUITES, BaseExamples, evaluate
from lightning_meansparse.attacks.guard import attackable
from lightning_meansparse.data import ImageDataModule
from tests.benchmarks.ideas import IDEAS, Target, margins, nearest_points
from tests.benchmarks.networks import DATA, NETWORKS, load

DEMO = "lightning_meansparse/demo/checkpoint"
BATCH = 100
SETTINGS = ("network", "first", "n", "norm", "eps", "closest")
LATE = ("apgd-t", "fab-t", "square")
"""Attacks of `full` that know nothing of the operator, and cost most."""


def main() -> None:
    """Try everything, print a table and write JSON."""
    args = _arguments()
    torch.set_num_threads(1)
    console = Console()
    data = ImageDataModule(args.data, batch_size=BATCH, holdout=0.1, seed=0, calibration=10_000)
    data.setup()
    end = args.first + args.n
    parts = list(islice(data.test_dataloader(), -(-end // BATCH)))
    images, labels = (torch.cat(part)[:end] for part in zip(*parts, strict=True))
    early = [spec for spec in SUITES["full"] if spec.name not in LATE]
    late = [spec for spec in SUITES["full"] if spec.name in LATE]
    classifier, stranger = _classifiers(args, data)
    record = _opened(args)
    for alpha in args.alphas:
        entry = record["alphas"].setdefault(f"{alpha:g}", {"batches": {}, "ideas": {}})
        set_alpha(classifier, alpha)
        for start in range(args.first, end, BATCH):
            if str(start) in entry["batches"]:
                continue
            rows = torch.arange(start, min(start + BATCH, end))
            found = evaluate(
                classifier,
                images[rows],
                labels[rows],
                attacks=early,
                eps=args.eps,
                norm=args.norm,
                indices=rows,
                base=BaseExamples(),
            )
            # `standing` per attack, so that what each one adds can be read off.
            entry["batches"][str(start)] = {
                "clean": int(found.clean.sum()),
                "after": dict(zip(found.attacks, found.standing.sum(0).tolist(), strict=True)),
                "rows": rows[found.worst].tolist(),
            }
            _write(args.output, record)
        stand = [row for part in entry["batches"].values() for row in part["rows"]]
        console.log(f"alpha = {alpha:g}: {len(stand)} of {args.n} stand")
        if stand:
            with attackable(classifier) as (model, _), attackable(stranger) as (other, _):
                rows = torch.tensor(stand)
                target = Target(
                    model=model,
                    stranger=other,
                    images=images[rows],
                    labels=labels[rows],
                    nearest=images[rows],
                    others=images,
                    other_labels=labels,
                    eps=args.eps,
                    norm=args.norm,
                )
                _try(target, stand, entry, args, record, console)
        rows = torch.tensor(
            sorted({row for idea in entry["ideas"].values() for row in idea["fell"]})
        )
        if len(rows):
            found = evaluate(
                classifier,
                images[rows],
                labels[rows],
                attacks=late,
                eps=args.eps,
                norm=args.norm,
                indices=rows,
            )
            entry["fell to full"] = rows[~found.worst].tolist()
    _summarise(record)
    _write(args.output, record)
    console.print(_table(record))


def _try(
    target: Target,
    numbers: list[int],
    entry: dict[str, Any],
    args: argparse.Namespace,
    record: dict[str, Any],
    console: Console,
) -> None:
    """Run every idea that has not run yet on the closest images; write which of them fell."""
    points = nearest_points(target)
    rows = margins(target, points).argsort(descending=True)[: args.closest]
    target = replace(
        target, images=target.images[rows], labels=target.labels[rows], nearest=points[rows]
    )
    for name, idea in IDEAS[args.norm].items():
        if name in entry["ideas"] or (args.only and name not in args.only):
            continue
        torch.manual_seed(0)
        begin = time.perf_counter()
        fell = torch.zeros(len(rows), dtype=torch.bool)
        for examples in idea(target):
            fell |= _falls(target, examples)
        fallen = [numbers[row] for row in rows[fell].tolist()]
        entry["ideas"][name] = {"fell": fallen, "seconds": round(time.perf_counter() - begin, 1)}
        console.log(f"{name}: {len(fallen)} of {len(rows)} fell", entry["ideas"][name])
        _write(args.output, record)


def _falls(target: Target, examples: Tensor) -> Tensor:
    with torch.no_grad():
        logits = target.model(target.ball.clip(examples.detach()))
    fallen: Tensor = logits.argmax(dim=1) != target.labels
    return fallen


def _classifiers(args: argparse.Namespace, data: ImageDataModule) -> tuple[nn.Module, nn.Module]:
    """The network in question with its operators, and another one, as an attacker may have."""
    demo = load_classifier(DEMO)
    sparsify_(demo, find_sites(demo, torch.zeros(2, 1, 28, 28)))
    calibrate_(demo, (images for images, _ in data.calibration_dataloader()))
    if args.network == "demo":
        other = next((n for n in NETWORKS if args.networks and (args.networks / n).exists()), None)
        return demo, load(other, args.networks) if other else load_classifier(DEMO)
    return load(args.network, args.networks), demo


def _opened(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: getattr(args, name) for name in SETTINGS}
    if args.output.exists():
        old: dict[str, Any] = json.loads(args.output.read_text())
        if old["settings"] != settings:
            raise ValueError(f"{args.output} has other settings; give another --output")
        return old
    return {"settings": settings, "alphas": {}}


def _summarise(record: dict[str, Any]) -> None:
    """Count what stood when the ideas were tried, and what falls to an idea, not to `full`."""
    for entry in record["alphas"].values():
        entry["standing"] = sum(len(part["rows"]) for part in entry["batches"].values())
        entry["fell to any"] = len(set().union(*_fallen(entry).values()))


def _fallen(entry: dict[str, Any]) -> dict[str, set[int]]:
    """Per idea the images that fall to it and to no attack of `full`."""
    known = set(entry.get("fell to full", ()))
    return {name: set(idea["fell"]) - known for name, idea in entry["ideas"].items()}


def _write(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, path)


def _table(record: dict[str, Any]) -> Table:
    columns = record["alphas"]
    table = Table("idea", *(f"α = {alpha}" for alpha in columns))
    fallen = [_fallen(entry) for entry in columns.values()]
    for name in sorted(set().union(*fallen)):
        table.add_row(name, *(str(len(ideas[name])) if name in ideas else "" for ideas in fallen))
    for name in ("standing", "fell to any"):
        table.add_row(name, *(str(entry[name]) for entry in columns.values()))
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=("demo", *NETWORKS), default="demo")
    parser.add_argument("--networks", type=Path, help="folder of tests.benchmarks.networks")
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--norm", choices=tuple(IDEAS), help="default: as the network was trained")
    parser.add_argument("--eps", type=float, help="default: as the network was trained")
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6])
    parser.add_argument("--first", type=int, default=0, help="number of the first image")
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--closest", type=int, default=100)
    parser.add_argument("--only", nargs="+", help="some ideas by name")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.network != "demo" and not args.networks:
        parser.error("--network needs --networks, the folder in which it was trained")
    trained = NETWORKS.get(args.network)
    args.norm = args.norm or (trained.norm if trained else "Linf")
    args.eps = args.eps or (trained.eps if trained else 0.1)
    return args


if __name__ == "__main__":
    main()
