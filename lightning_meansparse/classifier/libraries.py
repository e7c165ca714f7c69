"""What we know of timm and torchvision: how to build a model, its normalisation, its classes.

Weights are opened by safetensors, or by `torch.load(weights_only=True)` where a library's own
published weights are older than that; a folder on disk must have safetensors.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from lightning_meansparse.classifier.hugging_face import build_transformers
from lightning_meansparse.classifier.loaded import (
    WEIGHTS,
    Loaded,
    Options,
    fetched_commit,
    for_channels,
    label_names,
    refuse_weights,
    require_safetensors,
)

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

    import lightning_meansparse.networks  # noqa: F401  (adds ours to timm's registry)

    options = {key: value for key, value in options.items() if value is not None}
    source, _, identity = name.replace("hf_hub:", "hf-hub:").rpartition(":")
    if source == "local-dir":
        if pretrained:
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
    known: Any = model.pretrained_cfg
    config = resolve_data_config(pretrained_cfg=known)  # type: ignore[no-untyped-call]
    classes: Any = model.num_classes
    if not classes:
        raise ValueError(f"timm/{name} has no classification head; give num_classes= for a new one")
    channels: Any = options.get("in_chans") or getattr(model, "in_chans", config["input_size"][0])
    rebuild = dict(stored.get("model_args") or {}) | options | {"num_classes": classes}
    rebuild = {key: value for key, value in rebuild.items() if not key.startswith(WEIGHTS)}
    size = options.get("img_size") or config["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    weights = ".".join(filter(None, (known.get("architecture"), known.get("tag"))))
    names = identity if source or not weights else weights
    numbers = (
        "pretrained_cfg" if known.get("mean") and known.get("std") else "default, for want of one"
    )
    return Loaded(
        model,
        classes,
        for_channels(config["mean"], channels),
        for_channels(config["std"], channels),
        (channels, height, width),
        {"source": f"timm/{stored['architecture']}", "options": rebuild},
        f"timm's {numbers} of {names}",
        _timm_labels(known, classes),
        revision=_timm_commit(known, revision) if pretrained and source != "local-dir" else None,
    )


def _timm_commit(config: Mapping[str, Any], revision: str | None) -> str | None:
    """The commit of weights from the Hub; None of those from elsewhere."""
    hub_id, _, named = str(config.get("hf_hub_id") or "").partition("@")
    if hub_id.endswith("/"):  # timm's own, which are called as the weights are
        hub_id += ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    return fetched_commit(hub_id, named or revision) if hub_id else None


def _timm_labels(config: Mapping[str, Any], classes: int) -> tuple[str, ...] | None:
    """Names from `pretrained_cfg`, or ImageNet's if its tag says that this is what was learnt."""
    from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset

    names, descriptions = config.get("label_names"), config.get("label_descriptions") or {}
    subset = infer_imagenet_subset(dict(config))
    if not names and subset and re.search(r"in\d+k", str(config.get("tag"))):
        info: Any = ImageNetInfo(subset)
        names, descriptions = info.label_names(), info.label_descriptions(as_dict=True)
    return label_names(names, classes, descriptions)


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
    if not pretrained and "weights" in options:
        raise ValueError(
            f"weights={options['weights']!r} names weights, but pretrained=False loads none"
        )
    if options.pop("in_chans", 3) != 3:
        raise ValueError("torchvision's models take 3 channels; take a timm/ model for in_chans=")
    chosen = options.pop("weights", "DEFAULT" if pretrained else None)
    weights = _torchvision_weights(models.get_model_weights(name), chosen or "DEFAULT")
    if chosen is None:
        with warnings.catch_warnings():
            # GoogLeNet and Inception: news for those who call them themselves.
            warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
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
    # These are set by the weights: the first two in GoogLeNet and Inception, the last in ViT.
    flags = {
        key: getattr(model, key)
        for key in ("transform_input", "aux_logits", "image_size")
        if hasattr(model, key)
    }
    if "aux_logits" in flags:
        flags["init_weights"] = False
    preset = weights.transforms()
    side = flags.get("image_size", preset.crop_size[0])
    return Loaded(
        model,
        classes,
        preset.mean,
        preset.std,
        (3, side, side),
        {"source": f"torchvision/{name}", "options": {**options, "num_classes": classes, **flags}},
        f"transforms of torchvision's {weights}",
        label_names(weights.meta["categories"], classes),
        revision=None if chosen is None else weights.name,
    )


def _torchvision_weights(known: Any, chosen: Any) -> Any:
    """The weights of a name such as `DEFAULT`, `IMAGENET1K_V1`, `ResNet18_Weights.DEFAULT`."""
    if isinstance(chosen, known):
        return chosen
    family, _, name = str(chosen).rpartition(".")
    if family not in ("", known.__name__) or name not in known.__members__:
        names = ", ".join(dict.fromkeys(["DEFAULT", *known.__members__]))
        raise ValueError(f"weights={chosen!r} are none of {known.__name__}: {names}")
    return known[name]


# --- All three ------------------------------------------------------------------------------------


def build(origin: Mapping[str, Any]) -> nn.Module:
    """Build an architecture again from `Loaded.origin`, without weights and without a network.

    Raises:
        ValueError: If no such architecture is known, or its options would fetch or open weights.
    """
    library, _, name = str(origin["source"]).partition("/")
    options = dict(origin["options"])
    refuse_weights(name, options)
    if library == "timm":
        return load_timm(name, pretrained=False, revision=None, options=options).model
    if library == "torchvision":
        return load_torchvision(name, pretrained=False, options=options).model
    if library == "hf":
        return build_transformers(options)
    raise ValueError(f"source={origin['source']!r} must begin with timm/, torchvision/ or hf/")


def _unknown(library: str, name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name.partition(".")[0], known, n=4, cutoff=0.5)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"{library} has no classifier {name!r} (of {len(known)}){hint}"
