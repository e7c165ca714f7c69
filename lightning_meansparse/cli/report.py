"""`meansparse report`: the report anew, from the records alone."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_meansparse.cli.words import Words


def run(args: Sequence[str]) -> None:
    """Write report.html, report.png and results.md for the folder given."""
    words = Words("report")
    words.add_argument("directory", help="folder with records.parquet, as a sweep wrote it")
    words.add_argument("--output", help="folder for the report (default: the same)")
    given = words.parse_args(args)

    from lightning_meansparse.cli.console import make_console
    from lightning_meansparse.report import write_report

    path = write_report(given.directory, output=given.output)
    make_console().print(f"report: {path}", soft_wrap=True)
