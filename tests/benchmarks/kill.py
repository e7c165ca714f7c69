"""A sweep killed (`kill -9`) at random moments and started again, compared with one that was not.

    python -m tests.benchmarks.kill --output docs/records/kill.json

The command is the real one, on the images and the checkpoint that come with the package. The
moments are drawn from the time in which the sweep works, from its first file on; imports are not
counted. Per moment it prints what the kill left behind and whether the records are the same, byte
by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_meansparse.records import read_records, splits

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "lightning_meansparse" / "demo"
OPTIONS = {
    "model.model": DEMO / "checkpoint",
    "model.alphas": "[0.2, 0.4]",
    "model.attacks": "[pgd, adaptive-ce]",
    "model.screen": '[{"attack": "adaptive-ce", "options": {"steps": 5}}]',
    "model.check_images": "5",
    "model.select": "racing",
    "model.test_alphas": "all",
    "model.eps": "0.1",
    "model.output": "sweep",
    "data.dataset": DEMO / "fashion_mnist",
    "data.batch_size": "10",
    "data.limit_holdout": "128",
    "data.limit_test": "100",
    "trainer.accelerator": "cpu",
    "trainer.devices": "1",
    "trainer.logger": "false",
}


def sweep(folder: Path, *, seconds: float | None = None) -> float:
    """Run the command, kill it after so many seconds of work; return how many it had."""
    words = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    code = "import sys; from lightning_meansparse.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "sweep", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (folder / "sweep" / "sweep.json").exists():
        time.sleep(0.005)
    start, told = time.perf_counter(), ""
    try:
        _, told = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    if process.returncode not in (0, -9):
        raise RuntimeError(f"the sweep ended with {process.returncode}: {told[-500:]}")
    return time.perf_counter() - start


def left_behind(folder: Path) -> dict[str, object]:
    """What a kill has left: the last step that is there whole."""
    records = folder / "sweep" / "records.parquet"
    return {
        "calibrated": (folder / "sweep" / "adapter" / "meansparse_config.json").exists(),
        "finished": list(splits(read_records(records)[0])) if records.exists() else [],
        "batches": len(list((folder / "sweep" / "parts").glob("*.parquet"))),
    }


def main() -> None:
    """Kill and compare, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    draw, console, rows = random.Random(args.seed), Console(), []
    table = Table("killed after", "calibrated", "splits finished", "batches kept", "records equal")
    with tempfile.TemporaryDirectory() as name:
        whole = Path(name, "whole")
        whole.mkdir()
        duration = sweep(whole)
        expected = (whole / "sweep" / "records.parquet").read_bytes()
        console.log(f"uninterrupted: {duration:.0f} s of work")
        for number in range(args.moments):
            folder = Path(name, str(number))
            folder.mkdir()
            moment = sweep(folder, seconds=draw.uniform(0, duration))
            row = {"seconds": round(moment, 2), **left_behind(folder)}
            sweep(folder)
            row["equal"] = (folder / "sweep" / "records.parquet").read_bytes() == expected
            console.log(row)
            rows.append(row)
            table.add_row(
                f"{moment:.1f} s",
                "yes" if row["calibrated"] else "no",
                ", ".join(row["finished"]) or "none",
                str(row["batches"]),
                "yes" if row["equal"] else "NO",
            )
    console.print(table)
    if args.output is not None:
        content = {"uninterrupted seconds": round(duration, 2), "moments": rows}
        temporary = args.output.with_name(f".{args.output.name}.tmp")
        temporary.write_text(json.dumps(content, indent=1))
        os.replace(temporary, args.output)
    if not all(row["equal"] for row in rows):
        raise SystemExit("a resumed sweep ended with other records")


if __name__ == "__main__":
    main()
