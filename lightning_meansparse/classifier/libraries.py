"""What we know of timm, torchvision and transformers: how to build a model, and its normalisation.

Weights are opened by safetensors, or by `torch.load(weights_only=True)` where a library's own
published weights are older than that; a folder on disk must have safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

Options = Mapping[str, Any]

# How the libraries' arguments that fetch or open weights begin.
_WEIGHTS = ("checkpoint", "pretrained", "weights")


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
        revision: The commit, where known.
    """

    model: nn.Module
    num_classes: int | None
    mean: Sequence[float] | None
    std: Sequence[float] | None
    input_size: tuple[int, int, int] | None
    origin: dict[str, Any]
    revision: str | None = None


# --- timm ----------------------------------------------------------------------------------------


def load_timm(name: str, *, pretrained: bool, revision: str | None, options: Options) -> Loaded:
    """Build a timm model: `resnet18`, `resnet18.a1_in1k`, `hf-hub:org/name`, `local-dir:path`.

    Args:
        name: As `timm.create_model` takes it.
        pretrained: Load weights.
        revision: Commit, tag or branch on the Hub.
        options: Further arguments of `timm.create_model`, such as `num_classes` and `in_chans`.

    Raises:
        ValueError: If timm has no such model, or no weights for it.
        FileNotFoundError: If a folder has no safetensors.
    """
    import timm
    from timm.data.config import resolve_data_config

    options = {key: value for key, value in options.items() if value is not None}
    source, _, identity = name.replace("hf_hub:", "hf-hub:").rpartition(":")
    if source == "local-dir":
        require_safetensors(Path(identity))
        stored = json.loads((Path(identity) / "config.json").read_text("utf-8"))
    elif source == "hf-hub":
        from timm.models import load_model_config_from_hf

        identity = f"{identity}@{revision}" if revision and "@" not in identity else identity
        _, architecture, arguments = load_model_config_from_hf(identity)
        stored = {"architecture": architecture, "model_args": arguments}
    elif source:
        raise ValueError(f"timm knows the sources hf-hub: and local-dir:, not {source + ':'!r}")
    else:
        base = identity.partition(".")[0]
        if not timm.is_model(base):
            raise ValueError(_unknown("timm", identity, timm.list_models()))
        if pretrained and not timm.is_model_pretrained(identity):
            tags = [full for full in timm.list_pretrained() if full.split(".")[0] == base]
            raise ValueError(
                f"timm has no weights for {identity!r}"
                + (f", but for: {', '.join(tags)}" if tags else "; give pretrained=False")
            )
        stored = {"architecture": identity, "model_args": {}}
    full = f"{source}:{identity}" if source else identity
    extra: dict[str, Any] = {}
    if revision and not source:
        hub_id = getattr(timm.get_pretrained_cfg(identity), "hf_hub_id", None)
        if not hub_id:
            raise ValueError(f"revision={revision!r}, but {identity!r} does not come from the Hub")
        found = f"timm/{identity}" if hub_id == "timm/" else hub_id
        extra["pretrained_cfg_overlay"] = {"hf_hub_id": f"{found}@{revision}"}
    model = timm.create_model(full, pretrained=pretrained, **options, **extra)
    config = resolve_data_config(pretrained_cfg=model.pretrained_cfg)  # type: ignore[no-untyped-call]
    classes: Any = model.num_classes
    channels: Any = options.get("in_chans") or getattr(model, "in_chans", config["input_size"][0])
    rebuild = dict(stored.get("model_args") or {}) | options | {"num_classes": classes}
    rebuild = {key: value for key, value in rebuild.items() if not key.startswith(_WEIGHTS)}
    return Loaded(
        model,
        classes,
        for_channels(config["mean"], channels),
        for_channels(config["std"], channels),
        (channels, *config["input_size"][1:]),
        {"source": f"timm/{stored['architecture']}", "options": rebuild},
    )


def for_channels(numbers: Sequence[float], channels: int) -> list[float]:
    """Fit the normalisation of colour images to other channels: their mean, for each.

    timm adds up a colour stem's weights for grey images, so this is what that stem expects.
    """
    if len(numbers) == channels:
        return list(numbers)
    return [sum(numbers) / len(numbers)] * channels


# --- torchvision ---------------------------------------------------------------------------------


def load_torchvision(name: str, *, pretrained: bool, options: Options) -> Loaded:
    """Build a torchvision classifier; with `pretrained`, its DEFAULT weights.

    The normalisation is that of the (default) weights also without them, as with the others.

    Args:
        name: As in `torchvision.models`.
        pretrained: Load weights.
        options: Further arguments of the model's function; `weights` names other weights.

    Raises:
        ValueError: If torchvision has no such classifier, or the options contradict the weights.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(_unknown("torchvision", name, known))
    options = {key: value for key, value in options.items() if value is not None}
    if options.pop("in_chans", 3) != 3:
        raise ValueError("torchvision's models take 3 channels; take a timm/ model for in_chans=")
    chosen = options.pop("weights", "DEFAULT" if pretrained else None)
    weights = models.get_model_weights(name)[chosen or "DEFAULT"]
    if chosen is None:
        model = models.get_model(name, weights=None, **options)
        classes = int(options.get("num_classes", 1000))
    else:
        classes = len(weights.meta["categories"])
        if options.get("num_classes", classes) != classes:
            raise ValueError(
                f"the weights of torchvision/{name} have {classes} classes; for num_classes="
                f"{options['num_classes']} give pretrained=False, or take a timm/ model, which "
                "gets a new head"
            )
        # The builder would unpickle whatever the file holds: see first that it holds tensors alone.
        weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        model = models.get_model(name, weights=weights, **options)
    # These two are set by the presence of weights, in GoogLeNet and Inception.
    flags = {
        key: getattr(model, key) for key in ("transform_input", "aux_logits") if hasattr(model, key)
    }
    if flags:
        flags["init_weights"] = False
    preset = weights.transforms()
    side = preset.crop_size[0]
    return Loaded(
        model,
        classes,
        preset.mean,
        preset.std,
        (3, side, side),
        {"source": f"torchvision/{name}", "options": {**options, "num_classes": classes, **flags}},
    )


# --- Hugging Face transformers -------------------------------------------------------------------


def load_transformers(
    name: str, *, pretrained: bool, revision: str | None, options: Options, normalise: bool
) -> Loaded:
    """Build an image classifier of transformers from a Hub id or a folder.

    Args:
        name: Hub id or folder.
        pretrained: Load weights; False takes the architecture alone.
        revision: Commit, tag or branch on the Hub.
        options: `num_classes` for a new head, `in_chans`, and further fields of the configuration.
        normalise: Read mean, std and size from the image processor's file; otherwise they are None.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If the options contradict the weights, or no normalisation is found.
        FileNotFoundError: If a folder has no safetensors.
    """
    transformers = import_transformers()
    if Path(name).is_dir() and pretrained:
        require_safetensors(Path(name))
    config = transformers.AutoConfig.from_pretrained(name, revision=revision)
    commit = getattr(config, "_commit_hash", None)
    fields = {key: value for key, value in options.items() if value is not None}
    channels = fields.pop("in_chans", None)
    classes = fields.pop("num_classes", None)
    stored = getattr(config, "num_channels", 3)
    if channels is not None and channels != stored:
        if pretrained:
            raise ValueError(
                f"in_chans={channels}, but the weights of {name!r} take {stored} channels; give "
                "pretrained=False, or take a timm/ model, whose first layer is adapted"
            )
        config.num_channels = channels
    new_head = classes is not None and classes != config.num_labels
    if new_head:
        config.num_labels = classes
    for key, value in fields.items():
        if not hasattr(config, key):
            raise ValueError(f"{key}={value!r} is no field of {type(config).__name__}")
        setattr(config, key, value)
    _mend_timm_wrapper(config)
    found = _processor(transformers, name, revision, config) if normalise else None
    factory = transformers.AutoModelForImageClassification
    if pretrained:
        model = factory.from_pretrained(
            name,
            config=config,
            revision=revision,
            use_safetensors=True,
            ignore_mismatched_sizes=new_head,
        )
    else:
        model = factory.from_config(config)
    mean, std, size = found if found else (None, None, None)
    if channels is not None and found:
        mean, std = for_channels(found[0], channels), for_channels(found[1], channels)
        size = size and (channels, *size[1:])
    return Loaded(
        model,
        int(config.num_labels),
        mean,
        std,
        size,
        {"source": f"hf/{config.model_type}", "options": {"config": config.to_dict()}},
        revision=commit or revision,
    )


def build(origin: Mapping[str, Any]) -> nn.Module:
    """Build an architecture again from `Loaded.origin`, without weights and without a network.

    Raises:
        ValueError: If no such architecture is known, or its options would fetch or open weights.
    """
    library, _, name = str(origin["source"]).partition("/")
    options = dict(origin["options"])
    _refuse_weights(name, options)
    if library == "timm":
        return load_timm(name, pretrained=False, revision=None, options=options).model
    if library == "torchvision":
        return load_torchvision(name, pretrained=False, options=options).model
    if library == "hf":
        transformers = import_transformers()
        fields = dict(options["config"])
        config = transformers.CONFIG_MAPPING[fields.pop("model_type")].from_dict(fields)
        _mend_timm_wrapper(config)
        model: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
        return model
    raise ValueError(f"source={origin['source']!r} must begin with timm/, torchvision/ or hf/")


def import_transformers() -> Any:
    """Import transformers, or say which extra has it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'hf/ models need transformers: pip install "lightning_meansparse[hf]"'
        ) from error
    return transformers


def require_safetensors(folder: Path) -> None:
    """Refuse a folder whose weights would have to be unpickled.

    Raises:
        FileNotFoundError: If it has no safetensors.
    """
    if any(folder.glob("*.safetensors")):
        return
    endings = (".bin", ".pt", ".pth", ".ckpt")
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in endings)
    found = f"; {', '.join(pickles)} may run code and is not opened" if pickles else ""
    raise FileNotFoundError(
        f"{folder} has no *.safetensors{found}; save the weights as safetensors "
        "(timm: safe_serialization=True)"
    )


def _refuse_weights(architecture: str, options: Options) -> None:
    """Refuse what a file may not choose: weights, which may be pickles or on a server."""
    if ":" in architecture:
        raise ValueError(
            f"{architecture!r} is no architecture but a place to fetch one from; name it as in "
            "'timm/resnet18'"
        )
    found = sorted(key for key in options if key.startswith(_WEIGHTS))
    if found:
        raise ValueError(
            f"{', '.join(found)} would fetch or open other weights than model.safetensors; take it "
            "out of the options"
        )


def _mend_timm_wrapper(config: Any) -> None:
    if config.model_type == "timm_wrapper":
        _refuse_weights(str(config.architecture), config.model_args or {})
    # timm 1.0.31 writes num_classes there as well, and transformers 5.23 would pass it twice.
    if getattr(config, "model_args", None):
        config.model_args = {k: v for k, v in config.model_args.items() if k != "num_classes"}


def _processor(
    transformers: Any, name: str, revision: str | None, config: Any
) -> tuple[list[float], list[float], tuple[int, int, int] | None]:
    """Read what the image processor does to pixels as a mean, a standard deviation and a size."""
    if config.model_type == "timm_wrapper":
        known = config.pretrained_cfg
        return list(known["mean"]), list(known["std"]), tuple(known["input_size"])
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=revision)
    except OSError as error:
        raise ValueError(
            f"{name!r} has no preprocessor_config.json that would say how pixels are normalised; "
            "give mean= and std= (0 and 1 for none)"
        ) from error
    if stored.get("do_flip_channel_order"):
        raise ValueError(f"{name!r} takes channels as BGR, which Classifier does not do")
    channels = int(getattr(config, "num_channels", 3))
    # The model sees x = s·p − o of a pixel p in [0, 1], then (x − mean) / std.
    scale = 255.0 * (stored.get("rescale_factor", 1 / 255) if stored.get("do_rescale", True) else 1)
    offset = 1.0 if stored.get("rescale_offset") else 0.0
    plain = not stored.get("do_normalize", True)
    mean = [0.0] * channels if plain else list(stored["image_mean"])
    std = [1.0] * channels if plain else list(stored["image_std"])
    if offset or abs(scale - 1) > 1e-6:
        mean = [(value + offset) / scale for value in mean]
        std = [value / scale for value in std]
    cropped = stored.get("do_center_crop") and stored.get("crop_size")
    size = cropped or stored.get("size") or {}
    sides = {"height": size, "width": size} if isinstance(size, int) else size
    edge = sides.get("shortest_edge")
    height, width = sides.get("height", edge), sides.get("width", edge)
    return mean, std, (channels, int(height), int(width)) if height and width else None


def _unknown(library: str, name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name.partition(".")[0], known, n=4, cutoff=0.5)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"{library} has no classifier {name!r} (of {len(known)}){hint}"
