"""Files that are there whole or not at all, in folders that one run at a time can write to."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lightning_meansparse.adapter.files import replace_files

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger(__name__)

LOCK = ".lock"


def check_folder(folder: Path, name: str) -> None:
    """Make a folder and see that it can be written to, before hours of work.

    Raises:
        ValueError: Naming the option that asked for the folder.
    """
    probe = folder / f".writable.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)  # on another node, a process may have the same number
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


class WriteError(OSError):
    """A file could not be written; the message says what is left."""


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say of a write that fails, as on a full disk, where it was and what is left.

    Raises:
        WriteError: In place of the original one.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        what = os.strerror(error.errno) if error.errno else str(error).removesuffix(".")
        if name := error.filename2 or error.filename:  # one that is in the way, perhaps
            what += f": {str(name)!r}"
        raise WriteError(
            f"output {str(folder)!r} cannot be written to any more: {what}. All that was written "
            "before is whole: put that right, and the same command goes on from there."
        ) from error


class FolderLock:
    """A folder held by one process, against all that ask, on a shared file system too.

    The lock is the kernel's and ends with the process, however that ends: a file that says the
    same would have to be believed after `kill -9`, or not at all.

    Args:
        folder: Must exist.

    Raises:
        BlockingIOError: If another process holds it; the message says which.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._file: TextIO | None = None
        if fcntl is None:
            _unlocked(folder, "not on this system")
            return
        while True:
            file = self._path.open("a+", encoding="utf-8")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise BlockingIOError(
                        f"output {str(folder)!r} is in use by a sweep that runs now ({holder}). "
                        "Wait until it ends, or name another output."
                    ) from error
                _unlocked(folder, error.strerror)
                return
            # Whoever held it before has removed the file, perhaps after we had opened it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                    break
            file.close()
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        self._file = file

    def release(self) -> None:
        """Let others in."""
        if self._file is not None:
            self._path.unlink(missing_ok=True)
            self._file.close()
            self._file = None


def _unlocked(folder: Path, why: str | None) -> None:
    _log.warning(
        "%s cannot be locked (%s): see to it that no two sweeps write there at a time", folder, why
    )
