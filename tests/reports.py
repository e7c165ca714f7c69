"""A sweep's folder by hand, and its page read strictly."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from evaluations import FakeEvaluation

from lightning_meansparse.records import HELD_OUT, TEST, rows, write_records

ATTACKS = {
    "apgd-ce": "gradient",
    "apgd-t": "gradient",
    "square": "blackbox",
    "apgd-ce-smooth": "adaptive",
}
# Clean and standing after each attack, in percent: what was measured on a small network.
SHARES = {
    0.0: (84.0, 68.0, 65.7, 65.7, 65.7),
    0.1: (84.0, 68.4, 66.6, 66.0, 65.4),
    0.2: (84.0, 69.0, 67.7, 66.3, 64.7),
    0.4: (83.9, 71.3, 69.7, 66.0, 61.7),
    0.6: (83.9, 63.0, 57.0, 29.0, 25.7),
}


def measured(
    shares: tuple[float, ...],
    n: int,
    *,
    attacks: dict[str, str] = ATTACKS,
    flips: float = 0.0,
    start: int = 0,
) -> FakeEvaluation:
    """An evaluation in which the most robust samples stand, apart from ``flips`` that differ."""
    rank = np.argsort(np.random.default_rng(start).random(n))
    if flips:
        some = np.random.default_rng(7).random(n) < flips
        rank = rank + np.where(some, np.random.default_rng(8).integers(-n, n, n) // 4, 0)
    left = np.stack([rank < round(share * n / 100) for share in shares], axis=1)
    left = np.logical_and.accumulate(left, axis=1)
    indices = start + np.arange(n)
    steps = np.arange(1, len(shares)) * 100
    return FakeEvaluation(
        attacks=tuple(attacks),
        kinds=tuple(attacks.values()),
        labels=indices % 10,
        indices=indices,
        clean=left[:, 0],
        standing=left[:, 1:],
        attacked=left[:, :-1],
        margin=np.cos(indices),
        noise=np.zeros(n),
        zero_gradient=np.zeros(n),
        probabilities=np.zeros(n, dtype=bool),
        forwards=left[:, :-1] * steps,
        backwards=left[:, :-1] * steps,
    )


def histogram(alpha: float) -> dict[str, Any]:
    values = np.random.default_rng(0).gamma(6.0, 0.5, 40_000) - 4
    mean, std = float(values.mean()), float(values.std())
    after = np.where(np.abs(values - mean) < alpha * std, mean, values)
    edges = np.linspace(-4, 3, 61)
    return {
        "site": "stage2.0.act1@in",
        "channel": 7,
        "mean": mean,
        "std": std,
        "alpha": alpha,
        "edges": edges.tolist(),
        "before": np.histogram(values, edges)[0].tolist(),
        "after": np.histogram(after, edges)[0].tolist(),
    }


def make_sweep(
    folder: Path,
    *,
    shares: dict[float, tuple[float, ...]] = SHARES,
    n: int = 500,
    n_test: int = 1000,
    tested: tuple[float, ...] | None = None,
    attacks: dict[str, str] = ATTACKS,
    names: tuple[str, ...] = ("act1@in", "stage1.0.act@in", "stage2.0.act1@in", "head.act@in"),
    metadata: dict[str, Any] | None = None,
    flips: float = 0.04,
) -> Path:
    """Writes what a sweep leaves: every alpha on held-out images, some on test images."""
    folder.mkdir(parents=True, exist_ok=True)
    tables: list[pa.Table] = []
    for split, count, alphas in (
        (HELD_OUT, n, tuple(shares)),
        (TEST, n_test, tuple(shares) if tested is None else tested),
    ):
        for alpha in alphas if count else ():
            made = measured(
                shares[alpha], count, attacks=attacks, flips=flips * (alpha > 0), start=len(split)
            )
            tables.append(rows(made, alpha=alpha, split=split))
    described = {
        "model": "ConvNet (PGD-trained)",
        "data": "Fashion-MNIST",
        "eps": 0.1,
        "norm": "Linf",
        "seed": 0,
        "where": "activations",
        "attacks": [
            {
                "name": name,
                "kind": kind,
                "attack": f"torchattacks.{name.upper()}",
                "options": {"steps": 100},
                "rule": "smooth" if kind == "adaptive" else "exact",
                "temperature": 0.0625 if kind == "adaptive" else None,
                "start": "base" if kind == "adaptive" else "random",
            }
            for name, kind in attacks.items()
        ],
        "versions": {"python": "3.11.2", "torch": "2.15.0", "torchattacks": "3.5.1"},
        "hardware": {"machine": "x86_64", "cores": 2, "gpu": []},
        "command": "meansparse sweep --config recipes/fashion_mnist_sweep.yaml",
    }
    described.update(metadata or {})
    write_records(tables, folder / "records.parquet", described)
    alphas = sorted(shares)
    shown = max(alphas[:-1], default=0.0) or alphas[-1]
    sites = {
        "format_version": 1,
        "alphas": alphas,
        "images": 2000,
        "sites": [
            {
                "site": name,
                "channels": 16 * (1 + place % 4),
                "replaced": [min(1.0, a * (0.55 + 0.3 * np.sin(place))) for a in alphas],
            }
            for place, name in enumerate(names)
        ],
        "histogram": histogram(shown or 0.4),
    }
    (folder / "sites.json").write_text(json.dumps(sites))
    return folder


class Page(HTMLParser):
    """Reads a page strictly: every element closed in order, what stands in it collected."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "rect", "use", "circle"})

    def __init__(self, folder: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self._cell: list[str] | None = None
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID or self.source[: self._offset()].endswith("/>"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []

    def _offset(self) -> int:
        return 0

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in self.VOID and (not self._open or self._open[-1] != tag):
            return
        assert self._open.pop() == tag
        if tag in ("td", "th") and self._cell is not None:
            self.tables[-1][-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def said(self) -> str:
        return " ".join("".join(self.text).split())


def table_of(page: Page, place: int) -> list[dict[str, str]]:
    head, *body = page.tables[place]
    return [dict(zip(head, row, strict=True)) for row in body]
