"""From the name of an adapter to the sparsified classifier: its base, checked, and it on top."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_meansparse.adapter.files import (
    CONFIG_NAME,
    HUB_ID,
    TENSORS_NAME,
    fetch,
    read_adapter,
)
from lightning_meansparse.adapter.format import Adapter
from lightning_meansparse.adapter.models import insert
from lightning_meansparse.classifier import Classifier, load_classifier
from lightning_meansparse.classifier.folder import FORMAT, is_own, load_folder, read_config
from lightning_meansparse.surgery import operators

# What an adapter may ask of the libraries. Others of their options would open files, fetch code or
# kernels; whoever wants those gives them to load_classifier and calls load_adapter.
_OPTIONS = {"num_classes", "in_chans", "img_size", "image_size"}


def load_published(name: str, *, revision: str | None = None) -> Classifier:
    """Load what this package put on the Hub, or in a folder; see `load_classifier`.

    Args:
        name: ``"meansparse/org/name"``, or a folder with an adapter.
        revision: Branch, tag or commit of the adapter.

    Raises:
        FileNotFoundError: If there is no such folder or repository, or nothing of ours in it.
        ConnectionError: If the Hub cannot be reached and the adapter is not in the local cache.
        ValueError: If the adapter is not sound, does not say where its base is, or what is there
            has other weights.
        RuntimeError: If the base cannot be fetched.
    """
    place = name.removeprefix("meansparse/")
    folder = Path(place).expanduser()
    local = folder.is_dir()
    if not local:
        folder = fetch(place, revision, (CONFIG_NAME, TENSORS_NAME, "config.json"))
        if not (folder / CONFIG_NAME).is_file():
            return _whole_classifier(place, folder.name)
    adapter = read_adapter(folder, revision=revision if local else None)
    if (folder / "config.json").is_file():
        classifier = _base_beside(folder if local else place, folder, adapter, name)
        if operators(classifier):  # transformers has put them in, see hugging_face
            return classifier
    else:
        classifier = _base(adapter, name)
    try:
        insert(classifier, adapter)
    except ValueError as error:
        raise ValueError(
            f"{name} does not fit {adapter.source}, which it names as its base: {error} If the "
            "base was trained further, publish it, and save the adapter with base= naming it."
        ) from error
    return classifier


def base_repository(source: str) -> str | None:
    """The repository on the Hub that a base's name spells out; None if it does not.

    Examples:
        >>> base_repository("timm/hf-hub:org/name"), base_repository("timm/resnet18")
        ('org/name', None)
    """
    library, _, name = source.partition("/")
    if library == "timm":
        library, _, name = name.replace("hf_hub:", "hf-hub:").partition(":")
    name = name.partition("@")[0]
    return name if library in ("hf", "hf-hub", "meansparse") and HUB_ID.fullmatch(name) else None


def is_public(source: str | None) -> bool:
    """Whether a base's name means the same to everybody: no folder, and of a library we know."""
    library, _, name = (source or "").partition("/")
    named = library in ("timm", "torchvision") and bool(name) and ":" not in name
    return named or base_repository(source or "") is not None


def _base_beside(place: str | Path, folder: Path, adapter: Adapter, name: str) -> Classifier:
    """The base in the same folder or repository: where that is, and where its files lie here."""
    config = read_config(folder)
    if config.get("format") == FORMAT:
        if place == folder:
            return load_folder(folder, config)
        return _whole_classifier(str(place), folder.name)
    library = "hf/" if "model_type" in config else "timm/"
    if library == "timm/":
        library += "local-dir:" if place == folder else "hf-hub:"
    at: dict[str, Any] = {} if place == folder else {"revision": folder.name}
    return _load(f"{library}{place}", adapter, name, at)


def _base(adapter: Adapter, name: str) -> Classifier:
    """The base at its recorded commit, with the adapter's normalisation."""
    source, options = adapter.source or "", dict(adapter.options or {})
    library = source.partition("/")[0]
    strange = sorted(options.keys() - _OPTIONS)
    revision = adapter.revision or source.partition("@")[2]
    if not is_public(source) or strange or ".." in revision:
        says = f"needs {', '.join(strange)}" if strange else f"is called {adapter.source!r}"
        says += f" at revision {revision!r:.80}" if ".." in revision else ""
        raise ValueError(
            f"{name}: its base {says}, which is not fetched for an adapter. Load the base as its "
            "author says, then use load_adapter(classifier, ...). Authors: save_adapter(..., "
            "base='timm/hf-hub:org/name') names a base that everybody can fetch."
        )
    if library == "meansparse":  # never an adapter again
        return _whole_classifier(source.partition("/")[2], adapter.revision)
    at: dict[str, Any] = {"revision": adapter.revision}
    if library == "torchvision":
        at = {"weights": adapter.revision} if adapter.revision else {}
    elif adapter.revision:
        source = source.partition("@")[0]
    return _load(source, adapter, name, {**at, **options})


def _load(source: str, adapter: Adapter, name: str, options: Mapping[str, Any]) -> Classifier:
    """A base from its library, with the normalisation that the statistics were measured with."""
    pixels = adapter.pixels
    numbers = {key: pixels[key] for key in ("mean", "std", "input_size")} if pixels else {}
    try:
        classifier = load_classifier(source, **numbers, **options)
    except TypeError as error:
        raise ValueError(
            f"{name}: its base {adapter.source!r} cannot be loaded with the options that the "
            f"adapter names ({', '.join(adapter.options or {})}): {error}"
        ) from error
    if pixels:
        classifier.bgr = pixels["bgr"]
        classifier.normalisation = f"the adapter {name}"
    return classifier


def _whole_classifier(repo_id: str, revision: str | None) -> Classifier:
    """A folder of `save_classifier` that lies on the Hub."""
    folder = fetch(repo_id, revision, ("config.json", "model.safetensors"))
    if not is_own(folder):
        raise FileNotFoundError(
            f"{repo_id} holds no {CONFIG_NAME}, so it is no adapter, and no classifier that "
            "save_classifier wrote either. Models of timm are 'timm/hf-hub:org/name', those of "
            "transformers 'hf/org/name'."
        )
    classifier = load_classifier(folder)
    classifier.source, classifier.revision = f"meansparse/{repo_id}", folder.name
    return classifier
