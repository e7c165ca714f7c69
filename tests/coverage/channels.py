"""Which axes of a tensor are channels, by perturbing the channels where they were made.

The model runs again and again, operation for operation as on the tape. At each operation that
makes channels (a convolution: axis 1; a matrix product with a constant: its last axis) the output
is what it was in the first run, plus large positive noise in some channels. So what was perturbed
before such an operation cannot be seen behind it, and one run serves all stretches between two of
them. Each channel is perturbed in a half of all runs that is its own, so a value that changed in
just these runs depends on that channel and no other. The axes along which the histories of changes
differ are the channels'.

Whatever would mix all channels only because it measures them is held at what it was: statistics of
norms, other reductions, softmax. Where nothing arrives that way (an activation after a mean), a
later round lets reductions go on, and where a product of two tensors mixes all, two rounds hold one
of them each.

Sizes are never compared, no rule says how an operation moves an axis, and nothing is known of
layouts: values are followed by changing them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from .tape import UNCOUNTED, Step, Tape, name_of, words

_CONVOLUTIONS = words(
    """
    convolution _convolution convolution_overrideable conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d mkldnn_convolution _conv_depthwise2d conv_depthwise3d
    torchvision::deform_conv2d
    """
)
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2), "linear": (0, 1)}
_LAST = words("embedding _native_multi_head_attention mkldnn_rnn_layer")
_NORMS = words("native_layer_norm native_group_norm _fused_rms_norm")
_BATCH_NORMS = words("native_batch_norm _native_batch_norm_legit")
_SOFTMAX = words("_softmax _safe_softmax _log_softmax")
_ATTENTION = words(
    """
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_attention_math
    """
)
_REDUCTIONS = words(
    """
    mean sum amax amin max min var std norm linalg_vector_norm logsumexp prod var_mean std_mean
    median
    """
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Watched:
    """A tensor to tell the channels of: argument `argument` of operation number `step`."""

    step: int
    argument: int


def axis_made(step: Step) -> int | None:
    """The axis along which an operation makes new channels, None if it makes none."""
    if step.name in _CONVOLUTIONS:
        return 1
    if step.name in _PRODUCTS:
        left, right = (place in step.moving for place in _PRODUCTS[step.name])
        return None if left == right else -1 if left else -2
    return -1 if step.name in _LAST else None


def told(
    tape: Tape,
    forward: Callable[[Sequence[Tensor]], object],
    inputs: Sequence[Tensor],
    watched: Sequence[Watched],
) -> dict[Watched, Shape | str]:
    """Shape of one statistic of each watched tensor, as in `Site.shape`, or why it cannot be told.

    Args:
        tape: The first run, of the same model on the same inputs.
        forward: Runs the model on tensors like `inputs`.
        inputs: The model's input tensors, of at least two samples.
        watched: What to tell the channels of.
    """
    first = _First(tape, watched)
    first.run(forward, [t.clone() for t in inputs])
    if first.diverged:
        return dict.fromkeys(watched, "the model did not do the same again")
    search = _Search(first, forward, inputs)
    found: dict[Watched, Shape | str] = {}
    try:
        search.settle(found, watched, [_Round()])
        if first.products:
            search.settle(found, watched, [_Round(hold=0), _Round(hold=1)])
        if first.reduced:
            search.settle(found, watched, [_Round(reduce=True)])
        if _SAMPLES in found.values():
            search.fold()
            search.settle(found, watched, [_Round()])
    except _DivergedError:
        return dict.fromkeys(watched, "the model's path depends on the values")
    return found


_SAMPLES = "channels differ from sample to sample"


class _DivergedError(Exception):
    """A run did other operations than the first one."""


@dataclass(frozen=True)
class _Round:
    """How a round of runs treats what mixes channels.

    Attributes:
        reduce: Reductions go on from what they are given; else they give what they gave first.
        hold: Which operand of a product of two input-dependent tensors is held, 0 or 1.
        shift: The first channel has another number at each layer. Else all layers count alike, so
            that a sum of many layers still tells its channels apart.
    """

    reduce: bool = False
    hold: int | None = None
    shift: bool = False


@dataclass
class _Search:
    """Rounds of runs, each of which perturbs every channel in half of its runs."""

    first: _First
    forward: Callable[[Sequence[Tensor]], object]
    inputs: Sequence[Tensor]
    folded: dict[int, int] = field(default_factory=dict)

    def settle(
        self,
        found: dict[Watched, Shape | str],
        watched: Sequence[Watched],
        rounds: Sequence[_Round],
    ) -> None:
        """Look at what is not told yet; channels may show along other axes in each round."""
        open_ = [w for w in watched if not isinstance(found.get(w), tuple)]
        answers: dict[Watched, list[_Axes | str]] = {w: [] for w in open_}
        for how in rounds if open_ else ():
            answer = self._round(open_, how)
            # Heads from two layers repeat, too, but not if these count otherwise.
            doubtful = [w for w in open_ if isinstance(a := answer[w], _Axes) and a.repeating]
            if doubtful:
                shifted = self._round(doubtful, replace(how, shift=True))
                for w in doubtful:
                    answer[w] = _without_repeats(answer[w], shifted[w])
            for w in open_:
                answers[w].append(answer[w])
        for w in open_:
            sets = [answer.axes for answer in answers[w] if isinstance(answer, _Axes)]
            united = frozenset().union(*sets)
            if not sets:
                found.setdefault(w, str(answers[w][0]))
            elif -self.first.before[w].ndim in united and self.first.before[w].ndim > 1:
                found[w] = _SAMPLES
            else:
                found[w] = _shape(united, self.first.before[w].shape)

    def fold(self) -> None:
        """Learn which layers make the channels of all samples in one, by a run on one sample."""
        one = [t[:1].clone() for t in self.inputs]
        tape = Tape(torch.nn.Identity())
        tape.run(lambda: self.forward(one), one)
        if tape.names != self.first.tape.names:
            return
        alone = _First(tape, ())
        alone.run(self.forward, [t[:1].clone() for t in self.inputs])
        for step, channels in self.first.channels.items():
            if alone.channels.get(step) == channels / len(self.inputs[0]):
                self.folded[step] = alone.channels[step]

    def _round(self, watched: Sequence[Watched], how: _Round) -> dict[Watched, _Axes | str]:
        images = [t.shape[1] for t in self.inputs if t.ndim == 4]
        most = max([*self.first.channels.values(), *images, 1])
        runs = next(k for k in itertools.count(4, 2) if math.comb(k, k // 2) >= most)
        book = _codes(runs, most)
        before = self.first.before
        history = {w: torch.zeros(before[w].shape, dtype=torch.int32) for w in watched}
        for bit in range(runs):
            again = _Again(self.first, history, book, bit, how, self.folded)
            inputs = [again.image(t) if t.ndim == 4 else t.clone() for t in self.inputs]
            again.run(self.forward, inputs)
            if again.diverged:
                raise _DivergedError
        return {w: _axes(history[w], runs // 2) for w in watched}


def _codes(runs: int, channels: int) -> Tensor:
    """For every channel a number with half of its bits set, in random order."""
    every = itertools.combinations(range(runs), runs // 2)
    codes = torch.tensor([sum(1 << bit for bit in bits) for bits in every])
    order = torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))
    return codes[order][:channels]


_LOST = 0.01
"""Up to this share of differences is put down to changes that got lost; found are 0, 1e-4 or 1."""


class _Axes(NamedTuple):
    """Axes along which histories differ, and those of them along which they come again."""

    axes: frozenset[int]
    repeating: frozenset[int] = frozenset()


def _without_repeats(answer: _Axes | str, shifted: _Axes | str) -> _Axes | str:
    """Leave out axes that repeat in both rounds: there, channels lie between pixels."""
    if isinstance(answer, str) or isinstance(shifted, str):
        return answer
    return _Axes((answer.axes - (answer.repeating & shifted.repeating)) or answer.axes)


def _axes(history: Tensor, half: int) -> _Axes | str:
    """Axes along which the histories differ; those with too few changes say nothing."""
    bits = [(history >> bit) & 1 for bit in range(2 * half)]
    weight = torch.stack(bits).sum(0) if history.numel() < 1 << 20 else sum(bits)
    known = weight >= half
    if not known.any():
        return "no perturbation arrives"
    axes = set()
    for axis in range(history.ndim):
        pairs = history.shape[axis] - 1
        a, b = (history.narrow(axis, start, pairs) for start in (0, 1))
        both = known.narrow(axis, 0, pairs) & known.narrow(axis, 1, pairs)
        # Where one has all changes of the other, those of a further layer may have got lost there.
        apart = ((a & ~b) != 0) & ((b & ~a) != 0) & both
        if apart.any(axis).sum() > _LOST * both.any(axis).sum():
            axes.add(axis - history.ndim)
    if not axes and bool((weight[known] > half).any()):
        return "all channels are mixed"
    repeating = {axis for axis in axes if len(axes) > 1 and _repeats(history, axis)}
    return _Axes(frozenset(axes), frozenset(repeating))


def _repeats(history: Tensor, axis: int) -> bool:
    """Whether the same comes again and again along an axis."""
    size = history.shape[axis]
    return any(
        torch.equal(
            history.narrow(axis, 0, size - period), history.narrow(axis, period, size - period)
        )
        for period in range(2, size // 2 + 1)
        if size % period == 0
    )


def _shape(axes: frozenset[int], shape: Sequence[int]) -> Shape:
    """As in `Site.shape`: from the first channel axis on, 1 where an axis is none."""
    if not axes:
        return (1,)
    return tuple(shape[axis] if axis in axes else 1 for axis in range(min(axes), 0))


class _Rerun(TorchDispatchMode):
    """Goes through the operations of a tape once more."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.diverged = False
        self._step = -1

    def run(self, forward: Callable[[Sequence[Tensor]], object], inputs: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad(), self:
            forward(inputs)
        self.diverged |= self._step + 1 != len(self.tape.names)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if name_of(func) in UNCOUNTED:
            return func(*args, **kwargs)
        self._step += 1
        names, step = self.tape.names, self._step
        if self.diverged or step >= len(names) or names[step] != name_of(func):
            self.diverged = True
            return func(*args, **kwargs)
        self.look(step, args)
        known = self.tape.steps.get(step)
        if known is None:
            return func(*args, **kwargs)
        return self.do(step, known, func, args, kwargs)

    def look(self, step: int, args: tuple[Any, ...]) -> None:
        raise NotImplementedError

    def do(self, step: int, known: Step, func: Any, args: Any, kwargs: Any) -> Any:
        raise NotImplementedError


class _First(_Rerun):
    """Remembers what the later runs hold on to."""

    def __init__(self, tape: Tape, watched: Sequence[Watched]) -> None:
        super().__init__(tape)
        self.before: dict[Watched, Tensor] = {}
        self.watched: dict[int, list[Watched]] = {}
        for w in watched:
            self.watched.setdefault(w.step, []).append(w)
        self.kept: dict[int, Any] = {}
        self.channels: dict[int, int] = {}
        self.reduced = self.products = False

    def look(self, step: int, args: tuple[Any, ...]) -> None:
        for w in self.watched.get(step, ()):
            self.before[w] = args[w.argument].clone()

    def do(self, step: int, known: Step, func: Any, args: Any, kwargs: Any) -> Any:
        axis = axis_made(known)
        before = copied(args) if is_norm(known, args) or is_product(known) else ()
        out = func(*args, **kwargs)
        if axis is not None or known.name in _SOFTMAX | _REDUCTIONS:
            self.kept[step] = copied(out)
            if axis is not None:
                self.channels[step] = (out if isinstance(out, Tensor) else out[0]).shape[axis]
            self.reduced |= known.name in _REDUCTIONS
        elif is_norm(known, args):
            self.kept[step] = before[0], copied(out)
        elif is_product(known):
            self.kept[step] = before
            self.products |= known.name not in _ATTENTION
        return out


class _Again(_Rerun):
    """One run with half of all channels perturbed."""

    def __init__(
        self,
        first: _First,
        history: dict[Watched, Tensor],
        book: Tensor,
        bit: int,
        how: _Round,
        folded: dict[int, int],
    ) -> None:
        super().__init__(first.tape)
        self.first = first
        self.history = history
        self.chosen = (book >> bit) & 1
        self.bit = bit
        self.how = how
        self.folded = folded

    def image(self, tensor: Tensor) -> Tensor:
        return self._perturbed(tensor, 1, -1) if tensor.is_floating_point() else tensor.clone()

    def look(self, step: int, args: tuple[Any, ...]) -> None:
        for w in self.first.watched.get(step, ()):
            if w in self.history:
                now, before = args[w.argument], self.first.before[w]
                changed = (now != before) & ~(now.isnan() & before.isnan())
                self.history[w] |= changed.int() << self.bit

    def do(self, step: int, known: Step, func: Any, args: Any, kwargs: Any) -> Any:
        kept = self.first.kept.get(step)
        axis = axis_made(known)
        if axis is not None:
            if isinstance(kept, Tensor):
                return self._perturbed(kept, axis, step)
            return type(kept)([self._perturbed(kept[0], axis, step), *copied(kept[1:])])
        if known.name in _SOFTMAX or (known.name in _REDUCTIONS and not self.how.reduce):
            return copied(kept)
        if known.name in _ATTENTION:
            return func(*kept[:2], *args[2:], **kwargs)
        if is_product(known) and self.how.hold is not None:
            held = _PRODUCTS[known.name][self.how.hold]
            return func(*args[:held], kept[held], *args[held + 1 :], **kwargs)
        if is_norm(known, args):
            given, out = kept
            alone = isinstance(out, Tensor)
            rest = [out.clone()] if alone else list(copied(out))
            rest[0] += args[0] - given  # elementwise, once the statistics are held
            return rest[0] if alone else tuple(rest)
        return func(*args, **kwargs)

    def _perturbed(self, kept: Tensor, axis: int, step: int) -> Tensor:
        # So large that it gets through a ReLU behind a sum with something negative.
        noise = _noise(kept) * (30 * kept.abs().amax() + 30 if kept.numel() else 1)
        size = kept.shape[axis]
        index = torch.arange(size) % self.folded.get(step, size)
        index = (index + 7919 * step * self.how.shift) % len(self.chosen)
        shape = [1] * kept.ndim
        shape[axis] = size
        return kept + noise * self.chosen[index].view(shape).to(kept.dtype)


_POOL = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) + 1


def _noise(like: Tensor) -> Tensor:
    """Numbers from 1 to 2, the same ones for every tensor of one size."""
    pool = _POOL if like.numel() <= len(_POOL) else _POOL.repeat(like.numel() // len(_POOL) + 1)
    return pool[: like.numel()].view(like.shape).to(like.dtype)


def is_norm(step: Step, args: Any) -> bool:
    """Whether an operation measures statistics of its input and applies them to it."""
    if step.name in _BATCH_NORMS:
        return next((a for a in args[3:] if isinstance(a, bool)), False)
    return step.name in _NORMS


def is_product(step: Step) -> bool:
    """Whether an operation is a matrix product of two input-dependent tensors, or made of such."""
    return step.name in _ATTENTION or (
        step.name in _PRODUCTS and step.moving.issuperset(_PRODUCTS[step.name])
    )


def copied(kept: Any) -> Any:
    """The same with copies of its tensors, which an operation in place may write to."""
    return tree_map_only(Tensor, torch.clone, kept)
