"""Training attacks what it trains; a sweep's records, logged numbers and files say the same."""

import copy
import io
import json
import logging
import math
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from timm.optim import Lamb
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_meansparse.adapter import load_adapter, read_adapter
from lightning_meansparse.classifier import load_classifier
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.demo import ConvNet
from lightning_meansparse.records import HELD_OUT, TEST, choose_alpha, read_records, summarize
from lightning_meansparse.report import read_sources
from lightning_meansparse.sites import find_sites
from lightning_meansparse.surgery import alphas, calibrate_, operators, restore_, sparsify_
from lightning_meansparse.tasks import AdversarialTraining, AlphaSweep
from lightning_meansparse.tasks.ascent import ascend, held, seeded
from lightning_meansparse.tasks.batches import images_and_labels
from lightning_meansparse.tasks.occupancy import Occupancy
from lightning_meansparse.tasks.progress import SweepProgress
from lightning_meansparse.tasks.samples import batch_indices
from lightning_meansparse.tasks.training import divergence, trades_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # The recommendation is not to measure on several devices; that a sweep can is tested here.
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

EPS = 0.1


def net() -> nn.Module:
    """A small convolutional network with one BatchNorm and two sites, not trained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.GELU(),
            nn.Conv2d(4, 6, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(54, 3),
        )


def two_signals(n, seed):
    """Two classes, told by a bright half (4 of 5 times) and by faint dots (always).

    The dots are fainter than eps, so only a classifier that ignores them can be robust.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    lying = torch.rand(n, generator=generator) < 0.2
    bright = torch.where(lying, 1 - labels, labels)
    images = torch.full((n, 1, 8, 8), 0.5)
    images[:, 0, :4] += 0.25 * (2 * bright - 1)[:, None, None]
    images[:, 0, 4:] += 0.08 * (2 * labels - 1)[:, None, None]
    images += 0.02 * torch.randn(images.shape, generator=generator)
    return images.clamp(0, 1), labels


def data(train=64, test=21, **options):
    images, labels = two_signals(train, 0)
    splits = {"train": (images, labels), "test": two_signals(test, 1)}
    return ImageDataModule(splits, **{"batch_size": 8, "holdout": 0.25, **options})


def trainer(**options):
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    return Trainer(**{**quiet, **options})


# ------------------------------------------------------------------------------ the inner attack


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("steps", [1, 7])
def test_ascent_stays_in_the_ball_and_raises_the_loss(norm, steps):
    model = net().eval()
    images, labels = torch.rand(16, 1, 8, 8), torch.randint(3, (16,))
    eps = EPS if norm == "Linf" else 0.5

    def loss(x):
        return F.cross_entropy(model(x), labels, reduction="sum")

    options = {"eps": eps, "norm": norm, "step_size": 2.5 * eps / steps}
    start = ascend(loss, images, steps=0, **options)
    points = ascend(loss, images, steps=steps, **options)
    for each in (start, points):
        delta = (each - images).double()
        size = delta.abs().amax((1, 2, 3)) if norm == "Linf" else delta.flatten(1).norm(dim=1)
        assert size.max() <= eps + 1e-6
        assert size.max() > eps / 4
        assert each.min() >= 0
        assert each.max() <= 1
    assert loss(points) > loss(start) * 1.02
    assert not points.requires_grad


def test_ascent_depends_on_its_own_generator_alone():
    model, images = net().eval(), torch.rand(4, 1, 8, 8)
    run = partial(ascend, lambda x: model(x).square().sum(), images, eps=EPS, step_size=0.05)
    before = torch.get_rng_state()
    device = torch.device("cpu")
    first, second = (run(generator=seeded(0, 1, device=device)) for _ in range(2))
    other = run(generator=seeded(0, 2, device=device))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_ascent_works_under_inference_mode():
    model = net().eval()
    with torch.inference_mode():
        images = torch.rand(2, 1, 8, 8)
        points = ascend(lambda x: model(x).sum(), images, eps=EPS, step_size=0.05)
    assert (points - images).abs().max() > 0.05


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_crafting_leaves_no_trace_in_the_model(method):
    task = AdversarialTraining(net().train(), method=method, eps=EPS, steps=2)
    task.classifier.model[0].weight.requires_grad_(False)
    task.classifier.model[3].eval()
    before = copy.deepcopy(task.classifier.state_dict())
    modes = [module.training for module in task.classifier.modules()]
    task.attack(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(IndexError), held(task.classifier):
        raise IndexError
    assert all(torch.equal(v, before[k]) for k, v in task.classifier.state_dict().items())
    assert modes == [module.training for module in task.classifier.modules()]
    frozen = [not p.requires_grad for p in task.classifier.parameters()]
    assert frozen == [True] + [False] * (len(frozen) - 1)
    assert all(p.grad is None for p in task.classifier.parameters())


def test_trades_loss_is_the_papers_formula():
    clean = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    attacked = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 0, 1])
    loss = trades_loss(clean, attacked, labels, beta=6.0)
    p, q = clean.softmax(1), attacked.softmax(1)
    natural = -p.log()[torch.arange(5), labels].mean()
    expected = natural + 6 * (p * (p / q).log()).sum(1).mean()
    assert math.isclose(loss.item(), expected.item(), rel_tol=1e-12)
    ours = torch.autograd.grad(loss, (clean, attacked))
    theirs = torch.autograd.grad(expected, (clean, attacked))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b)
        assert a.abs().max() > 0


def test_trades_attack_raises_the_divergence_without_labels():
    task = AdversarialTraining(net().eval(), method="trades", eps=EPS, steps=5)
    images = torch.rand(8, 1, 8, 8)
    points = [task.attack(images, torch.full((8,), label)) for label in (0, 2)]
    assert torch.equal(*points)
    random = images + EPS * (2 * torch.rand_like(images) - 1)
    attacked, moved = (divergence(task(images), task(x)).mean() for x in (points[0], random))
    assert attacked > 3 * moved


# -------------------------------------------------------------------------- adversarial training


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_training_gives_the_robustness_that_standard_training_lacks(method):
    found = {}
    for each in ("none", method):
        task = AdversarialTraining(
            load_classifier(linear(), mean=0.5, std=0.25),
            method=each,
            eps=EPS,
            steps=3,
            optimizer=lambda p: AdamW(p, lr=0.05),
        )
        run = trainer(max_epochs=5)
        run.fit(task, data(train=256))
        found[each] = {name: value.item() for name, value in run.callback_metrics.items()}
    assert found["none"]["val_clean_acc"] > 0.95
    assert found["none"]["val_adv_acc"] < 0.3
    assert found[method]["val_adv_acc"] > 0.65
    assert all(metrics["val_adv_acc"] <= metrics["val_clean_acc"] for metrics in found.values())
    assert "train_adv_acc" in found[method]
    assert "train_adv_acc" not in found["none"]
    assert ("train_clean_acc" in found[method]) == (method == "trades")


def test_training_is_a_function_of_its_seeds():
    def weights(seed):
        torch.manual_seed(0)
        task = AdversarialTraining(linear(), eps=EPS, steps=1, step_size=0.02, seed=seed)
        trainer(max_steps=3, limit_val_batches=0).fit(task, data())
        return task.classifier.model[1].weight

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def jsonargparse_like(instantiate, cls, **given):
    """What jsonargparse makes of a class path: a partial of a partial."""
    return partial(partial(lambda make, c, *a, **k: make(c, *a, **k), instantiate), cls, **given)


@pytest.mark.parametrize(
    "factory",
    [
        partial(OneCycleLR, max_lr=0.1),
        jsonargparse_like(
            lambda cls, *a, **k: cls(*a, **k), OneCycleLR, max_lr=0.1, total_steps=None
        ),
        lambda optimizer, total_steps: OneCycleLR(optimizer, 0.1, total_steps=total_steps),
    ],
    ids=["partial", "jsonargparse", "lambda"],
)
def test_one_cycle_spans_the_whole_training(factory):
    task = AdversarialTraining(
        linear(), method="none", eps=EPS, lr_scheduler=factory, lr_interval="step", val_steps=0
    )
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    run = trainer(max_epochs=2, callbacks=[Watch()])
    run.fit(task, data())
    assert run.lr_scheduler_configs[0].scheduler.total_steps == run.global_step == 12
    assert max(rates) > 0.09
    assert rates[-1] < 1e-4


def test_total_steps_count_epochs_when_the_schedule_does():
    task = AdversarialTraining(
        linear(), method="none", eps=EPS, lr_scheduler=partial(OneCycleLR, max_lr=0.1), val_steps=0
    )
    run = trainer(max_epochs=3)
    with pytest.warns(RuntimeWarning, match="didn't mean 'interval': 'step'"):
        run.fit(task, data())
    assert run.lr_scheduler_configs[0].scheduler.total_steps == 3


def test_total_steps_of_an_endless_training_is_an_error():
    task = AdversarialTraining(linear(), eps=EPS, lr_scheduler=partial(OneCycleLR, max_lr=0.1))
    with pytest.raises(ValueError, match=r"max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(task, data())


@pytest.mark.parametrize(
    ("schedule", "interval", "last"),
    [
        (partial(CosineLRScheduler, t_initial=3, lr_min=0.01), "epoch", 0.01 + 0.09 * 0.25),
        (
            partial(CosineLRScheduler, t_initial=12, lr_min=0.0, t_in_epochs=False),
            "step",
            None,
        ),
        (partial(CosineAnnealingLR, T_max=2), "epoch", 0.0),
        (partial(ReduceLROnPlateau, patience=0), "epoch", None),
    ],
    ids=["timm-epoch", "timm-step", "torch", "plateau"],
)
def test_any_optimizer_and_schedule(schedule, interval, last):
    task = AdversarialTraining(
        linear(),
        method="none",
        eps=EPS,
        optimizer=lambda p: Lamb(p, lr=0.1),
        lr_scheduler=schedule,
        lr_interval=interval,
        val_steps=0,
    )
    run = trainer(max_epochs=2)
    run.fit(task, data())
    rate = run.optimizers[0].param_groups[0]["lr"]
    if last is not None:
        assert math.isclose(rate, last, abs_tol=1e-9)
    else:
        assert rate <= 0.1


def test_the_trained_classifier_is_written_and_read_back(tmp_path):
    network = ConvNet(width=2, num_classes=2)
    task = AdversarialTraining(
        network, eps=EPS, steps=1, channels_last=True, save_to=tmp_path / "classifier"
    )
    trainer(max_steps=2, limit_val_batches=0).fit(task, data())
    images = torch.rand(3, 1, 8, 8)
    again = load_classifier(tmp_path / "classifier")
    assert torch.allclose(task.classifier.eval()(images), again(images), atol=1e-6)


def test_checkpoints_load_without_unpickling(tmp_path):
    task = AdversarialTraining(linear(), eps=EPS, steps=1, optimizer=lambda p: AdamW(p, lr=0.1))
    run = trainer(max_steps=2, limit_val_batches=0)
    run.fit(task, data())
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = AdversarialTraining.load_from_checkpoint(
        tmp_path / "last.ckpt", model=linear(), weights_only=True
    )
    assert loaded.steps == 1
    assert torch.equal(loaded.classifier.model[1].weight, task.classifier.model[1].weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "fgsm"}, "method must be one of 'pgd', 'trades', 'none', got 'fgsm'"),
        ({"norm": "linf"}, "norm must be one of"),
        ({"eps": 0}, "eps must be positive"),
        ({"steps": 0}, "steps must be an integer of at least 1"),
        ({"val_steps": 1.5}, "val_steps must be an integer"),
        ({"beta": -1}, "beta must be at least 0"),
        ({"label_smoothing": 1}, "label_smoothing must be in"),
        ({"lr_interval": "batch"}, "lr_interval must be one of"),
    ],
)
def test_wrong_options_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        AdversarialTraining(linear(), **{"eps": EPS, **options})


def test_a_model_that_does_not_fit_the_data_is_refused():
    with pytest.raises(ValueError, match="num_classes=2"):
        trainer(max_steps=1).fit(AdversarialTraining(ConvNet(width=2), eps=EPS), data())
    with pytest.raises(ValueError, match="in_chans=1"):
        trainer(max_steps=1).fit(
            AdversarialTraining(ConvNet(in_chans=3, num_classes=2, width=2), eps=EPS), data()
        )


def test_batches_of_every_usual_form():
    images, labels = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    for batch in (
        (images, labels),
        [images, labels, "more"],
        {"image": images, "label": labels},
        {"pixel_values": images, "labels": labels},
    ):
        found = images_and_labels(batch)
        assert found[0] is images
        assert found[1] is labels
    with pytest.raises(TypeError, match=r"got dict with keys \['picture'\]"):
        images_and_labels({"picture": images})
    with pytest.raises(TypeError, match="got Tensor"):
        images_and_labels(images)


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


# ------------------------------------------------------------------------------------- the sweep

CHEAP = [
    {"attack": "pgd", "options": {"steps": 2}},
    {"attack": "square", "options": {"n_queries": 5}},
    {"attack": "adaptive", "options": {"steps": 2}},
]


@pytest.fixture(scope="module")
def trained():
    """A network that has learned something, so that attacks have something to break."""
    torch.manual_seed(0)
    network = net()
    task = AdversarialTraining(
        network, method="none", eps=EPS, optimizer=lambda p: AdamW(p, lr=0.02)
    )
    trainer(max_epochs=3, limit_val_batches=0).fit(task, data())
    return network.eval()


def sweep_of(model, **options):
    defaults = {"alphas": [0.3, 1.0], "attacks": CHEAP, "eps": 0.03}
    return AlphaSweep(copy.deepcopy(model), **{**defaults, **options})


def test_records_logs_and_files_say_the_same(trained, tmp_path):
    images = torch.rand(5, 1, 8, 8)
    before = trained(images)
    sweep = sweep_of(trained, output=tmp_path / "sweep")
    run = trainer(logger=CSVLogger(tmp_path))
    (logged,) = run.validate(sweep, data(), verbose=False)
    assert sweep.alphas == (0.0, 0.3, 1.0)
    table, metadata = read_records(tmp_path / "sweep" / "records.parquet")
    assert table.num_rows == 16 * 3 * 4
    summaries = summarize(table, split=HELD_OUT)
    assert choose_alpha(summaries) == sweep.chosen_alpha == metadata["chosen_alpha"]
    for summary in summaries:
        at = f"alpha_{summary.alpha:g}"
        expected = {
            f"clean_acc/{at}": summary.clean.value,
            f"robust_acc/worst/{at}": summary.worst.value,
            f"gain/worst/{at}": summary.gain.value,
            f"gain/worst_se/{at}": summary.gain.se,
            **{f"robust_acc/{name}/{at}": p.value for name, p in summary.robust.items()},
        }
        assert len(expected) == 7
        for name, value in expected.items():
            assert math.isclose(logged[name], value, abs_tol=1e-6), name
    assert logged["gain/worst/alpha_0"] == logged["gain/worst_se/alpha_0"] == 0
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().split("\n")[0]
    assert {"gain/worst/alpha_0.3", "robust_acc/adaptive/alpha_1"} <= set(header.split(","))
    assert metadata["eps"] == 0.03
    assert metadata["calibration"]["images"] == 48
    assert [spec["name"] for spec in metadata["attacks"]] == ["pgd", "square", "adaptive"]

    (reported,) = run.test(sweep, data(), verbose=False)
    table, _ = read_records(tmp_path / "sweep" / "records.parquet")
    tested = summarize(table, split=TEST)
    assert {s.alpha for s in tested} == {0.0, sweep.chosen_alpha}
    assert all(s.n == 21 for s in tested)
    assert math.isclose(reported["clean_acc/alpha_0"], tested[0].clean.value, abs_tol=1e-6)
    assert "test images (n = 21)" in sweep.verdict

    sources = read_sources(tmp_path / "sweep")
    assert [site.site for site in sources.sites] == ["2@in", "4@in"]
    assert sources.images == 16
    assert all(
        site.replaced[0] == 0 < site.replaced[1] < site.replaced[2] for site in sources.sites
    )
    assert sources.histogram is not None
    fresh = copy.deepcopy(trained)
    adapter = load_adapter(fresh, tmp_path / "sweep" / "adapter")
    assert set(adapter.alphas) == {sweep.chosen_alpha}
    assert adapter.evaluation["n"] == 21
    assert torch.equal(fresh(images), sweep.classifier.model(images))
    restore_(sweep.classifier.model)
    assert torch.equal(sweep.classifier.model(images), before)


def test_every_alpha_can_be_tested_without_a_choice(trained):
    sweep = sweep_of(trained, attacks="fgsm", test_alphas="all")
    trainer().test(sweep, data(), verbose=False)
    assert [s.alpha for s in sweep.summaries[TEST]] == [0.0, 0.3, 1.0]
    assert sweep.chosen_alpha is None
    with pytest.raises(RuntimeError, match="nothing is chosen"):
        _ = sweep.verdict


def test_the_base_alone_needs_no_operators(trained, tmp_path):
    sweep = sweep_of(trained, attacks="fgsm", alphas=[], output=tmp_path)
    trainer().validate(sweep, data(), verbose=False)
    assert sweep.chosen_alpha == 0
    assert operators(sweep.classifier) == {}
    assert not (tmp_path / "adapter").exists()


def test_statistics_that_are_there_are_kept_and_stale_ones_are_not(trained, tmp_path):
    first = sweep_of(trained, attacks="fgsm", output=tmp_path)
    trainer().validate(first, data(), verbose=False)
    means = {name: op.mean.clone() for name, op in operators(first.classifier).items()}
    given = sweep_of(trained, attacks="fgsm", adapter=tmp_path / "adapter")
    trainer().validate(given, data(seed=5), verbose=False)
    assert all(torch.equal(op.mean, means[n]) for n, op in operators(given.classifier).items())
    with torch.no_grad():
        given.classifier.model[0].weight.mul_(2)
    trainer().validate(given, data(), verbose=False)
    found = operators(given.classifier)
    assert not torch.equal(found["model.2@in"].mean, means["model.2@in"]) or not torch.equal(
        found["model.4@in"].mean, means["model.4@in"]
    )


def test_a_task_hands_over_its_classifier(trained):
    task = AdversarialTraining(trained, eps=EPS)
    assert AlphaSweep(task, attacks="fgsm", eps=EPS).classifier is task.classifier


def test_two_processes_measure_what_one_does(trained, tmp_path):
    for name, options in (
        ("one", {}),
        (
            "two",
            {
                "devices": 2,
                "strategy": DDPStrategy(start_method="fork", timeout=timedelta(seconds=60)),
            },
        ),
    ):
        sweep = sweep_of(trained, attacks=CHEAP[:1], output=tmp_path / name)
        trainer(**options).validate(sweep, data(holdout=15, batch_size=4), verbose=False)
    one, two = (read_records(tmp_path / name / "records.parquet")[0] for name in ("one", "two"))
    assert one.num_rows == 15 * 3 * 2
    margins = [t.column("margin").to_numpy() for t in (one, two)]
    assert abs(margins[0] - margins[1]).max() < 1e-4
    assert one.drop_columns(["margin"]).equals(two.drop_columns(["margin"]))
    adapters = [read_adapter(tmp_path / name / "adapter") for name in ("one", "two")]
    assert all(a.calibration["images"] == 49 for a in adapters)
    for name, tensor in adapters[0].tensors.items():
        assert torch.allclose(tensor, adapters[1].tensors[name], atol=1e-6)


class OnlyTest(LightningDataModule):
    def val_dataloader(self):
        return DataLoader(TensorDataset(*two_signals(4, 0)), batch_size=2)

    test_dataloader = val_dataloader


def test_what_cannot_run_says_what_to_do(trained):
    with pytest.raises(RuntimeError, match=r"run trainer.validate"):
        trainer().test(sweep_of(trained), data(), verbose=False)
    with pytest.raises(RuntimeError, match="no training images to calibrate on"):
        trainer().validate(sweep_of(trained), OnlyTest(), verbose=False)
    with pytest.raises(ValueError, match="alpha must be"):
        sweep_of(trained, alphas=[-0.1])
    with pytest.raises(ValueError, match="test_alphas must be"):
        sweep_of(trained, test_alphas="best")


def test_an_interrupted_sweep_leaves_model_and_terminal_alone(trained, monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True)
    sweep = sweep_of(trained)
    sweep.progress.console = screen
    tell, calls = sweep.progress.tell, []

    def stop(text):
        tell(text)
        calls.append(text)
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(sweep.progress, "tell", stop)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    own = RichProgressBar()
    with pytest.raises(SystemExit):
        trainer(callbacks=[own], enable_progress_bar=True).validate(sweep, data(), verbose=False)
    assert set(alphas(sweep.classifier).values()) == {0.0}
    assert sweep.progress._bar is None
    assert own.is_enabled
    shown = screen.file.getvalue()
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is shown again


# -------------------------------------------------------------------------------------- progress


def test_a_terminal_sees_what_is_done_and_for_how_long(trained):
    screen = Console(file=io.StringIO(), force_terminal=True, width=200)
    sweep = sweep_of(trained, test_alphas="all")
    sweep.progress.console = screen
    trainer(enable_progress_bar=True).validate(sweep, data(), verbose=False)
    text = screen.file.getvalue()
    assert "held-out" in text
    assert "batch 2/2 · α = 1 · adaptive" in text


def test_a_log_gets_a_line_now_and_then(trained, caplog, monkeypatch):
    clock = iter(range(0, 100_000, 20))
    monkeypatch.setattr("lightning_meansparse.tasks.progress.time.monotonic", lambda: next(clock))
    sweep = sweep_of(trained)
    sweep.progress.console = Console(file=io.StringIO())
    with caplog.at_level(logging.INFO, logger="lightning_meansparse.tasks.progress"):
        trainer(enable_progress_bar=True).validate(sweep, data(), verbose=False)
    lines = [r.getMessage() for r in caplog.records if r.name.endswith("progress")]
    assert 2 <= len(lines) <= 2 * 3 * 4
    assert "left (batch 1/2" in lines[0]
    shares = [int(line.split(": ")[1].split(" %")[0]) for line in lines]
    assert shares == sorted(shares)
    assert sweep.progress.console.file.getvalue() == ""


def test_no_progress_bar_means_silence(trained, caplog):
    sweep = sweep_of(trained, attacks="fgsm")
    sweep.progress.console = Console(file=io.StringIO(), force_terminal=True)
    with caplog.at_level(logging.INFO, logger="lightning_meansparse.tasks.progress"):
        trainer().validate(sweep, data(), verbose=False)
    assert sweep.progress.console.file.getvalue() == ""
    assert not [r for r in caplog.records if r.name.endswith("progress")]


def test_time_left_weighs_attacks_by_their_budgets():
    sweep = AlphaSweep(linear(), attacks=["fgsm", "pgd", "apgd-t", "square"], eps=EPS)
    assert SweepProgress(sweep.attacks).work == [1, 3, 60, 2700, 1000]


# ------------------------------------------------------------------------------------- occupancy


@pytest.fixture(scope="module")
def sparsified(trained):
    classifier = load_classifier(copy.deepcopy(trained))
    images = two_signals(32, 0)[0]
    sparsify_(classifier, find_sites(classifier, images[:2]))
    calibrate_(classifier, [images])
    return classifier


def test_shares_are_those_of_a_direct_count(sparsified):
    counted = Occupancy(sparsified, (0.0, 0.5))
    images = two_signals(12, 3)[0]
    for part in images.split(5):
        counted.update(sparsified, part)
    content = json.loads(json.dumps(counted.content(None)))
    assert content["images"] == 12
    first = operators(sparsified)["model.2@in"]
    with torch.no_grad():
        x = sparsified.model[1](sparsified.model[0](images))
    expected = ((x - first.mean).abs() < 0.5 * first.var.sqrt()).double().mean()
    site = content["sites"][0]
    assert site["channels"] == 4
    assert site["replaced"][0] == 0
    assert math.isclose(site["replaced"][1], expected.item(), abs_tol=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.55])
def test_the_histogram_shows_an_empty_band_and_a_pile(sparsified, alpha):
    counted = Occupancy(sparsified, (0.0, alpha))
    images = two_signals(12, 3)[0]
    counted.update(sparsified, images)
    shown = counted.histogram(sparsified, [images], alpha)
    before, after = torch.tensor(shown["before"]), torch.tensor(shown["after"])
    assert before.sum() == after.sum() > 0
    middle = torch.tensor(shown["edges"]).unfold(0, 2, 1).mean(1)
    distance = (middle - shown["mean"]).abs() / shown["std"]
    centre = distance.argmin()
    band = (distance < alpha) & (torch.arange(len(middle)) != centre)
    assert (after[band] == 0).all()
    assert after[centre] == before[distance < alpha].sum()
    assert torch.equal(after[distance > alpha], before[distance > alpha])
    assert 3.5 < distance.max() < 4.001


def test_the_shown_channel_is_the_one_nearest_the_median(sparsified):
    counted = Occupancy(sparsified, (0.0, 0.5))
    counted.update(sparsified, two_signals(12, 3)[0])
    site, channel = counted.typical(0.5)
    assert site == "model.2@in"  # 4 x 64 values, the other site has 6 x 9
    shares = counted.replaced[site][1]
    nearest = (shares - shares.median()).abs()
    assert nearest[channel] == nearest.min()
    assert channel == int(nearest.argmin())


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    sweep = AlphaSweep(linear(), attacks="fgsm", eps=EPS, output=tmp_path / "file" / "sweep")
    with pytest.raises(ValueError, match="output must be a folder that can be written to"):
        trainer().validate(sweep, data())
    task = AdversarialTraining(linear(), eps=EPS, save_to=tmp_path / "file" / "model")
    with pytest.raises(ValueError, match="save_to must be a folder that can be written to"):
        trainer(max_steps=1).fit(task, data())


def test_eight_does_not_mean_eight_of_255():
    for make in (AdversarialTraining, AlphaSweep):
        with pytest.raises(ValueError, match="did you mean '8/255'"):
            make(linear(), eps=8)
