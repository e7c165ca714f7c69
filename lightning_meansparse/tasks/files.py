"""Files that are there whole or not at all, in folders that can be written to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Mapping[str, Any], path: Path) -> None:
    """Write a JSON file in one step."""
    write_file(json.dumps(content, allow_nan=False).encode(), path)
