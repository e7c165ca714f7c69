"""The formula, as fast as eager PyTorch allows, and a backward pass that keeps nothing extra.

``where(|x − μ| < c, μ, x)`` takes 10 to 25 times as long as a copy on a CPU, for neither `where`
nor a comparison that gives booleans is vectorised there. Arithmetic is, also with integers, and on
the bits of floats it is exact whatever they mean, NaN, infinities and −0 too: for ``kept`` = 1
outside the band and 0 inside, ``bits(μ) + kept · (bits(x) − bits(μ))`` are the bits of the result.

The operator is idempotent: a value inside the band becomes μ, which is inside, and any other stays
what it is. So the backward pass finds the band again in the *output*, which the next layer keeps
anyway, and neither the input nor a mask has to wait for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Integers as wide as a floating-point number of so many bytes.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# Intermediate results are made for this many values at a time: they fit a cache, and no large
# buffer is asked from the system and given back for every operator.
_CHUNK = 2**17


def replace(x: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    """``where(|x − mean| < threshold, mean, x)`` in the dtype and memory layout of ``x``.

    The exact derivative flows back through it: 1 where a value was kept, 0 inside the band.
    """
    if mean.requires_grad or threshold.requires_grad:
        return _as_laid_out(_formula(x, mean, threshold), x)
    if torch.is_grad_enabled() and x.requires_grad and _is_eager(x):
        result: Tensor = _Replace.apply(x, mean, threshold)
        return result
    return forward(x, mean, threshold)


def replace_(x: Tensor, mean: Tensor, threshold: Tensor, *, clamped: bool = False) -> Tensor:
    """The same, written into ``x``.

    ``clamped`` says what comes next: an activation that overwrites the result and lets a gradient
    pass only where it changed nothing, as ReLU does. What it leaves there then serves the backward
    pass as well as the result itself.
    """
    if not _is_eager(x) or x._is_view() or mean.requires_grad or threshold.requires_grad:
        return x.copy_(replace(x, mean, threshold))
    if torch.is_grad_enabled() and x.requires_grad:
        result: Tensor = _ReplaceInPlace.apply(x, mean, threshold, clamped)
        return result
    return _write(x, mean, threshold, x) if _is_cpu(x) else x.copy_(forward(x, mean, threshold))


def forward(x: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    """The values of `replace`, by the fastest way there is for ``x``."""
    if not _is_eager(x):
        return _as_laid_out(_formula(x, mean, threshold), x)
    if _is_cpu(x):
        return _write(x, mean, threshold, _empty_like(x))
    return _as_laid_out(_fused(_formula)(x, mean, threshold), x)


def _formula(x: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    return torch.where((x - mean).abs() < threshold, mean.to(x.dtype), x)


def _slope(grad: Tensor, y: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    return torch.where((y - mean).abs() < threshold, 0, grad)


def _write(x: Tensor, mean: Tensor, threshold: Tensor, out: Tensor) -> Tensor:
    """The formula in integers, into ``out``, which may be ``x``."""
    bits = _INTEGERS[x.element_size()]
    center = mean.to(x.dtype).view(bits)
    rows = _rows(x, mean, threshold)
    parts: Iterable[tuple[Tensor, Tensor]] = ((x, out),)
    if rows < len(x):
        parts = zip(torch.split(x, rows), torch.split(out, rows), strict=True)
    for part, target in parts:
        kept = _kept(part, mean, threshold, None if out is x else target)
        offset = part.view(bits) - center
        torch.mul(kept, offset, out=target.view(bits)).add_(center)
    return out


def _kept(x: Tensor, mean: Tensor, threshold: Tensor, into: Tensor | None = None) -> Tensor:
    """1 outside the band and 0 inside, as integers as wide as the values of ``x``.

    Distances have no sign, so their bits are ordered as they are, with NaN above everything. The
    memory of ``into`` is used where it serves.
    """
    wide = torch.result_type(x, mean)
    distance = torch.sub(x.to(wide), mean, out=into if wide == x.dtype else None).abs_()
    distance = distance.to(torch.result_type(distance, threshold))
    limit = threshold.to(distance.dtype).nan_to_num(0.0, posinf=torch.inf)
    bits = _INTEGERS[distance.element_size()]
    return distance.view(bits).ge_(limit.view(bits)).to(_INTEGERS[x.element_size()])


class _Replace(torch.autograd.Function):
    """`replace`, which saves its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
        y = forward(x, mean, threshold)
        ctx.save_for_backward(y, mean, threshold)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, mean, threshold = ctx.saved_tensors
        return _backward(grad, y.detach(), mean, threshold), None, None


class _ReplaceInPlace(torch.autograd.Function):
    """`replace_`, which saves what the activation leaves of its result, or one byte a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, threshold: Tensor, clamped: bool) -> Tensor:
        ctx.mark_dirty(x)
        # Not through save_for_backward, which rightly refuses what is overwritten.
        ctx.left = x.detach() if clamped else None
        if clamped:
            ctx.save_for_backward(mean, threshold)
        else:
            ctx.save_for_backward((x - mean).abs() < threshold)
        if _is_cpu(x):
            _write(x, mean, threshold, x)
        else:
            x.copy_(forward(x, mean, threshold))
        # This call counts as one more change of x, and the activation's is the last one.
        ctx.version = x._version + 2
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.left is None:
            (inside,) = ctx.saved_tensors
            return grad.masked_fill(inside, 0), None, None, None
        if ctx.left._version > ctx.version:
            raise RuntimeError(
                "the result of an activation that works in place was overwritten before the "
                "backward pass. Let the activation work out of place (inplace=False)."
            )
        return _backward(grad, ctx.left, *ctx.saved_tensors), None, None, None


def _backward(grad: Tensor, y: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    """The gradient where ``y`` was kept, 0 elsewhere; differentiable in ``grad``."""
    if (torch.is_grad_enabled() and grad.requires_grad) or not _is_eager(grad) or not _is_eager(y):
        return _slope(grad, y, mean, threshold)
    if not _is_cpu(y):
        return _fused(_slope)(grad, y, mean, threshold)
    bits = _INTEGERS[y.element_size()]
    center = mean.to(y.dtype).view((1,) * (y.dim() - mean.dim()) + mean.shape)
    # Where even the mean would have been kept, the band is empty.
    kept = (y.view(bits) - center.view(bits)).ne_(0).bitwise_or_(_kept(center, mean, threshold))
    return kept.mul_(grad.view(bits)).view(grad.dtype)


def _is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _is_eager(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor that is computed with here and now.

    Not a tensor that is traced, compiled, exported, batched by `vmap` or carries a tangent: what
    does all that wants to see the formula.
    """
    return (
        x.dim() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type in ("cpu", "cuda")
        and x.layout == torch.strided
        and x.element_size() in _INTEGERS
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and forward_ad._current_level < 0
    )


def _rows(x: Tensor, *statistics: Tensor) -> int:
    """How many rows along the first axis of ``x`` make a chunk; all if theirs differ."""
    if any(s.dim() == x.dim() and s.shape[0] != 1 for s in statistics):
        return len(x)
    return max(1, _CHUNK * len(x) // max(1, x.numel()))


def _empty_like(x: Tensor) -> Tensor:
    """New memory, laid out as ``x`` is.

    What comes next rounds differently in another layout, and α = 0 must change nothing.
    """
    if 0 in x.stride():  # expanded: its elements share memory
        return torch.empty_like(x)
    return x.new_empty_strided(x.shape, x.stride())


def _as_laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the memory layout of ``x``, as far as strides matter and can be had anew."""
    steps = [(a, b) for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True) if n != 1]
    if all(a == b for a, b in steps) or any(a == 0 for a, _ in steps):
        return y
    return x.new_empty_strided(x.shape, x.stride()).copy_(y)


@cache
def _fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A pointwise function as one GPU kernel, or as it is where none can be built."""
    compiled = torch.compile(function, dynamic=True, fullgraph=True)
    usable = True

    def run(*tensors: Tensor) -> Tensor:
        nonlocal usable
        if usable:
            try:
                return compiled(*tensors)
            except Exception as error:  # a missing compiler shows in many ways
                usable = False
                warnings.warn(
                    f"the operator could not be compiled and runs step by step, more slowly: "
                    f"{type(error).__name__}: {error}",
                    stacklevel=2,
                )
        return function(*tensors)

    return run
