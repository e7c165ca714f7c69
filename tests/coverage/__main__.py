"""`python -m tests.coverage`: put operators into every model of the list and look at what they do.

Each model runs in a process of its own, on one thread; what hangs is ended and what crashes takes
nothing along. Without `--only` the outcome is written to docs/records/coverage.json, and from there
to docs/coverage.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from .models import chosen
from .report import outcome, page
from .sweep import Row, sweep

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "records" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"


def main() -> int:
    """Run the sweep; the exit code is 1 if a model failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("--only", metavar="REGEX", help="models whose name holds this; no record")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--limit", type=float, default=180, help="seconds that a model may take")
    parser.add_argument(
        "--lenient", action="store_true", help="leave out calls that cannot be reached, count them"
    )
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
    console = Console(highlight=False, soft_wrap=True)
    models = chosen(args.only or "")
    if not models:
        console.print(f"no model's name holds {args.only!r}")
        return 2
    began = time.perf_counter()
    rows: dict[str, Row] = {m.name: {"left_out": m.left_out} for m in models if m.left_out}
    todo = [model for model in models if not model.left_out]
    for model, row in sweep(todo, jobs=args.jobs, limit=args.limit, strict=not args.lenient):
        rows[model.name] = row
        count = f"{len(rows)}/{len(models)}"
        console.print(f"{count:>8}  {model.name}: {outcome(row)}", markup=False)
    record = {
        "command": " ".join(["python -m tests.coverage", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "torchvision", "timm", "transformers")},
        "jobs": args.jobs,
        "minutes": round((time.perf_counter() - began) / 60, 1),
        "models": {model.name: rows[model.name] for model in models},
    }
    failed = [name for name, row in rows.items() if outcome(row).startswith("FAILED")]
    console.print(
        f"{len(todo) - len(failed)} of {len(todo)} models pass, in {record['minutes']} minutes"
    )
    if args.only is None and not args.lenient:
        RECORD.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        PAGE.write_text(page(record))
        console.print(f"wrote {RECORD.relative_to(ROOT)} and {PAGE.relative_to(ROOT)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
