"""Every way through a Trainer ends with statistics of the weights that the model holds."""

import copy
import signal
from datetime import timedelta

import pytest
import timm
import torch
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    seed_everything,
)
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, RandomDataset
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_meansparse.adapter import load_adapter, read_adapter
from lightning_meansparse.adapter.files import describe, insert
from lightning_meansparse.callback import MeanSparseCallback
from lightning_meansparse.surgery import alphas, operators, restore_, set_alpha

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*outside the 'fit' stage"),
]

IMAGES = torch.rand(21, 1, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(21) % 3)
SITES = ["net.2@in", "net.4@in"]


class Net(LightningModule):
    """Knows nothing of us. Its best checkpoint is that of the first epoch, not the last."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(20, 3),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("score", -float(self.current_epoch), on_epoch=True, sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def predict_step(self, batch, batch_idx):
        return self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def loader(data=DATA, **options):
    return DataLoader(data, **{"batch_size": 4, "shuffle": True, "drop_last": True, **options})


def held_out():
    return DataLoader(DATA, batch_size=7)


def make_trainer(tmp_path, *callbacks, **options):
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="score", mode="max")
    defaults = {
        "accelerator": "cpu",
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": tmp_path,
        "callbacks": [*callbacks, best],
    }
    return Trainer(**{**defaults, **options})


def weights(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_weights(model, expected):
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)


def assert_calibrated(model, *, alpha=0.2, images=IMAGES, sites=SITES):
    """The operators hold, for the model's own weights, what a plain forward pass shows."""
    assert alphas(model) == dict.fromkeys(sites, alpha)
    assert not model.state_dict().keys() & {"net.2.meansparse_in.mean"}
    plain = copy.deepcopy(model)
    restore_(plain)
    plain.eval()
    seen = {}
    for site in sites:
        plain.get_submodule(site.removesuffix("@in")).register_forward_pre_hook(
            lambda module, args, site=site: seen.__setitem__(site, args[0].double())
        )
    with torch.no_grad():
        plain(images)
    for site, op in operators(model).items():
        axes = [a for a in range(seen[site].dim()) if a != 1]
        mean = seen[site].mean(axes, keepdim=True)[0]
        var = seen[site].var(axes, correction=0, keepdim=True)[0]
        torch.testing.assert_close(op.mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(op.var.double(), var, rtol=1e-5, atol=1e-6)
        assert not op.mean.is_inference()
        assert not op.alpha.is_inference()


class InFit(Callback):
    """Notes whether operators are there while the model is trained and validated in fit."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.seen.append(len(operators(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if trainer.state.fn == "fit":
            self.seen.append(len(operators(pl_module)))


def fitted(tmp_path, *callbacks, model=None, **options):
    """A trainer and a model after two epochs with the callback."""
    model = model or Net()
    trainer = make_trainer(tmp_path, *(callbacks or [MeanSparseCallback()]), **options)
    trainer.fit(model, loader(), held_out())
    return trainer, model


# ------------------------------------------------------------------------------------------- fit


def test_fit_ends_sparsified_calibrated_and_trained_as_without_us(tmp_path):
    first = Net()
    second = copy.deepcopy(first)
    watch = InFit()
    seed_everything(1, verbose=False)
    fitted(tmp_path, MeanSparseCallback(), watch, model=first)
    seed_everything(1, verbose=False)
    fitted(tmp_path / "plain", InFit(), model=second)
    assert_calibrated(first)
    assert_weights(first, second.state_dict())
    assert watch.seen
    assert set(watch.seen) == {0}
    assert first.training == second.training
    assert first.device == torch.device("cpu")
    x = IMAGES[:4]
    first.eval(), second.eval()
    assert not torch.equal(first(x), second(x))
    restore_(first)
    assert torch.equal(first(x), second(x))


class Active(BoringModel):
    """Lightning's demo module with an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 2))


def test_lightnings_demo_module_in_one_line(tmp_path):
    model = Active()
    trainer = make_trainer(tmp_path, callbacks=[MeanSparseCallback()])
    trainer.fit(model)
    assert_calibrated(model, sites=["layer.1@in"], images=trainer.train_dataloader.dataset.data)


def test_a_functional_activation_is_an_error_before_training(tmp_path):
    model = DemoModel()
    before = weights(model)
    trainer = make_trainer(tmp_path, callbacks=[MeanSparseCallback()])
    with pytest.raises(ValueError, match="relu"):
        trainer.fit(model, DataLoader(RandomDataset(32, 8)))
    assert_weights(model, before)


class Timm(Net):
    """A plain module around a model of timm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=3)


def test_a_timm_model_in_a_plain_module(tmp_path):
    data = TensorDataset(torch.rand(9, 3, 32, 32), torch.arange(9) % 3)
    model = Timm()
    trainer = make_trainer(tmp_path, MeanSparseCallback(0.3, save_to=tmp_path / "a"), max_epochs=1)
    trainer.fit(model, loader(data), DataLoader(data))
    found = list(operators(model))
    assert len(found) > 3
    assert_calibrated(model, alpha=0.3, images=data.tensors[0], sites=found)
    fresh = timm.create_model("test_resnet", num_classes=3)
    fresh.load_state_dict(model.net.state_dict())
    adapter = load_adapter(fresh, tmp_path / "a")
    assert [f"net.{site}" for site in adapter.sites] == found
    assert adapter.calibration == {"data": "the training data, 9 samples", "images": 9}
    model.eval(), fresh.eval()
    assert torch.equal(model(data.tensors[0]), fresh(data.tensors[0]))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_weight_averaging_in_either_order(tmp_path, kind, first):
    averaging = (
        EMAWeightAveraging(decay=0.5)
        if kind == "ema"
        else StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
    )
    ours = MeanSparseCallback()
    callbacks = [ours, averaging] if first else [averaging, ours]
    model = Net()
    plain, alone = copy.deepcopy(model), copy.deepcopy(averaging)
    seed_everything(2, verbose=False)
    trainer, _ = fitted(tmp_path, *callbacks, model=model)
    seed_everything(2, verbose=False)
    fitted(tmp_path / "plain", alone, model=plain)
    assert_weights(model, plain.state_dict())
    assert_calibrated(model)
    before = weights(model)
    trainer.validate(model, held_out(), verbose=False)
    assert_weights(model, before)
    assert_calibrated(model)
    trainer.test(model, held_out(), ckpt_path="best", verbose=False)
    best = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert_weights(model, best["state_dict"])
    assert_calibrated(model)
    again = make_trainer(tmp_path, *callbacks)
    again.fit(model, loader(), held_out())
    assert_calibrated(model)
    again.validate(model, held_out(), verbose=False)
    assert_calibrated(model)


# ------------------------------------------------------------------------ validate, test, predict


@pytest.mark.parametrize("which", ["best", "path", None])
@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_evaluation_after_fit(tmp_path, run, which):
    trainer, model = fitted(tmp_path)
    last = weights(model)
    best = trainer.checkpoint_callback.best_model_path
    options = {} if run == "predict" else {"verbose": False}
    path = best if which == "path" else which
    getattr(trainer, run)(model, held_out(), ckpt_path=path, **options)
    expected = last if which is None else torch.load(best, weights_only=True)["state_dict"]
    assert_weights(model, expected)
    if which:
        assert not torch.equal(model.net[0].weight, last["net.0.weight"])
    assert_calibrated(model)
    model.train()
    model(IMAGES[:4]).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_fresh_model_and_same_trainer(tmp_path):
    trainer, _ = fitted(tmp_path)
    fresh = Net()
    trainer.test(fresh, held_out(), ckpt_path="best", verbose=False)
    assert_calibrated(fresh)


def test_fresh_trainer_measures_on_a_given_loader(tmp_path):
    trainer, _ = fitted(tmp_path)
    fresh, path = Net(), trainer.checkpoint_callback.best_model_path
    ours = MeanSparseCallback(0.4, dataloader=lambda: iter(held_out()))
    make_trainer(tmp_path, ours).test(fresh, held_out(), ckpt_path=path, verbose=False)
    assert_calibrated(fresh, alpha=0.4)


def test_without_data_the_error_says_what_to_do(tmp_path):
    trainer, _ = fitted(tmp_path)
    fresh, path = Net(), trainer.checkpoint_callback.best_model_path
    other = make_trainer(tmp_path, MeanSparseCallback())
    with pytest.raises(RuntimeError, match=r"MeanSparseCallback\(dataloader=\.\.\.\)"):
        other.test(fresh, held_out(), ckpt_path=path, verbose=False)
    assert operators(fresh) == {}


def test_without_the_callback_lightning_warns(tmp_path):
    trainer, _ = fitted(tmp_path)
    fresh, path = Net(), trainer.checkpoint_callback.best_model_path
    with pytest.warns(UserWarning, match="MeanSparseCallback"):
        make_trainer(tmp_path).test(fresh, held_out(), ckpt_path=path, verbose=False)
    assert operators(fresh) == {}


def test_statistics_travel_in_a_checkpoint_saved_after_fit(tmp_path):
    trainer, model = fitted(tmp_path)
    set_alpha(model, {"net.4@in": 0.5})
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    fresh = Net()
    other = make_trainer(tmp_path, MeanSparseCallback())  # no data: it must come from the file
    other.test(fresh, held_out(), ckpt_path=tmp_path / "after.ckpt", verbose=False)
    assert_calibrated(fresh)
    loaded = Net.load_from_checkpoint(tmp_path / "after.ckpt")
    assert operators(loaded) == {}
    load_adapter(loaded, tmp_path / "after.ckpt")
    assert alphas(loaded) == alphas(model)
    model.eval(), loaded.eval()
    assert torch.equal(model(IMAGES), loaded(IMAGES))
    with pytest.raises(ValueError, match="save_checkpoint"):
        load_adapter(Net(), trainer.checkpoint_callback.best_model_path)


def test_stale_statistics_do_not_get_into_a_checkpoint(tmp_path, caplog):
    trainer, model = fitted(tmp_path)
    with torch.no_grad():
        model.net[0].weight.mul_(2)
    trainer.save_checkpoint(tmp_path / "stale.ckpt")
    assert "weights have changed" in caplog.text
    state = torch.load(tmp_path / "stale.ckpt", weights_only=True)["callbacks"]
    assert state["MeanSparseCallback"]["config"] is None
    trainer.validate(model, held_out(), verbose=False)
    assert_calibrated(model)


def test_other_options_than_the_checkpoints_measure_again(tmp_path):
    trainer, _ = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    fresh = Net()
    ours = MeanSparseCallback(where="net.4@in", dataloader=held_out())
    make_trainer(tmp_path, ours).test(
        fresh, held_out(), ckpt_path=tmp_path / "after.ckpt", verbose=False
    )
    assert_calibrated(fresh, sites=["net.4@in"])


def test_alpha_set_by_hand_survives_measuring_again(tmp_path):
    trainer, model = fitted(tmp_path)
    set_alpha(model, 0.7)
    trainer.test(model, held_out(), ckpt_path="best", verbose=False)
    assert_calibrated(model, alpha=0.7)


class Images(LightningDataModule):
    """Splits in setup, as most do."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = []

    def setup(self, stage):
        self.stages.append(stage)
        if stage == "fit":
            self.train_set = DATA

    def train_dataloader(self):
        return loader(self.train_set)

    def val_dataloader(self):
        return held_out()

    test_dataloader = val_dataloader


def test_pretrained_model_without_fit(tmp_path):
    model, data = Net(), Images()
    make_trainer(tmp_path, MeanSparseCallback()).test(model, data, verbose=False)
    assert_calibrated(model)
    assert data.stages == ["test", "fit"]


def test_calibration_dataloader_of_a_datamodule(tmp_path):
    class Calibrated(Images):
        def calibration_dataloader(self):
            return DataLoader(DATA, batch_size=5, sampler=range(10))

    model, data = Net(), Calibrated()
    trainer = make_trainer(tmp_path, MeanSparseCallback())
    trainer.fit(model, data)
    assert_calibrated(model, images=IMAGES[:10])
    trainer.test(model, data, ckpt_path="best", verbose=False)
    assert_calibrated(model, images=IMAGES[:10])
    assert data.stages == ["fit", "test"]


# --------------------------------------------------------------------- resume, interrupt, repeat


def test_resuming_with_operators_in_place_trains_the_base_model(tmp_path):
    start = Net()

    def run(folder, *callbacks):
        model = copy.deepcopy(start)
        seed_everything(3, verbose=False)
        fitted(folder, *callbacks, model=model)
        path = folder / "last.ckpt"
        trainer = make_trainer(folder, *callbacks, max_epochs=2)
        trainer.fit(model, loader(), held_out())
        trainer.save_checkpoint(path)
        seed_everything(4, verbose=False)
        trainer = make_trainer(folder, *callbacks, max_epochs=4)
        trainer.fit(model, loader(), held_out(), ckpt_path=path)
        return model

    watch = InFit()
    ours = run(tmp_path / "ours", MeanSparseCallback(), watch)
    plain = run(tmp_path / "plain", InFit())
    assert_weights(ours, plain.state_dict())
    assert set(watch.seen) == {0}
    assert_calibrated(ours)


@pytest.mark.parametrize("same", [True, False])
def test_resuming_a_finished_run(tmp_path, same):
    trainer, model = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    expected = weights(model)
    model = model if same else Net()
    trainer = make_trainer(tmp_path, MeanSparseCallback())
    trainer.fit(model, loader(), held_out(), ckpt_path=tmp_path / "last.ckpt")
    assert_weights(model, expected)
    assert_calibrated(model)


class Interrupt(Callback):
    """Ctrl+C in the second epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt


def test_keyboard_interrupt_leaves_nothing_half_done(tmp_path, caplog):
    model = Net()
    trainer = make_trainer(tmp_path, MeanSparseCallback(), Interrupt())
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(model, loader(), held_out())
    finally:
        signal.signal(signal.SIGINT, before)
    assert operators(model) == {}
    assert "fit ended early (KeyboardInterrupt)" in caplog.text
    assert "ckpt_path" in caplog.text
    trainer.validate(model, held_out(), verbose=False)
    assert_calibrated(model)


def test_failing_calibration_leaves_the_trained_base_model(tmp_path):
    broken = DataLoader(TensorDataset(torch.full((4, 1, 6, 6), torch.nan)), batch_size=2)
    model = Net()
    trainer = make_trainer(tmp_path, MeanSparseCallback(dataloader=broken))
    with pytest.raises(ValueError, match="not finite") as caught:
        trainer.fit(model, loader(), held_out())
    assert "Training itself has finished" in caught.value.__notes__[0]
    assert operators(model) == {}
    assert trainer.global_step == 10


def test_fit_twice_and_two_models(tmp_path):
    ours = MeanSparseCallback()
    trainer, first = fitted(tmp_path, ours)
    trainer.fit_loop.max_epochs = 4
    trainer.fit(first, loader(), held_out())
    assert trainer.current_epoch == 4
    assert_calibrated(first)
    _, second = fitted(tmp_path / "second", ours)
    assert_calibrated(first)
    assert_calibrated(second)
    stranger = Net()
    with pytest.raises(RuntimeError, match="no training data"):
        make_trainer(tmp_path, ours).validate(stranger, held_out(), verbose=False)
    assert_calibrated(second)


def test_copies_keep_their_statistics(tmp_path):
    trainer, model = fitted(tmp_path)
    twin = copy.deepcopy(trainer.model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for each in (twin, loaded):
        assert_calibrated(each)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MeanSparseCallback, "_calibrate", None)  # it need not run
            make_trainer(tmp_path, MeanSparseCallback()).validate(each, held_out(), verbose=False)


# -------------------------------------------------------------------------------- kinds of trainer


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_barebones(tmp_path):
    model = Net()
    trainer = Trainer(
        barebones=True, max_epochs=1, accelerator="cpu", callbacks=[MeanSparseCallback()]
    )
    trainer.fit(model, loader(), held_out())
    assert_calibrated(model)


def test_fast_dev_run_is_fast_and_writes_nothing(tmp_path):
    model = Net()
    ours = MeanSparseCallback(save_to=tmp_path / "adapter")
    make_trainer(tmp_path, ours, fast_dev_run=True).fit(model, loader(), held_out())
    assert_calibrated(model, images=IMAGES[[0, 5, 10, 15]])
    assert not (tmp_path / "adapter").exists()


def test_progress_bar_does_not_mind(tmp_path, capsys):
    trainer, model = fitted(tmp_path, enable_progress_bar=True)
    trainer.test(model, held_out(), ckpt_path="best", verbose=False)
    assert_calibrated(model)


def test_mixed_precision_measures_in_float32(tmp_path):
    _, model = fitted(tmp_path, precision="bf16-mixed")
    assert_calibrated(model)


def test_true_half_precision_runs(tmp_path):
    trainer, model = fitted(tmp_path, precision="bf16-true")
    assert model.net[0].weight.dtype == torch.bfloat16
    assert all(op.var.dtype == torch.float32 and op.var.any() for op in operators(model).values())
    trainer.test(model, held_out(), ckpt_path="best", verbose=False)


@pytest.mark.slow
def test_compiled_module_runs_the_operators(tmp_path):
    model = Net()
    base = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, MeanSparseCallback(0.9))
    trainer.fit(torch.compile(model, backend="eager"), loader(), held_out())
    base.load_state_dict(model.state_dict())
    plain = copy.deepcopy(base)
    insert(base, describe(model))
    assert_calibrated(base, alpha=0.9)
    for each in (model, base, plain):
        each.eval()
    with torch.no_grad():
        assert torch.equal(model(IMAGES), base(IMAGES))
        assert not torch.equal(model(IMAGES), plain(IMAGES))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_give_the_statistics_of_one(tmp_path):
    def two(ours):
        ranks = DDPStrategy(start_method="fork", timeout=timedelta(seconds=60))
        return make_trainer(tmp_path, ours, devices=2, strategy=ranks)

    model = Net()
    trainer = two(MeanSparseCallback(save_to=tmp_path / "adapter"))
    trainer.fit(model, loader(drop_last=False), held_out())
    assert operators(model) == {}  # only weights come back from the processes
    assert load_adapter(model, tmp_path / "adapter").calibration["images"] == 21
    assert_calibrated(model)
    best = MeanSparseCallback(save_to=tmp_path / "best", dataloader=held_out())
    path = trainer.checkpoint_callback.best_model_path
    two(best).predict(Net(), held_out(), ckpt_path=path, return_predictions=False)
    loaded = Net.load_from_checkpoint(path)
    assert load_adapter(loaded, tmp_path / "best").calibration["images"] == 21
    assert_calibrated(loaded)


def test_spawned_processes_need_an_adapter_folder(tmp_path):
    ranks = DDPStrategy(start_method="fork")
    trainer = make_trainer(tmp_path, MeanSparseCallback(), devices=2, strategy=ranks)
    with pytest.warns(UserWarning, match="only weights come back"):
        MeanSparseCallback().setup(trainer, Net(), "fit")


# --------------------------------------------------------------------------------------- the data


class Augmented(Dataset):
    """Adds noise at every reading."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index):
        return DATA[index][0] + torch.rand(1), DATA[index][1]


def test_augmented_data_are_told(tmp_path):
    trainer = make_trainer(tmp_path, MeanSparseCallback(), max_epochs=1)
    with pytest.warns(UserWarning, match="augments it at random"):
        trainer.fit(Net(), loader(Augmented()), held_out())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler": SubsetRandomSampler([3, 1, 4, 15]), "shuffle": None}, [1, 3, 4, 15]),
        ({"batch_sampler": [[2, 7], [1]]}, [1, 2, 7]),
    ],
)
def test_only_the_selected_samples_count(tmp_path, options, expected):
    model = Net()
    train = DataLoader(DATA, **{"batch_size": 4, **options} if "sampler" in options else options)
    trainer = make_trainer(tmp_path, MeanSparseCallback(), max_epochs=1)
    trainer.fit(model, train, held_out())
    assert_calibrated(model, images=IMAGES[expected])


def test_max_batches_spreads_over_the_training_data(tmp_path):
    model = Net()
    trainer = make_trainer(tmp_path, MeanSparseCallback(max_batches=2), max_epochs=1)
    trainer.fit(model, loader(), held_out())
    assert_calibrated(model, images=IMAGES[[i * 21 // 8 for i in range(8)]])


def test_dict_batches(tmp_path):
    class Dicts(Net):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    items = [{"image": image, "label": label} for image, label in DATA]
    model = Dicts()
    trainer = make_trainer(tmp_path, MeanSparseCallback(), max_epochs=1)
    trainer.fit(model, loader(items), held_out())
    assert_calibrated(model)


def test_batch_hooks_apply_and_do_not_augment(tmp_path):
    class Hooked(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            noise = torch.rand(()) if self.trainer.training else 0.0
            return batch[0] * 2 + noise, batch[1]

    model = Hooked()
    make_trainer(tmp_path, MeanSparseCallback(), max_epochs=1).fit(model, loader(), held_out())
    assert_calibrated(model, images=IMAGES * 2)


class Stream(IterableDataset):
    """Samples without an index."""

    def __iter__(self):
        return iter(DATA)


def test_data_that_need_a_decision_ask_for_it(tmp_path):
    ask = r"MeanSparseCallback\(dataloader="
    for train in (DataLoader(Stream(), batch_size=4), {"a": loader(), "b": loader()}):
        trainer = make_trainer(tmp_path, MeanSparseCallback(), max_epochs=1)
        with pytest.raises((TypeError, RuntimeError), match=ask):
            trainer.fit(Net(), train, held_out())
    model = Net()
    ours = MeanSparseCallback(max_batches=5)
    trainer = make_trainer(tmp_path, ours, max_epochs=1)
    trainer.fit(model, DataLoader(Stream(), batch_size=4), held_out())
    assert_calibrated(model, images=IMAGES[:20])


# -------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"alpha": -1}, ValueError, "alpha"),
        ({"alpha": {"*": float("nan")}}, ValueError, "alpha"),
        ({"center": "median"}, ValueError, "center"),
        ({"statistics": "exact"}, ValueError, "statistics"),
        ({"max_batches": 0}, ValueError, "max_batches"),
        ({"dataloader": iter([1])}, TypeError, "only once"),
    ],
)
def test_arguments_are_checked_at_once(options, error, match):
    with pytest.raises(error, match=match):
        MeanSparseCallback(**options)


def test_setups_that_cannot_work_fail_before_training(tmp_path):
    class NoForward(Net):
        forward = LightningModule.forward

    with pytest.raises(RuntimeError, match="MeanSparseCallback"):  # Lightning's own check
        make_trainer(tmp_path, MeanSparseCallback(), MeanSparseCallback(0.1))
    with pytest.raises(ValueError, match="def forward"):
        make_trainer(tmp_path, MeanSparseCallback()).fit(NoForward(), loader(), held_out())
    (tmp_path / "file").write_text("")
    ours = MeanSparseCallback(save_to=tmp_path / "file")
    with pytest.raises(ValueError, match="save_to"):
        make_trainer(tmp_path, ours).fit(Net(), loader(), held_out())


def test_alpha_per_site_center_and_statistics_reach_the_adapter(tmp_path):
    ours = MeanSparseCallback(
        {"*": 0.1, "net.4@in": 0.3},
        center="global",
        statistics="official",
        save_to=tmp_path / "adapter",
        base="org/net",
    )
    fitted(tmp_path, ours)
    adapter = read_adapter(tmp_path / "adapter")
    assert dict(zip(map(str, adapter.sites), adapter.alphas, strict=True)) == {
        "2@in": 0.1,
        "4@in": 0.3,
    }
    assert (adapter.center, adapter.statistics) == ("global", "official")
    assert adapter.source == "org/net"
