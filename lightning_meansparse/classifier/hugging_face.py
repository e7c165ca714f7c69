"""Image classifiers of transformers: how to build one, and what its image processor does.

Nothing that a repository brings as Python code is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lightning_meansparse.classifier.loaded import (
    Loaded,
    Options,
    for_channels,
    label_names,
    refuse_weights,
    require_safetensors,
)
from lightning_meansparse.classifier.pixels import Pixels, UnknownNormalisationError, measure

# What the models call images; the others of the same family take tokens.
_IMAGES = ("pixel_values", "inputs")


def load_transformers(
    name: str, *, pretrained: bool, revision: str | None, options: Options, normalise: bool
) -> Loaded:
    """Build an image classifier of transformers from a Hub id or a folder.

    Args:
        name: Hub id or folder.
        pretrained: Load weights; False takes the architecture alone.
        revision: Commit, tag or branch on the Hub.
        options: `num_classes` for a new head, `in_chans`, and further fields of the configuration.
        normalise: Ask the image processor for mean, std and size; otherwise they are None.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If it is no image classifier, the weights have no head, the options contradict
            the weights, or no normalisation is found.
        FileNotFoundError: If a folder has no safetensors.
    """
    transformers = import_transformers()
    if Path(name).is_dir() and pretrained:
        require_safetensors(Path(name))
    config = transformers.AutoConfig.from_pretrained(
        name, revision=revision, trust_remote_code=False
    )
    _require_images(transformers, name, config)
    # What comes next is taken from the same commit, whatever happens to the branch meanwhile.
    revision = getattr(config, "_commit_hash", None) or revision
    # A whole sparsified model has its base's configuration inside its own.
    whole, config = config, getattr(config, "base_config", config)
    fields = {key: value for key, value in options.items() if value is not None}
    channels = fields.pop("in_chans", None)
    classes = fields.pop("num_classes", None)
    stored = int(getattr(config, "num_channels", 3))
    channels = stored if channels is None else channels
    if channels != stored:
        if pretrained:
            raise ValueError(
                f"in_chans={channels}, but the weights of {name!r} take {stored} channels; give "
                "pretrained=False, or take a timm/ model, whose first layer is adapted"
            )
        config.num_channels = channels
    if classes is not None and classes != config.num_labels:
        config.num_labels = classes
    for key, value in fields.items():
        if not hasattr(config, key):
            raise ValueError(f"{key}={value!r} is no field of {type(config).__name__}")
        setattr(config, key, value)
    _mend_timm_wrapper(config)
    pixels, source = None, ""
    if normalise:
        pixels, source = _pixels(transformers, name, revision, config, stored)
    model = _model(transformers, name, revision, whole, pretrained, classes is not None)
    side = getattr(config, "image_size", None)
    size: Any = (side, side) if isinstance(side, int) else side
    if pixels and pixels.size and "image_size" not in fields:
        size = pixels.size[1:]
    return Loaded(
        model,
        int(config.num_labels),
        for_channels(pixels.mean, channels) if pixels else None,
        for_channels(pixels.std, channels) if pixels else None,
        (channels, *size) if size else None,
        {"source": f"hf/{config.model_type}", "options": {"config": config.to_dict()}},
        source,
        label_names(config.id2label, int(config.num_labels)),
        bool(pixels and pixels.bgr and channels == stored),
        revision,
    )


def build_transformers(options: Options) -> nn.Module:
    """Build an architecture again from the `config` in `Loaded.origin`'s options."""
    transformers = import_transformers()
    fields = dict(options["config"])
    config = transformers.CONFIG_MAPPING[fields.pop("model_type")].from_dict(fields)
    _mend_timm_wrapper(config)
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
    return model


def import_transformers() -> Any:
    """Import transformers, or say which extra has it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'hf/ models need transformers: pip install "lightning_meansparse[hf]"'
        ) from error
    return transformers


def _require_images(transformers: Any, name: str, config: Any) -> None:
    mapping = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    if type(config) not in mapping:
        raise ValueError(
            f"{name!r} holds a {config.model_type} model, of which transformers has no image "
            "classifier"
        )
    kinds = mapping[type(config)]
    for kind in kinds if isinstance(kinds, tuple | list) else (kinds,):
        if kind.main_input_name not in _IMAGES:
            raise ValueError(f"{name!r} takes {kind.main_input_name}, not images")


def _model(
    transformers: Any,
    name: str,
    revision: str | None,
    config: Any,
    pretrained: bool,
    new_head: bool,
) -> Any:
    factory = transformers.AutoModelForImageClassification
    if not pretrained:
        return factory.from_config(config)
    model, report = factory.from_pretrained(
        name,
        config=config,
        revision=revision,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=new_head,
        output_loading_info=True,
    )
    if report["missing_keys"] and not new_head:
        missing = ", ".join(sorted(report["missing_keys"])[:4])
        raise ValueError(
            f"the weights of {name!r} lack {missing} and would be random there; for a backbone "
            "without a classification head give num_classes= for a new one"
        )
    return model


def _mend_timm_wrapper(config: Any) -> None:
    if config.model_type == "timm_wrapper":
        refuse_weights(str(config.architecture), config.model_args or {})
    # timm 1.0.31 writes num_classes there as well, and transformers 5.23 would pass it twice.
    if getattr(config, "model_args", None):
        config.model_args = {k: v for k, v in config.model_args.items() if k != "num_classes"}


def _pixels(
    transformers: Any, name: str, revision: str | None, config: Any, channels: int
) -> tuple[Pixels, str]:
    """What the image processor does to pixels, and which one it is."""
    hint = "give mean= and std= (0 and 1 for none)"
    if config.model_type == "timm_wrapper":
        known = getattr(config, "pretrained_cfg", None) or {}
        if not known.keys() >= {"mean", "std", "input_size"}:
            raise UnknownNormalisationError(
                f"the pretrained_cfg of {name!r} lacks mean, std or input_size; {hint}"
            )
        size = tuple(known["input_size"])
        pixels = Pixels(list(known["mean"]), list(known["std"]), False, size)
        return pixels, f"timm's pretrained_cfg in {name}"
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            name, revision=revision, trust_remote_code=False
        )
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnknownNormalisationError(
            f"{name!r} has no image processor (preprocessor_config.json) that could be read and "
            f"would say how pixels are normalised; {hint}. It was said: {reason}"
        ) from error
    kind = type(processor).__name__
    try:
        return measure(processor, channels), f"transformers' {kind} of {name}"
    except Exception as error:
        raise UnknownNormalisationError(
            f"{kind} of {name!r} does not say how pixels are normalised: {error}; {hint}"
        ) from error
