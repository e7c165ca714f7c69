"""Adapters in and out of folders, Lightning checkpoints and the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from lightning_meansparse.adapter.format import Adapter

CONFIG_NAME = "meansparse_config.json"
TENSORS_NAME = "meansparse.safetensors"

# An adapter is kilobytes. The limits keep a hostile or mistaken file from filling the memory.
_MAX_CONFIG_BYTES = 8 * 2**20
_MAX_TENSORS_BYTES = 256 * 2**20
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


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
        path = fetch(str(source), revision)
    where = str(path / CONFIG_NAME)
    text = _read(path / CONFIG_NAME, _MAX_CONFIG_BYTES)
    data = _read(path / TENSORS_NAME, _MAX_TENSORS_BYTES)
    config = _json(text, where)
    tensors = _safetensors(data, path / TENSORS_NAME)
    adapter = Adapter.parse(config, tensors, where=where)
    if config.get("tensors_sha256") != hashlib.sha256(data).hexdigest():
        raise ValueError(
            f"{where} and {TENSORS_NAME} do not belong together (tensors_sha256 differs): a copy "
            "or a write was cut short. Save or download the adapter again."
        )
    return adapter


def write_adapter(adapter: Adapter, directory: str | os.PathLike[str]) -> Path:
    """Write an adapter's two files; errors as in `save_adapter`."""
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
    replace_files(folder, {TENSORS_NAME: data, CONFIG_NAME: text.encode()})
    return folder


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


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
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
        raise ValueError(_too_large(str(path), path.stat().st_size, limit))
    return path.read_bytes()


def _too_large(name: str, size: int, limit: int) -> str:
    return (
        f"{name} has {size:,} bytes, more than the {limit:,} that an adapter may have. This is "
        "something else."
    )


def _json(text: bytes, where: str) -> Any:
    """Decoded strictly: no key twice, no number that JSON does not have or a float cannot hold."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = dict(pairs)
        if len(keys) < len(pairs):
            twice = next(key for key, n in Counter(key for key, _ in pairs).items() if n > 1)
            raise ValueError(f"the key {twice!r:.80} stands there twice")
        return keys

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            raise ValueError(f"{number:.80} is not a finite number")
        return value

    try:
        value = json.loads(
            text.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite
        )
        json.dumps(value, ensure_ascii=False).encode()  # half a character could not be written
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from None


def _safetensors(data: bytes, path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        # Asked only now: the length with which a sound file begins can look like a pickle, too.
        if data[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
            raise ValueError(
                f"{path} is a pickle, as torch.save writes it, and not a safetensors file. Pickles "
                "may run code and are not opened. Save the adapter with save_adapter."
            ) from None
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from None
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    _json(header, f"the header of {path}")  # the library takes the last of tensors named alike
    return tensors


def fetch(
    source: str, revision: str | None, names: Sequence[str] = (CONFIG_NAME, TENSORS_NAME)
) -> Path:
    """The folder in the local cache that holds these files of a repository, as far as it has them.

    Raises:
        FileNotFoundError: If there is no such repository or revision, or it is private.
        ConnectionError: If the Hub cannot be reached and the files are not in the local cache.
        ValueError: If a file of the adapter is too large to be one; then nothing is downloaded.
    """
    if not HUB_ID.fullmatch(source):
        raise FileNotFoundError(
            f"source: there is no folder {source!r}, and ids on the Hub look like 'org/name'."
        )
    from huggingface_hub import errors, snapshot_download

    try:
        _refuse_large(source, revision)
        folder = snapshot_download(source, revision=revision, allow_patterns=list(names))
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
            "files are not in the local cache. Go online once, or pass a folder."
        ) from error
    return Path(folder)


def _refuse_large(source: str, revision: str | None) -> None:
    """Ask the Hub for the sizes; where it does not say, the download fails or `_read` looks."""
    from huggingface_hub import HfApi

    limits = {CONFIG_NAME: _MAX_CONFIG_BYTES, TENSORS_NAME: _MAX_TENSORS_BYTES}
    try:
        found = HfApi().get_paths_info(source, list(limits), revision=revision)
    except Exception:
        return  # no connection, no such repository: the download meets it too, and says it better
    for file in found:
        size = getattr(file, "size", 0)
        if size > limits.get(file.path, size):
            raise ValueError(_too_large(f"{source}/{file.path}", size, limits[file.path]))
