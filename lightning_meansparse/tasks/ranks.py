"""Rows and counts of all processes, merged exactly."""

from __future__ import annotations

from typing import cast

import numpy as np
import pyarrow as pa
import torch
from lightning.pytorch import LightningModule
from torch import Tensor


def merged_table(module: LightningModule, table: pa.Table) -> pa.Table:
    """Return the rows of all ranks on every rank, each sample once.

    Args:
        module: Within a run of a trainer.
        table: This rank's records.
    """
    if module.trainer.world_size == 1:
        return _each_sample_once(table)
    # Bytes in a tensor, not gathered objects: nothing is unpickled, and every backend can do it.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8).to(module.device)
    sizes = _all(module, torch.tensor([len(data)], device=module.device)).flatten().tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8, device=module.device)
    padded[: len(data)] = data
    parts = _all(module, padded).reshape(len(sizes), -1).cpu().numpy()
    tables = [
        pa.ipc.open_stream(part[:size].tobytes()).read_all()
        for part, size in zip(parts, sizes, strict=True)
    ]
    return _each_sample_once(pa.concat_tables(tables))


def summed(module: LightningModule, tensor: Tensor) -> Tensor:
    """Return the sum of a CPU tensor over ranks, on every rank."""
    size = module.trainer.world_size
    if size == 1:
        return tensor
    return _all(module, tensor.to(module.device)).reshape(size, *tensor.shape).sum(0).cpu()


def _all(module: LightningModule, tensor: Tensor) -> Tensor:
    return cast(Tensor, module.all_gather(tensor))


def _each_sample_once(table: pa.Table) -> pa.Table:
    """Drop the copies that a distributed sampler's padding made."""
    keys = [table.column(name).to_numpy() for name in ("alpha", "order", "index")]
    _, first = np.unique(np.rec.fromarrays(keys), return_index=True)
    return table if len(first) == len(table) else table.take(pa.array(np.sort(first)))
