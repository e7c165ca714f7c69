"""Pages of the documentation against the measurements they are made from."""

from __future__ import annotations

import json
from pathlib import Path

from tests.benchmarks import faults, scale
from tests.benchmarks.speed import page

DOCS = Path(__file__).parent.parent / "docs"


def test_the_performance_page_says_what_was_measured() -> None:
    assert len(list(page.RESULTS.glob("cpu-*.json"))) >= 4
    assert page.table() in page.PAGE.read_text(), 'run make bench ARGS="--write", or page.write()'


def test_the_page_of_faults_says_what_happened() -> None:
    content = json.loads((DOCS / "records" / "faults.json").read_text())
    assert len(content["faults"]) >= 30
    ended = [row for row in content["faults"] if row["exit code"]]
    assert max(row["seconds to the end"] for row in ended) <= 60
    assert {row.get("resumed", "same") for row in content["faults"]} == {"same"}
    assert faults.BEGIN + faults.markdown(content) + faults.END in (DOCS / "faults.md").read_text()


def test_memory_was_flat() -> None:
    content = json.loads((DOCS / "records" / "soak.json").read_text())
    assert content["batches"] == 2000
    assert content["after the first tenth"]["± share"] <= 0.02


def test_the_page_of_many_gpus_says_what_was_measured_and_estimated() -> None:
    page = (DOCS / "scale.md").read_text()
    assert scale.BEGIN + "\n" + scale.table() + "\n" + scale.END in page
    found = json.loads((DOCS / "records" / "ranks.json").read_text())
    for ranks, row in found["equality"].items():
        assert f"| {ranks} | {row['rows']:,} | {row['rows that differ']} |" in page
    for what, row in found["balance"].items():
        assert f"| {what} | {row['by margin']:.3f} | {row['by turns']:.3f} |" in page
    assert found["balance"]["200 samples, 4 processes"]["by margin"] <= 1.1
    assert f"{found['throughput']['2']:.2f} times the throughput" in page
    sent = json.loads((DOCS / "records" / "network.json").read_text())
    assert f"{sent['bytes per calibration']:,} for the calibration" in page
    assert f"{sent['bytes per sweep']:,} for the rest of a sweep" in page
