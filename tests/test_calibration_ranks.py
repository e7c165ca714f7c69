"""Statistics measured by several processes are those that one would have measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_meansparse import calibrate_, find_sites, sparsify_
from lightning_meansparse.callback.batches import given_data
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.moments import ChannelMoments
from lightning_meansparse.surgery import operators

datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

COUNTS = (21, 1001)  # neither divides among two or four
BATCH = 8


@cache
def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)


def network() -> nn.Module:
    """In float64, where a forward pass rounds alike for any size of batch, or nearly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.GELU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 3)).double()
    model[1].running_mean.fill_(0.3)
    sparsify_(model, find_sites(model, images(21)[:2]), alpha=0.2)
    return model


def statistics(model: nn.Module, batches: Any) -> Tensor:
    """Count, mean and variance of every channel of every site, in float64 as they are merged."""
    seen: list[ChannelMoments] = []
    reduce = ChannelMoments.reduce

    def noted(moments: ChannelMoments) -> None:
        reduce(moments)
        seen.append(moments)

    with mock.patch.object(ChannelMoments, "reduce", noted):
        calibrate_(model, batches)
    counts = torch.tensor([float(m.count) for m in seen], dtype=torch.float64)
    return torch.cat([counts, *(t.flatten() for m in seen for t in (m.mean, m.var))])


def share(count: int, rank: int, world: int) -> list[Tensor]:
    return list(images(count)[rank::world].split(BATCH))


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2, with a setting of its own in one block."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[3], mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def stream(folder: str, rank: int, world: int) -> list[Tensor]:
    """What a sweep on several ranks reads of a streamed data set: its own shards of the files."""
    # The library waits so long for its threads at the end of every pass.
    with mock.patch.object(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.0):
        return _stream(folder, rank, world)


def _stream(folder: str, rank: int, world: int) -> list[Tensor]:
    module = ImageDataModule(folder, streaming=True, test_split=None, batch_size=BATCH)
    module.setup()
    ranks = mock.Mock(world_size=world, global_rank=rank)
    data = given_data(module.calibration_dataloader, "stream", ranks, None)
    return [batch.double() for batch, _ in data.batches()]


def measured(folder: str, rank: int, world: int) -> dict[str, Tensor]:
    """Every case in one process of several."""
    first = rank == 0
    found = {f"{n}": statistics(network(), share(n, rank, world)) for n in COUNTS}
    found["one has all"] = statistics(network(), share(21, 0, 1) if first else [])
    streamed = stream(folder, rank, world)
    found["length"] = torch.tensor([sum(map(len, streamed))])
    found["stream"] = statistics(network(), streamed)
    if world > 1:
        uneven = share(21, 0, 1) if first else []
        wrapped = nn.parallel.DistributedDataParallel(network())
        found["DDP"] = statistics(wrapped, uneven)
        cut = sharded(network())
        before = cut[3].weight.to_local().clone()
        settings = [m._get_fsdp_state()._fsdp_param_groups[0] for m in (cut, cut[3])]
        kept = [each.post_forward_mesh_info for each in settings]
        found["FSDP2"] = statistics(cut, uneven)
        assert [each.post_forward_mesh_info for each in settings] == kept
        assert torch.equal(cut[3].weight.to_local(), before)  # sharded again
        assert torch.isfinite(cut(images(21)[:4])).all()
    return found


def unreadable() -> Iterator[Tensor]:
    """A shard that breaks off."""
    yield images(21)[:4]
    raise OSError("shard 7 is damaged")


def failure(rank: int) -> str:
    """What a process says whose neighbour cannot read its share."""
    model = network()
    try:
        calibrate_(model, unreadable() if rank == 1 else share(21, rank, 4))
    except OSError as error:
        assert not any(op.mean.any() for op in operators(model).values())
        return f"{type(error).__name__}: {error}"
    return "nothing"


def process(folder: str, rank: int) -> None:
    torch.set_num_threads(1)
    for world in (1, 2, 4):
        if rank < world:
            place = f"file://{folder}/meet-{world}"
            dist.init_process_group(
                "gloo",
                init_method=place,
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=30),
            )
            torch.save(measured(folder, rank, world), f"{folder}/{world}-{rank}.pt")
            if world > 1:
                Path(folder, f"{world}-{rank}.txt").write_text(failure(rank))
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """What one, two and four processes measured."""
    folder = tmp_path_factory.mktemp("ranks")
    pixels, labels = (images(1001)[:203] * 255).byte(), torch.arange(203) % 3
    ImageDataModule({"train": (pixels, labels)}, test_split=None, holdout=0).write_parquet(folder)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(str(folder), rank)) for rank in range(4)]
    for each in processes:
        each.start()
    for each in processes:
        each.join()
    assert [each.exitcode for each in processes] == [0, 0, 0, 0]
    return folder


def by_hand(pixels: Tensor) -> Tensor:
    """What `statistics` gives, from one pass over all images at once."""
    model = network().eval()
    with torch.no_grad():
        first = model[1](model[0](pixels))
        both = [x.transpose(0, 1).flatten(1) for x in (first, model[3](first.relu()))]
    counts = torch.tensor([float(x.shape[1]) for x in both], dtype=torch.float64)
    return torch.cat([counts, *(t for x in both for t in (x.mean(1), x.var(1, correction=0)))])


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest relative one."""
    return float(((found - expected) / expected).abs().max())


CASES = [(world, case) for world in (1, 2, 4) for case in ("21", "1001", "one has all", "stream")]
CASES += [(world, case) for world in (2, 4) for case in ("DDP", "FSDP2")]


@pytest.mark.parametrize(("world", "case"), CASES)
def test_any_number_of_processes_measures_the_same(folder: Path, world: int, case: str) -> None:
    ranks = [torch.load(folder / f"{world}-{r}.pt", weights_only=True) for r in range(world)]
    pixels = images(int(case) if case.isdigit() else 21)
    if case == "stream":
        pixels = torch.cat(stream(str(folder), 0, 1))
        lengths = {int(rank["length"]) for rank in ranks}
        assert world == 1 or len(lengths) > 1
    expected = by_hand(pixels)
    for rank in ranks:
        assert difference(rank[case], expected) <= 1e-9
        assert torch.equal(rank[case], ranks[0][case])


@pytest.mark.parametrize("world", [2, 4])
def test_if_one_process_fails_all_do(folder: Path, world: int) -> None:
    told = [(folder / f"{world}-{rank}.txt").read_text() for rank in range(world)]
    heard = f"PeerError: process 1 of {world} has failed: OSError: shard 7 is damaged"
    assert told == [heard, "OSError: shard 7 is damaged", *[heard] * (world - 2)]
