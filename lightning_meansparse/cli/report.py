"""`meansparse report`: the report anew, from the records alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_meansparse.cli.words import Words


def run(args: Sequence[str]) -> None:
    """Write report.html, report.png and results.md for the folder given, and say what they say."""
    words = Words("report")
    words.add_argument("directory", help="output folder of a sweep, finished or not")
    words.add_argument("--output", help="folder for the report (default: the same)")
    given = words.parse_args(args)

    from lightning_meansparse.cli.console import make_console, tell
    from lightning_meansparse.report import find, read_sources, write_findings

    sources = read_sources(given.directory)
    findings = find(sources.table, sources.metadata)
    path = write_findings(sources, findings, Path(given.output or given.directory))
    console = make_console()
    tell(console, findings)
    console.print(f"report: {path}", soft_wrap=True)
