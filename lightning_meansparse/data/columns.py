"""Which columns of a table hold images and labels."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

Kind = Literal["image", "classes", "value", "other"]

_log = logging.getLogger(__name__)


def find_columns(
    kinds: Mapping[str, Kind], image_key: str, label_key: str, split: str
) -> tuple[str, str]:
    """Find the columns of images and labels; the default names may stand for the only ones.

    Args:
        kinds: What each column holds: images, numbers of classes with names, other whole numbers
            and texts, anything else.
        image_key: As given to `ImageDataModule`.
        label_key: The same.
        split: For errors.

    Raises:
        ValueError: If a column is not there, or it is not clear which one is meant.
    """
    images = [name for name, kind in kinds.items() if kind == "image"]
    labels = [name for name, kind in kinds.items() if kind == "classes"]
    labels = labels or [name for name, kind in kinds.items() if kind == "value"]
    found = []
    for argument, key, default, like in (
        ("image_key", image_key, "image", images),
        ("label_key", label_key, "label", labels),
    ):
        if key not in kinds and key == default and len(like) == 1:
            _log.info("split %r: %s is %r", split, argument, like[0])
            found.append(like[0])
        elif key not in kinds:
            hint = f"; perhaps {argument}={' or '.join(map(repr, like))}" if like else ""
            raise ValueError(
                f"{argument}={key!r} is no column of split {split!r}, which has: "
                f"{', '.join(kinds)}{hint}"
            )
        else:
            found.append(key)
    if kinds[found[1]] == "image":
        raise ValueError(f"label_key={found[1]!r} of split {split!r} is a column of images")
    return found[0], found[1]


def kinds_of_schema(schema: Any, features: Mapping[str, Any]) -> dict[str, Kind]:
    """What the columns of a Parquet file hold.

    Args:
        schema: Of pyarrow.
        features: What Hugging Face's metadata in the file say of the columns; may be empty.
    """
    import pyarrow as pa

    kinds: dict[str, Kind] = {}
    for field in schema:
        kind = field.type
        if has_bytes(kind):
            kind = kind.field("bytes").type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            kinds[field.name] = "image"
        elif features.get(field.name, {}).get("_type") == "ClassLabel":
            kinds[field.name] = "classes"
        elif pa.types.is_integer(kind) or pa.types.is_string(kind):
            kinds[field.name] = "value"
        else:
            kinds[field.name] = "other"
    return kinds


def has_bytes(kind: Any) -> bool:
    """Whether a column's type is Hugging Face's for an image: `{bytes, path}`."""
    import pyarrow as pa

    return bool(pa.types.is_struct(kind)) and kind.get_field_index("bytes") >= 0


def kinds_of_features(features: Mapping[str, Any]) -> dict[str, Kind]:
    """What the columns of a data set of `datasets` hold."""
    import datasets

    kinds: dict[str, Kind] = {}
    for name, feature in features.items():
        dtype = str(getattr(feature, "dtype", ""))
        # Files without Hugging Face's metadata hold images as bytes, plain or in a struct.
        coded = dtype.endswith("binary") or (isinstance(feature, Mapping) and "bytes" in feature)
        if isinstance(feature, datasets.Image) or coded:
            kinds[name] = "image"
        elif isinstance(feature, datasets.ClassLabel):
            kinds[name] = "classes"
        else:
            kinds[name] = "value" if re.match("u?int|(large_)?string", dtype) else "other"
    return kinds
