"""`find_sites`: probe a model, then choose among the places that the probe saw."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lightning_meansparse.sites.candidates import Candidate, candidates
from lightning_meansparse.sites.choice import Where, check_where, select, selects_nothing
from lightning_meansparse.sites.guard import (
    check_example,
    check_model,
    resized,
    shortened,
    untouched,
)
from lightning_meansparse.sites.probe import Probe
from lightning_meansparse.sites.record import Site

Example = Tensor | Mapping[str, Tensor]

_log = logging.getLogger(__name__)


class UnreachableSitesError(ValueError):
    """Wanted sites stand where no operator can be put.

    Attributes:
        names: Names of those sites.
    """

    def __init__(self, message: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


class UndecidedChannelsError(ValueError):
    """It cannot be told which axes of a wanted site are channels.

    Attributes:
        names: Names of those sites.
    """

    def __init__(self, message: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


def find_sites(
    model: nn.Module, example: Example, *, where: Where = "activations", strict: bool = True
) -> tuple[Site, ...]:
    """Find the places where an operator belongs, by a probe forward.

    The model runs on `example` once, in eval mode, without gradients and with the random state put
    back afterwards. A second run, with one sample more and larger images where the model takes
    them, checks the channel axes. Afterwards the model is the same: training flags, buffers,
    attributes, hooks.

    An *activation* is a module that is one by its class (`torch.nn`, timm, transformers), a leaf
    module that is an elementwise function around one, or a functional call. Activations whose value
    does not depend on `example` are left out. A *gate* is an activation that reaches the output
    only as a factor of another tensor (squeeze-excite, GLU); the published models leave gates
    alone ([1], RaWRN), and so does the default.

    Which axes are channels is told by where a tensor came from: convolutions make axis 1, matrix
    products the last one, and views, permutes, window partitions and the like are followed.

    Args:
        model: The network. Names of sites are relative to it, as in `model.named_modules()`.
        example: What `model` is called with: images `(N, C, H, W)`, or a dict of keyword tensors.
            It should be on the model's device and of its dtype. Two samples of it are used.
        where: Which places: `"activations"`, `"activations+gates"`, `"activations+residual"`; or a
            glob or a list of globs over the names of all places (those and any module's `@in`,
            `@out` and `@out[i]`); or a function of a `Site` that tells whether it is wanted (a site
            whose channels are undecided comes with the shape `()`).
        strict: What to do when wanted sites cannot be reached (calls in code without a source, or
            in functions that an object holds): True raises, False leaves them out with one warning.

    Returns:
        The sites, in the order in which the forward pass comes to them.

    Raises:
        UnreachableSitesError: If wanted sites cannot be reached and `strict` is True, or if none of
            them can be reached.
        UndecidedChannelsError: If the channel axes of a wanted site cannot be told.
        ValueError: If a glob matches nothing, or if nothing at all is selected.
        TypeError: If `model`, `example` or `where` is of a kind that cannot be used.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> [(str(site), site.shape) for site in find_sites(net, torch.zeros(1, 3, 8, 8))]
        [('1@in', (8, 1, 1))]

    References:
        [1] Amini et al., MeanSparse, arXiv 2406.05927.
    """
    check_model(model)
    inputs = shortened(check_example(example))
    check_where(where)
    everything = _probe(model, inputs)
    wanted = select(everything, where)
    missed = [c for c in wanted if c.obstacle is not None]
    reached = [c for c in wanted if c.obstacle is None]
    if missed:
        message, names = _unreachable(missed), tuple(str(c.site) for c in missed)
        if strict or not reached:
            raise UnreachableSitesError(message, names)
        warnings.warn(f"{message} They are left out (strict=False).", UserWarning, stacklevel=2)
    if not reached:
        raise ValueError(selects_nothing(everything, where))
    second = _probe_again(model, inputs)
    if second is not None:
        reached = [_compared(c, second.get(str(c.site))) for c in reached]
    undecided = [c for c in reached if c.undecided is not None]
    if undecided:
        raise UndecidedChannelsError(_undecided(undecided), tuple(str(c.site) for c in undecided))
    return tuple(c.site for c in reached)


def _probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Candidate]:
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
    return candidates(probe)


def _probe_again(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Candidate] | None:
    """Candidates at another batch size and image size; None if the model takes no other."""
    for grow in (32, 0):
        try:
            found = _probe(model, {name: resized(t, grow) for name, t in inputs.items()})
        except Exception as error:  # whatever a model raises at a size that it does not take
            _log.debug("no second probe with images larger by %d pixels: %s", grow, error)
        else:
            return {str(c.site): c for c in found}
    return None


def _compared(candidate: Candidate, other: Candidate | None) -> Candidate:
    """The candidate, undecided if the second probe saw other channels there."""
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


def _unreachable(missed: list[Candidate]) -> str:
    groups: dict[str, list[str]] = {}
    for candidate in missed:
        groups.setdefault(str(candidate.obstacle), []).append(str(candidate.site))
    lines = [f"  {obstacle}: {', '.join(names)}" for obstacle, names in groups.items()]
    return (
        f"{len(missed)} wanted site(s) cannot be reached: they are no module that is called once, "
        f"nor a call in the source of the forward of the module that runs:\n"
        + "\n".join(lines)
        + "\nPass strict=False to leave them out, or where=... to choose others, or give each call "
        "a module of its own in the model's code."
    )


def _undecided(undecided: list[Candidate]) -> str:
    lines = "\n".join(f"  {c.site}: {c.undecided}" for c in undecided)
    return (
        f"the channel axes of {len(undecided)} wanted site(s) are undecided:\n{lines}\n"
        f"Leave them out with where=..., or give the shape of one statistic yourself, e.g. "
        f"Site.parse({str(undecided[0].site)!r}, (C, 1, 1)) where axis 1 of 4 holds C channels."
    )
