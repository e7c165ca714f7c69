"""Training attacks what it trains."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from sweeps import EPS, FGSM, data, linear, net, trainer
from timm.optim import Lamb
from timm.scheduler import CosineLRScheduler
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau

from lightning_meansparse.classifier import load_classifier
from lightning_meansparse.demo import ConvNet
from lightning_meansparse.tasks import AdversarialTraining, AlphaSweep
from lightning_meansparse.tasks.ascent import ascend, held, seeded
from lightning_meansparse.tasks.batches import images_and_labels
from lightning_meansparse.tasks.training import divergence, trades_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]

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


def test_a_folder_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").touch()
    sweep = AlphaSweep(linear(), attacks=FGSM, eps=EPS, output=tmp_path / "file" / "sweep")
    with pytest.raises(ValueError, match="output must be a folder that can be written to"):
        trainer().validate(sweep, data())
    task = AdversarialTraining(linear(), eps=EPS, save_to=tmp_path / "file" / "model")
    with pytest.raises(ValueError, match="save_to must be a folder that can be written to"):
        trainer(max_steps=1).fit(task, data())


def test_eight_does_not_mean_eight_of_255():
    for make in (AdversarialTraining, AlphaSweep):
        with pytest.raises(ValueError, match="did you mean '8/255'"):
            make(linear(), eps=8)
