"""From a sweep's output folder to report.html, report.png and results.md.

The report reads files, never a model. Whatever it says is computed from the records;
``sites.json`` and the adapter's configuration add what the operators did.
"""

from __future__ import annotations

import os
from pathlib import Path

from lightning_meansparse.report.drawing import require_matplotlib
from lightning_meansparse.report.findings import Findings, find
from lightning_meansparse.report.page import render
from lightning_meansparse.report.picture import render_png
from lightning_meansparse.report.results import render_markdown
from lightning_meansparse.report.sources import Sources, read_sources

__all__ = [
    "Findings",
    "Sources",
    "find",
    "read_sources",
    "render_markdown",
    "write_findings",
    "write_report",
]


def write_report(
    directory: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None
) -> Path:
    """Writes ``report.html``, ``report.png`` and ``results.md`` from a sweep's output folder.

    The page is one file without scripts that fetches nothing. The same records give the same
    bytes.

    Args:
        directory: output folder of a sweep, which may still be running: ``records.parquet`` or
            ``parts/`` and, if recorded, ``sites.json`` and ``adapter/meansparse_config.json``.
        output: folder to write into; ``directory`` when None.

    Returns:
        The path of ``report.html``.

    Raises:
        FileNotFoundError: there is no folder or no records in it.
        ValueError: a file is damaged, foreign, newer than this version, or contradicts itself.
        ImportError: matplotlib is missing (extra ``report``).
    """
    sources = read_sources(directory)
    folder = Path(directory if output is None else output)
    return write_findings(sources, find(sources.table, sources.metadata), folder)


def write_findings(sources: Sources, findings: Findings, folder: Path) -> Path:
    """Writes the three files of a report into a folder; see `write_report`."""
    require_matplotlib()
    content = {
        "report.png": render_png(sources, findings),
        "results.md": render_markdown(sources, findings).encode(),
        "report.html": render(sources, findings).encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)
    return folder / "report.html"
