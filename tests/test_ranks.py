"""One answer on any number of processes: records, logs and metrics of real ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pytest
import ranks
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_meansparse import load_classifier
from lightning_meansparse.attacks.pgd import PGD
from lightning_meansparse.classifier import save_classifier
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.demo import ConvNet
from lightning_meansparse.records import read_records
from lightning_meansparse.tasks import AlphaSweep
from lightning_meansparse.tasks.rounds import Round
from lightning_meansparse.tasks.samples import Samples, loader_of
from tests.sweeps import CHEAP, EPS, FGSM, data, net, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
]

COLLECTIVES = (
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce_scatter",
    "reduce_scatter_tensor",
)


class Alone(PGD):
    """An attack that finds fault with talk among processes, and with a model that would talk."""

    def perturb_from(self, *args: Tensor, **options: Tensor) -> object:
        assert not any(isinstance(m, DistributedDataParallel) for m in self.model.modules())

        def forbidden(*_: object, **__: object) -> None:
            raise AssertionError("a collective inside an attack")

        with pytest.MonkeyPatch.context() as patch:
            for name in COLLECTIVES:
                patch.setattr(dist, name, forbidden)
            return super().perturb_from(*args, **options)


class Logged(Callback):
    """Writes what this process has logged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_validation_end(self, trainer: object, pl_module: object) -> None:
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save(found, self.folder / f"logged-{trainer.global_rank}.pt")


def swept(folder: Path, world: int, n: int) -> tuple[pa.Table, list[dict[str, float]]]:
    folder.mkdir()
    options = {}
    if world > 1:
        wait = timedelta(seconds=60)
        options = {"devices": world, "strategy": DDPStrategy(start_method="fork", timeout=wait)}
    attacks = [*CHEAP, {"attack": "tests.test_ranks.Alone", "name": "alone"}]
    sweep = AlphaSweep(
        net(), alphas=[0.2, 0.6], attacks=attacks, eps=EPS, output=folder / "out", where="2@in"
    )
    trainer(callbacks=[Logged(folder)], **options).validate(
        sweep, data(holdout=n, batch_size=4), verbose=False
    )
    logs = [torch.load(path, weights_only=True) for path in sorted(folder.glob("logged-*.pt"))]
    return read_records(folder / "out" / "records.parquet")[0], logs


def seen(folder: Path) -> tuple[int, list[dict[str, Any]]]:
    content = json.loads((folder / "out" / "sites.json").read_text())
    return content["images"], content["sites"]


@pytest.mark.parametrize("n", [21, 3])
def test_one_two_and_four_processes_give_the_same_records(tmp_path: Path, n: int) -> None:
    one, _ = swept(tmp_path / "1", 1, n)
    sites = seen(tmp_path / "1")
    assert sites[0] == n
    assert one.num_rows == n * 3 * (1 + len(CHEAP) + 1), "clean, and each attack, at each alpha"
    for world in (2, 4):
        many, logs = swept(tmp_path / str(world), world, n)
        assert many.drop_columns(["margin"]).equals(one.drop_columns(["margin"]))
        apart = many["margin"].to_numpy() - one["margin"].to_numpy()
        assert abs(apart).max() < 1e-5, "rows of another batch"
        assert seen(tmp_path / str(world)) == sites, "shares replaced, without the padding"
        assert len(logs) == world
        assert logs.count(logs[0]) == world
        assert not list((tmp_path / str(world) / "out").rglob("*.tmp"))


# ------------------------------------------------------------------------- strategies and nodes


class Sharded(AlphaSweep):
    """A sweep with weights that no process has whole."""

    def configure_model(self) -> None:
        fully_shard(self.classifier, mesh=self.device_mesh["data_parallel"])


def parallel(world: int) -> dict[str, Any]:
    """Options of a trainer under Lightning's strategy for models in pieces."""
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    return {"trainer_options": {"strategy": strategy}}


def test_under_model_parallel_strategy_the_answer_is_the_same(tmp_path: Path) -> None:
    for world in (1, 2):
        options = parallel(world) if world > 1 else {}
        folder, log = tmp_path / str(world), tmp_path / "log"
        found = ranks.run(folder, world, log=log, **options)
        assert [each.code for each in found] == [0] * world, found
    one, two = (read_records(tmp_path / str(world)) for world in (1, 2))
    assert two[0].drop_columns(["margin"]).equals(one[0].drop_columns(["margin"]))
    assert two[1]["chosen_alpha"] == one[1]["chosen_alpha"]


def test_sharded_weights_are_refused_by_all_processes(tmp_path: Path) -> None:
    def fault(rank: int) -> None:
        ranks.sweep_of = lambda *, output, **_: Sharded(net(), eps=EPS, output=output)

    found = ranks.run(tmp_path / "out", 2, fault, log=tmp_path / "log", **parallel(2))
    assert [each.code for each in found] == [1, 1]
    assert all("ModelParallelStrategy and leave configure_model as it is" in e.text for e in found)
    assert not (tmp_path / "out").exists()
    sweep = AlphaSweep(net(), eps=EPS)
    with pytest.raises(ValueError, match="FSDPStrategy splits the weights"):
        sweep.together.setup(mock.Mock(strategy=FSDPStrategy()), sweep, "test")


def test_two_nodes_of_torchrun_give_the_records_of_one_process(tmp_path: Path) -> None:
    """The command of docs/scale.md over the loopback, with two processes per node."""
    classifier = load_classifier(ConvNet(width=4))
    save_classifier(classifier, tmp_path / "classifier")
    images = torch.randint(256, (39, 1, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        labels = classifier(images / 255).argmax(1)  # or there would be nothing to attack
    splits = {"train": (images[:30], labels[:30]), "test": (images[30:], labels[30:])}
    module = ImageDataModule(splits)
    module.setup()
    module.write_parquet(tmp_path / "images")
    sweep = [
        *("meansparse", "sweep", "--model.model", "classifier", "--model.eps", "0.1"),
        *("--model.alphas", "[0.3]", "--model.attacks", json.dumps([FGSM])),
        *("--model.test_alphas", "all", "--model.check_images", "0"),
        *("--data.dataset", "images", "--data.holdout", "0.4", "--data.batch_size", "4"),
        *("--trainer.accelerator", "cpu", "--trainer.logger", "false", "--model.output"),
    ]
    port = str(find_free_network_port())
    several = [*("--trainer.num_nodes", "2", "--trainer.devices", "2", "--trainer.strategy", "ddp")]
    commands = [
        [
            *("torchrun", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "2"),
            *("--master-addr", "127.0.0.1", "--master-port", port, "--no-python"),
            *(*sweep, "four", *several),
        ]
        for node in range(2)
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    started = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in [*commands, [*sweep, "one"]]
    ]
    for each in started:
        text, _ = each.communicate(timeout=300)
        assert each.returncode == 0, text
    (four, _), (one, _) = (read_records(tmp_path / name) for name in ("four", "one"))
    assert one.num_rows == (12 + 9) * 2 * 2, "of 12 held-out and 9 test images"
    assert four.drop_columns(["margin"]).equals(one.drop_columns(["margin"]))
    assert not (tmp_path / "four" / "parts").exists()


# ------------------------------------------------------------------------------------- dealing


@given(
    margins=st.lists(st.floats(-5, 5, width=32) | st.just(-float("inf")), min_size=1, max_size=60),
    ranks=st.integers(1, 6),
    cut=st.tuples(st.integers(0, 40), st.integers(1, 60)),
    size=st.integers(1, 7),
)
def test_margins_deal_every_sample_once_and_nobody_the_best_hand(
    margins: list[float], ranks: int, cut: tuple[int, int], size: int
) -> None:
    order = torch.randperm(len(margins)) + 100
    values = torch.tensor(margins)
    round = Round("any", (0.0,), (), start=cut[0], stop=cut[0] + cut[1])
    hands = []
    for rank in range(ranks):
        hand = Samples([order] * ranks, order, rank, size).hand(round, values)
        assert all(len(batch) <= size for batch in hand)
        hands.append([number for batch in hand for number in batch.tolist()])
    wanted = order[round.start : round.stop].tolist()
    assert sorted(number for hand in hands for number in hand) == sorted(wanted)
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    known = dict(zip(order.tolist(), margins, strict=True))
    for hand in hands:
        held = [known[number] for number in hand]
        assert held == sorted(held, reverse=True)
    ranked = sorted(wanted, key=lambda number: -known[number])
    for hand in hands:
        for turn, number in enumerate(hand):
            better = sum(known[other] > known[number] for other in ranked)
            assert better < (turn + 1) * ranks


@given(ranks=st.integers(1, 6), turns=st.integers(1, 5))
def test_whoever_is_first_in_one_turn_is_last_in_the_next(ranks: int, turns: int) -> None:
    margins = torch.randperm(2 * ranks * turns).float()
    order = torch.arange(len(margins))
    hands = [
        torch.cat(Samples([order] * ranks, order, rank, 4).hand(Round("any", (0.0,), ()), margins))
        for rank in range(ranks)
    ]
    assert {float(margins[hand].sum()) for hand in hands} == {float(margins.sum()) / ranks}


def test_samples_come_by_number_as_the_loader_gives_them() -> None:
    dataset = TensorDataset(torch.rand(7, 1, 2, 2), torch.arange(7))
    loader = DataLoader(dataset, batch_size=3)
    (images, labels), (_, more) = loader_of(loader, [torch.tensor([5, 1]), torch.tensor([6])])
    assert labels.tolist() == [5, 1]
    assert more.tolist() == [6]
    assert torch.equal(images, dataset.tensors[0][[5, 1]])
    module = data(holdout=10, batch_size=4)
    module.setup("validate")
    loader = module.val_dataloader()
    rows = loader.dataset.rows
    ((images, labels),) = loader_of(loader, [torch.from_numpy(rows[[9, 0, 4]])])
    whole = [torch.cat(part) for part in zip(*loader, strict=True)]
    assert torch.equal(images, whole[0][[9, 0, 4]])
    assert torch.equal(labels, whole[1][[9, 0, 4]])
    assert list(loader_of(loader, [])) == []
