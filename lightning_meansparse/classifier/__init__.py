"""The one door for pixels: images in [0, 1] in, logits out, whatever library the model is from.

`wrapper` is the door, `load` finds models by name, `libraries` knows timm, torchvision and Hugging
Face transformers, `folder` is our own file format.
"""

from __future__ import annotations

from lightning_meansparse.classifier.folder import save_classifier
from lightning_meansparse.classifier.load import load_classifier
from lightning_meansparse.classifier.wrapper import Classifier

__all__ = ["Classifier", "load_classifier", "save_classifier"]
