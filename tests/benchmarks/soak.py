"""Resident memory over 2,000 batches of a sweep on a tiny network.

    python -m tests.benchmarks.soak --output docs/records/soak.json --figure docs/soak.svg

One process does what a sweep does with each batch: takes it from the loader, attacks it at two
alphas, keeps the rows in a file. It must not grow: the largest and the smallest value after the
first tenth may differ from their middle by 2 %.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from torch import nn

from lightning_meansparse import AlphaSweep, ImageDataModule
from lightning_meansparse.tasks.progress import SweepProgress

TOLERANCE = 0.02
WARM_UP = 0.1
_PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> float:
    """Memory of this process, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE / 2**20


class Memory(SweepProgress):
    """Reads the memory after every so many batches."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.batches = 0
        self.seen: list[tuple[int, float]] = []

    def passed(self, images: int) -> None:
        """After a batch of the sweep."""
        super().passed(images)
        self.batches += 1
        if self.batches % self.every == 0:
            gc.collect()  # what is garbage is no leak
            self.seen.append((self.batches, resident()))


def soak(folder: Path, batches: int, every: int) -> list[tuple[int, float]]:
    """Run a sweep of so many batches; return batch numbers and MiB."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    size = 8
    images = torch.rand(batches * size + 64, 1, 8, 8)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)
    ).eval()
    with torch.no_grad():  # right about most images, so that there is something to attack
        labels = network(images).argmax(1)
    data = ImageDataModule(
        {"train": (images, labels)},
        batch_size=size,
        holdout=batches * size,
        test_split=None,
        class_names=["a", "b", "c"],
    )
    attacks = [
        {"attack": "apgd-ce", "options": {"steps": 3}},
        {"attack": "square", "options": {"n_queries": 5}},
        {"attack": "adaptive-ce", "options": {"steps": 3}},
    ]
    sweep = AlphaSweep(network, alphas=[0.3], attacks=attacks, eps=0.02, output=folder)
    sweep.progress = memory = Memory(every)
    Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).validate(sweep, data, verbose=False)
    assert sweep.records.num_rows >= 2 * batches * size
    return memory.seen


def curve(seen: list[tuple[int, float]], path: Path) -> None:
    """Draw it."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 2.5), layout="constrained")
    axes.plot(*zip(*seen, strict=True), linewidth=1)
    axes.set_ylim(0, 1.2 * max(value for _, value in seen))
    axes.set_xlabel("batches")
    axes.set_ylabel("resident memory in MiB")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Run, judge, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=2000)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        seen = soak(Path(name, "sweep"), args.batches, args.every)
    steady = [value for batch, value in seen if batch > WARM_UP * args.batches]
    low, high = min(steady), max(steady)
    spread = (high - low) / (high + low)
    Console().print(
        f"{args.batches} batches in {time.perf_counter() - start:.0f} s: {low:.1f} to {high:.1f} "
        f"MiB after the first tenth, ± {spread:.2%}"
    )
    if args.output is not None:
        content = {
            "batches": args.batches,
            "versions": {"torch": torch.__version__},
            "after the first tenth": {
                "lowest MiB": low,
                "highest MiB": high,
                "± share": spread,
                "growth in KiB per batch": round(
                    1024 * (steady[-1] - steady[0]) / (len(steady) * args.every), 2
                ),
            },
            "memory": [{"batch": batch, "MiB": round(value, 2)} for batch, value in seen],
        }
        temporary = args.output.with_name(f".{args.output.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.replace(temporary, args.output)
    if args.figure is not None:
        curve(seen, args.figure)
    if spread > TOLERANCE:
        raise SystemExit(f"the memory is not flat: ± {spread:.2%}, more than ± {TOLERANCE:.0%}")


if __name__ == "__main__":
    main()
