"""`survey`: every place of a model, with what is known of it and why it may be left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_meansparse.sites.candidates import Candidate, candidates
from lightning_meansparse.sites.guard import (
    check_example,
    check_model,
    resized,
    shortened,
    untouched,
)
from lightning_meansparse.sites.probe import Probe

Example = Tensor | Mapping[str, Tensor]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Survey:
    """What two probe forwards saw.

    Attributes:
        candidates: Every place that has a name, in the order of the forward pass, each with its
            role, the layer that made its channels, and what keeps an operator from it.
        constants: Activation calls whose value does not depend on the example; no places.
        idle: Activation modules that the model holds and did not call.
    """

    candidates: tuple[Candidate, ...]
    constants: tuple[str, ...]
    idle: tuple[str, ...]


def survey(model: nn.Module, example: Example) -> Survey:
    """Probe a model and tell everything that was seen; `find_sites` chooses among it.

    The model runs on `example` once, in eval mode, without gradients and with the random state put
    back afterwards. A second run, with one sample more and larger images where the model takes
    them, checks the channel axes. Afterwards the model is the same: training flags, buffers,
    attributes, hooks.

    Args:
        model: The network.
        example: What `model` is called with: images `(N, C, H, W)`, or a dict of keyword tensors.

    Returns:
        The survey.

    Raises:
        TypeError: If `model` or `example` is of a kind that cannot be used.
        ValueError: If the example is empty, or a parameter has no shape yet.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
        >>> for place in survey(net, torch.zeros(1, 3, 8, 8)).candidates:
        ...     print(place.site, place.site.role, place.producer or "the input")
        0@in other the input
        0@out other 0
        1@in activation 0
        1@out other 0
        2@in other 0
        2@out other 0
        3@in other 0
        3@out other 3
    """
    check_model(model)
    inputs = shortened(check_example(example))
    probe = _probe(model, inputs)
    found = candidates(probe)
    again = _probe_again(model, inputs)
    if again is not None:
        second: dict[str, list[Candidate]] = {}
        for candidate in candidates(again):
            second.setdefault(str(candidate.site), []).append(candidate)
        found = [_compared(c, _counterpart(c, second.get(str(c.site), []))) for c in found]
    return Survey(tuple(found), tuple(probe.constants), tuple(probe.idle()))


def _probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> Probe:
    probe = Probe(model)
    try:
        with untouched(model, inputs), torch.inference_mode(False), torch.no_grad():
            given = {name: tensor.detach().clone() for name, tensor in inputs.items()}
            args, kwargs = ((given[""],), {}) if "" in given else ((), given)
            probe.run(lambda: model(*args, **kwargs), list(given.values()))
    except Exception as error:
        shapes = ", ".join(
            f"{name or 'example'} {tuple(t.shape)} {t.dtype} on {t.device}"
            for name, t in inputs.items()
        )
        error.add_note(f"find_sites called {type(model).__name__} with {shapes}.")
        raise
    return probe


def _probe_again(model: nn.Module, inputs: Mapping[str, Tensor]) -> Probe | None:
    """A probe at another batch size and image size; None if the model takes no other."""
    for grow in (32, 0):
        try:
            return _probe(model, {name: resized(t, grow) for name, t in inputs.items()})
        except Exception as error:  # whatever a model raises at a size that it does not take
            _log.debug("no second probe with images larger by %d pixels: %s", grow, error)
    return None


def _counterpart(candidate: Candidate, others: list[Candidate]) -> Candidate | None:
    """Which of the second probe's candidates of the same name is meant."""
    alike = [other for other in others if other.obstacle == candidate.obstacle]
    return next(iter(alike + others), None)


def _compared(candidate: Candidate, other: Candidate | None) -> Candidate:
    """The candidate, undecided if the second probe saw other channels there.

    Where maps shrink to one position, factors that broadcast have the shape of what they multiply,
    and an activation beside one may look like a gate: it is one only if both probes say so.
    """
    if other is not None and (candidate.site.role, other.site.role) == ("gate", "activation"):
        candidate = replace(candidate, site=other.site)
    if candidate.undecided is not None:
        return candidate
    if other is None:
        return replace(candidate, undecided="it is not met at another batch or image size")
    if other.undecided is None and other.site.shape != candidate.site.shape:
        doubt = (
            f"its statistics have the shape {candidate.site.shape} here and {other.site.shape} at "
            f"another batch or image size"
        )
        return replace(candidate, undecided=doubt)
    return candidate
