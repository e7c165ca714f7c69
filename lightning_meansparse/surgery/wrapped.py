"""Models inside wrappers that talk to other processes in every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn


@contextmanager
def speechless(model: nn.Module) -> Iterator[nn.Module]:
    """The model as each process can run it at its own pace, inside the ``with`` block.

    DistributedDataParallel sends buffers around before a forward pass, and weights that are sharded
    by ``fully_shard`` are gathered during it: with unequal numbers of batches the processes would
    wait for each other forever. Inside the block there is the module that DistributedDataParallel
    wraps, and sharded weights are whole, so the model must fit each device. Every process enters
    together.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    sharded = sharded_modules(model)
    kept = [(group, group.post_forward_mesh_info) for each in sharded for group in _groups(each)]
    try:
        for module in sharded:
            module.unshard()
            module.set_reshard_after_forward(False, recurse=False)
        yield model
    finally:
        for group, info in kept:
            group.post_forward_mesh_info = info
        for module in sharded:
            module.reshard()


def sharded_modules(model: nn.Module) -> list[Any]:
    """Return the modules whose weights `fully_shard` has split among processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return []  # torch.distributed.fsdp takes a second to import
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _groups(module: Any) -> list[Any]:
    """What holds the setting that `set_reshard_after_forward` changes and nothing public tells."""
    state = vars(module._get_fsdp_state())
    return [*state.get("_fsdp_param_groups", ()), *filter(None, [state.get("_fsdp_param_group")])]
