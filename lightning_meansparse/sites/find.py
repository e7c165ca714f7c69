"""`find_sites`: probe a model, then choose among the places that the probe saw."""

from __future__ import annotations

import difflib
import fnmatch
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_meansparse.sites import provenance
from lightning_meansparse.sites.probe import Call, Probe, Value
from lightning_meansparse.sites.site import Role, Site

Example = Tensor | Mapping[str, Tensor]
Where = str | Sequence[str] | Callable[[Site], bool]

MODES: dict[str, frozenset[Role]] = {
    "activations": frozenset(("activation",)),
    "activations+gates": frozenset(("activation", "gate")),
    "activations+residual": frozenset(("activation", "residual")),
}
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")
_log = logging.getLogger(__name__)


class UnreachableSitesError(ValueError):
    """Wanted sites stand where no operator can be put yet; `names` lists them."""

    def __init__(self, message: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


class UndecidedChannelsError(ValueError):
    """It cannot be told which axis of a wanted site holds the channels; `names` lists them."""

    def __init__(self, message: str, names: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.names = names


@dataclass(frozen=True)
class _Candidate:
    site: Site
    time: int
    undecided: str | None = None
    group: str | None = None  # what cannot be reached, None when it can
    reason: str = ""


def find_sites(
    model: nn.Module, example: Example, *, where: Where = "activations", strict: bool = True
) -> tuple[Site, ...]:
    """Find the places where an operator belongs, by a probe forward.

    The model runs once on `example` in eval mode, without gradients and with the random state put
    back afterwards; a second run on other sizes, where the model takes them, checks the channel
    axes. The model is the same afterwards: training flags, buffers, attributes, hooks.

    An *activation* is a module of `torch.nn`, timm or transformers that is one by its class, a leaf
    module that is an elementwise function around one, or a functional call. Activations whose value
    does not depend on `example` are left out. A *gate* is an activation that reaches the output
    only as a factor of another tensor (squeeze-excite, GLU), see [1], Sec. 4 and the authors' RaWRN.

    Args:
        model: The network. Names of sites are relative to it, as in `model.named_modules()`.
        example: What `model` is called with: an image batch `(N, C, H, W)`, or a dict of keyword
            tensors. It should be on the model's device and of its dtype.
        where: Which places: `"activations"`, `"activations+gates"`, `"activations+residual"`; a glob or
            a list of globs over the names of all places (any module's `@in`, `@out`, `@out[i]` too);
            or a function that takes a `Site` and tells whether it is wanted.
        strict: What to do when wanted activations cannot be reached (shared modules, functional calls,
            residual sums amid a block): True raises, False leaves them out with one warning.

    Returns:
        The sites in the order in which the forward pass comes to them.

    Raises:
        UnreachableSitesError: If wanted sites cannot be reached and `strict` is True, or if none of
            the wanted sites can be reached.
        UndecidedChannelsError: If the channel axis of a wanted site cannot be told.
        ValueError: If a glob matches nothing, or if nothing at all is found.
        TypeError: If `model`, `example` or `where` is of a kind that cannot be probed.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> [(str(site), site.shape) for site in find_sites(net, torch.zeros(1, 3, 8, 8))]
        [('1@in', (8, 1, 1))]

    References:
        [1] Amini et al., MeanSparse, arXiv 2406.05927.
    """
    _check_model(model)
    inputs = _check_example(example)
    _check_where(where)
    with _untouched(model, inputs), torch.inference_mode(False), torch.no_grad():
        candidates = _candidates(_probe(model, inputs))
        wanted = _select(candidates, where)
        second = _second_probe(model, inputs) if wanted else None
    wanted = _checked(wanted, second) if second else wanted
    reached = [c for c in wanted if c.group is None]
    missed = [c for c in wanted if c.group is not None]
    if missed:
        message = _describe(missed)
        names = tuple(str(c.site) for c in missed)
        if strict or not reached:
            raise UnreachableSitesError(message, names)
        warnings.warn(f"{message}\nThey are left out (strict=False).", UserWarning, stacklevel=2)
    if not reached:
        raise ValueError(_nothing(candidates, where))
    undecided = [c for c in reached if c.undecided is not None]
    if undecided:
        lines = "\n".join(f"  {c.site}: {c.undecided}" for c in undecided)
        raise UndecidedChannelsError(
            f"the channel axis of {len(undecided)} site(s) is undecided:\n{lines}\n"
            f"Leave them out with where=..., or give the shape of one statistic yourself, e.g. "
            f"Site.parse({str(undecided[0].site)!r}, (C, 1, 1)) for channels on axis 1 of NCHW.",
            tuple(str(c.site) for c in undecided),
        )
    return tuple(c.site for c in reached)


# ---------------------------------------------------------------------------------- the probe runs


def _probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> Probe:
    given = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    probe = Probe(model)

    def forward() -> object:
        return model(given[""]) if "" in given else model(**given)

    try:
        probe.run(forward, list(given.values()))
    except Exception as error:
        shapes = ", ".join(
            f"{name or 'example'}: {tuple(t.shape)} {t.dtype} on {t.device}"
            for name, t in inputs.items()
        )
        error.add_note(f"find_sites called {type(model).__name__} with {shapes}.")
        raise
    return probe


def _second_probe(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, _Candidate] | None:
    """Candidates for another batch size and image size; None if the model takes no other."""
    for grow in (32, 0):
        try:
            found = _candidates(_probe(model, {k: _resized(v, grow) for k, v in inputs.items()}))
        except Exception as error:  # whatever a model raises at a size that it does not take
            _log.debug("no second probe at +%d pixels: %s", grow, error)
        else:
            return {str(c.site): c for c in found}
    return None


def _resized(tensor: Tensor, grow: int) -> Tensor:
    """One sample more and, for images, `grow` more rows and columns, by repetition."""
    for dim, more in enumerate((1, 0, grow, grow) if tensor.ndim == 4 else (1,)):
        if dim < tensor.ndim and more:
            size = tensor.shape[dim]
            index = torch.arange(size + more, device=tensor.device) % size
            tensor = tensor.index_select(dim, index)
    return tensor


def _checked(wanted: list[_Candidate], second: dict[str, _Candidate]) -> list[_Candidate]:
    """Wanted sites, undecided where the second probe says otherwise."""
    result = []
    for candidate in wanted:
        other = second.get(str(candidate.site))
        if other is None:
            doubt: str | None = "it is not met at another batch or image size"
        elif other.undecided is None and other.site.shape != candidate.site.shape:
            doubt = (
                f"its statistics have shape {candidate.site.shape} here but {other.site.shape} at "
                f"another batch or image size"
            )
        else:
            doubt = None
        result.append(replace(candidate, undecided=candidate.undecided or doubt))
    return result


@contextmanager
def _untouched(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Eval mode inside; afterwards every attribute, buffer and random state is as before."""
    modules = list(model.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    held = [
        (value, value.copy())
        for _, saved in attributes
        for value in saved.values()
        if isinstance(value, (dict, list))
    ]
    buffers = [(b, b.detach().clone()) for b in {id(b): b for b in model.buffers()}.values()]
    tensors = [*inputs.values(), *model.parameters()]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            for module in modules:
                module.training = False
            yield
        finally:
            for container, content in held:
                if isinstance(container, dict):
                    container.clear()
                    container.update(content)
                else:
                    container[:] = content
            for module, saved in attributes:
                vars(module).clear()
                vars(module).update(saved)
            for buffer, before in buffers:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(before)


# ------------------------------------------------------------------------------------- candidates


def _candidates(probe: Probe) -> list[_Candidate]:
    """Every nameable place, in execution order, each name once."""
    found: dict[str, _Candidate] = {}

    def add(candidate: _Candidate) -> None:
        found.setdefault(str(candidate.site), candidate)

    for call in probe.calls:
        add(_activation(probe, call))
    for total in probe.sums.values():
        if total.before_activation:
            continue
        place = total.place
        if place is None:
            site, undecided = _site(
                total.owner,
                "out",
                total.value,
                total.shape,
                role="residual",
                kind="add",
                call=f"add[{total.index}]",
            )
            group = f"{total.owner}::add"
            reason = f"residual sum amid the code of {total.owner_class}"
            add(_Candidate(site, total.time, undecided, group, reason))
            continue
        name, kind = probe.names[place.module], type(place.module).__name__
        site, undecided = _site(
            name, "out", place.value, place.shape, role="residual", kind=kind, index=place.index
        )
        times = probe.counts[place.module]
        group = None if times == 1 else f"{name}@out"
        reason = f"residual sum of {kind}, which is called {times} times"
        add(_Candidate(site, place.time, undecided, group, reason))
    for place in probe.places:
        if probe.counts[place.module] == 1:
            site, undecided = _site(
                probe.names[place.module],
                place.side,
                place.value,
                place.shape,
                role="other",
                kind=type(place.module).__name__,
                index=place.index,
            )
            add(_Candidate(site, place.time, undecided))
    return sorted(found.values(), key=lambda c: c.time)


def _activation(probe: Probe, call: Call) -> _Candidate:
    role: Role = "gate" if probe.is_gate(call) else "activation"
    times = 0 if call.module is None else probe.counts[call.module]
    if call.module is not None and times == 1 and call.first_input:
        name = probe.names[call.module]
        site, undecided = _site(name, "in", call.value, call.shape, role=role, kind=call.kind)
        return _Candidate(site, call.time, undecided)
    site, undecided = _site(
        call.owner, "in", call.value, call.shape, role=role, kind=call.kind, call=call.call
    )
    if call.module is None:
        group, reason = f"{call.owner}::{call.call.partition('[')[0]}", "functional call"
    else:
        group = probe.names[call.module]
        reason = f"{call.kind} module" + (
            f", called {times} times in one forward" if times > 1 else ", called by keyword"
        )
    return _Candidate(site, call.time, undecided, group, f"{reason}, in {call.owner_class}")


def _site(
    module: str,
    side: str,
    value: Value,
    shape: torch.Size,
    *,
    role: Role,
    kind: str,
    call: str | None = None,
    index: int | None = None,
) -> tuple[Site, str | None]:
    """The site, and why its channel axis is undecided (its shape is then empty)."""
    numbers = value.trace.channels
    sizes: tuple[int, ...] = ()
    undecided = None
    if isinstance(numbers, Tensor):
        first = min(provenance.axes(numbers), default=-1)
        sizes = tuple(numbers.shape[first:]) or (1,)
        if numbers.ndim == 1 and len(shape) == 1 and not call:
            sizes = tuple(numbers.shape)
    else:
        undecided = numbers or "no layer has made it, it comes straight from the model's input"
    site = Site(
        module=module,
        side="in" if side == "in" else "out",
        shape=sizes,
        call=call,
        index=index,
        role=role,
        kind=kind,
    )
    return site, undecided


# -------------------------------------------------------------------------------------- selection


def _select(candidates: list[_Candidate], where: Where) -> list[_Candidate]:
    if isinstance(where, str):
        if where in MODES:
            return [c for c in candidates if c.site.role in MODES[where]]
        return _globbed(candidates, [where])
    if callable(where):
        return [c for c in candidates if where(c.site)]
    return _globbed(candidates, list(where))


def _globbed(candidates: list[_Candidate], globs: list[str]) -> list[_Candidate]:
    names = [str(c.site) for c in candidates]
    chosen: set[str] = set()
    for glob in globs:
        # Exact first: in `blocks.2@out[0]` the brackets are no character class.
        hits = [n for n in names if n == glob] or [n for n in names if fnmatch.fnmatchcase(n, glob)]
        if not hits:
            close = difflib.get_close_matches(glob, [*names, *MODES], n=5, cutoff=0.5)
            bare = glob.strip("*").partition("@")[0]
            close += [n for n in names if bare and bare in n and n not in close][: 5 - len(close)]
            raise ValueError(
                f"where: the glob {glob!r} matches none of the {len(names)} places in this model. "
                f"Close names: {', '.join(close or names[:5])}."
            )
        chosen.update(hits)
    return [c for c in candidates if str(c.site) in chosen]


def _describe(missed: list[_Candidate]) -> str:
    groups: dict[tuple[str, str], list[str]] = {}
    for candidate in missed:
        groups.setdefault((str(candidate.group), candidate.reason), []).append(str(candidate.site))
    lines = [
        f"  {group} ({reason}), {len(names)}x: {', '.join(names)}"
        for (group, reason), names in groups.items()
    ]
    return (
        f"{len(missed)} wanted site(s) cannot be reached: an operator can only stand at a module that is "
        f"called exactly once in a forward pass, with its input as the first argument.\n"
        + "\n".join(lines)
        + "\nPass strict=False to leave them out, or where=... to choose other places; or give every "
        "call its own activation module in the model's code."
    )


def _nothing(candidates: list[_Candidate], where: Where) -> str:
    roles = [c.site.role for c in candidates]
    counts = ", ".join(f"{roles.count(r)} {r}" for r in ("activation", "gate", "residual", "other"))
    shown = repr(where) if isinstance(where, (str, list, tuple)) else "the given function"
    return (
        f"where={shown} selects nothing in this model. The probe saw places of these roles: {counts}. "
        f"Choose others, e.g. where='activations+gates' or a glob such as '*@in'."
    )


# ------------------------------------------------------------------------------------------ checks


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    for name, module in model.named_modules():
        kind = type(module).__name__
        where = f"its submodule {name!r}" if name else "it"
        if kind in _WRAPPERS:
            raise TypeError(
                f"model must not be wrapped: {where} is a {kind}. Pass the module inside "
                f"(`model.module`) and wrap afterwards."
            )
        if kind == "OptimizedModule" or vars(module).get("_compiled_call_impl") is not None:
            raise TypeError(
                f"model must not be compiled yet: {where} is ({kind}). Pass the plain module and call "
                f"torch.compile afterwards."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model must be plain Python: {where} is a TorchScript module, which takes no hooks."
            )
    lazy = [n for n, p in model.named_parameters() if torch.nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(
            f"model has parameters without a shape yet ({', '.join(lazy[:3])}): call it once first."
        )


def _check_example(example: object) -> dict[str, Tensor]:
    """The example's tensors by keyword; a single tensor has the empty keyword."""
    if isinstance(example, Tensor):
        tensors = {"": example}
    elif isinstance(example, Mapping) and all(isinstance(v, Tensor) for v in example.values()):
        tensors = dict(example)
    else:
        raise TypeError(
            f"example must be a tensor (N, C, H, W) or a dict of keyword tensors, got "
            f"{type(example).__name__}."
        )
    if not any(t.is_floating_point() and t.numel() for t in tensors.values()):
        raise ValueError(
            "example must hold at least one non-empty floating-point tensor, got "
            + (
                ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors.values())
                or "an empty dict"
            )
            + "."
        )
    return tensors


def _check_where(where: object) -> None:
    if callable(where) or (isinstance(where, str) and where):
        return
    if isinstance(where, Sequence) and where and all(isinstance(g, str) for g in where):
        return
    raise TypeError(
        f"where must be one of {', '.join(map(repr, MODES))}, a glob, a non-empty list of globs, or a "
        f"function of a Site, got {where!r}."
    )
