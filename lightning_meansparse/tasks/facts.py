"""What a sweep writes about itself, as plain JSON values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_meansparse.classifier import Classifier
from lightning_meansparse.records import AlphaSummary, verdict

if TYPE_CHECKING:
    from lightning_meansparse.tasks.sweep import AlphaSweep


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


def check_folder(folder: Path, name: str) -> None:
    """Make a folder and see that it can be written to, before hours of work.

    Raises:
        ValueError: Naming the option that asked for the folder.
    """
    probe = folder / f".writable.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{name} must be a folder that can be written to, got {str(folder)!r}: "
            f"{error.strerror or error}. Name another."
        ) from error


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(json.dumps(content, allow_nan=False), "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
