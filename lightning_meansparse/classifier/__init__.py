"""The one door for pixels: images in [0, 1] in, logits out, whatever library the model is from.

`wrapper` is the door, `load` finds models by name, `libraries` knows timm and torchvision,
`hugging_face` transformers and `pixels` its image processors, `folder` is our own file format.
"""

from __future__ import annotations

from lightning_meansparse.classifier.folder import save_classifier
from lightning_meansparse.classifier.load import load_classifier
from lightning_meansparse.classifier.pixels import UnknownNormalisationError
from lightning_meansparse.classifier.wrapper import Classifier

__all__ = ["Classifier", "UnknownNormalisationError", "load_classifier", "save_classifier"]
