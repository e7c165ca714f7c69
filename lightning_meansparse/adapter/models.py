"""Adapters out of models and onto them."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_meansparse.adapter.base import (
    Fingerprint,
    fingerprint,
    mark_measured,
    noted,
    noted_statistics,
    provenance,
    public_name,
    scope,
    scopes,
)
from lightning_meansparse.adapter.files import read_adapter, write_adapter
from lightning_meansparse.adapter.format import Adapter
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.moments import Statistics
from lightning_meansparse.rewrite import base_of
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import operators, restore_, sparsify_

_LIBRARIES = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}
# What an adapter says that stays true of the same statistics when they are saved again.
_LASTING = ("source", "revision", "library", "architecture", "options", "pixels", "calibration")


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base: str | None = None,
    revision: str | None = None,
    statistics: Statistics | None = None,
    calibration: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Path:
    """Write the operators' statistics and α into a folder, as two small files.

    The files hold nothing of the base but a fingerprint of its weights. They are written under
    temporary names and moved into place, the tensors first, so a config never stands without them;
    other files in the folder stay as they are.

    Args:
        model: A sparsified and calibrated model; a wrapper is looked through, see
            `base_module`.
        directory: The folder; made if there is none.
        base: Where others find the base: a name that `load_classifier` takes, such as
            ``"timm/resnet18"``. Taken from a ``Classifier`` in the model if not given. Of a local
            folder only the last name is written.
        revision: Commit of the base; of torchvision, the name of the weights.
        statistics: As given to ``calibrate_``; None takes what the model notes, or ``"pooled"``.
        calibration: Facts about the calibration data, such as ``{"dataset": "org/name",
            "revision": "<commit>", "split": "train", "images": 50000}``. Of statistics that came
            with an adapter, what that said.
        evaluation: Measured results; must name ``n``, ``eps``, ``norm`` and ``attacks``.

    Returns:
        The folder.

    Raises:
        ValueError: If the model has no operators, they are not calibrated, or an argument cannot be
            written as JSON.
        RuntimeError: If the weights have changed since the statistics were measured, as far as that
            was noted: by the callback, a sweep or `load_adapter`, not by `calibrate_` alone.
        NotADirectoryError: If ``directory`` is a file.

    Examples:
        >>> from lightning_meansparse import calibrate_, find_sites, sparsify_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> sparsify_(model, find_sites(model, torch.rand(1, 3, 8, 8)), alpha=0.2)
        >>> calibrate_(model, [torch.rand(16, 3, 8, 8)])
        >>> folder = save_adapter(model, "adapter", calibration={"images": 16})
        >>> sorted(file.name for file in folder.iterdir())
        ['meansparse.safetensors', 'meansparse_config.json']
    """
    adapter = describe(
        model,
        base=base,
        revision=revision,
        statistics=statistics,
        calibration=calibration,
        evaluation=evaluation,
    )
    return write_adapter(adapter, directory)


def load_adapter(
    model: nn.Module,
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    check_base: bool = True,
) -> Adapter:
    """Put an adapter onto the base model that it was made for, in place.

    Afterwards the model is sparsified and calibrated, with the adapter's α. Everything is checked
    before the model is touched, and nothing is unpickled.

    Args:
        model: The base model, or a wrapper around it, see `base_module`.
        source: A folder, a Lightning checkpoint (``.ckpt``) written with the callback in place, or
            an id on the Hugging Face Hub such as ``"org/name"``.
        revision: Branch, tag or commit on the Hub.
        check_base: Refuse a model whose weights are not those that the statistics belong to. A copy
            in half precision is accepted. ``False`` is for experiments only.

    Returns:
        What was loaded, with the facts about calibration and evaluation.

    Raises:
        FileNotFoundError: If there is no such folder, checkpoint or repository.
        ConnectionError: If the Hub cannot be reached and the adapter is not in the local cache.
        ValueError: If the files are not a sound adapter of a known version, the model is already
            sparsified or lacks a site, or it is another base.

    Examples:
        >>> from lightning_meansparse import calibrate_, find_sites, sparsify_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> _ = fresh.load_state_dict(model.state_dict())
        >>> sparsify_(model, find_sites(model, torch.rand(1, 3, 8, 8)), alpha=0.2)
        >>> calibrate_(model, [torch.rand(16, 3, 8, 8)])
        >>> adapter = load_adapter(fresh, save_adapter(model, "adapter"))
        >>> str(adapter.sites[0]), adapter.alphas
        ('1@in', (0.2,))
        >>> x = torch.rand(2, 3, 8, 8)
        >>> torch.equal(model(x), fresh(x))
        True
    """
    adapter = read_adapter(source, revision=revision)
    insert(model, adapter, check_base=check_base)
    return adapter


def describe(
    model: nn.Module,
    *,
    base: str | None = None,
    revision: str | None = None,
    statistics: Statistics | None = None,
    calibration: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> Adapter:
    """The adapter of a sparsified model, in memory; arguments and errors as in ``save_adapter``."""
    module = scope(model)
    found = operators(module)
    if not found:
        raise ValueError(
            "model has no MeanSparse operators, so there is nothing to save. Call sparsify_ and "
            "calibrate_ first, or train with MeanSparseCallback."
        )
    if not any(bool(op.var.any()) for op in found.values()):
        raise ValueError("model is sparsified but not calibrated. Call calibrate_(model, batches).")
    if provenance(model) == "stale":
        raise RuntimeError(
            "the model's weights have changed since its statistics were measured. Calibrate again "
            "with calibrate_(model, batches), then save."
        )
    centers = {op.center for op in found.values()}
    if len(centers) > 1:
        raise ValueError(f"all operators must have one center, got {', '.join(sorted(centers))}.")
    tensors = {}
    for name, op in found.items():
        tensors[f"{name}.mean"] = op.mean.detach().float().cpu().clone().contiguous()
        # Exact: the product of a float32 and a count, divided again, rounds to that float32.
        m2 = op.var.detach().float().cpu().double() * max(op.count, 1)
        tensors[f"{name}.m2"] = m2.contiguous()
        tensors[f"{name}.count"] = torch.tensor(op.count)
    about, unknown = _about(model, base, revision)
    if calibration is not None:
        about["calibration"] = calibration
    return Adapter(
        sites=tuple(Site.parse(name, tuple(op.mean.shape)) for name, op in found.items()),
        alphas=tuple(_shortest(op.alpha) for op in found.values()),
        tensors=tensors,
        fingerprint=fingerprint(model),
        center=centers.pop(),
        statistics=statistics or noted_statistics(model) or "pooled",
        evaluation=evaluation,
        versions=_versions(about["library"]),
        unknown=unknown,
        **about,
    )


def _about(
    model: nn.Module, base: str | None, revision: str | None
) -> tuple[dict[str, Any], Mapping[Any, Any]]:
    """What is known of the base and the data, and what a newer version knew besides.

    The arguments go before what came with an adapter, and that before what a Classifier says.
    """
    about: dict[str, Any] = dict.fromkeys(_LASTING)
    about["architecture"] = base_of(scope(model)).__name__
    classifier = next((each for each in model.modules() if isinstance(each, Classifier)), None)
    if classifier is not None:
        about |= _of_classifier(classifier)
    note, unknown = noted(model), {}
    if note is not None:
        came = {key: note.facts.get(key) for key in _LASTING}
        if came["source"] is None:  # then nothing is known of how to get it either
            came = {key: value for key, value in came.items() if value is not None}
        about |= came
        same = note.facts.get("sites") == tuple(operators(scope(model)))
        kept = note.facts.get("unknown", {})
        unknown = {path: value for path, value in kept.items() if same or path[0] != "sites"}
    if base is not None and base != about["source"]:
        about |= {"source": base, "revision": None, "options": {}}
    if revision is not None:
        about["revision"] = revision
    if about["source"] is not None:
        about["library"] = _LIBRARIES.get(about["source"].partition("/")[0], about["library"])
        about["source"] = public_name(about["source"])
    return about, unknown


def _of_classifier(classifier: Classifier) -> dict[str, Any]:
    origin = classifier.origin or {}
    size = classifier.input_size
    facts: dict[str, Any] = {
        "source": classifier.source,
        "revision": classifier.revision,
        "options": classifier.options,
        "pixels": {
            "mean": classifier.mean.flatten().tolist(),
            "std": classifier.std.flatten().tolist(),
            "bgr": classifier.bgr,
            "input_size": None if size is None else list(size),
        },
    }
    architecture = origin.get("source") or origin.get("class")
    if architecture is not None:
        facts["architecture"] = architecture
        facts["library"] = _LIBRARIES.get(architecture.partition("/")[0])
    return facts


def _versions(library: str | None) -> dict[str, str]:
    from lightning_meansparse import __version__

    versions = {"lightning_meansparse": __version__, "torch": str(torch.__version__)}
    if library and library in _LIBRARIES.values():  # a stranger's adapter may have named anything
        with contextlib.suppress(PackageNotFoundError):
            versions[library] = version(library)
    return versions


def insert(model: nn.Module, adapter: Adapter, *, check_base: bool = True) -> None:
    """Put an adapter in memory onto a model, in place; errors as in `load_adapter`."""
    if operators(model):
        raise ValueError("model is already sparsified. Call restore_(model) first.")
    candidates = scopes(model)
    lacking = {id(module): _lacking(module, adapter.sites) for module in candidates}
    complete = [module for module in candidates if not lacking[id(module)]]
    if not complete:
        raise ValueError(
            "model lacks sites of the adapter: " + "; ".join(lacking[id(candidates[0])][:4]) + ". "
            "Pass the network that the adapter was made for"
            + (f" ({adapter.source})." if adapter.source else ".")
        )
    module = complete[0]
    if check_base:
        matching = [each for each in complete if adapter.fingerprint.matches(each)]
        if not matching:
            raise ValueError(
                f"the adapter was made for another base{_named(adapter)}: its weights have "
                f"fingerprint {adapter.fingerprint.short()}, this model's "
                f"{Fingerprint.of(module).short()}. Load the same weights. check_base=False uses "
                "it all the same, with statistics that describe another network."
            )
        module = matching[0]
    try:
        sparsify_(module, adapter.sites, center=adapter.center)
        for name, op in operators(module).items():
            mean, var, op.count = adapter.numbers(name)
            op.mean.copy_(mean)
            op.var.copy_(var)
        found = operators(module)
        for site, alpha in zip(adapter.sites, adapter.alphas, strict=True):
            found[str(site)].alpha.fill_(alpha)
    except BaseException:
        restore_(module)
        raise
    if check_base:
        facts = {key: getattr(adapter, key) for key in (*_LASTING, "unknown")}
        facts["sites"] = tuple(map(str, adapter.sites))
        mark_measured(model, adapter.statistics, facts)


def _lacking(model: nn.Module, sites: tuple[Site, ...]) -> list[str]:
    names = dict(model.named_modules())
    missing = [site for site in sites if site.module not in names]
    lines = []
    for site in missing:
        close = difflib.get_close_matches(site.module, names, n=3)
        lines.append(f"{site}" + (f" (it has {', '.join(close)})" if close else ""))
    return lines


def _named(adapter: Adapter) -> str:
    at = f" at revision {adapter.revision}" if adapter.revision else ""
    return f" ({adapter.source}{at})" if adapter.source else ""


def _shortest(alpha: Tensor) -> float:
    """The shortest decimal number that is this float32: 0.2, not 0.20000000298."""
    exact = alpha.item()
    for digits in range(6, 10):
        short = float(f"{exact:.{digits}g}")
        if torch.tensor(short, dtype=torch.float32).item() == exact:
            return short
    return exact
