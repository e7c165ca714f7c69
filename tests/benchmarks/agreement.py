"""Our four attacks of `standard` against the reference implementation, one by one.

    git clone https://github.com/fra31/auto-attack /tmp/auto-attack
    python -m tests.benchmarks.agreement --reference /tmp/auto-attack \
        --output docs/records/agreement.json

Each attack runs alone on the same images, which the demo network with operators classifies right,
so that no attack hides behind another. The reference runs twice, the second time with another seed:
how often it disagrees with itself is what random starts do. What the runs cost is counted in model
evaluations, which no other load of the machine changes. Runs are written as they end, and the same
command goes on after the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from lightning_meansparse import (
    calibrate_,
    find_sites,
    load_adapter,
    load_classifier,
    set_alpha,
    sparsify_,
)
from lightning_meansparse.attacks import SUITES, AttackSpec, evaluate
from lightning_meansparse.attacks.guard import Watched
from lightning_meansparse.data import ImageDataModule

CHECKPOINT = "lightning_meansparse/demo/checkpoint"
BATCH = 250
OURS, THEIRS, AGAIN = "ours", "reference", "reference, another seed"


def main() -> None:
    """Run what is not in the output yet, and print the table."""
    args = _arguments()
    torch.set_num_threads(1)
    console = Console(log_path=False)
    sys.path.insert(0, str(args.reference))
    model, images, labels, rows = task(args)
    console.log(f"{len(rows)} images that the model classifies right")
    record = _opened(args, rows)
    for spec in SUITES["standard"]:
        if spec.name not in args.attacks:
            continue
        entry = record["attacks"].setdefault(spec.name, {"spec": spec.as_dict(), "runs": {}})
        if entry["spec"] != spec.as_dict():
            raise ValueError(f"{args.output} has another {spec.name}; give another --output")
        # FAB starts at the image: it draws nothing.
        runs = {OURS: args.seed, THEIRS: args.seed} | (
            {} if spec.name == "fab-t" else {AGAIN: args.seed + 1}
        )
        for who, seed in runs.items():
            if who in entry["runs"]:
                continue
            console.log(f"{spec.name}: {who}")
            attack = _ours if who == OURS else _theirs
            stands, forwards, backwards = attack(
                spec, model, images, labels, eps=args.eps, norm=args.norm, seed=seed
            )
            entry["runs"][who] = {
                "seed": seed,
                "stands": "".join("01"[flag] for flag in stands.tolist()),
                "forwards": forwards,
                "backwards": backwards,
            }
            _write(args.output, record)
    record["summary"] = _summary(record["attacks"])
    _write(args.output, record)
    console.print(_table(record["summary"]))


def _ours(
    spec: AttackSpec, model: nn.Module, images: Tensor, labels: Tensor, **ball: Any
) -> tuple[Tensor, int, int]:
    found = evaluate(model, images, labels, attacks=spec, batch_size=BATCH, **ball)
    return found.worst, int(found.forwards.sum()), int(found.backwards.sum())


def _theirs(
    spec: AttackSpec,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    norm: str,
    seed: int,
) -> tuple[Tensor, int, int]:
    """Its standard version with one attack chosen; its own checks count as evaluations, too."""
    from autoattack import AutoAttack  # type: ignore[import-not-found]

    watched = Watched(model, images.device)
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        attack = AutoAttack(
            watched, norm=norm, eps=eps, seed=seed, version="standard", device="cpu", verbose=False
        )
        attack.attacks_to_run = [spec.name]
        found = attack.run_standard_evaluation(images, labels, bs=BATCH)
    return right(model, found, labels), watched.forwards, watched.backwards


def task(args: argparse.Namespace) -> tuple[nn.Module, Tensor, Tensor, list[int]]:
    """The sparsified demo network, and the first test images that it gets right."""
    data = ImageDataModule(args.dataset, batch_size=BATCH, holdout=0.1, seed=0)
    data.setup()
    model = load_classifier(CHECKPOINT).eval().requires_grad_(False)
    if args.adapter:
        load_adapter(model, args.adapter)
    else:
        example, _ = next(iter(data.test_dataloader()))
        sparsify_(model, find_sites(model, example[:2]))
        calibrate_(model, (images for images, _ in data.calibration_dataloader()))
    set_alpha(model, args.alpha)
    images, labels = (torch.cat(part) for part in zip(*data.test_dataloader(), strict=True))
    correct = right(model, images, labels).nonzero().squeeze(1)[: args.n]
    if len(correct) < args.n:
        raise ValueError(
            f"--n is {args.n}, but only {len(correct)} test images are classified right"
        )
    rows = [int(data.parts["test"].rows[place]) for place in correct.tolist()]
    return model, images[correct], labels[correct], rows


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        logits = torch.cat([model(part) for part in images.split(BATCH)])
    return logits.argmax(dim=1) == labels


def _opened(args: argparse.Namespace, rows: list[int]) -> dict[str, Any]:
    """The record so far, if it is one of the same measurement."""
    settings = {
        name: getattr(args, name) for name in ("n", "alpha", "norm", "eps", "seed", "dataset")
    } | {
        "checkpoint": CHECKPOINT,
        "batch_size": BATCH,
        "threads": 1,
        "rows": " ".join(map(str, rows)),
    }
    commit = subprocess.run(
        ["git", "-C", args.reference, "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    versions = {"python": platform.python_version(), "fra31/auto-attack": commit} | {
        name: version(name) for name in ("torch", "torchattacks")
    }
    record: dict[str, Any] = {"settings": settings, "versions": versions, "attacks": {}}
    if args.output.exists():
        old: dict[str, Any] = json.loads(args.output.read_text())
        for key in ("settings", "versions"):
            if old[key] != record[key]:
                raise ValueError(f"{args.output} has other {key}; give another --output")
        return old
    return record


def _write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(partial, path)


def _summary(attacks: dict[str, Any]) -> dict[str, Any]:
    """Per attack, and for the worst case over them, how the runs compare."""
    flags: dict[str, dict[str, str]] = {
        name: {who: run["stands"] for who, run in entry["runs"].items()}
        for name, entry in attacks.items()
    }
    worst = {
        who: _all_stand([runs.get(who, runs[THEIRS]) for runs in flags.values()])
        for who in (OURS, THEIRS, AGAIN)
    }
    return {
        name: {
            f"{one} / {other}": _compared(runs[one], runs[other])
            for one, other in itertools.combinations((OURS, THEIRS, AGAIN), 2)
            if other in runs
        }
        for name, runs in {**flags, "worst case": worst}.items()
    }


def _all_stand(runs: list[str]) -> str:
    return "".join(min(flags) for flags in zip(*runs, strict=True))


def _compared(one: str, other: str) -> dict[str, float]:
    pairs = list(zip(one, other, strict=True))
    return {
        "agreement": sum(a == b for a, b in pairs) / len(pairs),
        "both stand": pairs.count(("1", "1")),
        "both fall": pairs.count(("0", "0")),
        "only the first falls": pairs.count(("0", "1")),
        "only the second falls": pairs.count(("1", "0")),
        "accuracy of the first": one.count("1") / len(one),
        "accuracy of the second": other.count("1") / len(other),
    }


def _table(summary: dict[str, Any]) -> Table:
    first = next(iter(next(iter(summary.values())).values()))
    table = Table("attack", "runs", *first)
    for name, comparisons in summary.items():
        for who, values in comparisons.items():
            table.add_row(name, who, *(f"{value:.4g}" for value in values.values()))
    return table


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reference", required=True, help="a checkout of fra31/auto-attack")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--n", type=int, default=500, help="images, all classified right")
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--norm", choices=("Linf", "L2"), default="Linf")
    parser.add_argument("--eps", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    names = [spec.name for spec in SUITES["standard"]]
    parser.add_argument("--attacks", nargs="+", choices=names, default=names)
    parser.add_argument("--dataset", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--adapter", help="statistics to load; without it they are measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
