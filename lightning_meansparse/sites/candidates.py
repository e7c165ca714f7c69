"""What a probe saw, as named candidates for sites."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from lightning_meansparse.sites import provenance
from lightning_meansparse.sites.dataflow import Value, Written
from lightning_meansparse.sites.events import Call, Place, Sum, Turn
from lightning_meansparse.sites.probe import Probe
from lightning_meansparse.sites.record import Role, Side, Site
from lightning_meansparse.sites.source import obstacle
from lightning_meansparse.sites.spots import Spot


@dataclass(frozen=True)
class Candidate:
    """A place that has a name.

    Attributes:
        site: The site; its shape is `()` where the channels are undecided.
        time: When the forward pass came to it.
        undecided: Why its channel axes are undecided, None when they are known.
        obstacle: What keeps an operator from standing there, None when nothing does.
        producer: The module in whose code the tensor's channels were made: the last one, where
            layers are joined; empty for the model's input.
    """

    site: Site
    time: int
    undecided: str | None = None
    obstacle: str | None = None
    producer: str = ""


def candidates(probe: Probe) -> list[Candidate]:
    """Every place that has a name, in execution order, each once.

    A call that cannot be reached may have the name of one that can: code that is not seen gives its
    calls no names.
    """
    found: dict[tuple[str, str | None], Candidate] = {}
    roles = [_made(_of_call(probe, call), call.value) for call in probe.calls]
    sums = [total for total in probe.sums.values() if not total.before_activation]
    roles += [_made(_of_sum(probe, total), total.value) for total in sums]
    others = [_of_place(probe, p, "other") for p in probe.places if p.module not in probe.repeated]
    for candidate in roles + others:
        key = str(candidate.site), candidate.obstacle
        found[key] = _joined(found[key], candidate) if key in found else candidate
    return sorted(found.values(), key=lambda candidate: candidate.time)


def _made(candidate: Candidate, value: Value) -> Candidate:
    return replace(candidate, producer=value.maker[1])


def _joined(first: Candidate, again: Candidate) -> Candidate:
    """One place that a repeated owner comes to several times, or that has several roles."""
    if again.site.role == "other":
        return first
    if (first.site.role, again.site.role) == ("gate", "activation"):
        first = replace(first, site=replace(first.site, role="activation"))
    if first.site.shape == again.site.shape:
        return first
    shapes = f"{first.site.shape} and {again.site.shape}"
    return replace(
        first, obstacle=f"{first.site}, whose statistics have the shapes {shapes} in turn"
    )


def _of_call(probe: Probe, call: Call) -> Candidate:
    role: Role = "gate" if probe.is_gate(call) else "activation"
    turn, spot, module = call.turn, call.turn.spot, call.module
    if call.written is not None:
        return _of_written(probe, call, call.written, role)
    discarded = isinstance(spot, Spot) and spot.discarded
    if module is not None and call.first_input and module not in probe.repeated and not discarded:
        site, undecided = _site(probe.names[module], "in", call.value, role, call.kind)
        return Candidate(site, call.time, undecided)
    site, undecided = _site(turn.owner, "in", call.value, role, call.kind, call=turn.name)
    why = _why_not(probe, turn)
    if module is None and not call.first_input:
        why = "its input is not its first argument"
    if why is None:
        return Candidate(site, call.time, undecided)
    function = turn.name.partition("[")[0]
    what = f"{turn.owner}::{function}, functional call"
    if module is not None:
        how = "called several times" if module in probe.repeated else "called by keyword"
        what = f"{probe.names[module]}, {call.kind} module {how}"
    return Candidate(site, call.time, undecided, f"{what} in {turn.owner_class}: {why}")


def _of_written(probe: Probe, call: Call, written: Written, role: Role) -> Candidate:
    """An activation that is written out: its place is where its input passes a module's border."""
    turn = call.turn
    borders = [
        place
        for place in probe.places
        if place.value is written.given
        and place.module not in probe.repeated
        and (place.side == "out" or f"{turn.owner}.".startswith(f"{probe.names[place.module]}."))
    ]
    if borders and probe.flow.uses[written.given] == written.uses:
        return replace(_of_place(probe, borders[0], role), time=call.time)
    site, undecided = _site(turn.owner, "in", call.value, role, call.kind, call=turn.name)
    what = f"{turn.owner}::{turn.name}, {call.kind} written out in {turn.owner_class}"
    why = "is used elsewhere, too" if borders else "is no module's input or output"
    return Candidate(site, call.time, undecided, f"{what}: what goes into it {why}")


def _of_sum(probe: Probe, total: Sum) -> Candidate:
    place, turn = total.place, total.turn
    if place is not None and place.module not in probe.repeated:
        return _of_place(probe, place, "residual")
    site, undecided = _site(turn.owner, "out", total.value, "residual", "add", call=turn.name)
    why = _why_not(probe, turn)
    obstacle = why and f"{turn.owner}::add, residual sum amid the code of {turn.owner_class}: {why}"
    return Candidate(site, total.time, undecided, obstacle)


def _why_not(probe: Probe, turn: Turn) -> str | None:
    """What keeps an operator from a call in the owner's code."""
    if isinstance(turn.spot, str):
        return turn.spot
    return obstacle(probe.owners[turn.owner], turn.spot.name)


def _of_place(probe: Probe, place: Place, role: Role) -> Candidate:
    name, kind = probe.names[place.module], type(place.module).__name__
    side: Side = "in" if place.side == "in" else "out"
    site, undecided = _site(name, side, place.value, role, kind, index=place.index)
    return _made(Candidate(site, place.time, undecided), place.value)


def _site(
    module: str,
    side: Side,
    value: Value,
    role: Role,
    kind: str,
    *,
    call: str | None = None,
    index: int | None = None,
) -> tuple[Site, str | None]:
    """The site, and why its channel axes are undecided."""
    numbers = value.trace.channels
    shape: tuple[int, ...] = ()
    undecided = None
    if isinstance(numbers, Tensor):
        # A single channel has no axis along which the numbers vary: one statistic fits any layout.
        first = min(provenance.axes(numbers), default=None)
        shape = (1,) if first is None else tuple(numbers.shape[first:])
    else:
        undecided = numbers or "no layer has made it, it comes straight from the model's input"
    return Site(module, side, shape, call=call, index=index, role=role, kind=kind), undecided
