"""Which sample is which, for any loader and any number of processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import data
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_meansparse.tasks import samples as room
from lightning_meansparse.tasks.ranks import summed
from lightning_meansparse.tasks.samples import (
    batch_indices,
    dealt,
    first_samples,
    loader_of,
    only_loader,
)
from lightning_meansparse.tasks.selection import Round


def test_indices_come_from_the_loader():
    dataset = TensorDataset(torch.zeros(7))
    assert [i.tolist() for i in batch_indices(DataLoader(dataset, batch_size=3))] == [
        [0, 1, 2],
        [3, 4, 5],
        [6],
    ]
    ranks = [
        DataLoader(dataset, batch_size=3, sampler=DistributedSampler(dataset, 2, rank, False))
        for rank in range(2)
    ]
    seen = torch.cat([torch.cat(batch_indices(loader)) for loader in ranks])
    assert sorted(seen.tolist()) == [0, 0, 1, 2, 3, 4, 5, 6]


def test_indices_of_a_datamodule_are_rows_of_its_split():
    module = data()
    module.setup()
    indices = torch.cat(batch_indices([module.val_dataloader()]))
    assert indices.tolist() == module.parts["holdout"].rows.tolist()


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(TensorDataset(torch.zeros(2)), shuffle=True),
        DataLoader(TensorDataset(torch.zeros(1)), sampler=SubsetRandomSampler([0])),
    ],
)
def test_a_random_order_is_refused(loader):
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="shuffle=False"):
        batch_indices(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_without_numbers_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(1)

    for loader in (DataLoader(Stream()), [torch.zeros(1)], DataLoader([1, 2], batch_size=None)):
        with pytest.raises(TypeError, match="a sweep needs"):
            batch_indices(loader)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 40),
    ranks=st.integers(1, 4),
    size=st.integers(1, 7),
    cut=st.tuples(st.integers(0, 40), st.integers(1, 40)),
)
def test_the_first_samples_are_the_same_for_any_number_of_ranks(n, ranks, size, cut):
    dataset = TensorDataset(torch.zeros(n))
    hands = [
        batch_indices(
            DataLoader(
                dataset,
                batch_size=size,
                sampler=DistributedSampler(dataset, ranks, rank, shuffle=False),
            )
        )
        for rank in range(ranks)
    ]
    round = Round("race-1", (0.0,), (), start=cut[0], stop=cut[0] + cut[1])
    met, first, margins = set(), [], torch.rand(n)
    some = cut[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "gathered", lambda mine, device: [torch.cat(hand) for hand in hands])
        for rank, hand in enumerate(hands):
            patch.setattr(room, "this_rank", lambda rank=rank: rank)
            samples = dealt(hand, torch.device("cpu"))
            assert samples.order.tolist() == list(range(n))
            assert len(samples) == n
            first += [number for batch in samples.first(some) for number in batch.tolist()]
            met |= {number for batch in samples.hand(round, margins) for number in batch.tolist()}
    assert met == set(range(n)[round.start : round.stop])
    assert sorted(first) == list(range(n))[:some], "each by one rank"


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("options", [{}, {"multiprocessing_context": "fork"}, {"timeout": 60}])
@pytest.mark.parametrize("batches", [[], [torch.tensor([6, 2]), torch.tensor([3])]])
def test_any_samples_can_be_had_of_a_loader_with_workers_also_none(options, batches):
    loader = DataLoader(TensorDataset(torch.arange(9)), batch_size=4, num_workers=1, **options)
    given = [images.tolist() for (images,) in loader_of(loader, batches)]
    assert given == [batch.tolist() for batch in batches]


def test_the_one_loader_of_a_trainer():
    loader = DataLoader(TensorDataset(torch.rand(5, 1, 2, 2), torch.arange(5)), batch_size=2)
    assert only_loader([loader]) is loader
    images, labels = first_samples(loader, 3)
    assert torch.equal(images, loader.dataset.tensors[0][:3])
    assert labels.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="one data set, got 2 loaders"):
        only_loader([loader, loader])
    with pytest.raises(TypeError, match="one DataLoader"):
        only_loader([])


def test_a_sum_over_one_process_does_not_need_its_device():
    counts = torch.ones(3, dtype=torch.float64)  # which Apple's GPUs do not know
    assert summed(counts, torch.device("meta")) is counts
