"""What a sweep keeps in its folder while it runs, so that it can be killed at any moment and go on.

`sweep.json` says what is measured, and is there before anything else. `parts/` holds one file per
batch of a round, with its rows at all alphas: alphas share work inside a batch, so a batch is what
each process loses at most. Which process measured it, and of how many, does not matter. A finished
split goes to `records.parquet`, and its parts go away. Each file is there whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors.torch import save
from torch import Tensor

from lightning_meansparse.adapter.files import CONFIG_NAME, TENSORS_NAME, read_adapter
from lightning_meansparse.records import SCHEMA, read_records, write_records
from lightning_meansparse.tasks.files import (
    FolderLock,
    check_folder,
    write_file,
    write_json,
    writing,
)
from lightning_meansparse.tasks.ranks import gathered, shared, shared_table
from lightning_meansparse.tasks.rounds import Round

_log = logging.getLogger(__name__)

FORMAT_VERSION = 2
CONFIGURATION = "sweep.json"
RECORDS = "records.parquet"
SITES = "sites.json"
ADAPTER = "adapter"
_PARTS = "parts"
_EXAMPLES = "examples"
_TEMPORARY = re.compile(
    r"\.(sweep\.json|records\.parquet|sites\.json|meansparse.*|writable|seen"
    r"|.*-\d+\.(parquet|safetensors))\.\d+\.tmp"
)


class Journal:
    """The folder of one sweep. All processes must see the same one; the first reads rows for all.

    Args:
        folder: The sweep's output; None keeps nothing and knows nothing.
        rank: Number of this process.

    Attributes:
        records: The rows of its finished splits; `metadata` are theirs.
        adapter: Folder with the statistics that it has measured, or None.
        about: What every part says about how it was measured, for who reads an unfinished sweep.
    """

    def __init__(self, folder: Path | None, rank: int = 0) -> None:
        self.folder = folder
        self.rank = rank
        self.records: pa.Table = SCHEMA.empty_table()
        self.metadata: dict[str, Any] = {}
        self.adapter: Path | None = None
        self.about: dict[str, Any] = {}
        self._configuration: dict[str, Any] = {}
        self._digest = ""
        self._probe = ""
        self._lock: FolderLock | None = None

    def agree(self, configuration: Mapping[str, Any], device: torch.device) -> None:
        """Compare what the processes are to measure; all call this.

        Args:
            configuration: As for `open`, of this process.
            device: Where this rank's tensors are.

        Raises:
            ValueError: If it is something else than the first one is to measure.
        """
        output = "a folder" if self.folder else "none"
        # What JSON cannot say matters only to a folder, which then refuses it.
        mine = json.dumps({"output": output, **configuration}, default=_class).encode()
        first = shared(mine, device)
        if changes := list(_changes("", json.loads(first), json.loads(mine))):
            raise ValueError(
                f"process {self.rank} would measure something else than process 0: "
                f"{'; '.join(changes)}. Give all the same model, data and packages."
            )

    def open(self, configuration: Mapping[str, Any], split: str) -> None:
        """Compare the folder with what is to be measured now; write nothing.

        Args:
            configuration: JSON values. `configuration["data"]` holds one entry per split; those
                that only one side has are not compared.
            split: The one that comes next.

        Raises:
            ValueError: If the folder holds a sweep of another configuration, or files of which
                nobody can tell.
        """
        if self.folder is None:
            return
        new = json.loads(json.dumps(configuration, allow_nan=False))
        old = self._known(self.folder)
        if old is not None:
            compared = {k: old["data"].get(k, new["data"][k]) for k in new["data"]}
            if changes := list(_changes("", {**old, "data": compared}, new)):
                raise ValueError(
                    f"output {str(self.folder)!r} holds a sweep that was begun otherwise: "
                    f"{'; '.join(changes)}. Name another output, or delete this folder to begin "
                    "anew."
                )
            new["data"] = {**old["data"], **new["data"]}
            self.records, self.metadata = _sound_records(self.folder / RECORDS)
            self.adapter = _sound_adapter(self.folder / ADAPTER)
        self._configuration = new
        identity = {**new, "data": new["data"][split]}
        self._digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def hold(self, configuration: Mapping[str, Any], split: str) -> None:
        """Make the folder, keep other sweeps out of it, and compare again: one may just have ended.

        Args:
            configuration: As for `open`, which comes first: it writes nothing if it refuses.
            split: The same.

        Raises:
            ValueError: As `open`, or if the folder cannot be written to.
            BlockingIOError: If another sweep is running there.
        """
        if self.folder is None:
            return
        check_folder(self.folder, "output")
        self._lock = FolderLock(self.folder)
        self.open(configuration, split)

    def release(self) -> None:
        """Let other sweeps in."""
        if self._lock is not None:
            self._lock.release()

    def begin(self, notes: Mapping[str, Any]) -> None:
        """Write what is measured, with notes that decide nothing, and a file to look for."""
        if self.folder is not None:
            content = {"format_version": FORMAT_VERSION, "notes": dict(notes)}
            self._probe = f".seen.{secrets.randbelow(10**12)}.tmp"
            with writing(self.folder):
                write_json({**content, **self._configuration}, self.folder / CONFIGURATION)
                (self.folder / self._probe).touch()

    def share(self, device: torch.device) -> None:
        """Let all processes know what the first has found; all call this, when it has begun.

        Args:
            device: Where this rank's tensors are.

        Raises:
            ValueError: If some do not see the first one's folder, or cannot write to it.
        """
        if self.folder is None:
            return
        found = {
            "digest": self._digest,
            "metadata": self.metadata,
            "adapter": self.adapter is not None,
            "probe": self._probe,
        }
        found = json.loads(shared(json.dumps(found).encode(), device))
        self._digest, self.metadata = found["digest"], found["metadata"]
        self.adapter = self.folder / ADAPTER if found["adapter"] else None
        self.records = shared_table(self.records, device)
        probe = self.folder / found["probe"]
        # Not by its method, which raises where a folder may not be entered, while others wait.
        blind = gathered(torch.tensor([int(not os.path.exists(probe))]), device)
        if self.rank == 0:
            probe.unlink(missing_ok=True)
        if any(blind):
            where = ", ".join(str(rank) for rank, is_blind in enumerate(blind) if is_blind)
            raise ValueError(
                f"output {str(self.folder)!r} must be one folder for all processes, but what "
                f"process 0 writes there cannot be seen by {where}. Name one on a file system that "
                "all machines share."
            )
        check_folder(self.folder, "output")

    def finished(self, split: str, round: Round) -> pa.Table | None:
        """Return the rows of a round of a finished split."""
        rows = self.records.filter((pc.field("split") == split) & (pc.field("round") == round.name))
        return rows if _alphas(rows) == round.alphas else None

    def elsewhere(self, split: str) -> pa.Table:
        """Return the rows of the other splits that are finished."""
        return self.records.filter(pc.field("split") != split)

    def measured(self, split: str, round: Round) -> pa.Table:
        """Return the rows of a round of which batches were kept, by however many processes.

        A damaged file goes away with a warning, lest it is one day read beside what replaces it;
        so do examples that belong to no part.
        """
        found, held = [SCHEMA.empty_table()], set[int]()
        if self.folder is None:
            return found[0]
        pattern = self._name(split, round, None)
        for path in sorted((self.folder / _PARTS).glob(f"{pattern}.parquet")):
            try:
                rows, metadata = read_records(path)
                ours = self._mark(path).items() <= metadata.items()
                samples = set(rows["index"].to_pylist())
                if not ours or _alphas(rows) != round.alphas:
                    raise ValueError(f"{path} belongs to another sweep")
                if len(rows) != len(samples) * len(round.alphas) * (1 + len(round.attacks)):
                    raise ValueError(f"{path} has not one row per sample, alpha and attack")
                if held & samples:
                    raise ValueError(f"{path} holds samples of another part")
                held |= samples
                found.append(rows)
            except (ValueError, OSError) as error:
                _log.warning("measuring a batch again: %s", error)
                with writing(self.folder):
                    path.unlink(missing_ok=True)
        for path in (self.folder / _EXAMPLES).glob(f"{pattern}.safetensors"):
            if not (self.folder / _PARTS / f"{path.stem}.parquet").exists():
                with writing(self.folder):
                    path.unlink()
        return pa.concat_tables(found)

    def keep(
        self,
        rows: pa.Table,
        split: str,
        round: Round,
        examples: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write the rows of one batch, after its adversarial examples if there are any."""
        if self.folder is None:
            return
        # After its first sample: no two batches share it, whoever measures them, and when.
        name = self._name(split, round, rows["index"][0].as_py())
        path = self.folder / _PARTS / f"{name}.parquet"
        with writing(self.folder):
            if examples:
                tensors = save({k: v.contiguous() for k, v in examples.items()})
                write_file(tensors, self.folder / _EXAMPLES / f"{name}.safetensors")
            write_records(rows, path, {**self.about, **self._mark(path)})

    def close(self, split: str) -> None:
        """Remove the parts of a split that is in the records, and what kills have left behind."""
        if self.folder is None or self.rank:
            return
        parts = self.folder / _PARTS
        left = [path for path in self.folder.rglob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
        for path in (*parts.glob(f"{split}-*.parquet"), *left):
            path.unlink(missing_ok=True)
        if parts.is_dir() and not any(parts.iterdir()):
            parts.rmdir()

    @staticmethod
    def _name(split: str, round: Round, sample: int | None) -> str:
        """Of the files of one batch, without its ending; a pattern for all batches if None."""
        # No colon, which some file systems cannot write.
        number = "?" * 8 if sample is None else f"{sample:08d}"
        return f"{split}-{round.name.replace(':', '-')}-{number}"

    def _mark(self, path: Path) -> dict[str, str]:
        """What a part says about itself: nobody else's is taken for ours, whatever its name."""
        return {"sweep": self._digest, "part": path.name}

    def _known(self, folder: Path) -> dict[str, Any] | None:
        """The configuration that the folder was begun with."""
        path = folder / CONFIGURATION
        if not path.exists():
            if found := _written(folder):
                raise ValueError(
                    f"output {str(folder)!r} holds {', '.join(found)} and no {CONFIGURATION}, so "
                    "nobody can tell what was measured there, and a sweep would overwrite it. "
                    "Name another output, or delete this folder."
                )
            return None
        content = _read_json(path)
        if content is None or content.pop("format_version", None) != FORMAT_VERSION:
            raise ValueError(
                f"{str(path)!r} is damaged or of another version of lightning_meansparse. Name "
                "another output, or delete this folder to begin anew."
            )
        content.pop("notes", None)
        return content


def clear(folder: Path, *, command: str) -> None:
    """Remove what an earlier sweep of the same command wrote into a folder, and nothing else.

    Args:
        folder: The output of the sweep; need not exist.
        command: The `"command"` in the notes of a sweep that may be removed.

    Raises:
        ValueError: If another sweep wrote there.
    """
    notes = (_read_json(folder / CONFIGURATION) or {}).get("notes")
    if not isinstance(notes, dict) or notes.get("command") != command:
        if found := _written(folder):
            raise ValueError(
                f"output {str(folder)!r} holds {', '.join(found)}, which {command!r} did not "
                "write. Name another output, or delete this folder."
            )
        return
    written = [folder / name for name in _written(folder)]
    written += [*(folder / _PARTS).glob("*.parquet"), *(folder / _EXAMPLES).glob("*.safetensors")]
    # The configuration last: without it nobody could tell whose the rest is.
    for path in sorted(set(written), key=lambda path: path.name == CONFIGURATION):
        path.unlink()


def _sound_records(path: Path) -> tuple[pa.Table, dict[str, Any]]:
    if path.exists():
        try:
            return read_records(path)
        except (ValueError, OSError) as error:
            _log.warning("measuring everything again: %s", error)
    return SCHEMA.empty_table(), {}


def _sound_adapter(folder: Path) -> Path | None:
    if not folder.exists():
        return None
    try:
        read_adapter(folder)
    except (ValueError, OSError) as error:
        _log.warning("measuring the statistics again: %s", error)
        return None
    return folder


def _written(folder: Path) -> list[str]:
    """Which files of a sweep there are, as paths inside the folder."""
    adapter = [f"{ADAPTER}/{name}" for name in (CONFIG_NAME, TENSORS_NAME)]
    names = (RECORDS, SITES, *adapter, CONFIGURATION)
    parts = [f"{_PARTS}/{path.name}" for path in sorted((folder / _PARTS).glob("*.parquet"))]
    return [*(name for name in names if (folder / name).exists()), *parts[:1]]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _alphas(rows: pa.Table) -> tuple[float, ...]:
    return tuple(sorted(pc.unique(rows.column("alpha")).to_pylist()))


def _changes(name: str, old: Any, new: Any) -> Iterator[str]:
    """Every value that differs between two JSON values, with its name, before and after."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from _changes(f"{name}.{key}" if name else key, old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and _titles(old) == _titles(new) != []:
        for title, before, after in zip(_titles(old), old, new, strict=True):
            yield from _changes(f"{name}[{title}]", before, after)
    elif old != new:
        yield f"{name} was {_short(old)}, is {_short(new)}"


def _class(value: object) -> str:
    return f"a {type(value).__name__}"


def _titles(values: list[Any]) -> list[str]:
    """Names of attacks."""
    named = all(isinstance(value, dict) and "name" in value for value in values)
    return [value["name"] for value in values] if named else []


def _short(value: Any) -> str:
    if isinstance(value, list) and (titles := _titles(value)):
        value = titles
    return json.dumps(value, ensure_ascii=False)
