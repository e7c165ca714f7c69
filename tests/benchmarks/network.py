"""What goes over the network: bytes that one of two processes sends, per calibration and per sweep.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.network --output docs/records/network.json

Every collective that PyTorch offers by name is counted with the size of the tensor that it sends.
The sweep is the same twice, once with an adapter and once with a calibration before it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch import Tensor

from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.tasks import AlphaSweep
from tests.benchmarks.ranks import CHECKPOINT, RECORDS, arguments, trainer_of
from tests.benchmarks.speed.timing import machine

COLLECTIVES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "all_to_all")


def main() -> None:
    """Count, print, and write JSON."""
    args = arguments(__doc__, n=100)
    with _counting() as sent, tempfile.TemporaryDirectory() as folder:
        runs = {
            name: _run(args, sent, Path(folder) / name, adapter)
            for name, adapter in (("adapter", RECORDS / "adapter"), ("calibration", None))
        }
    content = {
        "machine": machine("cpu"),
        "samples": args.n,
        "alphas": 2,
        "attacks": 4,
        "bytes per sweep": runs["adapter"],
        "bytes per calibration": runs["calibration"] - runs["adapter"],
    }
    Console().print_json(data=content)
    if args.output:
        args.output.write_text(json.dumps(content, indent=2) + "\n")


def _run(args: argparse.Namespace, sent: list[int], folder: Path, adapter: Path | None) -> int:
    folder.mkdir()
    trainer = trainer_of(2, callbacks=[_Tell(sent, folder)])
    sweep = AlphaSweep(
        CHECKPOINT,
        alphas=[0.2],
        attacks=["fgsm", "pgd", "apgd-ce", {"attack": "adaptive-ce", "options": {"steps": 5}}],
        eps=0.1,
        adapter=adapter,
        calibration_batches=4,
    )
    trainer.validate(
        sweep, ImageDataModule(args.data, batch_size=25, holdout=args.n), verbose=False
    )
    return int((folder / "sent").read_text())


class _Tell(Callback):
    def __init__(self, sent: list[int], folder: Path) -> None:
        self.sent = sent
        self.folder = folder

    def on_validation_end(self, trainer: Trainer, pl_module: object) -> None:
        if trainer.is_global_zero:
            (self.folder / "sent").write_text(str(sum(self.sent)))


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
