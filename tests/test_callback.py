"""Every way through a Trainer ends with statistics of the weights that the model holds."""

import copy
import signal

import pytest
import timm
import torch
from lightning.pytorch import (
    Callback,
    LightningDataModule,
    seed_everything,
)
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    StochasticWeightAveraging,
)
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, RandomDataset
from runs import (
    DATA,
    IMAGES,
    InFit,
    Net,
    assert_calibrated,
    assert_weights,
    fitted,
    held_out,
    loader,
    make_trainer,
    weights,
)
from torch import nn
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from lightning_meansparse.adapter import load_adapter
from lightning_meansparse.callback import MeanSparseCallback
from lightning_meansparse.surgery import alphas, operators, restore_, set_alpha

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*outside the 'fit' stage"),
]

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


class Held(DemoModel):
    """A function that the object holds has no source that could be written anew."""

    def __init__(self) -> None:
        super().__init__()
        self.code = lambda x: torch.relu(self.l1(x.view(x.size(0), -1)))

    def forward(self, x):
        return self.code(x)


def test_a_functional_activation_is_calibrated(tmp_path):
    model = DemoModel()
    images = RandomDataset(32, 8)
    trainer = make_trainer(tmp_path, callbacks=[MeanSparseCallback()])
    trainer.fit(model, DataLoader(images))
    assert list(operators(model)) == ["::relu[0]@in"]
    expected = model.l1(images.data).mean(0)
    torch.testing.assert_close(operators(model)["::relu[0]@in"].mean, expected)


def test_an_activation_that_cannot_be_reached_is_an_error_before_training(tmp_path):
    model = Held()
    before = weights(model)
    trainer = make_trainer(tmp_path, callbacks=[MeanSparseCallback()])
    with pytest.raises(ValueError, match="relu"):
        trainer.fit(model, DataLoader(RandomDataset(32, 8)))
    assert_weights(model, before)


def test_a_glob_without_a_site_is_an_error_before_training(tmp_path):
    model = Net()
    before = weights(model)
    trainer = make_trainer(tmp_path, MeanSparseCallback({"net.*": 0.1, "layer*": 0.3}))
    with pytest.raises(ValueError, match=r"alpha: 'layer\*' matches none of net.2@in, net.5@in"):
        trainer.fit(model, loader(), held_out())
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
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert_weights(model, torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"])
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
    set_alpha(model, {"net.5@in": 0.5})
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
    ours = MeanSparseCallback(where="net.5@in", dataloader=held_out())
    make_trainer(tmp_path, ours).test(
        fresh, held_out(), ckpt_path=tmp_path / "after.ckpt", verbose=False
    )
    assert_calibrated(fresh, sites=["net.5@in"])


def test_a_model_with_statistics_keeps_its_alpha_and_says_so(tmp_path, caplog):
    _, model = fitted(tmp_path)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, MeanSparseCallback(0.5)).test(model, held_out(), verbose=False)
    assert_calibrated(model, alpha=0.2)
    assert "set_alpha(model, 0.5)" in caplog.text


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


@pytest.mark.parametrize("first", [True, False])
def test_interrupted_averaging_does_not_mix_up_tensors(tmp_path, first):
    both = [EMAWeightAveraging(decay=0.5), MeanSparseCallback()]
    trainer = make_trainer(tmp_path, *(both if first else both[::-1]), Interrupt())
    model, before = Net(), signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            trainer.fit(model, loader(), held_out())
    finally:
        signal.signal(signal.SIGINT, before)
    raw = weights(model)
    trainer.validate(model, held_out(), verbose=False)
    assert_weights(model, raw)
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


def test_an_empty_mapping_sets_nothing_and_is_refused():
    with pytest.raises(ValueError, match="nothing to set"):
        MeanSparseCallback({})
