"""Several models and trainers, kinds of trainers and data, and the arguments of the callback."""

import copy
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import (
    LightningModule,
    Trainer,
)
from lightning.pytorch.strategies import DDPStrategy
from runs import (
    DATA,
    IMAGES,
    Net,
    assert_calibrated,
    fitted,
    held_out,
    loader,
    make_trainer,
)
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
)

from lightning_meansparse.adapter import load_adapter, read_adapter
from lightning_meansparse.adapter.models import describe, insert
from lightning_meansparse.callback import MeanSparseCallback
from lightning_meansparse.surgery import operators

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists"),
    pytest.mark.filterwarnings("ignore:.*outside the 'fit' stage"),
]


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


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_processes_whose_batch_norms_differ_measure_the_model_that_is_kept(tmp_path):
    """After the last training step nothing brings running statistics together but a validation."""
    ranks = DDPStrategy(start_method="fork", timeout=timedelta(seconds=60))
    ours = MeanSparseCallback(save_to=tmp_path / "adapter")
    model = Net()
    options = {"callbacks": [ours], "enable_checkpointing": False, "limit_val_batches": 0}
    trainer = make_trainer(tmp_path, devices=2, strategy=ranks, **options)
    trainer.fit(model, loader(drop_last=False), held_out())
    load_adapter(model, tmp_path / "adapter")
    assert_calibrated(model)


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
        {"*": 0.1, "net.5@in": 0.3},
        center="global",
        statistics="official",
        save_to=tmp_path / "adapter",
        base="org/net",
    )
    fitted(tmp_path, ours)
    adapter = read_adapter(tmp_path / "adapter")
    assert dict(zip(map(str, adapter.sites), adapter.alphas, strict=True)) == {
        "2@in": 0.1,
        "5@in": 0.3,
    }
    assert (adapter.center, adapter.statistics) == ("global", "official")
    assert adapter.source == "org/net"
