"""How alpha was chosen, told from the records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning_meansparse.records import MAIN, AlphaSummary, choose_alpha


def told(
    rounds: Mapping[str, list[AlphaSummary]], select: Mapping[str, Any], chosen: float
) -> list[str]:
    """Says how alpha was chosen, where that was not by trying everything on everything.

    Args:
        rounds: summaries per round of the split that chose, in the order of measurement.
        select: what the sweep says of its way to choose: ``"method"`` and, of bisection,
            ``"clean_budget"``, a fraction.
        chosen: the alpha that was chosen.
    """
    tell = {"racing": _racing, "clean_budget": _clean_budget, "apparent_robustness": _apparent}
    method = tell.get(str(select.get("method")))
    return [method(rounds, select, chosen)] if method else []


def _racing(
    rounds: Mapping[str, list[AlphaSummary]], select: Mapping[str, Any], chosen: float
) -> str:
    races = [found for name, found in rounds.items() if name != MAIN]
    final = rounds.get(MAIN, [])
    first, *others = races
    under = ", ".join(first[0].robust)
    story = (
        f"Racing on held-out images: {_many(len(first) - 1)} on {first[0].n:,} images under {under}"
    )
    for found in others:
        attacks = ", ".join(found[0].robust)
        story += f", then {len(found) - 1} on {found[0].n:,}"
        story += "" if attacks == under else f" under {attacks}"
        under = attacks
    if not final:
        return f"{story}; none was left for the final under all attacks."
    return (
        f"{story}; the finalist, alpha = {_list(final)}, met the base model under "
        f"{', '.join(final[0].robust)} on {final[0].n:,}."
    )


def _clean_budget(
    rounds: Mapping[str, list[AlphaSummary]], select: Mapping[str, Any], chosen: float
) -> str:
    tried = {s.alpha: s for found in rounds.values() for s in found if s.alpha}
    budget = select.get("clean_budget")
    allowed = "the budget" + (f" of {budget:.2%}" if isinstance(budget, int | float) else "")
    blind = "robustness had no part in the choice"
    if chosen not in tried:
        return (
            f"Clean budget: no alpha looked at ({_list(tried.values())}) keeps its clean accuracy "
            f"within {allowed}; {blind}."
        )
    found = tried[chosen]
    return (
        f"Clean budget: of the {_many(len(tried))} looked at ({_list(tried.values())}), alpha = "
        f"{chosen:g} is the largest whose clean accuracy stays within {allowed} "
        f"({100 * found.gain.value:+.1f} points on {found.n:,} {found.split} images); {blind}."
    )


def _apparent(
    rounds: Mapping[str, list[AlphaSummary]], select: Mapping[str, Any], chosen: float
) -> str:
    story = (
        f"alpha = {chosen:g} was chosen by apparent robustness, that is, by what attacks on the "
        "model's own gradient leave standing, which masking flatters"
    )
    if MAIN not in rounds:
        return f"{story}."
    honest = choose_alpha(rounds[MAIN])
    return f"{story}; by the worst case it would have been alpha = {honest:g}."


def _many(count: int) -> str:
    return f"{count} alpha" + "s" * (count != 1)


def _list(summaries: Iterable[AlphaSummary]) -> str:
    return ", ".join(f"{alpha:g}" for alpha in sorted({s.alpha for s in summaries} - {0.0}))
