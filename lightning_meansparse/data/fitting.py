"""The transform that a classifier was evaluated with, ending in pixels in [0, 1].

A library's transform ends in normalised pixels, and the classifier normalises itself, so that is
undone here: `pixels = transform(image) * std + mean`, which are k / 255 again where the library
resizes in 8 bits, as all do with Pillow's images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from lightning_meansparse.classifier import Classifier, load_classifier
from lightning_meansparse.classifier.loaded import for_channels
from lightning_meansparse.classifier.pixels import measure
from lightning_meansparse.data.pixels import Array

Transform = Callable[[Image.Image], Any]


@dataclass(frozen=True)
class EvalTransform:
    """Images through a library's transform, without its normalisation.

    Args:
        transform: Takes a Pillow image, gives normalised pixels `(C, H, W)`.
        mean: What it subtracts from pixels in [0, 1], per channel, in the order it gives them.
        std: What it divides by after that.
        bgr: It puts blue first.
        name: Whose it is, for errors.
    """

    transform: Transform
    mean: Sequence[float]
    std: Sequence[float]
    bgr: bool
    name: str

    def __call__(self, images: Array) -> Array:
        """Return images `(N, C, H, W)` at the model's size, uint8 or float32 in [0, 1].

        Raises:
            ValueError: If they do not have 8 bits per channel, which is what libraries transform.
        """
        if images.dtype != np.uint8:
            raise ValueError(
                f"the eval transform of {self.name} takes images of 8 bits per channel, got "
                f"{images.dtype}; give size= instead of classifier="
            )
        given = np.stack([np.asarray(self.transform(_pillow(image))) for image in images])
        mean, std = (np.array(n, np.float64)[:, None, None] for n in (self.mean, self.std))
        pixels = given * std + mean
        if self.bgr:
            pixels = pixels[:, ::-1]
        levels = np.rint(pixels * 255)
        if np.allclose(pixels * 255, levels, rtol=0, atol=1e-3):
            return levels.clip(0, 255).astype(np.uint8)
        # Where a library resizes floats, bicubic overshoots at edges.
        unit: Array = pixels.clip(0, 1).astype(np.float32)
        return unit


def eval_transform(classifier: Classifier) -> EvalTransform:
    """Find the eval transform of a classifier: timm's, torchvision's, or an image processor.

    Raises:
        ValueError: If its configuration does not say.
    """
    name = classifier.source or type(classifier.model).__name__
    library, _, short = name.partition("/")
    model: Any = classifier.model
    config = getattr(model, "config", None)  # of transformers, also around a model of timm
    of_timm = getattr(model if config is None else config, "pretrained_cfg", None)
    if of_timm:
        return _of_timm(dict(of_timm), classifier, name)
    if library == "torchvision":
        return _of_torchvision(short, classifier.revision, name)
    if library == "hf" and config is not None:
        return _of_transformers(short, classifier, name)
    raise ValueError(
        f"classifier={name} comes with no eval transform of timm, torchvision or transformers; "
        "give size= instead"
    )


def named(classifier: Classifier | str) -> Classifier:
    """The classifier, or without its weights the one that a name stands for."""
    if isinstance(classifier, str):
        if classifier.partition("/")[0] in ("timm", "torchvision", "hf"):
            return load_classifier(classifier, pretrained=False)
        return load_classifier(classifier)  # a folder, which has its weights in it
    if not isinstance(classifier, Classifier):
        raise TypeError(
            "classifier must be what load_classifier gives, or a name such as 'timm/resnet18', got "
            f"{type(classifier).__name__}"
        )
    return classifier


def _of_timm(config: dict[str, Any], classifier: Classifier, name: str) -> EvalTransform:
    from timm.data.config import resolve_data_config
    from timm.data.transforms_factory import create_transform

    given = {"input_size": classifier.input_size} if classifier.input_size else {}
    known: Any = resolve_data_config(given, pretrained_cfg=config)  # type: ignore[no-untyped-call]
    channels = known["input_size"][0]
    mean, std = (for_channels(known[key], channels) for key in ("mean", "std"))
    transform: Any = create_transform(**{**known, "mean": mean, "std": std}, is_training=False)
    return EvalTransform(transform, mean, std, False, name)


def _of_torchvision(short: str, weights: str | None, name: str) -> EvalTransform:
    from torchvision import models

    known: Any = models.get_model_weights(short)
    preset = known[weights or "DEFAULT"].transforms()
    return EvalTransform(preset, preset.mean, preset.std, False, name)


def _of_transformers(short: str, classifier: Classifier, name: str) -> EvalTransform:
    import transformers

    factory: Any = transformers.AutoImageProcessor
    processor = factory.from_pretrained(
        short, revision=classifier.revision, trust_remote_code=False
    )
    does = measure(processor, classifier.in_chans or 3)

    def transform(image: Image.Image) -> Any:
        return processor(images=[image], return_tensors="np")["pixel_values"][0]

    return EvalTransform(transform, does.mean, does.std, does.bgr, name)


def _pillow(image: Array) -> Image.Image:
    if len(image) == 1:
        return Image.fromarray(image[0])
    return Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
