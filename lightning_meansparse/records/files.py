"""The records file: written atomically, read back strictly, whole or in the parts of a sweep."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_meansparse.records.table import FORMAT_VERSION, MAIN, SCHEMA

_KEY = b"meansparse"
_SORTED_BY = ("split", "round", "alpha", "index", "order")


def write_records(
    tables: pa.Table | Iterable[pa.Table],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
) -> Path:
    """Writes records as one Parquet file, atomically: a crash leaves the old file as it was.

    Rows are sorted by split, round, alpha, index and order, so that the file does not depend on
    how batches or ranks were scheduled.

    Args:
        tables: one table or several, with the columns of `SCHEMA`.
        path: the file to write; its folder is made if need be.
        metadata: how the rows were measured, JSON values with string keys (tuples become lists).

    Returns:
        The path written.

    Raises:
        ValueError: a table has other columns or missing values, or the metadata hold NaN.
        TypeError: the metadata hold something JSON cannot.
    """
    parts = [tables] if isinstance(tables, pa.Table) else list(tables)
    for part in parts:
        _check_columns(part, "tables")
    path = Path(path)
    if metadata.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(
            f"metadata must not set 'format_version' to anything but {FORMAT_VERSION}. "
            f"Got {metadata['format_version']!r}."
        )
    text = json.dumps(
        {**metadata, "format_version": FORMAT_VERSION}, sort_keys=True, allow_nan=False
    )
    table = pa.concat_tables([part.select(SCHEMA.names).cast(SCHEMA) for part in parts])
    table = table.sort_by([(name, "ascending") for name in _SORTED_BY])
    table = table.replace_schema_metadata({_KEY: text.encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        pq.write_table(table, temporary, write_page_checksum=True)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read_records(path: str | os.PathLike[str]) -> tuple[pa.Table, dict[str, Any]]:
    """Reads what `write_records` wrote, now or in an older version of the format.

    Version 1 knew one round, `MAIN`, and neither ``noise`` nor ``zero_gradient`` nor
    ``probabilities``.

    A sweep that has not finished keeps the splits that are done in ``records.parquet`` and one
    file per batch of the current split in ``parts/``; both are read, and the metadata say so:
    ``"unfinished"`` is the number of batches read.

    Args:
        path: a records file, or the output folder of a sweep, finished or not.

    Returns:
        The table, with the columns of `SCHEMA`, and the metadata.

    Raises:
        FileNotFoundError: there are no records.
        ValueError: a file is damaged, not ours, or from a newer version of this package, or the
            parts are of several sweeps.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    try:
        return _read_folder(path)
    except FileNotFoundError:
        # The sweep has just finished the split and removed its parts: once more.
        return _read_folder(path)


def _read_folder(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    whole, parts = path / "records.parquet", sorted((path / "parts").glob("*.parquet"))
    table: pa.Table = SCHEMA.empty_table()
    metadata: dict[str, Any] = {}
    if whole.exists() or not parts:
        table, metadata = _read_file(whole)
    done = pc.unique(table.column("split"))
    read = [_read_file(part) for part in parts]
    # A sweep killed just after a split was done has not removed its parts.
    fresh = [(rows, told) for rows, told in read if len(rows) and rows["split"][0] not in done]
    if not fresh:
        return table, metadata
    if len({told.get("sweep") for _, told in fresh}) > 1:
        raise ValueError(
            f"'{path / 'parts'}' holds batches of several sweeps, which cannot be reported as one. "
            "Remove those that do not belong there, or run the sweep again into another folder."
        )
    about = _together(metadata, [told for _, told in fresh])
    return (
        pa.concat_tables([table, *(rows for rows, _ in fresh)]),
        {**about, "unfinished": len(fresh)},
    )


def _together(done: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """What the parts agree on, what the finished splits say, and the rounds of all."""
    first, *others = parts
    agreed = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
    agreed.pop("part", None)  # the name of a file
    rounds: dict[str, Any] = {}
    for told in (*parts, done):
        for split, known in told.get("rounds", {}).items():
            rounds.setdefault(split, {}).update(known)
    return {**agreed, **done, **({"rounds": rounds} if rounds else {})}


def _read_file(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"path must be a records file written by a sweep (records.parquet). "
            f"There is none at '{path}'; run `meansparse sweep` first or name another folder."
        )
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"'{path}' is not a readable Parquet file ({error}); it is damaged or something else. "
            "Run the sweep again."
        ) from error
    metadata = _metadata(table, path)
    version = metadata.pop("format_version", None)
    if not isinstance(version, int) or version < 1:
        raise ValueError(
            f"'{path}' must name a format_version >= 1 in its metadata. Got {version!r}."
        )
    if version > FORMAT_VERSION:
        raise ValueError(
            f"'{path}' has format_version {version}; this version of lightning_meansparse reads up "
            f"to {FORMAT_VERSION}. Upgrade with `pip install -U lightning_meansparse`."
        )
    if version == 1:
        table = _from_version_1(table)
    _check_columns(table, f"'{path}'")
    return table.select(SCHEMA.names).cast(SCHEMA), metadata


def _from_version_1(table: pa.Table) -> pa.Table:
    unknown = {"round": MAIN, "noise": math.nan, "zero_gradient": math.nan, "probabilities": False}
    for name, value in unknown.items():
        constant = pa.repeat(pa.scalar(value, SCHEMA.field(name).type), table.num_rows)
        table = table.append_column(name, constant)
    return table


def _metadata(table: pa.Table, path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((table.schema.metadata or {})[_KEY])
    except KeyError:
        raise ValueError(
            f"'{path}' is Parquet, but not a records file: its metadata lack {_KEY.decode()!r}. "
            "Give the records.parquet that a sweep wrote."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"'{path}' holds damaged metadata ({error}); run the sweep again."
        ) from error
    if not isinstance(metadata, dict):
        raise ValueError(f"'{path}' must hold a JSON object as metadata. Got {metadata!r:.80}.")
    return metadata


def _check_columns(table: pa.Table, name: str) -> None:
    wrong = [
        field.name
        for field in SCHEMA
        if table.schema.get_field_index(field.name) < 0  # also if there are two
        or table.schema.field(field.name).type != field.type
        or table.column(field.name).null_count
    ]
    if wrong:
        raise ValueError(
            f"{name} must have the records columns without missing values; wrong or missing: "
            f"{', '.join(wrong)}. Got {', '.join(table.column_names)}."
        )
