"""What the operator and the calibration cost, as ratios measured within one run.

    make bench                                  # a table
    make bench ARGS="--only operator,half"      # some of it
    make bench ARGS="--write"                   # into tests/benchmarks/results and the docs

Every ratio comes from two sides that take turns, and from medians; on a CPU they are seconds of the
process, with one thread.
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console

from tests.benchmarks.speed import page, rows
from tests.benchmarks.speed.timing import machine

PARTS = ("operator", "half", "model", "compiled", "memory", "calibration", "sigma", "import")


def main() -> None:
    """Measure, print, and write where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--write", action="store_true", help="keep what was measured")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    console = Console()
    parts = args.only.split(",")
    for part in parts:
        measure = getattr(rows, f"{part}_rows")
        wanted = {"device": args.device, "repeats": args.repeats}
        options = {name: wanted[name] for name in rows.OPTIONS.get(part, wanted)}
        found = list(measure(**options))
        for row in found:
            console.print(page.line(row.as_dict()), markup=False)
        if args.write:
            page.keep(args.device, part, machine(args.device), args.repeats, found)
    if args.write:
        page.write()


if __name__ == "__main__":
    main()
