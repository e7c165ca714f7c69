"""The base network inside a model, and whether it is the one that statistics were measured on."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_meansparse.classifier import Classifier
from lightning_meansparse.moments import Statistics
from lightning_meansparse.surgery import operators

Provenance = Literal["fresh", "stale", "unknown"]

# From wide to narrow. A narrower copy of the same weights is recognised, see Fingerprint.matches.
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_MARK = "_meansparse_measured_on"


def base_module(model: nn.Module) -> nn.Module:
    """The base network inside a wrapper, to which the site names in an adapter are relative.

    Looked through, in this order and as long as it goes on: ``torch.compile`` and
    ``DistributedDataParallel`` wrappers; a `Classifier`
    (its ``model``); a ``LightningModule`` with a ``classifier`` of that class; any other
    ``LightningModule`` whose parameters all belong to one child (metrics and losses without
    parameters do not count). Everything else is its own base.

    Examples:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> base_module(BoringModel())
        Linear(in_features=32, out_features=2, bias=True)
    """
    inner = _one_step_in(model)
    return model if inner is None else base_module(inner)


def scope(model: nn.Module) -> nn.Module:
    """The module that an adapter of ``model`` describes: its base, or all of it.

    A ``LightningModule`` may call an activation in its own ``forward``, outside its only child with
    parameters; then the base is not the whole truth and the module itself is described.
    """
    outer = _unwrapped(model)
    base = base_module(outer)
    return base if len(operators(base)) == len(operators(outer)) else outer


def scopes(model: nn.Module) -> tuple[nn.Module, ...]:
    """Modules that an adapter may have been made for, the likeliest first."""
    outer = _unwrapped(model)
    base = base_module(outer)
    return (base,) if base is outer else (base, outer)


@dataclass(frozen=True)
class Fingerprint:
    """Which weights a network has, as hashes; the same on every device.

    Over the sorted entries of the ``state_dict`` (name, shape, values cast to the dtype in
    question) without ``num_batches_tracked``, which no output in eval mode depends on. Operators do
    not count: their buffers are not in the ``state_dict``. Neither does preprocessing. It takes
    about 4 s per 10⁹ weights and dtype on one core.

    Args:
        dtype: The widest floating-point dtype among the weights: ``"float32"`` (float64 counts as
            it), ``"float16"`` or ``"bfloat16"``.
        hashes: SHA-256 of the weights cast to each dtype, as hex digits.
    """

    dtype: str
    hashes: Mapping[str, str]

    @staticmethod
    def of(model: nn.Module, dtypes: tuple[str, ...] = tuple(DTYPES)) -> Fingerprint:
        """Hash the weights of ``model``, once per dtype asked for.

        Raises:
            ValueError: If weights are on the meta device, that is, have no values.
        """
        hashes = {name: hashlib.sha256() for name in dtypes}
        for key, value in sorted(model.state_dict().items()):
            name = key.replace("_orig_mod.", "")
            if not isinstance(value, Tensor) or name.rpartition(".")[2] == "num_batches_tracked":
                continue
            if value.is_meta:
                raise ValueError(
                    f"model: {key} is on the meta device and has no values. Load its weights first."
                )
            value = value.detach().cpu()
            for dtype, digest in hashes.items():
                digest.update(f"{name} {tuple(value.shape)}\n".encode())
                digest.update(_bytes(value, DTYPES[dtype]))
        return Fingerprint(
            _widest(model), {name: digest.hexdigest() for name, digest in hashes.items()}
        )

    def matches(self, model: nn.Module) -> bool:
        """Whether ``model`` has these weights, or the same weights cast to or from half precision.

        Both are compared at the narrower of the two dtypes: statistics measured in float32 are
        accepted by ``model.half()`` and the other way round, never by other weights.
        """
        own = _widest(model)
        if "float32" in (own, self.dtype):
            common = self.dtype if own == "float32" else own
        elif own == self.dtype:
            common = own
        else:
            return False
        return self.hashes.get(common) == Fingerprint.of(model, (common,)).hashes[common]

    def short(self) -> str:
        """The first digits, for messages."""
        return next(iter(self.hashes.values()), "none")[:12]


@dataclass(frozen=True)
class Note:
    """What a model remembers of its statistics.

    Args:
        fingerprint: The weights that they were measured on.
        hash: Of the statistics, see `statistics_hash`: with others in place the note is void.
        statistics: How they were averaged.
        facts: What the adapter that they came from says about them and its base.
    """

    fingerprint: Fingerprint
    hash: str
    statistics: Statistics
    facts: Mapping[str, Any]


def mark_measured(
    model: nn.Module, statistics: Statistics, facts: Mapping[str, Any] | None = None
) -> None:
    """Note in the model that its statistics were measured on its weights, and how averaged."""
    module = scope(model)
    note = Note(Fingerprint.of(module), statistics_hash(module), statistics, facts or {})
    vars(module)[_MARK] = note


def noted(model: nn.Module) -> Note | None:
    """What was noted of the statistics that the model has; None if nothing was of these."""
    module = scope(model)
    note: Note | None = vars(module).get(_MARK)
    return note if note is not None and note.hash == statistics_hash(module) else None


def noted_statistics(model: nn.Module) -> Statistics | None:
    """How the model's statistics were averaged; None if nobody noted it of these."""
    note = noted(model)
    return None if note is None else note.statistics


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of the module that an adapter describes, from the note if that holds."""
    module, note = scope(model), noted(model)
    same = note is not None and note.fingerprint.dtype == _widest(module)
    if note is not None and same and note.fingerprint.matches(module):
        return note.fingerprint
    return Fingerprint.of(module)


def provenance(model: nn.Module) -> Provenance:
    """Whether the statistics in the model belong to its weights.

    ``"unknown"`` when nobody noted it, or the statistics were replaced since: then whoever put them
    there knows.
    """
    note = noted(model)
    if note is None:
        return "unknown"
    return "fresh" if note.fingerprint.matches(scope(model)) else "stale"


def statistics_hash(model: nn.Module) -> str:
    """Hash of the means and variances in a model's operators; equal for equal statistics."""
    return hash_of((name, op.mean, op.var) for name, op in operators(model).items())


def hash_of(statistics: Iterable[tuple[str, Tensor, Tensor]]) -> str:
    """Hash of sites' names, means and variances, in this order."""
    digest = hashlib.sha256()
    for name, *values in statistics:
        digest.update(name.encode())
        for value in values:
            digest.update(_bytes(value.detach().cpu(), torch.float32))
    return digest.hexdigest()


def public_name(base: str) -> str:
    """The name of a base without the folders around it, which mean nothing to anyone else."""
    library, _, name = base.partition("/")
    if library not in ("timm", "torchvision", "hf", "meansparse"):
        name = base
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    names_a_folder = name.startswith(("local-dir:", ".", "~")) or folder.is_absolute()
    # timm and torchvision know names alone; elsewhere a folder goes before a name.
    if names_a_folder or (library not in ("timm", "torchvision") and folder.is_dir()):
        return Path(os.path.abspath(folder)).name
    return base


def _one_step_in(model: nn.Module) -> nn.Module | None:
    outer = _unwrapped(model)
    if outer is not model:
        return outer
    if isinstance(model, Classifier):
        return model.model
    if not _is_lightning_module(model):
        return None
    classifier: Any = getattr(model, "classifier", None)
    if isinstance(classifier, Classifier):
        return classifier
    children = [c for c in model.children() if next(c.parameters(), None) is not None]
    alone = len(children) == 1 and next(model.parameters(recurse=False), None) is None
    return children[0] if alone else None


def _is_lightning_module(model: nn.Module) -> bool:
    """Without importing Lightning for it, which takes seconds: no module is one before that."""
    for package in ("lightning.pytorch", "pytorch_lightning"):
        loaded = sys.modules.get(package)
        if loaded is not None and isinstance(model, loaded.LightningModule):
            return True
    return False


def _unwrapped(model: nn.Module) -> nn.Module:
    """Without compilers and parallel wrappers, whose inner module has an agreed name."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, parallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _widest(model: nn.Module) -> str:
    """The dtype of the weights if all are in one kind of half precision, else ``"float32"``."""
    found = {str(v.dtype) for v in model.state_dict().values() if v.is_floating_point()}
    half = found.pop().removeprefix("torch.") if len(found) == 1 else ""
    return half if half in ("float16", "bfloat16") else "float32"


def _bytes(value: Tensor, dtype: torch.dtype) -> Any:
    """The values as a buffer of bytes, floating-point ones cast to ``dtype``."""
    if value.is_complex():
        value = torch.view_as_real(value)
    if value.is_floating_point():
        value = value.to(dtype)
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()
