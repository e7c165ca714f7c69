"""Our own folder: `config.json`, which says how to build the model, and `model.safetensors`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from lightning_meansparse.classifier.libraries import build
from lightning_meansparse.classifier.loaded import require_safetensors
from lightning_meansparse.classifier.wrapper import Classifier
from lightning_meansparse.demo.network import ConvNet

FORMAT = "lightning_meansparse.classifier"
FORMAT_VERSION = 2  # 1 knew neither labels, normalisation nor bgr
READABLE = (1, 2)
# Classes that a config.json may name, with the arguments that are attributes of the same name. Only
# these are built: a file must not be able to call what it likes.
CLASSES: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "lightning_meansparse.demo.ConvNet": (ConvNet, ("in_chans", "num_classes", "width")),
}


def save_classifier(
    classifier: Classifier, directory: str | Path, *, metrics: Mapping[str, Any] | None = None
) -> Path:
    """Write a classifier so that `load_classifier(directory)` builds it again, without a network.

    Operators in the model are not written, as their tensors belong to an adapter.

    Args:
        classifier: Around a model that `load_classifier` built by name, or around
            `lightning_meansparse.demo.ConvNet`.
        directory: Is made if needed; `config.json` and `model.safetensors` in it are replaced, each
            in one step.
        metrics: JSON values to keep beside the weights, such as accuracies and how they were
            measured; None keeps `classifier.metrics`.

    Returns:
        The directory.

    Raises:
        TypeError: If `classifier` is no Classifier.
        ValueError: If nothing says how to build the model again, or a value is no JSON.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from lightning_meansparse.classifier import load_classifier
        >>> with TemporaryDirectory() as folder:
        ...     path = save_classifier(load_classifier(ConvNet(width=4)), folder)
        ...     load_classifier(path).model.width
        4
    """
    if not isinstance(classifier, Classifier):
        raise TypeError(f"classifier must be a Classifier, got {type(classifier).__name__}")
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **_origin(classifier),
        "num_classes": classifier.num_classes,
        "input_size": classifier.input_size,
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "bgr": classifier.bgr,
        "normalisation": classifier.normalisation,
        "labels": classifier.labels,
        "metrics": dict(classifier.metrics if metrics is None else metrics),
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"metrics and options must be plain JSON values: {error}") from error
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / "model.safetensors", lambda path: save_model(classifier.model, str(path)))
    _replace(folder / "config.json", lambda path: path.write_text(text, "utf-8"))
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Read `config.json` of any library.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json; a model folder has that and model.safetensors, as "
            "save_classifier, timm and transformers write them"
        )
    try:
        config = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def is_own(folder: Path) -> bool:
    """Whether `save_classifier` wrote this folder."""
    return (folder / "config.json").is_file() and read_config(folder).get("format") == FORMAT


def load_folder(folder: Path, config: Mapping[str, Any]) -> Classifier:
    """Build the classifier that `save_classifier` wrote.

    Args:
        folder: Holds `model.safetensors`.
        config: What `read_config` read there.

    Raises:
        FileNotFoundError: If there are no safetensors.
        ValueError: If the format is newer than this version, anything is missing or out of range,
            the model is not one that a file may ask for, or the weights are another model's.
    """
    path = folder / "config.json"
    version = config.get("format_version")
    if type(version) is not int or version not in READABLE:
        raise ValueError(
            f"{folder} has format_version {version!r:.80}, this version reads "
            f"{' and '.join(map(str, READABLE))}; update lightning_meansparse"
        )
    require_safetensors(folder)
    size = _get(config, "input_size", path)
    config = {"metrics": None, **(_NEW if version == 1 else {}), **config}
    facts = {
        **{
            key: _get(config, key, path) for key in ("mean", "std", "num_classes", "metrics", *_NEW)
        },
        "input_size": size and tuple(size),
    }
    kind = "class" if "class" in config else "source"
    origin = {key: _get(config, key, path) for key in (kind, "options")}
    try:
        model = _instance(origin) if kind == "class" else build(origin)
    except ImportError:
        raise  # says what to install
    except Exception as error:
        # The libraries fail in many ways when their options are wrong.
        raise ValueError(f"{path}: {kind} and options build no model: {error}") from error
    try:
        load_model(model, folder / "model.safetensors", strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"{folder}/model.safetensors does not fit its config.json: {error}"
        ) from error
    try:
        return Classifier(model, **facts, source=str(folder), origin=origin).eval()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _get(config: Mapping[str, Any], key: str, path: Path) -> Any:
    """The value of a key that must be there, once it is seen to be of the right kind."""
    expected, valid = _VALID[key]
    if key not in config:
        raise ValueError(f"{path} lacks {key!r}, which must be {expected}; save the model again")
    if not valid(config[key]):
        raise ValueError(f"{path}: {key} must be {expected}, got {config[key]!r:.80}")
    return config[key]


def _is_count(value: object) -> bool:
    return type(value) is int and 1 <= value < 2**31


def _are_numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        type(number) in (int, float) and abs(number) < 1e9 for number in value
    )


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(map(_is_count, value))


# What version 1 lacks, with the values that it meant.
_NEW = {"bgr": False, "normalisation": "config.json", "labels": None}

# Classifier itself checks what these values must be to each other.
_VALID: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "class": ("a text", lambda value: isinstance(value, str)),
    "source": ("a text such as 'timm/resnet18'", lambda value: isinstance(value, str)),
    "options": ("an object", lambda value: isinstance(value, dict)),
    "mean": ("a list of numbers", _are_numbers),
    "std": ("a list of numbers", _are_numbers),
    "num_classes": ("a positive integer or null", lambda value: value is None or _is_count(value)),
    "input_size": ("[C, H, W] or null", lambda value: value is None or _is_size(value)),
    "bgr": ("true or false", lambda value: isinstance(value, bool)),
    "normalisation": ("a text", lambda value: isinstance(value, str)),
    "labels": ("a list of texts or null", lambda value: value is None or _are_texts(value)),
    "metrics": ("an object or null", lambda value: value is None or isinstance(value, dict)),
}


def _instance(origin: Mapping[str, Any]) -> nn.Module:
    name, options = origin["class"], origin["options"]
    if name not in CLASSES:
        raise ValueError(f"it names the class {name!r}; allowed are: {', '.join(CLASSES)}")
    cls, arguments = CLASSES[name]
    for key, value in options.items():
        if key not in arguments or not _is_count(value):
            raise ValueError(
                f"{key}={value!r:.80}, but the options are positive integers for any of: "
                f"{', '.join(arguments)}"
            )
    return cls(**options)


def _origin(classifier: Classifier) -> Mapping[str, Any]:
    for name, (cls, arguments) in CLASSES.items():
        # isinstance, as an operator inside may have made it a subclass.
        if isinstance(classifier.model, cls):
            return {
                "class": name,
                "options": {key: getattr(classifier.model, key) for key in arguments},
            }
    if classifier.origin is None:
        raise ValueError(
            f"nothing says how to build this {type(classifier.model).__name__} again; "
            "save_classifier writes models that load_classifier got by name. Save its state_dict "
            "with safetensors instead"
        )
    return classifier.origin


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and put it in place in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # save_model puts a private file (0600) in place, whatever the umask allows to others.
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
