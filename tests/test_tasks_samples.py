"""Which sample is which, for any loader and any number of processes."""

import pytest
import torch
from sweeps import data
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_meansparse.tasks.samples import batch_indices

# ------------------------------------------------------------------------- which sample is which


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
