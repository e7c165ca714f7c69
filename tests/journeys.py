"""From training to the Hub: a timm ConvNeXt, a ViT of transformers and a ResNet of torchvision."""

import copy
from pathlib import Path

import torch
from huggingface_hub import create_repo, upload_folder
from lightning.pytorch import Trainer
from timm.models import push_to_hf_hub
from torch.utils.data import DataLoader, TensorDataset

from lightning_meansparse import AdversarialTraining, MeanSparseCallback, load_classifier, restore_
from lightning_meansparse.classifier import Classifier, save_classifier

# Where each base is published; torchvision has no place on the Hub, so that one goes as our folder.
BASES = {
    "convnext": "timm/hf-hub:org/convnext",
    "vit": "hf/org/vit",
    "resnet": "meansparse/org/resnet",
}
# What a fresh process does: images from a file, logits of every kind into another.
LOAD = """
import sys, torch
torch.set_num_threads(1)
from lightning_meansparse import load_classifier
images = torch.load(sys.argv[1])
logits = {name: load_classifier(f"meansparse/org/{name}-sparse")(images) for name in sys.argv[3:]}
torch.save(logits, sys.argv[2])
"""
IMAGES = torch.linspace(0, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32).sin()


def untrained(kind: str, folder: Path) -> Classifier:
    if kind == "convnext":
        return load_classifier("timm/test_convnext", pretrained=False, num_classes=5)
    if kind == "resnet":
        return load_classifier("torchvision/resnet18", pretrained=False, num_classes=5)
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size=32).save_pretrained(folder)
    return load_classifier(f"hf/{folder}")


def train(kind: str, folder: Path) -> tuple[Classifier, Path]:
    """A trained and sparsified classifier, and the Lightning checkpoint that holds it."""
    torch.manual_seed(0)
    module = AdversarialTraining(
        untrained(kind, folder / f"untrained_{kind}"), method="none", eps=0.1
    )
    loader = DataLoader(TensorDataset(torch.rand(16, 3, 32, 32), torch.arange(16) % 5), 8)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[MeanSparseCallback(alpha=0.3, base=BASES[kind])],
        default_root_dir=folder,
    )
    trainer.fit(module, loader, loader)
    checkpoint = folder / f"{kind}.ckpt"
    trainer.save_checkpoint(checkpoint)
    return module.classifier.eval(), checkpoint


def publish_base(kind: str, classifier: Classifier, folder: Path) -> None:
    """Each by its own library, as its users do."""
    base = copy.deepcopy(classifier)
    restore_(base)
    repo_id = BASES[kind].rpartition(":")[2].split("/", 1)[-1] if kind != "convnext" else ""
    if kind == "convnext":
        push_to_hf_hub(base.model, "org/convnext", safe_serialization=True)
    elif kind == "vit":
        from transformers import ViTImageProcessor

        base.model.push_to_hub(repo_id)
        ViTImageProcessor(size=32).push_to_hub(repo_id)
    else:
        create_repo(repo_id)
        upload_folder(folder_path=save_classifier(base, folder / repo_id), repo_id=repo_id)
