"""The report: from a folder to page, picture and table; read by a browser where there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_meansparse.records import HELD_OUT, TEST, rows, write_records
from lightning_meansparse.report import write_report

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


@dataclass
class Measured:
    """The attributes of an evaluation that records reads."""

    attacks: tuple[str, ...]
    kinds: tuple[str, ...]
    labels: Any
    indices: Any
    clean: Any
    standing: Any
    attacked: Any
    margin: Any
    forwards: Any
    backwards: Any
    seed: int = 0


def measured(
    shares: tuple[float, ...],
    n: int,
    *,
    attacks: dict[str, str] = ATTACKS,
    flips: float = 0.0,
    start: int = 0,
) -> Measured:
    """An evaluation in which the most robust samples stand, apart from ``flips`` that differ."""
    rank = np.argsort(np.random.default_rng(start).random(n))
    if flips:
        some = np.random.default_rng(7).random(n) < flips
        rank = rank + np.where(some, np.random.default_rng(8).integers(-n, n, n) // 4, 0)
    left = np.stack([rank < round(share * n / 100) for share in shares], axis=1)
    left = np.logical_and.accumulate(left, axis=1)
    indices = start + np.arange(n)
    steps = np.arange(1, len(shares)) * 100
    return Measured(
        attacks=tuple(attacks),
        kinds=tuple(attacks.values()),
        labels=indices % 10,
        indices=indices,
        clean=left[:, 0],
        standing=left[:, 1:],
        attacked=left[:, :-1],
        margin=np.cos(indices),
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


def test_it_writes_three_files(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep", tested=(0.0, 0.1))
    assert write_report(folder) == folder / "report.html"
