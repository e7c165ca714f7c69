"""Files that are there whole or not at all, in folders that can be written to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_meansparse.adapter.files import replace_files


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


def write_file(content: bytes, path: Path) -> None:
    """Write a file in one step: whoever is killed meanwhile leaves the old one as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_files(path.parent, {path.name: content})


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file in one step."""
    write_file(json.dumps(content, allow_nan=False).encode(), path)
