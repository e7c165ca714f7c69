"""What a probe saw, as named candidates for sites."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lightning_meansparse.sites import provenance
from lightning_meansparse.sites.dataflow import Value
from lightning_meansparse.sites.events import Call, Place, Sum
from lightning_meansparse.sites.probe import Probe
from lightning_meansparse.sites.record import Role, Side, Site


@dataclass(frozen=True)
class Candidate:
    """A place that has a name.

    Attributes:
        site: The site; its shape is `()` where the channels are undecided.
        time: When the forward pass came to it.
        undecided: Why its channel axes are undecided, None when they are known.
        obstacle: What keeps an operator from standing there, None when nothing does.
    """

    site: Site
    time: int
    undecided: str | None = None
    obstacle: str | None = None


def candidates(probe: Probe) -> list[Candidate]:
    """Every place that has a name, in execution order, each name once."""
    found: dict[str, Candidate] = {}
    roles = [_of_call(probe, call) for call in probe.calls]
    roles += [_of_sum(probe, total) for total in probe.sums.values() if not total.before_activation]
    others = [_of_place(probe, p, "other") for p in probe.places if probe.counts[p.module] == 1]
    for candidate in roles + others:
        found.setdefault(str(candidate.site), candidate)
    return sorted(found.values(), key=lambda candidate: candidate.time)


def _of_call(probe: Probe, call: Call) -> Candidate:
    role: Role = "gate" if probe.is_gate(call) else "activation"
    if call.module is None:
        function = call.call.partition("[")[0]
        obstacle = f"{call.owner}::{function}, functional call in {call.owner_class}"
    else:
        name, times = probe.names[call.module], probe.counts[call.module]
        if times == 1 and call.first_input:
            site, undecided = _site(name, "in", call.value, role, call.kind)
            return Candidate(site, call.time, undecided)
        how = f"called {times} times in one forward" if times > 1 else "called by keyword"
        obstacle = f"{name}, {call.kind} module {how}, in {call.owner_class}"
    site, undecided = _site(call.owner, "in", call.value, role, call.kind, call=call.call)
    return Candidate(site, call.time, undecided, obstacle)


def _of_sum(probe: Probe, total: Sum) -> Candidate:
    place = total.place
    if place is not None:
        candidate = _of_place(probe, place, "residual")
        times = probe.counts[place.module]
        if times == 1:
            return candidate
        obstacle = f"{candidate.site}, sum of a {candidate.site.kind} called {times} times"
        return Candidate(candidate.site, candidate.time, candidate.undecided, obstacle)
    call = f"add[{total.index}]"
    site, undecided = _site(total.owner, "out", total.value, "residual", "add", call=call)
    obstacle = f"{total.owner}::add, residual sum amid the code of {total.owner_class}"
    return Candidate(site, total.time, undecided, obstacle)


def _of_place(probe: Probe, place: Place, role: Role) -> Candidate:
    name, kind = probe.names[place.module], type(place.module).__name__
    side: Side = "in" if place.side == "in" else "out"
    site, undecided = _site(name, side, place.value, role, kind, index=place.index)
    return Candidate(site, place.time, undecided)


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
