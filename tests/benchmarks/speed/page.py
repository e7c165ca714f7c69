"""From rows to JSON files, and from these to the table in the documentation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.speed.rows import Row

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: make bench -->\n", "<!-- end: make bench -->\n"


def keep(device: str, part: str, facts: dict[str, Any], repeats: int, found: Sequence[Row]) -> None:
    """Write what one part of the benchmark found."""
    RESULTS.mkdir(exist_ok=True)
    record = {"machine": facts, "repeats": repeats, "rows": [row.as_dict() for row in found]}
    (RESULTS / f"{device}-{part}.json").write_text(json.dumps(record, indent=2) + "\n")


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    sign = "≥" if row["at_least"] else "≤"
    target = "" if row["target"] is None else f"{sign} {row['target']:g}"
    met = {None: "", True: "yes", False: "**no**"}[row["met"]]
    theirs = "" if row["published"] is None else _number(row["published"])
    cells = (row["what"], row["unit"], _number(row["ours"]), theirs, target, met)
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Everything that was kept, with where and when it was measured."""
    lines = [
        "| what | unit | ours | published operator | target | met |",
        "|---|---|---|---|---|---|",
    ]
    places = []
    for path in sorted(RESULTS.glob("cpu-*.json")):
        record = json.loads(path.read_text())
        lines += map(line, record["rows"])
        facts = record["machine"]
        places.append(
            f"`{path.stem}`: {facts['date']}, {facts['device']}, {facts['threads']} of "
            f"{facts['cores']} cores, load {facts['load']}, torch {facts['torch']}, "
            f"medians of {record['repeats']}."
        )
    return "\n".join([*lines, "", *(f"- {place}" for place in places)]) + "\n"


def write() -> None:
    """Put the table into the page anew."""
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}")


def _number(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.2f}"
