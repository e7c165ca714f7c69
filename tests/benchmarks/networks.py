"""Small robust networks other than the demo checkpoint, trained in minutes on Fashion-MNIST.

    python -m tests.benchmarks.networks resnet --output outputs/networks

`tests.benchmarks.hostile` tries attacks on them, because a suite that was built on one network may
hold on that one alone. A network is written as its weights and its statistics.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from lightning_meansparse import (
    AdversarialTraining,
    calibrate_,
    find_sites,
    load_adapter,
    load_classifier,
    save_adapter,
    sparsify_,
)
from lightning_meansparse.data import ImageDataModule
from lightning_meansparse.networks import CifarResNet

DATA = "/usr/share/datasets/fashion-mnist"


@dataclass(frozen=True)
class Network:
    """How one is built and trained."""

    kind: str
    norm: str
    eps: float
    epochs: int
    rate: float

    def build(self) -> nn.Module:
        """With fresh weights."""
        if self.kind == "resnet":  # ReLU, BatchNorm, sums before activations
            return CifarResNet((1, 1, 1), width=10, in_chans=1)
        return VisionTransformer(  # GELU, LayerNorm, attention
            img_size=28,
            patch_size=4,
            in_chans=1,
            num_classes=10,
            embed_dim=64,
            depth=3,
            num_heads=4,
        )


NETWORKS = {
    "resnet": Network("resnet", "Linf", 0.1, epochs=4, rate=0.01),
    "vit": Network("vit", "Linf", 0.1, epochs=8, rate=0.002),
    "resnet-l2": Network("resnet", "L2", 1.0, epochs=4, rate=0.01),
}


def load(name: str, folder: Path) -> nn.Module:
    """The trained network with its operators, as a classifier at α = 0."""
    model = NETWORKS[name].build()
    model.load_state_dict(load_file(folder / name / "weights.safetensors"))
    classifier = load_classifier(model)
    load_adapter(classifier, folder / name / "adapter")
    return classifier


def train(name: str, folder: Path) -> None:
    """Train one, measure its statistics, and write both."""
    network = NETWORKS[name]
    seed_everything(0)
    data = ImageDataModule(DATA, batch_size=256, holdout=0.1, seed=0)
    classifier = load_classifier(network.build())
    task = AdversarialTraining(
        classifier,
        eps=network.eps,
        norm=network.norm,
        steps=5,
        step_size=network.eps / 2,
        optimizer=partial(torch.optim.AdamW, lr=network.rate, weight_decay=1e-4),
        lr_scheduler=partial(OneCycleLR, max_lr=network.rate),
        lr_interval="step",
    )
    Trainer(
        max_epochs=network.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=4,
        num_sanity_val_steps=0,
    ).fit(task, datamodule=data)
    classifier = task.classifier.eval()
    (folder / name).mkdir(parents=True, exist_ok=True)
    save_file(classifier.model.state_dict(), folder / name / "weights.safetensors")
    images, _ = next(iter(data.calibration_dataloader()))
    sparsify_(classifier, find_sites(classifier, images[:2]))
    calibrate_(classifier, (images for images, _ in data.calibration_dataloader()))
    save_adapter(classifier, folder / name / "adapter", base=name)


def main() -> None:
    """Train what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=NETWORKS)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.names:
        train(name, args.output)


if __name__ == "__main__":
    main()
