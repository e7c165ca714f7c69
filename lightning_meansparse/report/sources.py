"""What a sweep left in its folder, read and checked: records, sites, adapter configuration."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pyarrow as pa

from lightning_meansparse.records import read_records

_T = TypeVar("_T")

SITES_VERSION = 1
"""Newest version of sites.json that is understood."""


@dataclass(frozen=True)
class SiteShare:
    """One site: its name, number of channels, and the share of values replaced at each alpha."""

    site: str
    channels: int
    replaced: tuple[float, ...]


@dataclass(frozen=True)
class Histogram:
    """One channel's values before and after the operator.

    Attributes:
        site: name of the site.
        channel: index of the channel.
        mean: calibrated mean.
        std: calibrated standard deviation.
        alpha: threshold, in standard deviations.
        edges: bin edges, ascending, one more than bins.
        before: values per bin, before the operator.
        after: the same, after it.
    """

    site: str
    channel: int
    mean: float
    std: float
    alpha: float
    edges: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass(frozen=True)
class Sources:
    """Everything the report is made of.

    Attributes:
        table: the records.
        metadata: how they were measured.
        alphas: the alphas that `sites` speaks of.
        images: how many images the shares and the histogram were counted on.
        sites: in the order of execution; empty when sites.json is missing.
        histogram: None when it was not recorded.
        adapter: the adapter's configuration; empty when there is none.
    """

    table: pa.Table
    metadata: dict[str, Any]
    alphas: tuple[float, ...]
    images: int
    sites: tuple[SiteShare, ...]
    histogram: Histogram | None
    adapter: dict[str, Any]


def read_sources(directory: str | os.PathLike[str]) -> Sources:
    """Reads a sweep's output folder.

    Records are needed, ``records.parquet`` or the parts of a sweep that has not finished;
    ``sites.json`` and the adapter may be missing, which the report then says in their place.

    Raises:
        FileNotFoundError: there is no such folder, or no records in it.
        ValueError: a file is damaged, foreign, or from a newer version.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"directory must be the output folder of a sweep. There is no folder '{folder}'."
        )
    table, metadata = read_records(folder)
    if not table.num_rows:
        raise ValueError(f"'{folder}' must hold records of some image. They have no rows.")
    alphas, images, sites, histogram = _read_sites(folder / "sites.json")
    configs = (folder / "adapter" / "meansparse_config.json", folder / "meansparse_config.json")
    adapter = next((_read_object(path) for path in configs if path.is_file()), {})
    return Sources(table, metadata, alphas, images, sites, histogram, adapter)


def _read_sites(
    path: Path,
) -> tuple[tuple[float, ...], int, tuple[SiteShare, ...], Histogram | None]:
    if not path.is_file():
        return (), 0, (), None
    content = _read_object(path)
    version = content.get("format_version")
    if isinstance(version, int) and version > SITES_VERSION:
        raise ValueError(
            f"'{path}' has format_version {version}; this version of lightning_meansparse reads up "
            f"to {SITES_VERSION}. Upgrade with `pip install -U lightning_meansparse`."
        )
    take = _Taker(path)
    if version != SITES_VERSION:
        take.fail("format_version", SITES_VERSION, version)
    alphas = take.numbers(content, "alphas")
    sites = tuple(
        SiteShare(
            site=take.value(entry, "site", str),
            channels=int(take.number(entry, "channels")),
            replaced=take.numbers(entry, "replaced", length=len(alphas), lowest=0, highest=1),
        )
        for entry in take.value(content, "sites", list)
    )
    images = int(take.number(content, "images"))
    if not content.get("histogram"):
        return alphas, images, sites, None
    entry = take.value(content, "histogram", dict)
    edges = take.numbers(entry, "edges")
    if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
        take.fail("edges", "two or more ascending numbers", edges)
    histogram = Histogram(
        site=take.value(entry, "site", str),
        channel=int(take.number(entry, "channel")),
        mean=take.number(entry, "mean"),
        std=take.number(entry, "std"),
        alpha=take.number(entry, "alpha"),
        edges=edges,
        before=take.numbers(entry, "before", length=len(edges) - 1, lowest=0),
        after=take.numbers(entry, "after", length=len(edges) - 1, lowest=0),
    )
    return alphas, images, sites, histogram


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"'{path}' is not readable JSON ({error}); it is damaged. Run the sweep again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path}' must hold a JSON object. Got {content!r:.80}.")
    return content


@dataclass(frozen=True)
class _Taker:
    """Takes values out of parsed JSON; its errors name the file and the key."""

    path: Path

    def fail(self, key: str, expected: object, got: object) -> NoReturn:
        raise ValueError(
            f"'{self.path}': {key!r} must be {expected}. Got {got!r:.120}. Run the sweep again."
        )

    def value(self, entry: Any, key: str, kind: type[_T]) -> _T:
        got = entry.get(key) if isinstance(entry, Mapping) else None
        if not isinstance(got, kind):
            self.fail(key, f"a {kind.__name__}", got)
        return got

    def number(self, entry: Any, key: str) -> float:
        got = entry.get(key) if isinstance(entry, Mapping) else None
        if isinstance(got, bool) or not isinstance(got, int | float) or not math.isfinite(got):
            self.fail(key, "a finite number", got)
        return float(got)

    def numbers(
        self,
        entry: Mapping[str, Any],
        key: str,
        *,
        length: int | None = None,
        lowest: float = -math.inf,
        highest: float = math.inf,
    ) -> tuple[float, ...]:
        got = self.value(entry, key, list)
        found = tuple(self.number({key: item}, key) for item in got)
        if length is not None and len(found) != length:
            self.fail(key, f"a list of {length} numbers", got)
        if any(not lowest <= item <= highest for item in found):
            self.fail(key, f"numbers between {lowest} and {highest}", got)
        return found
