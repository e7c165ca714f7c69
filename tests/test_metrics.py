"""RobustAccuracy counts each sample once, attacks each batch once, and keeps no model."""

from __future__ import annotations

import copy
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DistributedSampler
from torchmetrics import MetricCollection

from lightning_meansparse.attacks import Evaluation, evaluate
from lightning_meansparse.metrics import RobustAccuracy

SUITE = ["fgsm", {"attack": "apgd-ce", "options": {"steps": 4}}]
EPS = 0.06
N = 21  # odd: ranks need padding


def make(count: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    """A linear classifier, right about most of its images and robust on some."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    model[1].weight.data = torch.randn(3, 36, generator=generator)
    model[1].bias.data.zero_()
    images = torch.rand(count, 1, 6, 6, generator=generator)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::5] = (labels[::5] + 1) % 3
    return model, images, labels


@pytest.fixture
def batch() -> tuple[nn.Module, Tensor, Tensor]:
    return make()


def expected(evaluation: Evaluation) -> dict[str, float]:
    standing = evaluation.standing.double().mean(0).tolist()
    values = {f"robust_acc/{name}": v for name, v in zip(evaluation.attacks, standing, strict=True)}
    clean = evaluation.clean.double().mean().item()
    return {"clean_acc": clean, **values, "robust_acc/worst": standing[-1]}


def plain(values: dict[str, Tensor]) -> dict[str, float]:
    assert all(v.dim() == 0 for v in values.values())
    return {k: pytest.approx(v.item(), abs=1e-6) for k, v in values.items()}


def test_it_says_what_the_evaluation_found(batch: Any) -> None:
    metric = RobustAccuracy(SUITE, eps=EPS)
    metric.update(*batch)
    reference = expected(evaluate(*batch, attacks=SUITE, eps=EPS))
    assert reference == plain(metric.compute())
    assert 1 > reference["clean_acc"] > reference["robust_acc/worst"] > 0
    assert list(metric.compute()) == list(reference)
    assert metric.evaluation is not None
    assert metric.evaluation.attacks == ("fgsm", "apgd-ce")


def test_batches_add_up(batch: Any) -> None:
    model, images, labels = batch
    whole, parts = RobustAccuracy(SUITE, eps=EPS), RobustAccuracy(SUITE, eps=EPS)
    whole.update(model, images, labels, torch.arange(N))
    for rows in torch.randperm(N).split(4):
        parts.update(model, images[rows], labels[rows], rows)
    assert plain(whole.compute()) == {k: v.item() for k, v in parts.compute().items()}


def test_samples_that_repeat_count_once(batch: Any) -> None:
    model, images, labels = batch
    metric = RobustAccuracy("fgsm", eps=EPS)
    rows = torch.tensor([*range(N), 0, 5, 10, 5])
    metric.update(model, images[rows], labels[rows], rows)
    once = RobustAccuracy("fgsm", eps=EPS)
    once.update(model, images, labels)
    assert plain(metric.compute()) == {k: v.item() for k, v in once.compute().items()}
    # Without numbers nobody can tell, and every sample counts.
    every = RobustAccuracy("fgsm", eps=EPS)
    every.update(model, images[rows], labels[rows])
    assert every.compute()["clean_acc"] != once.compute()["clean_acc"]


def test_numbers_in_every_update_or_in_none(batch: Any) -> None:
    model, images, labels = batch
    for first, second in ((torch.arange(N), None), (None, torch.arange(N))):
        metric = RobustAccuracy("fgsm", eps=EPS)
        metric.update(model, images, labels, first)
        with pytest.raises(ValueError, match="in every update or in none"):
            metric.update(model, images, labels, second)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_no_samples_is_an_error(batch: Any) -> None:
    metric = RobustAccuracy("fgsm", eps=EPS)
    with pytest.raises(ValueError, match="seen no sample; call update"):
        metric.compute()
    metric.update(*batch)
    metric.compute()
    metric.reset()
    with pytest.raises(ValueError, match="seen no sample"):
        metric.compute()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": "fgms", "eps": 0.1}, "'fgms' is not known"),
        ({"attacks": "fgsm", "eps": "8/0"}, "eps must be"),
        ({"attacks": "fgsm", "eps": 0.1, "norm": "linf"}, "Write 'Linf'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustAccuracy(**arguments)


class Calls(nn.Module):
    """Counts the batches it sees, and refuses to be copied."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.model(images)

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        raise AssertionError("the metric copied the model")

    def __reduce__(self) -> str:
        raise AssertionError("the metric pickled the model")


def test_clone_and_pickle_leave_the_model_alone(batch: Any) -> None:
    model, images, labels = batch
    metric = RobustAccuracy("fgsm", eps=EPS)
    metric.update(Calls(model), images, labels)
    for other in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        assert plain(other.compute()) == {k: v.item() for k, v in metric.compute().items()}
    assert not list(metric.children())
    assert metric.state_dict() == {}


def test_forward_attacks_once(batch: Any) -> None:
    model, images, labels = batch
    by_update, by_forward = Calls(model), Calls(model)
    metric = RobustAccuracy("fgsm", eps=EPS)
    metric.update(by_update, images, labels)
    other = RobustAccuracy("fgsm", eps=EPS)
    now = other(by_forward, images, labels)
    assert by_forward.calls == by_update.calls
    assert plain(now) == {k: v.item() for k, v in metric.compute().items()}
    other(by_forward, images, labels)
    assert plain(other.compute()) == {k: v.item() for k, v in metric.compute().items()}


def test_a_collection_keeps_metrics_apart(batch: Any) -> None:
    """Two radii agree on a batch where nothing falls; they must not be merged because of it."""
    model, images, labels = batch
    collection = MetricCollection(
        {
            "small": RobustAccuracy("fgsm", eps=1e-6),
            "large": RobustAccuracy("fgsm", eps=0.5),
        }
    )
    wrong = (labels + 1) % 3  # nothing is right, so nothing can fall
    clean = collection["small"].clone()
    clean.update(model, images, labels)
    kept = clean.evaluation.clean
    wrong = torch.where(kept, (labels + 1) % 3, labels)
    collection.update(model, images, wrong)
    collection.update(model, images, labels)
    values = collection.compute()
    assert len(collection.compute_groups) == 2
    assert values["small_robust_acc/worst"] > values["large_robust_acc/worst"]


def test_flags_for_torchmetrics() -> None:
    metric = RobustAccuracy("fgsm", eps=EPS)
    assert metric.higher_is_better is True
    assert metric.is_differentiable is False
    assert metric.full_state_update is False
    assert (metric.plot_lower_bound, metric.plot_upper_bound) == (0.0, 1.0)
    assert RobustAccuracy(eps=EPS).attacks[0].name == "apgd-ce"


def _rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=5),
    )
    try:
        model, images, labels = make()
        sampler = DistributedSampler(range(N), num_replicas=world, rank=rank, shuffle=False)
        metric = RobustAccuracy(SUITE, eps=EPS)
        # A wrapped model must not talk to other ranks, which attack another number of samples.
        model.register_buffer("broadcast_before_each_forward", torch.zeros(1))
        wrapped = nn.parallel.DistributedDataParallel(model)
        for rows in torch.tensor(list(sampler)).split(4):
            metric.update(wrapped, images[rows], labels[rows], rows)
        lonely = RobustAccuracy(SUITE, eps=EPS)
        if rank == 0:  # the others have seen nothing
            lonely.update(wrapped, images, labels, torch.arange(N))
            metric_local = len(metric.index)
        values = [{k: v.item() for k, v in m.compute().items()} for m in (metric, lonely)]
        assert rank or len(metric.index) == metric_local  # synchronising leaves the state alone
        torch.save(values, f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_agree_with_one(tmp_path: Path, batch: Any, world: int) -> None:
    torch.multiprocessing.start_processes(
        _rank, args=(world, str(tmp_path)), nprocs=world, start_method="fork"
    )
    single = expected(evaluate(*batch, attacks=SUITE, eps=EPS))
    for rank in range(world):
        for values in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert values == {k: pytest.approx(v, abs=1e-6) for k, v in single.items()}
