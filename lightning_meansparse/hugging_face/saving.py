"""Whole sparsified models into folders and onto the Hub."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from lightning_meansparse.adapter import base_module
from lightning_meansparse.adapter.files import write_adapter
from lightning_meansparse.adapter.models import describe
from lightning_meansparse.rewrite.classes import base_of, rewritten
from lightning_meansparse.surgery import operators

_CONFIG = "config.json"
_CARD = "README.md"


def variant_of(variant: str | None) -> str:
    """What goes into the names of the weights' files, before the ending.

    Without it, the base's own class would load them, whatever ``config.json`` says.

    Examples:
        >>> variant_of(None), variant_of("fp16")
        ('meansparse', 'meansparse.fp16')
    """
    return "meansparse" if variant is None else f"meansparse.{variant}"


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    image_processor: Any = None,
    base: str | None = None,
    records: str | os.PathLike[str] | None = None,
    calibration: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    license: str | None = None,
    push_to_hub: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    **options: Any,
) -> Path:
    """Write a whole sparsified model: the base's weights and configuration, and the operators.

    Of transformers: after ``import lightning_meansparse``, transformers' own
    ``AutoModelForImageClassification.from_pretrained`` and ``pipeline`` load it from the folder or
    from the Hub. Without that import they refuse it: ``config.json`` is of model type
    ``"meansparse"``, and the weights' files are of the variant of that name. The weights keep the
    base's keys.

    Of timm: the folder is timm's own, with an adapter beside. ``load_classifier(directory)`` and
    ``load_classifier("meansparse/org/name")`` load both; timm itself loads the base alone, as
    nothing in its format can stop it.

    The model card, ``README.md``, is written if the folder has none. The files are written beside
    the folder's own and then moved into it, ``config.json`` last.

    Args:
        model: An image classifier of transformers or timm with calibrated operators, or a wrapper
            around it, see `base_module`.
        directory: The folder; made if there is none. Other files in it stay.
        image_processor: Of transformers: written into the folder as well. None takes that of the
            folder or repository that the model was loaded from; False writes none.
        base: Name of the base, such as ``"hf/org/name"``, for the adapter and the model card.
        records: Output folder of a sweep, for the card's numbers; None says that robustness was not
            evaluated.
        calibration: Facts about the calibration data, see `save_adapter`.
        evaluation: Measured results, see `save_adapter`.
        license: For the card, as the Hub names it, such as ``"apache-2.0"``.
        push_to_hub: Id of a repository on the Hub, ``"org/name"``, that the folder is uploaded to;
            made if there is none.
        token: For the Hub; None takes the one that ``hf auth login`` stored.
        private: Whether a new repository is private.
        **options: Further arguments of transformers' ``save_pretrained``, such as
            ``max_shard_size="1GB"``, or of timm's ``save_for_hf``, such as ``model_config=...``.

    Returns:
        The folder.

    Raises:
        TypeError: If it is a model of neither.
        ValueError: If it is no image classifier, has no calibrated operators, or its image
            processor cannot be found.
        NotADirectoryError: If ``directory`` is a file.

    Examples:
        >>> import torch
        >>> from transformers import AutoModelForImageClassification, ViTConfig
        >>> from lightning_meansparse import calibrate_, find_sites, save_pretrained, sparsify_
        >>> config = ViTConfig(
        ...     hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        ...     image_size=16, patch_size=8,
        ... )
        >>> model = AutoModelForImageClassification.from_config(config)
        >>> images = torch.rand(4, 3, 16, 16)
        >>> sparsify_(model, find_sites(model, images), alpha=0.2)
        >>> calibrate_(model, [images])
        >>> folder = save_pretrained(model, "whole", image_processor=False)
        >>> sorted(file.name for file in folder.iterdir())
        ['README.md', 'config.json', 'meansparse.safetensors', 'meansparse_config.json',
         'model.meansparse.safetensors']
        >>> loaded = AutoModelForImageClassification.from_pretrained(folder)
        >>> torch.equal(loaded(images).logits, model.eval()(images).logits)
        True
    """
    from lightning_meansparse.card import model_card

    network: Any = base_module(model)
    adapter = describe(model, base=base, calibration=calibration, evaluation=evaluation)
    folder = Path(directory)
    of_timm = isinstance(getattr(network, "pretrained_cfg", None), Mapping)
    if not of_timm and not _is_of_transformers(network):
        raise TypeError(
            f"model must be of transformers or timm, or a wrapper around one; its base is a "
            f"{type(network).__name__}. Publish its adapter alone: save_adapter."
        )
    library = "timm" if of_timm else "transformers"
    card = model_card(
        adapter,
        repo_id=push_to_hub,
        records=records,
        relation="finetune",
        library_name=library,
        license=license,
    )
    if not of_timm:
        _require_classifier(network)
        image_processor = _processor_of(network) if image_processor is None else image_processor
    write = _write_timm if of_timm else _write_transformers
    with _moved_into(folder) as new:
        write(network, new, options)
        write_adapter(adapter, new)
        if image_processor:
            image_processor.save_pretrained(new)
        if not (folder / _CARD).exists():
            (new / _CARD).write_text(card, "utf-8")
    if push_to_hub is not None:
        _upload(folder, push_to_hub, token=token, private=private)
    return folder


def adopt(model: nn.Module) -> None:
    """Let the transformers models in a model that has just got operators save them as well.

    Their own ``save_pretrained``, which ``push_to_hub`` and Trainer call too, would write the base
    alone, under the base's type. The class is swapped for a subclass that writes whole models;
    `restore_` swaps it back.
    """
    from transformers import PreTrainedModel

    for module in [model] if isinstance(model, PreTrainedModel) else model.children():
        if not isinstance(module, PreTrainedModel):
            adopt(module)
        else:
            cls: Any = type(module)
            module.__class__ = cls if _is_adopted(cls) else _adopted(cls)


@cache
def _adopted(cls: type) -> type:
    """The subclass of a model's class that saves whole models."""
    content: dict[str, Any] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": _reduce,
        "save_pretrained": _save_pretrained,
        "_meansparse_base": vars(cls).get("_meansparse_base", cls),
    }
    return type(cls)(cls.__name__, (cls,), content)


def _is_adopted(cls: type) -> bool:
    return vars(cls).get("save_pretrained") is _save_pretrained


def _save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    push_to_hub: bool = False,
    token: str | bool | None = None,
    **options: Any,
) -> None:
    """Write the whole sparsified model; arguments as in transformers.

    Image processors are saved by their own ``save_pretrained``, as always there.
    """
    if not is_main_process or not operators(self):
        hub = {"push_to_hub": push_to_hub, "token": token}
        _plain(self)(save_directory, is_main_process=is_main_process, **hub, **options)
        return
    folder = Path(save_directory)
    repo_id = options.pop("repo_id", folder.name)
    hub = {key: options.pop(key) for key in ("commit_message", "private") if key in options}
    _require_classifier(self)
    adapter = describe(self)
    with _moved_into(folder) as new:
        _write_transformers(self, new, options)
        write_adapter(adapter, new)
    if push_to_hub:
        _upload(folder, repo_id, token=token, **hub)


def _plain(network: Any) -> Any:
    """The model's ``save_pretrained`` as it is without us."""
    cls = type(network)
    return super(cls, network).save_pretrained if _is_adopted(cls) else network.save_pretrained


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle the base's class and the names of its rewritten calls, as no import finds this one."""
    reduced: Any = object.__reduce_ex__(self, protocol)
    inner = type(self).__mro__[1]
    return (_new, (base_of(self), vars(inner).get("_meansparse_names")), *reduced[2:])


def _new(base: type, names: frozenset[str] | None) -> Any:
    return object.__new__(_adopted(base if names is None else rewritten(base, names)))


def _is_of_transformers(network: nn.Module) -> bool:
    """Without importing it: no model is of it before that."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(network, transformers.PreTrainedModel)


def _processor_of(network: Any) -> Any:
    """The image processor of where a model was loaded from."""
    import transformers

    # Typed as nothing in particular: transformers leaves half of its functions without types.
    factory: Any = transformers.AutoImageProcessor
    name = network.config.name_or_path
    ask = "Pass image_processor=, or False to write none."
    if not name:
        raise ValueError(
            f"image_processor: this {type(network).__name__} was not loaded from anywhere that "
            f"would have one. {ask}"
        )
    try:
        return factory.from_pretrained(
            name, revision=getattr(network.config, "_commit_hash", None), trust_remote_code=False
        )
    except Exception as error:
        raise ValueError(
            f"image_processor: {name!r}, where the model was loaded from, gives none "
            f"({type(error).__name__}). {ask}"
        ) from error


def _require_classifier(network: Any) -> None:
    from transformers import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING

    if type(network.config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(
            f"{type(network).__name__} is no image classifier of transformers, and only those load "
            "as whole models. Publish the adapter alone: save_adapter."
        )


def _write_transformers(network: Any, folder: Path, options: Mapping[str, Any]) -> None:
    from lightning_meansparse.hugging_face.configuration import MeanSparseConfig

    _plain(network)(folder, **{**options, "variant": variant_of(options.get("variant"))})
    MeanSparseConfig(network.config).save_pretrained(folder)


def _write_timm(network: Any, folder: Path, options: Mapping[str, Any]) -> None:
    """As timm does, without the entry that transformers' wrapper of timm's models stumbles over."""
    from timm.models import save_for_hf

    save_for_hf(network, str(folder), safe_serialization=True, **options)
    config = json.loads((folder / _CONFIG).read_text("utf-8"))
    # It stands outside as well, where both look for it.
    config.get("model_args", {}).pop("num_classes", None)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")


@contextmanager
def _moved_into(folder: Path) -> Iterator[Path]:
    """A folder to write into; its files are moved so that a reader finds the old or new or none."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory: {folder} is a file. Name a folder to write into.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".meansparse-") as temporary:
        yield Path(temporary)
        (folder / _CONFIG).unlink(missing_ok=True)
        for pattern in ("model*.safetensors", "model.safetensors.index*.json"):
            for old in folder.glob(pattern):
                old.unlink()
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == _CONFIG):
            os.replace(path, folder / path.name)


def _upload(folder: Path, repo_id: str, *, token: Any, private: Any = None, **about: Any) -> None:
    """All files in one commit, so that no reader of the repository meets half of them."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    api.upload_folder(repo_id=repo_id, folder_path=folder, **about)
