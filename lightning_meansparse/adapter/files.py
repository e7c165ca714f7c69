"""Adapters in and out of folders, the Hugging Face Hub and models."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lightning_meansparse.adapter.base import (
    Fingerprint,
    fingerprint,
    mark_measured,
    noted_statistics,
    provenance,
    public_name,
    scope,
    scopes,
)
from lightning_meansparse.adapter.format import Adapter
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.moments import Statistics
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import operators, restore_, sparsify_

CONFIG_NAME = "meansparse_config.json"
TENSORS_NAME = "meansparse.safetensors"

# An adapter is kilobytes. The limits keep a hostile or mistaken file from filling the memory.
_MAX_CONFIG_BYTES = 8 * 2**20
_MAX_TENSORS_BYTES = 256 * 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
        base: Name of the base model, such as ``"timm/resnet18"``. Taken from a ``Classifier`` in
            the model if not given. Of a local folder only the last name is written.
        revision: Revision of the base, such as a commit hash.
        statistics: As given to ``calibrate_``; None takes what the model notes, or ``"pooled"``.
        calibration: Facts about the calibration data, such as
            ``{"dataset": "cifar10", "split": "train", "images": 50000}``.
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
    data = safetensors.torch.save(dict(adapter.tensors), metadata={"format": "pt"})
    config = {**adapter.config(), "tensors_sha256": hashlib.sha256(data).hexdigest()}
    try:
        text = json.dumps(config, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"calibration and evaluation must be plain JSON values ({error}). "
            "Convert tensors and paths first, e.g. float(x), str(path)."
        ) from None
    folder = Path(directory)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"directory: {folder} is a file. Name a folder to write into.")
    folder.mkdir(parents=True, exist_ok=True)
    _replace_files(folder, {TENSORS_NAME: data, CONFIG_NAME: text.encode()})
    return folder


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


def read_adapter(source: str | os.PathLike[str], *, revision: str | None = None) -> Adapter:
    """Read and check an adapter without a model; see `load_adapter`."""
    path = Path(source).expanduser()
    checkpoint = path.is_file() and path.suffix == ".ckpt"
    if revision is not None and (checkpoint or path.is_dir()):
        kind = "checkpoint" if checkpoint else "folder"
        raise ValueError(f"revision is for adapters on the Hub, and {path} is a {kind}.")
    if checkpoint:
        return from_checkpoint(_open_checkpoint(path), str(path))
    if not path.is_dir():
        path = _download(str(source), revision)
    where = str(path / CONFIG_NAME)
    text = _read(path / CONFIG_NAME, _MAX_CONFIG_BYTES)
    data = _read(path / TENSORS_NAME, _MAX_TENSORS_BYTES)
    try:
        config = json.loads(text.decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{path / TENSORS_NAME} is not a valid safetensors file: {error}"
        ) from None
    adapter = Adapter.parse(config, tensors, where=where)
    if config.get("tensors_sha256") != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{where} and {TENSORS_NAME} do not belong together (tensors_sha256 differs): a copy "
            "or a write was cut short. Save or download the adapter again."
        )
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
    from lightning_meansparse import __version__

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
    for classifier in model.modules():
        if base is None and isinstance(classifier, Classifier):
            base, revision = classifier.source, revision or classifier.revision
    tensors = {}
    for name, op in found.items():
        tensors[f"{name}.mean"] = op.mean.detach().float().cpu().clone().contiguous()
        tensors[f"{name}.var"] = op.var.detach().float().cpu().clone().contiguous()
    return Adapter(
        sites=tuple(Site.parse(name, tuple(op.mean.shape)) for name, op in found.items()),
        alphas=tuple(_shortest(op.alpha) for op in found.values()),
        tensors=tensors,
        fingerprint=fingerprint(model),
        center=centers.pop(),
        statistics=statistics or noted_statistics(model) or "pooled",
        source=None if base is None else public_name(base),
        revision=revision,
        calibration=calibration,
        evaluation=evaluation,
        meansparse_version=__version__,
    )


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
            op.mean.copy_(adapter.tensors[f"{name}.mean"])
            op.var.copy_(adapter.tensors[f"{name}.var"])
        found = operators(module)
        for site, alpha in zip(adapter.sites, adapter.alphas, strict=True):
            found[str(site)].alpha.fill_(alpha)
    except BaseException:
        restore_(module)
        raise
    if check_base:
        mark_measured(model, adapter.statistics)


def from_checkpoint(checkpoint: Mapping[str, Any], where: str) -> Adapter:
    """The adapter that the callback put into a Lightning checkpoint."""
    state = (checkpoint.get("callbacks") or {}).get("MeanSparseCallback") or {}
    if not isinstance(state, Mapping) or not state.get("config"):
        raise ValueError(
            f"{where} holds no MeanSparse statistics: it was written during training, or without "
            "the callback. Use trainer.save_checkpoint(path) after fit, or an adapter folder."
        )
    return Adapter.parse(state["config"], state.get("tensors") or {}, where=where)


def _open_checkpoint(path: Path) -> Mapping[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        # UnpicklingError; of files that are no checkpoint, anything.
        raise ValueError(
            f"{path} is no checkpoint, or holds more than tensors and plain values; that might run "
            "code and is not opened. Pass an adapter folder, written by save_adapter where the "
            "model was made."
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} must hold a Lightning checkpoint, got {type(found).__name__}.")
    return found


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


def _replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write every file under a temporary name, then move them into place in the given order."""
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for name, data in contents.items():
            temporary[name].write_bytes(data)
        for name, path in temporary.items():
            os.replace(path, folder / name)
    finally:
        for path in temporary.values():
            with contextlib.suppress(OSError):
                path.unlink()


def _read(path: Path, limit: int) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: an adapter is a folder with {CONFIG_NAME} and {TENSORS_NAME}, as "
            "save_adapter writes it."
        )
    if path.stat().st_size > limit:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, more than the {limit:,} that an adapter "
            "may have. This is something else."
        )
    return path.read_bytes()


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _download(source: str, revision: str | None) -> Path:
    """The adapter's two files from the Hub, in the local cache."""
    if not _HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"source: there is no folder {source!r}, and ids on the Hub look like 'org/name'."
        )
    from huggingface_hub import errors, snapshot_download

    try:
        folder = snapshot_download(
            source, revision=revision, allow_patterns=[CONFIG_NAME, TENSORS_NAME]
        )
    except (
        errors.HFValidationError,
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
    ) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise FileNotFoundError(
            f"source: there is no folder {source!r} here, and no {source!r}{at} on the Hub that "
            "you may read. Check the name; for a private one run `hf auth login`."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise ConnectionError(
            f"source: there is no folder {source!r} here, the Hub cannot be reached, and the "
            "adapter is not in the local cache. Go online once, or pass a folder."
        ) from error
    return Path(folder)
