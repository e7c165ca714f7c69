"""The MeanSparse operator: one formula, three backward rules, one module that holds its numbers.

For every channel with mean μ and standard deviation σ, values closer to the centre than α·σ are
replaced by it [1]::

    y = where(|x − μ| < α·σ, μ, x)

The forward pass is always this, bit for bit. What differs is the gradient that flows back through
it, and only an attacker cares: inside the band the true derivative is zero, so the operator hides
the loss surface behind it from a gradient attack.

[1] Amini et al., MeanSparse: Post-Training Robustness Enhancement Through Mean-Centered Feature
    Sparsification, arXiv 2406.05927, Sec. II-C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_meansparse import kernels

Backward = Literal["exact", "identity", "smooth"]
Center = Literal["channel", "global", "zero"]


def mean_sparse(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    alpha: float | Tensor,
    *,
    backward: Backward = "exact",
    temperature: float = 1 / 16,
) -> Tensor:
    """Replace values within ``alpha`` standard deviations of the mean by the mean.

    The comparison is strict, so ``alpha = 0`` and channels with zero variance return ``x`` bit for
    bit. NaN and ±inf are never closer than a finite band and pass through. Comparison is done in
    the wider of the two dtypes, as in the authors' code (``CIFAR10_L2/utils_sparse.py``, class
    ``MeanSparse``); the result keeps the dtype of ``x``.

    Backward rules, with ``d = x − mean`` and the half-width of the band ``c = alpha · sqrt(var)``:

    * ``"exact"``: the derivative of the forward, 0 inside the band and 1 outside.
    * ``"identity"``: 1 everywhere (BPDA, Athalye et al., arXiv 1802.00420).
    * ``"smooth"``: the derivative of ``mean + d · sigmoid((|d| − c) / T)`` with ``T = temperature ·
      c``: it tells an attacker which values are about to leave or to enter the band.

    Args:
        x: Floating-point tensor of any shape.
        mean: Centre of the band, broadcastable to ``x`` without enlarging it, e.g. ``(C, 1, 1)``
            for NCHW.
        var: Variance, the square of σ; the same shape as ``mean`` or broadcastable to ``x``.
        alpha: Half-width of the band in standard deviations, at least 0; a float or a tensor
            broadcastable to ``x``.
        backward: Which gradient flows back through the operator.
        temperature: Softness of the ``"smooth"`` gate as a fraction of the half-width of the band,
            above 0.

    Returns:
        A tensor with the shape and dtype of ``x``.

    Raises:
        TypeError: If ``x`` is not floating point.
        ValueError: If a shape would enlarge ``x``, or ``alpha``, ``backward`` or ``temperature`` is
            out of range.

    Examples:
        >>> import torch
        >>> from lightning_meansparse import mean_sparse
        >>> x = torch.tensor([[-2.0, -0.1, 0.1, 2.0]])
        >>> mean_sparse(x, torch.zeros(4), torch.ones(4), 0.5)
        tensor([[-2.,  0.,  0.,  2.]])
    """
    if not isinstance(alpha, Tensor):
        check_alpha(alpha)
    check_backward(backward, temperature)
    _check_fit(x, mean=mean, var=var, alpha=alpha)
    band = kernels.Band(mean, alpha * var.sqrt(), eager=kernels.is_eager(x))
    return _replaced(x, band, backward, temperature)


def _replaced(x: Tensor, band: kernels.Band, backward: Backward, temperature: float) -> Tensor:
    if backward == "exact":
        return kernels.replace(x, band)
    result: Tensor = _Surrogate.apply(
        x, band.mean, band.threshold, None if backward == "identity" else temperature, band
    )
    return result


class MeanSparse(nn.Module):
    """The operator with its numbers: per-channel statistics and α.

    The tensors are **non-persistent buffers**: they follow the model to a device, and stay out of
    its ``state_dict``, so any checkpoint of the base model loads with operators in place. They are
    float32 at least, also after ``model.half()``: a variance overflows half precision at 65,504.
    ``alpha`` is a 0-d tensor, so changing it neither synchronises with the host nor recompiles a
    compiled model.

    Args:
        mean: Per-channel mean, broadcastable to the input, e.g. ``(C, 1, 1)`` for NCHW or ``(C,)``
            for channels last.
        var: Per-channel variance, of the same shape, finite and not negative. All zeros is the
            identity (not calibrated yet).
        alpha: Half-width of the band in standard deviations.
        center: What values inside the band become, and what the distance is measured from:
            ``"channel"`` the channel's mean (the method), ``"global"`` one mean over all channels,
            ``"zero"`` zero (the two ablations of the paper). σ stays per channel.

    Attributes:
        count: How many values of each channel ``mean`` and ``var`` were measured on, or batches
            under ``"official"`` statistics; 0 if that is not known. Nothing is computed with it.

    Raises:
        ValueError: If ``mean`` and ``var`` differ in shape, ``alpha`` is negative or not finite, or
            ``center`` is unknown.

    Examples:
        >>> operator = MeanSparse(torch.zeros(3, 1, 1), torch.ones(3, 1, 1), 0.2)
        >>> operator(torch.full((2, 3, 4, 4), 0.1)).abs().max()
        tensor(0.)
    """

    mean: Tensor
    var: Tensor
    alpha: Tensor
    count: int = 0
    backward: Backward
    temperature: float
    _held: _Held | None = None

    def __init__(
        self, mean: Tensor, var: Tensor, alpha: float = 0.0, *, center: Center = "channel"
    ) -> None:
        super().__init__()
        if mean.shape != var.shape:
            raise ValueError(
                f"mean and var must have one shape, got {tuple(mean.shape)} and {tuple(var.shape)}."
            )
        if not var.is_meta and bool((var < 0).any()):
            raise ValueError("var must not be negative: it is the square of a standard deviation.")
        check_alpha(alpha)
        check_center(center)
        for name, value in (
            ("mean", mean),
            ("var", var),
            ("alpha", torch.tensor(float(alpha), device=mean.device)),
        ):
            wide = value.detach().to(torch.promote_types(value.dtype, torch.float32), copy=True)
            self.register_buffer(name, wide, persistent=False)
        self.center: Center = center
        self.backward = "exact"
        self.temperature = 1 / 16

    @property
    def reference(self) -> Tensor:
        """What values inside the band become, in the shape of ``mean``; see ``center``."""
        return _reference(self.mean, self.center)

    def forward(
        self,
        x: Tensor,
        *,
        inplace: bool = False,
        clamped: bool = False,
        overwritten: bool = False,
    ) -> Tensor:
        """Apply the operator to ``x`` of any shape that ``mean`` broadcasts to.

        ``inplace`` writes the result into ``x`` and returns that: for activations that overwrite
        their input, which the network may use again under another name. ``clamped`` says that the
        activation is a ReLU or a ReLU6; the backward pass can then do with what that leaves.
        ``overwritten`` is for results out of place that whoever comes next may overwrite, as
        ``x += y`` does: the backward pass then keeps one byte per value.
        """
        band = self._band(x)
        if self.backward == "exact":
            if inplace:
                return kernels.replace_(x, band, clamped=clamped)
            return kernels.replace(x, band, overwritten=overwritten)
        # The backward pass of a surrogate looks at its input again, which is about to change.
        y = _replaced(x.clone() if inplace else x, band, self.backward, self.temperature)
        return x.copy_(y) if inplace else y

    def _band(self, x: Tensor) -> kernels.Band:
        """What to replace by what, as the kernels take it.

        On a CPU it is kept for the next call. Whether it still holds is seen from the numbers
        themselves: whoever writes into a buffer does so in many ways.
        """
        eager = kernels.is_eager(x)
        held = self._held if eager else None  # compiled code must not depend on it
        if held is not None and held.is_of(self):
            if x.shape != held.shape:
                _check_fit(x, mean=self.mean, var=self.var, alpha=self.alpha)
                held.shape = x.shape
            return held.band
        numbers = (self.mean, self.var, self.alpha)
        _check_fit(x, mean=self.mean, var=self.var, alpha=self.alpha)
        if not eager or any(
            not number.is_cpu or number.requires_grad or kernels.is_batched(number)
            for number in numbers
        ):
            return kernels.Band(self.reference, self.alpha * self.var.sqrt(), eager=eager)
        held = self._held = _Held(self, x.shape)
        return held.band

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files do without what can be computed anew."""
        return {**self.__dict__, "_held": None}

    def extra_repr(self) -> str:
        """Shape, α and centre, for ``print(model)``."""
        alpha = "" if self.alpha.is_meta else f", alpha={self.alpha.item():g}"
        return f"{tuple(self.mean.shape)}{alpha}, center={self.center!r}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MeanSparse:
        """Follow the model to another device or dtype, but never below float32."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and not old.is_meta:
                self._buffers[name] = old.to(
                    new.device, torch.promote_types(new.dtype, torch.float32)
                )
        return self


def _reference(mean: Tensor, center: Center) -> Tensor:
    if center == "global":
        return mean.mean().expand_as(mean)
    return torch.zeros_like(mean) if center == "zero" else mean


def check_alpha(alpha: object) -> None:
    """Raise a ``ValueError`` unless ``alpha`` is a finite number, at least 0."""
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, (int, float))
        or not math.isfinite(alpha)
        or alpha < 0
    ):
        raise ValueError(
            f"alpha must be a finite number >= 0 (in standard deviations), got {alpha!r}. "
            "0 switches the operator off."
        )


def check_center(center: str) -> None:
    """Raise a ``ValueError`` unless ``center`` is one of the three references."""
    if center not in get_args(Center):
        raise ValueError(f"center must be one of {get_args(Center)}, got {center!r}.")


def check_backward(rule: str, temperature: float) -> None:
    """Raise a ``ValueError`` unless ``rule`` is known and ``temperature`` positive."""
    if rule not in get_args(Backward):
        raise ValueError(f"the backward rule must be one of {get_args(Backward)}, got {rule!r}.")
    if not temperature > 0:
        raise ValueError(
            f"temperature must be > 0 (a fraction of the band's half-width), got {temperature!r}."
        )


class _Held:
    """A band, the numbers it was made of, and the last shape that it was found to fit."""

    def __init__(self, operator: MeanSparse, shape: torch.Size) -> None:
        self.center = operator.center
        # Tensors made under inference mode could never be used by a backward pass.
        with torch.inference_mode(False), torch.no_grad():
            # The band is made of what it is compared with: another thread may be writing.
            copies = {name: getattr(operator, name).clone() for name in ("mean", "var", "alpha")}
            mean = _reference(copies["mean"], self.center)
            threshold = copies["alpha"] * copies["var"].sqrt()
            self.band = kernels.Band(mean, threshold, eager=True)
            self.numbers = [(name, kernels.bits(copy)) for name, copy in copies.items()]
        self.shape = shape

    def is_of(self, operator: MeanSparse) -> bool:
        """Whether a band made of the operator's numbers now would be the same."""
        now: Any = operator._buffers  # as attributes they are looked for in three places
        try:
            return self.center == operator.center and all(
                torch.equal(number, now[name].view(number.dtype)) and not now[name].requires_grad
                for name, number in self.numbers
            )
        except (RuntimeError, KeyError):  # of another width, on another device, or no buffer now
            return False


def _check_fit(x: Tensor, **numbers: float | Tensor) -> None:
    """Raise unless ``x`` is floating point and all numbers broadcast to it."""
    if not x.is_floating_point():
        raise TypeError(
            f"x must be a floating-point tensor, got {x.dtype}. Convert it first, e.g. x.float()."
        )
    for name, value in numbers.items():
        if isinstance(value, Tensor) and not _fits(value.shape, x.shape):
            raise ValueError(
                f"{name} must broadcast to x without enlarging it: {name} has shape "
                f"{tuple(value.shape)}, x {tuple(x.shape)}. "
                "For channels on axis 1 of an NCHW tensor use shape (C, 1, 1)."
            )


def _fits(inner: torch.Size, outer: torch.Size) -> bool:
    return len(inner) <= len(outer) and all(
        i in (1, o) for i, o in zip(reversed(inner), reversed(outer), strict=False)
    )


class _Surrogate(torch.autograd.Function):
    """The exact forward; the gradient of the identity (``temperature is None``) or the gate."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, mean: Tensor, threshold: Tensor, temperature: float | None, band: kernels.Band
    ) -> Tensor:
        # What vmap makes of the tensors is not in the band.
        same = mean is band.mean and threshold is band.threshold
        return kernels.forward(x, band if same else kernels.Band(mean, threshold, eager=False))

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float | None, kernels.Band], output: Tensor
    ) -> None:
        x, mean, threshold, ctx.temperature, _ = inputs
        if ctx.temperature is not None:
            ctx.save_for_backward(x, mean, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.temperature is None:
            return grad, None, None, None, None
        x, mean, threshold = ctx.saved_tensors
        distance = (x - mean).abs()
        # Where the band is empty the gate is open; any positive scale keeps the arithmetic finite
        # there.
        scale = torch.where(threshold > 0, ctx.temperature * threshold, 1)
        gate = torch.sigmoid((distance - threshold) / scale)
        # Far outside, the ratio overflows where 1 − gate is 0: clamped, the product is 0.
        ratio = (distance / scale).clamp(max=torch.finfo(distance.dtype).max)
        slope = torch.where(threshold > 0, gate + ratio * gate * (1 - gate), 1)
        return (grad * slope).to(grad.dtype), None, None, None, None
