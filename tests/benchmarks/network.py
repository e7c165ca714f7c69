"""What goes over the network: bytes that one of two processes sends, per calibration and per sweep.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.network --output docs/records/network.json

Every collective that PyTorch offers by name is counted with the size of the tensor that it sends.
The sweep writes a folder; its calibration is counted apart.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor

from lightning_meansparse import tasks
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.tasks import AlphaSweep
from lightning_meansparse.tasks.calibration import calibrated
from tests.benchmarks.ranks import CHECKPOINT, arguments, trainer_of
from tests.benchmarks.speed.timing import machine

COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "all_to_all")


def main() -> None:
    """Count, print, and write JSON."""
    args = arguments(__doc__, n=100)
    with _counting() as sent, tempfile.TemporaryDirectory() as folder:
        counts = _run(args, sent, Path(folder))
    content = {
        "machine": machine("cpu"),
        "samples": args.n,
        "alphas": 2,
        "attacks": 4,
        **counts,
    }
    Console().print_json(data=content)
    if args.output:
        args.output.write_text(json.dumps(content, indent=2) + "\n")


def _run(args: argparse.Namespace, sent: list[int], folder: Path) -> dict[str, int]:
    tell = _Tell(sent, folder / "counts.json")
    trainer = trainer_of(2, callbacks=[tell])
    sweep = AlphaSweep(
        CHECKPOINT,
        alphas=[0.2],
        attacks=["fgsm", "pgd", "apgd-ce", {"attack": "adaptive-ce", "options": {"steps": 5}}],
        eps=0.1,
        calibration_batches=4,
        output=folder / "sweep",
    )
    data = ImageDataModule(args.data, batch_size=25, holdout=args.n)
    with patch.object(tasks.sweep, "calibrated", tell.calibrated):
        trainer.validate(sweep, data, verbose=False)
    counts: dict[str, int] = json.loads(tell.path.read_text())
    return counts


class _Tell(Callback):
    def __init__(self, sent: list[int], path: Path) -> None:
        self.sent = sent
        self.path = path
        self.calibration = 0

    def calibrated(self, *args: Any) -> Any:
        before = sum(self.sent)
        found = calibrated(*args)
        self.calibration = sum(self.sent) - before
        return found

    def on_validation_end(self, trainer: Trainer, pl_module: object) -> None:
        if trainer.is_global_zero:
            rest = sum(self.sent) - self.calibration
            counts = {"bytes per sweep": rest, "bytes per calibration": self.calibration}
            self.path.write_text(json.dumps(counts))


@contextmanager
def _counting() -> Iterator[list[int]]:
    """The sizes of what this process, and those forked from it, send."""
    sent: list[int] = []
    originals: dict[str, Callable[..., Any]] = {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(name: str) -> Callable[..., Any]:
        def collective(*args: Any, **options: Any) -> Any:
            own = args[1] if name.startswith("all_gather") else args[0]
            if isinstance(own, Tensor):
                sent.append(own.numel() * own.element_size())
            return originals[name](*args, **options)

        return collective

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    try:
        yield sent
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


if __name__ == "__main__":
    main()
