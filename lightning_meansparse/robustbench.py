"""Published MeanSparse checkpoints: their keys, and where their operators stand in a base network.

The authors publish whole networks that have operators built in, in five families of classes
(RobustBench, `model_zoo/architectures/Meansparse_*.py` and `sparsified_model.py`; authors' code,
`utils_sparse*.py`). The weights in such a checkpoint are the base's, under the base's own names.
Beside them, every operator has `running_mean`, `running_var` and `threshold`, which are our mean,
variance and α: all versions of their operator compute `where(|x − mean| < threshold · sqrt(var),
mean, x)`; the `epsilon` that some carry is never used.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_meansparse.adapter.base import base_module, mark_measured
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import operators, restore_, sparsify_


@dataclass(frozen=True)
class Place:
    """Where a family of published networks has operators, in names of the base network's modules.

    Args:
        module: Regular expression for the modules that have one.
        operator: What the operator there is called in the checkpoint; may refer to groups.
        side: Before (`"in"`) or after (`"out"`) the module, or the call in it.
        weight: Name of a weight with one row for each of the operator's channels.
        layout: Where the channels of the tensor are: `"first"` (NCHW) or `"last"`.
        call: Which call in the module's code, as in `Site`; None for the module's own tensors.
    """

    module: str
    operator: str
    side: Literal["in", "out"]
    weight: str
    layout: Literal["first", "last"] = "first"
    call: str | None = None


FAMILIES: dict[str, tuple[Place, ...]] = {
    "WideResNet and RaWideResNet for CIFAR": (
        Place(
            r"(.+)\.relu_([01])",
            r"\1.meansparse_\2",
            "in",
            r"\1.batchnorm_\2.weight",
        ),
        Place(r"(layer\.\d+\.block\.\d+)", r"\1.meansparse_2", "out", r"\1.conv_1.weight"),
        Place(r"relu", "meansparse_end", "in", "batchnorm.weight"),
    ),
    # The authors' evaluation code puts an operator and the activation into a Sequential.
    "WideResNet and RaWideResNet for CIFAR, activations alone": (
        Place(r"(.+)\.relu_([01])", r"\1.relu_\2.0", "in", r"\1.batchnorm_\2.weight"),
        Place(r"relu", "relu.0", "in", "batchnorm.weight"),
    ),
    "RaWideResNet for ImageNet": (
        Place(r"(stem\.stem\.stem)\.2", r"\1.2.0", "in", r"\1.0.weight"),
        Place(r"(.+\.F\.[ab])\.2", r"\1.2.0", "in", r"\1.0.weight"),
    ),
    "ConvNeXt": (
        Place(r"(.+\.mlp)\.act", r"\1.act.0", "in", r"\1.fc1.weight", "last"),
        Place(r"(.+)\.drop_path", r"\1.drop_path.1", "out", r"\1.conv_dw.weight"),
    ),
    "Swin": (
        Place(r"(.+\.mlp)\.act", r"\1.meansparse1", "in", r"\1.fc1.weight", "last"),
        Place(r"(.+\.mlp)\.fc2", r"\1.meansparse2", "out", r"\1.fc2.weight", "last"),
        Place(
            r"(layers\.\d+\.blocks\.\d+)",
            r"\1.meansparse1",
            "out",
            r"\1.norm1.weight",
            "last",
            call="add[0]",
        ),
        Place(r"(layers\.\d+\.blocks\.\d+)", r"\1.meansparse2", "out", r"\1.norm1.weight", "last"),
    ),
}
_PER_CHANNEL = ("running_mean", "running_var")
_FIELDS = (*_PER_CHANNEL, "threshold", "flag_update_statistics", "batch_num")
_UNUSED = ("momentum", "epsilon")  # some versions register these and never read them
# Children and buffers of the published networks that normalise pixels.
_NORMALISERS = ("normalize.mean", "normalize.std", "normalization.mean", "normalization.std")


def import_robustbench(
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor], model: nn.Module
) -> None:
    """Load a published MeanSparse checkpoint into its base network, in place.

    Afterwards `model` has the checkpoint's weights, and operators with its means, variances and
    thresholds at its places: the published classes' outputs and input gradients, bit for bit.
    `save_adapter` then writes the operators alone, as files of kilobytes. Which architecture and
    normalisation each published file needs stands in the documentation (*Published models*).

    Everything is checked before the model is touched, and no file is unpickled beyond its tensors.

    Args:
        path_or_state_dict: The published file, or the `state_dict` in it.
        model: The base network, such as `timm.create_model("wide_resnet94_16")`, which takes
            normalised images; or a `Classifier` around it, which takes pixels as the published
            networks do, and whose mean and std must be the checkpoint's if that has any. Its mode
            (train or eval) stays.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an argument is of another kind.
        ValueError: If the file holds anything but tensors, no operators, other keys or shapes than
            this network and its operators have, numbers that no operator can have, statistics
            that were never or only half measured, or another normalisation than the classifier's;
            or if the model has operators already.

    Warns:
        UserWarning: If every threshold is 0, as in files whose authors set it afterwards.

    Examples:
        >>> from lightning_meansparse import load_classifier
        >>> net = load_classifier("timm/wide_resnet94_16", pretrained=False, depth=10, width=1)
        >>> checkpoint = net.model.state_dict()  # a published file, made up
        >>> numbers = {"threshold": 0.15, "flag_update_statistics": 0, "batch_num": 98}
        >>> places = FAMILIES["WideResNet and RaWideResNet for CIFAR"]
        >>> for name, site in published_sites(net.model, places).items():
        ...     checkpoint[f"{name}.running_mean"] = torch.zeros(site.channels)
        ...     checkpoint[f"{name}.running_var"] = torch.ones(site.channels)
        ...     for field, number in numbers.items():
        ...         checkpoint[f"{name}.{field}"] = torch.tensor(number)
        >>> import_robustbench(checkpoint, net)
        >>> [f"{site}, alpha {op.alpha.item():.2f}" for site, op in operators(net).items()][-2:]
        ['model.layer.2.block.0@out, alpha 0.15', 'model.relu@in, alpha 0.15']
    """
    base = base_module(model)
    own = base.state_dict()
    state, where = _read(path_or_state_dict)
    state = _of_network(state, own, _classifier_of(model, base), where)
    if operators(base):
        raise ValueError("model is already sparsified. Call restore_(model) first.")
    if any(value.is_meta for value in own.values()):
        raise ValueError("model is on the meta device and has no values. Build it on a real one.")
    sites = _sites_in(state, base, where)
    problems = list(_wrong_keys(state, own, sites)) or list(_wrong_numbers(state, sites))
    if problems:
        raise ValueError(
            f"{where} is no sound checkpoint of this {type(base).__name__} with operators:\n  "
            + "\n  ".join(problems)
            + "\nHas model the published depth, width and number of classes?"
        )
    if not any(bool(state[f"{name}.threshold"]) for name in sites):
        # Before the model is touched, as it may be an error to whoever runs this.
        warnings.warn(
            f"{where}: every threshold is 0, so the operators will let everything through. Set the "
            "α that its authors set after loading, such as set_alpha(model, 0.2).",
            stacklevel=2,
        )
    _insert(state, base, sites)
    mark_measured(model, "official")


def published_sites(base: nn.Module, places: Sequence[Place]) -> dict[str, Site]:
    """The sites of a family's operators in a base network, by their names in a checkpoint."""
    weights = base.state_dict()
    sites = {}
    for name, _ in base.named_modules():
        for place in places:
            found = re.fullmatch(place.module, name)
            weight = None if found is None else weights.get(found.expand(place.weight))
            if found is not None and weight is not None:
                width = len(weight)
                shape = (width, 1, 1) if place.layout == "first" else (width,)
                operator = found.expand(place.operator)
                sites[operator] = Site(name, place.side, shape, call=place.call)
    return sites


def _read(source: object) -> tuple[dict[str, Tensor], str]:
    """The tensors of a checkpoint by name, and what to call it in messages."""
    where = "path_or_state_dict"
    found = source
    if isinstance(source, str | os.PathLike):
        path = Path(source).expanduser()
        where = str(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"path_or_state_dict: there is no file {where}. RobustBench's load_model and the "
                "authors' repository download the published ones."
            )
        try:
            found = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # damaged files and foreign objects fail in many ways
            raise ValueError(
                f"{where} is no checkpoint of tensors alone, and anything else might run code: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{where} must be a file or a state_dict that maps names to tensors, got "
            f"{type(found).__name__}."
        )
    foreign = [
        key
        for key, value in found.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if foreign:
        raise ValueError(
            f"{where} must map names to tensors alone, but these are something else: "
            f"{', '.join(map(str, foreign))}."
        )
    return dict(found), where


def _of_network(
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    classifier: Classifier | None,
    where: str,
) -> dict[str, Tensor]:
    """The part of a checkpoint that is the base network's, under the names that it has there.

    Left off are what DataParallel and the normalising wrapper of the ImageNet models put in front
    of every name, and the wrapper's normalisation, once it is seen to be the classifier's.
    """
    rest = _without_prefix("module.", state, own)
    for key in _NORMALISERS:
        if key not in rest or key in own:
            continue
        value = rest.pop(key).flatten().cpu()
        if classifier is None:
            continue  # then it is the caller who normalises
        kept = getattr(classifier, key.rpartition(".")[2]).flatten().cpu()
        if len(kept) not in (1, len(value)) or bool((value != kept).any()):
            raise ValueError(
                f"{where} normalises with {key} = {value.tolist()}, the classifier with "
                f"{kept.tolist()}. Give load_classifier the same mean= and std=."
            )
    return _without_prefix("model.", rest, own)


def _without_prefix(
    prefix: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    theirs = all(key.startswith(prefix) for key in state)
    if theirs and not any(key.startswith(prefix) for key in own):
        return {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _classifier_of(model: nn.Module, base: nn.Module) -> Classifier | None:
    for module in model.modules():
        if isinstance(module, Classifier) and module.model is base:
            return module
    return None


def _sites_in(state: Mapping[str, Tensor], base: nn.Module, where: str) -> dict[str, Site]:
    """The sites of the family whose operators are in the checkpoint, by their names there."""
    found = {key.removesuffix(".threshold") for key in state if key.endswith(".threshold")}
    if not found:
        raise ValueError(
            f"{where} has no operators (no key ends in .threshold), so it is no MeanSparse "
            "checkpoint. Weights of a base network go in by model.load_state_dict(...)."
        )
    families = [published_sites(base, places) for places in FAMILIES.values()]
    sites = max(families, key=lambda sites: len(found & sites.keys()))
    if not found & sites.keys():
        raise ValueError(
            f"{where} has operators at {', '.join(sorted(found))}, and this "
            f"{type(base).__name__} has no such places. Known are: {'; '.join(FAMILIES)}. Give "
            "the base network that it was made from."
        )
    return sites


def _wrong_keys(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], sites: Mapping[str, Site]
) -> Iterator[str]:
    """What is missing, too much or of another shape."""
    expected = {key: tuple(value.shape) for key, value in own.items()}
    for name, site in sites.items():
        for field in _FIELDS:
            expected[f"{name}.{field}"] = (site.channels,) if field in _PER_CHANNEL else ()
    unused = {f"{name}.{field}" for name in sites for field in _UNUSED}
    missing = [key for key in expected if key not in state]
    extra = [key for key in state if key not in expected and key not in unused]
    if missing:
        yield f"missing keys: {', '.join(missing)}"
    if extra:
        yield f"extra keys: {', '.join(extra)}"
    for key, shape in expected.items():
        if key in state and tuple(state[key].shape) != shape:
            yield f"{key} must have shape {shape}, got {tuple(state[key].shape)}"


def _wrong_numbers(state: Mapping[str, Tensor], sites: Mapping[str, Site]) -> Iterator[str]:
    """What no weight and no measured statistic can be, in a checkpoint with the right keys."""
    broken = [key for key, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        yield f"values that are not finite: {', '.join(broken)}"
    for name in sites:
        _, var, threshold, flag, batches = (state[f"{name}.{field}"] for field in _FIELDS)
        for field, value in (
            ("running_var", var),
            ("threshold", threshold),
            ("batch_num", batches),
        ):
            if bool((value < 0).any()):
                yield f"{name}.{field} must not be negative"
        if bool(flag):
            yield f"{name}.flag_update_statistics is set: its calibration was cut short"
        if not bool(batches) and not bool(var.any()):
            yield f"{name} was never calibrated: its batch_num and running_var are 0"


def _insert(state: Mapping[str, Tensor], base: nn.Module, sites: Mapping[str, Site]) -> None:
    """Put operators and weights into the base network; all of them or, on an error, none."""
    own = base.state_dict()
    before = {key: value.clone() for key, value in own.items()}
    try:
        sparsify_(base, sites.values())
        found = operators(base)
        for name, site in sites.items():
            operator = found[str(site)]
            mean, var, alpha, *_ = (state[f"{name}.{field}"].detach() for field in _FIELDS)
            operator.mean.copy_(mean.view(site.shape))
            operator.var.copy_(var.view(site.shape))
            operator.alpha.copy_(alpha)
        base.load_state_dict({key: state[key] for key in own})
    except BaseException:
        restore_(base)
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(before[key])
        raise
