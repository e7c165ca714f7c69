"""What each suite costs on the demo network: model evaluations and seconds per 100 images.

    python -m tests.benchmarks.suites --output docs/records/cost.json

The evaluations do not depend on the machine; the seconds are processor time of one thread of it.
An image that an early attack breaks costs the later ones nothing: a suite costs what its images
withstand.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lightning_meansparse import calibrate_, find_sites, load_classifier, sparsify_
from lightning_meansparse.attacks import evaluate
from lightning_meansparse.data import ImageDataModule

SUITES = ("quick", "standard", "full")


def main() -> None:
    """Run the suites one after the other, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--alpha", type=float, default=0.2)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    data = ImageDataModule(
        args.data, batch_size=args.n, holdout=0.1, limit_test=args.n, calibration=2000
    )
    data.setup("fit")
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    classifier = load_classifier("lightning_meansparse/demo/checkpoint")
    sparsify_(classifier.model, find_sites(classifier.model, images[:2]), alpha=args.alpha)
    calibrate_(classifier, data.calibration_dataloader())
    rows = {}
    for suite in SUITES:
        start = time.process_time()
        result = evaluate(classifier, images, labels, attacks=suite, eps=0.1)
        rows[suite] = {
            "seconds": (time.process_time() - start) * 100 / args.n,
            "forwards": int(result.forwards.sum()) * 100 / args.n,
            "backwards": int(result.backwards.sum()) * 100 / args.n,
            "standing": float(result.worst.float().mean()),
        }
        console.log(suite, rows[suite])
    table = Table("suite", "forward passes", "backward passes", "seconds", "standing")
    for suite, row in rows.items():
        table.add_row(
            suite,
            f"{row['forwards']:,.0f}",
            f"{row['backwards']:,.0f}",
            f"{row['seconds']:.0f}",
            f"{row['standing']:.1%}",
        )
    console.print(table)
    if args.output is not None:
        about = {
            "alpha": args.alpha,
            "n": args.n,
            "eps": 0.1,
            "norm": "Linf",
            "threads": 1,
            "machine": platform.machine(),
            "versions": {name: version(name) for name in ("torch", "torchattacks")},
        }
        temporary = args.output.with_name(f".{args.output.name}.tmp")
        temporary.write_text(json.dumps({"settings": about, "per 100 images": rows}, indent=1))
        os.replace(temporary, args.output)


if __name__ == "__main__":
    main()
