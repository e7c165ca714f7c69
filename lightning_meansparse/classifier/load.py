"""load_classifier: from a name, a folder or a module to a Classifier."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_meansparse.classifier.folder import FORMAT, load_folder, read_config
from lightning_meansparse.classifier.hugging_face import load_transformers
from lightning_meansparse.classifier.libraries import load_timm, load_torchvision
from lightning_meansparse.classifier.loaded import Loaded
from lightning_meansparse.classifier.pixels import UnknownNormalisationError
from lightning_meansparse.classifier.wrapper import Classifier, PerChannel

_log = logging.getLogger(__name__)

_PREFIXES = (
    "'timm/resnet18', 'torchvision/resnet18', 'hf/organisation/name' for transformers models on "
    "the Hub, 'timm/hf-hub:organisation/name' for timm models there, "
    "'meansparse/organisation/name' for an adapter there, or a folder"
)


def load_classifier(
    name_or_module: str | Path | nn.Module,
    *,
    pretrained: bool = True,
    num_classes: int | None = None,
    in_chans: int | None = None,
    mean: PerChannel | None = None,
    std: PerChannel | None = None,
    input_size: Sequence[int] | None = None,
    revision: str | None = None,
    **options: Any,
) -> Classifier:
    """Make a classifier of pixels in [0, 1] out of a model's name, folder or module.

    The normalisation comes from where the model comes from (timm's `pretrained_cfg`, the image
    processor of transformers, the transforms of torchvision's weights), unless given; the
    classifier's `normalisation` and one line of the log say which it was. The names of the classes
    that the weights know are its `labels`. Models found by name are returned in eval mode; a module
    keeps its own.

    Args:
        name_or_module: `"timm/NAME"`, `"torchvision/NAME"`, `"hf/ORGANISATION/NAME"`;
            `"meansparse/ORGANISATION/NAME"` for what this package put there: an adapter, whose base
            is fetched at its recorded commit, checked and sparsified, or a classifier; a folder
            written by `save_adapter`, `save_classifier`, timm or transformers; a module, whose
            input is then pixels normalised by `mean` and `std`; or a Classifier, which is returned
            as it is.
        pretrained: Load weights. False gives the architecture with random weights.
        num_classes: Number of classes; other than the weights' gets a new, random head (timm, hf).
        in_chans: Channels of the images, where the library can adapt them.
        mean: One number or one per channel; with `std` replaces the source's normalisation.
        std: One number or one per channel.
        input_size: `(C, H, W)`; replaces what the source says the model is meant for.
        revision: Commit, tag or branch on the Hub.
        **options: Further arguments of the library's own function, such as `img_size=64` for timm.

    Returns:
        The classifier.

    Raises:
        ValueError: If there is no such model (with close names), options contradict the weights, or
            nothing says how pixels are normalised.
        TypeError: If `name_or_module` is of another kind.
        FileNotFoundError: If a folder has no configuration or no safetensors. Nothing is unpickled.
        RuntimeError: If the Hub cannot be reached.

    Examples:
        >>> import torch
        >>> classifier = load_classifier("timm/test_resnet", pretrained=False, num_classes=10)
        >>> classifier(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 10])
        >>> classifier.mean.flatten()
        tensor([0.5000, 0.5000, 0.5000])
    """
    _check_count("num_classes", num_classes)
    _check_count("in_chans", in_chans, most=4)
    construction = {"num_classes": num_classes, "in_chans": in_chans, **options}
    given = {
        key: value
        for key, value in {**construction, "revision": revision}.items()
        if value is not None
    }
    if isinstance(name_or_module, Classifier):
        shape = {"mean": mean, "std": std, "input_size": input_size}
        given |= {key: value for key, value in shape.items() if value is not None}
        _refuse(given, "a Classifier is returned as it is")
        return name_or_module
    if (mean is None) != (std is None) and not isinstance(name_or_module, nn.Module):
        raise ValueError("give mean= and std= together, or neither")
    if isinstance(name_or_module, nn.Module):
        given.pop("num_classes", None)
        _refuse(given, "a module is taken as it is")
        return _told(
            Classifier(
                name_or_module,
                mean=mean,
                std=std,
                num_classes=num_classes,
                input_size=input_size,
            )
        )
    if not isinstance(name_or_module, str | Path):
        raise TypeError(
            f"name_or_module must be {_PREFIXES}, a module or a Classifier, "
            f"got {type(name_or_module).__name__}"
        )
    if _names_adapter(name_or_module):
        shape = {"mean": mean, "std": std, "input_size": input_size}
        given |= {key: value for key, value in shape.items() if value is not None}
        given |= {} if pretrained else {"pretrained": False}
        given.pop("revision", None)
        _refuse(given, "an adapter says how its base is loaded")
        # The adapter's room is built upon this one, so it is asked for by its name.
        door = import_module("lightning_meansparse.adapter")
        sparsified: Classifier = door.load_published(str(name_or_module), revision=revision)
        return _told(sparsified)
    if not pretrained and revision is not None:
        raise ValueError(f"revision={revision!r} chooses weights, but pretrained=False loads none")
    library, _, model_name = str(name_or_module).partition("/")
    found: Classifier | Loaded
    if isinstance(name_or_module, Path) or library not in ("timm", "torchvision", "hf"):
        folder = Path(name_or_module).expanduser()
        config = _folder_config(folder, str(name_or_module))
        if config.get("format") == FORMAT:
            _refuse(given | ({} if pretrained else {"pretrained": False}), f"{folder} says it all")
            found = load_folder(folder, config)
        else:
            if revision is not None:
                raise ValueError(f"revision={revision!r}, but {folder} is a folder")
            if not config.keys() & {"model_type", "architecture"}:
                raise ValueError(
                    f"{folder}/config.json names neither an 'architecture', as timm's do, nor a "
                    "'model_type', as those of transformers do"
                )
            library = "hf" if "model_type" in config else "timm"
            model_name = str(folder) if library == "hf" else f"local-dir:{folder}"
            found = _from_library(library, model_name, pretrained, None, construction, mean is None)
    else:
        found = _from_library(library, model_name, pretrained, revision, construction, mean is None)
    classifier = Classifier(
        found.model,
        mean=found.mean if mean is None else mean,  # type: ignore[arg-type]
        std=found.std if std is None else std,  # type: ignore[arg-type]
        bgr=found.bgr and mean is None,
        normalisation=found.normalisation if mean is None else None,
        num_classes=found.num_classes,
        labels=found.labels if pretrained else None,
        input_size=found.input_size if input_size is None else input_size,
        source=str(name_or_module),
        revision=found.revision,
        options=None if isinstance(found, Classifier) else _plain(construction),
        origin=found.origin,
        metrics=found.metrics if isinstance(found, Classifier) else None,
    )
    return _told(classifier.eval())


def _names_adapter(name: str | Path) -> bool:
    if isinstance(name, str) and name.startswith("meansparse/"):
        return True
    folder = Path(name).expanduser()
    return folder.is_dir() and (folder / "meansparse_config.json").is_file()


def _plain(options: dict[str, Any]) -> dict[str, Any] | None:
    """The options as JSON values; None if there are others. Weights go by `revision`."""
    kept = {key: value for key, value in options.items() if value is not None and key != "weights"}
    try:
        plain: dict[str, Any] = json.loads(json.dumps(kept, allow_nan=False))
    except (TypeError, ValueError):
        return None
    return plain


def _told(classifier: Classifier) -> Classifier:
    """Say which normalisation it is."""
    name = classifier.source or type(classifier.model).__name__
    mean, std = _numbers(classifier.mean), _numbers(classifier.std)
    if classifier.normalisation == "none":
        _log.info("%s: pixels go in as they are, not normalised (mean= and std= would)", name)
    else:
        order = ", blue first" if classifier.bgr else ""
        source = classifier.normalisation
        _log.info("%s: mean %s, std %s%s, from: %s", name, mean, std, order, source)
    return classifier


def _numbers(values: Tensor) -> str:
    """One number per channel, or one for all."""
    texts = [f"{value:.4g}" for value in values.flatten().tolist()]
    return texts[0] if len(set(texts)) == 1 else ", ".join(texts)


def _from_library(
    library: str,
    name: str,
    pretrained: bool,
    revision: str | None,
    options: dict[str, Any],
    normalise: bool,
) -> Loaded:
    if library == "torchvision" and revision is not None:
        raise ValueError(
            f"revision={revision!r}, but torchvision's weights have names: give weights="
        )
    try:
        if library == "timm":
            return load_timm(name, pretrained=pretrained, revision=revision, options=options)
        if library == "torchvision":
            return load_torchvision(name, pretrained=pretrained, options=options)
        return load_transformers(
            name, pretrained=pretrained, revision=revision, options=options, normalise=normalise
        )
    except Exception as error:
        if type(error) in (FileNotFoundError, ImportError, UnknownNormalisationError):
            raise  # our own, which say what to do
        reason = " ".join(str(error).split()) or type(error).__name__
        folder = name.removeprefix("local-dir:")
        if (library == "hf" and Path(name).is_dir()) or folder != name:
            # The libraries fail in many ways when a file is damaged or two do not fit.
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(
                f"{folder} makes no classifier of {library}: {kind}{reason:.600}"
            ) from error
        # The libraries' OSErrors, and what httpx or httpx2 raises below them: it was not fetched.
        foreign = type(error).__module__.startswith(("httpx", "huggingface_hub"))
        if foreign or isinstance(error, OSError):
            raise RuntimeError(
                f"{library}/{name} could not be fetched ({reason:.300}); check the name and the "
                "connection, or give a folder or pretrained=False"
            ) from error
        raise


def _folder_config(folder: Path, name: str) -> dict[str, Any]:
    if name and folder.is_dir():
        return read_config(folder)
    if name and folder.exists():
        raise ValueError(
            f"{name!r} is a file; give the folder that holds config.json and model.safetensors. "
            "Pickled checkpoints (.pt, .pth, .bin, .ckpt) may run code and are not opened"
        )
    import timm

    close = get_close_matches(name, timm.list_models(), n=3)
    hint = f" Did you mean: {', '.join(f'timm/{match}' for match in close)}?" if close else ""
    raise ValueError(f"name_or_module={name!r} is no folder and no name: give {_PREFIXES}.{hint}")


def _check_count(name: str, value: object, most: int = 2**31) -> None:
    if value is not None and not (type(value) is int and 1 <= value <= most):
        wanted = "a positive integer" if most > 4 else f"1 to {most}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _refuse(given: dict[str, Any], reason: str) -> None:
    if given:
        shown = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"{reason}; {shown} would have no effect, leave it out")
