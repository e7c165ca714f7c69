"""`find_sites`: probe a model, then choose among the places that the probe saw."""

from __future__ import annotations

import warnings

from torch import nn

from lightning_meansparse.sites.candidates import Candidate
from lightning_meansparse.sites.choice import Where, check_where, select, selects_nothing
from lightning_meansparse.sites.record import Site
from lightning_meansparse.sites.survey import Example, survey


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
        where: Which places: `"activations"`, `"activations+gates"`, `"activations+residual"`, or
            the three words joined otherwise; or a glob over the names of all places (those and any
            module's `@in`, `@out` and `@out[i]`); or a list of such; or a function of a `Site` that
            tells whether it is wanted (a site whose channels are undecided comes with the shape
            `()`).
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
    check_where(where)
    everything = list(survey(model, example).candidates)
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
    undecided = [c for c in reached if c.undecided is not None]
    if undecided:
        raise UndecidedChannelsError(_undecided(undecided), tuple(str(c.site) for c in undecided))
    return tuple(c.site for c in reached)


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
