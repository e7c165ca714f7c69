"""The performance page against the measurements it is made from."""

from __future__ import annotations

from tests.benchmarks.speed import page


def test_the_performance_page_says_what_was_measured() -> None:
    assert len(list(page.RESULTS.glob("cpu-*.json"))) >= 4
    assert page.table() in page.PAGE.read_text(), 'run make bench ARGS="--write", or page.write()'
