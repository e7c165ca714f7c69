"""What comes in is checked, and the model goes out as it came in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel")


def check_model(model: object) -> None:
    """Refuse what cannot be probed.

    Raises:
        TypeError: If `model` is no module, or is wrapped, compiled or scripted.
        ValueError: If it has parameters that have no shape yet.
    """
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
                f"model must not be compiled yet: {where} is ({kind}). Pass the plain module and "
                f"call torch.compile afterwards."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"model must be plain Python: {where} is a TorchScript module ({kind}), inside "
                f"which nothing can be seen. Pass the module that it was made from."
            )
    uninitialized = nn.parameter.UninitializedParameter
    lazy = [n for n, p in model.named_parameters() if isinstance(p, uninitialized)]
    if lazy:
        raise ValueError(
            f"model has parameters without a shape yet ({', '.join(lazy[:3])}): call it once first."
        )


def check_example(example: object) -> dict[str, Tensor]:
    """The example's tensors by keyword; a single tensor has the empty keyword.

    Raises:
        TypeError: If `example` is neither a tensor nor a mapping of tensors.
        ValueError: If it holds no floating-point values.
    """
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
        shown = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors.values())
        raise ValueError(
            f"example must hold at least one non-empty floating-point tensor, got "
            f"{shown or 'an empty dict'}."
        )
    return tensors


def shortened(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first two samples: places and axes do not depend on how many there are."""
    sizes = [t.shape[0] for t in inputs.values() if t.ndim == 4]
    return {n: t[:2] if t.ndim and t.shape[0] in sizes[:1] else t for n, t in inputs.items()}


def resized(tensor: Tensor, grow: int) -> Tensor:
    """One sample more and, for images, `grow` more rows and columns, by repetition."""
    for dim, more in enumerate((1, 0, grow, grow) if tensor.ndim == 4 else (1,)):
        if dim < tensor.ndim and tensor.shape[dim] and more:
            size = tensor.shape[dim]
            index = torch.arange(size + more, device=tensor.device) % size
            tensor = tensor.index_select(dim, index)
    return tensor


@contextmanager
def untouched(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Eval mode inside; afterwards every attribute, buffer and random state is as before.

    Forward passes may count calls, cache tables or move running statistics even in eval mode, so
    attributes are put back one by one, dicts and lists among them (caches, `_buffers`, hooks) item
    by item, and buffers value by value.
    """
    modules = list(model.modules())
    attributes = [(module, dict(vars(module))) for module in modules]
    values = [value for _, saved in attributes for value in saved.values()]
    dicts = [(value, dict(value)) for value in values if isinstance(value, dict)]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    tensors = [*inputs.values(), *model.parameters()]
    devices = sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        try:
            for module in modules:
                module.training = False  # not .eval(), which a module may have overridden
            yield
        finally:
            for module, saved in attributes:
                _put_back(vars(module), saved)
            for container, content in dicts:
                _put_back(container, content)
            for items, before in lists:
                if list(map(id, items)) != list(map(id, before)):
                    items[:] = before
            for buffer, old in buffers:
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(old)


def _put_back(container: dict[str, object], content: Mapping[str, object]) -> None:
    """Give a dict its content back, in the same order; a dict that kept it is not written to."""
    same = list(container) == list(content)
    if same and all(container[key] is value for key, value in content.items()):
        return
    if not same:
        container.clear()
    container.update(content)
