"""How each aten operation passes channel axes on: a few rules, and a table of whose is which."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_meansparse.sites.activations import names
from lightning_meansparse.sites.provenance import (
    DISAGREEMENT,
    Op,
    Trace,
    axes,
    compact,
    fit,
    numbering,
)

Rule = Callable[[Op], "list[Trace]"]


def _keep(op: Op) -> list[Trace]:
    """The result has the axes of the first input: norms, pooling, padding, softmax, casts."""
    tracked = op.tracked
    source = op.trace(op.args[0]) if op.args else None
    trace = source or op.traces[id(tracked[0])]
    result = []
    for out in op.outs:
        carried = fit(trace.carried, out.shape, op.name)
        result.append(
            Trace(
                fit(trace.channels, out.shape, op.name),
                carried if isinstance(carried, Tensor) else None,
            )
        )
    return result


def _pointwise(op: Op) -> list[Trace]:
    """The result has the axes of its widest operand; operands that disagree need a witness."""
    shape = op.outs[0].shape
    found = [(op.traces[id(t)], op.shapes[id(t)] == shape) for t in op.tracked]
    if op.name == "copy":
        found = [(op.traces[id(t)], True) for t in op.tracked if t is op.args[1]] or found
    chosen = _agree(found, op.name)
    widened = [None if c is None or isinstance(c, str) else _widen(c, len(shape)) for c in chosen]
    channels = chosen.channels if isinstance(chosen.channels, str) else widened[0]
    return [Trace(channels, widened[1])] * len(op.outs)


def _widen(numbers: Tensor, ndim: int) -> Tensor:
    return numbers.reshape((1,) * (ndim - numbers.ndim) + tuple(numbers.shape))


def _agree(found: Sequence[tuple[Trace, bool]], name: str) -> Trace:
    known = [(t, full) for t, full in found if isinstance(t.channels, Tensor)]
    vague = [t for t, full in found if isinstance(t.channels, str) and (full or not known)]
    if vague:
        return Trace(vague[0].channels)
    if not known:
        return Trace()
    # Broadcast operands (a gate, a bias per head) have the say only where no full one is at hand.
    known.sort(key=lambda item: not item[1])
    sets = [(axes(t.channels), t) for t, _ in known if isinstance(t.channels, Tensor)]
    widest = max(sets, key=lambda item: len(item[0]))
    if all(s <= widest[0] for s, _ in sets):
        return next(t for s, t in sets if s == widest[0])
    # A token mixer's output has tokens as its last made channels and carried the others along;
    # the stream that it is added to knows the same others as its own.
    for candidate, trace in sets:
        if all(
            candidate == s or (t.carried is not None and axes(t.carried) == candidate)
            for s, t in sets
        ):
            return Trace(trace.channels)
    shown = " and ".join(str(sorted(s)) for s, _ in sets)
    return Trace(f"{name} {DISAGREEMENT}: {shown}")


def _convolution(op: Op) -> list[Trace]:
    out, groups = op.outs[0], op.arg("groups") or 1
    trace = op.trace(op.args[0])
    fresh = numbering(out.ndim, 1, out.shape[1])
    if groups > 1 and trace and isinstance(trace.channels, Tensor):
        numbers = trace.channels
        if axes(numbers) == {1 - out.ndim}:
            # Groups that read the same channels (a batch folded into axis 1) make the same ones.
            each = out.shape[1] // groups
            first = numbers.flatten()[:: numbers.numel() // groups].repeat_interleave(each)
            fresh = first.view_as(fresh) * each + fresh % each
    return [Trace(fresh)] * len(op.outs)


def _last(op: Op) -> list[Trace]:
    return [Trace(numbering(out.ndim, out.ndim - 1, out.shape[-1])) for out in op.outs]


def _matmul(op: Op) -> list[Trace]:
    """A parameter makes new channels; two activations (attention) keep what is not summed over."""
    left, right = op.arg("mat1", "batch1", "self"), op.arg("mat2", "batch2")
    a, b, out = op.trace(left), op.trace(right), op.outs[0]
    if b is None:
        return [Trace(numbering(out.ndim, out.ndim - 1, out.shape[-1]), _carried(a, -1))]
    if a is None:
        return [Trace(numbering(out.ndim, out.ndim - 2, out.shape[-2]), _carried(b, -2))]
    rows = a.channels.amax(-1, keepdim=True) if isinstance(a.channels, Tensor) else None
    cols = b.channels.amax(-2, keepdim=True) if isinstance(b.channels, Tensor) else None
    if rows is None or cols is None:
        other = b.channels if rows is None else a.channels
        return [Trace(other if isinstance(other, str) else rows if cols is None else cols)]
    return [Trace(rows * (cols.max() + 1) + cols)]


def _carried(trace: Trace | None, summed: int) -> Tensor | None:
    """Channels that stay when the axis `summed` is summed over."""
    for numbers in trace or ():
        if isinstance(numbers, Tensor) and axes(left := numbers.amax(summed, keepdim=True)):
            return left
    return None


def _attention(op: Op) -> list[Trace]:
    """softmax(q k) v: the result has the channels of v."""
    value, out = op.trace(op.args[2]), op.outs[0]
    channels = value.channels if value else "attention over a constant"
    if isinstance(channels, Tensor):
        channels = fit(channels.amax(-2, keepdim=True), out.shape, op.name)
    return [Trace(channels)] + [Trace(f"{op.name} statistics")] * (len(op.outs) - 1)


def _reduce(op: Op) -> list[Trace]:
    trace = op.traces[id(op.tracked[0])]
    dim, keepdim = op.arg("dim"), bool(op.arg("keepdim"))
    dims = [dim] if isinstance(dim, int) else list(dim or ())

    def shrink(numbers: Tensor) -> Tensor:
        return numbers.amax(dims or list(range(numbers.ndim)), keepdim=keepdim)

    channels = shrink(trace.channels) if isinstance(trace.channels, Tensor) else trace.channels
    carried = None if trace.carried is None else shrink(trace.carried)
    return [Trace(channels, carried)] * len(op.outs)


def _move(op: Op) -> list[Trace]:
    """Values only change places: run the operation on the channel numbers."""
    data = op.args[0]
    trace = op.trace(data)
    if trace is None:
        return [Trace(f"{op.name} looks values up in a constant table")] * len(op.outs)
    if not isinstance(trace.channels, Tensor):
        return [Trace(trace.channels)] * len(op.outs)
    moved = _run(op, trace.channels, op.shapes[id(data)])
    if isinstance(moved, str):
        return [Trace(moved)] * len(op.outs)
    carried: Sequence[Tensor | None] = [None] * len(moved)
    if trace.carried is not None:
        again = _run(op, trace.carried, op.shapes[id(data)])
        carried = carried if isinstance(again, str) else again
    return [Trace(c, k) for c, k in zip(moved, carried, strict=True)]


def _run(op: Op, numbers: Tensor, shape: torch.Size) -> list[Tensor] | str:
    full = numbers.expand(shape)
    try:
        if op.name in RESHAPE:
            moved: Any = full.reshape(op.outs[0].shape)
        else:
            data = op.args[0]
            if op.name == "as_strided":
                full = torch.empty_strided(shape, data.stride()).copy_(full)
            rest = [a.cpu() if isinstance(a, Tensor) else a for a in _flat(op.args[1:])]
            moved = op.func(full, *_unflat(op.args[1:], rest), **op.kwargs)
    except (RuntimeError, IndexError, TypeError) as error:
        return f"{op.name} could not be followed ({error})"
    result = [compact(t) for t in tree_leaves(moved) if isinstance(t, Tensor)]
    if len(result) != len(op.outs):
        return f"{op.name} could not be followed"
    return result


def _flat(args: Iterable[Any]) -> list[Any]:
    return [x for a in args for x in (a if isinstance(a, (list, tuple)) else (a,))]


def _unflat(args: Iterable[Any], flat: list[Any]) -> list[Any]:
    rest = iter(flat)
    return [[next(rest) for _ in a] if isinstance(a, (list, tuple)) else next(rest) for a in args]


def _join(op: Op) -> list[Trace]:
    """`cat` and `stack`: run on the numbers; a constant operand (class token) takes the others'."""
    tensors, dim, out = op.args[0], op.arg("dim"), op.outs[0]
    known = [t for t in map(op.trace, tensors) if t and isinstance(t.channels, Tensor)]
    vague = [t for t in map(op.trace, tensors) if t and isinstance(t.channels, str)]
    if vague or not known:
        return [vague[0] if vague else Trace()]
    chosen = _agree([(t, True) for t in known], op.name).channels
    if not isinstance(chosen, Tensor):
        return [Trace(chosen)]
    dim %= out.ndim
    parts = []
    for tensor in tensors:
        trace = op.trace(tensor)
        if tensor.ndim == 1 and not tensor.numel() and out.ndim > 1:
            continue  # cat still takes empty tensors of any rank
        numbers = trace.channels if trace and isinstance(trace.channels, Tensor) else chosen
        if op.name == "cat" and chosen.shape[dim] > 1 and numbers.shape[dim] != tensor.shape[dim]:
            numbers = numbers.narrow(dim, 0, 1) + numbering(out.ndim, dim, tensor.shape[dim])
        parts.append(numbers.expand(tensor.shape))
    return [Trace(compact(op.func(parts, dim)))]


def _write(op: Op) -> list[Trace]:
    """Parts of the first input are overwritten; its axes stay."""
    trace = op.trace(op.args[0])
    return [trace or Trace(f"{op.name} writes into a constant tensor")] * len(op.outs)


# --------------------------------------------------------------------------------------- tables
# Names are aten names without the in-place underscore and the `_copy` of functional views.

RESHAPE = names("view _unsafe_view _reshape_alias reshape")
MOVES = RESHAPE | names(
    """
    permute transpose t slice select unbind split split_with_sizes chunk expand unsqueeze squeeze
    as_strided diagonal unfold narrow roll flip repeat tile index index_select gather rot90
    repeat_interleave channel_shuffle native_channel_shuffle tril triu
    """
)
COPIES = names("clone _to_copy detach alias lift_fresh contiguous positive")
RESIZES = names(
    """
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d
    upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_bicubic2d
    _upsample_bicubic2d_aa upsample_trilinear3d
    """
)
JOINS = names("cat stack")
CONSTANTS = names(
    """
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones
    new_empty new_full new_empty_strided zero fill
    """
)
_RULES: dict[Rule, frozenset[str]] = {
    _move: MOVES,
    _join: JOINS,
    _convolution: names(
        """
        convolution _convolution convolution_overrideable conv1d conv2d conv3d conv_transpose1d
        conv_transpose2d conv_transpose3d cudnn_convolution mkldnn_convolution miopen_convolution
        _conv_depthwise2d conv_depthwise3d im2col torchvision::deform_conv2d
        """
    ),
    _matmul: names("mm bmm addmm baddbmm _addmm_activation"),
    _last: names("embedding _native_multi_head_attention"),
    _attention: names(
        """
        _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math
        """
    ),
    _reduce: names(
        """
        mean sum amax amin max min var std norm linalg_vector_norm logsumexp prod any all argmax
        argmin var_mean std_mean median nansum
        """
    ),
    _write: names(
        """
        index_put index_copy index_add index_fill scatter scatter_add masked_scatter slice_scatter
        select_scatter
        """
    ),
    _keep: COPIES
    | RESIZES
    | names(
        """
        native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
        _batch_norm_with_update cudnn_batch_norm miopen_batch_norm native_layer_norm
        native_group_norm _fused_rms_norm _softmax _log_softmax _safe_softmax cumsum cumprod renorm
        native_dropout bernoulli glu sort topk max_pool1d max_pool2d mkldnn_max_pool2d
        max_pool2d_with_indices max_pool3d_with_indices avg_pool1d avg_pool2d avg_pool3d
        adaptive_avg_pool1d adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d
        adaptive_max_pool2d adaptive_max_pool3d
        grid_sampler_2d constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d
        replication_pad1d replication_pad2d replication_pad3d pixel_shuffle pixel_unshuffle
        _fft_r2c _fft_c2r _fft_c2c
        """
    ),
    # Elementwise operations carry PyTorch's own `pointwise` tag; these few lack it.
    _pointwise: names(
        "copy hardswish masked_fill prelu _prelu_kernel log_sigmoid_forward log_sigmoid "
        "rrelu_with_noise"
    ),
}
PRODUCTS = _RULES[_matmul]
MAKES = PRODUCTS | _RULES[_convolution] | _RULES[_last]
"""Operations that make new channels; a product of two activations does not."""

_TABLE: dict[str, Rule] = {name: rule for rule, group in _RULES.items() for name in group}


def is_pointwise(func: Any, name: str) -> bool:
    """Whether an operation acts on each value alone."""
    return torch.Tag.pointwise in func.tags or _TABLE.get(name) is _pointwise


@lru_cache(maxsize=4096)
def facts(func: Any) -> tuple[str, bool]:
    """Base name of an operation, and whether it is elementwise."""
    name = func._schema.name.removeprefix("aten::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    if name != "_to_copy":
        name = name.removesuffix("_copy") or name
    return name, is_pointwise(func, name)


def is_known(func: Any, name: str) -> bool:
    """Whether an operation is in a table (else its parts may be)."""
    return name in CONSTANTS or name in _TABLE or torch.Tag.pointwise in func.tags


def propagate(op: Op) -> list[Trace]:
    """Traces of an operation's outputs.

    Args:
        op: The executed operation, with at least one tracked input.

    Returns:
        One trace for each of `op.outs`. An operation in no table gives undecided channels.
    """
    rule = _TABLE.get(op.name)
    if rule is None and torch.Tag.pointwise in op.func.tags:
        rule = _pointwise
    if rule is None:
        return [Trace(f"the operation {op.func} is not known")] * len(op.outs)
    traces = rule(op)
    return traces + [Trace(f"{op.name}: further output")] * (len(op.outs) - len(traces))
