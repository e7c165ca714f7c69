"""One sweep on several processes: the same records, how evenly work is dealt, and what it gains.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.ranks --output docs/records/ranks.json

Equality and throughput are of real processes (gloo) on one machine, on Fashion-MNIST images and the
demo network. The balance is computed: what each sample costs stands in the records of a sweep and
does not depend on who measures it, so it needs no processes to say what each of many would have to
do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console

from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.records import MAIN, TEST, read_records
from lightning_meansparse.tasks import AlphaSweep
from lightning_meansparse.tasks.rounds import Round
from lightning_meansparse.tasks.samples import Samples
from tests.benchmarks.networks import DATA
from tests.benchmarks.speed.timing import machine

CHECKPOINT = "lightning_meansparse/demo/checkpoint"
RECORDS = Path("docs/records/fashion_mnist_sweep")


def main() -> None:
    """Run sweeps on 1, 2 and 4 processes, print what they give, and write JSON."""
    args = arguments(__doc__, n=201)
    console = Console()
    content: dict[str, Any] = {"machine": machine("cpu"), "n": args.n}
    content["balance"] = _balance()
    with tempfile.TemporaryDirectory() as folder:
        runs = {ranks: _run(args, ranks, Path(folder) / str(ranks)) for ranks in (1, 2, 4)}
    one, seconds = runs[1]
    content["equality"] = {str(ranks): _compared(one, table) for ranks, (table, _) in runs.items()}
    content["seconds"] = {str(ranks): time for ranks, (_, time) in runs.items()}
    content["throughput"] = {str(ranks): seconds / time for ranks, (_, time) in runs.items()}
    console.print_json(data=content)
    if args.output:
        args.output.write_text(json.dumps(content, indent=2) + "\n")


def arguments(doc: str, *, n: int) -> argparse.Namespace:
    """What a benchmark of several processes is told; Lightning's warnings are kept quiet."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", default=DATA)
    parser.add_argument("--n", type=int, default=n)
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def trainer_of(ranks: int, **options: Any) -> Trainer:
    """A trainer of so many processes that says little."""
    if ranks > 1:
        options["strategy"] = DDPStrategy(start_method="fork", timeout=timedelta(minutes=10))
    return Trainer(
        accelerator="cpu",
        devices=ranks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def _run(args: argparse.Namespace, ranks: int, folder: Path) -> tuple[pa.Table, float]:
    """The records of a sweep on so many processes, and the seconds it took with all around it."""
    trainer = trainer_of(ranks)
    data = ImageDataModule(args.data, batch_size=25, holdout=args.n, seed=0)
    sweep = AlphaSweep(
        CHECKPOINT,
        alphas=[0.2, 0.4],
        attacks=["apgd-ce", "square-1000", "adaptive-ce", "adaptive-dlr"],
        eps=0.1,
        adapter=RECORDS / "adapter",
        output=folder,
    )
    begin = time.perf_counter()
    trainer.validate(sweep, data, verbose=False)
    return read_records(folder / "records.parquet")[0], time.perf_counter() - begin


def _compared(one: pa.Table, other: pa.Table) -> dict[str, Any]:
    """How many rows differ in anything but the margin, and by how much that does."""
    plain = [table.drop_columns(["margin"]) for table in (one, other)]
    margins = [table["margin"].to_numpy() for table in (one, other)]
    pairs = zip(*(table.to_pylist() for table in plain), strict=True)
    apart = [(a, b) for a, b in pairs if a != b]
    return {
        "rows": other.num_rows,
        "rows that differ": len(apart),
        "in": sorted({name for a, b in apart for name in a if a[name] != b[name]}),
        "largest difference of a margin": float(np.abs(margins[0] - margins[1]).max()),
    }


def _balance() -> dict[str, Any]:
    """Slowest over mean process in model evaluations, dealt by margins and by turns."""
    frame = read_records(RECORDS)[0].to_pandas()
    frame = frame[(frame["split"] == TEST) & (frame["round"] == MAIN)]
    costs = (frame.forwards + frame.backwards).groupby(frame["index"]).sum()
    clean = frame[(frame.alpha == 0) & (frame.order == 0)].set_index("index").margin
    order = torch.from_numpy(frame["index"].unique())
    margins = torch.from_numpy(clean.loc[order.tolist()].to_numpy())
    found: dict[str, Any] = {}
    for n in (200, len(order)):
        for ranks in (2, 4, 8):
            part = Round(MAIN, (0.0,), (), stop=n)
            by_margin = [
                torch.cat(
                    Samples([order] * ranks, order, rank, len(order)).hand(part, margins)
                ).tolist()
                for rank in range(ranks)
            ]
            by_turns = [order[:n][rank::ranks].tolist() for rank in range(ranks)]
            found[f"{n} samples, {ranks} processes"] = {
                name: max(work) / float(np.mean(work))
                for name, work in (
                    ("by margin", [int(costs.loc[hand].sum()) for hand in by_margin]),
                    ("by turns", [int(costs.loc[hand].sum()) for hand in by_turns]),
                )
            }
    return found


if __name__ == "__main__":
    main()
