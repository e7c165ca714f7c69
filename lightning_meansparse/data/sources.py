"""Opening data sets: whatever the kind, the result is splits of pixels and labels.

Read without further packages: IDX folders, Parquet files, arrays in memory. The Hub, image folders
and saved data sets are read by Hugging Face `datasets`.
"""

from __future__ import annotations

import gzip
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from lightning_meansparse.data.columns import (
    find_columns,
    has_bytes,
    kinds_of_features,
    kinds_of_schema,
)
from lightning_meansparse.data.parts import Rows
from lightning_meansparse.data.pixels import (
    Array,
    Coded,
    CodedPixels,
    Decoder,
    Fit,
    Pixels,
    StoredPixels,
)

MEMORY_LIMIT = 2**30  # bytes: larger Parquet files are left to `datasets`, larger images undecoded
_IDX = re.compile(r"(?P<split>.+)-images[-.]idx[34]-ubyte(\.gz)?")


@dataclass(frozen=True)
class Request:
    """How images and labels are to be found and shaped; the arguments of `ImageDataModule`."""

    image_key: str
    label_key: str
    channels: int | None
    fit: Fit | None
    config_name: str | None
    revision: str | None


@dataclass(frozen=True)
class Split:
    """Images with their labels.

    Args:
        pixels: The images.
        labels: `(N,)`: class numbers, or names when the data set stores names.
        class_names: Names by class number, when the data set stores them.
    """

    pixels: Pixels
    labels: Array
    class_names: tuple[str, ...] | None


Opened = Mapping[str, Callable[[], Split]]


def open_splits(dataset: str | Path | Mapping[str, Any], request: Request) -> Opened:
    """Find the splits of a data set; each is read when called for.

    Args:
        dataset: See `ImageDataModule`.
        request: See `ImageDataModule`.

    Raises:
        FileNotFoundError: If `dataset` is a path that does not exist, or a folder without images.
        TypeError: If it is of no known kind.
        RuntimeError: If the Hub does not have it or cannot be reached.
    """
    if not isinstance(dataset, str | Path):
        if not isinstance(dataset, Mapping):
            raise TypeError(
                "dataset must be a Hub id, a path, or a mapping from split names to data sets or "
                f"to (images, labels) pairs, got {type(dataset).__name__}"
            )
        return {name: _in_memory(value, name, request) for name, value in dataset.items()}
    path = Path(dataset).expanduser()
    if is_local(dataset):
        if not path.exists():
            raise FileNotFoundError(f"dataset={str(dataset)!r} does not exist")
        if path.is_dir() and (idx := _idx_splits(path)):
            return {name: _bound(_read_idx, images, name, request) for name, images in idx.items()}
        files = {} if _is_saved(path) else _parquet_splits(_folder(path, request))
        size = sum(file.stat().st_size for group in files.values() for file in group)
        if files and size <= MEMORY_LIMIT:
            return {
                name: _bound(_read_parquet, group, name, request) for name, group in files.items()
            }
    return {
        name: _bound(_read_hugging_face, data, name, request)
        for name, data in load(dataset, request).items()
    }


def load(dataset: str | Path, request: Request, *, streaming: bool = False) -> Mapping[str, Any]:
    """Load what Hugging Face `datasets` reads: a Hub id, Parquet, image folders, saved data sets.

    Raises:
        FileNotFoundError: If it is a folder with none of these.
        RuntimeError: If the Hub does not have it or cannot be reached.
    """
    if not is_local(dataset):
        return dict(_load_from_hub(str(dataset), request, streaming))
    path = Path(dataset).expanduser()
    if _is_saved(path):
        loaded = _datasets().load_from_disk(str(path))
        # A saved single split has no name of its own.
        splits = loaded if isinstance(loaded, Mapping) else {str(loaded.split or "train"): loaded}
        if streaming:
            return {name: data.to_iterable_dataset() for name, data in splits.items()}
        return splits
    folder = _folder(path, request)
    if files := _parquet_splits(folder):
        names = {split: [str(file) for file in group] for split, group in files.items()}
        parquet: Mapping[str, Any] = _datasets().load_dataset(
            "parquet", data_files=names, streaming=streaming
        )
        return parquet
    if not any(
        file.suffix.lower() in Image.registered_extensions() for file in folder.rglob("*.*")
    ):
        raise FileNotFoundError(
            f"dataset={str(folder)!r} holds none of: IDX files (train-images-idx3-ubyte.gz), "
            "Parquet files (train.parquet), a saved Hugging Face data set, images in "
            "train/<class>/ folders"
        )
    images: Mapping[str, Any] = _datasets().load_dataset(
        "imagefolder", data_dir=str(folder), drop_labels=False, streaming=streaming
    )
    return images


def _folder(path: Path, request: Request) -> Path:
    return path / request.config_name if request.config_name else path


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` made this folder."""
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def is_local(dataset: str | Path) -> bool:
    """Return whether `dataset` names a path rather than a Hub id.

    Examples:
        >>> is_local("zalando-datasets/fashion_mnist"), is_local("./images"), is_local("a.parquet")
        (False, True, True)
    """
    if isinstance(dataset, Path):
        return True
    pathlike = dataset.startswith(("/", ".", "~")) or dataset.endswith(".parquet")
    return pathlike or dataset.count("/") > 1 or Path(dataset).exists()


def _bound(read: Callable[..., Split], *arguments: Any) -> Callable[[], Split]:
    return lambda: read(*arguments)


# --- IDX -----------------------------------------------------------------------------------------


def _idx_splits(folder: Path) -> dict[str, Path]:
    found = {}
    for file in sorted(folder.iterdir(), reverse=True):  # plain before .gz: the latter is skipped
        if match := _IDX.fullmatch(file.name):
            found[match["split"]] = file
    return {"test" if name == "t10k" else name: file for name, file in sorted(found.items())}


def _read_idx(images: Path, split: str, request: Request) -> Split:
    name = re.sub(r"-images([-.])idx[34]", r"-labels\1idx1", images.name.removesuffix(".gz"))
    labels = next(
        (file for ending in ("", ".gz") if (file := images.with_name(name + ending)).exists()), None
    )
    if labels is None:
        raise FileNotFoundError(f"{images} has no labels beside it: {name} or {name}.gz is missing")
    pixels, classes = read_idx(images), read_idx(labels)
    if pixels.ndim not in (3, 4) or classes.shape != pixels.shape[:1]:
        raise ValueError(
            f"{images} and {labels.name} must hold (N, H, W) or (N, H, W, C) images and N labels, "
            f"got shapes {pixels.shape} and {classes.shape}"
        )
    stacked = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    return Split(_stored(stacked, split, request), classes.astype(np.int64), None)


def read_idx(path: Path) -> Array:
    """Read an IDX file of bytes, plain or gzipped (format: http://yann.lecun.com/exdb/mnist).

    Raises:
        ValueError: If the file is cut off or holds another type.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    if len(data) < 4 or data[:3] != b"\0\0\x08" or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{path} is no IDX file of bytes: it starts with {data[:4].hex(' ')!r}")
    shape = tuple(np.frombuffer(data, ">u4", data[3], 4).astype(int))
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    if body.size != np.prod(shape):
        raise ValueError(f"{path} announces {shape} and holds {body.size} bytes: is it cut off?")
    return body.reshape(shape)


# --- Arrays --------------------------------------------------------------------------------------


def _in_memory(value: Any, split: str, request: Request) -> Callable[[], Split]:
    if isinstance(value, Sequence) and len(value) == 2:
        return _bound(_read_pair, value, split, request)
    if hasattr(value, "features") and hasattr(value, "cast_column"):
        return _bound(_read_hugging_face, value, split, request)
    raise TypeError(
        f"split {split!r} of dataset must be a datasets.Dataset or a pair (images, labels), "
        f"got {type(value).__name__}"
    )


def _read_pair(pair: Sequence[Any], split: str, request: Request) -> Split:
    images, labels = (
        value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        for value in pair
    )
    if images.ndim != 4 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"split {split!r} of dataset must be images (N, C, H, W) and labels (N,), got shapes "
            f"{images.shape} and {labels.shape}"
        )
    if np.issubdtype(images.dtype, np.floating):
        images = images.astype(np.float32)
        if len(images) and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"float images of split {split!r} must be in [0, 1], got [{images.min():.4g}, "
                f"{images.max():.4g}]; give uint8, or undo the normalisation"
            )
    elif images.dtype not in (np.uint8, np.uint16):
        raise TypeError(f"images of split {split!r} must be float, uint8 or uint16: {images.dtype}")
    return Split(_stored(images, split, request), labels, None)


def _stored(images: Array, split: str, request: Request) -> StoredPixels:
    count, channels = images.shape[:2]
    if count == 0:
        raise ValueError(f"split {split!r} has no images")
    if not 1 <= channels <= 4:
        raise ValueError(f"images of split {split!r} must have 1 to 4 channels, got {channels}")
    if request.channels == 3 and channels == 1:
        images = np.repeat(images, 3, axis=1)
    elif request.channels not in (None, channels):
        raise ValueError(
            f"images of split {split!r} have {channels} channels; arrays are converted from 1 to 3 "
            f"alone, not to channels={request.channels}"
        )
    return StoredPixels(images, request.fit)


# --- Parquet -------------------------------------------------------------------------------------


def _parquet_splits(path: Path) -> dict[str, list[Path]]:
    files = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
    splits: dict[str, list[Path]] = {}
    for file in files or sorted((path / "data").glob("*.parquet")):
        name = re.sub(r"-\d+-of-\d+.*", "", file.stem)  # train-00000-of-00002: a shard of train
        splits.setdefault(name, []).append(file)
    return splits


def _read_parquet(files: list[Path], split: str, request: Request) -> Split:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(files[0])
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    kinds = kinds_of_schema(schema, features)
    image_key, label_key = find_columns(kinds, request.image_key, request.label_key, split)
    if kinds[image_key] != "image":
        raise TypeError(
            f"column image_key={image_key!r} of split {split!r} must hold coded images "
            f"(bytes, or a Hugging Face Image), got {schema.field(image_key).type}"
        )
    table = pa.concat_tables([pq.read_table(f, columns=[image_key, label_key]) for f in files])
    images = table.column(image_key).combine_chunks()
    struct = has_bytes(images.type)

    def fetch(rows: Rows) -> list[Coded]:
        taken = images.take(pa.array(rows)).to_pylist()
        found = taken if struct else [{"bytes": value} for value in taken]
        return [coded if coded and coded["bytes"] else None for coded in found]

    where = f"split {split!r}"
    decode = Decoder(_open, request.channels, request.fit)
    pixels = CodedPixels(fetch, decode, len(images), where)
    labels, names = table.column(label_key), features.get(label_key, {}).get("names")
    if labels.null_count:
        raise ValueError(f"split {split!r} has {labels.null_count} rows without a label")
    return Split(pixels, np.asarray(labels.to_pylist()), tuple(names) if names else None)


def _open(coded: Mapping[str, Any]) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(coded["bytes"])))


# --- Hugging Face --------------------------------------------------------------------------------


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            "this kind of data set is read by Hugging Face datasets: "
            'pip install "lightning_meansparse[hf]"'
        ) from error
    return datasets


def _load_from_hub(name: str, request: Request, streaming: bool) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset(
            name, request.config_name, revision=request.revision, streaming=streaming
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise RuntimeError(
            f"dataset={name!r} is no local path and the Hub did not give it "
            f"({_first_line(error)}); check the name, the connection and, for gated data, "
            "`hf auth login`"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_hugging_face(data: Any, split: str, request: Request) -> Split:
    columns = find_hugging_face(data, split, request)
    # Coded, and whatever format the caller has set for his own use.
    images = data.with_format(None).select_columns(columns.image)
    images = images.cast_column(columns.image, _datasets().Image(decode=False))

    def fetch(rows: Rows) -> list[Coded]:
        found: list[Coded] = images[rows.tolist()][columns.image]
        return found

    where = f"split {split!r}"
    decode = Decoder(columns.open, request.channels, request.fit)
    pixels = CodedPixels(fetch, decode, len(data), where)
    column = data.select_columns(columns.label).with_format("arrow")[:]
    return Split(pixels, np.asarray(column[columns.label].to_pylist()), columns.names)


@dataclass(frozen=True)
class Columns:
    """What a data set of `datasets` has where.

    Args:
        image: Column of images.
        label: Column of labels.
        open: Decodes an image.
        names: Of the classes, where it stores them.
    """

    image: str
    label: str
    open: Callable[[Mapping[str, Any]], Image.Image]
    names: tuple[str, ...] | None


def find_hugging_face(data: Any, split: str, request: Request) -> Columns:
    """Find the columns of a data set of `datasets`, which may be a stream."""
    datasets = _datasets()
    kinds = kinds_of_features(data.features)
    image_key, label_key = find_columns(kinds, request.image_key, request.label_key, split)
    image, label = data.features[image_key], data.features[label_key]
    if kinds[image_key] != "image":
        raise TypeError(
            f"column image_key={image_key!r} of split {split!r} must be an Image feature, "
            f"got {image}; mend it with cast_column({image_key!r}, datasets.Image())"
        )
    names = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None
    mode = getattr(image, "mode", None)
    return Columns(image_key, label_key, datasets.Image(mode=mode).decode_example, names)
