"""What a sweep writes about itself, as plain JSON values."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_meansparse.records import AlphaSummary, verdict


def about_data(datamodule: Any) -> dict[str, Any]:
    """Name and fingerprint of what a datamodule holds."""
    dataset = getattr(datamodule, "dataset", None)
    if isinstance(dataset, Path) or (isinstance(dataset, str) and Path(dataset).exists()):
        # The rest of a path says where somebody keeps it, not what it is.
        name = Path(dataset).name
    else:
        name = dataset if isinstance(dataset, str) else type(datamodule).__name__
    return {"name": name, "fingerprint": getattr(datamodule, "fingerprint", None)}


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


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_text(json.dumps(content, allow_nan=False), "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
