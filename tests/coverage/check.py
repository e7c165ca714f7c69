"""One model from its first forward pass to `restore_`: what was reached, and what went wrong."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_meansparse import calibrate_, find_sites, restore_, set_alpha, sparsify_, surgery
from lightning_meansparse.layer import MeanSparse

from .oracle import Call, Example, Truth, look
from .tape import tensors_in


@dataclass
class Result:
    """What became of one model.

    Attributes:
        calls: Input-dependent activation calls.
        gates: How many of them only multiply other tensors.
        reached: How many of the others get their input from an operator.
        operators: How many operators were put in.
        told: At how many of those the oracle could tell the channels.
        again: How many of those run several times, since the code that they stand in does.
        torn: How many calls an operator serves in part only. They are failures, and not reached.
        missed: The calls that are neither gates nor reached.
        failures: What went wrong, one sentence each. Empty: all is well.
        error: What `find_sites` or `sparsify_` refused to do, `""` if nothing.
        seconds: How long it took.
    """

    calls: int = 0
    gates: int = 0
    reached: int = 0
    operators: int = 0
    told: int = 0
    again: int = 0
    torn: int = 0
    missed: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures and not self.error and not self.missed

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def wake(model: nn.Module) -> None:
    """Give parameters that start out constant some variety: scales at 0 or 1e-6, zero biases.

    A block whose last scale is zero computes nothing, so nothing could go wrong in it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                flat = parameter.flatten()
                if bool((flat == flat[0]).all()):
                    parameter += 0.1 * torch.rand(parameter.shape, generator=generator)


def check_model(model: nn.Module, example: Example, *, strict: bool = True) -> Result:
    """Put operators at all activations of a model, look at what they do, take them out again.

    Args:
        model: The network. It is put into eval mode, and is otherwise as before at the end.
        example: A batch of images, or of keyword tensors with the images first.
        strict: Whether calls that cannot be reached end the check (else they are counted).
    """
    began = time.perf_counter()
    result = Result()
    model.eval()
    base = _outputs(model, example)  # also lets the model fill its caches
    if not _equal(base, _outputs(model, example)):
        result.failures.append("the base model gives other outputs the second time")
    if not all(bool(t.isfinite().all()) for t in base if t.is_floating_point()):
        result.failures.append("the base model's outputs are not finite")
    before = _portrait(model)
    truth = look(model, example, shapes=False)
    result.calls = len(truth.calls)
    result.gates = sum(call.gate for call in truth.calls)
    # Where there is nothing but gates, operators before gates are looked at.
    where = "activations" if result.gates < result.calls else "activations+gates"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            sites = find_sites(model, example, where=where, strict=strict)
        sparsify_(model, sites)
    except Exception as error:
        result.error = f"{type(error).__name__}: {error}"
        result.missed = [str(call) for call in truth.calls if not call.gate]
        result.failures += _differences(before, _portrait(model))
    else:
        _check_operators(model, example, base, truth, sites, result)
        restore_(model)
        result.failures += _differences(before, _portrait(model))
        if not _equal(base, _outputs(model, example)):
            result.failures.append("after restore_ the outputs are others")
    result.seconds = round(time.perf_counter() - began, 2)
    return result


def _check_operators(
    model: nn.Module,
    example: Example,
    base: list[Tensor],
    truth: Truth,
    sites: Sequence[Any],
    result: Result,
) -> None:
    say = result.failures.append
    operators = {n: m for n, m in model.named_modules() if isinstance(m, MeanSparse)}
    result.operators = len(operators)
    if not _equal(base, _outputs(model, example)):
        say("with operators and α = 0 the outputs are others")
    sparse = look(model, example, operators)
    if [_kind(c) for c in sparse.calls] != [_kind(c) for c in truth.calls]:
        say(
            f"with operators other activations run: {len(sparse.calls)} for {len(truth.calls)} "
            f"calls, {sum(c.gate for c in sparse.calls)} for {result.gates} gates"
        )
    only_gates = result.gates == result.calls
    for call in sparse.calls:
        if call.gate and not only_gates:
            continue
        if call.operator is None:
            result.missed.append(str(call))
        elif call.torn:
            result.torn += 1
            say(f"{call}: {call.operator} serves a part of it only")
        elif not call.gate:
            result.reached += 1
    places = surgery.operators(model)
    times = {places[str(site)]: _times(site, sparse.runs) for site in sites}
    expected = {name: times.get(module, 1) for name, module in operators.items()}
    for operator in sparse.operators:
        mine = tuple(operators[operator.name].mean.shape)
        result.again += operator.times > 1
        if operator.times != expected[operator.name]:
            say(
                f"{operator.name} ran {operator.times} times in one forward pass, "
                f"its code {expected[operator.name]} times"
            )
        elif operator.gates + operator.serves == 0 or (operator.gates and not only_gates):
            say(f"{operator.name} stands before no activation, or before a gate")
        elif isinstance(operator.shape, tuple):
            result.told += 1
            if operator.shape != mine:
                say(f"{operator.name} has the shape {mine}, the oracle says {operator.shape}")
    _check_statistics(model, example, base, operators, expected, result)


def _times(site: Any, runs: Mapping[str, int]) -> int:
    """How often the code in which a site stands runs: that of its module, or of who calls that.

    Of two calls in one code each has an operator of its own; of code that runs twice none has.
    """
    owner = site.module
    if site.call is None:
        owner = owner.rpartition(".")[0]
        while owner and not runs.get(owner):  # lists of modules do not run
            owner = owner.rpartition(".")[0]
    return runs.get(owner, 1)


def _check_statistics(
    model: nn.Module,
    example: Example,
    base: list[Tensor],
    operators: Mapping[str, nn.Module],
    expected: Mapping[str, int],
    result: Result,
) -> None:
    say = result.failures.append
    try:
        _calibrate(model, example)
    except Exception as error:
        say(f"calibrate_: {type(error).__name__}: {error}")
        return
    if not _equal(base, _outputs(model, example)):
        say("with statistics and α = 0 the outputs are others")
    set_alpha(model, 0.5)
    hits: dict[str, int] = dict.fromkeys(operators, 0)

    def count(name: str, module: nn.Module, args: object) -> None:
        hits[name] += 1

    handles = [m.register_forward_pre_hook(partial(count, n)) for n, m in operators.items()]
    if _equal(base, _outputs(model, example)):
        say("with statistics and α = 0.5 the outputs are still those of the base model")
    for handle in handles:
        handle.remove()
    wrong = {name: times for name, times in hits.items() if times != expected[name]}
    if wrong:
        say(f"at α = 0.5 operators ran so often: {wrong}, their code {expected}")


def _calibrate(model: nn.Module, example: Example) -> None:
    if not isinstance(example, Mapping):
        calibrate_(model, [example])
    elif list(example) == ["pixel_values"]:
        calibrate_(model, [dict(example)])
    else:  # calibrate_ gives images only, as the first argument: the rest is bound here
        name, images = next(iter(example.items()))
        rest = {key: value for key, value in example.items() if key != name}
        forward = model.forward
        vars(model)["forward"] = lambda pixels: forward(**{name: pixels, **rest})
        try:
            calibrate_(model, [images])
        finally:
            del vars(model)["forward"]


def _kind(call: Call) -> tuple[str, bool]:
    return call.op, call.gate


def _outputs(model: nn.Module, example: Example) -> list[Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(**example) if isinstance(example, Mapping) else model(example)
    return list(tensors_in(output))


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


Portrait = dict[str, Any]


def _portrait(model: nn.Module) -> Portrait:
    """What must be as before: classes, attributes, children, hooks, keys."""
    portrait: Portrait = {"keys of the state_dict": list(model.state_dict())}
    for name, module in model.named_modules():
        portrait[f"class of {name!r}"] = type(module)
        for attribute, value in vars(module).items():
            inside = list(value) if isinstance(value, (dict, set)) else None
            portrait[f"attribute {attribute} of {name!r}"] = inside
    return portrait


def _differences(before: Portrait, after: Portrait) -> list[str]:
    return [
        f"restore_ leaves another {what}: {before.get(what)} was, {after.get(what)} is"
        for what in dict.fromkeys([*before, *after])
        if (what in before, before.get(what)) != (what in after, after.get(what))
    ]
