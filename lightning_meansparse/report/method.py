"""The end of the page: how it was measured, and how to compute it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import Any

from lightning_meansparse.records import MAIN, rounds, splits
from lightning_meansparse.report.findings import Findings
from lightning_meansparse.report.sources import Sources

_LABELS = {
    "model": "Model",
    "base": "Base model",
    "data": "Data",
    "dataset": "Data",
    "eps": "Perturbation budget ε",
    "norm": "Norm",
    "seed": "Seed",
    "where": "Placement",
    "select": "Choice of α",
    "versions": "Versions",
    "hardware": "Hardware",
}
# Of the metadata, what is told elsewhere on the page.
_ELSEWHERE = ("attacks", "command", "rounds", "sweep", "unfinished")


@dataclass
class _Attacks:
    """A list of attacks, and where it was run."""

    steps: list[tuple[str, str, Mapping[str, Any]]]
    eps: Any
    places: list[tuple[str, str]] = field(default_factory=list)


def method(sources: Sources, findings: Findings) -> str:
    """Returns attacks with their budgets, and the settings, as HTML."""
    known = {key: value for key, value in sources.metadata.items() if key not in _ELSEWHERE}
    if isinstance(select := known.get("select"), Mapping):
        # Its attacks stand among those of the other rounds, its reason in the verdict's notes.
        known["select"] = {k: v for k, v in select.items() if k not in ("screen", "reason")}
    pairs = [(_LABELS[key], known.pop(key)) for key in _LABELS if key in known]
    pairs += [(key.replace("_", " ").capitalize(), known[key]) for key in sorted(known)]
    kept = {k: v for k, v in sources.adapter.items() if not isinstance(v, list | dict)}
    if kept:
        pairs.append(("Adapter", kept))
    seeds = sorted(set(sources.table.column("seed").to_pylist()))
    if "seed" not in sources.metadata:
        pairs.append(("Seed", seeds[0] if len(seeds) == 1 else seeds))
    told = "".join(f"<dt>{escape(k)}</dt><dd>{_value(v)}</dd>" for k, v in pairs)
    return (
        f'<div class="method">{_attacks(sources, findings)}<h3>Settings</h3><dl>{told}</dl></div>'
    )


def again(sources: Sources) -> str:
    """Returns the commands that make the report and the measurement anew, as HTML."""
    command = sources.metadata.get("command")
    sweep = (
        f"<p>The measurement was made by</p><pre><code>{escape(str(command))}</code></pre>"
        if command
        else ""
    )
    return (
        "<p>Every number above is computed from <code>records.parquet</code> (one row per image, α "
        "and attack). In this folder:</p><pre><code>meansparse report .</code></pre>" + sweep
    )


def _attacks(sources: Sources, findings: Findings) -> str:
    found = [attacks for attacks in _lists(sources) if attacks.steps]
    if not found:
        return "<p>No attack was run.</p>"
    main = next((a for a in found if (findings.reporter, MAIN) in a.places), found[0])
    text = (
        "<p>Attacks in this order; each gets the images that still stand. The base model faced the "
        "same list.</p><dl>"
        + "".join(
            f"<dt>{escape(name)} <small>{escape(kind)}</small></dt><dd>{_budget(spec)}</dd>"
            for name, kind, spec in main.steps
        )
        + "</dl>"
    )
    others = "".join(
        f"<dt>{escape(', '.join(' '.join(place) for place in attacks.places))}</dt>"
        f"<dd>{_in_short(attacks, sources.metadata.get('eps'))}</dd>"
        for attacks in found
        if attacks is not main
    )
    return text + (f"<h3>Attacks in other rounds</h3><dl>{others}</dl>" if others else "")


def _in_short(attacks: _Attacks, eps: Any) -> str:
    text = "; ".join(f"{escape(name)}: {_budget(spec)}" for name, _, spec in attacks.steps)
    return text + (f"; ε {_value(attacks.eps)}" if attacks.eps not in (None, eps) else "")


def _budget(spec: Mapping[str, Any]) -> str:
    return _value(spec) or "budget not recorded"


def _lists(sources: Sources) -> list[_Attacks]:
    """Every different list of attacks, with the splits and rounds that ran it."""
    table = sources.table
    column = table.group_by(["split", "round", "order", "attack", "kind"]).aggregate([])
    steps = column.sort_by("order").to_pylist()
    found: dict[str, _Attacks] = {}
    for split in splits(table):
        for round in rounds(table, split):
            specs, eps = recorded(sources.metadata, split, round)
            here = _Attacks(
                [
                    (step["attack"], step["kind"], specs.get(step["attack"], {}))
                    for step in steps
                    if (step["split"], step["round"]) == (split, round) and step["order"]
                ],
                eps,
            )
            key = json.dumps([here.steps, here.eps], default=str)
            found.setdefault(key, here).places.append((split, round))
    return list(found.values())


def recorded(metadata: Mapping[str, Any], split: str, round: str) -> tuple[dict[str, Any], Any]:
    """The budgets of a round by the attack's name, and its radius."""
    entry: Any = metadata.get("rounds")
    for key in (split, round):
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    if not isinstance(entry, Mapping):
        entry = metadata if round == MAIN else {}
    attacks = entry.get("attacks")
    specs = {
        str(spec.get("name")): {k: v for k, v in spec.items() if k not in ("name", "kind")}
        for spec in (attacks if isinstance(attacks, list) else [])
        if isinstance(spec, Mapping)
    }
    return specs, entry.get("eps")


def _value(value: Any, *, between: str = " · ") -> str:
    """Any JSON value as readable, escaped text."""
    if isinstance(value, Mapping):
        return between.join(
            f"{escape(str(key).replace('_', ' '))} {_value(item, between=', ')}"
            for key, item in _present(value.items())
        )
    if isinstance(value, list):
        return ", ".join(_value(item, between=", ") for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(str(value))


def _present(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    return [(key, item) for key, item in items if item not in (None, [], {}, "")]
