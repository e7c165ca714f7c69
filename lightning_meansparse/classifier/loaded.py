"""What the libraries' loaders share: their result, names of classes, weights that are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

Options = Mapping[str, Any]

# How the libraries' arguments that fetch or open weights begin.
WEIGHTS = ("checkpoint", "pretrained", "weights")


@dataclass(frozen=True)
class Loaded:
    """A model with what its library says about it.

    Args:
        model: The module.
        num_classes: Number of logits.
        mean: Per channel; None if the library does not say.
        std: Per channel; None if the library does not say.
        input_size: `(C, H, W)`; None if the library does not say.
        origin: How `build` makes the same architecture again, as JSON types.
        normalisation: Where mean and std come from.
        labels: Names of the classes that the weights know; None if nothing names them.
        bgr: The model takes blue first.
        revision: The commit, where known; of torchvision, the name of the weights.
    """

    model: nn.Module
    num_classes: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    input_size: tuple[int, int, int] | None
    origin: dict[str, Any]
    normalisation: str
    labels: tuple[str, ...] | None = None
    bgr: bool = False
    revision: str | None = None


def fetched_commit(repo_id: str, revision: str | None) -> str | None:
    """The commit whose weights lie in the Hub's cache for a branch, a tag or a commit."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model.safetensors", "pytorch_model.bin"):
        found = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def for_channels(numbers: Sequence[float], channels: int) -> list[float]:
    """Fit the normalisation of colour images to other channels: their mean, for each.

    timm adds up a colour stem's weights for grey images, so this is what that stem expects.
    """
    if len(numbers) == channels:
        return list(numbers)
    return [sum(numbers) / len(numbers)] * channels


def label_names(
    names: Any, classes: int, descriptions: Mapping[str, str] | None = None
) -> tuple[str, ...] | None:
    """Name every class: a list of names, or a mapping from the class's number; None if any lacks.

    Transformers' own `LABEL_0`, `LABEL_1`, … are no names.
    """
    if isinstance(names, Mapping):
        numbered = {str(number): name for number, name in names.items()}
        names = [numbered.get(str(number)) for number in range(classes)]
    if not names or len(names) != classes or not all(isinstance(name, str) for name in names):
        return None
    if all(name == f"LABEL_{number}" for number, name in enumerate(names)):
        return None
    return tuple(str((descriptions or {}).get(name, name)) for name in names)


def require_safetensors(folder: Path) -> None:
    """Refuse a folder whose weights would have to be unpickled.

    Raises:
        FileNotFoundError: If it has no safetensors, or does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if any(folder.glob("*.safetensors")):
        return
    endings = (".bin", ".pt", ".pth", ".ckpt")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in endings)
    found = f"; {', '.join(pickles)} may run code and is not opened" if pickles else ""
    raise FileNotFoundError(
        f"{folder} has no *.safetensors{found}; save the weights as safetensors "
        "(timm: safe_serialization=True)"
    )


def refuse_weights(architecture: str, options: Options) -> None:
    """Refuse what a file may not choose: weights, which may be pickles or on a server."""
    if ":" in architecture:
        raise ValueError(
            f"{architecture!r} is no architecture but a place to fetch one from; name it as in "
            "'timm/resnet18'"
        )
    found = sorted(key for key in options if key.startswith(WEIGHTS))
    if found:
        raise ValueError(
            f"{', '.join(found)} would fetch or open other weights than model.safetensors; take it "
            "out of the options"
        )
