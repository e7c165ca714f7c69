"""A small module, its data and its Trainer, for the tests of the callback."""

import copy

import torch
from lightning.pytorch import (
    Callback,
    LightningModule,
    Trainer,
)
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from lightning_meansparse.callback import MeanSparseCallback
from lightning_meansparse.surgery import alphas, operators, restore_

IMAGES = torch.rand(21, 1, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(IMAGES, torch.arange(21) % 3)
SITES = ["net.2@in", "net.5@in"]


class Net(LightningModule):
    """Knows nothing of us. Its best checkpoint is that of the first epoch, not the last."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3),
            nn.BatchNorm2d(5),  # after an operator: whoever pairs buffers by position mixes it up
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
