"""Writing images as Parquet in the layout of Hugging Face's Image feature."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_meansparse.data.parts import Rows
from lightning_meansparse.data.pixels import Array

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def write_part(
    path: Path, images: Array, labels: Rows, class_names: Sequence[str], *, keys: tuple[str, str]
) -> None:
    """Write images as PNG, without loss, and their labels with the class names.

    Args:
        path: The Parquet file, replaced in one step.
        images: `(N, C, H, W)`, uint8 with 1 to 4 channels or uint16 with one.
        labels: Class numbers `(N,)`.
        class_names: Name of every class.
        keys: Names of the image and label columns.

    Raises:
        ValueError: If PNG cannot hold the pixels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    coded = [{"bytes": _png(image), "path": None} for image in images]
    struct = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    features = {
        keys[0]: {"_type": "Image"},
        keys[1]: {"names": list(class_names), "_type": "ClassLabel"},
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    schema = pa.schema({keys[0]: struct, keys[1]: pa.int64()}, metadata=metadata)
    table = pa.table([pa.array(coded, struct), pa.array(labels)], schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # PNG is compressed already.
        pq.write_table(table, temporary, compression="none", use_dictionary=False)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _png(image: Array) -> bytes:
    channels = len(image)
    if not (image.dtype == np.uint8 or (image.dtype == np.uint16 and channels == 1)):
        raise ValueError(
            "PNG holds 8 bits in 1 to 4 channels or 16 bits in one, "
            f"not {image.dtype} in {channels}"
        )
    squeezed = image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0))
    mode = "I;16" if image.dtype == np.uint16 else _MODES[channels]
    buffer = io.BytesIO()
    height, width = image.shape[1:]
    Image.frombytes(mode, (width, height), squeezed.tobytes()).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
