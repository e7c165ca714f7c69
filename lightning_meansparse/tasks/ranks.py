"""Rows and counts of all processes, merged exactly."""

from __future__ import annotations

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor


def merged_table(table: pa.Table, device: torch.device) -> pa.Table:
    """Return the rows of all ranks on every rank, in the order of the ranks.

    Args:
        table: This rank's rows; may be empty.
        device: Where this rank's tensors are.
    """
    # Bytes in a tensor, not gathered objects: nothing is unpickled, and every backend can do it.
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    parts = gathered(torch.frombuffer(bytearray(sink.getvalue()), dtype=torch.uint8), device)
    tables = [pa.ipc.open_stream(part.numpy().tobytes()).read_all() for part in parts]
    return pa.concat_tables(tables)


def rank_and_ranks() -> tuple[int, int]:
    """Return the number of this process, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(tensor: Tensor, device: torch.device) -> list[Tensor]:
    """Return a one-dimensional CPU tensor per rank, on every rank; lengths may differ."""
    tensor = tensor.to(device)
    sizes = [int(size) for size in _gathered(torch.tensor([len(tensor)], device=device))]
    padded = tensor.new_zeros(max(sizes))
    padded[: len(tensor)] = tensor
    return [part[:size].cpu() for part, size in zip(_gathered(padded), sizes, strict=True)]


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a CPU tensor over ranks, on every rank."""
    return torch.stack(_gathered(tensor.to(device))).sum(0).cpu()


def _gathered(tensor: Tensor) -> list[Tensor]:
    """One tensor per rank; by itself where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return parts
