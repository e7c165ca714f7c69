"""What one process knows, known to all: merged exactly, or as the first one has it."""

from __future__ import annotations

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_meansparse.meeting import collective


def merged_table(table: pa.Table, device: torch.device) -> pa.Table:
    """Return the rows of all ranks on every rank, in the order of the ranks.

    Args:
        table: This rank's rows; may be empty.
        device: Where this rank's tensors are.
    """
    # Bytes in a tensor, not gathered objects: nothing is unpickled, and every backend can do it.
    parts = gathered(torch.frombuffer(bytearray(_packed(table)), dtype=torch.uint8), device)
    return pa.concat_tables([_unpacked(part.numpy().tobytes()) for part in parts])


def shared_table(table: pa.Table, device: torch.device) -> pa.Table:
    """Return the first rank's table on every rank; those of the others count for nothing."""
    return _unpacked(shared(_packed(table), device)) if _several() else table


def shared(content: bytes, device: torch.device) -> bytes:
    """Return the first rank's bytes on every rank."""
    if not _several():
        return content
    size = torch.tensor([len(content)], device=device)
    with collective():
        dist.broadcast(size, 0)
        if dist.get_rank() == 0:
            values = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device)
        else:
            values = torch.empty(int(size), dtype=torch.uint8, device=device)
        dist.broadcast(values, 0)
    return values.cpu().numpy().tobytes()


def this_rank() -> int:
    """Return the number of this process."""
    return dist.get_rank() if _several() else 0


def gathered(tensor: Tensor, device: torch.device) -> list[Tensor]:
    """Return a one-dimensional CPU tensor per rank, on every rank; lengths may differ."""
    tensor = tensor.to(device)
    sizes = [int(size) for size in _gathered(torch.tensor([len(tensor)], device=device))]
    padded = tensor.new_zeros(max(sizes))
    padded[: len(tensor)] = tensor
    return [part[:size].cpu() for part, size in zip(_gathered(padded), sizes, strict=True)]


def summed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum of a CPU tensor over ranks, on every rank."""
    if not _several():
        return tensor  # a device of one process alone may know no float64
    return torch.stack(_gathered(tensor.to(device))).sum(0).cpu()


def _gathered(tensor: Tensor) -> list[Tensor]:
    """One tensor per rank; by itself where there is one process."""
    if not _several():
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    with collective():
        dist.all_gather(parts, tensor.contiguous())
    return parts


def _several() -> bool:
    """Whether there are several processes, or one that could have been."""
    return dist.is_available() and dist.is_initialized()


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _unpacked(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()
