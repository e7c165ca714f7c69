"""The records of a sweep, once it is sure that they are about this adapter and this base."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_meansparse.adapter import Adapter
from lightning_meansparse.records import AlphaSummary
from lightning_meansparse.report import Findings, Sources, find, read_sources
from lightning_meansparse.report.cells import short
from lightning_meansparse.report.method import recorded


@dataclass(frozen=True)
class Evidence:
    """What was measured of an adapter.

    Args:
        sources: The files of the sweep.
        findings: What they say, of the adapter's α.
        attacks: Budgets by the attacks' names, as far as they are recorded.
        eps: The attacks' radius, as recorded.
        doubts: Why the records may be about something else, one sentence each.
    """

    sources: Sources
    findings: Findings
    attacks: Mapping[str, Mapping[str, Any]]
    eps: Any
    doubts: tuple[str, ...]

    @property
    def judged(self) -> AlphaSummary:
        """The summary that the card speaks of."""
        return self.findings.judged

    @property
    def base(self) -> AlphaSummary:
        """The base model's, under the same attacks."""
        return self.findings.reported[0]

    @property
    def data(self) -> str:
        """Name of the data set, on one line; empty if it has none."""
        data = self.sources.metadata.get("data")
        name = data.get("name") if isinstance(data, Mapping) else data
        return short(" ".join(str(name or "").split()))

    @property
    def norm(self) -> str:
        """Norm of the ball that the attacks stay in."""
        return str(self.sources.metadata.get("norm", "norm not recorded"))

    @property
    def ball(self) -> str:
        """Norm and radius in words; the radius in steps of 8-bit pixels where it is one."""
        norm, eps = self.norm, self.eps
        if not isinstance(eps, int | float) or isinstance(eps, bool):
            return f"{norm}, ε not recorded"
        steps = round(255 * eps)
        coded = steps and math.isclose(255 * eps, steps, rel_tol=1e-6) and norm == "Linf"
        return f"{norm}, ε = {f'{steps}/255' if coded else f'{eps:.6g}'}"


def read_evidence(adapter: Adapter, records: str | os.PathLike[str]) -> Evidence:
    """Read the records of a sweep and check that they are about ``adapter``.

    Raises:
        FileNotFoundError: If there are none.
        ValueError: If they are damaged, or were measured with other weights, other statistics or
            without the adapter's α.
    """
    place = Path(records)
    sources = read_sources(place.parent if place.is_file() else place)
    doubts = _doubts(adapter, sources)
    findings = find(sources.table, sources.metadata)
    measured = sorted({s.alpha for found in findings.stages.values() for st in found for s in st})
    alpha = one_alpha(adapter)
    matching = [m for m in measured if alpha is not None and math.isclose(m, alpha, rel_tol=1e-6)]
    if alpha is None or not matching:
        has = "one for each site" if alpha is None else f"{alpha:g}"
        raise ValueError(
            f"the adapter has another alpha ({has}) than the records in '{place}' "
            f"({', '.join(f'{known:g}' for known in measured)}). Take the records of a sweep that "
            "measured it, or the adapter that this sweep wrote; without records= the card says "
            "that robustness was not evaluated."
        )
    if matching[0] != findings.chosen:
        doubts.insert(
            0,
            f"The sweep chose alpha = {findings.chosen:g}; this adapter has alpha = {alpha:g}, "
            "which the numbers are about.",
        )
        # How another alpha was chosen is no story of this one.
        metadata = {k: v for k, v in sources.metadata.items() if k != "select"}
        findings = find(sources.table, {**metadata, "chosen_alpha": matching[0]})
    judged = findings.judged
    attacks, eps = recorded(sources.metadata, judged.split, judged.round)
    return Evidence(sources, findings, attacks, eps, tuple(doubts))


def _doubts(adapter: Adapter, sources: Sources) -> list[str]:
    """Refuse records of something else; say what they leave open."""
    known = dict(sources.metadata.get("fingerprints") or {})
    kept = sources.adapter.get("base")
    if "weights" not in known and isinstance(kept, Mapping):  # an older sweep, but with its adapter
        hashes = kept.get("fingerprint")
        known["weights"] = hashes.get("float32") if isinstance(hashes, Mapping) else None
    own = {"weights": adapter.fingerprint.hashes.get("float32"), "statistics": adapter.hash()}
    doubts = []
    for what, mine in own.items():
        measured = known.get(what)
        if not measured or not mine:
            doubts.append(f"The records do not say with which {what} they were measured.")
        elif not mine.startswith(str(measured)) and not str(measured).startswith(mine):
            whose = "of another base" if what == "weights" else "of another calibration"
            raise ValueError(
                f"the records are {whose}: they "
                f"were measured with {what} {str(measured)[:12]}, the adapter has {mine[:12]}. "
                "Take the adapter that the sweep wrote, or the records of a sweep with this one."
            )
    return doubts


def one_alpha(adapter: Adapter) -> float | None:
    """The α of all sites; None where they differ."""
    return adapter.alphas[0] if len(set(adapter.alphas)) == 1 else None
