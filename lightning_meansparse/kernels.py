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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# Integers as wide as a floating-point number of so many bytes.
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# A tensor of more values per thread than the first is worked on in chunks of the second: they stay
# in a cache, and no large buffer is asked from the system and given back for every step.
_LARGE, _CHUNK = 2**21, 2**18

# PyTorch works along the run of values that share a channel. Where that is shorter, as on the last
# maps of many networks, it costs more than the arithmetic, and statistics of a whole row less.
_SHORT = 16


class Band:
    """What is replaced by what: ``where(|x − mean| < threshold, mean, x)``.

    Args:
        mean: What values inside the band become, broadcastable to ``x`` without enlarging it.
        threshold: Half-width of the band, likewise.
        eager: Whether `is_eager` holds for every ``x`` that it will be used with. Where `vmap` has
            batched one of the numbers, it is not used.
    """

    def __init__(self, mean: Tensor, threshold: Tensor, *, eager: bool) -> None:
        self.mean = mean
        self.threshold = threshold
        self.eager = eager and not (is_batched(mean) or is_batched(threshold))
        # Whether a gradient has to reach the mean or the threshold.
        self.wants_grad = mean.requires_grad or threshold.requires_grad
        self._in_bits: dict[tuple[torch.dtype, torch.Size | int], _Bits] = {}

    def in_bits(self, x: Tensor) -> _Bits:
        """The band as integers; the same for every ``x`` of one dtype, shape and layout."""
        key = (x.dtype, x.shape[1:] if x.is_contiguous() else x.dim())
        known = self._in_bits.get(key)
        if known is None:
            # Tensors made under inference mode could never be used by a backward pass.
            with torch.inference_mode(False), torch.no_grad():
                known = self._in_bits[key] = _bits(x, self.mean, self.threshold)
        return known


class _Bits(NamedTuple):
    """A band as the arithmetic in integers takes it.

    Attributes:
        mean: In the wider dtype of it and ``x``.
        limit: Bits of the threshold, in the dtype distances are compared in.
        center: Bits of the mean in the dtype of ``x``.
        replaced: Bits of a result that was inside the band. Where even the mean would be kept, and
            the band is empty, those of a signalling NaN, which no arithmetic results in.
        wide: Dtype distances are compared in.
        flat: Whether all of these are as long as a row of ``x``, seen as a matrix.
        whole: Whether they differ along the first axis of ``x``, which cannot be cut then.
    """

    mean: Tensor
    limit: Tensor
    center: Tensor
    replaced: Tensor
    wide: torch.dtype
    flat: bool
    whole: bool

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as the band is: a matrix, if that is flat."""
        return x.flatten(1) if self.flat else x

    def cut(self, x: Tensor) -> int:
        """How many rows of ``x`` make a chunk; 0 if it is not worth cutting."""
        threads = torch.get_num_threads()
        if self.whole or x.numel() <= _LARGE * threads:
            return 0
        return max(1, _CHUNK * threads * len(x) // x.numel())

    def parts(self, x: Tensor, *others: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """The tensors in chunks along their first axis."""
        tensors = tuple(map(self.rows, (x, *others)))
        rows = self.cut(x)
        if not rows:
            return (tensors,)
        return zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def _bits(x: Tensor, mean: Tensor, threshold: Tensor) -> _Bits:
    # As in any arithmetic, numbers without an axis count in the dtype of x.
    wide = torch.result_type(x, mean)
    mean = mean.to(wide)
    center = mean.to(x.dtype)
    limit = threshold.to(wide)
    if threshold.dim():  # rounded up, so that no distance is on the other side of it
        above = torch.nextafter(limit, torch.full_like(limit, torch.inf))
        limit = torch.where(limit < threshold, above, limit)
    empty = ~((center - mean).abs() < limit)
    nothing = bits(torch.full((), torch.inf, dtype=x.dtype)) + 1
    # A threshold that is no number is one that nothing is below.
    limit = bits(limit.nan_to_num(0.0, posinf=torch.inf))
    band = [mean, limit, bits(center), torch.where(empty, nothing, bits(center))]
    whole = any(t.dim() == x.dim() and t.shape[0] != 1 for t in band)
    flat = not whole and x.is_contiguous() and 1 < _run(x, band) < _SHORT
    if flat:
        band = [t.expand((1, *x.shape[1:])).flatten() for t in band]
    mean, limit, center, replaced = band
    return _Bits(mean, limit, center, replaced, wide, flat, whole)


def _run(x: Tensor, statistics: Iterable[Tensor]) -> int:
    """How many values share a channel, one after the other."""
    run = 1
    for axis in range(1, x.dim()):
        if any(s.dim() >= axis and s.shape[-axis] != 1 for s in statistics):
            break
        run *= x.shape[-axis]
    return run


def replace(x: Tensor, band: Band, *, overwritten: bool = False) -> Tensor:
    """``where(|x − mean| < threshold, mean, x)`` in the dtype and memory layout of ``x``.

    The exact derivative flows back through it: 1 where a value was kept, 0 inside the band.
    ``overwritten`` says that what comes next may overwrite the result.
    """
    if band.wants_grad:
        return _as_laid_out(_formula(x, band.mean, band.threshold), x)
    if band.eager and x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Replace.apply(x, band, overwritten)
        return result
    return forward(x, band)


def replace_(x: Tensor, band: Band, *, clamped: bool = False) -> Tensor:
    """The same, written into ``x``.

    ``clamped`` says what comes next: an activation that overwrites the result and lets a gradient
    pass only where it changed nothing, as ReLU does. What it leaves there then serves the backward
    pass as well as the result itself.
    """
    if not band.eager or band.wants_grad or x._is_view():
        return x.copy_(replace(x, band))
    if x.requires_grad and torch.is_grad_enabled():
        result: Tensor = _ReplaceInPlace.apply(x, band, clamped)
        return result
    return _in_integers_(x, band) if _is_cpu(x) else x.copy_(forward(x, band))


def forward(x: Tensor, band: Band) -> Tensor:
    """The values of `replace`, by the fastest way there is for ``x``."""
    if not band.eager:
        return _as_laid_out(_formula(x, band.mean, band.threshold), x)
    if _is_cpu(x):
        return _in_integers(x, band)
    return _as_laid_out(_fused(_formula)(x, band.mean, band.threshold), x)


def _formula(x: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    return torch.where((x - mean).abs() < threshold, mean.to(x.dtype), x)


def _slope(grad: Tensor, y: Tensor, mean: Tensor, threshold: Tensor) -> Tensor:
    return torch.where((y - mean).abs() < threshold, 0, grad)


def _in_integers(x: Tensor, band: Band) -> Tensor:
    known = band.in_bits(x)
    rows = known.cut(x)
    if not rows:
        y = _steps(known.rows(x), known).view(x.dtype)
        # As a view it could not be overwritten by what comes next.
        y = y.view(x.shape).detach() if known.flat else y
        return y if y.stride() == x.stride() else _as_laid_out(y, x)
    y = _empty_like(x)
    spare = bits(known.rows(_empty_like(x[:rows])))
    for part, target in known.parts(x, y):
        _steps(part, known, target, spare[: len(part)], bits(target))
    return y


def _in_integers_(x: Tensor, band: Band) -> Tensor:
    known = band.in_bits(x)
    for (part,) in known.parts(x):
        memory = bits(part)
        _steps(part, known, None, memory, memory)
    return x


def _steps(
    x: Tensor,
    known: _Bits,
    distance: Tensor | None = None,
    offset: Tensor | None = None,
    result: Tensor | None = None,
) -> Tensor:
    """The bits of the result. The memory of what is given is used, and may be that of ``x``.

    Distances have no sign, so their bits are ordered as they are, with NaN above everything.
    """
    if known.wide == x.dtype:
        distance = torch.sub(x, known.mean, out=distance).abs_()
        kept = distance.view(known.limit.dtype).ge_(known.limit)
    else:
        distance = x.to(known.wide).sub_(known.mean).abs_()
        kept = distance.view(known.limit.dtype).ge_(known.limit).to(known.center.dtype)
    offset = torch.sub(x.view(kept.dtype), known.center, out=offset)
    return torch.addcmul(known.center, kept, offset, out=kept if result is None else result)


class _Replace(torch.autograd.Function):
    """`replace`, which saves its result, or one byte a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Band, overwritten: bool) -> Tensor:
        y = forward(x, band)
        ctx.save_for_backward(_kept(y, band) if overwritten else y)
        ctx.band = band
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        try:
            (saved,) = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "an operator's result, where the backward pass finds the band, was overwritten. "
                "Let what comes after the operator work out of place (inplace=False, x = x + y "
                f"instead of x += y), or call the operator with overwritten=True. ({error})"
            ) from error
        if saved.dtype == torch.bool:
            return _where(saved, grad), None, None
        return _backward(grad, saved.detach(), ctx.band), None, None


class _ReplaceInPlace(torch.autograd.Function):
    """`replace_`, which saves what the activation leaves of its result, or one byte a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, band: Band, clamped: bool) -> Tensor:
        ctx.mark_dirty(x)
        ctx.band = band
        # Not through save_for_backward, which rightly refuses what is overwritten.
        ctx.left = x.detach() if clamped else None
        if _is_cpu(x):
            _in_integers_(x, band)
        else:
            x.copy_(forward(x, band))
        if not clamped:
            ctx.save_for_backward(_kept(x.detach(), band))
        # This call counts as one more change of x, and the activation's is the last one.
        ctx.version = x._version + 2
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.left is None:
            return _where(ctx.saved_tensors[0], grad), None, None
        if ctx.left._version > ctx.version:
            raise RuntimeError(
                "the result of an activation that works in place was overwritten before the "
                "backward pass. Let the activation work out of place (inplace=False)."
            )
        return _backward(grad, ctx.left, ctx.band), None, None


def _backward(grad: Tensor, y: Tensor, band: Band) -> Tensor:
    """The gradient where ``y`` was kept, 0 elsewhere; differentiable in ``grad``."""
    if not _is_final(grad) or not is_eager(y):
        return _slope(grad, y, band.mean, band.threshold)
    if not _is_cpu(y):
        return _fused(_slope)(grad, y, band.mean, band.threshold)
    known, result = band.in_bits(y), y.new_empty_strided(y.shape, y.stride())
    for part, flow, target in known.parts(y, grad, result):
        torch.ne(bits(part), known.replaced, out=bits(target)).mul_(bits(flow))
    return result


def _kept(y: Tensor, band: Band) -> Tensor:
    """Which values of a result were kept, one byte each."""
    if not _is_cpu(y):
        return ~((y - band.mean).abs() < band.threshold)
    known = band.in_bits(y)
    return torch.ne(bits(known.rows(y)), known.replaced).view(y.shape)


def _where(kept: Tensor, grad: Tensor) -> Tensor:
    """The gradient where values were kept, 0 elsewhere; differentiable in ``grad``."""
    if not _is_final(grad) or not _is_cpu(grad):
        return torch.where(kept, grad, 0)
    return torch.mul(bits(grad), kept.view(torch.int8)).view(grad.dtype)


def _is_final(grad: Tensor) -> bool:
    """Whether nothing wants to see by which formula a gradient goes on."""
    return is_eager(grad) and not (torch.is_grad_enabled() and grad.requires_grad)


def _is_cpu(x: Tensor) -> bool:
    return x.is_cpu


def bits(x: Tensor) -> Tensor:
    """The memory of ``x`` as integers: −0 is not 0 there, and NaN is itself."""
    return x.view(_INTEGERS[x.element_size()])


def is_eager(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor that is computed with here and now.

    Not a tensor that is traced, compiled, exported, batched by `vmap` or carries a tangent: what
    does all that wants to see the formula.
    """
    return (
        x.dim() > 0
        and type(x) in (Tensor, torch.nn.Parameter)
        and (x.is_cpu or x.is_cuda)
        and x.layout == torch.strided
        and x.element_size() in _INTEGERS
        and not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not is_batched(x)
        and forward_ad._current_level < 0
    )


def is_batched(x: Tensor) -> bool:
    """Whether `vmap` or another transform has wrapped ``x``, or the older vmap inside autograd."""
    wrappers = torch._C._functorch
    return wrappers.is_functorch_wrapped_tensor(x) or wrappers.is_legacy_batchedtensor(x)


def _empty_like(x: Tensor) -> Tensor:
    """New memory, laid out as ``x`` is.

    What comes next rounds differently in another layout, and α = 0 must change nothing.
    """
    if _overlaps(x):
        return torch.empty_like(x)
    return x.new_empty_strided(x.shape, x.stride())


def _as_laid_out(y: Tensor, x: Tensor) -> Tensor:
    """``y`` in the memory layout of ``x``, as far as strides matter and can be had anew."""
    steps = [(a, b) for n, a, b in zip(x.shape, x.stride(), y.stride(), strict=True) if n != 1]
    if all(a == b for a, b in steps) or _overlaps(x):
        return y
    return x.new_empty_strided(x.shape, x.stride()).copy_(y)


def _overlaps(x: Tensor) -> bool:
    """Whether values may share memory, as those of an expanded tensor or of windows do."""
    reach = 0
    for step, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += step * (size - 1)
    return False


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
