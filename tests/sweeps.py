"""A small network, data that attacks can break it on, and sweeps over it."""

import copy
from functools import cache

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW

from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.tasks import AdversarialTraining, AlphaSweep

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


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


FGSM = {"attack": "fgsm", "rule": "identity", "kind": "adaptive"}
"""The cheapest attack that may choose alpha."""

CHEAP = [
    {"attack": "pgd", "options": {"steps": 2}},
    {"attack": "square", "options": {"n_queries": 5}},
    {"attack": "adaptive-ce", "name": "adaptive", "options": {"steps": 2}},
]


@cache
def trained_network():
    """A network that has learned something, so that attacks have something to break."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = net()
        task = AdversarialTraining(
            network, method="none", eps=EPS, optimizer=lambda p: AdamW(p, lr=0.02)
        )
        trainer(max_epochs=4, limit_val_batches=0).fit(task, data(train=200))
    return network.eval()


def sweep_of(model=None, **options):
    defaults = {"alphas": [0.3, 1.0], "attacks": CHEAP, "eps": 0.03, "check_images": 0}
    network = trained_network() if model is None else model
    return AlphaSweep(copy.deepcopy(network), **{**defaults, **options})
