"""What `where=` means."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from lightning_meansparse.sites.candidates import Candidate
from lightning_meansparse.sites.record import Role, Site, match

Where = str | Sequence[str] | Callable[[Site], bool]

MODES = ("activations", "activations+gates", "activations+residual")
_ROLES: dict[str, Role] = {"activations": "activation", "gates": "gate", "residual": "residual"}


def check_where(where: object) -> None:
    """Refuse what is neither a mode nor globs nor a function.

    Raises:
        TypeError: If so.
    """
    if callable(where) or (isinstance(where, str) and where):
        return
    if isinstance(where, Sequence) and where and all(isinstance(g, str) and g for g in where):
        return
    raise TypeError(
        f"where must be one of {', '.join(map(repr, MODES))}, a glob, a non-empty list of globs, "
        f"or a function of a Site, got {where!r}."
    )


def select(found: list[Candidate], where: Where) -> list[Candidate]:
    """The candidates that are wanted.

    Raises:
        ValueError: If a glob matches nothing.
    """
    if callable(where):
        return [c for c in found if where(c.site)]
    return _matching(found, [where] if isinstance(where, str) else list(where))


def _matching(found: list[Candidate], globs: list[str]) -> list[Candidate]:
    names = [str(c.site) for c in found]
    chosen: set[Candidate] = set()
    for glob in globs:
        words = glob.split("+")
        if set(words) <= set(_ROLES):
            roles = [_ROLES[word] for word in words]
            chosen.update(c for c in found if c.site.role in roles)
            continue
        hits = set(match(glob, names))
        if not hits:
            raise ValueError(
                f"where: {glob!r} matches none of the {len(names)} places of this model. "
                f"Close names: {', '.join(_close(glob, names))}."
            )
        chosen.update(c for c in found if str(c.site) in hits)
    return [c for c in found if c in chosen]


def _close(glob: str, names: list[str]) -> list[str]:
    """Up to five names near a glob: those that hold its text, then those spelt alike."""
    bare = glob.partition("@")[0].strip("*.")
    holding = [n for n in names if bare and bare in n]
    alike = difflib.get_close_matches(glob, [*MODES, *names], n=5, cutoff=0.4)
    return list(dict.fromkeys([*holding[:3], *alike, *holding, *names]))[:5]


def selects_nothing(found: list[Candidate], where: Where) -> str:
    """Message for an empty selection."""
    roles = [c.site.role for c in found]
    counts = ", ".join(
        f"{roles.count(role)} {role}" for role in ("activation", "gate", "residual", "other")
    )
    shown = "the given function" if callable(where) else f"{where!r}"
    return (
        f"where: {shown} selects nothing. The model's places by role: {counts}. Choose others, "
        f"e.g. where='activations+gates' or a glob such as '*@in'."
    )
