"""What a sweep writes about itself, as plain JSON values."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader

from lightning_meansparse.adapter.base import fingerprint, scope, statistics_hash
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.records import AlphaSummary, environment, verdict
from lightning_meansparse.surgery import operators
from lightning_meansparse.tasks.rounds import Round
from lightning_meansparse.tasks.samples import Samples, first_samples

if TYPE_CHECKING:
    from lightning_meansparse.tasks.sweep import AlphaSweep

_HASHED = 32
"""Samples that are compared of data without a fingerprint of their own; the others are trusted."""

_DIGITS = 16


def about_data(datamodule: Any) -> dict[str, Any]:
    """Name and fingerprint of what a datamodule holds."""
    dataset = getattr(datamodule, "dataset", None)
    named = isinstance(dataset, str | Path)
    return {
        "name": _without_place(str(dataset)) if named else type(datamodule).__name__,
        "fingerprint": getattr(datamodule, "fingerprint", None),
    }


def about_model(classifier: Classifier) -> str:
    """Name of a classifier, or the class of its network if it came without one."""
    source = classifier.source
    return type(classifier.model).__name__ if source is None else _without_place(source)


def _without_place(source: str) -> str:
    """The last name of a path: the rest says where somebody keeps it, not what it is."""
    return Path(source).name if Path(source).exists() else source


def settings(sweep: AlphaSweep) -> dict[str, Any]:
    """How a sweep attacks."""
    return {
        "eps": sweep.eps,
        "norm": sweep.norm,
        "attacks": [spec.as_dict() for spec in sweep.attacks],
        "seed": sweep.seed,
    }


def selection(sweep: AlphaSweep) -> dict[str, Any]:
    """How a sweep chooses alpha: the method, and what it alone depends on."""
    known: dict[str, dict[str, Any]] = {
        "racing": {"screen": [spec.as_dict() for spec in sweep.screen]},
        "clean_budget": {"clean_budget": sweep.clean_budget},
    }
    return {"method": sweep.select, **known.get(sweep.select, {})}


def configuration(
    sweep: AlphaSweep, split: str, loader: DataLoader[Any], samples: Samples
) -> dict[str, Any]:
    """Everything that decides the records of one split, the same on every rank."""
    trainer = sweep.trainer
    datamodule: Any = getattr(trainer, "datamodule", None)
    data = about_data(datamodule)
    if data["fingerprint"] is None:
        data["fingerprint"] = _hash(*first_samples(loader, _HASHED))
    weights = fingerprint(sweep.classifier).hashes["float32"][:_DIGITS]
    return {
        "model": {
            "name": about_model(sweep.classifier),
            "weights": weights,
            "statistics": sweep.given_statistics,
        },
        "data": {
            split: {
                **data,
                "samples": len(samples),
                "numbers": _hash(samples.order),
                "batch_size": loader.batch_size,
            }
        },
        **settings(sweep),
        "alphas": list(sweep.alphas),
        "select": selection(sweep),
        "test_alphas": sweep.test_alphas,
        "check_images": sweep.check_images,
        "calibration": {
            "where": where(sweep),
            "center": sweep.center,
            "statistics": sweep.statistics,
            "batches": sweep.calibration_batches,
            "images": getattr(datamodule, "calibration", None),
        },
        "save_examples": sweep.save_examples,
        "device": sweep.device.type,
        "versions": environment()["versions"],
    }


def metadata(sweep: AlphaSweep) -> dict[str, Any]:
    """What the records say about how they were measured."""
    chosen = {} if sweep.chosen_alpha is None else {"chosen_alpha": sweep.chosen_alpha}
    reason = {} if sweep.reason is None else {"reason": sweep.reason}
    return {
        "model": about_model(sweep.classifier),
        "fingerprints": _fingerprints(sweep.classifier),
        "data": about_data(getattr(sweep.trainer, "datamodule", None)),
        **settings(sweep),
        "alphas": list(sweep.alphas),
        "select": {**selection(sweep), **reason},
        "rounds": sweep.rounds,
        "where": where(sweep),
        "statistics": sweep.statistics,
        "center": sweep.center,
        "calibration": sweep.calibration,
        **chosen,
        **environment(),
        **sweep.notes,
    }


def _fingerprints(classifier: Classifier) -> dict[str, str]:
    """By which a reader of the records knows the base and the adapter that were measured."""
    known = {"weights": fingerprint(classifier).hashes["float32"][:_DIGITS]}
    if operators(classifier):
        known["statistics"] = statistics_hash(scope(classifier))[:_DIGITS]
    return known


def about_rounds(sweep: AlphaSweep, rounds: Sequence[Round]) -> dict[str, Any]:
    """How each round attacks."""
    return {
        round.name: {
            "eps": sweep.eps if round.eps is None else round.eps,
            "norm": sweep.norm,
            "attacks": [spec.as_dict() for spec in round.attacks],
        }
        for round in rounds
    }


def where(sweep: AlphaSweep) -> str | list[str]:
    """The places of the operators, as far as JSON can say it."""
    if callable(sweep.where):
        return f"a function, {getattr(sweep.where, '__qualname__', type(sweep.where).__name__)}"
    return sweep.where if isinstance(sweep.where, str) else list(sweep.where)


def result(summary: AlphaSummary) -> dict[str, Any]:
    """What an adapter says about its own alpha."""
    return {
        "split": summary.split,
        "n": summary.n,
        "clean": summary.clean.value,
        "worst": summary.worst.value,
        "worst_of_base": summary.base.value,
        "verdict": verdict(summary),
    }


def _hash(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]
